"""Metric types: each process counts into its own segment of `SharedCounters`; Prometheus reads the sum."""

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from service.shared_memory import SharedCounters

Labels = tuple[str, ...]
Numbers: TypeAlias = "memoryview[float]"


def observe(numbers: Numbers, bounds: tuple[float, ...], value: float) -> None:
    """Count one value in the numbers of a `Histogram` with these bounds."""
    numbers[bisect_left(bounds, value)] += 1.0
    numbers[-1] += value


class Family:
    """A metric by the values of its labels, of `size` numbers each."""

    def __init__(
        self, counts: SharedCounters, name: str, about: str, labels: Labels = (), size: int = 1, passing: bool = False
    ) -> None:
        self.name, self.about, self.labels = name, about, labels
        self._counts, self._size, self._passing = counts, size, passing
        self._mine: dict[Labels, Numbers] = {}
        if not labels:
            self.mine(())  # there is but one: told from the beginning, as zero

    def mine(self, labels: Labels) -> Numbers:
        """The numbers of this process: assigning to them is counting."""
        numbers = self._mine.get(labels)
        if numbers is None:
            numbers = self._mine[labels] = self._counts.mine.numbers((self.name, *labels), self._size, self._passing)
        return numbers

    def sums(self) -> dict[Labels, list[float]]:
        """The numbers of all processes together, by labels."""
        return self._counts.sums(self.name)


class Counter(Family):
    """What only grows."""

    def add(self, labels: Labels, by: float = 1.0) -> None:
        """Count `by` more."""
        self.mine(labels)[0] += by

    def metric(self) -> Metric:
        """For Prometheus."""
        family = CounterMetricFamily(self.name, self.about, labels=self.labels)
        for labels, (count,) in self.sums().items():
            family.add_metric(labels, count)
        return family


class Gauge(Family):
    """What rises and falls, and of which a process takes its share along when it ends. All processes' add up."""

    def __init__(self, counts: SharedCounters, name: str, about: str, labels: Labels = ()) -> None:
        super().__init__(counts, name, about, labels, passing=True)

    def metric(self) -> Metric:
        """For Prometheus."""
        family = GaugeMetricFamily(self.name, self.about, labels=self.labels)
        for labels, (value,) in self.sums().items():
            family.add_metric(labels, value)
        return family


class Histogram(Family):
    """How many values are up to each of `bounds`, ascending, and above all; and their sum."""

    def __init__(
        self, counts: SharedCounters, name: str, about: str, labels: Labels, bounds: tuple[float, ...]
    ) -> None:
        super().__init__(counts, name, about, labels, len(bounds) + 2)
        self.bounds = bounds

    def observe(self, labels: Labels, value: float) -> None:
        """Count one value."""
        observe(self.mine(labels), self.bounds, value)

    def metric(self) -> Metric:
        """For Prometheus."""
        family = HistogramMetricFamily(self.name, self.about, labels=self.labels)
        for labels, (*counts, total) in self.sums().items():
            family.add_metric(labels, list(self._buckets(counts)), total)
        return family

    def _buckets(self, counts: list[float]) -> Iterator[tuple[str, float]]:
        names = [*map(str, map(float, self.bounds)), "+Inf"]
        return zip(names, accumulate(counts), strict=True)
