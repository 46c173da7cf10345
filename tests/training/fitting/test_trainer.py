"""Runs that are cut short, go wrong or stop early."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.manifest import read_manifest
from tests.data import ROOT
from tests.training.reporters import Silent
from tests.training.waiting import wait_until_newer
from training.config import TrainConfig
from training.data.batches import Batches
from training.data.row_store import RowStore
from training.data.table import read_table
from training.errors import FitError
from training.fitting import checkpoint
from training.fitting.objectives import LossTerms
from training.fitting.trainer import Trainer
from training.random_streams import NOISE, ORDER, epoch_order, random_stream
from training.train import train


def config(**options: object) -> TrainConfig:
    return TrainConfig.model_validate({"model": "ae", "name": "m", "epochs": 10, "batch_size": 16} | options)


class Quadratic(nn.Module):
    """A loss that is known: the squared distance of one parameter from the rows' mean, times a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor([5.0]))

    def loss(self, rows: Tensor, warmth: float) -> LossTerms:
        distance = (rows - self.place).square().mean()
        return {"loss": distance, "warmth": torch.tensor(warmth)}


class Noiseless:
    """An objective that draws nothing."""

    def __init__(self, loss: Callable[[Tensor, float], LossTerms]) -> None:
        self.loss = loss

    def draw(self, rows: Tensor, _: torch.Generator, _warmth: float) -> tuple[Tensor, ...]:
        return (rows,)

    def terms(self, drawn: tuple[Tensor, ...], warmth: float) -> LossTerms:
        return self.loss(drawn[0], warmth)


def batches(values: Tensor) -> Batches:
    return Batches(RowStore(values.numpy()), np.arange(len(values)), lambda rows: rows, 0, "cpu")


def descend(
    model: Quadratic,
    settings: TrainConfig,
    loss: Callable[[Tensor, float], LossTerms] | None = None,
    held_out: float = 0.0,
) -> Silent:
    report = Silent()
    objective = Noiseless(loss or model.loss)
    Trainer(model, objective, batches(torch.zeros(100, 1)), torch.full((10, 1), held_out), settings).run(report, None)
    return report


def test_streams_repeat_and_differ_by_seed_purpose_and_index() -> None:
    draws = {
        key: tuple(torch.rand(4, generator=random_stream(*key)).tolist())
        for key in [(0, NOISE, 0), (0, NOISE, 1), (0, ORDER, 0), (1, NOISE, 0)]
    }
    assert len(set(draws.values())) == 4
    assert draws[0, NOISE, 1] == tuple(torch.rand(4, generator=random_stream(0, NOISE, 1)).tolist())
    assert sorted(epoch_order(0, 3, 50).tolist()) == list(range(50))
    assert epoch_order(0, 3, 50).tolist() != epoch_order(0, 4, 50).tolist()


def test_terms_are_means_over_rows_with_a_short_last_batch_weighted_right() -> None:
    rows = torch.cat((torch.zeros(96, 1), torch.full((4, 1), 10.0)))

    def loss(batch: Tensor, _: float) -> LossTerms:
        return {"loss": (model.place * 0).sum(), "mean": batch.mean()}

    model, report = Quadratic(), Silent()
    Trainer(model, Noiseless(loss), batches(rows), rows, config(epochs=2)).run(report, None)
    assert [epoch["mean"] for epoch in report.epochs] == pytest.approx([0.4, 0.4])


def test_warm_up_rises_evenly_and_never_outlasts_the_run() -> None:
    report = descend(Quadratic(), config(epochs=4, warm_up=14))  # 7 steps an epoch
    assert [epoch["warmth"] for epoch in report.epochs][2:] == [1.0, 1.0]
    sizes = [16] * 6 + [4]
    first = sum(size * step / 14 for step, size in enumerate(sizes)) / 100
    assert [epoch["warmth"] for epoch in report.epochs][:2] == pytest.approx([first, first + 0.5])
    capped = descend(Quadratic(), config(epochs=2, warm_up=10**9))
    assert [epoch["warmth"] for epoch in capped.epochs] == pytest.approx([first, first + 0.5])


def test_the_best_epoch_on_held_out_rows_is_kept() -> None:
    """Held-out rows lie halfway between the start and the optimum, so the best model is passed on the way."""
    model = Quadratic()
    report = descend(model, config(epochs=60, learning_rate=0.1), held_out=2.5)
    losses = [epoch["held_out_loss"] for epoch in report.epochs]
    assert min(losses) < losses[-1] / 2
    assert float((model.place.detach() - 2.5).square()) == pytest.approx(min(losses), rel=1e-5)


