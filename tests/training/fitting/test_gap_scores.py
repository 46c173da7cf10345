"""False alarms on rows with missing values: how many there are, for rows that the models were not trained on."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import betabinom

from models import artifact
from models.artifact import Artifact
from tests.commands import two_factor_rows
from training.config import TrainConfig
from training.data.table import read_table
from training.progress import SilentReporter
from training.train import train

pytestmark = pytest.mark.slow

Rows = npt.NDArray[np.float64]
SHARE = 0.3  # of the values that are missing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with complete rows, and with rows of which some have gaps."""
    folder = tmp_path_factory.mktemp("gaps")
    rows = two_factor_rows(1500, seed=0)
    np.save(folder / "complete.npy", rows.astype(np.float32))
    np.save(folder / "gaps.npy", with_gaps(rows, seed=5, share=0.1).astype(np.float32))
    return folder


def with_gaps(rows: Rows, seed: int, share: float = SHARE) -> Rows:
    """Return `rows` without some of their values, missing at random. Each row keeps a value."""
    missing = np.random.RandomState(seed).uniform(size=rows.shape) < share
    missing[missing.all(axis=1), 0] = False
    return np.where(missing, np.nan, rows)


def fit(folder: Path, kind: str, table: str) -> Artifact:
    config = TrainConfig(model=kind, name=kind, epochs=None if kind == "pca" else 30)
    return artifact.load(
        train(config, read_table(str(folder / table)), folder / table.replace(".", "_"), SilentReporter())
    )


def band(model: Artifact, rows: int, alpha: float) -> tuple[float, float]:
    """Return the range in which the share of false alarms lies with a probability of 99.8 %.

    Given the calibration rows, the rate of false alarms of a split-conformal test has the distribution
    Beta(a, n + 1 - a) with a = floor(alpha (n + 1)) (Vovk 2012, "Conditional validity of inductive conformal
    predictors", prop. 2a).
    """
    n = model.manifest.calibration.rows
    a = int(alpha * (n + 1))
    low, high = betabinom(rows, a, n + 1 - a).ppf([0.001, 0.999]) / rows
    return float(low), float(high)


def share_of_alarms(model: Artifact, x: Rows, alpha: float) -> float:
    with torch.inference_mode():
        score = artifact.score(model.module, torch.from_numpy(x).float())[0]
        return float((model.module.severity(score, alpha) > 1).float().mean())


@pytest.mark.parametrize("kind", ["pca", "ae"])
def test_false_alarms_on_rows_with_30_percent_missing_are_as_frequent_as_alpha(folder: Path, kind: str) -> None:
    model, rows = fit(folder, kind, "complete.npy"), two_factor_rows(2000, seed=1)
    gaps = with_gaps(rows, seed=2)
    medians = np.where(np.isnan(gaps), np.median(rows, axis=0), gaps)
    for alpha in (0.1, 0.05):
        low, high = band(model, len(rows), alpha)
        assert low <= share_of_alarms(model, rows, alpha) <= high
        assert low <= share_of_alarms(model, gaps, alpha) <= high
        assert share_of_alarms(model, medians, alpha) > 3 * high  # what a model without `score_gaps` would do


@pytest.mark.parametrize("kind", ["pca", "ae"])
def test_false_alarms_of_a_model_trained_on_rows_with_gaps_are_as_frequent_as_alpha(folder: Path, kind: str) -> None:
    model = fit(folder, kind, "gaps.npy")
    rows = with_gaps(two_factor_rows(2000, seed=1), seed=2, share=0.1)
    for alpha in (0.1, 0.05):
        low, high = band(model, len(rows), alpha)
        assert low <= share_of_alarms(model, rows, alpha) <= high


def test_anomalies_with_gaps_are_found_if_the_known_values_show_them(folder: Path) -> None:
    model, rows = fit(folder, "pca", "complete.npy"), two_factor_rows(500, seed=3)
    rows[:, 4] += 2.0  # breaks the relation of the last feature and the first load, 20 times its noise
    gaps = rows.copy()
    gaps[:, 3] = np.nan  # the first load is still known from the first feature
    assert share_of_alarms(model, gaps, 0.05) > 0.9
