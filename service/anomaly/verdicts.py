"""Scores to verdicts: which rows are anomalous, how severely, and because of which features."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from service.anomaly.inputs import InputRows
from service.anomaly.smoothing import exponential_mean
from service.codec.float32 import is_finite
from service.codec.rows import ParsedRows
from service.schemas import AnomalyBody

Array = npt.NDArray[np.float32]
T = TypeVar("T")
OVERFLOW = "the row lies so far from the training data that the model's answer to it overflows float32"
SORTED_WHOLE = 64  # features: of more, the largest are parted from the others before they are sorted
_LARGEST = np.finfo(np.float32).max


@dataclass(eq=False)
class Scores:
    """What `operations.anomaly` gives for the readable rows: G rows, D features, P parts.

    `ordinary` says whether all of it is finite, as it nearly always is.
    """

    score: Array  # [G]
    p_value: Array  # [G]
    severity: Array  # [G]
    parts: Array  # [G, P]
    contribution: Array  # [G, D]
    expected: Array  # [G, D]
    ordinary: bool = field(init=False)

    def __post_init__(self) -> None:
        arrays = (self.score, self.severity, self.parts, self.contribution, self.expected)
        self.ordinary = all(map(is_finite, arrays))

    @cached_property
    def judged(self) -> npt.NDArray[np.bool_]:
        """[G]: rows about which the model can say something. Not one of them is NaN, and what is infinite saturates."""
        if self.ordinary:
            return np.ones(len(self.score), bool)
        numbers = np.column_stack((self.score, self.severity, self.parts, self.contribution))
        return np.asarray(~np.isnan(numbers).any(axis=1) & np.isfinite(self.expected).all(axis=1))

    @property
    def count(self) -> int:
        """How many rows are judged."""
        return len(self.score) if self.ordinary else int(self.judged.sum())

    @property
    def saturated(self) -> "Scores":
        """The same, in which what is infinite is the largest number there is."""
        if self.ordinary:
            return self
        finite = [np.clip(array, -_LARGEST, _LARGEST) for array in (self.score, self.severity, self.parts)]
        score, severity, parts = finite
        contribution = np.clip(self.contribution, -_LARGEST, _LARGEST)
        return Scores(score, self.p_value, severity, parts, contribution, self.expected)


def benjamini_hochberg(p_value: Array, q: float) -> npt.NDArray[np.bool_]:
    """Which of p-values [G] to reject so that at most a share q of them is false in the mean.

    Benjamini & Hochberg, "Controlling the false discovery rate", 1995, eq. 1; valid on conformal p-values (Bates et
    al., 2023, theorem 2).
    """
    ordered = np.sort(p_value.astype(np.float64))
    bounds = q * np.arange(1, len(ordered) + 1) / len(ordered)
    passing = np.flatnonzero(ordered <= bounds * (1 + 1e-6))  # p-values are fractions rounded to float32
    if not len(passing):
        return np.zeros(len(p_value), bool)
    return np.asarray(p_value <= ordered[passing[-1]])


class Verdicts(NamedTuple):
    """What is decided of the G rows that could be read."""

    input_rows: InputRows
    scores: Scores
    flags: list[bool]  # [G]: whether each is anomalous
    smoothed: npt.NDArray[np.float64] | None  # [G], where it was asked for


def decide(input_rows: InputRows, scores: Scores, body: AnomalyBody) -> Verdicts:
    """Which rows are anomalous: by severity, by `fdr` over the request, or by the severity's mean over a half-life."""
    smoothed = None
    half_life = body.half_life or body.half_life_rows
    if half_life:
        severity = np.where(scores.judged, scores.saturated.severity, np.nan)
        by_rows = body.half_life is None
        smoothed = exponential_mean(severity, half_life, input_rows.time, input_rows.group, by_rows=by_rows)
        anomalous = smoothed > 1  # a NaN is not
    elif body.fdr is not None:
        judged, anomalous = scores.judged, np.zeros(len(scores.score), bool)
        if judged.any():
            anomalous[judged] = benjamini_hochberg(scores.p_value[judged], body.fdr)
    else:
        anomalous = scores.severity > 1
        if not scores.ordinary:
            anomalous &= scores.judged
    return Verdicts(input_rows, scores, anomalous.tolist(), smoothed)


