"""Nothing leaves the machine: the commands open no connection and write no file into the home folder.

The commands run under strace, in a new home folder and without the variable CI, which disables the telemetry of some
libraries. Without a network, a library that sends data would try to resolve a name, and strace would show that.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import two_factor_rows, write
from tests.conftest import require
from tests.data import ROOT
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

SENDING_CALLS = "connect,sendto,sendmsg,sendmmsg"
SERVE_SECONDS = 6.0  # ONNX Runtime tries to send its telemetry within 4 s after it has created a session


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the rows in data.csv and recent.csv, and with the model `hosts` in artifacts/."""
    require(shutil.which("strace"), "strace is not installed")
    folder = tmp_path_factory.mktemp("telemetry")
    data = write(folder / "data.csv", two_factor_rows(300, seed=0))
    write(folder / "recent.csv", two_factor_rows(300, seed=1))
    traced = Traced(folder, "train", "-m", "elbo", "train", data, "--model", "pca", "--name", "hosts", "--latents", "2")
    assert traced.wait() == 0, traced.output()
    assert traced.internet_calls() == []
    assert traced.home_files() == []
    return folder


class Traced:
    """A Python process under strace, in its own home folder.

    Args:
        folder: the folder with `artifacts`. The trace, the output and the home folder are written into it.
        name: name of the run.
        arguments: arguments of Python.
        variables: further environment variables.
    """

    def __init__(self, folder: Path, name: str, *arguments: str, **variables: str) -> None:
        self._trace = folder / f"{name}.trace"
        self._output = folder / f"{name}.output"
        self._home = folder / f"{name}.home"
        self._home.mkdir()
        dropped = ("ELBO_", "XDG_", "ORT_", "MPLCONFIGDIR")
        environment = {key: value for key, value in os.environ.items() if key != "CI" and not key.startswith(dropped)}
        environment |= {"HOME": str(self._home), "ELBO_ARTIFACTS": str(folder / "artifacts"), "ELBO_PORT": "0"}
        environment |= {"ELBO_RUNS": str(folder / "runs"), "PYTHONUNBUFFERED": "1", **variables}
        strace = ["strace", "--follow-forks", "--seccomp-bpf"]  # with seccomp, only traced calls stop the process
        strace += ["--quiet=all", f"--trace={SENDING_CALLS}", "--signal=none"]
        with self._output.open("wb") as output:
            self.popen = subprocess.Popen(
                [*strace, "--output", str(self._trace), sys.executable, *arguments],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
            )

    def wait(self) -> int:
        """Wait for the end of the process and return its exit status."""
        return self.popen.wait(120)

    def output(self) -> str:
        """Return what the process has written so far."""
        return self._output.read_text()

    def is_listening_or_ended(self) -> bool:
        """Return whether a server has said that it listens, or the process has ended."""
        return "listening" in self.output() or self.popen.poll() is not None

    def internet_calls(self) -> list[str]:
        """Return the system calls that name an internet address, of any host."""
        return [line for line in self._trace.read_text().splitlines() if "sa_family=AF_INET" in line]

    def home_files(self) -> list[Path]:
        """Return the files and folders in the home folder."""
        return list(self._home.rglob("*"))


@pytest.mark.parametrize(
    "arguments",
    [
        "score hosts {folder}/recent.csv",
        "calibrate hosts {folder}/recent.csv",
        "train {folder}/data.csv --model ensemble --name deep --epochs 2 --force --hidden 8 --latents 2 --tensorboard",
    ],
    ids=["score", "calibrate", "train an ensemble"],
)
def test_command_opens_no_connection_and_leaves_the_home_folder_empty(
    folder: Path, tmp_path: Path, arguments: str
) -> None:
    (tmp_path / "artifacts").symlink_to(folder / "artifacts")
    traced = Traced(tmp_path, "command", "-m", "elbo", *arguments.format(folder=folder).split())
    assert traced.wait() == 0, traced.output()
    assert traced.internet_calls() == []
    assert traced.home_files() == []


SERVERS: dict[str, dict[str, str]] = {
    "one-process": {},
    "two-workers-and-telemetry-enabled": {"ELBO_WORKERS": "2", "ORT_DISABLE_TELEMETRY": "0"},
}


def test_server_opens_no_connection_and_leaves_the_home_folder_empty(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "artifacts").symlink_to(folder / "artifacts")
    servers = [
        Traced(tmp_path, name, "-m", "service", ELBO_BACKEND="onnx", **variables) for name, variables in SERVERS.items()
    ]
    for traced in servers:
        wait_until(traced.is_listening_or_ended, seconds=60)
        assert "with onnx" in traced.output()
    time.sleep(SERVE_SECONDS)
    for traced in servers:
        children = Path(f"/proc/{traced.popen.pid}/task/{traced.popen.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        assert traced.wait() == 0, traced.output()
        assert traced.internet_calls() == []
        assert traced.home_files() == []
