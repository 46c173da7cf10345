"""Drift detection: a test martingale on the counts of p-values per bin.

The hypothesis is that live rows are exchangeable with the n calibration rows. The calibration scores then cut the line
into n + 1 cells. Live row t + 1 falls into a cell that holds k of the t earlier live rows with probability
(k + 1) / (n + 1 + t). This is Polya's urn (Vovk, Gammerman & Shafer, "Algorithmic learning in a random world", 2005,
proposition 2.4).

The counts of p-values in bins of c_1 ... c_B cells therefore follow the Dirichlet-multinomial distribution with exactly
these parameters. It accounts for discrete p-values and for the finite calibration set: the chance deviations of the
calibration rows never count as drift, however long a model is watched.

The alternative is the same distribution with far fewer cells in total, which learns the live distribution quickly. The
likelihood ratio of the two is a martingale that starts at 1, so by Ville's inequality (1939) the probability that it
ever exceeds 1/delta is at most delta, however often it is evaluated. It depends only on the counts, so the counts of
several processes can be added up.
"""

import math
from collections.abc import Sequence

LEARNED_CELLS = 8.0  # total cells of the alternative: the fewer, the faster it learns
WINDOWS = (0.25, 1.0, 4.0)  # window lengths in calibration set sizes: short for sudden drift, long for slight drift
MIN_WINDOW_ROWS = 100
ALARM = 3.0  # log10 of the evidence at which a model counts as stale


def cells_per_bin(bounds: Sequence[float], n: int) -> list[int]:
    """Return how many of the possible p-values 1/(n+1), 2/(n+1) ... 1 fall into each bin.

    Args:
        bounds: upper bounds of the bins, ascending; the last one is 1.
        n: calibration rows.
    """
    cumulative = [math.floor(bound * (n + 1) * (1 + 1e-6)) for bound in bounds]
    return [high - low for low, high in zip([0, *cumulative], cumulative, strict=False)]


def log10_evidence(counts: Sequence[float], cells: Sequence[int]) -> float:
    """Return log10 of the martingale.

    Args:
        counts: live p-values per bin.
        cells: cells per bin; bins without cells are ignored.
    """
    total_cells = sum(cells)
    pairs = [(count, cell) for count, cell in zip(counts, cells, strict=True) if cell]
    rows = sum(count for count, _ in pairs)
    alternative = sum(_log_rising_factorial(LEARNED_CELLS * cell / total_cells, count) for count, cell in pairs)
    alternative -= _log_rising_factorial(LEARNED_CELLS, rows)
    null = sum(_log_rising_factorial(cell, count) for count, cell in pairs)
    null -= _log_rising_factorial(total_cells, rows)
    return (alternative - null) / math.log(10)


def _log_rising_factorial(start: float, count: float) -> float:
    """Return log of start (start + 1) ... (start + count - 1)."""
    return math.lgamma(start + count) - math.lgamma(start)


class _Window:
    """Evidence over up to `length` rows; a full window is followed by an empty one.

    Args:
        length: number of rows.
        penalty: subtracted from log10 of the evidence, because short windows start more often and would otherwise raise
            more false alarms.
    """

    def __init__(self, length: float, penalty: float) -> None:
        self._length = length
        self._penalty = penalty
        self._start: list[float] | None = None  # totals at the start of the window
        self._alarm = False
        self._alarm_before = False  # whether the previous window reached ALARM

    @property
    def alarm(self) -> bool:
        """Whether this window or the one before it has reached ALARM."""
        return self._alarm or self._alarm_before

    def update(self, totals: Sequence[float], cells: Sequence[int]) -> float:
        """Return log10 of the evidence, less the penalty; `totals` are the p-values counted so far in each bin."""
        if self._start is None:
            self._start = list(totals)
        counts = [now - then for now, then in zip(totals, self._start, strict=True)]
        evidence = log10_evidence(counts, cells) - self._penalty
        self._alarm = self._alarm or evidence >= ALARM
        if sum(counts) >= self._length:
            self._start = list(totals)
            self._alarm_before = self._alarm
            self._alarm = False
        return evidence


class DriftDetector:
    """Watches the p-values of one model. `evidence` is the largest log10 evidence of its windows.

    The expected number of false alarms is at most 10^-ALARM in the rows of the longest window, which is 4 times as long
    as the calibration set. If w is the length of a window divided by that of the longest, it raises a false alarm with
    probability at most w 10^-ALARM / len(WINDOWS), and 1 / w windows of its length fit into the longest. This assumes
    that live rows are exchangeable with the calibration rows. Rows that one host sends every second are more alike than
    that, and raise more false alarms.

    Args:
        bounds: upper bounds of the bins.
        n: calibration rows.
    """

    def __init__(self, bounds: Sequence[float], n: int) -> None:
        self._cells = cells_per_bin(bounds, n)
        longest = max(WINDOWS)
        self._windows = [
            _Window(
                length=max(MIN_WINDOW_ROWS, size * (n + 1)),
                penalty=math.log10(len(WINDOWS) * longest / size),
            )
            for size in WINDOWS
        ]
        self.evidence = 0.0

    def update(self, totals: Sequence[float]) -> None:
        """Update the evidence; `totals` are the p-values counted so far in each bin. The first call is the baseline."""
        self.evidence = max(window.update(totals, self._cells) for window in self._windows)

    @property
    def alarm(self) -> bool:
        """Whether any window, or the one before it, has reached ALARM: the model is stale."""
        return any(window.alarm for window in self._windows)
