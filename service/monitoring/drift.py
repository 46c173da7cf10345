"""Whether live p-values still are those of rows like the calibration rows: a test martingale on their counts.

Under the hypothesis that live rows are exchangeable with the n calibration rows, the calibration scores cut the line
into n + 1 cells of which no live score prefers any: each falls into a cell of k earlier live scores with probability
(k + 1) / (n + 1 + t), t the number of all (Polya's urn; Vovk, Gammerman & Shafer, "Algorithmic learning in a random
world", 2005, prop. 2.4). So the counts of p-values in bins of c_1 ... c_B cells have the Dirichlet-multinomial law with
these c exactly: discreteness and the calibration's finite size are in it, and however long a healthy model is watched,
the accidents of its calibration rows are never taken for drift.

Against it bets the same law with far fewer cells, which learns the live distribution quickly. The ratio of the two
likelihoods is a martingale that starts at 1, so by Ville's inequality (1939) it exceeds 1/delta with probability delta
at most, whenever one looks. It is a function of the counts alone: those of several processes may be added up.
"""

import math
from collections.abc import Sequence

LEARNED = 8.0  # cells' worth of prior belief that the bet has: the fewer, the faster it learns
WINDOWS = (0.25, 1.0, 4.0)  # lengths, in calibration sizes: short ones see what is sudden, long ones what is slight
LEAST_WINDOW = 100  # rows
ALARM = 3.0  # log10 of the evidence at which a model is called stale


def cells(bounds: Sequence[float], n: int) -> list[int]:
    """How many of the p-values 1/(n+1), 2/(n+1) ... 1 are in each bin up to `bounds`, ascending, the last of them 1."""
    upto = [math.floor(bound * (n + 1) * (1 + 1e-6)) for bound in bounds]
    return [high - low for low, high in zip([0, *upto], upto, strict=False)]


def log10_evidence(counts: Sequence[float], cells: Sequence[int]) -> float:
    """log10 of the martingale for p-values of which `counts` fell into bins of `cells`; empty bins are left out."""
    total = sum(cells)
    pairs = [(count, cell) for count, cell in zip(counts, cells, strict=True) if cell]
    rows = sum(count for count, _ in pairs)
    bet = sum(_rising(count, LEARNED * cell / total) for count, cell in pairs) - _rising(rows, LEARNED)
    null = sum(_rising(count, cell) for count, cell in pairs) - _rising(rows, total)
    return (bet - null) / math.log(10)


def _rising(count: float, start: float) -> float:
    """log of start (start + 1) ... (start + count - 1)."""
    return math.lgamma(start + count) - math.lgamma(start)


class _Window:
    """The rows since a moment, up to `length` of them, and whether they, or those of the one before, told of drift.

    handicap: log10 by which its evidence counts less: windows that are often begun would else err more often.
    """

    def __init__(self, length: float, handicap: float) -> None:
        self.length, self.handicap = length, handicap
        self.start: list[float] | None = None
        self.alarms = [False, False]  # before, now

    def look(self, totals: Sequence[float], cells: Sequence[int]) -> float:
        """log10 of the evidence after `totals` rows in each bin, handicapped."""
        start = self.start = self.start or list(totals)
        counts = [now - then for now, then in zip(totals, start, strict=True)]
        evidence = log10_evidence(counts, cells) - self.handicap
        self.alarms[1] |= evidence >= ALARM
        if sum(counts) >= self.length:
            self.start, self.alarms = list(totals), [self.alarms[1], False]
        return evidence


class Drift:
    """Watches one model's p-values.

    The expected number of false alarms is at most 10^-ALARM in the rows of the longest window, 4 calibration sizes:
    a window of length W begins anew after W rows and errs with probability w 10^-ALARM, where the shares w of all
    windows of one length in the longest add up to 1 / len(WINDOWS). It holds for live rows that are exchangeable with
    the calibration rows: rows of one host a second apart are less different than that, and alarm more readily.

    Args:
        bounds: of the bins.
        n: calibration rows.
    """

    def __init__(self, bounds: Sequence[float], n: int) -> None:
        self._cells = cells(bounds, n)
        longest = max(WINDOWS)
        self._windows = [
            _Window(max(LEAST_WINDOW, share * (n + 1)), math.log10(len(WINDOWS) * longest / share)) for share in WINDOWS
        ]
        self.evidence = 0.0

    def look(self, totals: Sequence[float]) -> None:
        """Take in how many rows have fallen into each bin by now, since whenever."""
        self.evidence = max(window.look(totals, self._cells) for window in self._windows)

    @property
    def alarm(self) -> bool:
        """Whether a window that lasts, or the one before it, has told of drift."""
        return any(any(window.alarms) for window in self._windows)
