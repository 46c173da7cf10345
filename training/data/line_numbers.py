"""The lines of a text file where its rows start, for messages."""

import bisect

import numpy as np
import numpy.typing as npt


class LineNumbers:
    """The line of a text file where each row starts. Rows are counted from 0, and lines from 1, as they are read.

    A row is stored only if its line does not directly follow the line of the previous row.
    """

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._lines: list[int] = []

    def extend(self, first_row: int, lines: npt.NDArray[np.int64]) -> None:
        """Add the lines of the rows from `first_row` on."""
        previous = self.of(first_row - 1) if self._rows else -1
        jumps = np.flatnonzero(np.diff(lines, prepend=previous) != 1)
        self._rows += (first_row + jumps).tolist()
        self._lines += lines[jumps].tolist()

    def of(self, row: int) -> int:
        """Return the line where `row` starts."""
        index = bisect.bisect_right(self._rows, row) - 1
        return self._lines[index] + row - self._rows[index]


def describe_row(row: int, lines: LineNumbers | None) -> str:
    """Return how a message refers to `row`, counted from 0: `row 3`, or `row 3 (line 5)` for a text file."""
    return f"row {row}" if lines is None else f"row {row} (line {lines.of(row)})"