def results(
    verdicts: Verdicts, explain: int, names: Sequence[str], parts: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The answer's `results` and `errors`, each in the order of the request's rows, with numbers as float32.

    Args:
        verdicts: on the rows that could be read.
        explain: how many features to name a row.
        names, parts: the names of the D features and of the score's P parts.
    """
    reading, scores = verdicts.input_rows.reading, verdicts.scores
    told = scores.saturated
    columns = zip(
        reading.rows,
        told.score,
        told.p_value,
        told.severity,
        verdicts.flags,
        _rows_of(list(told.parts.ravel()), len(parts), len(reading.rows)),
        _features(reading.x, told, explain, names),
        strict=True,
    )
    found: list[dict[str, Any]] = [
        {
            "row": row,
            "score": score,
            "p_value": p_value,
            "severity": severity,
            "is_anomaly": is_anomaly,
            "parts": dict(zip(parts, values, strict=True)),
            "features": features,
        }
        for row, score, p_value, severity, is_anomaly, values, features in columns
    ]
    _tell_more(found, verdicts, names)
    if not scores.ordinary:
        found = [result for result, judgeable in zip(found, scores.judged.tolist(), strict=True) if judgeable]
    return found, _errors(reading, scores)


def table(verdicts: Verdicts) -> Array:
    """Score, p-value and severity as [N, 3], for application/x-npy; NaN in the rows that could not be judged."""
    reading, scores = verdicts.input_rows.reading, verdicts.scores
    full = np.full((verdicts.input_rows.sent, 3), np.nan, np.float32)
    judged = scores.judged
    told = scores.saturated
    columns = np.column_stack((told.score, told.p_value, told.severity))
    full[np.array(reading.rows)[judged]] = columns[judged]
    return full


def unread(reading: ParsedRows) -> list[dict[str, Any]]:
    """What is said of the rows that could not be read."""
    return [{"row": e.row, "detail": e.error.detail, "pointer": e.error.pointer} for e in reading.errors]


def _errors(reading: ParsedRows, scores: Scores) -> list[dict[str, Any]]:
    if scores.ordinary:
        return unread(reading)
    overflown = [
        {"row": reading.rows[index], "detail": OVERFLOW, "pointer": None} for index in np.flatnonzero(~scores.judged)
    ]
    return sorted(unread(reading) + overflown, key=lambda error: error["row"])


def _features(x: Array, scores: Scores, explain: int, names: Sequence[str]) -> Iterable[list[dict[str, Any]]]:
    """For each row its `explain` features of the largest contribution, largest first."""
    contribution = scores.contribution
    count, width = contribution.shape
    top = _largest(contribution, explain)
    places = (top if count == 1 else top + width * np.arange(count)[:, None]).ravel()
    told = zip(
        top.ravel().tolist(), x.take(places), scores.expected.take(places), contribution.take(places), strict=True
    )
    features = [
        {"name": names[index], "value": value, "expected": expected, "contribution": share}
        for index, value, expected, share in told
    ]
    return _rows_of(features, top.shape[1], count)


def _rows_of(values: list[T], width: int, count: int) -> list[list[T]]:
    """`count` lists of `width` of the values each."""
    return [values[start : start + width] for start in range(0, width * count, width)] if width else [[]] * count


def _largest(array: Array, count: int) -> npt.NDArray[np.intp]:
    """In each row of [G, D] the places of the `count` largest values, largest first; of equals the first."""
    if count < array.shape[1] and array.shape[1] > SORTED_WHOLE:
        places = np.sort(np.argpartition(-array, max(count - 1, 0), axis=1)[:, :count], axis=1)
        order = np.argsort(-np.take_along_axis(array, places, axis=1), axis=1, kind="stable")
        return np.take_along_axis(places, order, axis=1)
    return (-array).argsort(axis=1, kind="stable")[:, :count]


def _tell_more(found: list[dict[str, Any]], verdicts: Verdicts, names: Sequence[str]) -> None:
    """Add the fields that only some rows have: what was missing, their time and group, their smoothed severity."""
    input_rows, missing = verdicts.input_rows, verdicts.input_rows.reading.missing
    if missing is not None:
        for row, column in np.argwhere(missing).tolist():
            found[row].setdefault("imputed", []).append(names[column])
    for name, values in (("time", input_rows.time), ("group", input_rows.group), ("smoothed", verdicts.smoothed)):
        if values is not None:
            for fields, value in zip(found, values, strict=True):
                if value is not None and value == value:
                    fields[name] = value
