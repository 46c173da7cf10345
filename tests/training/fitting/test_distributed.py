"""Training with two processes, started by torchrun with gloo, compared with training in one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.artifact import load
from models.manifest import resolve, versions
from tests.commands import in_process
from tests.data import ROOT
from tests.preloaded import PreloadedProcess
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.table import read_table
from training.errors import FitError
from training.fitting.distributed import ProcessGroup
from training.train import train

pytestmark = pytest.mark.slow


def start_training(folder: Path, *options: str) -> "subprocess.Popen[str]":
    """Start training on the digits with two processes that write all files to `folder`."""
    return start_python("-m", "training", "digits", *written_to(folder), *options)


def written_to(folder: Path) -> list[str]:
    """Return the options that write all files of the model `m` to `folder`."""
    return ["--name", "m", "--artifacts", str(folder / "artifacts"), "--runs", str(folder / "runs")]


def start_python(*program: str) -> "subprocess.Popen[str]":
    """Start Python with `program` in two processes."""
    return PreloadedProcess(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for_output(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


VAE = ("--model", "vae", "--warm-up", "20", "--samples", "2")
AE = ("--model", "ae", "--noise", "0.3", "--masking", "0.1", "--l2", "0.0001")
# A rounding error may change which row is the nearest.
COUNTS_OF_NEIGHBOURS = {"sample_density", "sample_coverage", "copy_p_value"}


@pytest.mark.parametrize("options", [VAE, AE], ids=["vae", "ae"])
def test_two_processes_train_the_same_model_as_one_process(
    tmp_path: Path, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    # The batch size is odd, and the last batch is smaller.
    options = (*options, "--epochs", "4", "--batch-size", "101", "--force")
    run = start_training(tmp_path / "2", *options)
    code, _, err = in_process(capsys, "train", "digits", *written_to(tmp_path / "1"), *options)
    assert code == 0, err
    output = wait_for_output(run)
    for line in ("published", "next:"):
        assert output.count(line) == 1, "only the first process publishes and reports"
    one, two = (load(resolve(tmp_path / str(count) / "artifacts", "m")) for count in (1, 2))
    rows = torch.from_numpy(np.random.RandomState(0).uniform(size=(50, 64)).astype(np.float32))
    for method in ("forward", "score"):
        expected, got = (getattr(model.module, method)(rows) for model in (one, two))
        expected, got = (output if method == "forward" else output[0] for output in (expected, got))
        # A score divides by variances that may be tiny, which amplifies the rounding errors of the networks.
        tolerance = 1e-5 if method == "forward" else 1e-3
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    for name, value in one.manifest.metrics.items():
        tolerance = 0.02 if name in COUNTS_OF_NEIGHBOURS else 1e-5
        assert two.manifest.metrics[name] == pytest.approx(value, rel=tolerance), name
    assert versions(tmp_path / "2" / "artifacts", "m") == [1]


def test_run_can_be_resumed_in_one_process_after_one_of_two_processes_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*VAE, "--epochs", "30", "--checkpoint-seconds", "0")
    run = start_training(tmp_path, *options)
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
    code, _, err = in_process(capsys, "train", "digits", *written_to(tmp_path), *options, "--resume")
    assert code == 0, err
    assert "resumed at step" in err
    load(resolve(tmp_path / "artifacts", "m"))


@pytest.mark.parametrize("option", [{"variance": "optimal"}, {"free_bits": 0.1}])
def test_one_of_two_processes_refuses_an_option_that_needs_the_whole_batch(
    tmp_path: Path, option: dict[str, Any]
) -> None:
    config = TrainConfig(model="vae", name="m", **option)
    with pytest.raises(FitError, match="need the whole batch in one process"):
        train(config, read_table("digits"), tmp_path, RecordingReporter(), processes=ProcessGroup(0, 2))


def test_training_in_two_processes_fails_if_an_option_needs_the_whole_batch(tmp_path: Path) -> None:
    run = start_training(tmp_path, "--model", "vae", "--free-bits", "0.1")
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "need the whole batch in one process: train without torchrun" in output


@pytest.mark.parametrize(("rows", "count"), [(10, 3), (2, 3), (1, 2), (128, 2), (7, 7)])
def test_batch_is_divided_into_slices_whose_sizes_differ_by_at_most_one_row(rows: int, count: int) -> None:
    shares = [ProcessGroup(rank, count).slice_of(rows) for rank in range(count)]
    assert [i for share in shares for i in range(share.start, share.stop)] == list(range(rows))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1


LEAVE_GROUP = """
import sys
from pathlib import Path

import torch

from training.fitting.distributed import join_process_group

with join_process_group() as group:
    torch.optim.AdamW([torch.zeros(1)])  # imports a module that would keep a reference to the group
    group.broadcast_path(Path("published"))
threads = [name for task in Path("/proc/self/task").iterdir() if "gloo" in (name := (task / "comm").read_text())]
sys.stdout.write(f"{threads}\\n")  # one write, so that the lines of two processes do not mix
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc to list threads")
def test_process_has_no_gloo_threads_after_it_has_left_the_process_group(tmp_path: Path) -> None:
    """A thread that frees a tensor while the interpreter exits would abort the process."""
    script = tmp_path / "leave_group.py"
    script.write_text(LEAVE_GROUP)
    run = start_python(str(script))
    assert wait_for_output(run).count("[]\n") == 2
