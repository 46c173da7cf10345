"""Say since when the features of an anomalous row deviate. Only models with a window know this."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from models.onset import UsualCourse
from service.codec.long_work import pause_if_due

MAX_FEATURES = 8  # features of a row that are examined
MIN_SHARE = 0.1  # a feature is examined if it contributes at least this share of the largest contribution
PART_ROWS = 128  # rows that are examined at once, which limits the memory

Array = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]


class Onset(NamedTuple):
    """When the deviation of a feature began.

    `lag`: how many rows before the judged row it began; 0 if it began with the judged row.
    `since`: the time of the row with which it began, in Unix seconds; None if the rows have no times.
    """

    lag: int
    since: float | None


class Onsets(NamedTuple):
    """Finds the onsets for G judged rows.

    Args:
        course: how the features vary in normal windows.
        windows_of: takes the numbers [A] of some rows, and returns their windows [A, N, D].
        times_of: takes the same numbers, and returns the times [A, N] of the rows in these windows; None if the rows
            have no times.
        first: what number the two functions give to the first of the G rows.
    """

    course: UsualCourse
    windows_of: Callable[[Indices], Array]
    times_of: Callable[[Indices], npt.NDArray[np.float64]] | None = None
    first: int = 0

    def find(self, rows: Indices, features: Indices, contribution: Array) -> list[dict[int, Onset]]:
        """Return for each of A rows a dictionary from the index of a feature to its onset.

        Args:
            rows: the A rows, as indices of the G rows, [A].
            features: the features with the largest contributions, largest first, [A, E].
            contribution: contributions of all features to the scores of the rows, [A, D].
        """
        features = features[:, :MAX_FEATURES]
        shares = np.take_along_axis(contribution, features, axis=1)
        is_examined = shares >= MIN_SHARE * shares[:, :1]
        found: list[dict[int, Onset]] = []
        for start in range(0, len(rows), PART_ROWS):
            pause_if_due()
            part = slice(start, start + PART_ROWS)
            numbers = rows[part] + self.first
            lags = self.course.find_onsets(self.windows_of(numbers), features[part])  # [A, E]
            since = np.full(lags.shape, np.nan)
            if self.times_of is not None:
                times = self.times_of(numbers)  # [A, N]
                since = np.take_along_axis(times, times.shape[1] - 1 - lags, axis=1)
            found += [
                {
                    feature: Onset(lag, time if time == time else None)
                    for feature, lag, time, examined in zip(*columns, strict=True)
                    if examined
                }
                for columns in zip(
                    features[part].tolist(), lags.tolist(), since.tolist(), is_examined[part].tolist(), strict=True
                )
            ]
        return found
