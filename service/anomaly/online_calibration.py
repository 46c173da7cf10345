"""Online calibration: keep the false-alarm rate of one group of rows near 5 % while the group's data change.

The calibration of an artifact is fixed. Its p-values promise a false-alarm rate of alpha for rows that are
exchangeable with the calibration rows. The rows of a server are not: their distribution drifts. `OnlineCalibration`
compares each score with the recent scores of the same group instead, and corrects the remaining error of the rate.

Rule
----
Each score is first judged by the state before it (`judge`), and then changes the state (`step`).

1. The raw p-value of a score is (1 + number of scores in the calibration set >= score) / (n + 1), where the calibration
   set holds the last SET_ROWS scores that were learnt. The p-value is 1 - (1 - raw p-value)^exp(correction). The
   correction moves all p-values, so that the thresholds of all alphas move together.
2. A row is an alarm of the state if its p-value is at most REFERENCE_ALPHA, whatever alpha clients ask for. A counter
   goes up by one with an alarm and down by one, to at least 0, with any other row. Rows are held back, and not learnt,
   until the counter is 0. If the counter reaches `incident_alarms`, the held rows are an incident.
3. If the counter returns to 0, the held rows are learnt. But if they were an incident, they are discarded: nothing is
   learnt from an incident that ends.
4. If `incident_rows` rows are held and they are not an incident, they are learnt. If they are an incident, the data
   have changed: the held rows become the calibration set. The former set is remembered for FORMER_ROWS rows. It
   returns as soon as the rows fit it again.
5. When rows are learnt, the correction goes up by CORRECTION_STEP for each alarm among them, and down by
   CORRECTION_STEP * REFERENCE_ALPHA for each row. It stays within +-MAX_CORRECTION.

Assumption: an incident is over within `incident_rows` rows after it began, and a change is not. A level shift that will
stay and an incident that has lasted for `incident_rows` rows look the same, so that no rule without labels can be quick
about the one and blind to the other. A person who knows better can say so: see `normal`, `incident`, `add` and
`remove`. An incident that affects fewer than half of its rows is not recognised, and is learnt.

Guarantee
---------
(i) Without any assumption: `counted_alarms` is REFERENCE_ALPHA * `counted_rows` + `correction` / CORRECTION_STEP +
    `lost`, where `counted` means learnt. While `lost` is 0, the share of alarms among n learnt rows lies within
    MAX_CORRECTION / CORRECTION_STEP / n = 139 / n of 5 %: 1.4 percentage points after 10,000 rows. This is the argument
    of adaptive conformal inference (Gibbs & Candès, "Adaptive conformal inference under distribution shift", NeurIPS
    2021; Angelopoulos, Barber & Bates, "Online conformal prediction with decaying step sizes", ICML 2024). Discarded
    and held rows are outside this sum; they are counted separately. So are scores that `add` and `remove` change.
(ii) If a row is exchangeable with the calibration set, the probability that its raw p-value is at most alpha is at most
    alpha, for every alpha (Vovk, Gammerman & Shafer, "Algorithmic learning in a random world", 2005, prop. 2.4). The
    correction can at most double alpha, and does so only after too few alarms.
(iii) If scores are stationary and forget their past, the rate tends to alpha, up to the sampling error of SET_ROWS
    rows.
(iv) If scores drift slowly, the error of the rate at one moment is at most the drift within SET_ROWS rows, as the sum
    of total-variation distances (Barber, Candès, Ramdas & Tibshirani, "Conformal prediction beyond exchangeability",
    Annals of Statistics 2023).
(v) Nothing is guaranteed for normal rows within an incident. (i) holds at REFERENCE_ALPHA only: the rates at other
    alphas follow through the calibration set.
"""

import math
import struct
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt

State = Literal["usual", "incident", "changed"]

