"""Drift detection: a test martingale on the counts of p-values per bin.

The null hypothesis is that live rows are exchangeable with the n calibration rows. The n calibration scores divide the
range of scores into n + 1 intervals, called cells. If a cell holds k of the first t live rows, the next live row falls
into that cell with probability (k + 1) / (n + 1 + t). This is Polya's urn (Vovk, Gammerman & Shafer, "Algorithmic
learning in a random world", 2005, proposition 2.4).

The p-values are counted in B bins, which contain c_1 ... c_B cells. Under the null hypothesis, the counts per bin
follow the Dirichlet-multinomial distribution with the parameters c_1 ... c_B. This distribution takes into account that
p-values are discrete and that the calibration set is finite. Deviations that the calibration rows have by chance
therefore never count as drift, however long a model is watched.

The alternative hypothesis is the same distribution with far fewer cells in total: it adapts quickly to the live rows.
If the null hypothesis is true, the likelihood ratio of the alternative to the null hypothesis is a martingale that
starts at 1. By Ville's inequality (1939), the probability that the ratio ever exceeds 1/delta is then at most delta,
however often the ratio is evaluated. The ratio depends only on the counts, so the counts of several processes can be
added up.
"""

import math
from collections.abc import Sequence

LEARNED_CELLS = 8.0  # total number of cells under the alternative hypothesis; fewer cells make it adapt faster
# Window lengths as multiples of the size of the calibration set. Short windows detect sudden drift, long windows detect
# slight drift.
WINDOWS = (0.25, 1.0, 4.0)
MIN_WINDOW_ROWS = 100
ALARM = 3.0  # log10 of the evidence at which a model counts as stale


def cells_per_bin(bounds: Sequence[float], n: int) -> list[int]:
    """Return how many of the possible p-values 1/(n+1), 2/(n+1) ... 1 fall into each bin.

    Args:
        bounds: upper bounds of the bins, ascending; the last one is 1.
        n: number of calibration rows.
    """
    cumulative = [math.floor(bound * (n + 1) * (1 + 1e-6)) for bound in bounds]
    return [high - low for low, high in zip([0, *cumulative], cumulative, strict=False)]


def log10_evidence(counts: Sequence[float], cells: Sequence[int]) -> float:
    """Return log10 of the likelihood ratio of the alternative to the null hypothesis.

    Args:
        counts: number of live p-values per bin.
        cells: number of cells per bin; bins without cells are ignored.
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
    """Return the logarithm of the product start * (start + 1) * ... * (start + count - 1)."""
    return math.lgamma(start + count) - math.lgamma(start)


class _Window:
    """The evidence from up to `length` rows. When the window is full, a new and empty window starts.

    Args:
        length: number of rows.
        penalty: number subtracted from log10 of the evidence. A short window has a larger penalty than a long one,
            because it starts more often and would otherwise raise more false alarms.
    """

    def __init__(self, length: float, penalty: float) -> None:
        self._length = length
        self._penalty = penalty
        self._start: list[float] | None = None  # number of p-values per bin at the start of the window
        self._alarm = False
        self._alarm_before = False  # whether the previous window reached ALARM

    @property
    def alarm(self) -> bool:
        """Whether this window or the one before it has reached ALARM."""
        return self._alarm or self._alarm_before

    def update(self, totals: Sequence[float], cells: Sequence[int]) -> float:
        """Return log10 of the evidence, less the penalty. `totals` are the numbers of p-values so far, per bin."""
        if self._start is None:
            self._start = list(totals)
        # Rows of history are subtracted from `totals`. For a moment, another process may have counted a row in only one
        # of the two sums, so a difference can be negative.
        counts = [max(0.0, now - then) for now, then in zip(totals, self._start, strict=True)]
        evidence = log10_evidence(counts, cells) - self._penalty
        self._alarm = self._alarm or evidence >= ALARM
        if sum(counts) >= self._length:
            self._start = list(totals)
            self._alarm_before = self._alarm
            self._alarm = False
        return evidence


class DriftDetector:
    """Watches the p-values of one model. `evidence` is the largest log10 evidence of the windows.

    The longest window has 4 times as many rows as the calibration set. During one such window, the expected number of
    false alarms is at most 10^-ALARM, for this reason: consider windows whose length is a fraction w of the longest.
    Each raises a false alarm with probability at most w * 10^-ALARM / len(WINDOWS), and 1 / w of them fit in the
    longest window. Each window length therefore contributes at most 10^-ALARM / len(WINDOWS).

    This bound assumes that live rows are exchangeable with the calibration rows. Rows that one host sends every second
    are more alike than exchangeable rows, and raise more false alarms than the bound allows.

    Args:
        bounds: upper bounds of the bins.
        n: number of calibration rows.
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
        """Update the evidence. `totals` are the numbers of p-values so far, per bin. The first call is the baseline."""
        self.evidence = max(window.update(totals, self._cells) for window in self._windows)

    @property
    def alarm(self) -> bool:
        """Whether the model is stale: a window, or the window before it, has reached ALARM."""
        return any(window.alarm for window in self._windows)
