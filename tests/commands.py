"""Run the `elbo` command in a new process or in the process of the test, and write data files for the command.

A new process imports torch, which takes seconds, unless `tests.preloaded` starts it. A test needs a new process only to
check signals, kills, standard output that is a pipe or a terminal, limits, and libraries that are absent.
"""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from elbo import cli
from tests.data import ROOT
from tests.preloaded import run_preloaded

CompletedCommand = subprocess.CompletedProcess[str]
Rows = npt.NDArray[np.float64]
HEADER = "cpu [%],memory [GB],disk,network,errors"


def command(*arguments: str, environment: dict[str, str] | None = None) -> CompletedCommand:
    """Run `elbo` in a new process, in which only ELBO_PLOTS and the ELBO_* variables in `environment` are set."""
    inherited = {key: value for key, value in os.environ.items() if key == "ELBO_PLOTS" or not key.startswith("ELBO_")}
    return run_preloaded(
        [sys.executable, "-m", "elbo", *arguments],
        cwd=ROOT,
        env=inherited | (environment or {}),
        text=True,
    )


def two_factor_rows(rows: int, seed: int) -> Rows:
    """Return random rows of five metrics that depend on two random loads.

    The fifth metric is the first load plus 10 plus noise.
    """
    random = np.random.RandomState(seed)
    loads = random.standard_normal((rows, 2))
    mixing = np.array([[2, 0, 1, 3, 1], [0, 5, 1, -2, 0]])
    return np.asarray(loads @ mixing + 10 + 0.1 * random.standard_normal((rows, 5)))


def write(path: Path, rows: Rows, header: str = HEADER) -> str:
    """Write `rows` to `path` as CSV; return the path as a string."""
    np.savetxt(path, rows, delimiter=",", header=header, comments="", fmt="%.9g")
    return str(path)


def train_hosts(folder: Path) -> Path:
    """Train hosts@1, a PCA with two latents, into the artifact folder `folder`, and return the folder."""
    data = write(folder / "train.csv", two_factor_rows(1000, seed=0))
    arguments = ["--model", "pca", "--name", "hosts", "--latents", "2", "--artifacts", str(folder)]
    succeed("train", data, *arguments, "--runs", str(folder / "runs"))
    return folder


def in_process(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run `elbo` in this process; return its exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


def succeed(*arguments: str) -> CompletedCommand:
    """Run `elbo` in this process. Assert that it exits with status 0. For fixtures, which cannot use `capsys`."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert not stop.value.code, err.getvalue()
    return CompletedCommand(arguments, 0, out.getvalue(), err.getvalue())
