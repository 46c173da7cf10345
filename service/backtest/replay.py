"""Judge a history as the service judges the same rows if they arrive one after the other, in order of time.

The rows of a group pass through the code of /anomaly: `service.anomaly.streams` joins them to the past of their group,
the model scores them, and the online calibration of the group judges them. The code of the alerts then finds the alarms
among them. Groups do not influence each other, so they are replayed one after the other. Every group begins without a
past, as after a server's first start.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from models.policy_rules import AlarmRule
from service.anomaly.alert_rule import calm_for_step
from service.anomaly.group_memory import StartSets, rules_of
from service.anomaly.onsets import Onsets
from service.anomaly.smoothing import LastingAlarm, RunningMean, exponential_mean
from service.anomaly.streams import Group, JoinedRows, join_rows, judge
from service.anomaly.verdicts import Scores, largest
from service.backtest.history import History
from service.codec.long_work import pause_if_due
from service.inference import operations
from service.inference.operations import Run, in_order
from service.inference.served_model import ServedModel

CHUNK_ROWS = 4096  # rows that are replayed at once
PART_BYTES = 2**20  # windows are scored in parts of about this size, as in the service
DEFAULT_ALPHAS = (0.05, 0.01, 0.001)
CAUSES = 3  # features of an anomalous row that are kept as its causes: those that contribute most

MAX_FLOAT32 = np.finfo(np.float32).max

Array = npt.NDArray[np.float32]
Times = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
_Causes = tuple[npt.NDArray[np.int64], npt.NDArray[np.intp], Array, Times]  # the fields `causes_...` of `Replay`


@dataclass(frozen=True)
class Cause:
    """A feature that contributes to the score of a row.

    `value`: None if the value is missing. `since`: when the deviation of the feature began, in Unix seconds; None if
    this is unknown. It is always unknown for a model without a window.
    """

    name: str
    value: float | None
    expected: float
    contribution: float
    since: float | None = None


@dataclass(frozen=True)
class Options:
    """How the rows are judged.

    Args:
        alphas: K false-alarm rates.
        extrapolated: whether rows may be anomalous at an alpha below the smallest possible p-value.
        half_life_rows: half-life, in rows, with which severities are smoothed before a row is called anomalous; 0: they
            are not smoothed.
        online: whether rows are judged by the online calibration of their group, if the model was trained with times.
        incident_rows: after how many rows an incident counts as a change; None: the number in the manifest of the model
            or, without one, the default of the server.
        alert_half_life: half-life in rows of the mean severity that raises an alert (ELBO_ALERT_HALF_LIFE).
        calm_seconds: shortest time without an alarm after which an alert ends (ELBO_ALERT_CALM_SECONDS); see
            `calm_for_step`.
        incident_seconds: how long an incident keeps an alert open if no more rows arrive (ELBO_ALERT_MAX_AGE_SECONDS).
    """

    alphas: tuple[float, ...] = DEFAULT_ALPHAS
    extrapolated: bool = False
    half_life_rows: float = 0.0
    online: bool = True
    incident_rows: int | None = None
    alert_half_life: float = 3.0
    calm_seconds: float = 120.0
    incident_seconds: float = 3600.0


@dataclass(eq=False)
class Replay:
    """The verdicts on the M rows of a history, at K alphas.

    Args:
        history: the rows.
        options: the K alphas, and how the rows are judged.
        alarm_rule: how many rows and how much time the policy of the model demands of an alert.
        calm_seconds: time without an alarm after which an alert ends, for the usual step of the model's rows.
        severity: severities, smoothed if the options say so, [K, M]. A row without a verdict has 0.
        p_value: [M]. A row without a verdict has 1.
        is_alarm: whether a row opens an alert or keeps it open, [K, M].
        is_incident: whether the group is in an incident after the row, [M]; false for a silenced row.
        is_warming_up: whether a row has too few rows before it to be anomalous, [M].
        states: the state of the group's online calibration after each row, [M]; None without online calibration.
        causes_rows: rows whose causes are known: those whose own severity at the first alpha is above 1, [A].
        causes_features: their CAUSES features with the largest contributions, as indices, [A, C].
        causes_numbers: value, expected value and contribution of these features, [A, C, 3].
        causes_since: when the deviations of these features began, in Unix seconds; NaN if this is unknown, [A, C].
        names: names of the D features.
    """

    history: History
    options: Options
    alarm_rule: AlarmRule
    calm_seconds: float
    severity: Array
    p_value: Array
    is_alarm: Flags
    is_incident: Flags
    is_warming_up: Flags
    states: list[str] | None
    causes_rows: npt.NDArray[np.int64]
    causes_features: npt.NDArray[np.intp]
    causes_numbers: Array
    causes_since: Times
    names: list[str]

    @property
    def alphas(self) -> tuple[float, ...]:
        """The K alphas."""
        return self.options.alphas

    @property
    def is_anomaly(self) -> Flags:
        """Which rows are anomalous, [K, M]."""
        return np.asarray(self.severity > 1)

    def causes_before(self, row: int, first: int) -> tuple[Cause, ...]:
        """Return the causes of the latest row with known causes among the rows from `first` to `row`.

        The causes of `row` itself are unknown if only its smoothed severity is above 1, and not its own severity.
        """
        found = (self.causes_of(earlier) for earlier in range(row, first - 1, -1))
        return next((causes for causes in found if causes), ())

    def causes_of(self, row: int) -> tuple[Cause, ...]:
        """Return the features that contribute most to the score of `row`; no features if its causes are unknown."""
        place = int(np.searchsorted(self.causes_rows, row))
        if place == len(self.causes_rows) or self.causes_rows[place] != row:
            return ()
        columns = self.causes_features[place].tolist(), self.causes_numbers[place].tolist()
        return tuple(
            Cause(self.names[feature], _known(value), expected, contribution, _known(since))
            for feature, (value, expected, contribution), since in zip(
                *columns, self.causes_since[place].tolist(), strict=True
            )
        )


def _known(number: float) -> float | None:
    """Return `number`; None if it is NaN."""
    return number if number == number else None


class Replayer:
    """Judges a history part by part: for each of `parts`, call `join`, score the inputs, and call `judge`.

    Args:
        served: the model.
        history: the rows.
        options: the alphas, and how the rows are judged.
    """

    def __init__(self, served: ServedModel, history: History, options: Options) -> None:
        self._served = served
        starts = StartSets(served) if options.online and served.manifest.timeline is not None else None
        if starts is not None and starts.of("") is None:
            starts = None  # the scores of the calibration rows are unknown
        self._starts = starts
        self._rules = rules_of(served, has_calibration=starts is not None)
        if options.incident_rows is not None:
            self._rules = replace(self._rules, incident_rows=options.incident_rows)
        # The next part may continue the last group of the previous part. These two have its number, and the state that
        # the server would store between two requests, or its running alarms at each alpha.
        self._payloads: dict[int, bytes] = {}
        self._alarms: tuple[int, list[LastingAlarm]] = (-1, [])
        self._causes: list[_Causes] = []
        rows, policy = len(history), served.manifest.policy
        self._result = Replay(
            history=history,
            options=options,
            alarm_rule=AlarmRule() if policy is None else policy.rules.alarms,
            calm_seconds=calm_for_step(options.calm_seconds, self._rules.usual_step),
            severity=np.zeros((len(options.alphas), rows), np.float32),
            p_value=np.ones(rows, np.float32),
            is_alarm=np.zeros((len(options.alphas), rows), bool),
            is_incident=np.zeros(rows, bool),
            is_warming_up=np.zeros(rows, bool),
            states=None if starts is None else [],
            causes_rows=np.empty(0, np.int64),
            causes_features=np.empty((0, CAUSES), np.intp),
            causes_numbers=np.empty((0, CAUSES, 3), np.float32),
            causes_since=np.empty((0, CAUSES)),
            names=[feature.name for feature in served.manifest.features],
        )

    def runs(self, inputs: Array) -> list[Run]:
        """Return the runs that score `inputs`, the model's inputs for some rows: see `operations.in_order`."""
        options = self._result.options
        operation = operations.anomaly(options.alphas[0], options.extrapolated)
        if self._served.scores_gaps:
            return operations.split_by_gaps(operation, inputs)
        return [Run(operation, np.arange(len(inputs)))]

    def parts(self) -> Iterator[slice]:
        """Yield the parts of the rows, in order."""
        rows = len(self._result.history)
        for first in range(0, rows, CHUNK_ROWS):
            yield slice(first, min(first + CHUNK_ROWS, rows))

    def join(self, part: slice) -> JoinedRows:
        """Return the rows in `part`, joined to the past of their groups."""
        history, index = self._result.history, self._result.history.group[part]
        groups = {
            history.groups[number]: Group(
                self._rules,
                self._payloads.get(number, b""),
                None if self._starts is None else self._starts.of(history.groups[number]),
            )
            for number in np.unique(index).tolist()
        }
        names = [history.groups[number] for number in index.tolist()]
        return join_rows(self._rules, history.x[part], history.time[part], names, groups)

    def inputs(self, joined: JoinedRows) -> Iterator[Array]:
        """Yield the model's inputs for the rows, in pieces of about PART_BYTES if these are windows."""
        count = len(joined.outcomes)
        size = count if joined.windows is None else max(1, PART_BYTES // (4 * self._rules.rows * self._rules.width))
        for start in range(0, count, size):
            yield joined.inputs(slice(start, start + size))

    def judge(self, part: slice, joined: JoinedRows, outputs: Sequence[tuple[Array, ...]]) -> None:
        """Judge the rows in `part`. `outputs`: the results of `runs`, in the order of the rows, for each `inputs`."""
        scores = Scores(*(np.concatenate(arrays) for arrays in zip(*outputs, strict=True)))
        if joined.units is not None:
            scores = replace(scores, expected=joined.units.from_pool(scores.expected))
        self._judge(part, joined, scores)
        self._causes.append(_find_causes(self._result, part, joined, scores, self._served))
        last = int(self._result.history.group[part.stop - 1])
        self._payloads = {last: joined.groups[self._result.history.groups[last]].dump(joined.pool)}

    def finish(self) -> Replay:
        """Return the verdicts. Call `judge` for each part before."""
        result = self._result
        _finish(result, result.options.half_life_rows)
        result.causes_rows, result.causes_features, result.causes_numbers, result.causes_since = (
            np.concatenate(arrays) for arrays in zip(*self._causes, strict=True)
        )
        return result

    def _judge(self, part: slice, joined: JoinedRows, scores: Scores) -> None:
        """Write the verdicts on the rows in `part` into the result."""
        result, served, rules = self._result, self._served, self._rules
        options, time, usable = result.options, result.history.time[part], scores.usable
        silenced = None
        if served.silences is not None:
            groups = [result.history.groups[number] for number in result.history.group[part].tolist()]
            silenced = served.silences.hold(time, groups, len(groups), now=0.0)
        if result.states is not None:
            judgements = judge(
                joined, rules, scores.score, usable, time, (scores.p_value, scores.severity),
                options.alphas[0], options.extrapolated, options.alphas[1:], silenced,
            )  # fmt: skip
            result.states += judgements.states
            result.is_incident[part] = [state == "incident" for state in judgements.states]
            p_value, severities = judgements.p_value, [judgements.severity, *judgements.more_severities]
        else:
            p_value, calibration = scores.p_value, served.backend.calibration
            severities = [
                operations.anomaly(alpha, options.extrapolated).finish((scores.score,), calibration)[2]
                for alpha in options.alphas
            ]
        is_short = np.array(joined.window_rows) < rules.least_rows
        severities = [np.where(is_short, np.minimum(severity, 1), severity) for severity in severities]
        result.is_warming_up[part] = is_short
        result.p_value[part] = np.where(usable, p_value, 1)
        if silenced is not None:
            usable = usable & ~silenced  # a silenced row has no verdict, so it is not anomalous
            result.is_incident[part] &= ~silenced
            severities = [np.where(silenced, np.nan, severity) for severity in severities]
        self._find_alarms(part, severities)
        for index, severity in enumerate(severities):
            result.severity[index, part] = np.where(usable, np.minimum(severity, MAX_FLOAT32), np.nan)  # see `_finish`

    def _find_alarms(self, part: slice, severities: Sequence[Array]) -> None:
        """Find the alarms among the rows in `part`. `severities`: an array per alpha, with NaN for silenced rows."""
        result, options, rule = self._result, self._result.options, self._result.alarm_rule
        for group in np.unique(result.history.group[part]).tolist():
            pause_if_due()
            if self._alarms[0] != group:
                mean = partial(RunningMean, options.alert_half_life)
                self._alarms = group, [LastingAlarm(mean(), rule.rows, rule.seconds) for _ in options.alphas]
            rows = result.history.rows_of(group)
            rows = slice(max(rows.start, part.start), min(rows.stop, part.stop))
            times = result.history.time[rows].tolist()
            for index, alarms in enumerate(self._alarms[1]):
                own = severities[index][rows.start - part.start : rows.stop - part.start].tolist()
                result.is_alarm[index, rows.start + np.array(alarms.find_alarms(own, times), np.intp)] = True


def replay(
    served: ServedModel, history: History, options: Options, report: Callable[[int], None] = lambda _: None
) -> Replay:
    """Return the verdicts on all rows of a history.

    Args:
        served: the model.
        history: the rows.
        options: the alphas, and how the rows are judged.
        report: is called with the number of rows judged so far.
    """
    replayer = Replayer(served, history, options)
    for part in replayer.parts():
        joined = replayer.join(part)
        with np.errstate(over="ignore", invalid="ignore"):
            outputs = [_score(served, replayer, inputs) for inputs in replayer.inputs(joined)]
        replayer.judge(part, joined, outputs)
        report(part.stop)
    return replayer.finish()


def _score(served: ServedModel, replayer: Replayer, inputs: Array) -> tuple[Array, ...]:
    runs = replayer.runs(inputs)
    return in_order(runs, [served.backend.run(operation, (inputs[places],)) for operation, places in runs])


def _find_causes(result: Replay, part: slice, joined: JoinedRows, scores: Scores, served: ServedModel) -> _Causes:
    """Return the anomalous rows in `part`, and the features that contribute most to their scores."""
    rows = np.flatnonzero(result.severity[0, part] > 1)
    features = largest(scores.contribution[rows], CAUSES)  # [A, C]
    numbers = [
        np.take_along_axis(values[rows], features, axis=1)
        for values in (result.history.x[part], scores.expected, scores.contribution)
    ]
    since = np.full(features.shape, np.nan)
    if served.course is not None:
        onsets = Onsets(served.course, joined.windows_of, joined.times_of)
        for place, found in enumerate(onsets.find(rows, features, scores.contribution[rows])):
            since[place] = [found[feature].since if feature in found else None for feature in features[place].tolist()]
    return rows + part.start, features, np.stack(numbers, axis=2).astype(np.float32), since


def _finish(result: Replay, half_life_rows: float) -> None:
    """Smooth the severities as /anomaly does if one request has the whole history, and replace NaN by 0.

    The severity of a row without a verdict is NaN up to here, so that the row does not count for other rows.
    """
    for severity in result.severity:
        if half_life_rows:
            smoothed = exponential_mean(severity, half_life_rows, None, result.history.group, by_rows=True)
            severity[:] = np.where(result.is_warming_up, np.minimum(smoothed, 1), smoothed)
        severity[np.isnan(severity)] = 0
