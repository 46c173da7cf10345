"""The search for numbers that are not finite gives the answer of `np.isfinite`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from training.data.row_store import all_finite

MAX = float(np.finfo(np.float32).max)
NUMBERS = st.sampled_from([0.0, -1.5, MAX, -MAX, np.inf, -np.inf, np.nan])


@given(arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 3)), elements=NUMBERS))
def test_numbers_are_finite_if_each_of_them_is(values: np.ndarray) -> None:
    assert all_finite(values) == bool(np.isfinite(values).all())


@pytest.mark.parametrize(
    ("values", "expected"),
    [([MAX, MAX], True), ([np.inf, -np.inf], False), ([np.nan, 1.0], False), ([], True)],
)
def test_sum_that_overflows_is_not_taken_for_an_infinite_number(values: list[float], expected: bool) -> None:
    assert all_finite(np.array(values, np.float32)) is expected
