"""Two processes under torchrun, talking by gloo, against one with the same global batch; and what they refuse."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from models.artifact import load
from models.manifest import resolve, versions
from tests.data import ROOT
from training.fitting.distributed import ProcessGroup

pytestmark = pytest.mark.slow


def launched(processes: int, folder: Path, *options: str) -> "subprocess.Popen[str]":
    """`elbo train digits` in `processes` processes, publishing in `folder`."""
    options = ("--name", "m", "--artifacts", str(folder / "artifacts"), "--runs", str(folder / "runs"), *options)
    return started(processes, "-m", "training", "digits", *options)


def started(processes: int, *program: str) -> "subprocess.Popen[str]":
    """Python running `program` in `processes` processes."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    return subprocess.Popen(
        [sys.executable, *launcher, *program],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def finished(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


VAE = ("--model", "vae", "--warm-up", "20", "--samples", "2")
AE = ("--model", "ae", "--noise", "0.3", "--masking", "0.1", "--l2", "0.0001")


@pytest.mark.parametrize("options", [VAE, AE], ids=["vae", "ae"])
def test_two_processes_give_what_one_gives(tmp_path: Path, options: tuple[str, ...]) -> None:
    options = (*options, "--epochs", "4", "--batch-size", "101")  # odd, and the last batch of an epoch is shorter
    runs = [launched(count, tmp_path / str(count), *options) for count in (1, 2)]
    outputs = [finished(run) for run in runs]
    for said in ("published", "next:"):
        assert outputs[1].count(said) == 1, "only the first process publishes and reports"
    one, two = (load(resolve(tmp_path / str(count) / "artifacts", "m")) for count in (1, 2))
    rows = torch.from_numpy(np.random.RandomState(0).uniform(size=(50, 64)).astype(np.float32))
    for method in ("forward", "score"):
        expected, got = (getattr(model.module, method)(rows) for model in (one, two))
        expected, got = (answer if method == "forward" else answer[0] for answer in (expected, got))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for name, value in one.manifest.metrics.items():
        assert two.manifest.metrics[name] == pytest.approx(value, rel=1e-5)
    assert versions(tmp_path / "2" / "artifacts", "m") == [1]


def test_a_run_of_two_processes_of_which_one_is_killed_goes_on_in_one(tmp_path: Path) -> None:
    options = (*VAE, "--epochs", "30", "--checkpoint-seconds", "0")
    run = launched(2, tmp_path, *options)
    checkpoint = tmp_path / "runs" / "m" / "checkpoint.pt"
    for _ in range(600):
        if checkpoint.exists() or run.poll() is not None:
            break
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "published" not in output
    assert "resumed at step" in finished(launched(1, tmp_path, *options, "--resume"))
    load(resolve(tmp_path / "artifacts", "m"))


@pytest.mark.parametrize("options", [("--variance", "optimal"), ("--free-bits", "0.1")])
def test_what_looks_at_a_whole_batch_is_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    run = launched(2, tmp_path, "--model", "vae", *options)
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "train in one process" in output


@pytest.mark.parametrize(("rows", "count"), [(10, 3), (2, 3), (1, 2), (128, 2), (7, 7)])
def test_shares_are_a_partition_and_as_even_as_can_be(rows: int, count: int) -> None:
    shares = [ProcessGroup(rank, count).slice_of(rows) for rank in range(count)]
    assert [i for share in shares for i in range(share.start, share.stop)] == list(range(rows))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1


LEAVES = """
import sys
from pathlib import Path

import torch

from training.fitting.distributed import join_process_group

with join_process_group() as processes:
    torch.optim.AdamW([torch.zeros(1)])  # imports what keeps the group of that moment
    processes.broadcast_path(Path("published"))
left = [name for task in Path("/proc/self/task").iterdir() if "gloo" in (name := (task / "comm").read_text())]
sys.stdout.write(f"{left}\\n")  # in one piece: print() may write the end of a line after another process's line
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the threads of a process are listed in Linux's /proc")
def test_no_thread_outlives_the_group(tmp_path: Path) -> None:
    """One that frees a tensor while the interpreter ends aborts the process."""
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES)
    run = started(2, str(script))
    assert finished(run).count("[]\n") == 2
