"""What an artifact knows about its latent space: the latents of held-out rows, and the mean latents of labels."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from models.artifact import DIRECTIONS, HELD_OUT
from service.codec.long_work import pause_if_due

Array = npt.NDArray[np.float32]
PART_VALUES = 1 << 18  # differences between latents that are in memory at once: 1 MB
MIN_LABEL_ROWS = 10  # the mean latents of fewer rows are mostly noise
MAX_QUERIES = 500  # held-out rows from which the usual distance is estimated


class BadExhibitError(ValueError):
    """An exhibit of the artifact is damaged."""


@dataclass(frozen=True, eq=False)
class HeldOutRows:
    """The held-out rows in an artifact.

    Args:
        latents: the latents of the first M held-out rows, [M, K].
        inputs: the values of the first R of these rows in raw units, [R, D]; NaN for missing values.
        labels: the label of each row, [M]; None if the training data had no labels.
    """

    latents: Array
    inputs: Array
    labels: list[str] | None

    def nearest(self, z: Array, count: int) -> tuple[npt.NDArray[np.int64], Array]:
        """Return the indices [B, n] and the Euclidean distances [B, n] of the rows whose latents are nearest to z.

        The nearest row comes first. Of rows at the same distance, the first held-out row comes first.

        Args:
            z: latents [B, K].
            count: how many rows to return for each; if there are fewer than this, all are returned.
        """
        count = min(count, len(self.latents))
        indices = np.empty((len(z), count), np.int64)
        distances = np.empty((len(z), count), np.float32)
        part = max(1, PART_VALUES // self.latents.size)
        for start in range(0, len(z), part):
            pause_if_due()
            rows = slice(start, start + part)
            squares = np.square(z[rows, None] - self.latents).sum(axis=2)  # [part, M]
            found = np.argsort(squares, axis=1, kind="stable")[:, :count]
            indices[rows] = found
            distances[rows] = np.sqrt(np.take_along_axis(squares, found, axis=1))
        return indices, distances

    @cached_property
    def usual_distance(self) -> float | None:
        """The median distance from a held-out row to the nearest other one; None if there is only one row."""
        if len(self.latents) < 2:
            return None
        _, distances = self.nearest(self.latents[:MAX_QUERIES], 2)
        return float(np.median(distances[:, 1]))


@dataclass(frozen=True)
class LabelMean:
    """The mean latents of the rows with one label.

    Args:
        name: the name of the label.
        rows: how many rows have the label.
        mean: the mean of their latents, [K].
        others: the mean of the latents of the rows with another label in the same data, [K].
    """

    name: str
    rows: int
    mean: Array
    others: Array


def read_held_out(exhibits: Mapping[str, bytes], latents: int) -> HeldOutRows | None:
    """Return the held-out rows in the exhibits of an artifact; None if it has none.

    Args:
        exhibits: the exhibits, by name.
        latents: K, the number of latents of the model.

    Raises:
        BadExhibitError: the exhibit is damaged.
    """
    if HELD_OUT not in exhibits:
        return None
    try:
        found = orjson.loads(exhibits[HELD_OUT])
        codes = _matrix(found["latents"], latents)
        inputs = np.array(found["inputs"], np.float32)
        labels = None if found["labels"] is None else _label_names(found["labels"], found["label_names"])
        if labels is not None and len(labels) != len(codes):
            raise ValueError(f"expected {len(codes)} labels, got {len(labels)}")
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise BadExhibitError(f"{HELD_OUT} is damaged ({error})") from error
    return HeldOutRows(codes, inputs, labels)


def read_label_means(exhibits: Mapping[str, bytes], latents: int, held_out: HeldOutRows | None) -> dict[str, LabelMean]:
    """Return the mean latents of labels by name.

    If `elbo directions` was given a label, these are its means. The means of other labels come from the held-out rows.

    Raises:
        BadExhibitError: the exhibit is damaged.
    """
    found: dict[str, LabelMean] = {}
    try:
        for entry in orjson.loads(exhibits.get(DIRECTIONS, b"[]")):
            mean, others = _matrix([entry["mean"], entry["others"]], latents)
            name = str(entry["label"])
            found[name] = LabelMean(name, int(entry["rows"]), mean, others)
    except (ValueError, TypeError, KeyError) as error:
        raise BadExhibitError(f"{DIRECTIONS} is damaged ({error})") from error
    if held_out is not None and held_out.labels is not None:
        labels = np.array(held_out.labels)
        for name in sorted(set(held_out.labels), key=_in_counting_order):
            has_label = labels == name
            rows = int(has_label.sum())
            if name not in found and MIN_LABEL_ROWS <= rows < len(labels):
                mean, others = (held_out.latents[some].mean(axis=0) for some in (has_label, ~has_label))
                found[name] = LabelMean(name, rows, mean, others)
    return found


def _in_counting_order(label: str) -> tuple[int, str]:
    """Return a key that sorts 10 after 9, and words after numbers, by the alphabet."""
    return (len(label), label) if label.isdecimal() else (sys.maxsize, label)


def _matrix(numbers: Any, width: int) -> Array:
    """Return lists of numbers as an array [rows, width]. Raise ValueError if it is empty, misshapen or not finite."""
    array = np.array(numbers, np.float32)
    if array.ndim != 2 or array.shape[1] != width or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"expected rows of {width} finite numbers")
    return array


def _label_names(labels: list[int], names: list[str] | None) -> list[str]:
    return [str(label) if names is None else names[label] for label in labels]
