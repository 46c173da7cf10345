"""The split of rows into fit, held-out and calibration rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.table import MINIMUM_ROWS, DataError, split_rows

SEEDS = st.integers(0, 2**32 - 1)


@given(n=st.integers(MINIMUM_ROWS, 5000), seed=SEEDS)
def test_split_puts_every_row_into_exactly_one_part(n: int, seed: int) -> None:
    rows = split_rows(n, seed)
    indices = np.concatenate([rows.fit, rows.held_out, rows.calibration])
    assert np.array_equal(np.sort(indices), np.arange(n))


@given(n=st.integers(MINIMUM_ROWS, 100_000), seed=SEEDS)
def test_split_sizes_are_70_10_and_20_percent_rounded_to_whole_rows(n: int, seed: int) -> None:
    rows = split_rows(n, seed)
    assert abs(len(rows.fit) - 0.7 * n) <= 1
    assert abs(len(rows.held_out) - 0.1 * n) <= 0.5
    assert abs(len(rows.calibration) - 0.2 * n) <= 0.5
    assert min(map(len, (rows.fit, rows.held_out, rows.calibration))) >= 1


def test_splits_are_equal_for_equal_seeds_and_differ_for_different_seeds() -> None:
    first, again, other = split_rows(1000, 7), split_rows(1000, 7), split_rows(1000, 8)
    assert np.array_equal(first.fit, again.fit)
    assert np.array_equal(first.calibration, again.calibration)
    assert not np.array_equal(first.calibration, other.calibration)


def test_every_part_of_the_split_contains_rows_from_the_whole_table() -> None:
    """The mean row index of each part is within five standard errors of the middle of the table."""
    n = 10_000
    rows = split_rows(n, 0)
    for part in (rows.fit, rows.held_out, rows.calibration):
        assert abs(part.mean() - (n - 1) / 2) < 5 * n / np.sqrt(12 * len(part))


@pytest.mark.parametrize("n", [0, 1, MINIMUM_ROWS - 1])
def test_error_about_too_few_rows_names_the_minimum(n: int) -> None:
    with pytest.raises(DataError, match=f"expected at least {MINIMUM_ROWS} rows .*, got {n}: add rows"):
        split_rows(n, 0)
