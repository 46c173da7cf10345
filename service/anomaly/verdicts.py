"""Decide verdicts from scores: which rows are anomalous, how severely, and which features contribute most."""

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from models.categories import CategoryColumns
from models.silences import Silences
from service.anomaly.inputs import InputRows
from service.anomaly.onsets import Onsets
from service.anomaly.smoothing import exponential_mean
from service.codec.float32 import is_finite
from service.codec.row_schema import ParsedRows
from service.schemas import AnomalyBody

Array = npt.NDArray[np.float32]
T = TypeVar("T")
OVERFLOW_DETAIL = "the row is so far from the training data that the model's output for it overflows float32"
PART_ROWS = 512  # results are made and written in parts of this many rows; orjson writes one part in 0.5 ms
MAX_SORTED_FEATURES = 64  # with more features than this, the largest contributions are selected before sorting
_MAX_FLOAT32 = np.finfo(np.float32).max


@dataclass(eq=False)
class Scores:
    """The output of `operations.anomaly` for the G valid rows, with D features and P parts of the score.

    `all_finite`: whether every number is finite. This is the case for almost every request.
    """

    score: Array  # [G]
    p_value: Array  # [G]
    severity: Array  # [G]
    parts: Array  # [G, P]
    contribution: Array  # [G, D]
    expected: Array  # [G, D]
    all_finite: bool = field(init=False)

    def __post_init__(self) -> None:
        arrays = (self.score, self.severity, self.parts, self.contribution, self.expected)
        self.all_finite = all(map(is_finite, arrays))

    @classmethod
    def of_finite(
        cls, score: Array, p_value: Array, severity: Array, parts: Array, contribution: Array, expected: Array
    ) -> "Scores":
        """Return the scores without checking them: every number is known to be finite."""
        found = cls.__new__(cls)
        found.score, found.p_value, found.severity, found.parts = score, p_value, severity, parts
        found.contribution, found.expected, found.all_finite = contribution, expected, True
        return found

    def part(self, part: slice) -> "Scores":
        """Return the scores of some of the rows."""
        return Scores(
            self.score[part],
            self.p_value[part],
            self.severity[part],
            self.parts[part],
            self.contribution[part],
            self.expected[part],
        )

    def judged(self, p_value: Array, severity: Array) -> "Scores":
        """Return the same scores with other p-values and severities."""
        found = copy.copy(self)
        found.p_value, found.severity = p_value, severity
        found.all_finite = self.all_finite and is_finite(severity)
        found.__dict__.pop("usable", None)
        return found

    @cached_property
    def usable(self) -> npt.NDArray[np.bool_]:
        """A mask [G] of the rows that can get a verdict: no number is NaN, and all expected values are finite.

        In fields other than `expected`, numbers may be infinite, because `clipped` replaces infinity.
        """
        if self.all_finite:
            return np.ones(len(self.score), bool)
        numbers = np.column_stack((self.score, self.severity, self.parts, self.contribution))
        return np.asarray(~np.isnan(numbers).any(axis=1) & np.isfinite(self.expected).all(axis=1))

    @property
    def usable_count(self) -> int:
        """The number of usable rows."""
        return len(self.score) if self.all_finite else int(self.usable.sum())

    @property
    def clipped(self) -> "Scores":
        """The same scores with the largest float32 in place of infinity."""
        if self.all_finite:
            return self
        return Scores(
            score=np.clip(self.score, -_MAX_FLOAT32, _MAX_FLOAT32),
            p_value=self.p_value,
            severity=np.clip(self.severity, -_MAX_FLOAT32, _MAX_FLOAT32),
            parts=np.clip(self.parts, -_MAX_FLOAT32, _MAX_FLOAT32),
            contribution=np.clip(self.contribution, -_MAX_FLOAT32, _MAX_FLOAT32),
            expected=self.expected,
        )


def benjamini_hochberg(p_value: Array, q: float) -> npt.NDArray[np.bool_]:
    """Return a mask [G] of the p-values to reject, such that the expected share of false rejections is at most q.

    The procedure is from Benjamini & Hochberg, "Controlling the false discovery rate", 1995, eq. 1. It is valid for
    conformal p-values (Bates et al., 2023, theorem 2).
    """
    ordered = np.sort(p_value.astype(np.float64))
    bounds = q * np.arange(1, len(ordered) + 1) / len(ordered)
    passing = np.flatnonzero(ordered <= bounds * (1 + 1e-6))  # tolerance, because p-values are rounded to float32
    if not len(passing):
        return np.zeros(len(p_value), bool)
    return np.asarray(p_value <= ordered[passing[-1]])


