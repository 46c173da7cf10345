"""Dependencies are locked, git holds no large files or machine paths, and every make target is documented."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import require

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCKED = {
    "serve": PROJECT["dependencies"],
    "train": PROJECT["dependencies"] + EXTRAS["train"],
    "dev": PROJECT["dependencies"] + EXTRAS["train"] + EXTRAS["dev"],
    "browser": PROJECT["dependencies"] + EXTRAS["browser"],  # apart: with it dev.lock would be too large for git
    "docs": PROJECT["dependencies"] + EXTRAS["docs"],
}


def name_of(path: object) -> str:
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else str(path)


def pins(lock: str) -> dict[str, str]:
    text = (ROOT / "requirements" / f"{lock}.lock").read_text()
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def tracked() -> list[Path]:
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    require(result.returncode == 0, "this needs git and a checkout")
    paths = (ROOT / name for name in result.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("lock", LOCKED)
def test_every_dependency_is_locked_at_a_version_that_it_allows(lock: str) -> None:
    locked = pins(lock)
    for requirement in map(Requirement, LOCKED[lock]):
        name = canonicalize_name(requirement.name)
        if name == "torch":  # installed in its own step: its wheel differs by accelerator
            assert name not in locked
        else:
            assert name in locked, f"{requirement} is in no lock: run make lock"
            assert locked[name] in requirement.specifier, f"{requirement} is locked at {locked[name]}: run make lock"


@pytest.mark.parametrize("lock", LOCKED)
def test_every_locked_package_has_a_hash_and_no_address(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.lock").read_text()
    entries = re.findall(r"^[\w.-]+==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    assert len(entries) == len(pins(lock)) > 0
    assert not re.search(r"://|^-|^ *--(?!hash)", text, re.MULTILINE)


def test_the_smaller_locks_are_parts_of_the_larger() -> None:
    assert pins("serve").items() <= pins("train").items() <= pins("dev").items()
    for lock in ("browser", "docs"):
        dev, other = pins("dev"), pins(lock)
        assert pins("serve").items() <= other.items()
        assert {name for name in dev.keys() & other.keys() if dev[name] != other[name]} == set()


def test_the_locks_were_made_with_cpu_wheels_of_torch() -> None:
    assert [name for name in pins("dev") if re.match("nvidia|cuda|triton", name)] == [], (
        "run make lock with TORCH_INDEX"
    )


def test_git_holds_no_file_over_200_kilobytes() -> None:
    assert [name_of(path) for path in tracked() if path.stat().st_size > 200_000] == []


def test_git_holds_no_path_of_a_developers_machine() -> None:
    pattern = re.compile(r"(?<![\w.~$}-])/(?:root|home|Users|work|tmp)/\w")
    found = []
    for path in tracked():
        lines = path.read_text(errors="replace").splitlines()
        found += [f"{name_of(path)}:{number}: {line}" for number, line in enumerate(lines, 1) if pattern.search(line)]
    assert found == []


def test_every_make_target_is_described_by_make_help() -> None:
    declared = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    result = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True)
    require(result.returncode == 0, "this needs make")
    assert re.findall(r"^make ([\w-]+) +\S", result.stdout, re.MULTILINE) == declared


def test_what_is_missing_fails_in_ci_and_skips_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no accelerator"):
        require(False, "no accelerator")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no accelerator"):
        require(False, "no accelerator")
    require(True, "nothing is missing")
