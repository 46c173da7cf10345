"""What the service counts, in a registry of the app's own that Prometheus scrapes.

Where several processes serve, each counts into memory that all can read, and whichever is asked tells the sum. To add
a metric, make a `Counter`, `Gauge` or `Histogram` in `Metrics.__init__`, and yield its
`metric()` in `collect`: it is summed over the processes, and goes on where a process that was killed left off.

    self._alarms = Counter(counts, "elbo_alarms", "Rows called anomalous", ("model", "version"))
    self._alarms.add(("vae", "3"), by=2)    # one increment; from the event loop's thread
    self._alarms.sums()                     # {("vae", "3"): [17.0]}, of all processes: for what is derived from it

What is no sum, such as which models are loaded or a figure derived from `sums()`, `collect` makes itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.inference.registry import Catalogue
from service.monitoring.anomaly_metrics import AnomalyMetrics
from service.monitoring.metric_types import Counter, Gauge, Histogram, Labels, Numbers, observe
from service.monitoring.timings import RequestRecord
from service.shared_memory import RESTARTS, SharedCounters

LATENCIES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
OUTCOMES = {429: "shed", 499: "abandoned", 503: "shed", 504: "shed"}  # of what else there is, the first digit decides
_BY_FIRST_DIGIT = {2: "ok", 4: "refused", 5: "failed"}
WHO = ("endpoint", "model", "version")
BY = (*WHO, "outcome")


@dataclass(frozen=True, slots=True)
class _Alike:
    """The numbers of requests that are the same in all that metrics tell of them; `computed` of those with rows."""

    who: Labels
    requests: Numbers
    total: Numbers
    computed: tuple[Numbers, Numbers, Numbers] | None  # rows, queue, compute


class Metrics(Collector):
    """Counts what the service does. The event loop's thread alone writes.

    Args:
        counts: of this process and its siblings.
        alert_half_life: rows, see `AnomalyMetrics`.
    """

    def __init__(self, counts: SharedCounters, alert_half_life: float = 3.0) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(counts, "elbo_requests", "Requests answered", (*WHO, "status"))
        self._problems = Counter(counts, "elbo_problems", "Requests without an answer, by code", (*WHO, "code"))
        self._rows = Counter(counts, "elbo_rows", "Rows in answered requests", WHO)
        self._total = Histogram(
            counts, "elbo_request_seconds", "From the request's head to the answer's end", BY, LATENCIES
        )
        self._queue = Histogram(counts, "elbo_queue_seconds", "Waiting for the model", BY, LATENCIES)
        self._compute = Histogram(counts, "elbo_compute_seconds", "In the model, for the whole batch", BY, LATENCIES)
        self._batches = Histogram(counts, "elbo_batch_rows", "Rows in one batch", ("operation",), ROWS)
        self._pending_rows = Gauge(counts, "elbo_pending_rows", "Rows admitted and not yet answered")
        self._pending_bytes = Gauge(counts, "elbo_pending_bytes", "Bytes of bodies that are held for requests")
        self._restarts = Counter(counts, RESTARTS, "Worker processes that ended and were replaced")
        self.pending_rows, self.pending_bytes = self._pending_rows.mine(()), self._pending_bytes.mine(())
        self.leads = counts.leads
        self.judged = AnomalyMetrics(counts, alert_half_life)
        self._catalogue = Catalogue()
        self._alike = lru_cache(maxsize=4096)(self._numbers)
        self.registry.register(self)

    def count(self, record: RequestRecord) -> None:
        """A request has been answered, or has lost its client."""
        alike = self._alike(record.endpoint, record.model, record.version, record.status, record.rows > 0)
        alike.requests[0] += 1.0
        observe(alike.total, LATENCIES, record.total)
        if alike.computed:
            rows, queue, compute = alike.computed
            rows[0] += record.rows if record.status == 200 else 0
            observe(queue, LATENCIES, record.queue)
            observe(compute, LATENCIES, record.compute)
        if record.problem:
            self._problems.add((*alike.who, record.problem))

    def _numbers(self, endpoint: str, model: str, version: int, status: int, computed: bool) -> "_Alike":
        who = endpoint, model, str(version) if version else ""
        by = (*who, OUTCOMES.get(status) or _BY_FIRST_DIGIT.get(status // 100, "abandoned"))
        parts = (self._rows.mine(who), self._queue.mine(by), self._compute.mine(by)) if computed else None
        return _Alike(who, self._requests.mine((*who, str(status))), self._total.mine(by), parts)

    def count_batch(self, operation: str, rows: int) -> None:
        """A batch has been run."""
        self._batches.observe((operation,), rows)

    def collect(self) -> Iterator[Metric]:
        """Every metric, each listed once."""
        yield self._requests.metric()
        yield self._problems.metric()
        yield self._rows.metric()
        yield self._total.metric()
        yield self._queue.metric()
        yield self._compute.metric()
        yield self._batches.metric()
        yield self._pending_rows.metric()
        yield self._pending_bytes.metric()
        yield self._restarts.metric()
        yield from self.judged.metrics()
        yield from _of_models(self._catalogue)

    def exposition(self, catalogue: Catalogue) -> bytes:
        """The text that Prometheus scrapes; the models are those that this process has loaded."""
        self._catalogue = catalogue
        return generate_latest(self.registry)


def _of_models(catalogue: Catalogue) -> Iterator[Metric]:
    loaded = [served for numbers in catalogue.models.values() for served in numbers.values()]
    info = GaugeMetricFamily(
        "elbo_model_info", "1 for each version that is loaded", labels=("model", "version", "kind")
    )
    which = ("model", "version")
    load = GaugeMetricFamily("elbo_model_load_seconds", "To load, verify and choose the backend", labels=which)
    warm = GaugeMetricFamily("elbo_model_warm_seconds", "To run every operation at every size of batch", labels=which)
    for served in loaded:
        info.add_metric((served.name, str(served.version), served.manifest.kind), 1)
        load.add_metric((served.name, str(served.version)), served.load_seconds)
        warm.add_metric((served.name, str(served.version)), served.warm_seconds)
    yield info
    yield load
    yield warm
    failures = len(catalogue.failures)
    yield GaugeMetricFamily("elbo_model_load_failures", "Versions in the folder that cannot be served", failures)
