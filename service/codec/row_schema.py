"""The schema of a row: its shape, the names of its values, and which of them may be missing."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from models.categories import CategoryColumns
from service.codec.feature_names import FeatureTitles
from service.errors import InvalidRows

if TYPE_CHECKING:
    from service.codec.conditions import ConditionSchema

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class RowError:
    """The reason why row number `row` of the request could not be parsed."""

    row: int
    error: InvalidRows


class ParsedRows(NamedTuple):
    """The G rows of a request that could be parsed, and an error for each row that could not be parsed.

    `missing` [G, D] marks the missing values, which are NaN in `x`; it is None if no value is missing.
    """

    x: Array  # [G, D]
    rows: list[int]  # [G]: the index of each row in the request
    errors: list[RowError]
    missing: npt.NDArray[np.bool_] | None


class RowSchema:
    """The schema of a row of D numbers, which clients send as a flat list or as nested lists of shape `shape`.

    Args:
        shape: the shape of one row, such as [28, 28]. D is the product of these numbers.
        names: the D feature names; empty for latents.
        optional: for each of the D values, whether it may be missing. By default, no value may be missing.
        medians: the medians of the D features in the training rows, which `impute` uses.
        units: the units of the D features; None where unknown. By default, all are unknown.
        conditions: the conditions that the model knows of a row; None if it knows none.
        columns: the columns of the table that the model was trained on, if some are categories; otherwise None.
        booleans: for each of the D values, whether it may be true or false, which mean 1 and 0; empty if none may.
    """

    def __init__(
        self,
        shape: Sequence[int],
        names: Sequence[str] = (),
        optional: Sequence[bool] = (),
        medians: Sequence[float] = (),
        units: Sequence[str | None] = (),
        conditions: "ConditionSchema | None" = None,
        columns: CategoryColumns | None = None,
        booleans: Sequence[bool] = (),
    ) -> None:
        self.shape = tuple(shape)
        self.conditions = conditions
        self.columns = columns
        self.booleans = tuple(booleans) if any(booleans) else ()
        self.width = math.prod(self.shape)
        self.names = tuple(names)
        self.name_set = frozenset(names)
        self.optional = tuple(optional) or (False,) * self.width
        self.required_names = [name for name, is_optional in zip(names, self.optional, strict=False) if not is_optional]
        # The keys of a complete record: for a model with categories, the names of its columns.
        self.record_names = self.names if columns is None else tuple(columns.names)
        self.record_name_set = frozenset(self.record_names)
        self.optional_categories: frozenset[str] = frozenset()
        self.required_record_names = self.required_names
        if columns is not None:
            required = {columns.column_of[name] for name in self.required_names}
            self.required_record_names = [name for name in self.record_names if name in required]
            self.optional_categories = frozenset(columns.categories) - required
        self.allows_missing = any(self.optional)
        self.packer = struct.Struct(f"={self.width}f")
        self.description = f"a list of {self.width} numbers"
        if len(self.shape) > 1:
            self.description += f", or lists nested {'x'.join(map(str, self.shape))}"
        self._medians = np.array(medians, np.float32)
        self._units = tuple(units) or (None,) * len(self.names)

    @cached_property
    def titles(self) -> FeatureTitles:
        """Finds the feature that a key of a record or the title of a column means."""
        return FeatureTitles(self.names, self._units)

    @cached_property
    def all_optional(self) -> "RowSchema":
        """The same schema with every value optional."""
        return RowSchema(self.shape, self.names, (True,) * self.width, columns=self.columns, booleans=self.booleans)

    def shape_of(self, row: Any) -> tuple[int, ...]:
        """Return the shape that `row` should have: `shape` if `row` is nested, otherwise [D]."""
        nested = len(self.shape) > 1 and type(row) is list and bool(row) and type(row[0]) is list
        return self.shape if nested else (self.width,)

    def flatten(self, row: Any) -> list[Any] | None:
        """Return the D values, of any type, of a flat or nested row. Return None if the shape is wrong."""
        return flatten(row, self.shape_of(row))

    def impute(self, parsed: ParsedRows) -> Array:
        """Return the rows [G, D], with training medians in place of missing values that the model cannot impute.

        A model can impute only features that had missing values in training.
        """
        if parsed.missing is None:
            return parsed.x
        return np.where(parsed.missing & ~np.array(self.optional), self._medians, parsed.x)


def flatten(row: Any, shape: tuple[int, ...]) -> list[Any] | None:
    """Return the values of `row`, which should be nested lists of shape `shape`, or None if the shape is wrong."""
    level = [row]
    for size in shape:
        if not all(type(part) is list and len(part) == size for part in level):
            return None
        level = list(chain.from_iterable(level))
    return level
