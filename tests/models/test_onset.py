"""Check the start of a deviation against the likelihood, and against simulated incidents with a known start."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm

from models.explanation import Expectations, correlation_of
from models.onset import UsualCourse, describe_course
from models.scaling import standardise
from models.windows import count_earlier_rows, default_scales, summarise
from training.data.moments import compute_moments
from training.data.readers.simulated_hosts import HOSTS, METRICS, simulate
from training.fitting.explanation import fit_explanation

N, D = 30, len(METRICS)
# Standard deviation of the noise of each metric in `simulate`.
NOISE = np.array([2.0, 0.15, 8.0, 3.0, 0.8, 1.5, 0.6])
ONE = UsualCourse(np.zeros(1), np.ones((2, 1, 1)), np.ones((2, 1)), np.full((2, 1), 3.0))


def negative_log_likelihood(y: np.ndarray, lag: int, between: float) -> float:
    """Return the cost if y [N], oldest row first, changes `lag` rows before its newest row."""
    before, after = y[: len(y) - 1 - lag], y[len(y) - 1 - lag :]
    cost = -float(norm(after.mean(), max(1.0, after.std())).logpdf(after).sum())
    if len(before):
        covariance = np.eye(len(before)) + between
        cost -= float(multivariate_normal(np.zeros(len(before)), covariance).logpdf(before))
    return cost


@pytest.mark.parametrize("seed", range(20))
def test_onset_is_the_most_likely_change_of_mean_and_deviation(seed: int) -> None:
    random = np.random.RandomState(seed)
    y = random.standard_normal(12) + 2 * random.standard_normal()
    start = random.randint(12)
    y[start:] = y[start:] * random.uniform(1, 4) + random.uniform(-4, 4)
    costs = [negative_log_likelihood(y, lag, 3.0) for lag in range(12)]
    (lag,) = ONE.find_onsets(y.astype(np.float32)[None, :, None], np.zeros((1, 1), int))[0]
    assert costs[lag] == pytest.approx(min(costs), rel=1e-5)


def test_absent_rows_and_missing_values_do_not_count() -> None:
    y = np.zeros((1, 10, 1), np.float32)
    y[0, -3:] = 8.0
    y[0, :4] = np.nan
    assert ONE.find_onsets(y, np.zeros((1, 1), int)).tolist() == [[2]]
    assert ONE.find_onsets(y[:, -3:], np.zeros((1, 1), int)).tolist() == [[2]]  # the whole window deviates
    assert ONE.find_onsets(y[:, -1:], np.zeros((1, 1), int)).tolist() == [[0]]
    two = UsualCourse(np.zeros(2), np.stack([np.eye(2)] * 2), np.ones((2, 2)), np.ones((2, 2)))
    x = np.concatenate((y, np.where(np.isnan(y), np.nan, 1.0)), axis=2)
    x[0, -1, 0] = np.nan  # a missing value in a row that is not absent
    assert two.find_onsets(x, np.array([[1]])).shape == (1, 1)


def test_huge_values_give_a_finite_answer() -> None:
    x = np.zeros((1, 10, 1), np.float32)
    x[0, -4:] = np.finfo(np.float32).max
    assert ONE.find_onsets(x, np.zeros((1, 1), int)).tolist() == [[3]]


@cache
def hosts(first_week: int, weeks: int) -> np.ndarray:
    """Return normal rows [rows, HOSTS, D] of simulated hosts."""
    values = simulate(first_week, weeks).select(METRICS).to_numpy()
    return np.asarray(values.reshape(-1, HOSTS, D), np.float32)


@cache
def course_of_hosts() -> UsualCourse:
    """Return the usual course of the hosts, computed from the weights of an explanation, as for a loaded artifact."""
    rows = hosts(0, 3)
    begins = np.zeros(len(rows), bool)
    begins[0] = True
    scales = default_scales(N)
    z = np.concatenate([summarise(rows[:, host], count_earlier_rows(begins), scales) for host in range(HOSTS)])
    explanation = fit_explanation(compute_moments([z]), standardise(torch.from_numpy(z)), images=False)
    assert isinstance(explanation, Expectations)
    correlation = correlation_of(explanation.weights.double(), explanation.deviation.double()).numpy()
    np.testing.assert_allclose(correlation, np.corrcoef(z.T.astype(float)), atol=2e-3)
    return describe_course(z.mean(axis=0, dtype=float), z.std(axis=0, dtype=float), correlation, D)


def incident(kind: str, rows: int, random: np.random.RandomState) -> np.ndarray:
    """Return what an incident of `rows` rows adds to a metric in each row, in standard deviations of the noise."""
    match kind:
        case "step":
            return np.full(rows, 16.0)
        case "small step":
            return np.full(rows, 6.0)
        case "ramp":
            return np.linspace(0.5, 20.0, rows)
        case "spread":
            return 8 * random.standard_normal(rows)
        case _:
            raise ValueError(kind)


def onset_errors(kind: str, rows: int, trials: int = 200) -> np.ndarray:
    """Return by how many rows each onset is found too early, [trials]; negative if too late."""
    random, x = np.random.RandomState(0), hosts(4, 2)
    windows, features = [], []
    for _ in range(trials):
        host, feature, end = random.randint(HOSTS), random.randint(D), random.randint(N + rows, len(x))
        past = x[end - max(N, rows) : end, host].copy()
        past[-rows:, feature] += incident(kind, rows, random) * NOISE[feature]
        windows.append(past[-N:])
        features.append([feature])
    lags = course_of_hosts().find_onsets(np.stack(windows), np.array(features))[:, 0]
    return np.asarray(lags - (min(rows, N) - 1))


@pytest.mark.parametrize(
    ("kind", "rows", "median", "near"),
    [
        ("step", 1, 0, 0.8),
        ("step", 8, 0, 0.95),
        ("step", 25, 0, 0.95),
        ("step", 45, 0, 0.9),  # the whole window deviates
        ("small step", 8, 0, 0.8),
        ("ramp", 20, 4, 0.0),  # the noise hides the beginning of a ramp
        ("spread", 8, 1, 0.75),
        ("spread", 20, 0, 0.85),
    ],
)
def test_onset_of_a_simulated_incident_is_found_within_a_few_rows(
    kind: str, rows: int, median: float, near: float
) -> None:
    """`near`: at least this share of the starts must be found within two rows."""
    errors = np.abs(onset_errors(kind, rows))
    assert np.median(errors) <= median
    assert (errors <= 2).mean() >= near
