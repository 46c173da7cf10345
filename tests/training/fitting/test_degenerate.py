"""Constant columns, copied columns and missing values: scores stay finite, and anomalies are still detected."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from models.pipeline import Pipeline
from training.config import EVERY_KIND, Kind, TrainConfig
from training.data.table import read_table, split_rows
from training.fitting.pipeline import fit_pipeline
from training.fitting.prepared_data import prepare_data
from training.fitting.whitening import fit_whitening
from training.progress import SilentReporter

pytestmark = [pytest.mark.slow, pytest.mark.plots]

ALPHA = 0.05
CONSTANT_COLUMNS = {4: 0.0, 5: 100.0, 6: -1e-4}  # the value of each constant column


def rows(count: int, seed: int) -> npt.NDArray[np.float32]:
    """Return rows of three independent columns, a copy of the first, three constants, and the second plus the third."""
    x = np.random.RandomState(seed).standard_normal((count, 8)).astype(np.float32)
    x[:, 3] = x[:, 0]
    for column, value in CONSTANT_COLUMNS.items():
        x[:, column] = value
    x[:, 7] = x[:, 1] + x[:, 2]
    return x


def fitted(kind: Kind, x: npt.NDArray[np.float32], folder: Path) -> Pipeline:
    np.save(folder / "rows.npy", x)
    table = read_table(str(folder / "rows.npy"))
    config = TrainConfig(model=kind, name=kind, epochs=40)
    return fit_pipeline(config, prepare_data(table, split_rows(len(x), 0)), SilentReporter())


def p_values(pipeline: Pipeline, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        score, parts, contribution, expected = pipeline.score(torch.from_numpy(x))
        assert all(bool(values.isfinite().all()) for values in (score, parts, contribution, expected))
        return np.asarray(pipeline.p_value(score).numpy())


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_change_of_a_constant_column_is_detected(kind: Kind, tmp_path: Path) -> None:
    pipeline = fitted(kind, rows(400, 0), tmp_path)
    fresh = rows(200, 1)
    assert (p_values(pipeline, fresh) <= ALPHA).mean() < 0.15
    for column, value in CONSTANT_COLUMNS.items():
        changed = fresh.copy()
        changed[:, column] += 0.05 * abs(value) or 0.05
        assert (p_values(pipeline, changed) <= ALPHA).mean() > 0.9, column


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_difference_between_two_columns_that_were_equal_in_training_is_detected(kind: Kind, tmp_path: Path) -> None:
    pipeline = fitted(kind, rows(400, 0), tmp_path)
    broken = rows(200, 1)
    broken[:, 3] *= -1.0
    clear = np.abs(broken[:, 3]) > 1.0
    assert (p_values(pipeline, broken[clear]) <= ALPHA).mean() > 0.9


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_rows_with_missing_values_are_scored_with_few_false_alarms(kind: Kind, tmp_path: Path) -> None:
    x, random = rows(400, 0), np.random.RandomState(2)
    x[random.uniform(size=x.shape) < 0.1] = np.nan
    fresh = rows(500, 1)
    fresh[random.uniform(size=fresh.shape) < 0.1] = np.nan
    false_alarms = (p_values(fitted(kind, x, tmp_path), fresh) <= ALPHA).mean()
    assert false_alarms < 0.15


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_extreme_row_has_the_smallest_possible_p_value(kind: Kind, tmp_path: Path) -> None:
    pipeline = fitted(kind, rows(400, 0), tmp_path)
    assert p_values(pipeline, 1e6 * rows(5, 1)).max() == pytest.approx(1.0 / 81.0)


def test_whitening_of_two_rows_that_differ_more_than_usual_is_finite() -> None:
    rows = torch.tensor([[5.0, 4.0, 3.0], [-5.0, -4.0, -3.0]])
    whitening = fit_whitening(rows, torch.tensor(1.0))
    assert whitening.distance(rows).isfinite().all()
