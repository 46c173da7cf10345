"""Samples of many series to rows: those of one group and moment belong together, whenever and in whichever order they
come. What waits is bounded in rows, groups and series; what is let go is counted.
"""

import collections
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from service.codec.feature_names import Selectors
from service.codec.remote_write import NAME, Series, is_stale

MOST_ROWS = 10_000  # that wait for their last sample; then the oldest goes as it is
MOST_SERIES = 100_000  # label sets whose meaning is remembered
MOST_GROUPS = 10_000  # of which the last moments are remembered
MEMORY = 64  # moments of a group that are remembered, so that a sample which is sent again makes no second row


@dataclass
class Row:
    """What has come of one group and moment. `since` is when its first sample came."""

    group: str
    milliseconds: int
    since: float
    values: dict[str, float] = field(default_factory=dict)


class Alignment:
    """Of one model's features.

    Args:
        names: the features.
        selectors: which series is which feature.
        group: the labels that tell groups apart.
        wait: seconds for which a row waits for its last sample.
    """

    def __init__(self, names: Sequence[str], selectors: Selectors, group: Sequence[str], wait: float) -> None:
        self.names = tuple(names)
        self._selectors, self._group, self._wait = selectors, tuple(group), wait
        self._series: dict[tuple[tuple[str, str], ...], tuple[str, str] | None] = {}
        self._waiting: OrderedDict[tuple[str, int], Row] = OrderedDict()
        self._ready: list[Row] = []
        self._done: OrderedDict[str, deque[int]] = OrderedDict()
        self.outcomes: collections.Counter[str] = collections.Counter()  # samples, since they were last counted

    @property
    def rows(self) -> int:
        """How many wait, for samples or to be taken."""
        return len(self._waiting) + len(self._ready)

    def add(self, found: Iterable[Series], now: float) -> None:
        """Take in samples that came at `now`, in seconds of a clock that only goes forward."""
        for labels, samples in found:
            meaning = self._meaning(labels)
            if meaning is None:
                self.outcomes["unknown"] += len(samples)
                continue
            for milliseconds, value in samples:
                self.outcomes[self._place(*meaning, milliseconds, value, now)] += 1

    def take(self, now: float, everything: bool = False) -> list[Row]:
        """The rows that are whole, or have waited long enough, in the order of time."""
        while self._waiting:
            row = next(iter(self._waiting.values()))
            if not (everything or now - row.since >= self._wait or len(self._waiting) > MOST_ROWS):
                break
            self._finish(row)
        ready, self._ready = self._ready, []
        return sorted(ready, key=lambda row: row.milliseconds)

    def give_back(self, rows: list[Row]) -> None:
        """Rows that could not be judged now."""
        self._ready = rows + self._ready

    def _place(self, feature: str, group: str, milliseconds: int, value: float, now: float) -> str:
        """Put a sample where it belongs; what has become of it."""
        if value != value:
            return "stale" if is_stale(value) else "nan"
        key = group, milliseconds
        row = self._waiting.get(key)
        if row is None:
            done = self._done.get(group, ())
            if milliseconds in done:
                return "duplicate"
            if len(done) == MEMORY and milliseconds < min(done):
                return "late"
            row = self._waiting[key] = Row(group, milliseconds, now)
        if feature in row.values:
            return "duplicate" if row.values[feature] == value else "ambiguous"
        row.values[feature] = value
        if len(row.values) == len(self.names):
            self._finish(row)
        return "used"

    def _finish(self, row: Row) -> None:
        del self._waiting[row.group, row.milliseconds]
        self._ready.append(row)
        done = self._done.setdefault(row.group, deque(maxlen=MEMORY))
        done.append(row.milliseconds)
        self._done.move_to_end(row.group)
        if len(self._done) > MOST_GROUPS:
            self._done.popitem(last=False)

    def _meaning(self, labels: tuple[tuple[str, str], ...]) -> tuple[str, str] | None:
        """The feature and the group of a series, or None if no feature is meant."""
        if labels in self._series:
            return self._series[labels]
        values = dict(labels)
        feature = self._selectors.find([values.get(NAME, "")], values)
        group = ",".join(values.get(name, "") for name in self._group)
        meaning = None if feature is None else (feature, group)
        if len(self._series) >= MOST_SERIES:
            self._series.clear()
        self._series[labels] = meaning
        return meaning