SET_ROWS = 1000  # scores in the calibration set; the smallest raw p-value is 1 / 1001
REFERENCE_ALPHA = 0.05  # the alpha at which the state counts alarms
INCIDENT_ROWS = 120  # an incident that lasts this many rows is a change; more costs false alarms after every change
MIN_INCIDENT_ROWS = 30  # smallest valid value of `incident_rows`
FORMER_ROWS = 500  # rows after a change during which the former set can return
RETURN_ROWS = 100  # the former set returns once it found this many rows more usual than RETURN_ALARM times its alarms
RETURN_ALARM = 9  # so the former set returns only if it alarms on fewer than one row in ten
# Slower than the calibration set is renewed, so that the two do not work against each other.
CORRECTION_STEP = 5 / SET_ROWS
MAX_CORRECTION = math.log(2)  # the correction at most halves or doubles small p-values
ROUNDING = 1e-5  # as in `models.calibration`: largest relative difference between the scores of one row in two batches
TAIL_SHARE = 0.1  # share of the calibration set, the largest scores, to which the exponential tail is fitted
NEXT_AFTER_ONE = 1 + 1.2e-7  # rounds to the next float32 after 1
MAX_FLOAT32 = float(np.finfo(np.float32).max)
MIN_ROWS_AFTER_INCIDENT = 80  # an incident is this many rows old, or older, before it becomes a change
RECENT_ROWS = 240  # rows whose times and scores are remembered for feedback: four hours at one row a minute
MIN_SET_ROWS = 20  # scores that `remove` leaves at least; a p-value of 5 % needs 19

# A record: magic; CRC-32 of all bytes after it; header; times; scores.
# - The header: the numbers of scores in the calibration set, in the former set, in the held rows and in the recent
#   rows; how many scores of the first two are the group's own; whether the held rows are an incident; the integers and
#   the floats named below.
# - The times of the recent rows, oldest first, as float64.
# - The scores: the calibration set, the former set, the held rows and the recent rows, each oldest first, as float32.
_MAGIC = b"EOC2"
_CHECKED = struct.Struct("<4sI")
_INTEGERS = (
    "window_rows", "incident_rows", "rows", "alarms", "counted_rows", "counted_alarms", "discarded_rows",
    "discarded_alarms", "incidents", "changes", "returns", "_count", "_held_alarms", "_quiet", "_rows_since_change",
)  # fmt: skip
_FLOATS = ("correction", "lost", "_held_since", "_changed_since")
_HEADER = struct.Struct(f"<6H?{len(_INTEGERS)}q{len(_FLOATS)}d")
MAX_BYTES = _CHECKED.size + _HEADER.size + 4 * 3 * SET_ROWS + 12 * RECENT_ROWS


class CorruptRecordError(ValueError):
    """The bytes are not a record of `OnlineCalibration.dump`."""


def default_incident_alarms(window_rows: int, incident_rows: int) -> int:
    """Return by how many rows alarms must outnumber other rows to be an incident.

    One strange row raises `window_rows` alarms. Twenty more alarms than other rows have the probability (1 / 19)^20.
    """
    return min(20 + 2 * window_rows, incident_rows - 1)


def default_incident_rows(window_rows: int) -> int:
    """Return how many rows an incident lasts before it is a change, for a model with a window of `window_rows` rows."""
    return min(max(INCIDENT_ROWS, 20 + 2 * window_rows + MIN_ROWS_AFTER_INCIDENT), SET_ROWS)


