"""The conditions of rows in requests: what a level is, and the one-hot numbers that a conditional model takes.

A condition is an object such as `{"label": "7"}`, with the level of each column of conditions. A column may be absent.
The code of a condition has a number for each column: the index of the level among the levels of the column, or NO_LEVEL
if the column is absent.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from models.errors import join_names
from service.codec.budget import NO_LIMIT, Budget
from service.codec.json_rows import JsonRows
from service.codec.json_values import describe_value
from service.errors import InvalidField, InvalidRows, escape

NO_LEVEL = -1
LISTED_LEVELS = 20  # number of levels that an error lists
MAX_QUOTED = 100  # characters of an unknown level that an error quotes
CHECKED_ROWS = 1024  # the time is checked after this many conditions
Array = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int64]  # [B, J] for B rows and J columns of conditions
Code = tuple[int, ...]  # [J]


class ConditionSchema:
    """The conditions that a model knows.

    Args:
        levels: the levels of each column, by the name of the column.
        combinations: the codes of the conditions in the training data.
        shares: how often each combination occurs in the training data; the sum is 1.
    """

    def __init__(
        self, levels: Mapping[str, Sequence[str]], combinations: Sequence[Sequence[int]], shares: Sequence[float]
    ) -> None:
        self.levels = {name: list(of_column) for name, of_column in levels.items()}
        self.names = tuple(levels)
        self.width = sum(map(len, levels.values()))
        self.unknown: Code = (NO_LEVEL,) * len(self.names)  # the code of a row without a level
        self._places = {
            name: {level: place for place, level in enumerate(of_column)} for name, of_column in levels.items()
        }
        sizes = [len(of_column) for of_column in levels.values()]
        self._first = np.cumsum([0, *sizes[:-1]])  # [J], the place of the first level of each column
        self._combinations = np.array(combinations, np.int64)
        self._shares = np.array(shares)

    def read(self, condition: Any, pointer: str = "/condition") -> Code:
        """Return the code of a condition in a request; for None, it is `unknown`.

        Raises:
            InvalidField: `condition` is not an object, or the model does not know a column or a level.
        """
        if condition is None:
            return self.unknown
        if type(condition) is not dict:
            raise self._not_a_condition(condition, pointer)
        for name in condition:
            if name not in self._places:
                raise InvalidField(
                    f"the model knows no condition {name[:MAX_QUOTED]!r}",
                    pointer=f"{pointer}/{escape(name)}",
                    expected=join_names([repr(name) for name in self.names]),
                    got=name[:MAX_QUOTED],
                )
        codes = []
        for name in self.names:
            value = condition.get(name)
            code = NO_LEVEL if value is None else self._place(name, value)
            if code is None:
                raise self._unknown_level(InvalidField, name, value, pointer)
            codes.append(code)
        return tuple(codes)

    def read_all(self, condition: Any, rows: int, budget: Budget = NO_LIMIT) -> Codes:
        """Return the codes [rows, J] of the conditions in a request: one for all rows, or a list with one per row.

        Raises:
            InvalidField: as for `read`; or the list does not have `rows` entries.
        """
        if not isinstance(condition, list | JsonRows):
            return np.array([self.read(condition)], np.int64).repeat(rows, axis=0)
        if len(condition) != rows:
            raise InvalidField(
                f"condition has {len(condition)} entries for {rows} rows",
                pointer="/condition",
                expected=f"an object, or a list of {rows} objects",
                got=f"a list of {len(condition)}",
            )
        codes = []
        for row, each in enumerate(condition):
            if row % CHECKED_ROWS == 0:
                budget.check_time()
            codes.append(self.read(each, f"/condition/{row}"))
        return np.array(codes, np.int64).reshape(rows, len(self.names))

    def read_record(self, record: dict[str, Any], default: Code) -> Code:
        """Return the code of the condition in `record`, an object by column name. Absent levels are those of `default`.

        Raises:
            InvalidRows: a level is not known.
        """
        codes = []
        for name, code in zip(self.names, default, strict=True):
            value = record.get(name)
            place = code if value is None or value == "" else self._place(name, value)
            if place is None:
                raise self._unknown_level(InvalidRows, name, value, "")
            codes.append(place)
        return tuple(codes)

    def draw_missing(self, codes: Codes, choice: Array) -> Codes:
        """Return `codes` [B, J] with levels in place of NO_LEVEL, drawn by their shares in the training data.

        A row keeps its given levels, and gets the others from a combination that has the given levels. If the training
        data have no such combination, NO_LEVEL stays.

        Args:
            choice: uniform numbers in [0, 1), [B].
        """
        drawn = codes.copy()
        for given in np.unique(codes, axis=0):
            if (given != NO_LEVEL).all():
                continue
            fits = ((self._combinations == given) | (given == NO_LEVEL)).all(axis=1)
            if not fits.any():
                continue
            rows = (codes == given).all(axis=1)
            limits = np.cumsum(self._shares[fits])
            places = np.searchsorted(limits[:-1], choice[rows].astype(np.float64) * limits[-1], side="right")
            drawn[rows] = self._combinations[fits][places]
        return drawn

    def one_hot(self, codes: Codes) -> Array:
        """Return one-hot conditions [B, C] for `codes` [B, J]. A column without a level has only zeros."""
        numbers = np.zeros((len(codes), self.width), np.float32)
        rows, columns = np.nonzero(codes != NO_LEVEL)
        numbers[rows, self._first[columns] + codes[rows, columns]] = 1.0
        return numbers

    def codes_of(self, numbers: Array) -> Codes:
        """Return the codes [B, J] of one-hot conditions [B, C]: the inverse of `one_hot`."""
        codes = np.full((len(numbers), len(self.names)), NO_LEVEL)
        rows, places = np.nonzero(numbers)
        columns = np.searchsorted(self._first, places, side="right") - 1
        codes[rows, columns] = places - self._first[columns]
        return codes

    def join(self, rows: Array, codes: Codes | None = None) -> Array:
        """Return rows or latents [B, D] followed by their conditions, [B, D + C].

        If `codes` is None, no row has a level.
        """
        if codes is None:
            return np.concatenate((rows, np.zeros((len(rows), self.width), np.float32)), axis=1)
        return np.concatenate((rows, self.one_hot(codes)), axis=1)

    def describe(self, codes: Codes) -> list[dict[str, str]]:
        """Return the conditions with these codes [B, J] as objects, such as `{"label": "7"}`."""
        distinct, index = np.unique(codes, axis=0, return_inverse=True)
        objects = [
            {name: self.levels[name][place] for name, place in zip(self.names, code, strict=True) if place != NO_LEVEL}
            for code in distinct.tolist()
        ]
        return [objects[number] for number in index.reshape(-1).tolist()]

    def _place(self, name: str, value: Any) -> int | None:
        """Return the index of the level `value` of the column `name`; None if there is no such level."""
        places = self._places[name]
        if type(value) is str:
            return places[value] if value in places else places.get(_normalise(value))
        if type(value) is bool:
            return places.get(str(value).lower())
        if type(value) is float and value.is_integer() and abs(value) < 2**53:
            value = int(value)
        return places.get(str(value)) if type(value) in (int, float) else None

    def _unknown_level(
        self, kind: type[InvalidField | InvalidRows], name: str, value: Any, pointer: str
    ) -> InvalidField | InvalidRows:
        """Return an error that says which levels the column `name` of the object at `pointer` has."""
        expected, got = self._describe_levels(name), describe_value(value)
        return kind(
            f"{name!r} has no level {got}: expected {expected}",
            pointer=f"{pointer}/{escape(name)}",
            expected=expected,
            got=got,
        )

    def _describe_levels(self, name: str) -> str:
        return join_names([repr(level) for level in self.levels[name]], LISTED_LEVELS)

    def _not_a_condition(self, value: Any, pointer: str) -> InvalidField:
        expected, got = f"an object with {join_names([repr(name) for name in self.names])}", describe_value(value)
        return InvalidField(
            f"{pointer.removeprefix('/')} should be {expected}, got {got}", pointer=pointer, expected=expected, got=got
        )


def _normalise(text: str) -> str:
    """Return `text` as training writes levels: without spaces around it, and `1` for the whole number ` 1.0`."""
    text = text.strip()
    if len(text) > MAX_QUOTED:
        return text  # it is longer than any level
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else text


def no_conditions(model: str) -> InvalidField:
    """Return the error for a request that has a condition although the model knows none."""
    return InvalidField(
        f"{model} knows no condition of a row",
        pointer="/condition",
        expected="no such field",
        got="condition",
        hint="leave the field out, or train a model with elbo train --condition",
    )
