"""Drift detection: the evidence is a martingale, false alarms obey Ville's bound, and shifts are detected in time."""

import math

import numpy as np
import pytest

from service.monitoring.anomaly_metrics import P_VALUE_BOUNDS
from service.monitoring.drift import ALARM, WINDOWS, DriftDetector, cells_per_bin, log10_evidence

BOUNDS = (0.1, 0.25, 0.5, 1.0)


def p_bins(scores: np.ndarray, calibration: np.ndarray, bounds: tuple[float, ...] = P_VALUE_BOUNDS) -> np.ndarray:
    """Return the bin of each score's conformal p-value."""
    at_least = len(calibration) - np.searchsorted(np.sort(calibration), scores)
    p_value = (at_least + 1) / (len(calibration) + 1)
    return np.searchsorted(np.array(bounds) * (1 + 1e-6), p_value)


def totals(bins: np.ndarray, count: int) -> np.ndarray:
    """Return the number of p-values in each bin before the first row and after each row, [T + 1, count]."""
    hits = np.zeros((len(bins) + 1, count))
    hits[np.arange(1, len(bins) + 1), bins] = 1
    return hits.cumsum(axis=0)


@pytest.mark.parametrize("n", [1, 9, 19, 359, 1000])
def test_possible_p_values_in_each_bin_are_counted(n: int) -> None:
    cells = cells_per_bin(P_VALUE_BOUNDS, n)
    p_values = np.arange(1, n + 2, dtype=np.float32) / np.float32(n + 1)
    places = np.searchsorted(np.array(P_VALUE_BOUNDS) * (1 + 1e-6), p_values.astype(float))
    assert cells == np.bincount(places, minlength=len(P_VALUE_BOUNDS)).tolist()
    assert sum(cells) == n + 1


def test_counts_of_exchangeable_scores_follow_polyas_urn() -> None:
    """Simulated counts of low p-values have the Dirichlet-multinomial probabilities."""
    n, rows = 9, 3
    cells = cells_per_bin((0.3, 1.0), n)
    assert cells == [3, 7]
    rng = np.random.default_rng(0)
    scores = rng.random((100_000, n + rows))
    calibration = np.sort(scores[:, :n], axis=1)
    at_least = (calibration[:, None, :] >= scores[:, n:, None]).sum(axis=2)
    low = ((at_least + 1) / (n + 1) <= 0.3 + 1e-9).sum(axis=1)
    for k in range(rows + 1):
        order = math.comb(rows, k)
        rising = [math.gamma(start + count) / math.gamma(start) for start, count in ((3, k), (7, rows - k), (10, rows))]
        assert (low == k).mean() == pytest.approx(order * rising[0] * rising[1] / rising[2], abs=0.005)


def test_evidence_is_a_martingale() -> None:
    """In Polya's urn, whatever the counts, the expected evidence after the next row equals the present evidence."""
    cells = cells_per_bin(BOUNDS, 39)
    rng = np.random.default_rng(1)
    for _ in range(20):
        counts = rng.integers(0, 50, len(BOUNDS)).astype(float)
        urn = (np.array(cells) + counts) / (sum(cells) + counts.sum())
        nexts = [10 ** log10_evidence((counts + one).tolist(), cells) for one in np.eye(len(BOUNDS))]
        assert urn @ nexts == pytest.approx(10 ** log10_evidence(counts.tolist(), cells), rel=1e-9)
    assert log10_evidence([0.0] * len(BOUNDS), cells) == 0.0


@pytest.mark.parametrize("n", [50, 400])
@pytest.mark.slow
def test_evidence_rarely_reaches_ten_if_the_rows_are_exchangeable(n: int) -> None:
    """Ville's inequality: the evidence reaches 10 in at most a tenth of the streams, for any calibration set."""
    rng = np.random.default_rng(n)
    cells, streams, exceeded = cells_per_bin(P_VALUE_BOUNDS, n), 300, 0
    for _ in range(streams):
        bins = p_bins(rng.normal(size=3 * n), rng.normal(size=n))
        path = totals(bins, len(P_VALUE_BOUNDS))[::5]
        exceeded += max(log10_evidence(counts, cells) for counts in path) >= 1.0
    assert exceeded / streams <= 0.1 + 3 * math.sqrt(0.09 / streams)


@pytest.mark.slow
def test_detector_raises_no_alarm_on_a_long_stream_without_drift() -> None:
    """With n calibration rows, at most 10^-3 false alarms are expected in 4 n rows.

    In the 10 streams of 40 n rows, at most 0.1 false alarms are therefore expected.
    """
    rng, alarms = np.random.default_rng(3), 0
    for _ in range(10):
        n = 300
        detector = DriftDetector(P_VALUE_BOUNDS, n)
        for counts in totals(p_bins(rng.normal(size=40 * n), rng.normal(size=n)), len(P_VALUE_BOUNDS))[::50]:
            detector.update(counts)
            alarms += detector.alarm
    assert alarms == 0


@pytest.mark.parametrize(("shift", "within"), [(3.0, 50), (1.0, 300), (0.5, 1000)])
@pytest.mark.slow
def test_shift_after_a_long_stream_is_detected_within_the_expected_number_of_rows(shift: float, within: int) -> None:
    """Scores are normally distributed. After 10 n rows, their mean rises by `shift` standard deviations."""
    n, rows_until_alarm = 1000, []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        calibration = rng.normal(size=n)
        scores = np.concatenate((rng.normal(size=10 * n), rng.normal(shift, size=2000)))
        path = totals(p_bins(scores, calibration), len(P_VALUE_BOUNDS))
        detector = DriftDetector(P_VALUE_BOUNDS, n)
        for counts in path[: 10 * n + 1 : 20]:
            detector.update(counts)
        assert not detector.alarm
        row = 0
        while row < 2000 and not detector.alarm:
            row += 1
            detector.update(path[10 * n + row])
        rows_until_alarm.append(row)
    assert sorted(rows_until_alarm)[-2] <= within  # in 19 of 20 streams


def test_scores_below_the_calibration_scores_raise_an_alarm() -> None:
    rng = np.random.default_rng(5)
    detector = DriftDetector(P_VALUE_BOUNDS, 500)
    for counts in totals(p_bins(rng.normal(-1, size=400), rng.normal(size=500)), len(P_VALUE_BOUNDS))[::10]:
        detector.update(counts)
    assert detector.alarm


def test_alarm_ends_after_a_whole_window_without_drift() -> None:
    rng, n = np.random.default_rng(6), 200
    scores = np.concatenate((rng.normal(3, size=60), rng.normal(size=10 * n)))
    path = totals(p_bins(scores, rng.normal(size=n)), len(P_VALUE_BOUNDS))
    detector = DriftDetector(P_VALUE_BOUNDS, n)
    alarms = []
    for counts in path:
        detector.update(counts)
        alarms.append(detector.alarm)
    assert any(alarms[:60])
    assert alarms[100]
    assert not alarms[-1]
    assert len(path) > 2 * max(WINDOWS) * n


def test_evidence_does_not_depend_on_how_the_rows_are_split_into_updates() -> None:
    cells = cells_per_bin(BOUNDS, 20)
    assert log10_evidence([3.0, 1.0, 4.0, 2.0], cells) == log10_evidence([2.0 + 1, 1.0, 0.0 + 4, 2.0], cells)
    detector = DriftDetector(BOUNDS, 20)
    detector.update([0.0] * 4)
    detector.update([50.0, 0.0, 0.0, 0.0])  # 50 rows in one update, as from a batch
    assert detector.alarm
    assert detector.evidence >= ALARM
