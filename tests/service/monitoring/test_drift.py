"""The drift statistic against theory: a martingale, Ville's bound on healthy streams, how fast it sees a shift."""

import math

import numpy as np
import pytest

from service.monitoring.anomaly_metrics import P_BOUNDS
from service.monitoring.drift import ALARM, WINDOWS, Drift, cells, log10_evidence

BOUNDS = (0.1, 0.25, 0.5, 1.0)


def p_bins(scores: np.ndarray, calibration: np.ndarray, bounds: tuple[float, ...] = P_BOUNDS) -> np.ndarray:
    """The bin of each score's conformal p-value."""
    at_least = len(calibration) - np.searchsorted(np.sort(calibration), scores)
    p_value = (at_least + 1) / (len(calibration) + 1)
    return np.searchsorted(np.array(bounds) * (1 + 1e-6), p_value)


def totals(bins: np.ndarray, count: int) -> np.ndarray:
    """[T + 1, count]: how many fell into each bin by each moment."""
    hits = np.zeros((len(bins) + 1, count))
    hits[np.arange(1, len(bins) + 1), bins] = 1
    return hits.cumsum(axis=0)


@pytest.mark.parametrize("n", [1, 9, 19, 359, 1000])
def test_cells_are_the_p_values_of_each_bin(n: int) -> None:
    found = cells(P_BOUNDS, n)
    p_values = np.arange(1, n + 2, dtype=np.float32) / np.float32(n + 1)
    places = np.searchsorted(np.array(P_BOUNDS) * (1 + 1e-6), p_values.astype(float))
    assert found == np.bincount(places, minlength=len(P_BOUNDS)).tolist()
    assert sum(found) == n + 1


def test_the_null_is_the_law_of_exchangeable_ranks() -> None:
    """Drawn from n + 1 + t exchangeable scores, the first t live ones fall into bins as Polya's urn says."""
    n, rows = 9, 3
    found = cells((0.3, 1.0), n)
    assert found == [3, 7]
    rng = np.random.default_rng(0)
    scores = rng.random((100_000, n + rows))
    calibration = np.sort(scores[:, :n], axis=1)
    at_least = (calibration[:, None, :] >= scores[:, n:, None]).sum(axis=2)
    low = ((at_least + 1) / (n + 1) <= 0.3 + 1e-9).sum(axis=1)
    for k in range(rows + 1):
        order = math.comb(rows, k)
        rising = [math.gamma(start + count) / math.gamma(start) for start, count in ((3, k), (7, rows - k), (10, rows))]
        assert (low == k).mean() == pytest.approx(order * rising[0] * rising[1] / rising[2], abs=0.005)


def test_the_evidence_is_a_martingale() -> None:
    """After any past, its mean over where the next row falls, as the urn says, is what it was."""
    found = cells(BOUNDS, 39)
    rng = np.random.default_rng(1)
    for _ in range(20):
        counts = rng.integers(0, 50, len(BOUNDS)).astype(float)
        urn = (np.array(found) + counts) / (sum(found) + counts.sum())
        nexts = [10 ** log10_evidence((counts + one).tolist(), found) for one in np.eye(len(BOUNDS))]
        assert urn @ nexts == pytest.approx(10 ** log10_evidence(counts.tolist(), found), rel=1e-9)
    assert log10_evidence([0.0] * len(BOUNDS), found) == 0.0


@pytest.mark.parametrize("n", [50, 400])
def test_healthy_streams_rarely_reach_1_over_delta(n: int) -> None:
    """Ville: a martingale from 1 ever exceeds 10 in at most a tenth of all streams, whatever the calibration."""
    rng = np.random.default_rng(n)
    found, streams, over = cells(P_BOUNDS, n), 300, 0
    for _ in range(streams):
        bins = p_bins(rng.normal(size=3 * n), rng.normal(size=n))
        path = totals(bins, len(P_BOUNDS))[::5]
        over += max(log10_evidence(counts, found) for counts in path) >= 1.0
    assert over / streams <= 0.1 + 3 * math.sqrt(0.09 / streams)


def test_a_long_healthy_life_raises_no_alarm() -> None:
    """At most 10^-3 false alarms are expected in four calibration sizes, so in these 10 models' 40 at most 0.1."""
    rng, alarms = np.random.default_rng(3), 0
    for _ in range(10):
        n = 300
        drift = Drift(P_BOUNDS, n)
        for counts in totals(p_bins(rng.normal(size=40 * n), rng.normal(size=n)), len(P_BOUNDS))[::50]:
            drift.look(counts)
            alarms += drift.alarm
    assert alarms == 0


@pytest.mark.parametrize(("shift", "within"), [(3.0, 50), (1.0, 300), (0.5, 1000)])
def test_a_shift_after_a_long_healthy_life_is_seen_within_so_many_rows(shift: float, within: int) -> None:
    """Scores are normal, and move up by `shift` standard deviations after 10 calibration sizes."""
    n, seen = 1000, []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        calibration = rng.normal(size=n)
        scores = np.concatenate((rng.normal(size=10 * n), rng.normal(shift, size=2000)))
        path = totals(p_bins(scores, calibration), len(P_BOUNDS))
        drift = Drift(P_BOUNDS, n)
        for counts in path[: 10 * n + 1 : 20]:
            drift.look(counts)
        assert not drift.alarm
        row = 0
        while row < 2000 and not drift.alarm:
            row += 1
            drift.look(path[10 * n + row])
        seen.append(row)
    assert sorted(seen)[-2] <= within  # in 19 of 20


def test_scores_that_fall_are_drift_too() -> None:
    rng = np.random.default_rng(5)
    drift = Drift(P_BOUNDS, 500)
    for counts in totals(p_bins(rng.normal(-1, size=400), rng.normal(size=500)), len(P_BOUNDS))[::10]:
        drift.look(counts)
    assert drift.alarm


def test_the_alarm_ends_when_a_whole_window_was_calm() -> None:
    rng, n = np.random.default_rng(6), 200
    scores = np.concatenate((rng.normal(3, size=60), rng.normal(size=10 * n)))
    path = totals(p_bins(scores, rng.normal(size=n)), len(P_BOUNDS))
    drift = Drift(P_BOUNDS, n)
    alarms = []
    for counts in path:
        drift.look(counts)
        alarms.append(drift.alarm)
    assert any(alarms[:60])
    assert alarms[100]
    assert not alarms[-1]
    assert len(path) > 2 * max(WINDOWS) * n


def test_counts_of_several_processes_may_be_added_up() -> None:
    found = cells(BOUNDS, 20)
    assert log10_evidence([3.0, 1.0, 4.0, 2.0], found) == log10_evidence([2.0 + 1, 1.0, 0.0 + 4, 2.0], found)
    drift = Drift(BOUNDS, 20)
    drift.look([0.0] * 4)
    drift.look([50.0, 0.0, 0.0, 0.0])  # in one step, as a batch
    assert drift.alarm
    assert drift.evidence >= ALARM
