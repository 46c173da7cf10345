"""Rows that are copies of each other, and rows that resemble the next row in the file."""

import numpy as np
import numpy.typing as npt
import pytest

from models.manifest import SERIES_CORRELATION
from training.data.copies import find_copies
from training.data.row_store import RowStore
from training.data.series import neighbour_correlations
from training.data.table import DataError, split_rows

Floats = npt.NDArray[np.float32]


def gaussian(rows: int, width: int, seed: int = 0) -> npt.NDArray[np.float64]:
    return np.random.RandomState(seed).standard_normal((rows, width))


def store(rows: npt.NDArray[np.floating]) -> RowStore:
    return RowStore(rows.astype(np.float32))


@pytest.mark.parametrize("copies", [2, 4, 10])
@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3, 0.03])
@pytest.mark.parametrize("width", [4, 10, 100])
def test_copies_are_found_if_they_are_equal_or_differ_by_little_noise(copies: int, noise: float, width: int) -> None:
    rows = np.repeat(gaussian(300, width), copies, axis=0)
    order = np.random.RandomState(1).permutation(len(rows))
    found = find_copies(store((rows + noise * gaussian(len(rows), width, seed=2))[order]))
    assert found.distinct == pytest.approx(300, rel=0.06)
    assert len(found.groups) == len(rows)
    true_groups = order // copies
    same = [len(np.unique(found.groups[true_groups == group])) == 1 for group in range(300)]
    assert np.mean(same) > 0.95


@pytest.mark.parametrize(
    "rows",
    [
        *(gaussian(800, width) for width in (1, 2, 3, 10, 50)),
        np.cumsum(gaussian(1000, 4), axis=0),  # a series: each row is near the row before
        np.repeat(gaussian(20, 5), 50, axis=0) + 0.01 * gaussian(1000, 5, seed=1),  # 20 states of a machine
        np.vstack((gaussian(500, 3), np.full((1, 3), 1e9))),
    ],
)
def test_independent_rows_series_states_and_outliers_are_not_copies(rows: npt.NDArray[np.float64]) -> None:
    found = find_copies(store(rows))
    assert found.distinct == len(rows)
    assert np.array_equal(found.groups, np.arange(len(rows)))


def test_rows_are_equal_if_they_differ_only_in_the_sign_of_zero_or_the_bits_of_nan() -> None:
    other_nan = np.array([0x7FC00001], np.uint32).view(np.float32)[0]
    rows = np.array([[0.0, np.nan], [-0.0, other_nan], [1.0, np.nan]], np.float32)
    assert find_copies(RowStore(rows)).groups.tolist() == [0, 0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_split_never_puts_copies_of_a_row_into_two_parts(seed: int) -> None:
    rows = np.random.RandomState(seed).permutation(np.repeat(gaussian(200, 5), [1, 2, 3, 10] * 50, axis=0))
    found = find_copies(store(rows))
    split = split_rows(len(rows), seed, 5, found)
    assert (len(split.held_out), len(split.calibration)) == (20, 40)  # 10 % and 20 % of the 200 distinct rows
    parts = [found.groups[part] for part in (split.fit, split.held_out, split.calibration)]
    assert [len(np.unique(part)) for part in parts] == [140, 20, 40]
    assert len(np.unique(np.concatenate(parts))) == 200
    assert len(split.fit) == np.isin(found.groups, parts[0]).sum()  # the fit rows include all copies


def test_split_without_copies_is_the_split_by_the_number_of_rows() -> None:
    plain, grouped = split_rows(500, 3), split_rows(500, 3, 4, find_copies(store(gaussian(500, 4))))
    for part in ("fit", "held_out", "calibration"):
        assert np.array_equal(getattr(plain, part), getattr(grouped, part))


def test_split_fails_if_nearly_all_rows_are_copies_of_a_few() -> None:
    rows = np.tile(gaussian(8, 3), (50, 1))
    with pytest.raises(
        DataError, match=r"the 400 rows are copies of only 8 rows: expected at least 10 rows that differ"
    ):
        split_rows(400, 0, 3, find_copies(store(rows)))


# Rows that resemble the next row


def correlation(rows: npt.NDArray[np.float64], labels: npt.NDArray[np.int64] | None = None) -> float:
    return float(neighbour_correlations(store(rows), np.arange(len(rows)), labels).max())


def autoregressive(coefficient: float, rows: int = 3000) -> npt.NDArray[np.float64]:
    """Return a Gaussian series, [rows, 1], whose correlation between neighbours is `coefficient`."""
    noise = gaussian(rows, 1) * np.sqrt(1 - coefficient**2)
    series = np.zeros((rows, 1))
    for row in range(1, rows):
        series[row] = coefficient * series[row - 1] + noise[row]
    return series


@pytest.mark.parametrize("coefficient", [0.0, 0.3, 0.6, 0.95])
def test_neighbour_correlation_agrees_with_the_coefficient_of_an_autoregressive_series(coefficient: float) -> None:
    rank_correlation = 6 / np.pi * np.arcsin(coefficient / 2)  # of a Gaussian pair
    assert correlation(autoregressive(coefficient)) == pytest.approx(rank_correlation, abs=0.06)


@pytest.mark.parametrize("seed", range(10))
def test_neighbour_correlation_of_independent_rows_is_below_the_warning(seed: int) -> None:
    random = np.random.RandomState(seed)
    assert correlation(random.standard_normal((50, 30))) < SERIES_CORRELATION
    rare = (random.uniform(size=(500, 20)) < 0.004).astype(float)
    rare[100:102] = 1  # two events in a row are no series
    assert correlation(rare) < SERIES_CORRELATION


def test_series_is_recognised_in_one_column_of_many_with_gaps_and_outliers() -> None:
    rows = gaussian(1000, 12, seed=1)
    rows[:, 7:8] = autoregressive(0.98, 1000)
    rows[::50, 7] = 1e6
    rows[::33, 7] = np.nan
    assert correlation(rows) > 0.8


def test_file_sorted_by_class_is_no_series() -> None:
    labels = np.repeat(np.arange(5), 200)
    rows = gaussian(1000, 4) + 10 * labels[:, None]
    assert correlation(rows) > 0.9
    assert correlation(rows, labels) < 0.1
