"""The collapse forecast against the spectrum, and against networks that are made to collapse."""

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

from models.manifest import read_manifest
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.table import read_table
from training.fitting.collapse import collapse_warning, predict_active_latents
from training.train import train

X = torch.from_numpy(load_digits().data / 16.0)
EIGENVALUES = torch.linalg.eigvalsh(X.T.cov()).flip(0)


@pytest.mark.parametrize(("variance", "beta"), [(0.1, 1.0), (0.05, 4.0), (0.2, 1.0), (0.6, 1.0), (1.0, 1.0)])
def test_with_a_fixed_variance_it_counts_eigenvalues(variance: float, beta: float) -> None:
    assert predict_active_latents(X, 16, beta, variance) == min(16, int((beta * variance < EIGENVALUES).sum()))


@pytest.mark.parametrize("latents", [1, 16, 40])
def test_with_a_learned_variance_and_beta_one_every_latent_lives(latents: int) -> None:
    assert predict_active_latents(X, latents, 1.0, None) == latents


@pytest.mark.parametrize("beta", [2.0, 4.0, 8.0])
def test_with_a_learned_variance_the_kept_latents_agree_with_the_variance_they_leave(beta: float) -> None:
    kept = predict_active_latents(X, 30, beta, None)
    left = float(EIGENVALUES[kept:].sum()) / (64 - kept * beta)
    assert 0 < kept < 30
    assert int((EIGENVALUES[:30] > beta * left).sum()) == kept


@pytest.mark.parametrize(("active", "kept", "warned"), [(16, 16, False), (8, 16, False), (7, 16, True), (0, 0, True)])
def test_a_warning_comes_when_fewer_than_half_are_alive(active: int, kept: int, warned: bool) -> None:
    assert (collapse_warning(active, kept, 16) is not None) is warned


def test_a_collapsed_run_is_forecast_and_warned_of(tmp_path: Path) -> None:
    report = RecordingReporter()
    settings = {"model": "vae", "name": "v", "hidden": (16,), "epochs": 20, "variance": 1.0, "beta": 4.0}
    manifest = read_manifest(train(TrainConfig.model_validate(settings), read_table("digits"), tmp_path, report))
    assert manifest.metrics["active_latents"] == 0
    assert any("about 0 of 16 latents will stay active" in note for note in report.notes)
    assert any(note.startswith("WARNING: posterior collapse: 0 of 16") for note in report.notes)


def test_a_healthy_run_is_not_warned_of(tmp_path: Path) -> None:
    report = RecordingReporter()
    train(
        TrainConfig.model_validate({"model": "vae", "name": "v", "epochs": 60}), read_table("digits"), tmp_path, report
    )
    assert any("about 16 of 16 latents will stay active" in note for note in report.notes)
    assert not any("collapse" in note for note in report.notes)
