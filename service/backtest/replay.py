"""Judge a history as the service judges the same rows if they arrive one after the other, in order of time.

The rows of a group pass through the code of /anomaly: `service.anomaly.streams` joins them to the past of their group,
the model's backend scores them, and the online calibration of the group judges them. Groups do not influence each
other, so one group is replayed after the other. Every group begins without a past, as after a server's first start.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from service.anomaly.group_memory import StartSets, rules_of
from service.anomaly.onsets import Onsets
from service.anomaly.smoothing import exponential_mean
from service.anomaly.streams import Group, JoinedRows, Rules, join_rows, judge
from service.anomaly.verdicts import Scores, largest
from service.backtest.history import History
from service.inference import operations
from service.inference.served_model import ServedModel

CHUNK_ROWS = 4096  # rows that are replayed at once
PART_BYTES = 2**20  # windows are scored in parts of about this size, as in the service
DEFAULT_ALPHAS = (0.05, 0.01, 0.001)
CAUSES = 3  # features that are remembered of an anomalous row: those that contribute most

MAX_FLOAT32 = np.finfo(np.float32).max

Array = npt.NDArray[np.float32]
Times = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
_Causes = tuple[npt.NDArray[np.int64], npt.NDArray[np.intp], Array, Times]  # see `Replay`


class Cause(NamedTuple):
    """A feature that contributes to the score of a row.

    `since`: when its deviation began, in Unix seconds; None if this is unknown, as for a model without a window.
    """

    name: str
    value: float
    expected: float
    contribution: float
    since: float | None = None


@dataclass(frozen=True)
class Options:
    """How the rows are judged.

    Args:
        alphas: K false-alarm rates.
        extrapolated: whether rows may be anomalous at an alpha below the smallest possible p-value.
        half_life_rows: half-life in rows of the smoothed severity that decides; 0 decides by each row's severity.
        online: whether rows are judged by the online calibration of their group, if the model was trained with times.
    """

    alphas: tuple[float, ...] = DEFAULT_ALPHAS
    extrapolated: bool = False
    half_life_rows: float = 0.0
    online: bool = True


@dataclass(eq=False)
class Replay:
    """The verdicts on the M rows of a history, at K alphas.

    Args:
        history: the rows.
        alphas: the K alphas.
        severity: severities, smoothed if the options say so, [K, M]. A row without a verdict has 0.
        p_value: [M]. A row without a verdict has 1.
        is_warming_up: whether a row has too few rows before it to be anomalous, [M].
        states: the state of the group's online calibration after each row, [M]; None without online calibration.
        causes_rows: rows whose causes are known: those whose own severity at the first alpha is above 1, [A].
        causes_features: their CAUSES features with the largest contributions, as indices, [A, C].
        causes_numbers: value, expected value and contribution of these features, [A, C, 3].
        causes_since: when the deviations of these features began, in Unix seconds; NaN if this is unknown, [A, C].
        names: names of the D features.
    """

    history: History
    alphas: tuple[float, ...]
    severity: Array
    p_value: Array
    is_warming_up: Flags
    states: list[str] | None
    causes_rows: npt.NDArray[np.int64]
    causes_features: npt.NDArray[np.intp]
    causes_numbers: Array
    causes_since: Times
    names: list[str]

    @property
    def is_anomaly(self) -> Flags:
        """Which rows are anomalous, [K, M]."""
        return np.asarray(self.severity > 1)

    def causes_before(self, row: int, rows: int) -> tuple[Cause, ...]:
        """Return the causes of the last of some rows whose causes are known: `rows` rows, of which `row` is the last.

        The smoothed severity of a row can be above 1 although its own is not.
        """
        found = (self.causes_of(earlier) for earlier in range(row, row - rows, -1))
        return next((causes for causes in found if causes), ())

    def causes_of(self, row: int) -> tuple[Cause, ...]:
        """Return the features that contribute most to the score of an anomalous row; none if they are unknown."""
        place = int(np.searchsorted(self.causes_rows, row))
        if place == len(self.causes_rows) or self.causes_rows[place] != row:
            return ()
        columns = self.causes_features[place].tolist(), self.causes_numbers[place].tolist()
        return tuple(
            Cause(self.names[feature], value, expected, contribution, since if since == since else None)
            for feature, (value, expected, contribution), since in zip(
                *columns, self.causes_since[place].tolist(), strict=True
            )
        )


def replay(
    served: ServedModel, history: History, options: Options, report: Callable[[int], None] = lambda _: None
) -> Replay:
    """Return the verdicts on all rows of a history.

    Args:
        served: the model.
        history: the rows.
        options: alphas and how the rows are judged.
        report: is called with the number of rows that are judged so far.
    """
    rules = rules_of(served)
    starts = StartSets(served) if options.online and served.manifest.timeline is not None else None
    if starts is not None and starts.of("") is None:
        starts = None  # the scores of the calibration rows are unknown
    rows = len(history)
    result = Replay(
        history=history,
        alphas=options.alphas,
        severity=np.zeros((len(options.alphas), rows), np.float32),
        p_value=np.ones(rows, np.float32),
        is_warming_up=np.zeros(rows, bool),
        states=None if starts is None else [],
        causes_rows=np.empty(0, np.int64),
        causes_features=np.empty((0, CAUSES), np.intp),
        causes_numbers=np.empty((0, CAUSES, 3), np.float32),
        causes_since=np.empty((0, CAUSES)),
        names=[feature.name for feature in served.manifest.features],
    )
    causes: list[_Causes] = []
    payloads: dict[int, bytes] = {}  # the last group of the previous chunk, as it is stored between two requests
    for first in range(0, rows, CHUNK_ROWS):
        part = slice(first, min(first + CHUNK_ROWS, rows))
        index = history.group[part]
        names = [history.groups[number] for number in index.tolist()]
        groups = {
            history.groups[number]: Group(
                rules, payloads.get(number, b""), None if starts is None else starts.of(history.groups[number])
            )
            for number in np.unique(index).tolist()
        }
        joined = join_rows(rules, history.x[part], history.time[part], names, groups)
        scores = _score(served, rules, joined, options)
        _judge(result, part, joined, rules, scores, served, options)
        causes.append(_find_causes(result, part, joined, scores, served))
        last = int(index[-1])
        payloads = {last: groups[history.groups[last]].dump(joined.pool)}
        report(part.stop)
    _finish(result, options.half_life_rows)
    result.causes_rows, result.causes_features, result.causes_numbers, result.causes_since = (
        np.concatenate(arrays) for arrays in zip(*causes, strict=True)
    )
    return result


def _score(served: ServedModel, rules: Rules, joined: JoinedRows, options: Options) -> Scores:
    """Return the model's outputs for the rows, with the severities of the fixed calibration at the first alpha."""
    count = len(joined.outcomes)
    size = count if joined.windows is None else max(1, PART_BYTES // (4 * rules.rows * rules.width))
    operation = operations.anomaly(options.alphas[0], options.extrapolated)
    with np.errstate(over="ignore", invalid="ignore"):
        parts = [
            served.backend.run(operation, (joined.inputs(slice(start, start + size)),))
            for start in range(0, count, size)
        ]
    return Scores(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _judge(
    result: Replay,
    part: slice,
    joined: JoinedRows,
    rules: Rules,
    scores: Scores,
    served: ServedModel,
    options: Options,
) -> None:
    """Write the verdicts on the rows in `part` into `result`."""
    usable = scores.usable
    silenced = None
    if served.silences is not None:
        groups = [result.history.groups[number] for number in result.history.group[part].tolist()]
        silenced = served.silences.hold(result.history.time[part], groups, len(groups), now=0.0)
    if result.states is not None:
        judgements = judge(
            joined, rules, scores.score, usable, result.history.time[part], (scores.p_value, scores.severity),
            options.alphas[0], options.extrapolated, options.alphas[1:], silenced,
        )  # fmt: skip
        result.states += judgements.states
        p_value, severities = judgements.p_value, [judgements.severity, *judgements.more_severities]
    else:
        p_value, calibration = scores.p_value, served.backend.calibration
        severities = [
            operations.anomaly(alpha, options.extrapolated).finish((scores.score,), calibration)[2]
            for alpha in options.alphas
        ]
    is_short = np.array(joined.window_rows) < rules.least_rows
    result.is_warming_up[part] = is_short
    result.p_value[part] = np.where(usable, p_value, 1)
    if silenced is not None:
        usable = usable & ~silenced  # as a row without a verdict: it is not anomalous
    for index, severity in enumerate(severities):
        most = np.where(is_short, np.float32(1), MAX_FLOAT32)
        result.severity[index, part] = np.where(usable, np.minimum(severity, most), np.nan)  # see `_finish`


def _find_causes(result: Replay, part: slice, joined: JoinedRows, scores: Scores, served: ServedModel) -> _Causes:
    """Return the anomalous rows in `part`, and the features that contribute most to their scores."""
    rows = np.flatnonzero(result.severity[0, part] > 1)
    features = largest(scores.contribution[rows], CAUSES)  # [A, C]
    numbers = [
        np.take_along_axis(values[rows], features, axis=1)
        for values in (joined.pool, scores.expected, scores.contribution)
    ]
    since = np.full(features.shape, np.nan)
    if served.course is not None:
        onsets = Onsets(served.course, joined.windows_of, joined.times_of)
        for place, found in enumerate(onsets.find(rows, features, scores.contribution[rows])):
            since[place] = [found[feature].since if feature in found else None for feature in features[place].tolist()]
    return rows + part.start, features, np.stack(numbers, axis=2).astype(np.float32), since


def _finish(result: Replay, half_life_rows: float) -> None:
    """Smooth the severities as /anomaly does if one request has the whole history, and let no NaN remain.

    A row without a verdict has NaN so far, so that it does not count for other rows.
    """
    for severity in result.severity:
        if half_life_rows:
            smoothed = exponential_mean(severity, half_life_rows, None, result.history.group, by_rows=True)
            severity[:] = np.where(result.is_warming_up, np.minimum(smoothed, 1), smoothed)
        severity[np.isnan(severity)] = 0
