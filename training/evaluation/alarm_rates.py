"""Whether chance explains the number of alarms on normal rows."""

import math
from typing import NamedTuple

MAX_PROBABILITY = 1e-3  # chance explains a number of alarms unless so many or more are less probable than this


class AlarmRate(NamedTuple):
    """The alarms on `rows` rows at one alpha.

    `limit`: the largest share of alarms that chance explains if the rows are exchangeable with the calibration rows.
    """

    alpha: float
    flagged: int
    rows: int
    limit: float

    @property
    def share(self) -> float:
        """The share of the rows that are flagged."""
        return self.flagged / self.rows

    @property
    def is_too_high(self) -> bool:
        """Whether chance does not explain the number of alarms."""
        return self.share > self.limit


def alarm_rate(flagged: int, rows: int, calibration_rows: int, alpha: float) -> AlarmRate:
    """Return the alarm rate on `rows` rows, of which `flagged` are flagged at `alpha`.

    If the rows are exchangeable with the n calibration rows, the number of alarms is beta-binomial with the parameters
    k and n + 1 - k, where k = floor(alpha (n + 1)). For an alpha below 1 / (n + 1), k is taken as 1.
    """
    from scipy.stats import betabinom

    k = max(1, math.floor(alpha * (calibration_rows + 1) + 1e-6))
    limit = betabinom(rows, k, calibration_rows + 1 - k).ppf(1 - MAX_PROBABILITY)
    return AlarmRate(alpha, flagged, rows, float(limit) / rows)