def test_patience_stops_the_run_once_the_warm_up_is_over() -> None:
    early = descend(Quadratic(), config(epochs=200, learning_rate=0.1, patience=3), held_out=4.9)
    losses = [epoch["held_out_loss"] for epoch in early.epochs]
    assert len(losses) == losses.index(min(losses)) + 1 + 4 < 200
    waited = descend(Quadratic(), config(epochs=200, learning_rate=0.1, patience=3, warm_up=700), held_out=4.9)
    assert len(waited.epochs) >= 100  # 7 steps an epoch


def test_a_loss_that_becomes_nan_ends_the_run_with_the_best_model_and_says_where() -> None:
    model, calls = Quadratic(), 0

    def loss(rows: Tensor, warmth: float) -> LossTerms:
        nonlocal calls
        calls += 1
        terms = model.loss(rows, warmth)
        return terms if calls <= 40 else terms | {"loss": terms["loss"] * math.nan}

    report = descend(model, config(epochs=20, learning_rate=0.1), loss)
    assert len(report.epochs) == 5  # each has 7 steps and a validation
    assert "step 36, in epoch 6" in report.notes[0]
    assert math.isfinite(float(model.place.detach()))
    best = min(epoch["held_out_loss"] for epoch in report.epochs)
    assert float(model.place.detach().square()) == pytest.approx(best, rel=1e-5)


def test_a_loss_that_is_nan_from_the_start_is_an_error() -> None:
    model = Quadratic()
    with pytest.raises(FitError, match="step 1, in epoch 1: lower --learning-rate"):
        descend(model, config(), lambda *_: {"loss": model.place.sum() * math.nan})


def test_a_run_killed_again_and_again_ends_in_the_same_weights(tmp_path: Path) -> None:
    options = ["--epochs", "25", "--hidden", "32", "--latents", "4", "--warm-up", "50", "--seed", "3"]
    command = [sys.executable, "-m", "elbo", "train", "digits", "--model", "vae", "--name", "m", *options]
    command += ["--artifacts", str(tmp_path / "artifacts"), "--runs", str(tmp_path / "runs")]
    saved = tmp_path / "runs" / "m" / checkpoint.FILE_NAME
    for attempt in range(3):
        cut_short = [*command, "--checkpoint-seconds", "0", *(["--resume"] if attempt else [])]
        process = subprocess.Popen(cut_short, cwd=ROOT, stderr=subprocess.DEVNULL)
        began = saved.stat().st_mtime_ns if attempt else 0
        wait_until_newer(saved, began, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert torch.load(saved, weights_only=True)["step"] > 3
    subprocess.run([*command, "--resume"], cwd=ROOT, check=True, capture_output=True)
    assert not saved.exists()
    resumed = read_manifest(tmp_path / "artifacts" / "m" / "1" / "model.pt")
    whole = train(TrainConfig.model_validate(resumed.training), read_table("digits"), tmp_path / "whole", Silent())
    assert resumed.weights_sha256 == read_manifest(whole).weights_sha256
    assert resumed.metrics == read_manifest(whole).metrics


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "m", {"identity": "another"})
    with pytest.raises(FitError, match="other data or options"):
        train(config(), read_table("digits"), tmp_path / "artifacts", Silent(), tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02cos\nsystem\n(S'true'\ntR."])
def test_a_damaged_checkpoint_is_refused_and_never_executed(content: bytes, tmp_path: Path) -> None:
    (tmp_path / checkpoint.FILE_NAME).write_bytes(content)
    with pytest.raises(FitError, match="is damaged: train without --resume"):
        checkpoint.load(tmp_path, "any")


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="nothing to resume"):
        checkpoint.load(tmp_path, "any")


def test_a_run_that_cannot_save_its_state_goes_on_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    report = Silent()
    settings = config(epochs=1, hidden=(8,), batch_size=600)
    path = train(
        settings, read_table("digits"), tmp_path / "artifacts", report, tmp_path / "runs", checkpoint_seconds=0
    )
    assert path.is_file()
    assert sum("no checkpoint in" in note for note in report.notes) == 4  # one a step, one at the end


def test_a_writer_killed_while_saving_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from pathlib import Path; from training.fitting import checkpoint\n"
        "while True: checkpoint.save(Path(sys.argv[1]), {'identity': 'x', 'weights': torch.ones(300_000)})"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, env=os.environ)
    wait_until_newer(tmp_path / checkpoint.FILE_NAME, 0, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.equal(checkpoint.load(tmp_path, "x")["weights"], torch.ones(300_000))
