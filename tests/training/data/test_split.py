"""The deal of rows into fit, held out and calibration."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.table import MINIMUM_ROWS, DataError, split_rows

SEEDS = st.integers(0, 2**32 - 1)


@given(n=st.integers(MINIMUM_ROWS, 5000), seed=SEEDS)
def test_every_row_goes_to_exactly_one_part(n: int, seed: int) -> None:
    rows = split_rows(n, seed)
    dealt = np.concatenate([rows.fit, rows.held_out, rows.calibration])
    assert np.array_equal(np.sort(dealt), np.arange(n))


@given(n=st.integers(MINIMUM_ROWS, 100_000), seed=SEEDS)
def test_parts_are_seven_one_and_two_tenths_to_the_row(n: int, seed: int) -> None:
    rows = split_rows(n, seed)
    assert abs(len(rows.fit) - 0.7 * n) <= 1
    assert abs(len(rows.held_out) - 0.1 * n) <= 0.5
    assert abs(len(rows.calibration) - 0.2 * n) <= 0.5
    assert min(map(len, (rows.fit, rows.held_out, rows.calibration))) >= 1


def test_the_same_seed_deals_the_same_and_another_does_not() -> None:
    one, again, other = split_rows(1000, 7), split_rows(1000, 7), split_rows(1000, 8)
    assert np.array_equal(one.fit, again.fit)
    assert np.array_equal(one.calibration, again.calibration)
    assert not np.array_equal(one.calibration, other.calibration)


def test_sorted_data_are_shuffled() -> None:
    """Each part's mean row number is that of a random draw: within five standard errors of the middle."""
    n = 10_000
    rows = split_rows(n, 0)
    for part in (rows.fit, rows.held_out, rows.calibration):
        assert abs(part.mean() - (n - 1) / 2) < 5 * n / np.sqrt(12 * len(part))


@pytest.mark.parametrize("n", [0, 1, MINIMUM_ROWS - 1])
def test_too_few_rows_are_refused_with_the_minimum(n: int) -> None:
    with pytest.raises(DataError, match=f"expected at least {MINIMUM_ROWS} rows .*, got {n}: add rows"):
        split_rows(n, 0)
