"""The metrics of samples that every training run computes, and that the model card shows."""

import numpy as np
import pytest

from training.config import TrainConfig
from training.data.readers import InMemory
from training.data.table import read_table
from training.evaluation.samples import FEW_DRAWS
from training.progress import SilentReporter
from training.reports.model_card import card
from training.train import FittedModel, fit_model


def fit(rows: np.ndarray, **options: object) -> FittedModel:
    config = TrainConfig.model_validate({"model": "pca", "name": "drawn"} | options)
    return fit_model(config, read_table(InMemory(rows.astype(np.float32))), SilentReporter())


@pytest.fixture(scope="module")
def fitted() -> FittedModel:
    random = np.random.RandomState(0)
    return fit(random.standard_normal((3_000, 3)) @ random.standard_normal((3, 3)) + 5.0, latents=2)


def test_samples_of_a_pca_of_gaussian_rows_have_density_1_and_the_expected_coverage(fitted: FittedModel) -> None:
    metrics = fitted.chosen.metrics  # PCA with noise is exactly the Gaussian of the rows if one latent is left out
    assert metrics["sample_density"] == pytest.approx(1.0, abs=0.15)
    assert metrics["sample_coverage"] == pytest.approx(metrics["expected_coverage"], abs=0.05)  # 4 standard deviations
    assert metrics["copy_p_value"] > 0.01


def test_samples_of_skewed_rows_have_a_lower_coverage_than_expected() -> None:
    rows = np.exp(2.0 * np.random.RandomState(1).standard_normal((3_000, 6)))
    metrics = fit(rows, latents=2).chosen.metrics
    assert metrics["sample_coverage"] < metrics["expected_coverage"] - 0.1


def test_card_shows_the_metrics_of_the_samples(fitted: FittedModel) -> None:
    parts = fitted.assemble(SilentReporter(), twin=False)
    text = card(parts.manifest, None, [], [])
    density = parts.manifest.metrics["sample_density"]
    assert f"| density of samples | {density:.6g} |" in text
    assert "| p-value of the hypothesis that samples copy no fit row |" in text


def test_table_with_too_few_held_out_rows_has_no_metrics_of_samples() -> None:
    metrics = fit(np.random.RandomState(2).standard_normal((150, 3)), latents=1).chosen.metrics
    assert "reconstruction_error" in metrics
    assert not any(name.startswith("sample_") for name in metrics)
    assert FEW_DRAWS > 15  # the held-out rows of this table
