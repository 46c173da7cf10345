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
BASE = PROJECT["dependencies"]


def requirements_of(*extras: str) -> list[str]:
    """Return the requirements of Elbo with `extras`. An extra may name another extra of Elbo."""
    found = list(BASE)
    for name in extras:
        for requirement in EXTRAS[name]:
            own = re.fullmatch(r"elbo\[(\w+)\]", requirement)
            found += requirements_of(own[1]) if own else [requirement]
    return found


LOCKED = {
    "serve": requirements_of("serve"),
    "train": requirements_of("train"),
    "dev": requirements_of("train", "dev"),
    "browser": requirements_of("browser"),  # locked separately: dev.lock would become too large with these packages
    "docs": requirements_of("docs"),
    "audit": [line.partition("#")[0] for line in (ROOT / "requirements" / "audit.in").read_text().splitlines()],
}


def pinned_versions(lock: str) -> dict[str, str]:
    """Return the version of each package in requirements/<lock>.lock."""
    text = (ROOT / "requirements" / f"{lock}.lock").read_text()
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)}


def tracked_files() -> list[Path]:
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    require(result.returncode == 0, "this test needs git and a checkout")
    paths = (ROOT / name for name in result.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("lock", LOCKED)
def test_lock_file_pins_every_dependency_to_an_allowed_version(lock: str) -> None:
    locked = pinned_versions(lock)
    for requirement in map(Requirement, LOCKED[lock]):
        name = canonicalize_name(requirement.name)
        if name == "torch":  # installed separately: its wheel depends on the accelerator
            assert name not in locked
        else:
            assert name in locked, f"{requirement} is missing from {lock}.lock: run make lock"
            assert locked[name] in requirement.specifier, (
                f"{lock}.lock pins {name} to {locked[name]}, expected {requirement.specifier}: run make lock"
            )


@pytest.mark.parametrize("lock", LOCKED)
def test_every_locked_package_has_a_hash_and_no_url(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.lock").read_text()
    entries = re.findall(r"^[\w.-]+==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    assert len(entries) == len(pinned_versions(lock)) > 0
    assert not re.search(r"://|^-|^ *--(?!hash)", text, re.MULTILINE)


def test_lock_files_pin_shared_packages_to_the_same_versions() -> None:
    serve, dev = pinned_versions("serve"), pinned_versions("dev")
    assert serve.items() <= pinned_versions("train").items() <= dev.items()
    for lock in ("browser", "docs"):
        other = pinned_versions(lock)
        assert {name for name in dev.keys() & other.keys() if dev[name] != other[name]} == set()


def test_packages_without_an_extra_are_few_and_need_no_torch() -> None:
    assert {Requirement(text).name for text in BASE} == {"httpx", "numpy", "orjson", "typer"}
    assert "torch==2.13.0" in requirements_of("serve")


def test_extra_for_training_contains_what_serving_needs() -> None:
    assert set(requirements_of("serve")) <= set(requirements_of("train"))


def test_dev_lock_contains_no_cuda_packages() -> None:
    cuda = [name for name in pinned_versions("dev") if re.match("nvidia|cuda|triton", name)]
    assert cuda == [], "run make lock with TORCH_INDEX set to the CPU wheels"


def test_tracked_files_are_at_most_200_kilobytes() -> None:
    others = [path for path in tracked_files() if path.suffix != ".lock"]  # a lock file grows with each package
    assert [str(path.relative_to(ROOT)) for path in others if path.stat().st_size > 200_000] == []


def test_tracked_files_contain_no_absolute_path_of_a_developers_machine() -> None:
    pattern = re.compile(r"(?<![\w.~$}-])/(?:root|home|Users|work|tmp)/\w")
    found = []
    for path in tracked_files():
        lines = path.read_text(errors="replace").splitlines()
        name = path.relative_to(ROOT)
        found += [f"{name}:{number}: {line}" for number, line in enumerate(lines, 1) if pattern.search(line)]
    assert found == []


def test_make_help_describes_every_phony_target() -> None:
    declared = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    result = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True)
    require(result.returncode == 0, "this test needs make")
    assert re.findall(r"^make ([\w-]+) +\S", result.stdout, re.MULTILINE) == declared


def test_unmet_requirement_fails_the_test_in_ci_and_skips_it_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no accelerator"):
        require(False, "no accelerator")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no accelerator"):
        require(False, "no accelerator")
    require(True, "nothing is missing")
