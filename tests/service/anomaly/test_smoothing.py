"""Smoothing, compared with a direct evaluation of its definition and with Polars."""

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
    """Return what `exponential_mean` should return, computed by its definition: sums over all pairs of rows."""
    means = []
    for i, (value, now) in enumerate(zip(values, time, strict=True)):
        if math.isnan(now):
            means.append(value)
            continue
        past = [j for j in range(len(values)) if group[j] == group[i] and time[j] <= now]
        weights = [2.0 ** (-(now - time[j]) / half_life) for j in past]
        means.append(math.fsum(w * values[j] for w, j in zip(weights, past, strict=True)) / math.fsum(weights))
    return means


@given(ROWS, st.floats(0.1, 1e4), st.randoms())
def test_smoothed_value_is_the_weighted_mean_of_past_rows_whatever_the_order_of_the_input(
    rows: list[tuple[float, float, str]], half_life: float, random: object
) -> None:
    values, time, group = map(list, zip(*rows, strict=True))
    smoothed = exponential_mean(values, half_life, time, group)
    np.testing.assert_allclose(smoothed, by_definition(values, half_life, time, group), rtol=1e-9, atol=1e-9)
    order = list(range(len(rows)))
    random.shuffle(order)  # type: ignore[attr-defined] # hypothesis gives a random.Random
    shuffled = exponential_mean(
        [values[i] for i in order], half_life, [time[i] for i in order], [group[i] for i in order]
    )
    np.testing.assert_allclose(shuffled, smoothed[order], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("half_life", [0.5, 3.0, 40.0])
def test_mean_with_a_half_life_in_rows_equals_the_ewm_mean_of_polars(half_life: float) -> None:
    values = np.random.default_rng(0).normal(size=500)
    expected = pl.Series(values).ewm_mean(half_life=half_life, adjust=True).to_numpy()
    np.testing.assert_allclose(exponential_mean(values, half_life), expected, rtol=1e-12)
    uneven = np.cumsum(np.random.default_rng(1).exponential(size=500))
    np.testing.assert_allclose(exponential_mean(values, half_life, uneven, by_rows=True), expected, rtol=1e-12)


def test_weight_of_a_row_halves_after_a_half_life() -> None:
    assert exponential_mean([0.0, 3.0], 60.0, [0.0, 60.0]).tolist() == [0.0, 2.0]
    assert exponential_mean([0.0, 3.0], 1.0).tolist() == [0.0, 2.0]


def test_row_after_a_long_gap_keeps_its_value() -> None:
    assert exponential_mean([100.0, 1.0], 60.0, [0.0, 1e9]).tolist() == [100.0, 1.0]


def test_rows_of_other_groups_do_not_affect_the_mean() -> None:
    smoothed = exponential_mean([1.0, 50.0, 1.0, 70.0], 5.0, [0, 0, 1, 1], ["a", "b", "a", "b"])
    assert smoothed[[0, 2]].tolist() == [1.0, 1.0]
    assert 50.0 < smoothed[3] < 70.0


def test_nan_stays_nan_and_does_not_affect_the_mean() -> None:
    smoothed = exponential_mean([2.0, math.nan, 2.0], 1.0, [0, 1, 2])
    np.testing.assert_array_equal(smoothed, [2.0, math.nan, 2.0])


def test_variance_of_smoothed_noise_matches_theory() -> None:
    """A half-life of h rows multiplies the variance of white noise by (1 - k) / (1 + k), where k = 2^(-1/h).

    Source: Roberts 1959.
    """
    noise = np.random.default_rng(2).normal(size=200_000)
    kept = 2.0 ** (-1 / 10)
    assert exponential_mean(noise, 10.0)[1000:].var() == pytest.approx((1 - kept) / (1 + kept), rel=0.05)


@pytest.mark.parametrize("half_life", [0.0, -1.0, math.nan])
def test_half_life_that_is_not_above_0_is_refused(half_life: float) -> None:
    with pytest.raises(ValueError, match="half-life"):
        exponential_mean([1.0], half_life)


def test_arguments_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="as many times and groups"):
        exponential_mean([1.0, 2.0], 1.0, [0.0])


def test_running_mean_over_pieces_equals_the_mean_over_all_rows_at_once() -> None:
    values = np.random.default_rng(3).exponential(size=200)
    means = exponential_mean(values, 3.0)
    running, counts, start = RunningMean(3.0), [], 0
    for size in (1, 5, 44, 150):
        counts.append(running.count_above_one([*values[start : start + size].tolist(), math.nan]))
        assert counts[-1] == (means[start : start + size] > 1).sum()
        start += size
    assert sum(counts) > 20
    assert RunningMean(0.0).count_above_one([2.0, 0.5, math.inf, 0.5]) == 2