class Past(NamedTuple):
    """How the past of the groups took part in the verdicts on G rows.

    Args:
        window_rows: [G]: how many rows of its window each row has; None for a model without a window.
        full_window: N, the rows of a whole window.
        has_own_calibration: [G]: whether a row is judged by scores of its own group; None without online calibration.
        states: [G]: the state of the group after each row; None without online calibration.
        incidents: the groups whose incidents began, each as often as one began.
        changes: the groups whose incidents became changes.
        onsets: finds since when features deviate; None if this is unknown.
    """

    window_rows: list[int] | None
    full_window: int
    has_own_calibration: list[bool] | None = None
    states: Sequence[str] | None = None
    incidents: Sequence[str] = ()
    changes: Sequence[str] = ()
    onsets: Onsets | None = None

    def part(self, part: slice) -> "Past":
        """Return the past of some rows, without incidents and changes."""
        return Past(
            None if self.window_rows is None else self.window_rows[part],
            self.full_window,
            None if self.has_own_calibration is None else self.has_own_calibration[part],
            None if self.states is None else self.states[part],
            onsets=None if self.onsets is None else self.onsets._replace(first=self.onsets.first + (part.start or 0)),
        )


class Verdicts(NamedTuple):
    """The verdicts on the G valid rows of a request."""

    input_rows: InputRows
    scores: Scores
    is_anomaly: list[bool]  # [G]
    smoothed: npt.NDArray[np.float64] | None  # [G]: the smoothed severity, if requested
    past: Past | None = None  # None if the rows were judged without the past of their groups

    @property
    def explained_rows(self) -> int:
        """The number of rows for which onsets of features are searched. The search takes long."""
        return sum(self.is_anomaly) if self.past is not None and self.past.onsets is not None else 0

    def part(self, part: slice) -> "Verdicts":
        """Return the verdicts on some of the valid rows, without the errors of the invalid rows."""
        parsed, time, group = self.input_rows.parsed, self.input_rows.time, self.input_rows.group
        missing = None if parsed.missing is None else parsed.missing[part]
        input_rows = self.input_rows._replace(
            parsed=ParsedRows(parsed.x[part], parsed.rows[part], [], missing),
            time=None if time is None else time[part],
            group=None if group is None else group[part],
            silenced=None if self.input_rows.silenced is None else self.input_rows.silenced[part],
            unseen=None if self.input_rows.unseen is None else self.input_rows.unseen[part],
        )
        smoothed = None if self.smoothed is None else self.smoothed[part]
        past = None if self.past is None else self.past.part(part)
        return Verdicts(input_rows, self.scores.part(part), self.is_anomaly[part], smoothed, past)


def find_silenced_rows(silences: Silences, input_rows: InputRows) -> InputRows:
    """Return `input_rows` with the rows for which one of the silences holds. A row without a time is of now."""
    rows = len(input_rows.parsed.rows)
    return input_rows._replace(silenced=silences.hold(input_rows.time, input_rows.group, rows, time.time()))


def decide(input_rows: InputRows, scores: Scores, body: AnomalyBody) -> Verdicts:
    """Decide the verdicts on the rows. A silenced row is never anomalous, and does not influence other verdicts.

    The verdicts follow from the smoothed severity if `body` has a half-life, from Benjamini-Hochberg if `body` has
    `fdr`, and otherwise from the severity.
    """
    smoothed = None
    half_life = body.half_life or body.half_life_rows
    if half_life:
        severity = np.where(_heard(input_rows, scores.usable), scores.clipped.severity, np.nan)
        by_rows = body.half_life is None
        smoothed = exponential_mean(severity, half_life, input_rows.time, input_rows.group, by_rows=by_rows)
        is_anomaly = smoothed > 1  # False for NaN
    elif body.fdr is not None:
        usable = _heard(input_rows, scores.usable)
        is_anomaly = np.zeros(len(scores.score), bool)
        if usable.any():
            is_anomaly[usable] = benjamini_hochberg(scores.p_value[usable], body.fdr)
    else:
        is_anomaly = scores.severity > 1
        if not scores.all_finite:
            is_anomaly &= scores.usable
        if input_rows.silenced is not None:
            is_anomaly &= ~input_rows.silenced
    return Verdicts(input_rows, scores, is_anomaly.tolist(), smoothed)


