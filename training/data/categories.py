"""Columns of text: categories of few levels, which a model learns as one feature per level."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from models.columns import read_level
from models.errors import join_names
from models.manifest import (
    MAX_CATEGORY_LEVELS,
    MAX_LEVEL_NAME,
    MAX_RARE_LEVELS,
    OTHER_LEVEL,
    Category,
    is_level_name,
)
from training.data.row_store import Floats, RowStore

if TYPE_CHECKING:
    import polars as pl

NO_LEVEL = -1  # the code of an empty cell
UNKNOWN_LEVEL = -2  # the code of a level that the model does not know
MIN_LEVEL_ROWS = 10  # a level with fewer rows counts as OTHER_LEVEL
MIN_ROWS = 40  # with fewer rows, no column is a category
MAX_OTHER_SHARE = 0.1  # if more rows than this have rare levels, the column holds identifiers or free text
LISTED_LEVELS = 5  # number of levels that a message lists
Codes = npt.NDArray[np.int16]


@dataclass
class LevelReader:
    """Reads the levels of a column in training data, in case that the column is a category.

    Args:
        is_forced: whether the user says that the column is a category, although its cells may be numbers.

    Attributes:
        levels: the number of rows of each level, in the order of appearance.
        is_number: whether every cell so far was a number. Such a column is given up early, because it costs time.
        gave_up: whether the column has too many different values for a category.
    """

    is_forced: bool = False
    levels: dict[str, int] = field(default_factory=dict)
    is_number: bool = True
    gave_up: bool = False
    _codes: dict[str, int] = field(default_factory=dict)  # by level
    _blocks: list[Codes] = field(default_factory=list)

    def read(self, cells: "pl.Series", has_text: bool) -> Codes | None:
        """Read the next cells. Return their codes in the order of appearance, or None if this is no category.

        Args:
            has_text: whether one of the cells, or one before, is no number.
        """
        import polars as pl

        self.is_number = self.is_number and not has_text and not self.is_forced
        if self.gave_up:
            return None
        text = cells.cast(pl.String)
        counts = text.drop_nulls().value_counts(name="rows")
        distinct, rows = counts.to_series(0).to_list(), counts.to_series(1).to_list()
        codes = []
        for value, count in zip(distinct, rows, strict=True):
            level = read_level(value)
            code = NO_LEVEL if level is None else self._codes.setdefault(level, len(self._codes))
            codes.append(code)
            if level is not None:
                self.levels[level] = self.levels.get(level, 0) + count
            if len(self._codes) > (MAX_CATEGORY_LEVELS if self.is_number else MAX_CATEGORY_LEVELS + MAX_RARE_LEVELS):
                self.gave_up, self._blocks = True, []
                return None
        found = (
            text.replace_strict(distinct, codes, default=NO_LEVEL, return_dtype=pl.Int16).fill_null(NO_LEVEL).to_numpy()
            if distinct
            else np.full(len(text), NO_LEVEL, np.int16)
        )
        self._blocks.append(found)
        return found

    @property
    def frequent(self) -> list[str]:
        """The levels that have enough rows to be learnt, the most frequent first."""
        found = [level for level, rows in self.levels.items() if rows >= MIN_LEVEL_ROWS]
        return sorted(found, key=lambda level: (-self.levels[level], level))

    def refusal(self) -> str | None:
        """Return why the column is no category, or None if it is one."""
        if not self.gave_up and sum(self.levels.values()) < MIN_ROWS:
            return "text"  # too few rows to say more
        if self.gave_up:
            return f"text of more than {MAX_CATEGORY_LEVELS + MAX_RARE_LEVELS:,} different values"
        frequent, total = self.frequent, sum(self.levels.values())
        bad = next((level for level in self.levels if not is_level_name(level) or level == OTHER_LEVEL), None)
        if bad is not None:
            return f"text that cannot name a level, {bad[:MAX_LEVEL_NAME]!r}"
        rare_rows = total - sum(self.levels[level] for level in frequent)
        if rare_rows > MAX_OTHER_SHARE * total:
            return (
                f"text of {len(self.levels):,} different values, of which {len(self.levels) - len(frequent):,} occur "
                f"in fewer than {MIN_LEVEL_ROWS} rows"
            )
        if len(frequent) > MAX_CATEGORY_LEVELS:
            return f"text of {len(frequent):,} levels, and a model takes at most {MAX_CATEGORY_LEVELS}"
        return None

    def finish(self, name: str, rows: npt.NDArray[np.int64]) -> "CategoryValues":
        """Return the column for the rows of the file with these numbers."""
        frequent = sorted(self.frequent)
        rare = sorted(self.levels.keys() - set(frequent))
        levels = [*frequent, *([OTHER_LEVEL] if rare else [])]
        total = sum(self.levels.values())
        # Good 1953: the share of rows of unseen levels is estimated by the share of levels that were seen once.
        once = sum(1 for count in self.levels.values() if count == 1)
        category = Category(name=name, levels=levels, first=0, rare=rare, new_share=once / total if total else 0.0)
        places = {level: place for place, level in enumerate(frequent)} | dict.fromkeys(rare, len(frequent))
        place = np.array([*(places[level] for level in self._codes), NO_LEVEL], np.int16)  # NO_LEVEL is the last index
        codes = np.concatenate(self._blocks)[rows] if self._blocks else np.empty(0, np.int16)
        return CategoryValues(category, place[codes])


@dataclass(frozen=True)
class CategoryValues:
    """A category of N rows.

    Args:
        category: the levels. `first` is not set yet.
        codes: for each row, the index of its level, [N]; NO_LEVEL for an empty cell.
    """

    category: Category
    codes: Codes

    def describe(self) -> str:
        """Return a note for the user: the most frequent levels, and how many rows have a level that is not learnt."""
        counts = np.bincount(self.codes[self.codes >= 0], minlength=len(self.category.levels))
        order = np.argsort(-counts, kind="stable")
        total = max(1, int(counts.sum()))
        listed = [f"{self.category.levels[place]} {100 * counts[place] / total:.3g} %" for place in order.tolist()]
        note = f"column {self.category.name!r} is a category of {len(listed)} levels: "
        note += join_names(listed, LISTED_LEVELS)
        if self.category.rare:
            rare = join_names([repr(level) for level in self.category.rare], LISTED_LEVELS)
            note += f"; levels of fewer than {MIN_LEVEL_ROWS} rows count as {OTHER_LEVEL}: {rare}"
        return note


class KnownLevels:
    """Finds the code of a cell of a category that a model knows.

    Args:
        category: the category.
    """

    def __init__(self, category: Category) -> None:
        self.category = category
        self._places = {level: place for place, level in enumerate(category.levels)}
        self._places |= dict.fromkeys(category.rare, len(category.levels) - 1)

    def code(self, value: object) -> int:
        """Return the index of the level of a cell, NO_LEVEL for an empty cell, or UNKNOWN_LEVEL."""
        level = read_level(value)
        return NO_LEVEL if level is None else self._places.get(level, UNKNOWN_LEVEL)

    def codes(self, cells: "pl.Series") -> Codes:
        """Return the codes of the cells, [n]."""
        import polars as pl

        text = cells.cast(pl.String)
        distinct = text.drop_nulls().unique().to_list()
        if not distinct:
            return np.full(len(text), NO_LEVEL, np.int16)
        codes = [self.code(value) for value in distinct]
        found = text.replace_strict(distinct, codes, default=NO_LEVEL, return_dtype=pl.Int16).fill_null(NO_LEVEL)
        return np.asarray(found.to_numpy())


def one_hot(codes: Codes, levels: int) -> Floats:
    """Return the features [n, levels] of rows whose codes are `codes` [n].

    They are 1 at the level of the row, and 0 elsewhere. They are NaN if the row has no level, and 0 if its level is
    unknown.
    """
    features = np.zeros((len(codes), levels), np.float32)
    known = np.flatnonzero(codes >= 0)
    features[known, codes[known]] = 1.0
    features[codes == NO_LEVEL] = np.nan
    return features


def place_categories(values: Sequence[CategoryValues], numbers: int) -> list[CategoryValues]:
    """Return `values` with the places of their features, which follow those of `numbers` columns of numbers."""
    placed = []
    for each in values:
        placed.append(CategoryValues(each.category.model_copy(update={"first": numbers}), each.codes))
        numbers += len(each.category.levels)
    return placed


class RowsWithLevels(RowStore):
    """N rows of which some columns are categories: the numbers of a row, and then a feature per level, [N, D].

    Args:
        rows: all columns of the source, of which those of categories are not used.
        numbers: the columns that hold numbers.
        categories: the categories, in their order.
    """

    def __init__(self, rows: RowStore, numbers: npt.NDArray[np.int64], categories: Sequence[CategoryValues]) -> None:
        super().__init__(rows._values)
        self._rows, self._numbers, self._categories = rows, numbers, categories

    @property
    def width(self) -> int:
        """The number of features, D."""
        return len(self._numbers) + sum(len(each.category.levels) for each in self._categories)

    def take(self, indices: npt.NDArray[np.int64]) -> Floats:
        """Return the rows [n, D] at `indices` [n], in that order."""
        return self._join(self._rows.take(indices), indices)

    def read_range(self, start: int, stop: int) -> Floats:
        """Return the rows from `start` up to, not including, `stop`."""
        return self._join(self._rows.read_range(start, stop), slice(start, stop))

    def _join(self, rows: Floats, selected: npt.NDArray[np.int64] | slice) -> Floats:
        levels = [one_hot(each.codes[selected], len(each.category.levels)) for each in self._categories]
        return np.concatenate((rows[:, self._numbers], *levels), axis=1)
