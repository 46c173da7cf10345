"""The training loop: epochs, warm-up, early stopping, NaN losses, checkpoints and resuming."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.manifest import read_manifest
from tests.commands import in_process
from tests.data import ROOT
from tests.preloaded import PreloadedProcess
from tests.training.reporters import RecordingReporter
from tests.training.waiting import wait_until_newer
from training.config import TrainConfig
from training.data.batches import Batches
from training.data.row_store import RowStore
from training.data.table import read_table
from training.errors import FitError
from training.fitting.checkpoint import FILE_NAME, CheckpointStore, claim
from training.fitting.losses import LossTerms
from training.fitting.trainer import Trainer
from training.random_streams import NOISE, ORDER, epoch_order, random_stream
from training.train import train

pytestmark = pytest.mark.slow

ROWS, STEPS_PER_EPOCH = 100, 7  # the steps of an epoch with batches of 16 rows


def config(**options: object) -> TrainConfig:
    return TrainConfig.model_validate({"model": "ae", "name": "m", "epochs": 10, "batch_size": 16} | options)


class Quadratic(nn.Module):
    """A model with one parameter, `place`. The loss is the mean squared distance of the rows from `place`."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([5.0]))

    def loss(self, rows: Tensor, warm_up: float) -> LossTerms:
        distance = (rows - self.place).square().mean()
        return {"loss": distance, "warm_up": torch.tensor(warm_up)}


class NoiselessObjective:
    """An objective that draws no random numbers."""

    def __init__(self, loss: Callable[[Tensor, float], LossTerms]) -> None:
        self.loss = loss

    def draw(self, rows: Tensor, _: torch.Generator, _warm_up: float) -> tuple[Tensor, ...]:
        return (rows,)

    def terms(self, drawn: tuple[Tensor, ...], warm_up: float) -> LossTerms:
        return self.loss(drawn[0], warm_up)


def trained(
    model: Quadratic,
    settings: TrainConfig,
    loss: Callable[[Tensor, float], LossTerms] | None = None,
    rows: Tensor | None = None,
    held_out: float = 0.0,
) -> RecordingReporter:
    """Train `model` on `rows` (by default, zeros) and return the reporter that recorded the run."""
    rows = torch.zeros(ROWS, 1) if rows is None else rows
    reporter = RecordingReporter()
    trainer = Trainer(
        model=model,
        objective=NoiselessObjective(loss or model.loss),
        batches=Batches(RowStore(rows.numpy()), np.arange(len(rows)), lambda x: x, 0, "cpu"),
        held_out=torch.full((10, 1), held_out),
        config=settings,
        reporter=reporter,
    )
    trainer.train()
    return reporter


def test_random_stream_depends_on_seed_purpose_and_index() -> None:
    draws = {
        key: tuple(torch.rand(4, generator=random_stream(*key)).tolist())
        for key in [(0, NOISE, 0), (0, NOISE, 1), (0, ORDER, 0), (1, NOISE, 0)]
    }
    assert len(set(draws.values())) == 4
    assert draws[0, NOISE, 1] == tuple(torch.rand(4, generator=random_stream(0, NOISE, 1)).tolist())
    assert sorted(epoch_order(0, 3, 50).tolist()) == list(range(50))
    assert epoch_order(0, 3, 50).tolist() != epoch_order(0, 4, 50).tolist()


def test_reported_loss_terms_are_means_over_rows_even_if_the_last_batch_is_shorter() -> None:
    rows = torch.cat((torch.zeros(96, 1), torch.full((4, 1), 10.0)))
    model = Quadratic()

    def loss(batch: Tensor, _: float) -> LossTerms:
        return {"loss": (model.place * 0).sum(), "mean": batch.mean()}

    reporter = trained(model, config(epochs=2), loss, rows)
    assert [epoch["mean"] for epoch in reporter.epochs] == pytest.approx([0.4, 0.4])