def _heard(input_rows: InputRows, usable: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return which of the usable rows are not silenced, [G]."""
    return usable if input_rows.silenced is None else usable & ~input_rows.silenced


# A result has the same fields as a result of `elbo score` (training/evaluation/score.py). The two writers share no
# code, because `service` and `training` may not import each other, and because `elbo score` needs none of the fields
# that `_add_optional_fields` adds here.
def results_and_errors(
    verdicts: Verdicts, explain: int, names: Sequence[str], parts: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the response's `results` and `errors`, both in the order of the request's rows. Numbers are float32.

    Args:
        verdicts: the verdicts on the valid rows.
        explain: how many features to list per row.
        names: the names of the D features.
        parts: the names of the score's P parts.
    """
    parsed, scores = verdicts.input_rows.parsed, verdicts.scores
    clipped, of_categories = scores.clipped, verdicts.input_rows.columns
    columns = zip(
        parsed.rows,
        clipped.score,
        clipped.p_value,
        clipped.severity,
        verdicts.is_anomaly,
        _split(list(clipped.parts.ravel()), len(parts), len(parsed.rows)),
        _largest_contributions(parsed.x, clipped, explain, names)
        if of_categories is None
        else _largest_columns(verdicts.input_rows, clipped, explain, of_categories),
        strict=True,
    )
    results: list[dict[str, Any]] = [
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
    _add_optional_fields(results, verdicts, names)
    if verdicts.past is not None and verdicts.past.onsets is not None and explain:
        _add_onsets(results, verdicts, verdicts.past.onsets, explain)
    if not scores.all_finite:
        results = [result for result, usable in zip(results, scores.usable.tolist(), strict=True) if usable]
    return results, row_errors(parsed, scores)


def results_in_parts(
    verdicts: Verdicts, explain: int, names: Sequence[str], parts: Sequence[str]
) -> Iterator[list[dict[str, Any]]]:
    """Yield the response's `results` in lists of at most PART_ROWS. See `results_and_errors` for the arguments."""
    for start in range(0, len(verdicts.is_anomaly), PART_ROWS):
        results, _ = results_and_errors(verdicts.part(slice(start, start + PART_ROWS)), explain, names, parts)
        yield results


def all_errors(verdicts: Verdicts) -> list[dict[str, Any]]:
    """Return the response's `errors`, in the order of the request's rows."""
    return row_errors(verdicts.input_rows.parsed, verdicts.scores)


def score_array(input_rows: InputRows, verdicts: Verdicts | None) -> Array:
    """Return score, p-value and severity of all N rows of the request as [N, 3]; NaN in rows without a verdict."""
    array = np.full((input_rows.rows_received, 3), np.nan, np.float32)
    if verdicts:
        usable, clipped = verdicts.scores.usable, verdicts.scores.clipped
        columns = np.column_stack((clipped.score, clipped.p_value, clipped.severity))
        array[np.array(input_rows.parsed.rows)[usable]] = columns[usable]
    return array


def parsing_errors(parsed: ParsedRows) -> list[dict[str, Any]]:
    """Return the response's `errors` for the rows that could not be parsed."""
    return [{"row": e.row, "detail": e.error.detail, "pointer": e.error.pointer} for e in parsed.errors]


def row_errors(parsed: ParsedRows, scores: Scores) -> list[dict[str, Any]]:
    """Return the response's `errors`: the rows that could not be parsed, and those that could not be scored."""
    if scores.all_finite:
        return parsing_errors(parsed)
    unusable = np.flatnonzero(~scores.usable)
    overflows = [{"row": parsed.rows[index], "detail": OVERFLOW_DETAIL, "pointer": None} for index in unusable]
    return sorted(parsing_errors(parsed) + overflows, key=lambda error: error["row"])


def _largest_contributions(
    x: Array, scores: Scores, explain: int, names: Sequence[str]
) -> Iterable[list[dict[str, Any]]]:
    """Return, for each row of x [G, D], the `explain` features with the largest contributions, largest first."""
    contribution = scores.contribution
    count, width = contribution.shape
    top = largest(contribution, explain)
    # Indices into the flattened arrays.
    positions = (top if count == 1 else top + width * np.arange(count)[:, None]).ravel()
    columns = zip(
        top.ravel().tolist(),
        x.take(positions),
        scores.expected.take(positions),
        contribution.take(positions),
        strict=True,
    )
    features = [
        {"name": names[index], "value": value, "expected": expected, "contribution": share}
        for index, value, expected, share in columns
    ]
    return _split(features, top.shape[1], count)


def _largest_columns(
    input_rows: InputRows, scores: Scores, explain: int, columns: CategoryColumns
) -> list[list[dict[str, Any]]]:
    """Return, for each row, the `explain` columns with the largest contributions, largest first.

    The value and the expected value of a category are levels.
    """
    contribution, x = columns.contributions(scores.contribution), input_rows.parsed.x
    top, count = largest(contribution, explain), len(columns.numbers)
    features = []
    for row, of_row in enumerate(top.tolist()):
        unseen = {} if input_rows.unseen is None else {each.feature: each.got for each in input_rows.unseen[row]}
        found = []
        for index in of_row:
            name, value, expected = columns.names[index], None, None
            if index < count:
                value, expected = x[row, index], scores.expected[row, index]
            else:
                value = unseen.get(name) or columns.level_of(index - count, x[row])
                expected = columns.level_of(index - count, scores.expected[row])
            found.append({"name": name, "value": value, "expected": expected, "contribution": contribution[row, index]})
        features.append(found)
    return features


def _split(values: list[T], width: int, count: int) -> list[list[T]]:
    """Return `values` as `count` lists of `width` values each."""
    return [values[start : start + width] for start in range(0, width * count, width)] if width else [[]] * count


def largest(array: Array, count: int) -> npt.NDArray[np.intp]:
    """Return, for each row of `array` [G, D], the columns of the `count` largest values, largest first.

    Equal values are in column order.
    """
    if count < array.shape[1] and array.shape[1] > MAX_SORTED_FEATURES:
        columns = np.sort(np.argpartition(-array, max(count - 1, 0), axis=1)[:, :count], axis=1)
        order = np.argsort(-np.take_along_axis(array, columns, axis=1), axis=1, kind="stable")
        return np.take_along_axis(columns, order, axis=1)
    return (-array).argsort(axis=1, kind="stable")[:, :count]


def _add_optional_fields(results: list[dict[str, Any]], verdicts: Verdicts, names: Sequence[str]) -> None:
    """Add the fields that only some rows have: imputed features, time, group, and smoothed severity."""
    input_rows, missing = verdicts.input_rows, verdicts.input_rows.parsed.missing
    if input_rows.columns is not None:
        names, missing = _add_unseen_levels(results, input_rows, input_rows.columns)
    for row, column in [] if missing is None else np.argwhere(missing).tolist():
        results[row].setdefault("imputed", []).append(names[column])
    for name, values in (("time", input_rows.time), ("group", input_rows.group), ("smoothed", verdicts.smoothed)):
        if values is not None:
            for result, value in zip(results, values, strict=True):
                if value is not None and value == value:
                    result[name] = value
    if input_rows.silenced is not None:
        for row in np.flatnonzero(input_rows.silenced).tolist():
            results[row]["silenced"] = True
    if verdicts.past is not None:
        _add_past(results, verdicts.past)


def _add_unseen_levels(
    results: list[dict[str, Any]], input_rows: InputRows, columns: CategoryColumns
) -> tuple[Sequence[str], npt.NDArray[np.bool_] | None]:
    """Add the levels that the model does not know. Return the names of the columns, and which are missing, or None."""
    for result, unseen in zip(results, input_rows.unseen or (), strict=False):
        if unseen:
            result["unseen_levels"] = [level._asdict() for level in unseen]
    missing = input_rows.parsed.missing
    return columns.names, None if missing is None else columns.missing(missing)


def _add_onsets(results: list[dict[str, Any]], verdicts: Verdicts, onsets: Onsets, explain: int) -> None:
    """Add `lag` and `since` to the features of anomalous rows: since when they deviate."""
    rows = np.flatnonzero(verdicts.is_anomaly)
    if not len(rows):
        return
    contribution = verdicts.scores.clipped.contribution[rows]
    top = largest(contribution, explain)
    for row, columns, found in zip(rows.tolist(), top.tolist(), onsets.find(rows, top, contribution), strict=True):
        for column, feature in zip(columns, results[row]["features"], strict=True):
            if column in found:
                lag, since = found[column]
                feature["lag"] = lag
                if since is not None:
                    feature["since"] = since


def _add_past(results: list[dict[str, Any]], past: Past) -> None:
    """Add the fields about the past of the group of each row."""
    if past.window_rows is not None:
        for result, rows in zip(results, past.window_rows, strict=True):
            result["window_rows"] = rows
            result["warming_up"] = rows < past.full_window
    if past.states is not None and past.has_own_calibration is not None:
        for result, state, is_own in zip(results, past.states, past.has_own_calibration, strict=True):
            result["calibration"] = "group" if is_own else "pool"
            result["state"] = state
