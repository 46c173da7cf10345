"""The columns of a table with categories: levels to features, and features to levels. This module imports no torch.

In shapes: B rows, D features. A row of the table has n numbers and J categories. Its features are the n numbers, and
then for each category one feature per level, which is 1 at the level of the row and 0 elsewhere.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from models.columns import read_level

Array = npt.NDArray[np.float32]
MAX_SHOWN = 100  # characters of an unknown level in a result; no known level is longer


class UnseenLevel(NamedTuple):
    """A level of a row that the model does not know."""

    feature: str
    got: str
    known: list[str]


class CategoryColumns:
    """The columns of the table that a model was trained on.

    Args:
        numbers: the names of the n columns of numbers.
        categories: for each category, its name, its levels, and the rare levels that count as the last level.
        whole: for each number, whether all training rows had whole numbers.
    """

    def __init__(
        self,
        numbers: Sequence[str],
        categories: Iterable[tuple[str, Sequence[str], Sequence[str]]],
        whole: Sequence[bool] = (),
    ) -> None:
        self.numbers, self.categories, self.levels = list(numbers), [], []
        self._places: dict[str, dict[str, int]] = {}
        self.slices: list[slice] = []
        self.known: dict[str, list[str]] = {}  # the levels by the name of the category, the rare ones too
        place = len(self.numbers)
        for name, levels, rare in categories:
            self.categories.append(name)
            self.levels.append(list(levels))
            self.slices.append(slice(place, place + len(levels)))
            self._places[name] = {level: index for index, level in enumerate(levels)}
            self._places[name] |= dict.fromkeys(rare, len(levels) - 1)
            self.known[name] = [*(levels[:-1] if rare else levels), *rare]
            place += len(levels)
        self.width = place
        self.names = self.numbers + self.categories
        self.features = self.numbers + [
            f"{name}={level}" for name, levels in zip(self.categories, self.levels, strict=True) for level in levels
        ]
        self._features = [self.features[each] for each in self.slices]
        self._whole = np.array(whole or [False] * len(self.numbers), bool)
        # For each feature, the name of its column.
        self.column_of = dict(zip(self.numbers, self.numbers, strict=True)) | {
            feature: name for name, of_name in zip(self.categories, self._features, strict=True) for feature in of_name
        }

    def features_of(self, category: str) -> list[str]:
        """Return the names of the features of a category."""
        return self._features[self.categories.index(category)]

    def code(self, category: str, value: Any) -> tuple[list[float] | None, UnseenLevel | None]:
        """Return the features of a level, and what is known about it if the model does not know it.

        The features are None if the value is missing, and all 0 if the model does not know the level.
        """
        level = read_level(value)
        if level is None:
            return None, None
        features = [0.0] * len(self.features_of(category))
        place = self._places[category].get(level)
        if place is None:
            return features, UnseenLevel(category, level[:MAX_SHOWN], self.known[category])
        features[place] = 1.0
        return features, None

    def level_of(self, category: int, features: Array) -> str | None:
        """Return the most probable level of category number `category` for the features of a row, [D].

        Return None if the level is missing or unknown.
        """
        levels = features[self.slices[category]]
        return self.levels[category][int(levels.argmax())] if levels.sum() > 0.0 else None

    def contributions(self, contribution: Array) -> Array:
        """Return the contribution of each column, [B, n + J], given those of the features, [B, D].

        That of a category is the mean over its levels. Over normal rows, its mean is then 1, as that of a number.
        """
        of_categories = [contribution[:, each].mean(axis=1, keepdims=True) for each in self.slices]
        return np.concatenate((contribution[:, : len(self.numbers)], *of_categories), axis=1)

    def missing(self, missing: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return which columns are missing, [B, n + J], given which features are, [B, D]."""
        of_categories = [missing[:, each].any(axis=1, keepdims=True) for each in self.slices]
        return np.concatenate((missing[:, : len(self.numbers)], *of_categories), axis=1)

    def records(self, rows: Array) -> list[dict[str, Any]]:
        """Return rows [B, D] as objects by column: numbers, whole ones rounded, and the most probable levels."""
        count = len(self.numbers)
        numbers = np.where(self._whole, np.rint(rows[:, :count]), rows[:, :count])
        columns = [numbers[:, index].tolist() for index in range(count)]
        for index, whole in enumerate(self._whole.tolist()):
            if whole:
                columns[index] = [int(value) for value in columns[index]]
        for levels, place in zip(self.levels, self.slices, strict=True):
            columns.append([levels[best] for best in rows[:, place].argmax(axis=1).tolist()])
        return [dict(zip(self.names, values, strict=True)) for values in zip(*columns, strict=True)]

    def probabilities(self, rows: Array, missing: npt.NDArray[np.bool_]) -> list[dict[str, dict[str, float]]]:
        """Return the probability of each level of the categories that are missing, for rows [B, D].

        Args:
            rows: completed rows, whose features of a missing level are estimates of these probabilities.
            missing: which features were missing, [B, D].
        """
        result: list[dict[str, dict[str, float]]] = [{} for _ in rows]
        for name, levels, place in zip(self.categories, self.levels, self.slices, strict=True):
            for row in np.flatnonzero(missing[:, place].any(axis=1)).tolist():
                estimates = np.clip(rows[row, place].astype(np.float64), 1e-6, None)
                shares = (estimates / estimates.sum()).tolist()
                result[row][name] = {level: round(share, 6) for level, share in zip(levels, shares, strict=True)}
        return result
