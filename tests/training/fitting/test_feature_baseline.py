"""Fitting the baseline of the features, which says what is usual for each group."""

import numpy as np
import numpy.typing as npt
import pytest

from models.season import encode
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Table
from training.data.timeline import Timeline
from training.errors import FitError
from training.fitting import feature_baseline
from training.fitting.feature_baseline import fit_feature_baseline, scale_table

HOUR = 3600 * 10**9
CONFIG = TrainConfig(model="pca", name="m", time="ts", group="host", season=("day",))
LEVELS, SCALES = np.array([10.0, 1000.0, -500.0]), np.array([1.0, 50.0, 4.0])


def table(x: npt.NDArray[np.floating], rows: list[int]) -> Table:
    """Return a table with `rows` rows of each group, a row an hour."""
    timeline = Timeline(
        time=np.concatenate([HOUR * np.arange(count) for count in rows]),
        group=np.repeat(np.arange(len(rows), dtype=np.int32), rows),
        groups=tuple(f"h{index}" for index in range(len(rows))),
        time_column="ts",
        group_column="host",
        source_rows=np.arange(len(x)),
    )
    names = [f"x{index}" for index in range(x.shape[1])]
    missing = np.isnan(x).sum(axis=0)
    return Table(
        RowStore(x.astype(np.float32)), (len(names),), names, [None] * len(names), None, None, "table",
        missing=missing, timeline=timeline,
    )  # fmt: skip


def hosts(count: int = 2000) -> Table:
    """Return rows of three hosts: a daily season with an amplitude of 3 scales, noise of 1 scale, and incidents."""
    random = np.random.RandomState(0)
    season = 3 * encode(np.arange(count, dtype=np.float64) * 3600, ("day",))[:, 1]
    x = np.concatenate(
        [level + scale * (season + random.standard_normal(count)) for level, scale in zip(LEVELS, SCALES, strict=True)]
    )
    x[:count][random.random_sample(count) < 0.01] += 1e4
    x[random.random_sample(len(x)) < 0.01] = np.nan
    return table(x[:, None], [count] * 3)


def test_level_scale_and_season_of_each_group_are_found_despite_incidents_and_missing_values() -> None:
    data = hosts()
    found = fit_feature_baseline(CONFIG, data, np.arange(len(data.x)), np.arange(3))
    np.testing.assert_allclose(found.location[:3, 0, 0], LEVELS, atol=0.2 * SCALES.max())
    np.testing.assert_allclose((found.location[:3, 0, 0] - LEVELS) / SCALES, 0, atol=0.2)
    np.testing.assert_allclose(found.scale[:3, 0] / SCALES, 1, rtol=0.2)
    np.testing.assert_allclose(found.location[:3, 0, 1] / SCALES, 3, rtol=0.1)


def test_scaled_rows_have_the_same_level_and_the_same_deviation_in_all_groups() -> None:
    data = hosts()
    found = fit_feature_baseline(CONFIG, data, np.arange(len(data.x)), np.arange(3))
    scaled = scale_table(data, found, np.arange(3)).x.take(np.arange(len(data.x))).reshape(3, -1)
    pool, deviation = found.location[3, 0, 0], found.scale[3, 0]
    np.testing.assert_allclose((np.nanmedian(scaled, axis=1) - pool) / deviation, 0, atol=0.2)
    spread = np.subtract(*np.nanquantile(scaled, [0.75, 0.25], axis=1)) / 1.349  # the deviation of normal noise
    np.testing.assert_allclose(spread / deviation, 1, rtol=0.2)


def test_baseline_of_a_small_group_is_near_that_of_the_others_if_groups_hardly_differ() -> None:
    random = np.random.RandomState(0)
    counts = [2000] * 9 + [50]
    x = random.standard_normal((sum(counts), 1))
    data = table(x, counts)
    config = CONFIG.model_copy(update={"season": ()})
    found = fit_feature_baseline(config, data, np.arange(len(x)), np.arange(10))
    own = np.median(x[-50:])
    assert abs(found.location[9, 0, 0]) < 0.7 * abs(own)
    assert found.scale[9, 0] == pytest.approx(1, abs=0.15)


def test_metric_that_is_constant_in_one_group_or_in_all_groups_gets_a_positive_scale() -> None:
    random = np.random.RandomState(0)
    x = np.column_stack((random.standard_normal(600), np.full(600, 7.0)))
    x[:300, 0] = 5.0
    found = fit_feature_baseline(CONFIG, table(x, [300, 300]), np.arange(600), np.arange(2))
    assert (found.scale > 0).all()
    assert found.scale[0, 0] < 0.1 * found.scale[1, 0]
    rows = found.to_pool(np.array([[5, 7], [5, 8]], np.float32), np.zeros(2, int), np.zeros(2))
    assert np.isfinite(rows).all()
    assert rows[0, 1] == pytest.approx(7)


def test_baseline_with_too_many_numbers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_baseline, "MAX_VALUES", 27)
    data = hosts(100)
    with pytest.raises(FitError, match=r"28 numbers \(3 groups x 1 features x 7 encodings"):
        fit_feature_baseline(CONFIG, data, np.arange(300), np.arange(3))
