"""Join the rows of a request to the past of their groups: windows, repeated rows, late rows, gaps, and calibration.

Rows of a group are handled in order of time; rows without a time come after the row that the request has before them.
Everything here is computed in memory, and depends on the rows and their order only: it does not matter in how many
requests the rows arrive.

- A new row is later than all rows before it. It is added to the history of its group.
- A repeated row has the time of a row in the history. It is judged with the rows before that time, and changes nothing.
- A late row is earlier than the newest row. It is judged with the rows before it that the history has, and is inserted
  if the history still has its place. It does not change the calibration.
- After a gap, a window begins anew. A gap is a step longer than a third of the window, in usual steps.
- If RESTART_ROWS rows in a row are late, the clock that gave the newest row was wrong, or the sender replays an earlier
  time: the later rows are forgotten, and the group goes on from the present row.
"""

import math
import struct
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from models.baseline import Baseline
from models.feature_baseline import FeatureBaseline
from service.anomaly.online_calibration import MAX_BYTES, MAX_FLOAT32, CorruptRecordError, OnlineCalibration, State
from service.codec.long_work import pause_if_due

Array = npt.NDArray[np.float32]
REMEMBERED_TIMES = 64  # times that a group of a model without a window remembers, to recognise repeated rows
HISTORY_WINDOWS = 2  # windows that the history of a group holds, so that late and repeated rows have whole windows
REMEMBERED_STEPS = 9  # steps of which the usual step of a group is the median
MIN_STEPS = 5  # with fewer known steps, the usual step is that of the training rows
GAP_SHARE = 3  # a step of more than a window's rows / GAP_SHARE usual steps is a gap
RESTART_ROWS = 100
STATES: tuple[State, ...] = ("usual", "incident", "changed")
_HEAD = struct.Struct("<HBH")  # rows, steps, late rows in a row
_LENGTHS = struct.Struct("<II")  # bytes of the history, bytes of the newest row
_NEWEST = struct.Struct("<ddff")  # time, step, adjusted score, p-value; then the values and the contributions


class Outcome(IntEnum):
    """What a row is to the history of its group."""

    NEW = 0
    REPEATED = 1
    LATE = 2


@dataclass(frozen=True)
class Rules:
    """How rows of a model are joined.

    Args:
        rows: N, the rows of a window; 1 for a model without a window.
        least_rows: how many rows of a window must be there before its newest row can be anomalous.
        width: D, the number of features.
        usual_step: the usual time between two rows of a group in the training data, in seconds; None if it is unknown.
        baseline: what score is usual for a group and a time, so that calibrations compare adjusted scores; None: they
            compare scores.
        features: converts rows into the units of the pool before the model sees them; None: the model sees them as they
            are.
        incident_rows: after how many rows an incident is a change; None: `default_incident_rows`.
    """

    rows: int
    least_rows: int
    width: int
    usual_step: float | None
    baseline: Baseline | None = None
    features: FeatureBaseline | None = None
    incident_rows: int | None = None

    @property
    def has_window(self) -> bool:
        """Whether a row is judged together with rows before it."""
        return self.rows > 1

    @property
    def capacity(self) -> int:
        """The number of rows in the history of a group."""
        return HISTORY_WINDOWS * self.rows if self.has_window else REMEMBERED_TIMES

    @property
    def history_bytes(self) -> int:
        """The largest size of a history, in bytes."""
        row = 8 + 1 + 4 * self.width if self.has_window else 8 + 1
        return _HEAD.size + 8 * REMEMBERED_STEPS + self.capacity * row

    @property
    def payload_bytes(self) -> int:
        """The largest size of what is stored about a group, in bytes."""
        return _LENGTHS.size + self.history_bytes + _NEWEST.size + 8 * self.width + MAX_BYTES