def test_warm_up_rises_linearly_and_is_never_longer_than_the_run() -> None:
    reporter = trained(Quadratic(), config(epochs=4, warm_up=2 * STEPS_PER_EPOCH))
    assert [epoch["warm_up"] for epoch in reporter.epochs][2:] == [1.0, 1.0]
    sizes = [16] * 6 + [4]
    first = sum(size * step / 14 for step, size in enumerate(sizes)) / ROWS
    assert [epoch["warm_up"] for epoch in reporter.epochs][:2] == pytest.approx([first, first + 0.5])
    capped = trained(Quadratic(), config(epochs=2, warm_up=10**9))
    assert [epoch["warm_up"] for epoch in capped.epochs] == pytest.approx([first, first + 0.5])


def test_trainer_keeps_the_epoch_with_the_best_held_out_loss() -> None:
    """Training passes the best value for the held-out rows on the way to the optimum for the fit rows."""
    model = Quadratic()
    reporter = trained(model, config(epochs=60, learning_rate=0.1), held_out=2.5)
    losses = [epoch["held_out_loss"] for epoch in reporter.epochs]
    assert min(losses) < losses[-1] / 2
    assert float((model.place.detach() - 2.5).square()) == pytest.approx(min(losses), rel=1e-5)


def test_patience_stops_the_run_only_after_the_warm_up() -> None:
    stopped = trained(Quadratic(), config(epochs=200, learning_rate=0.1, patience=3), held_out=4.9)
    losses = [epoch["held_out_loss"] for epoch in stopped.epochs]
    assert len(losses) == losses.index(min(losses)) + 1 + 4 < 200
    settings = config(epochs=200, learning_rate=0.1, patience=3, warm_up=100 * STEPS_PER_EPOCH)
    assert len(trained(Quadratic(), settings, held_out=4.9).epochs) >= 100


def test_run_stops_and_keeps_the_best_model_when_the_loss_becomes_nan() -> None:
    model, calls = Quadratic(), 0

    def loss(rows: Tensor, warm_up: float) -> LossTerms:
        nonlocal calls
        calls += 1
        terms = model.loss(rows, warm_up)
        return terms if calls <= 40 else terms | {"loss": terms["loss"] * math.nan}

    reporter = trained(model, config(epochs=20, learning_rate=0.1), loss)
    assert len(reporter.epochs) == 5  # each epoch calls the loss 7 times to train and once to validate
    assert "step 36, in epoch 6" in reporter.notes[0]
    assert math.isfinite(float(model.place.detach()))
    best = min(epoch["held_out_loss"] for epoch in reporter.epochs)
    assert float(model.place.detach().square()) == pytest.approx(best, rel=1e-5)


def test_run_raises_if_the_loss_is_nan_in_the_first_epoch() -> None:
    model = Quadratic()
    with pytest.raises(FitError, match="step 1, in epoch 1: lower --learning-rate"):
        trained(model, config(), lambda *_: {"loss": model.place.sum() * math.nan})


