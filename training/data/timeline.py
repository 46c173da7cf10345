"""When each row of a table was measured, and which group it belongs to, such as a host."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property

import numpy as np
import numpy.typing as npt

from models.errors import join_names
from training.data.line_numbers import LineNumbers, describe_row

GAP_STEPS = 1.5  # a step longer than this many usual steps of its group is a gap: at least one row is missing
MAX_GAP_SHARE = 0.1  # if more than this share of the steps are gaps, the rows are irregular, and gaps mean nothing
LISTED_NAMES = 3  # number of groups that a note lists before "and N more"
SECOND = 10**9  # nanoseconds
UNITS = (
    ("d", 86_400 * SECOND),
    ("h", 3_600 * SECOND),
    ("min", 60 * SECOND),
    ("s", SECOND),
    ("ms", 10**6),
    ("us", 1000),
)

Nanoseconds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Timeline:
    """The time and the group of each of N rows. The rows are sorted by group and, within a group, by time.

    Rows of one group at one time are in the order of the source. A source without a column of groups has one group.
    """

    time: Nanoseconds  # [N] since 1970 in UTC
    group: npt.NDArray[np.int32]  # [N] index of `groups`
    groups: tuple[str, ...]  # names of the G groups, sorted; one empty name if there is no column of groups
    time_column: str
    group_column: str | None
    source_rows: npt.NDArray[np.int64]  # [N] number of the row in the source, counted from 0
    lines: LineNumbers | None = field(default=None, repr=False)  # lines of the rows in the source, for text files

    def __len__(self) -> int:
        return len(self.time)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """The first row of each group, and N: group g has the rows starts[g] up to, not including, starts[g + 1]."""
        return np.searchsorted(self.group, np.arange(len(self.groups) + 1))

    @cached_property
    def steps(self) -> Nanoseconds:
        """The time since the previous row of the same group, [N]; -1 for the first row of a group."""
        steps = np.diff(self.time, prepend=self.time[:1])
        steps[self.starts[:-1]] = -1
        return steps

    @cached_property
    def usual_steps(self) -> Nanoseconds:
        """The usual time between two rows of each group, [G]: the median step; 0 if all rows have the same time."""
        usual = np.zeros(len(self.groups), np.int64)
        for index, (start, end) in enumerate(zip(self.starts[:-1], self.starts[1:], strict=True)):
            steps = self.steps[start:end]
            steps = steps[steps > 0]
            usual[index] = np.median(steps) if len(steps) else 0
        return usual

    @cached_property
    def usual_step(self) -> int:
        """The usual time between two rows of a group, in nanoseconds: the median over groups; 0 if it is unknown."""
        known = self.usual_steps[self.usual_steps > 0]
        return int(np.median(known)) if len(known) else 0

    @cached_property
    def after_gap(self) -> npt.NDArray[np.bool_]:
        """Whether a row follows a gap, [N]: a step longer than GAP_STEPS usual steps of its group."""
        usual = self.usual_steps[self.group]
        return np.asarray((usual > 0) & (self.steps > GAP_STEPS * usual))

    def where(self, row: int) -> str:
        """Return how a message refers to `row` of the sorted rows: by its place in the source."""
        return describe_row(int(self.source_rows[row]), self.lines)

    def name(self, row: int) -> str:
        """Return the group of `row` for a message: ` of 'web-1'`; empty if there is no column of groups."""
        return "" if self.group_column is None else f" of {self.groups[self.group[row]]!r}"

    def without(self, rows: npt.NDArray[np.int64]) -> "Timeline":
        """Return the timeline without these rows. Every group must keep a row."""
        kept = np.ones(len(self), bool)
        kept[rows] = False
        return replace(self, time=self.time[kept], group=self.group[kept], source_rows=self.source_rows[kept])

    def notes(self) -> list[str]:
        """Return what the user should know about the times: step, order, rows at the same time, and gaps."""
        return [*self._note_on_rows(), *self._note_on_order(), *self._note_on_equal_times(), *self._note_on_gaps()]

    def _note_on_rows(self) -> Iterator[str]:
        span = describe_period(int(self.time.min()), int(self.time.max()))
        step = f", usually a row every {describe_duration(self.usual_step)}" if self.usual_step else ""
        groups = f" in {len(self.groups):,} groups by {self.group_column!r}" if self.group_column else ""
        yield f"times are read from {self.time_column!r}: {span}{step}{groups}"

    def _note_on_order(self) -> Iterator[str]:
        late = int((np.diff(self.source_rows) < 0)[np.diff(self.group) == 0].sum())
        if late:
            yield "the rows of the source are not in the order of their times: they were put in order"

    def _note_on_equal_times(self) -> Iterator[str]:
        equal = np.flatnonzero(self.steps == 0)
        if not len(equal):
            return
        first = int(equal[0])
        advice = (
            f"correct the times in {self.time_column!r}, or give the rows of each device a group of its own"
            if self.group_column
            else "if the file has rows of several hosts, name the column of the host with --group"
        )
        yield (
            f"WARNING: {len(equal):,} rows have the same time as another row{self.name(first)}, but other values (the "
            f"first: {self.where(first - 1)} and {self.where(first)}, {format_moment(int(self.time[first]))}). They "
            f"stay in the order of the source; {advice}. Local times repeat an hour when summer time ends: write UTC"
        )

    def _note_on_gaps(self) -> Iterator[str]:
        gaps = np.flatnonzero(self.after_gap)
        moved = int((self.steps > 0).sum())
        if not len(gaps):
            return
        if len(gaps) > MAX_GAP_SHARE * moved:
            low, high = np.quantile(self.steps[self.steps > 0], (0.1, 0.9))
            yield (
                f"the rows are not evenly spaced in time: eight of ten follow the previous row after "
                f"{describe_duration(int(low))} to {describe_duration(int(high))}"
            )
            return
        longest = int(gaps[np.argmax(self.steps[gaps])])
        groups = len(np.unique(self.group[gaps]))
        within = f" in {groups:,} of {len(self.groups):,} groups" if self.group_column else ""
        count = "1 gap" if len(gaps) == 1 else f"{len(gaps):,} gaps"
        name = self.name(longest) and f",{self.name(longest)},"
        period = describe_period(int(self.time[longest - 1]), int(self.time[longest]))
        yield (
            f"{count} in time{within}; the longest{name} lasts "
            f"{describe_duration(int(self.steps[longest]))} ({period}, before {self.where(longest)})"
        )


def list_groups(timeline: Timeline, groups: npt.NDArray[np.int64]) -> str:
    """Return the names of the groups with these indices, for a message."""
    return join_names([timeline.groups[index] for index in groups], LISTED_NAMES)


def to_iso(nanoseconds: int) -> str:
    """Return a moment in ISO 8601 and UTC, exact to the microsecond."""
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=nanoseconds // 1000)).isoformat()


def format_moment(nanoseconds: int) -> str:
    """Return a moment for a message, to the minute if it is a whole minute: `2024-01-31 12:00`."""
    text = to_iso(nanoseconds).removesuffix("+00:00").replace("T", " ")
    return text.removesuffix(":00") if text.count(":") == 2 else text


def describe_period(first: int, last: int) -> str:
    """Return a period in UTC for a message, exact to the minute unless it is shorter than that."""
    minute = 60 * SECOND
    if first // minute == last // minute:
        return f"{format_moment(first)} to {format_moment(last)} UTC"
    return f"{format_moment(first // minute * minute)} to {format_moment(last // minute * minute)} UTC"


def describe_duration(nanoseconds: int) -> str:
    """Return a duration in its two largest units: `2 h 10 min`, `30 s`, `250 ms`."""
    for index, (unit, length) in enumerate(UNITS):
        if nanoseconds >= length:
            whole, rest = divmod(nanoseconds, length)
            if unit in ("s", "ms", "us"):
                return f"{nanoseconds / length:.4g} {unit}"
            smaller, size = UNITS[index + 1]
            return f"{whole} {unit} {rest // size} {smaller}" if rest >= size else f"{whole} {unit}"
    return f"{nanoseconds} ns"
