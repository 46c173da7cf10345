"""Metric types. Each process counts in its own segment of `SharedCounters`; Prometheus reads the sums."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import TypeAlias

from prometheus_client.core import CounterMetricFamily, Exemplar, GaugeMetricFamily, HistogramMetricFamily, Metric

from service.shared_memory import SharedCounters

Labels = tuple[str, ...]
Exemplars = Mapping[tuple[Labels, int], Exemplar]
# The numbers of one label set. The type is quoted, because memoryview is not generic before Python 3.14.
Values: TypeAlias = "memoryview[float]"


def observe(values: Values, bounds: tuple[float, ...], value: float) -> None:
    """Count one value in the buckets of a `Histogram` with these bounds."""
    values[bisect_left(bounds, value)] += 1.0
    values[-1] += value


class Family:
    """A metric: an array of numbers for each label set and process.

    Args:
        counters: the counters of all processes.
        name: the name of the metric, without the suffix `_total`.
        help_text: what the metric counts or measures.
        labels: the names of the labels.
        size: how many numbers the metric has per label set.
        transient: whether the numbers describe the present state of a process, such as the length of its queue. If so,
            they are set to zero when the process ends.
    """

    def __init__(
        self,
        counters: SharedCounters,
        name: str,
        help_text: str,
        labels: Labels = (),
        size: int = 1,
        transient: bool = False,
    ) -> None:
        self.name = name
        self.help_text = help_text
        self.labels = labels
        self._counters = counters
        self._size = size
        self._transient = transient
        self._local: dict[Labels, Values] = {}
        if not labels:
            self.local(())  # creates the number, so that the metric is exported as 0 from the start

    def local(self, labels: Labels) -> Values:
        """Return this process's numbers for one label set. The caller counts by changing these numbers."""
        values = self._local.get(labels)
        if values is None:
            key = (self.name, *labels)
            values = self._local[labels] = self._counters.local.array(key, self._size, self._transient)
        return values

    def forget(self, labels: Labels) -> None:
        """Forget this process's numbers for one label set, because their memory is freed."""
        self._local.pop(labels, None)

    def sums(self) -> dict[Labels, list[float]]:
        """Return the numbers per label set, summed over all processes."""
        return self._counters.sums(self.name)


class Counter(Family):
    """A number that only grows."""

    def add(self, labels: Labels, amount: float = 1.0) -> None:
        """Increase the counter of one label set."""
        self.local(labels)[0] += amount

    def metric(self) -> Metric:
        """Return the counter for Prometheus."""
        family = CounterMetricFamily(self.name, self.help_text, labels=self.labels)
        for labels, (count,) in self.sums().items():
            family.add_metric(labels, count)
        return family


class Gauge(Family):
    """A number that rises and falls. The exported value is the sum over the running processes."""

    def __init__(self, counters: SharedCounters, name: str, help_text: str, labels: Labels = ()) -> None:
        super().__init__(counters, name, help_text, labels, transient=True)

    def metric(self) -> Metric:
        """Return the gauge for Prometheus."""
        family = GaugeMetricFamily(self.name, self.help_text, labels=self.labels)
        for labels, (value,) in self.sums().items():
            family.add_metric(labels, value)
        return family


class Histogram(Family):
    """The number of values in each bucket, and the sum of all values. `bounds` are the ascending upper limits."""

    def __init__(
        self, counters: SharedCounters, name: str, help_text: str, labels: Labels, bounds: tuple[float, ...]
    ) -> None:
        buckets = len(bounds) + 1  # the last bucket has no upper bound
        super().__init__(counters, name, help_text, labels, size=buckets + 1)
        self.bounds = bounds

    def observe(self, labels: Labels, value: float) -> None:
        """Count one value."""
        observe(self.local(labels), self.bounds, value)

    def metric(self, exemplars: Exemplars = MappingProxyType({})) -> Metric:
        """Return the histogram for Prometheus. `exemplars`: examples of values, by labels and number of the bucket."""
        family = HistogramMetricFamily(self.name, self.help_text, labels=self.labels)
        for labels, (*counts, total) in self.sums().items():
            buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
            for index, bucket in enumerate(self._buckets(counts)):
                exemplar = exemplars.get((labels, index))
                buckets.append((*bucket, exemplar) if exemplar else bucket)
            family.add_metric(labels, buckets, total)
        return family

    def _buckets(self, counts: list[float]) -> Iterator[tuple[str, float]]:
        names = [*map(str, map(float, self.bounds)), "+Inf"]
        return zip(names, accumulate(counts), strict=True)