class _CalibrationSet:
    """The last SET_ROWS learnt scores, in order of arrival and in order of size.

    Args:
        scores: float32 scores, oldest first. The oldest are dropped if there are more than SET_ROWS.
        own: how many of the newest scores are of the group itself.
    """

    __slots__ = ("_arrival", "_oldest", "_ordered", "own")

    def __init__(self, scores: "array[float]", own: int) -> None:
        self._arrival = scores[-SET_ROWS:]
        self._oldest = 0  # index of the oldest score in _arrival, which is a ring once it is full
        self._ordered = array("f", np.sort(np.frombuffer(self._arrival, np.float32)).tobytes())
        self.own = min(own, len(self._arrival))

    def __len__(self) -> int:
        return len(self._ordered)

    def oldest_first(self) -> "array[float]":
        return self._arrival[self._oldest :] + self._arrival[: self._oldest]

    def add(self, score: float) -> None:
        """Add a score; if the set is full, the oldest score leaves."""
        ordered = self._ordered
        if len(ordered) < SET_ROWS:
            self._arrival.append(score)
        else:
            oldest = self._arrival[self._oldest]
            del ordered[bisect_left(ordered, oldest)]
            self._arrival[self._oldest] = score
            self._oldest = (self._oldest + 1) % SET_ROWS
        ordered.insert(bisect_right(ordered, score), score)
        self.own = min(self.own + 1, SET_ROWS)

    def without(self, is_removed: npt.NDArray[np.bool_]) -> "_CalibrationSet":
        """Return a set without the scores for which `is_removed`, oldest first, is true."""
        kept = np.frombuffer(self.oldest_first(), np.float32)[~is_removed]
        own = int((~is_removed[len(is_removed) - self.own :]).sum())
        return _CalibrationSet(array("f", kept.tobytes()), own)

    def p_value(self, score: float) -> float:
        n = len(self._ordered)
        return (1 + n - bisect_left(self._ordered, score)) / (n + 1)

    def threshold(self, alpha: float) -> tuple[float, float, bool]:
        """Return the score above which p <= alpha, the share of rows above it, and whether a p-value can be as small.

        If no p-value is as small as alpha, the threshold comes from the fitted tail, and the share is alpha.
        """
        ordered = self._ordered
        n = len(ordered)
        allowed = int(alpha * (n + 1) + 1e-6) - 1  # p <= alpha if at most this many scores are >= the score
        if allowed < 0:
            return ordered[-1] + self._tail() * (-math.log(alpha) - math.log(n + 1)), alpha, False
        place = n - 1 - min(allowed, n - 1)
        threshold = ordered[place]
        return threshold, (n + 1 - bisect_right(ordered, threshold, place)) / (n + 1), True

    def surprisal(self, score: float) -> float:
        """Return minus the log of the probability that a normal row scores higher: see `models.calibration`."""
        ordered = self._ordered
        n = len(ordered)
        place = bisect_right(ordered, score)
        if place == 0:
            return math.log((n + 1) / n) * math.exp(min(0.0, (score - ordered[0]) / self._tail()))
        if place == n:
            return math.log(n + 1) + (score - ordered[-1]) / self._tail()
        lower, upper = ordered[place - 1], ordered[place]
        low, high = math.log((n + 1) / (n - place + 1)), math.log((n + 1) / (n - place))
        return low + (high - low) * (score - lower) / (upper - lower)

    def _tail(self) -> float:
        """Return the mean excess of the largest scores: the scale of an exponential tail."""
        ordered = self._ordered
        n = len(ordered)
        rows = max(1, round(TAIL_SHARE * n))
        excess = math.fsum(ordered[-rows:]) / rows - ordered[-min(rows + 1, n)]
        return max(excess, 1e-6 * max(1.0, abs(ordered[-1])))


