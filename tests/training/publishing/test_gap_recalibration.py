"""`elbo calibrate` fits the scale of scores of rows with missing values again, to the new calibration rows."""

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
from training.data.table import read_for_model, read_table
from training.progress import SilentReporter
from training.publishing.recalibrate import Recalibrated, recalibrate
from training.train import train

pytestmark = pytest.mark.slow

Rows = npt.NDArray[np.float64]
DRIFT = 1.5  # factor by which every value has grown since training
NOISE = 0.2  # standard deviation of the noise that every value has got since training


def drifted_rows(rows: int, seed: int) -> Rows:
    """Return rows as they are after the drift. Their noise makes a missing value less predictable than in training."""
    x = DRIFT * two_factor_rows(rows, seed=seed)
    return np.asarray(x + NOISE * np.random.RandomState(seed).standard_normal(x.shape))


def with_gaps(rows: Rows, seed: int, share: float = 0.3) -> Rows:
    """Return `rows` without some of their values, missing at random. Each row keeps a value."""
    missing = np.random.RandomState(seed).uniform(size=rows.shape) < share
    missing[missing.all(axis=1), 0] = False
    return np.where(missing, np.nan, rows)


def fit(folder: Path, rows: Rows) -> Artifact:
    np.save(folder / "train.npy", rows.astype(np.float32))
    table = read_table(str(folder / "train.npy"))
    return artifact.load(train(TrainConfig(model="pca", name="pca"), table, folder, SilentReporter()))


def calibrate(parent: Artifact, folder: Path, rows: Rows) -> tuple[Artifact, Recalibrated]:
    np.save(folder / "recent.npy", rows.astype(np.float32))
    table = read_for_model(str(folder / "recent.npy"), parent.manifest)
    result = recalibrate(parent, table, folder, 0.05, force=True)
    return artifact.load(result.path), result


def share_of_alarms(model: Artifact, x: Rows, alpha: float) -> float:
    with torch.inference_mode():
        score = artifact.score(model.module, torch.from_numpy(x).float())[0]
        return float((model.module.severity(score, alpha) > 1).float().mean())


def band(model: Artifact, rows: int, alpha: float) -> tuple[float, float]:
    """Return the range of the share of false alarms with a probability of 99.8 % (Vovk 2012, proposition 2a)."""
    n = model.manifest.calibration.rows
    a = int(alpha * (n + 1))
    low, high = betabinom(rows, a, n + 1 - a).ppf([0.001, 0.999]) / rows
    return float(low), float(high)


def test_recalibration_on_complete_rows_gives_rows_with_gaps_a_false_alarm_rate_of_alpha(tmp_path: Path) -> None:
    parent = fit(tmp_path, two_factor_rows(1000, seed=0))
    model, _ = calibrate(parent, tmp_path, drifted_rows(600, seed=1))
    rows = with_gaps(drifted_rows(2000, seed=2), seed=3)
    for alpha in (0.1, 0.05):
        low, high = band(model, len(rows), alpha)
        assert low <= share_of_alarms(model, rows, alpha) <= high
    old_scale = artifact.thaw(parent)
    with torch.inference_mode():
        p_value = model.module.p_value(artifact.score(old_scale, torch.from_numpy(rows).float())[0])
    assert float((p_value <= 0.1).float().mean()) < band(model, len(rows), 0.1)[0]


def test_recalibration_on_rows_with_gaps_fits_the_scale_to_rows_that_do_not_calibrate(tmp_path: Path) -> None:
    parent = fit(tmp_path, with_gaps(two_factor_rows(1000, seed=0), seed=5, share=0.1))
    model, result = calibrate(parent, tmp_path, with_gaps(drifted_rows(900, seed=1), seed=6, share=0.1))
    assert model.manifest.calibration.rows == 600
    assert any(note.startswith("300 rows fit the scale") for note in result.notes)
    rows = with_gaps(drifted_rows(2000, seed=2), seed=7, share=0.1)
    for alpha in (0.1, 0.05):
        low, high = band(model, len(rows), alpha)
        assert low <= share_of_alarms(model, rows, alpha) <= high


def test_recalibration_on_few_rows_with_gaps_keeps_the_scale_and_says_so(tmp_path: Path) -> None:
    parent = fit(tmp_path, with_gaps(two_factor_rows(1000, seed=0), seed=5, share=0.1))
    model, result = calibrate(parent, tmp_path, with_gaps(drifted_rows(40, seed=1), seed=6, share=0.1))
    assert model.manifest.calibration.rows == 40
    assert any("too few rows to fit the scale" in note for note in result.notes)
    old, new = (dict(artifact.thaw(each).gap_scores.named_buffers()) for each in (parent, model))
    for name, buffer in old.items():
        torch.testing.assert_close(new[name], buffer, rtol=0, atol=0)


def test_scores_of_complete_rows_stay_the_same_after_recalibration(tmp_path: Path) -> None:
    parent = fit(tmp_path, two_factor_rows(1000, seed=0))
    model, _ = calibrate(parent, tmp_path, drifted_rows(300, seed=1))
    x = torch.from_numpy(drifted_rows(50, seed=2)).float()
    with torch.inference_mode():
        assert torch.equal(parent.module.score(x)[0], model.module.score(x)[0])
        gaps = torch.where(torch.arange(x.shape[1]) == 0, torch.nan, x)
        assert not torch.allclose(parent.module.score_gaps(gaps)[0], model.module.score_gaps(gaps)[0])