def test_run_gives_the_same_weights_if_it_is_killed_three_times_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--epochs", "25", "--hidden", "32", "--latents", "4", "--warm-up", "50", "--seed", "3"]
    arguments = ["train", "digits", "--model", "vae", "--name", "m", "--force", *options]
    arguments += ["--artifacts", str(tmp_path / "artifacts"), "--runs", str(tmp_path / "runs")]
    saved = tmp_path / "runs" / "m" / FILE_NAME
    for attempt in range(3):
        command = [sys.executable, "-m", "elbo", *arguments, "--checkpoint-seconds", "0"]
        process = PreloadedProcess([*command, *(["--resume"] if attempt else [])], cwd=ROOT, stderr=subprocess.DEVNULL)
        previous = saved.stat().st_mtime_ns if attempt else 0
        wait_until_newer(saved, previous, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert torch.load(saved, weights_only=True)["step"] > 3
    assert in_process(capsys, *arguments, "--resume")[0] == 0
    assert not saved.exists()
    resumed = read_manifest(tmp_path / "artifacts" / "m" / "1" / "model.pt")
    settings = TrainConfig.model_validate(resumed.training)
    whole = read_manifest(train(settings, read_table("digits"), tmp_path / "whole", RecordingReporter()))
    assert resumed.weights_sha256 == whole.weights_sha256
    assert resumed.metrics == whole.metrics


def test_run_gives_the_same_weights_if_ctrl_c_stops_it_and_it_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--epochs", "40", "--hidden", "32", "--latents", "4", "--seed", "3", "--checkpoint-seconds", "1000"]
    arguments = ["train", "digits", "--model", "vae", "--name", "m", *options]
    arguments += ["--artifacts", str(tmp_path / "artifacts"), "--runs", str(tmp_path / "runs")]
    code = (  # background jobs of a shell ignore SIGINT, so restore the default handler
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from elbo import cli; cli.main({arguments})"
    )
    process = PreloadedProcess([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while not process.stderr.readline().startswith(" 10 %"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    hint = "the run is saved: to continue it, repeat the command with --resume"
    assert rest.splitlines()[-2:] == [hint, "elbo: interrupted"]
    assert torch.load(tmp_path / "runs" / "m" / FILE_NAME, weights_only=True)["step"] > 3
    assert in_process(capsys, *arguments, "--resume")[0] == 0
    resumed = read_manifest(tmp_path / "artifacts" / "m" / "1" / "model.pt")
    settings = TrainConfig.model_validate(resumed.training)
    whole = read_manifest(train(settings, read_table("digits"), tmp_path / "whole", RecordingReporter()))
    assert resumed.weights_sha256 == whole.weights_sha256


def test_resuming_from_the_checkpoint_of_another_run_raises(tmp_path: Path) -> None:
    CheckpointStore(tmp_path / "m", "another").save({})
    with pytest.raises(FitError, match="other data or options"):
        train(config(), read_table("digits"), tmp_path / "artifacts", RecordingReporter(), runs=tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02cos\nsystem\n(S'true'\ntR."])
def test_loading_a_damaged_checkpoint_raises_and_executes_nothing(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(FitError, match=r"is damaged \(\w+\): train without --resume"):
        CheckpointStore(tmp_path, "any").load()


def test_loading_a_missing_checkpoint_raises(tmp_path: Path) -> None:
    with pytest.raises(FitError, match=f"nothing to resume: .*{FILE_NAME} does not exist"):
        CheckpointStore(tmp_path, "any").load()


def test_run_continues_with_warnings_if_it_cannot_write_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    reporter = RecordingReporter()
    settings = config(epochs=1, hidden=(8,), batch_size=600)
    runs = tmp_path / "runs"
    path = train(settings, read_table("digits"), tmp_path / "artifacts", reporter, runs=runs, checkpoint_seconds=0)
    assert path.is_file()
    warnings = [note for note in reporter.notes if "no checkpoint was written" in note]
    assert len(warnings) == 4  # one per step and one at the end


def test_checkpoint_is_complete_even_if_the_process_is_killed_while_saving(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from pathlib import Path; from training.fitting.checkpoint import CheckpointStore\n"
        "store = CheckpointStore(Path(sys.argv[1]), 'x')\n"
        "while True: store.save({'weights': torch.ones(300_000)})"
    )
    process = PreloadedProcess([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=os.environ)
    wait_until_newer(tmp_path / FILE_NAME, 0, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.equal(CheckpointStore(tmp_path, "x").load()["weights"], torch.ones(300_000))


@pytest.mark.parametrize("folder", ["digits", "digits/run-12345678"])
def test_next_run_removes_the_unfinished_checkpoint_that_a_killed_run_of_the_same_name_left(
    tmp_path: Path, folder: str
) -> None:
    program = (
        "import sys, torch; from pathlib import Path; from training.fitting.checkpoint import CheckpointStore\n"
        "store = CheckpointStore(Path(sys.argv[1]), 'x')\n"
        "while True: store.save({'weights': torch.ones(3_000_000)})"
    )
    place = tmp_path / folder
    process = PreloadedProcess([sys.executable, "-c", program, str(place)], cwd=ROOT, env=os.environ)
    wait_until_newer(place / FILE_NAME, 0, process)
    parts: list[Path] = []
    while not parts:  # stop the process at random times, until it stops in the middle of a save
        process.send_signal(signal.SIGCONT)
        time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        parts = list(place.glob(f".staging-*/{FILE_NAME}"))
    with claim(tmp_path / "digits"):
        assert parts[0].exists()  # it is in use
    process.kill()
    process.wait()
    with claim(tmp_path / "digits"):
        assert list(place.glob(".staging-*")) == []
    assert CheckpointStore(place, "x").load()["identity"] == "x"
