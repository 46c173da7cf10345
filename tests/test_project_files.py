"""The project files that contributors use: interpreter search, workflow, templates, hooks and wheel."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.conftest import require
from tests.data import ROOT

FIND_PYTHON = ROOT / "requirements" / "find-python"


def write_executable(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def find_python(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run requirements/find-python with only `folder` on the PATH."""
    environment = {"PATH": str(folder), **variables}
    return subprocess.run(["/bin/sh", FIND_PYTHON], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["python3.11", "python3.12", "python3.13", "python3", "python"])
def test_find_python_accepts_a_supported_interpreter_under_any_usual_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(sys.executable)
    result = find_python(tmp_path)
    assert (result.returncode, result.stdout.strip()) == (0, str(tmp_path / name))


def test_find_python_uses_uv_if_the_path_has_no_supported_interpreter(tmp_path: Path) -> None:
    write_executable(tmp_path / "python3", "exit 1")
    write_executable(tmp_path / "uv", f"echo {sys.executable}")
    result = find_python(tmp_path)
    assert (result.returncode, result.stdout.strip()) == (0, sys.executable)


def test_find_python_prints_one_line_of_help_if_it_finds_neither_a_supported_python_nor_uv(tmp_path: Path) -> None:
    write_executable(tmp_path / "python3", 'test "$1" = --version && echo Python 3.14.0')
    result = find_python(tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "needs Python 3.11, 3.12 or 3.13" in line
    assert "found Python 3.14.0" in line
    assert "install uv" in line


def test_find_python_tries_only_the_interpreter_named_by_the_python_variable(tmp_path: Path) -> None:
    (tmp_path / "python3").symlink_to(sys.executable)
    (tmp_path / "custom").symlink_to(sys.executable)
    assert find_python(tmp_path, PYTHON="custom").stdout.strip() == str(tmp_path / "custom")
    assert find_python(tmp_path, PYTHON="absent").returncode == 1


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/*_*.yml"),
        ("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
    ],
)
def test_github_files_match_their_schemas(schema: str, pattern: str) -> None:
    files = sorted(map(str, ROOT.glob(pattern)))
    assert files
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_workflow_runs_the_ci_script_on_every_supported_python() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["check"]
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]


def test_every_pre_commit_hook_runs_a_locked_tool() -> None:
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    python_lock = (ROOT / "requirements" / "dev.lock").read_text()
    node_lock = json.loads((ROOT / "package-lock.json").read_text())["packages"]
    for hook in repositories[0]["hooks"]:
        folder, tool = hook["entry"].split()[0].rsplit("/", 1)
        if folder == "node_modules/.bin":
            assert any(tool in package.get("bin", {}) for package in node_lock.values())
        else:
            assert folder == ".venv/bin"
            assert f"\n{tool}==" in python_lock


def test_wheel_contains_every_package_with_its_types_and_nothing_else(tmp_path: Path) -> None:
    require(shutil.which("git"), "the wheel is built from a checkout")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONWARNINGS": ""})
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"models/py.typed", "training/py.typed", "service/py.typed", "elbo/py.typed"} <= set(names)
    modules = {
        str(path.relative_to(ROOT))
        for folder in ("models", "training", "service", "elbo")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert modules == {name for name in names if name.endswith(".py")}
