"""The conversion of rows between the raw units of their groups and the units of the pool."""

import numpy as np
import pytest

from models.feature_baseline import FeatureBaseline
from models.season import Period, columns, encode, offsets_of_zone, to_local

GROUPS, WIDTH, POOL = 3, 4, 3


def baseline(periods: tuple[Period, ...] = ("day", "week")) -> FeatureBaseline:
    random = np.random.RandomState(0)
    location = random.standard_normal((GROUPS + 1, WIDTH, columns(periods))).astype(np.float32)
    location[:, :, 0] *= 100
    scale = np.exp(random.standard_normal((GROUPS + 1, WIDTH))).astype(np.float32)
    return FeatureBaseline(location, scale, periods, *offsets_of_zone("Europe/Berlin"))


def rows(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.RandomState(1)
    x = (100 * random.standard_normal((count, WIDTH))).astype(np.float32)
    time = np.where(random.random_sample(count) < 0.1, np.nan, random.uniform(1e9, 2e9, count))
    return x, random.randint(0, GROUPS + 1, count), time


@pytest.mark.parametrize("periods", [(), ("day",), ("day", "week")])
def test_conversion_to_units_of_the_pool_follows_the_formula(periods: tuple[Period, ...]) -> None:
    found, (x, group, time) = baseline(periods), rows(200)
    encodings = encode(to_local(time, *offsets_of_zone("Europe/Berlin")), periods)
    usual = np.einsum("bde,be->bd", found.location[group].astype(float), encodings)
    expected = (x - usual) / found.scale[group] * found.scale[POOL] + found.location[POOL, :, 0]
    own = group != POOL
    np.testing.assert_allclose(found.to_pool(x, group, time)[own], expected[own], rtol=1e-4, atol=1e-3)


def test_row_of_the_pool_stays_as_it_is_bit_for_bit() -> None:
    x, _, time = rows(50)
    np.testing.assert_array_equal(baseline().to_pool(x, np.full(50, POOL), time), x)


def test_conversion_to_the_pool_and_back_returns_the_row_and_keeps_missing_values() -> None:
    found, (x, group, time) = baseline(), rows(200)
    x[::7, 1] = np.nan
    back = found.from_pool(found.to_pool(x, group, time), group, time)
    np.testing.assert_allclose(back, x, rtol=1e-4, atol=1e-3)


def test_single_row_is_converted_exactly_as_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    found, (x, group, time) = baseline(), rows(100)
    together = found.to_pool(x, group, time)
    parts = [slice(row, row + 1) for row in range(len(x))]
    alone = np.concatenate([found.to_pool(x[part], group[part], time[part]) for part in parts])
    np.testing.assert_array_equal(alone, together)
    monkeypatch.setattr("models.feature_baseline.PART_VALUES", 500)  # in parts of a few rows
    np.testing.assert_array_equal(found.to_pool(x, group, time), together)


@pytest.mark.parametrize(
    ("location", "scale", "message"),
    [
        (np.zeros((4, 4, 21)), np.ones((4, 5)), r"feature_location of the shape \[4, 5, 21\]"),
        (np.zeros((4, 4, 7)), np.ones((4, 4)), r"feature_location of the shape \[4, 4, 21\]"),
        (np.zeros((4, 4, 21), int), np.ones((4, 4)), "got int64"),
        (np.zeros((4, 4, 21)), np.zeros((4, 4)), "positive ones in feature_scale"),
        (np.full((4, 4, 21), np.nan), np.ones((4, 4)), "finite numbers in feature_location"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(location: np.ndarray, scale: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureBaseline(location, scale, ("day", "week"), *offsets_of_zone("UTC"))
