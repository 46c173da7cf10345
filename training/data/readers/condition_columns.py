"""Read the columns of conditions of a CSV or Parquet file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from models.manifest import MAX_LEVELS
from training.data.conditions import NO_LEVEL, ConditionValues, check_levels, sorted_levels, too_many_levels
from training.data.labels import MISSING, normalise
from training.errors import DataError

if TYPE_CHECKING:
    import polars as pl


@dataclass
class ConditionReader:
    """Reads one column of conditions.

    Args:
        path: the file.
        name: the name of the column.
        index: its position in the file.
        limited: whether a column of more than MAX_LEVELS different values is refused. If not, the values after the
            first MAX_LEVELS count as empty cells.
    """

    path: Path
    name: str
    index: int
    limited: bool = True
    levels: dict[str, int] = field(default_factory=dict)  # index of each level, in order of appearance
    blocks: list[npt.NDArray[np.int64]] = field(default_factory=list)

    def read(self, cells: "pl.Series") -> None:
        """Read the next cells of the column. Raise DataError if they are not the levels of a condition."""
        import polars as pl

        if cells.dtype.is_nested() or cells.dtype == pl.Binary:
            raise DataError(
                f"{self.path}: column {self.name!r} of --condition holds {cells.dtype}: expected text or whole numbers"
            )
        text = cells.cast(pl.String)
        distinct = text.drop_nulls().unique(maintain_order=True).to_list()
        codes = [self._code(value) for value in distinct]
        found = (
            text.replace_strict(distinct, codes, default=NO_LEVEL, return_dtype=pl.Int64).fill_null(NO_LEVEL).to_numpy()
            if distinct
            else np.full(len(text), NO_LEVEL)
        )
        self.blocks.append(found)

    def _code(self, value: str) -> int:
        level = normalise(value)
        if level.lower() in MISSING:
            return NO_LEVEL
        if level not in self.levels and len(self.levels) >= MAX_LEVELS:
            if self.limited:
                raise too_many_levels(str(self.path), self.name)
            return NO_LEVEL
        return self.levels.setdefault(level, len(self.levels))

    def finish(self, rows: npt.NDArray[np.int64]) -> ConditionValues:
        """Return the column for the rows of the file with these numbers. Raise DataError if a level has a bad name."""
        levels = list(self.levels)
        if self.limited:
            check_levels(str(self.path), self.name, levels)
        codes = np.concatenate(self.blocks)[rows] if self.blocks else np.empty(0, np.int64)
        return sorted_levels(self.name, levels, codes)


def read_conditions(readers: Sequence[ConditionReader], rows: npt.NDArray[np.int64]) -> tuple[ConditionValues, ...]:
    """Return the columns of `readers` for the rows of the file with these numbers."""
    return tuple(reader.finish(rows) for reader in readers)
