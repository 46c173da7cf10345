"""Smoothing against its definition, summed directly, and against Polars."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.anomaly.smoothing import RunningMean, exponential_mean

ROWS = st.lists(
    st.tuples(
        st.floats(-1e3, 1e3),
        st.one_of(st.just(math.nan), st.integers(0, 20).map(float), st.floats(0, 1e6)),
        st.sampled_from("ab"),
    ),
    min_size=1,
    max_size=30,
)


def by_definition(values: list[float], half_life: float, time: list[float], group: list[str]) -> list[float]:
    """The sum over all pairs of rows, as the docstring says it."""
    means = []
    for i, (own, now) in enumerate(zip(values, time, strict=True)):
        if math.isnan(now):
            means.append(own)
            continue
        past = [j for j in range(len(values)) if group[j] == group[i] and time[j] <= now]
        weights = [2.0 ** (-(now - time[j]) / half_life) for j in past]
        means.append(math.fsum(w * values[j] for w, j in zip(weights, past, strict=True)) / math.fsum(weights))
    return means


@given(ROWS, st.floats(0.1, 1e4), st.randoms())
def test_the_mean_is_the_weighted_sum_over_the_past_whatever_the_order(
    rows: list[tuple[float, float, str]], half_life: float, random: object
) -> None:
    values, time, group = map(list, zip(*rows, strict=True))
    found = exponential_mean(values, half_life, time, group)
    np.testing.assert_allclose(found, by_definition(values, half_life, time, group), rtol=1e-9, atol=1e-9)
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined] # hypothesis gives a random.Random
    shuffled = exponential_mean(
        [values[i] for i in order], half_life, [time[i] for i in order], [group[i] for i in order]
    )
    np.testing.assert_allclose(shuffled, found[order], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("half_life", [0.5, 3.0, 40.0])
def test_by_rows_it_is_polars_mean_with_adjusted_weights(half_life: float) -> None:
    values = np.random.default_rng(0).normal(size=500)
    expected = pl.Series(values).ewm_mean(half_life=half_life, adjust=True).to_numpy()
    np.testing.assert_allclose(exponential_mean(values, half_life), expected, rtol=1e-12)
    uneven = np.cumsum(np.random.default_rng(1).exponential(size=500))
    np.testing.assert_allclose(exponential_mean(values, half_life, uneven, by_rows=True), expected, rtol=1e-12)


def test_a_row_counts_half_after_a_half_life() -> None:
    assert exponential_mean([0.0, 3.0], 60.0, [0.0, 60.0]).tolist() == [0.0, 2.0]
    assert exponential_mean([0.0, 3.0], 1.0).tolist() == [0.0, 2.0]


def test_after_a_long_silence_a_row_speaks_for_itself() -> None:
    assert exponential_mean([100.0, 1.0], 60.0, [0.0, 1e9]).tolist() == [100.0, 1.0]


def test_groups_know_nothing_of_each_other() -> None:
    found = exponential_mean([1.0, 50.0, 1.0, 70.0], 5.0, [0, 0, 1, 1], ["a", "b", "a", "b"])
    assert found[[0, 2]].tolist() == [1.0, 1.0]
    assert 50.0 < found[3] < 70.0


def test_nan_weighs_nothing() -> None:
    found = exponential_mean([2.0, math.nan, 2.0], 1.0, [0, 1, 2])
    np.testing.assert_array_equal(found, [2.0, math.nan, 2.0])


def test_noise_goes_down_by_the_effective_number_of_rows() -> None:
    """The variance of the mean of white noise is (1 - k) / (1 + k) of one row's, k = 2^(-1/h) (Roberts 1959)."""
    noise = np.random.default_rng(2).normal(size=200_000)
    kept = 2.0 ** (-1 / 10)
    assert exponential_mean(noise, 10.0)[1000:].var() == pytest.approx((1 - kept) / (1 + kept), rel=0.05)


@pytest.mark.parametrize("half_life", [0.0, -1.0, math.nan])
def test_a_half_life_is_above_0(half_life: float) -> None:
    with pytest.raises(ValueError, match="half-life"):
        exponential_mean([1.0], half_life)


def test_lengths_must_fit() -> None:
    with pytest.raises(ValueError, match="as many times and groups"):
        exponential_mean([1.0, 2.0], 1.0, [0.0])


def test_a_running_mean_is_the_same_mean_whatever_the_pieces() -> None:
    values = np.random.default_rng(3).exponential(size=200)
    means = exponential_mean(values, 3.0)
    running, found, start = RunningMean(3.0), [], 0
    for size in (1, 5, 44, 150):
        found.append(running.count_above_one([*values[start : start + size].tolist(), math.nan]))
        assert found[-1] == (means[start : start + size] > 1).sum()
        start += size
    assert sum(found) > 20
    assert RunningMean(0.0).count_above_one([2.0, 0.5, math.inf, 0.5]) == 2