class OnlineCalibration:
    """The calibration of one group. See the module's docstring for the rule and its guarantee.

    Scores have a spread of about 1, as adjusted scores have (`models.baseline`). They are rounded to float32. A score
    that is not a finite number counts as the largest float32.

    Attributes:
        window_rows, incident_rows: the arguments.
        incident_alarms: alarms that outnumber other rows by this many are an incident.
        rows, alarms: rows and alarms at REFERENCE_ALPHA so far: those that were counted, discarded, or are still held.
        counted_rows, counted_alarms: rows that were learnt, and alarms among them.
        discarded_rows, discarded_alarms: rows from which nothing was learnt, because an incident ended.
        correction: the exponent that corrects p-values; above 0 after too many alarms.
        lost: alarms that the limits of the correction left uncorrected. See guarantee (i).
        incidents: incidents begun.
        changes: incidents that lasted so long that their rows became the calibration set.
        returns: changes after which the former set returned.

    Args:
        start: scores of normal rows, oldest first, at least one: of the group, or quantiles of the scores of other
            groups. Only the last SET_ROWS count. The group's own rows replace them one by one.
        window_rows: rows in the model's window; 1 for a model without a window.
        incident_rows: rows after which an incident is a change; by default `default_incident_rows(window_rows)`.

    Raises:
        ValueError: `start` is empty, or a length is out of range.
    """

    __slots__ = (
        "_changed_since", "_count", "_former", "_held", "_held_alarms", "_held_since", "_incident", "_quiet",
        "_recent_scores", "_recent_times", "_rows_since_change", "_set", "alarms", "changes", "correction",
        "counted_alarms", "counted_rows", "discarded_alarms", "discarded_rows", "incident_alarms", "incident_rows",
        "incidents", "lost", "returns", "rows", "window_rows",
    )  # fmt: skip

    def __init__(self, start: Iterable[float], window_rows: int = 1, *, incident_rows: int | None = None) -> None:
        scores = array("f", [_float32(score) for score in start])
        if not scores:
            raise ValueError("expected at least one score to start from, got none")
        if window_rows < 1:
            raise ValueError(f"expected a window of at least 1 row, got {window_rows}")
        if incident_rows is None:
            incident_rows = default_incident_rows(window_rows)
        if not MIN_INCIDENT_ROWS <= incident_rows <= SET_ROWS:
            raise ValueError(f"expected incident_rows from {MIN_INCIDENT_ROWS} to {SET_ROWS}, got {incident_rows}")
        self.window_rows = window_rows
        self.incident_rows = incident_rows
        self.incident_alarms = default_incident_alarms(window_rows, incident_rows)
        self.rows = self.alarms = self.counted_rows = self.counted_alarms = 0
        self.discarded_rows = self.discarded_alarms = self.incidents = self.changes = self.returns = 0
        self.correction = self.lost = 0.0
        self._set = _CalibrationSet(scores, own=0)
        self._former: _CalibrationSet | None = None
        self._quiet = self._rows_since_change = 0
        self._count = 0
        self._incident = False
        self._held = array("f")
        self._held_alarms = 0
        self._held_since = self._changed_since = math.nan
        self._recent_scores, self._recent_times = array("f"), array("d")

    @property
    def state(self) -> State:
        """Return "incident" while one is under way, "changed" while the former set is remembered, else "usual"."""
        if self._incident:
            return "incident"
        return "usual" if self._former is None else "changed"

    @property
    def since(self) -> float:
        """The time of the first row of the incident or the change; NaN in the state "usual" or without times."""
        if self._incident:
            return self._held_since
        return math.nan if self._former is None else self._changed_since

    @property
    def set_rows(self) -> int:
        """The number of scores in the calibration set."""
        return len(self._set)

    @property
    def own_rows(self) -> int:
        """The number of scores in the calibration set that are the group's own, and not of the start set."""
        return self._set.own

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """The scores in the calibration set, oldest first."""
        return np.array(self._set.oldest_first(), np.float32)

    @property
    def held_rows(self) -> int:
        """The number of rows that are neither learnt nor discarded yet."""
        return len(self._held)

    @property
    def held_alarms(self) -> int:
        """The number of alarms among the held rows."""
        return self._held_alarms

    @property
    def floor(self) -> float:
        """The smallest p-value that a row can get now."""
        return self._corrected(1 / (len(self._set) + 1))

    def threshold(self, alpha: float) -> float:
        """Return the score above which a row is anomalous at alpha; below the floor, it is extrapolated."""
        return self._set.threshold(self._raw(alpha))[0]

    def judge(self, score: float, alpha: float, extrapolated: bool = False) -> tuple[float, float]:
        """Return the p-value and the severity of a row, and change nothing.

        The severity is above 1 if and only if the p-value is at most alpha, up to rounding. If alpha is below the
        floor, no p-value is as small, and the severity is at most 1. With `extrapolated`, a tail that is fitted to the
        largest scores decides instead. This is an extrapolation without a guarantee.

        Args:
            score: the row's score.
            alpha: the false-alarm rate, between 0 and 1, both excluded.
            extrapolated: whether a row may be anomalous although alpha is below the floor.
        """
        p_value, (severity,) = self.judge_at(score, (alpha,), extrapolated)
        return p_value, severity

    def judge_at(self, score: float, alphas: Iterable[float], extrapolated: bool = False) -> tuple[float, list[float]]:
        """Return the p-value of a row and its severity at each alpha, and change nothing. See `judge`."""
        score = _float32(score)
        p_value = self._corrected(self._set.p_value(score))
        surprisal = self._surprisal(score)
        severities = []
        for alpha in alphas:
            threshold, share, is_reached = self._set.threshold(self._raw(alpha))
            severity = surprisal / max(-math.log(self._corrected(share)), 1e-9)
            if score <= threshold or not (extrapolated or is_reached):
                severities.append(min(severity, 1.0))
            else:
                severities.append(max(severity, NEXT_AFTER_ONE))
        return p_value, severities

    def step(self, score: float, time: float = math.nan) -> None:
        """Take in a row of the group: the next one in order of time, after it was judged.

        Args:
            score: the row's score.
            time: the row's time, in any unit; `since` is in the same unit.
        """
        score = _float32(score)
        alarm = score > self.threshold(REFERENCE_ALPHA)
        self.rows += 1
        self.alarms += alarm
        if not self._held:
            self._held_since = time
        self._held.append(_raised(score))
        self._held_alarms += alarm
        self._recent_scores.append(score)
        self._recent_times.append(time)
        if len(self._recent_times) > RECENT_ROWS:
            del self._recent_scores[0], self._recent_times[0]
        self._count = min(self._count + 1, self.incident_alarms) if alarm else max(self._count - 1, 0)
        if self._count == self.incident_alarms and not self._incident:
            self._incident = True
            self.incidents += 1
        if self._count == 0 and self._incident:
            self._discard()
        elif self._count == 0:
            self._learn()
        elif len(self._held) >= self.incident_rows:
            self._change() if self._incident else self._learn()
        if self._former is not None:
            self._watch_former(self._former, score)

    def normal(self) -> None:
        """Take in that the latest rows were normal, although they raised alarms: "this was normal".

        During an incident, its rows become the calibration set at once, and the former set is remembered. In the state
        "changed", the former set is forgotten. Otherwise held rows are learnt.
        """
        if self._incident:
            self._change()
            return
        self._former = None
        if self._held:
            self._learn()
        self._count = 0

    def incident(self) -> None:
        """Take in that the latest rows were an incident: "this was an incident".

        In the state "changed", the former set returns. Held rows are discarded. If the incident goes on, it becomes a
        change after another `incident_rows` rows.
        """
        if self._former is not None:
            self._return(self._former)
        else:
            self._discard()

    @property
    def remembered_since(self) -> float:
        """The time from which on all rows are remembered: that of the oldest remembered row.

        It is minus infinity if no row has been forgotten yet, and infinity if no remembered row has a time.
        """
        if len(self._recent_times) == self.rows:
            return -math.inf
        return min((time for time in self._recent_times if time == time), default=math.inf)

    def recent(self, since: float, until: float) -> npt.NDArray[np.float32]:
        """Return the scores of the remembered rows from `since` to `until`, both included, in the unit of `step`."""
        times = np.array(self._recent_times, np.float64)
        return np.array(self._recent_scores, np.float32)[(times >= since) & (times <= until)]

    def add(self, scores: npt.NDArray[np.float32]) -> None:
        """Obey the feedback that the rows with these scores, oldest first, were normal.

        Scores that the calibration set does not have yet are added to it, so adding the same scores again changes
        nothing. Scores of held rows are not added one by one: if at least half of the held rows are among the scores,
        `normal` is called; otherwise the held rows stay held.
        """
        scores = _raised_all(scores)
        is_held, held = _match(scores, np.array(self._held, np.float32))
        if len(held) and 2 * held.sum() >= len(held):
            self.normal()
        rest = scores[~is_held]
        is_known, _ = _match(rest, self.scores)
        for score in rest[~is_known].tolist():
            self._set.add(score)

    def remove(self, scores: npt.NDArray[np.float32]) -> None:
        """Obey the feedback that the rows with these scores were an incident.

        All held rows are discarded if at least half of them are among the scores. If there is a former set, and at
        least half of the calibration set is among the scores, the former set returns. Otherwise the scores are removed
        from the calibration set, oldest first, as long as it has more than MIN_SET_ROWS scores. Rows are recognised by
        their scores: if two rows of a group have the same score, that of the wrong row may be removed.
        """
        scores = _raised_all(scores)
        is_held, held = _match(scores, np.array(self._held, np.float32))
        if len(held) and 2 * held.sum() >= len(held):
            self._discard()
        _, is_removed = _match(scores[~is_held], self.scores)
        if self._former is not None and 2 * is_removed.sum() >= len(is_removed):
            self._return(self._former)
            return
        allowed = max(0, len(is_removed) - MIN_SET_ROWS)
        is_removed[np.flatnonzero(is_removed)[allowed:]] = False
        if is_removed.any():
            self._set = self._set.without(is_removed)

    def dump(self) -> bytes:
        """Return the state as at most MAX_BYTES bytes, from which `load` makes an equal object."""
        former = array("f") if self._former is None else self._former.oldest_first()
        header = _HEADER.pack(
            len(self._set),
            len(former),
            len(self._held),
            len(self._recent_times),
            self._set.own,
            0 if self._former is None else self._former.own,
            self._incident,
            *(getattr(self, name) for name in _INTEGERS),
            *(getattr(self, name) for name in _FLOATS),
        )
        scores = (self._set.oldest_first(), former, self._held, self._recent_scores)
        body = b"".join((header, self._recent_times, *scores))
        return _CHECKED.pack(_MAGIC, zlib.crc32(body)) + body

    @classmethod
    def load(cls, record: bytes | memoryview) -> "OnlineCalibration":
        """Return the calibration that `dump` wrote.

        Raises:
            CorruptRecordError: the record is cut off, altered or of another format.
        """
        body = _checked_body(record)
        rows, former_rows, held_rows, recent_rows, own, former_own, incident, *numbers = _HEADER.unpack_from(body)
        times, scores = array("d"), array("f")
        times.frombytes(body[_HEADER.size : _HEADER.size + 8 * recent_rows])
        scores.frombytes(body[_HEADER.size + 8 * recent_rows :])
        loaded = cls.__new__(cls)
        for name, value in zip(_INTEGERS + _FLOATS, numbers, strict=True):
            setattr(loaded, name, value)
        loaded.incident_alarms = default_incident_alarms(loaded.window_rows, loaded.incident_rows)
        loaded._incident = incident
        loaded._set = _CalibrationSet(scores[:rows], own)
        former = scores[rows : rows + former_rows]
        loaded._former = _CalibrationSet(former, former_own) if former else None
        loaded._held = scores[rows + former_rows : rows + former_rows + held_rows]
        loaded._recent_times, loaded._recent_scores = times, scores[rows + former_rows + held_rows :]
        return loaded

    def _corrected(self, p_value: float) -> float:
        return 1.0 if p_value >= 1.0 else -math.expm1(math.exp(self.correction) * math.log1p(-p_value))

    def _raw(self, alpha: float) -> float:
        """Return the raw p-value that is corrected to alpha."""
        return -math.expm1(math.exp(-self.correction) * math.log1p(-alpha))

    def _surprisal(self, score: float) -> float:
        """Return the surprisal of a score, corrected like the p-values."""
        surprisal = max(self._set.surprisal(score), 0.0)
        if self.correction == 0.0 or surprisal == 0.0:
            return surprisal
        if surprisal > 30.0:  # the corrected probability is exp(correction) times as large, up to rounding
            return surprisal - self.correction
        return -math.log(self._corrected(math.exp(-surprisal)))

    def _learn(self) -> None:
        """Add the held rows to the calibration set."""
        self._count_held()
        for score in self._held:
            self._set.add(score)
        self._release()

    def _change(self) -> None:
        """Let the held rows be the calibration set, and remember the former one."""
        self._count_held()
        if self._former is None:
            self._former = self._set
            self._quiet = RETURN_ROWS
            self._rows_since_change = 0
            self._changed_since = self._held_since
        self._set = _CalibrationSet(self._held, own=len(self._held))
        self.changes += 1
        self._count = 0
        self._release()

    def _count_held(self) -> None:
        """Correct for the share of alarms among the held rows, which are about to be learnt."""
        rows, alarms = len(self._held), self._held_alarms
        wanted = self.correction + CORRECTION_STEP * (alarms - REFERENCE_ALPHA * rows)
        self.correction = min(MAX_CORRECTION, max(-MAX_CORRECTION, wanted))
        self.lost += (wanted - self.correction) / CORRECTION_STEP
        self.counted_rows += rows
        self.counted_alarms += alarms

    def _watch_former(self, former: _CalibrationSet, score: float) -> None:
        """Return to the former set if the rows fit it again, and forget it after FORMER_ROWS rows."""
        usual = self._corrected(former.p_value(score)) > REFERENCE_ALPHA
        self._quiet = self._quiet - 1 if usual else min(self._quiet + RETURN_ALARM, RETURN_ROWS)
        if self._quiet <= 0:
            self._return(former)
        elif self._rows_since_change >= FORMER_ROWS:
            self._former = None
        self._rows_since_change += 1

    def _return(self, former: _CalibrationSet) -> None:
        self._set, self._former = former, None
        self.returns += 1
        self._discard()

    def _discard(self) -> None:
        self.discarded_rows += len(self._held)
        self.discarded_alarms += self._held_alarms
        self._count = 0
        self._release()

    def _release(self) -> None:
        self._held = array("f")
        self._held_alarms = 0
        self._incident = False


