"""What the service counts, in a registry of the app's own that Prometheus scrapes.

A request costs a few list increments: the samples that Prometheus reads are made when it asks.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from service.repository import Catalogue
from service.tracing import Trace

LATENCIES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
OUTCOMES = {429: "shed", 499: "abandoned", 503: "shed", 504: "shed"}  # of what else there is, the first digit decides
_BY_FIRST_DIGIT = {2: "ok", 4: "refused", 5: "failed"}
WHO = ("endpoint", "model", "version")

Labels = tuple[str, ...]


class Histogram:
    """Counts of values up to each of `bounds`, ascending, and above all; and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus writes them: how many values are at most each bound."""
        names = [*map(str, map(float, self.bounds)), "+Inf"]
        return list(zip(names, accumulate(self.counts), strict=True))


class Durations:
    """Of one endpoint, model, version and outcome, in seconds."""

    __slots__ = ("compute", "queue", "total")

    def __init__(self) -> None:
        self.total, self.queue, self.compute = Histogram(LATENCIES), Histogram(LATENCIES), Histogram(LATENCIES)


class Telemetry(Collector):
    """Counts what the service does. The event loop's thread alone writes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests: Counter[Labels] = Counter()
        self._problems: Counter[Labels] = Counter()
        self._rows: Counter[Labels] = Counter()
        self._durations: defaultdict[Labels, Durations] = defaultdict(Durations)
        self._batches: defaultdict[Labels, Histogram] = defaultdict(lambda: Histogram(ROWS))
        self._catalogue, self._pending = Catalogue(), (0, 0)
        self.registry.register(self)

    def count(self, trace: Trace) -> None:
        """A request has been answered, or has lost its client."""
        status = trace.status
        version = str(trace.version) if trace.version else ""
        outcome = OUTCOMES.get(status) or _BY_FIRST_DIGIT.get(status // 100, "abandoned")
        self._requests[trace.endpoint, trace.model, version, str(status)] += 1
        if trace.problem:
            self._problems[trace.endpoint, trace.model, version, trace.problem] += 1
        durations = self._durations[trace.endpoint, trace.model, version, outcome]
        durations.total.observe(trace.elapsed)
        if trace.rows:
            self._rows[trace.endpoint, trace.model, version] += trace.rows if status == 200 else 0
            durations.queue.observe(trace.spans.get("queue", 0.0))
            durations.compute.observe(trace.spans.get("compute", 0.0))

    def count_batch(self, operation: str, rows: int) -> None:
        """A batch has been run."""
        self._batches[(operation,)].observe(rows)

    def collect(self) -> Iterator[Metric]:
        """Every metric, each listed once."""
        yield _counter("elbo_requests", "Requests answered", (*WHO, "status"), self._requests)
        yield _counter("elbo_problems", "Requests without an answer, by error code", (*WHO, "code"), self._problems)
        yield _counter("elbo_rows", "Rows in answered requests", WHO, self._rows)
        durations = [(labels, each) for labels, each in self._durations.items()]
        by = (*WHO, "outcome")
        total = [(labels, each.total) for labels, each in durations]
        yield _histogram("elbo_request_seconds", "From the request's head to the answer's end", by, total)
        queue = [(labels, each.queue) for labels, each in durations if any(each.queue.counts)]
        yield _histogram("elbo_queue_seconds", "Waiting for the model", by, queue)
        compute = [(labels, each.compute) for labels, each in durations if any(each.compute.counts)]
        yield _histogram("elbo_compute_seconds", "In the model, for the whole batch", by, compute)
        yield _histogram("elbo_batch_rows", "Rows in one batch", ("operation",), self._batches.items())
        rows, size = self._pending
        yield GaugeMetricFamily("elbo_pending_rows", "Rows admitted and not yet answered", rows)
        yield GaugeMetricFamily("elbo_pending_bytes", "Bytes of bodies that are held for requests", size)
        yield from _of_models(self._catalogue)

    def exposition(self, catalogue: Catalogue, pending_rows: int, pending_bytes: int) -> bytes:
        """The text that Prometheus scrapes, the gauges as they are now."""
        self._catalogue, self._pending = catalogue, (pending_rows, pending_bytes)
        return generate_latest(self.registry)


def _of_models(catalogue: Catalogue) -> Iterator[Metric]:
    loaded = [served for numbers in catalogue.models.values() for served in numbers.values()]
    info = GaugeMetricFamily(
        "elbo_model_info", "1 for each version that is loaded", labels=("model", "version", "kind")
    )
    seconds = GaugeMetricFamily("elbo_model_load_seconds", "To load, verify and warm", labels=("model", "version"))
    for served in loaded:
        info.add_metric((served.name, str(served.version), served.manifest.kind), 1)
        seconds.add_metric((served.name, str(served.version)), served.load_seconds)
    yield info
    yield seconds
    failures = len(catalogue.failures)
    yield GaugeMetricFamily("elbo_model_load_failures", "Versions in the folder that cannot be served", failures)


def _counter(name: str, about: str, labels: Labels, counts: Counter[Labels]) -> Metric:
    family = CounterMetricFamily(name, about, labels=labels)
    for values, count in list(counts.items()):
        family.add_metric(values, count)
    return family


def _histogram(name: str, about: str, labels: Labels, found: Iterable[tuple[Labels, Histogram]]) -> Metric:
    family = HistogramMetricFamily(name, about, labels=labels)
    for values, histogram in list(found):
        family.add_metric(values, histogram.buckets(), histogram.total)
    return family
