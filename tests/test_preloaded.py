"""A program in a preloaded process behaves like a program that Python has started."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.data import ROOT
from tests.forked_command import forked_elbo
from tests.preloaded import PreloadedProcess, is_forkable, run_preloaded

pytestmark = pytest.mark.slow

REPORT = """
import json, os, sys
import numpy
print("error", file=sys.stderr)
print(json.dumps({
    "arguments": sys.argv[1:], "folder": os.getcwd(), "value": os.environ.get("VALUE"), "home": os.environ.get("HOME"),
    "parent": os.getppid(), "input": sys.stdin.read(), "name": __name__, "random": float(numpy.random.rand()),
    "models": "models" in sys.modules, "torch": "torch" in sys.modules, "files": sorted(os.listdir("/proc/self/fd")),
}))
sys.exit(7)
"""


def report(folder: Path) -> dict[str, Any]:
    """Run the program REPORT, check its exit status and standard error, and return what it reports."""
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {"VALUE": "1", **{name: value for name, value in os.environ.items() if name != "HOME"}}
    command = [sys.executable, "-c", REPORT, "a", "b c"]
    with PreloadedProcess(command, cwd=folder, env=environment, text=True, **streams) as process:
        out, err = process.communicate("typed", timeout=60)
    assert (process.returncode, err) == (7, "error\n")
    found: dict[str, Any] = json.loads(out)
    return found


def test_program_is_a_child_of_the_test_and_gets_its_arguments_environment_folder_and_streams(tmp_path: Path) -> None:
    found, other = report(tmp_path), report(tmp_path)
    assert found.pop("random") != other.pop("random")
    assert found.pop("files") == ["0", "1", "2", "3"]  # 3 is open while `listdir` reads the folder
    assert found == {
        "arguments": ["a", "b c"], "folder": str(tmp_path), "value": "1", "home": None, "parent": os.getpid(),
        "input": "typed", "name": "__main__", "models": False, "torch": True,
    }  # fmt: skip


def test_module_imports_from_its_own_folder_first(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import sys, helper\nprint(__name__, sys.argv[1:], helper.__file__)")
    (tmp_path / "helper.py").touch()
    run = run_preloaded([sys.executable, "-m", "program", "x"], cwd=tmp_path, text=True)
    assert run.stdout == f"__main__ ['x'] {tmp_path / 'helper.py'}\n"


def test_status_is_the_signal_if_a_program_was_killed_and_1_if_it_raised_an_error() -> None:
    with PreloadedProcess([sys.executable, "-c", "import time; time.sleep(60)"], cwd=ROOT) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL
    run = run_preloaded([sys.executable, "-c", "raise ValueError('why')"], text=True)
    assert run.returncode == 1
    assert run.stderr.endswith("ValueError: why\n")


def test_program_has_the_limit_on_open_files_that_prlimit_sets_at_the_start_of_its_command() -> None:
    code = "import resource, sys; print('torch' in sys.modules, *resource.getrlimit(resource.RLIMIT_NOFILE))"
    run = run_preloaded(["prlimit", "--nofile=200", sys.executable, "-c", code], text=True)
    assert run.stdout == "True 200 200\n"


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        (["-X", "dev", "-c", "pass"], {}),
        (["program.py", "-c", "pass"], {}),
        (["-c", "pass"], {"OMP_NUM_THREADS": "7"}),
        (["-c", "pass"], {"PYTHONHASHSEED": "7"}),
    ],
)
def test_program_that_needs_a_fresh_start_of_python_is_not_forked(
    arguments: list[str], variables: dict[str, str]
) -> None:
    assert not is_forkable([sys.executable, *arguments], dict(os.environ) | variables)
    assert not is_forkable(["env", *arguments], dict(os.environ))


def test_elbo_in_a_shell_script_gets_its_arguments_environment_folder_and_streams(tmp_path: Path) -> None:
    script = "mkdir keys; cd keys; elbo keygen a.key | cat; ls; elbo inspect absent; echo $?; elbo --version > version"
    with forked_elbo(tmp_path) as programs:
        environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "ELBO_ARTIFACTS": "/nowhere"}
        run = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout.splitlines()[0] == "private key: a.key"
    assert run.stdout.splitlines()[-3:] == ["a.key", "a.key.pub", "2"]
    assert run.stderr.startswith("elbo: error: no model 'absent' in /nowhere ")
    assert (tmp_path / "keys" / "version").read_text() == f"elbo {version('elbo')}\n"
    assert not run.returncode
