"""The conditions of rows: columns of few levels, such as a class. A model gets them, but not as features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.errors import join_names
from models.manifest import (
    MAX_COMBINATIONS,
    MAX_LEVEL_NAME,
    MAX_LEVELS,
    ConditionColumn,
    Conditions,
    is_level_name,
)
from training.data.labels import MISSING, normalise
from training.data.row_store import Floats, RowStore
from training.errors import DataError

NO_LEVEL = -1
MIN_LEVEL_ROWS = 10  # a level needs at least this many fit rows
LISTED_LEVELS = 5  # number of levels that a message lists
Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ConditionValues:
    """A column of conditions of N rows, as the source has it.

    Args:
        name: the name of the column.
        levels: the different levels, sorted: numbers by their values.
        codes: for each row, the index of its level, [N]; NO_LEVEL if the cell is empty.
    """

    name: str
    levels: list[str]
    codes: Codes


def sorted_levels(name: str, levels: Sequence[str], codes: Codes) -> ConditionValues:
    """Return a column of conditions whose `codes` [N] are indices of `levels`, with the levels in order."""
    order = sorted(range(len(levels)), key=lambda index: _sort_key(levels[index]))
    place = np.empty(len(levels) + 1, np.int64)
    place[order] = np.arange(len(levels))
    place[-1] = NO_LEVEL  # NO_LEVEL is the index -1
    return ConditionValues(name, [levels[index] for index in order], place[codes])


def _sort_key(level: str) -> tuple[bool, float, str]:
    try:
        return False, float(level), level
    except ValueError:
        return True, 0.0, level


def too_many_levels(source: str, name: str) -> DataError:
    """Return the error that a column of conditions has more than MAX_LEVELS levels."""
    return DataError(
        f"{source}: column {name!r} of --condition has more than {MAX_LEVELS} different values: expected the levels of "
        "a condition, such as a class; give a column of fewer levels"
    )


def check_levels(source: str, name: str, levels: Sequence[str]) -> None:
    """Raise DataError if there are too many levels, or if a level is not a valid name."""
    if len(levels) > MAX_LEVELS:
        raise too_many_levels(source, name)
    for level in levels:
        if not is_level_name(level):
            raise DataError(
                f"{source}: column {name!r} of --condition has the value {level[:MAX_LEVEL_NAME]!r}: expected names of "
                f"1 to {MAX_LEVEL_NAME} printable characters"
            )


@dataclass(frozen=True)
class CodedConditions:
    """The conditions of N rows, as a model gets them.

    Args:
        known: the columns and levels that the model knows.
        codes: for each row and column, the index of the level, [N, J]; NO_LEVEL if the row has no level that the model
            knows.
        notes: what the user should know about rows without a level.
    """

    known: Conditions
    codes: Codes
    notes: list[str]

    def one_hot(self, rows: Codes | slice) -> Floats:
        """Return the conditions of the rows with these indices, one-hot, [n, C]."""
        return one_hot(self.known, self.codes[rows])


def one_hot(known: Conditions, codes: Codes) -> Floats:
    """Return conditions as one-hot rows [n, C]. `codes` [n, J] has the number of the level in each column."""
    result = np.zeros((len(codes), known.width), np.float32)
    first = 0
    for column, of_column in zip(known.columns, codes.T, strict=True):
        present = np.flatnonzero(of_column != NO_LEVEL)
        result[present, first + of_column[present]] = 1.0
        first += len(column.levels)
    return result


def draw_conditions(known: Conditions, count: int, random: torch.Generator) -> torch.Tensor:
    """Return `count` conditions, one-hot, [count, C], drawn by their shares in the training data."""
    places = torch.multinomial(torch.tensor(known.shares), count, replacement=True, generator=random)
    return torch.from_numpy(one_hot(known, np.array(known.combinations)[places.numpy()]))


def learn_conditions(columns: Sequence[ConditionValues], fit: Codes, source: str) -> CodedConditions:
    """Return the conditions that a model learns from the fit rows, whose indices are `fit`.

    A level with fewer than MIN_LEVEL_ROWS fit rows is not learnt: its rows count as rows without a level.

    Raises:
        DataError: a column has fewer than two levels that can be learnt, or there are too many combinations.
    """
    learnt, codes, notes = [], [], []
    for column in columns:
        counts = np.bincount(column.codes[fit][column.codes[fit] != NO_LEVEL], minlength=len(column.levels))
        kept = np.flatnonzero(counts >= MIN_LEVEL_ROWS)
        if len(kept) < 2:
            raise DataError(
                f"{source}: column {column.name!r} of --condition has {len(kept)} levels with at least "
                f"{MIN_LEVEL_ROWS} rows to fit: expected at least 2"
            )
        rare = [level for index, level in enumerate(column.levels) if index not in kept]
        if rare:
            notes.append(
                f"levels of {column.name!r} with fewer than {MIN_LEVEL_ROWS} rows to fit are not learnt, and their "
                f"rows count as rows without a level: {join_names([repr(level) for level in rare], LISTED_LEVELS)}"
            )
        if missing := int((column.codes == NO_LEVEL).sum()):
            notes.append(f"rows without a level of {column.name!r}: {missing:,}")
        place = np.full(len(column.levels) + 1, NO_LEVEL)
        place[kept] = np.arange(len(kept))
        codes.append(place[column.codes])
        learnt.append(ConditionColumn(name=column.name, levels=[column.levels[index] for index in kept]))
    joined = np.stack(codes, axis=1)  # [N, J]
    complete = joined[fit][(joined[fit] != NO_LEVEL).all(axis=1)]
    if not len(complete):
        raise DataError(f"{source}: no row to fit has a level in every column of --condition: give fewer columns")
    combinations, counts = np.unique(complete, axis=0, return_counts=True)
    if len(combinations) > MAX_COMBINATIONS:
        raise DataError(
            f"{source}: the columns of --condition have {len(combinations):,} combinations of levels: expected at most "
            f"{MAX_COMBINATIONS:,}; give fewer columns"
        )
    shares = (counts / counts.sum()).tolist()
    known = Conditions(columns=learnt, combinations=combinations.tolist(), shares=shares)
    return CodedConditions(known, joined, notes)


def code_conditions(known: Conditions, columns: Sequence[ConditionValues], rows: int) -> CodedConditions:
    """Return the conditions of `rows` rows for a model that knows the conditions `known`.

    Args:
        columns: the columns that the source of the rows has, among those of `known`.
    """
    by_name = {column.name: column for column in columns}
    codes, notes = np.full((rows, len(known.columns)), NO_LEVEL), []
    for index, column in enumerate(known.columns):
        found = by_name.get(column.name)
        if found is None:
            notes.append(missing_column(column.name))
            continue
        places = {level: place for place, level in enumerate(column.levels)}
        place = np.array([*(places.get(level, NO_LEVEL) for level in found.levels), NO_LEVEL])
        codes[:, index] = place[found.codes]
        if unknown := [level for level in found.levels if level not in places]:
            listed = join_names([repr(level) for level in unknown], LISTED_LEVELS)
            notes.append(
                f"levels of {column.name!r} that the model does not know: {listed}; it judges their rows without this "
                "condition"
            )
    return CodedConditions(known, codes, notes)


def code_cells(levels: Sequence[str], cells: Sequence[Any]) -> tuple[Codes, list[int]]:
    """Return the code of each cell [n] of a column with these `levels`, and the positions of cells of other levels.

    Empty cells and cells of other levels have the code NO_LEVEL.
    """
    places = {level: place for place, level in enumerate(levels)}
    codes, unknown = np.full(len(cells), NO_LEVEL), []
    for position, cell in enumerate(cells):
        level = "" if cell is None else normalise(str(cell).lower() if isinstance(cell, bool) else str(cell))
        if level.lower() in MISSING:
            continue
        codes[position] = places.get(level, NO_LEVEL)
        if level not in places:
            unknown.append(position)
    return codes, unknown


def missing_column(name: str) -> str:
    """Return the note that the data lack a column of conditions."""
    return f"the data have no column {name!r}: the model judges the rows without this condition"


class RowsWithConditions(RowStore):
    """N rows of D features in raw units, each followed by its condition, one-hot: [N, D + C].

    Args:
        rows: the rows.
        conditions: their conditions.
    """

    def __init__(self, rows: RowStore, conditions: CodedConditions) -> None:
        super().__init__(rows._values)
        self._rows, self._conditions = rows, conditions

    @property
    def width(self) -> int:
        """The number of values of a row, D + C."""
        return self._rows.width + self._conditions.known.width

    @property
    def block_rows(self) -> int:
        """The number of rows in a block."""
        return self._rows.block_rows

    def take(self, indices: Codes) -> Floats:
        """Return the rows [n, D + C] at `indices` [n], in that order."""
        return np.concatenate((self._rows.take(indices), self._conditions.one_hot(indices)), axis=1)

    def read_range(self, start: int, stop: int) -> Floats:
        """Return the rows from `start` up to, not including, `stop`."""
        condition = self._conditions.one_hot(slice(start, stop))
        return np.concatenate((self._rows.read_range(start, stop), condition), axis=1)