def _float32(score: float) -> float:
    """Return a score rounded to float32; the largest float32 if it is not a finite number."""
    if -MAX_FLOAT32 <= score <= MAX_FLOAT32:
        return array("f", (score,))[0]
    return MAX_FLOAT32


def _raised(score: float) -> float:
    """Return a score raised by the largest rounding error, as `models.calibration` raises calibration scores.

    A host whose rows stay the same would otherwise raise alarms because of rounding.
    """
    return min(score + ROUNDING * (1.0 + abs(score)), MAX_FLOAT32)


def _raised_all(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.array([_raised(_float32(score)) for score in scores.tolist()], np.float32)


def _match(
    scores: npt.NDArray[np.float32], others: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Pair equal scores, and return which of `scores` and which of `others` have a partner.

    Each score has at most one partner. If several are equal, the oldest, which come first, are paired first. Scores
    count as equal if they differ by at most twice the largest rounding error, because `_raised` may have changed one.
    """
    is_matched, is_other_matched = np.zeros(len(scores), bool), np.zeros(len(others), bool)
    order, other_order = np.argsort(scores, kind="stable").tolist(), np.argsort(others, kind="stable").tolist()
    values, other_values = scores.tolist(), others.tolist()
    i = j = 0
    while i < len(order) and j < len(other_order):
        value, other = values[order[i]], other_values[other_order[j]]
        if abs(value - other) <= 2 * ROUNDING * (1.0 + abs(value)):
            is_matched[order[i]] = is_other_matched[other_order[j]] = True
            i, j = i + 1, j + 1
        elif value < other:
            i += 1
        else:
            j += 1
    return is_matched, is_other_matched


def count_differences(before: npt.NDArray[np.float32], after: npt.NDArray[np.float32]) -> tuple[int, int]:
    """Return how many of the scores after a change were not there before it, and how many of those before are gone."""
    changes = np.unique(np.concatenate((before, after)), return_inverse=True)[1]
    counts = np.bincount(changes[len(before) :], minlength=changes.max() + 1)
    counts -= np.bincount(changes[: len(before)], minlength=len(counts))
    return int(counts.clip(min=0).sum()), int(-counts.clip(max=0).sum())


def _checked_body(record: bytes | memoryview) -> memoryview:
    """Return a record without magic and checksum."""
    if len(record) < _CHECKED.size + _HEADER.size:
        raise CorruptRecordError(
            f"expected at least {_CHECKED.size + _HEADER.size} bytes of online calibration, got {len(record)}"
        )
    magic, checksum = _CHECKED.unpack_from(record)
    if magic != _MAGIC:
        raise CorruptRecordError(f"expected online calibration that begins with {_MAGIC!r}, got {magic!r}")
    body = memoryview(record)[_CHECKED.size :]
    size, former, held, recent = _HEADER.unpack_from(body)[:4]
    length = _HEADER.size + 4 * (size + former + held) + 12 * recent
    if len(body) != length:
        raise CorruptRecordError(
            f"expected {_CHECKED.size + length} bytes of online calibration with {size} + {former} + {held} scores "
            f"and {recent} recent rows, got {len(record)}"
        )
    if zlib.crc32(body) != checksum:
        raise CorruptRecordError("the checksum of the online calibration does not match its bytes: they were altered")
    if not (1 <= size <= SET_ROWS and former <= SET_ROWS and held <= SET_ROWS and recent <= RECENT_ROWS):
        raise CorruptRecordError(
            f"expected 1 to {SET_ROWS} scores and at most {RECENT_ROWS} recent rows, got {size}, {former} former and "
            f"{held} held scores, and {recent} recent rows"
        )
    return body