class History:
    """The last rows of one group, in order of time.

    Args:
        rules: how rows are joined.
        payload: what `dump` has returned; no bytes for a new group.

    Attributes:
        x: the values of the stored rows, [H, D]; H is 0 for a model without a window.

    Raises:
        ValueError: `payload` is not a history for these rules.
    """

    def __init__(self, rules: Rules, payload: bytes = b"") -> None:
        self._rules = rules
        self._times: list[float] = []
        self._begins: list[bool] = []  # whether a row begins a window
        self._sources: list[int] = []  # where the values of a row are: see `join`
        self._steps: list[float] = []  # the last steps between new rows, in seconds
        self._late_rows = 0  # late rows since the last new row
        self.x: Array = np.empty((0, rules.width), np.float32)
        if payload:
            self._load(payload)

    def _load(self, payload: bytes) -> None:
        try:
            rows, steps, self._late_rows = _HEAD.unpack_from(payload)
            numbers = np.frombuffer(payload, "<f8", steps + rows, _HEAD.size).tolist()
            begins_at = _HEAD.size + 8 * (steps + rows)
            self._steps, self._times = numbers[:steps], numbers[steps:]
            self._begins = np.frombuffer(payload, np.bool_, rows, begins_at).tolist()
            if self._rules.has_window:
                values = np.frombuffer(payload, "<f4", rows * self._rules.width, begins_at + rows)
                self.x = values.reshape(rows, self._rules.width)
        except (ValueError, struct.error) as error:
            raise ValueError(f"the history of a group is not valid: {error}") from error
        self._sources = list(range(rows))

    @property
    def oldest(self) -> float:
        """The time of the oldest stored row in seconds; infinity if no row is stored."""
        return self._times[0] if self._times else math.inf

    def dump(self, pool: Array) -> bytes:
        """Return the history as bytes. `pool` has the values of the rows, by source: see `join`.

        The history can then take the rows of another request.
        """
        times, steps = self._times, self._steps
        parts = [
            _HEAD.pack(len(times), len(steps), min(self._late_rows, 65535)),
            array("d", steps + times).tobytes(),
            bytes(self._begins),
        ]
        if self._rules.has_window:
            self.x = pool[self._sources]
            self._sources = list(range(len(times)))
            parts.append(self.x.astype("<f4", copy=False).tobytes())
        return b"".join(parts)

    @property
    def times(self) -> list[float]:
        """A copy of the times of the stored rows."""
        return self._times.copy()

    def place(self, offset: int) -> None:
        """Note that the stored rows have the sources `offset`, `offset` + 1, ..."""
        self._sources = [source + offset for source in self._sources]

    def join(self, source: int, time: float) -> tuple[Outcome, list[int]]:
        """Add a row, and return what it is and the sources of the rows of its window, oldest first.

        Args:
            source: where the values of the row are. A source is any number, for example an index of an array.
            time: the time of the row in seconds; NaN if it has none.
        """
        times = self._times
        newest = times[-1] if times else None
        if time != time:
            time = 0.0 if newest is None else math.nextafter(newest, math.inf)
            return self._append(source, time, begins=newest is None)
        if newest is None or time > newest:
            step = None if newest is None else time - newest
            begins = step is None or self._is_gap(step)
            if step is not None and self._rules.has_window:
                self._steps = [*self._steps[1 - REMEMBERED_STEPS :], step]
            return self._append(source, time, begins=begins)
        place = bisect_left(times, time)
        if times[place] == time:
            return Outcome.REPEATED, [*self._window(place)[:-1], source]
        if self._late_rows >= RESTART_ROWS:
            del times[place:], self._begins[place:], self._sources[place:]
            begins = not times or self._is_gap(time - times[-1])
            return self._append(source, time, begins=begins)
        self._late_rows += 1
        times.insert(place, time)
        self._sources.insert(place, source)
        self._begins.insert(place, place == 0 or self._is_gap(time - times[place - 1]))
        self._begins[place + 1] = self._is_gap(times[place + 1] - time)
        window = self._window(place)
        self._drop_oldest()
        return Outcome.LATE, window

    def _append(self, source: int, time: float, *, begins: bool) -> tuple[Outcome, list[int]]:
        self._late_rows = 0
        self._times.append(time)
        self._begins.append(begins)
        self._sources.append(source)
        window = self._window(len(self._times) - 1)
        self._drop_oldest()
        return Outcome.NEW, window

    def _drop_oldest(self) -> None:
        if len(self._times) > self._rules.capacity:
            del self._times[0], self._begins[0], self._sources[0]

    def _window(self, place: int) -> list[int]:
        """Return the sources of the rows of the window that ends at `place`."""
        first = place
        last_possible = max(0, place - self._rules.rows + 1)
        while first > last_possible and not self._begins[first]:
            first -= 1
        return self._sources[first : place + 1]

    def _is_gap(self, step: float) -> bool:
        if not self._rules.has_window:
            return False
        usual = sorted(self._steps)[len(self._steps) // 2] if len(self._steps) >= MIN_STEPS else self._rules.usual_step
        return usual is not None and step > self._rules.rows / GAP_SHARE * usual


class StartSet(NamedTuple):
    """Scores of normal rows, with which the calibration of a group begins.

    `is_own`: whether they are scores of the group itself, and not of all groups.
    """

    scores: Sequence[float]
    is_own: bool


class NewestRow(NamedTuple):
    """The newest judged row of a group, by which the group is compared with its peers.

    Args:
        time: its time in seconds.
        step: the seconds since the judged row before it; NaN if this is unknown.
        score: its adjusted score.
        p_value: its p-value when it was judged.
        values: its values as the model saw them, in the units of the pool if rows are scaled by group, [D]; NaN for a
            missing value.
        contribution: the contributions of its features to its score, [D].
    """

    time: float
    step: float
    score: float
    p_value: float
    values: Array
    contribution: Array

    def dump(self) -> bytes:
        """Return the row as bytes."""
        head = _NEWEST.pack(self.time, self.step, self.score, self.p_value)
        values, contribution = self.values.astype("<f4", copy=False), self.contribution.astype("<f4", copy=False)
        return b"".join((head, values.tobytes(), contribution.tobytes()))


def read_newest(rules: Rules, payload: bytes) -> NewestRow | None:
    """Return the newest judged row of the group that `Group.dump` has written; None if it has none."""
    try:
        start, length = _LENGTHS.unpack_from(payload)
        newest = payload[_LENGTHS.size + start : _LENGTHS.size + start + length]
        time, step, score, p_value = _NEWEST.unpack_from(newest)
        values, contribution = np.frombuffer(newest, "<f4", 2 * rules.width, _NEWEST.size).reshape(2, -1)
    except (ValueError, struct.error):
        return None
    return NewestRow(time, step, score, p_value, values, contribution)


class Group:
    """What the service knows of one group: its history, its newest row and, if it has one, its online calibration.

    Args:
        rules: how rows are joined.
        payload: what `dump` has returned; no bytes for a new group. A payload that is not valid counts as none.
        start: the start set of the online calibration; None if the model has no online calibration.

    Attributes:
        newest: the newest judged row, as `NewestRow.dump` returns it; no bytes if no row with a time was judged.
    """

    def __init__(self, rules: Rules, payload: bytes, start: StartSet | None) -> None:
        self.calibration: OnlineCalibration | None = None
        self._unused = b""  # the stored calibration, if the rows of this request do not use it
        self._has_own_start = start is not None and start.is_own
        self.newest = b""
        try:
            history_bytes, newest_bytes = _LENGTHS.unpack_from(payload) if payload else (0, 0)
            newest_at = _LENGTHS.size + history_bytes
            rest = payload[newest_at + newest_bytes :]
            self.history = History(rules, payload[_LENGTHS.size : newest_at])
            self.newest = payload[newest_at : newest_at + newest_bytes]
            if start is None:
                self._unused = rest
            elif rest:
                self.calibration = OnlineCalibration.load(rest)
        except (ValueError, struct.error, CorruptRecordError):
            self.history, self.newest = History(rules), b""
        if start is not None and self.calibration is None:
            self.calibration = OnlineCalibration(start.scores, rules.rows, incident_rows=rules.incident_rows)

    def dump(self, pool: Array) -> bytes:
        """Return the group as bytes. `pool`: see `History.dump`."""
        history = self.history.dump(pool)
        calibration = self._unused if self.calibration is None else self.calibration.dump()
        return b"".join((_LENGTHS.pack(len(history), len(self.newest)), history, self.newest, calibration))

    def dump_unchanged(self) -> bytes:
        """Return the group as bytes. No row may have been joined to its history."""
        return self.dump(self.history.x)

    @property
    def tag(self) -> int:
        """The index in STATES of the state of the calibration."""
        return 0 if self.calibration is None else STATES.index(self.calibration.state)

    @property
    def has_own_calibration(self) -> bool:
        """Whether most scores of the calibration set are the group's own."""
        calibration = self.calibration
        return calibration is not None and (self._has_own_start or 2 * calibration.own_rows >= calibration.set_rows)


@dataclass(eq=False)
class JoinedRows:
    """The rows of a request with their windows, in the order of the request. In shapes: G rows, N rows of a window.

    Args:
        groups: the groups by name.
        order: for each group, its rows in the order in which they are handled.
        outcomes: what each row is, [G].
        window_rows: how many rows of its window each row has, itself included, [G].
        pool: the values of the rows of the request, then those of the histories, then one row of NaN.
        windows: for each row of each window, its index in `pool`, oldest first, [G, N]; None without windows.
        pool_times: the times of the rows of `pool` but the last one, in parts; none if a row has no time.
        units: how the values were converted; None if the model sees rows as they are.
    """

    groups: dict[str, Group]
    order: dict[str, list[int]]
    outcomes: list[Outcome]
    window_rows: list[int]
    pool: Array
    windows: npt.NDArray[np.int32] | None
    pool_times: list[Sequence[float]]
    units: "GroupUnits | None" = None

    def windows_of(self, rows: npt.NDArray[np.intp]) -> Array:
        """Return the windows [A, N, D] of some rows [A], with NaN for absent rows. The model has windows."""
        assert self.windows is not None
        return self.pool[self.windows[rows]]

    def times_of(self, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        """Return the times [A, N] of the rows of the windows of some rows [A]; NaN for absent rows."""
        assert self.windows is not None
        return np.concatenate((*self.pool_times, [np.nan]))[self.windows[rows]]

    def inputs(self, part: slice) -> Array:
        """Return the model's inputs for some rows: windows [B, N, D] with NaN for absent rows, or rows [B, D]."""
        if self.windows is None:
            return self.pool[part]
        return self.pool[self.windows[part]]

    @property
    def has_calibration(self) -> bool:
        """Whether the groups have online calibrations: either all of them have one, or none."""
        return next(iter(self.groups.values())).calibration is not None

    def changed_groups(self) -> list[str]:
        """Return the names of the groups that have changed."""
        repeated = Outcome.REPEATED
        return [name for name, rows in self.order.items() if any(self.outcomes[row] != repeated for row in rows)]


@dataclass(frozen=True, eq=False)
class GroupUnits:
    """Converts G rows between the raw units of their groups and the units of the pool: see `models.feature_baseline`.

    Args:
        features: the baseline of the features.
        index: the index of each row's group in the baseline, [G].
        time: the time of each row in seconds, NaN for rows without a time, [G].
    """

    features: FeatureBaseline
    index: npt.NDArray[np.intp]
    time: npt.NDArray[np.float64]

    def to_pool(self, x: Array, missing: npt.NDArray[np.bool_] | None) -> Array:
        """Return rows x [G, D] in the units of the pool. Replaced values stay, because they are in these units already.

        `missing`: which values were missing and replaced, [G, D]; None: none.
        """
        converted = self.features.to_pool(x, self.index, self.time)
        return converted if missing is None else np.where(missing, x, converted)

    def from_pool(self, x: Array) -> Array:
        """Return rows x [G, D] in the raw units of their groups."""
        return self.features.from_pool(x, self.index, self.time)


def join_rows(
    rules: Rules,
    x: Array,
    time: npt.NDArray[np.float64] | None,
    names: Sequence[str | None] | None,
    groups: dict[str, Group],
    missing: npt.NDArray[np.bool_] | None = None,
) -> JoinedRows:
    """Return the rows x [G, D] of a request, joined to their groups.

    Args:
        rules: how rows are joined.
        x: the rows.
        time: [G] in seconds, NaN for rows without a time; None if no row has a time.
        names: [G] the groups; None stands for the group without a name.
        groups: the groups by name. They are changed.
        missing: which values of `x` are replacements of missing ones, [G, D]; None: none.
    """
    count = len(x)
    order = _order(time, names, count)
    units = _units(rules, order, time, count)
    if units is not None:
        x = units.to_pool(x, missing)
    outcomes = [Outcome.NEW] * count
    window_rows = [1] * count
    pool = x
    windows: npt.NDArray[np.int32] | None = None
    if rules.has_window:
        pool = np.concatenate(
            (x, *(groups[name].history.x for name in order), np.full((1, rules.width), np.nan, np.float32))
        )
        windows = np.full((count, rules.rows), len(pool) - 1, np.int32)
    times = [math.nan] * count if time is None else time.tolist()
    has_times = rules.has_window and time is not None and not np.isnan(time).any()
    pool_times: list[Sequence[float]] = [times] if has_times else []
    offset = count
    for name, rows in order.items():
        history = groups[name].history
        history.place(offset)
        offset += len(history.x)
        if has_times:
            pool_times.append(history.times)
        for row in rows:
            pause_if_due()
            outcomes[row], window = history.join(row, times[row])
            if windows is not None:
                window_rows[row] = len(window)
                windows[row, -len(window) :] = window
    return JoinedRows(groups, order, outcomes, window_rows, pool, windows, pool_times, units)


def _units(
    rules: Rules, order: dict[str, list[int]], time: npt.NDArray[np.float64] | None, count: int
) -> GroupUnits | None:
    if rules.features is None or rules.baseline is None:
        return None
    index = _find_rows(rules.baseline, order, count)
    return GroupUnits(rules.features, index, np.full(count, np.nan) if time is None else time)


def _find_rows(baseline: Baseline, order: dict[str, list[int]], count: int) -> npt.NDArray[np.intp]:
    """Return the index of the group of each row in the baseline, [G]."""
    index = np.empty(count, np.intp)
    for name, rows in order.items():
        index[rows] = baseline.find(name)
    return index


def _order(
    time: npt.NDArray[np.float64] | None, names: Sequence[str | None] | None, count: int
) -> dict[str, list[int]]:
    """Return the rows of each group in order of time. Rows without a time follow the row before them."""
    rows: dict[str, list[int]] = {}
    if names is None:
        rows[""] = list(range(count))
    else:
        for row, name in enumerate(names):
            rows.setdefault(name or "", []).append(row)
    if time is None:
        return rows
    times = time.tolist()
    for name, of_group in rows.items():
        if len(of_group) > 1:
            keys: list[float] = []
            for row in of_group:
                keys.append(times[row] if times[row] == times[row] else keys[-1] if keys else -math.inf)
            rows[name] = [row for _, row in sorted(zip(keys, of_group, strict=True))]
    return rows


@dataclass(eq=False)
class Judgements:
    """The verdicts of the online calibrations on G rows, and what has happened to the groups meanwhile.

    Args:
        score: the adjusted scores, [G].
        p_value: [G].
        severity: [G].
        more_severities: the severities at further alphas, each [G].
        states: the state of the group's calibration after each row, [G].
        has_own_calibration: whether most of the scores that each row was compared with are of its group, [G].
        incidents: the groups whose incidents began, each as often as one began.
        changes: the groups whose incidents became changes.
        newest: for each group, the newest row that its calibration has counted, and the one before it in the request;
            None for no row.
    """

    score: Array
    p_value: Array
    severity: Array
    more_severities: list[Array]
    states: list[State]
    has_own_calibration: list[bool]
    incidents: list[str]
    changes: list[str]
    newest: dict[str, tuple[int, int | None]]


def judge(
    joined: JoinedRows,
    rules: Rules,
    score: Array,
    usable: npt.NDArray[np.bool_],
    time: npt.NDArray[np.float64] | None,
    fixed: tuple[Array, Array],
    alpha: float,
    extrapolated: bool,
    more_alphas: Sequence[float] = (),
    silenced: npt.NDArray[np.bool_] | None = None,
) -> Judgements:
    """Judge each row by the calibration of its group, and let new rows change the calibration.

    Args:
        joined: the rows; their groups have calibrations, which are changed.
        rules: how rows are joined.
        score: the scores, [G].
        usable: whether a row can get a verdict, [G].
        time: [G] in seconds, or None.
        fixed: the p-values and the severities by the calibration of the artifact, for rows that are not usable.
        alpha: the false-alarm rate.
        extrapolated: see `OnlineCalibration.judge`.
        more_alphas: further alphas at which severities are wanted.
        silenced: whether a silence holds for a row, which then changes no calibration, [G]; None: for no row.
    """
    count = len(score)
    p_values, severities = fixed[0].tolist(), fixed[1].tolist()
    alphas = (alpha, *more_alphas)
    more_severities = [severities.copy() for _ in more_alphas]
    states: list[State] = ["usual"] * count
    own = [False] * count
    incidents: list[str] = []
    changes: list[str] = []
    newest: dict[str, tuple[int, int | None]] = {}
    adjusted = adjust(joined, rules, score, time)
    scores, is_usable = adjusted.tolist(), usable.tolist()
    times = None if time is None else time.tolist()
    is_silenced = [False] * count if silenced is None else silenced.tolist()
    for name, rows in joined.order.items():
        group = joined.groups[name]
        calibration = group.calibration
        assert calibration is not None
        for row in rows:
            pause_if_due()
            own[row] = group.has_own_calibration
            if is_usable[row]:
                p_values[row], (severities[row], *others) = calibration.judge_at(scores[row], alphas, extrapolated)
                for of_alpha, severity_at in zip(more_severities, others, strict=True):
                    of_alpha[row] = severity_at
                is_counted = joined.outcomes[row] == Outcome.NEW and not is_silenced[row]
                if is_counted and joined.window_rows[row] >= rules.least_rows:
                    newest[name] = row, newest.get(name, (None,))[0]
                    before = calibration.incidents, calibration.changes
                    calibration.step(scores[row], math.nan if times is None else times[row])
                    if calibration.incidents != before[0]:
                        incidents.append(name)
                    if calibration.changes != before[1]:
                        changes.append(name)
            states[row] = calibration.state
    p_value, severity = np.array(p_values, np.float32), np.array(severities, np.float32)
    more = [np.array(of_alpha, np.float32) for of_alpha in more_severities]
    return Judgements(adjusted, p_value, severity, more, states, own, incidents, changes, newest)


def remember_newest(
    joined: JoinedRows,
    judgements: Judgements,
    contribution: Array,
    time: npt.NDArray[np.float64] | None,
    missing: npt.NDArray[np.bool_] | None,
) -> None:
    """Let each group remember the newest of its rows that its calibration has counted, if this row has a time.

    Args:
        joined: the rows and their groups. The function changes the groups.
        judgements: the verdicts on the rows.
        contribution: contributions of the features to the scores, [G, D].
        time: [G] in seconds, NaN for rows without a time; None if no row has a time.
        missing: which values of the rows are replacements of missing ones, [G, D]; None: none.
    """
    if time is None:
        return
    for name, (row, row_before) in judgements.newest.items():
        at, group = float(time[row]), joined.groups[name]
        if at != at:
            continue
        pause_if_due()
        if row_before is not None:
            before = float(time[row_before])
        else:
            before = _NEWEST.unpack_from(group.newest)[0] if group.newest else math.nan
        values = joined.pool[row]
        if missing is not None:
            values = np.where(missing[row], np.float32(np.nan), values)
        score = min(max(float(judgements.score[row]), -MAX_FLOAT32), MAX_FLOAT32)
        p_value = float(judgements.p_value[row])
        group.newest = NewestRow(at, at - before, score, p_value, values, contribution[row]).dump()


def adjust(joined: JoinedRows, rules: Rules, score: Array, time: npt.NDArray[np.float64] | None) -> Array:
    """Return the scores [G] that calibrations compare: adjusted by the baseline of the group and the time."""
    baseline = rules.baseline
    if baseline is None:
        return score
    if len(score) == 1:
        (name,) = joined.order
        index = np.array([baseline.find(name)])
        return baseline.adjust(score, index, np.array([np.nan]) if time is None else time)
    index = _find_rows(baseline, joined.order, len(score)) if joined.units is None else joined.units.index
    return baseline.adjust(score, index, np.full(len(score), np.nan) if time is None else time)
