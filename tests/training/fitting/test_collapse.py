"""The forecast of active latents, compared with the spectrum, and the warning about collapsed networks."""

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
def test_prediction_counts_eigenvalues_above_beta_times_the_variance_if_the_variance_is_fixed(
    variance: float, beta: float
) -> None:
    assert predict_active_latents(X, 16, beta, variance) == min(16, int((beta * variance < EIGENVALUES).sum()))


@pytest.mark.parametrize("latents", [1, 16, 40])
def test_prediction_counts_all_latents_if_the_variance_is_learned_and_beta_is_1(latents: int) -> None:
    assert predict_active_latents(X, latents, 1.0, None) == latents


@pytest.mark.parametrize("beta", [2.0, 4.0, 8.0])
def test_prediction_agrees_with_the_optimal_variance_if_the_variance_is_learned(beta: float) -> None:
    active = predict_active_latents(X, 30, beta, None)
    variance = float(EIGENVALUES[active:].sum()) / (64 - active * beta)
    assert 0 < active < 30
    assert int((EIGENVALUES[:30] > beta * variance).sum()) == active


@pytest.mark.parametrize(
    ("active", "predicted", "warned"), [(16, 16, False), (8, 16, False), (7, 16, True), (0, 0, True), (3, 0, False)]
)
def test_warning_appears_if_no_latent_or_fewer_than_half_of_the_predicted_latents_are_active(
    active: int, predicted: int, warned: bool
) -> None:
    assert (collapse_warning(active, predicted, 16) is not None) is warned


@pytest.mark.slow
def test_training_gives_a_forecast_and_a_warning_if_the_vae_collapses(tmp_path: Path) -> None:
    reporter = RecordingReporter()
    settings = {"model": "vae", "name": "v", "hidden": (16,), "epochs": 20, "variance": 1.0, "beta": 4.0}
    manifest = read_manifest(train(TrainConfig.model_validate(settings), read_table("digits"), tmp_path, reporter))
    assert manifest.metrics["active_latents"] == 0
    assert any("about 0 of 16 latents will stay active" in note for note in reporter.notes)
    assert any(note.startswith("WARNING: posterior collapse: 0 of 16") for note in reporter.notes)


@pytest.mark.slow
def test_training_gives_no_warning_if_the_vae_does_not_collapse(tmp_path: Path) -> None:
    reporter = RecordingReporter()
    train(TrainConfig(model="vae", name="v", epochs=60), read_table("digits"), tmp_path, reporter)
    assert any("about 16 of 16 latents will stay active" in note for note in reporter.notes)
    assert not any("collapse" in note for note in reporter.notes)
