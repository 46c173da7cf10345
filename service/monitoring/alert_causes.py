"""The causes that an alert names: features of an abnormal row, with the values seen and expected.

The process that scores a row writes the causes to shared memory, and the leader process reads them when it sends the
alert. Only the causes of the latest abnormal row per model version and group are kept.
"""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from service.monitoring.metric_types import Labels
from service.shared_memory import SharedCounters

FAMILY = "alert_causes"  # key of the arrays in shared memory; no metric may have this name
MAX_CAUSES = 3  # maximum number of features that an alert names
MIN_SHARE = 0.1  # a feature is a cause only if it contributes at least this share of the largest contribution
# Layout of an array: a counter that is odd while the array is being written, the time of the row in Unix seconds, the
# number of causes, then the numbers of each cause.
_HEAD, _PER_CAUSE = 3, 4
_MAX_READS = 100  # attempts to read an array that another process is writing


class Cause(NamedTuple):
    """A feature that contributed to an alert, with its value (NaN if missing) and expected value in raw units.

    `since`: when the deviation began, in Unix seconds; NaN if this is unknown.
    """

    column: int
    value: float
    expected: float
    since: float = math.nan


class AlertCauses:
    """The causes of the latest abnormal row, by model, version and group.

    Args:
        counters: the shared memory of all processes.
    """

    def __init__(self, counters: SharedCounters) -> None:
        self._counters = counters

    def record(self, labels: Labels, time: float, causes: Sequence[Cause]) -> None:
        """Keep `causes`, at most MAX_CAUSES, as those of the latest abnormal row. `time`: now, in Unix seconds."""
        array = self._counters.local.array((FAMILY, *labels), _HEAD + _PER_CAUSE * MAX_CAUSES)
        array[0] += 1.0
        array[1], array[2] = time, float(len(causes))
        for index, number in enumerate(number for cause in causes for number in cause):
            array[_HEAD + index] = number
        array[0] += 1.0

    def latest(self, labels: Labels) -> list[Cause]:
        """Return the causes that any process has recorded last; none if no process has recorded causes."""
        arrays = self._counters.arrays(FAMILY).get(labels, [])
        if not arrays:
            return []
        _, count, *numbers = max(_read(array) for array in arrays)
        starts = range(0, _PER_CAUSE * int(count), _PER_CAUSE)
        return [Cause(int(numbers[at]), *numbers[at + 1 : at + _PER_CAUSE]) for at in starts]


def _read(array: "memoryview[float]") -> list[float]:
    """Return the time, the number of causes and their numbers, all from the same call of `record`."""
    for _ in range(_MAX_READS):
        numbers = list(array)
        if numbers[0] % 2 == 0 and array[0] == numbers[0]:
            return numbers[1:]
    return [0.0, 0.0]  # the process was killed while it wrote


def format_cause(name: str, unit: str | None, cause: Cause) -> str:
    """Return a cause as text, such as "latency 900 ms (expected 195 ms) since 2025-03-03T10:15:00Z"."""
    suffix = f" {unit}" if unit else ""
    value = "is missing" if math.isnan(cause.value) else f"{cause.value:.6g}{suffix}"
    since = "" if math.isnan(cause.since) else f" since {_utc(cause.since)}"
    return f"{name} {value} (expected {cause.expected:.6g}{suffix}){since}"


def _utc(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
    except (OverflowError, ValueError, OSError):  # a year before 1 or after 9999
        return f"{seconds:.0f}"
