"""Assemble samples of many Prometheus series into rows: samples of the same group and time form one row.

Samples may arrive in any order and in several requests. The memory for incomplete rows, groups and series is limited,
and every sample that is not used is counted.
"""

import collections
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from models.errors import shortened
from service.anomaly.record_keys import MAX_GROUP_NAME
from service.codec.feature_names import FeatureSelectors
from service.codec.remote_write import LABEL_BYTES, METRIC_NAME_LABEL, SERIES_BYTES, Series, is_stale

MAX_INCOMPLETE_ROWS = 10_000  # beyond this number, the oldest row is completed with the samples that it has
MAX_SORTED_ROWS = 2000  # maximum number of rows that are put in order of time in one pass of the event loop
MAX_SERIES = 100_000  # maximum number of label sets whose feature and group are cached
MAX_SERIES_BYTES = 64 * 2**20  # maximum memory for these label sets
MAX_GROUPS = 10_000  # maximum number of groups whose last completed times are remembered
MAX_UNKNOWN_METRICS = 1000  # maximum number of unknown metric names that wait to be logged
MAX_METRIC_NAME = 200  # characters of such a name
REMEMBERED_TIMES = 64  # number of completed times remembered per group, so that repeated samples start no second row

LabelSet = tuple[tuple[str, str], ...]


@dataclass
class AlignedRow:
    """The values of one group at one time. `first_seen` is when the first sample arrived, on a monotonic clock."""

    group: str
    milliseconds: int
    first_seen: float
    values: dict[str, float] = field(default_factory=dict)


class SampleAligner:
    """Assembles rows for one model.

    Args:
        names: the names of the features.
        selectors: finds the feature that a series belongs to.
        group: the labels that distinguish groups.
        wait_seconds: how many seconds after its first sample a row waits for missing samples.
    """

    def __init__(
        self, names: Sequence[str], selectors: FeatureSelectors, group: Sequence[str], wait_seconds: float
    ) -> None:
        self.names = tuple(names)
        self._selectors, self._group_labels, self._wait_seconds = selectors, tuple(group), wait_seconds
        self._targets: dict[LabelSet, tuple[str, str] | None] = {}  # feature and group, cached per series
        self._targets_bytes = 0  # memory for these
        self._incomplete: OrderedDict[tuple[str, int], AlignedRow] = OrderedDict()
        self._ready: list[AlignedRow] = []
        self._rows_begun = 0
        self._completed_times: OrderedDict[str, deque[int]] = OrderedDict()
        # The number of samples by outcome. `RemoteWriteEndpoint` adds these numbers to the metrics, then clears them.
        self.outcomes: collections.Counter[str] = collections.Counter()
        # The names of metrics that belong to no feature. `RemoteWriteEndpoint` logs these names, then clears them.
        self.unknown_metrics: dict[str, None] = {}

    @property
    def pending_rows(self) -> int:
        """The number of rows that wait for samples or for scoring."""
        return len(self._incomplete) + len(self._ready)

    def add(self, series: Iterable[Series], now: float) -> int:
        """Add samples, and return the number of rows that did not exist before.

        `now`: when the samples arrived, in seconds on a monotonic clock.
        """
        begun = self._rows_begun
        for labels, samples in series:
            target = self._target(labels)
            if target is None:
                self.outcomes["unknown"] += len(samples)
                continue
            feature, group = target
            for milliseconds, value in samples:
                self.outcomes[self._add_sample(feature, group, milliseconds, value, now)] += 1
        return self._rows_begun - begun

    def pop_ready(self, now: float, flush: bool = False, limit: int = MAX_SORTED_ROWS) -> list[AlignedRow]:
        """Remove and return the rows that are complete or have waited long enough, in order of time.

        If more than MAX_SORTED_ROWS are due at once, only the rows that were seen first are in order of time.

        Args:
            now: the time on the clock of `add`.
            flush: whether to return incomplete rows that have not waited long enough too.
            limit: the maximum number of rows to return; the other rows remain.
        """
        while self._incomplete and len(self._ready) < MAX_SORTED_ROWS:
            row = next(iter(self._incomplete.values()))
            is_full = len(self._incomplete) > MAX_INCOMPLETE_ROWS
            if not (flush or is_full or now - row.first_seen >= self._wait_seconds):
                break
            self._complete(row)
        ready = sorted(self._ready, key=lambda row: row.milliseconds)
        self._ready = ready[limit:]
        return ready[:limit]

    def requeue(self, rows: list[AlignedRow]) -> None:
        """Put back rows from `pop_ready` that could not be scored."""
        self._ready = rows + self._ready

    def _add_sample(self, feature: str, group: str, milliseconds: int, value: float, now: float) -> str:
        """Add a sample to its row, and return the outcome, a value of the label `outcome` in metrics."""
        if value != value:
            return "stale" if is_stale(value) else "nan"
        row = self._incomplete.get((group, milliseconds))
        if row is None:
            completed = self._completed_times.get(group, ())
            if milliseconds in completed:
                return "duplicate"
            if len(completed) == REMEMBERED_TIMES and milliseconds < min(completed):
                return "late"
            row = self._incomplete[group, milliseconds] = AlignedRow(group, milliseconds, now)
            self._rows_begun += 1
        if feature in row.values:
            return "duplicate" if row.values[feature] == value else "ambiguous"
        row.values[feature] = value
        if len(row.values) == len(self.names):
            self._complete(row)
        return "used"

    def _complete(self, row: AlignedRow) -> None:
        del self._incomplete[row.group, row.milliseconds]
        self._ready.append(row)
        completed = self._completed_times.setdefault(row.group, deque(maxlen=REMEMBERED_TIMES))
        completed.append(row.milliseconds)
        self._completed_times.move_to_end(row.group)
        if len(self._completed_times) > MAX_GROUPS:
            self._completed_times.popitem(last=False)

    def _target(self, labels: LabelSet) -> tuple[str, str] | None:
        """Return the feature and the group of a series, or None if the series belongs to no feature."""
        if labels in self._targets:
            return self._targets[labels]
        values = dict(labels)
        feature = self._selectors.find([values.get(METRIC_NAME_LABEL, "")], values)
        group = shortened(",".join(values.get(name, "") for name in self._group_labels), MAX_GROUP_NAME)
        target = None if feature is None else (feature, group)
        if target is None and len(self.unknown_metrics) < MAX_UNKNOWN_METRICS:
            self.unknown_metrics[values.get(METRIC_NAME_LABEL, "")[:MAX_METRIC_NAME]] = None
        size = SERIES_BYTES + sum([LABEL_BYTES + len(name) + len(value) for name, value in labels])
        if len(self._targets) >= MAX_SERIES or self._targets_bytes + size > MAX_SERIES_BYTES:
            self._targets.clear()
            self._targets_bytes = 0
        self._targets[labels] = target
        self._targets_bytes += size
        return target
