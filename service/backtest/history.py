"""The history that a backtest judges: rows of groups, in order of group and time."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Times = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class History:
    """M rows of D features. Rows are sorted by group and, within a group, by time.

    Args:
        x: [M, D], raw units; NaN for a missing value that the model can impute.
        time: [M], Unix seconds.
        group: [M], index of `groups`.
        groups: names of the groups, sorted; one empty name if the rows have no groups.
        source_rows: [M], number of each row in the source, from 0.
    """

    x: Array
    time: Times
    group: npt.NDArray[np.int32]
    groups: list[str]
    source_rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.time)

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each group, and M."""
        starts: list[int] = np.searchsorted(self.group, np.arange(len(self.groups) + 1)).tolist()
        return starts

    def rows_of(self, group: int) -> slice:
        """Return the rows of the group with this index."""
        return slice(self.starts[group], self.starts[group + 1])


def sort_history(
    x: Array, time: Times, group: Sequence[str | None] | None, source_rows: npt.NDArray[np.int64]
) -> History:
    """Return the history of rows in any order. Rows of one group and time stay in the given order.

    Args:
        x: [M, D], with M at least 1.
        time: [M], Unix seconds.
        group: [M]; None stands for the group without a name. No list if no row has a group.
        source_rows: [M].
    """
    if group is None:
        groups, index = [""], np.zeros(len(x), np.int32)
    else:
        groups = sorted({name or "" for name in group})
        numbers = {name: number for number, name in enumerate(groups)}
        index = np.array([numbers[name or ""] for name in group], np.int32)
    order = np.lexsort((time, index))
    return History(np.ascontiguousarray(x[order]), time[order], index[order], groups, source_rows[order])
