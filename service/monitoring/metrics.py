"""The metrics of the service, in a registry that belongs to the app.

To add a metric, create a `Counter`, `Gauge` or `Histogram` in `Metrics.__init__` and list it in `_exported`.
For example:

    self._images = Counter(counters, "elbo_images", "Responses in image/png", ("model", "version"))
    self._images.add(("vae", "3"), amount=2)  # call it in the event loop's thread
    self._images.sums()  # {("vae", "3"): [17.0]}, summed over all processes

Prometheus may scrape any process: every process exports the sums over all processes. A process that replaces a killed
process continues to count from the numbers of the killed process. Metrics that are not sums, such as the list of loaded
models, are built in `collect`.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from time import time

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Exemplar, GaugeMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from service.inference.registry import Catalogue
from service.monitoring import alert_causes, alert_states
from service.monitoring.anomaly_metrics import AnomalyMetrics
from service.monitoring.metric_types import Counter, Gauge, Histogram, Labels, Values, observe
from service.monitoring.request_record import RequestRecord
from service.monitoring.tracing import OUTCOMES, Tracer, tracer_of
from service.monitoring.unserved_series import UnservedSeries
from service.shared_memory import LOST_LOG_LINES, RESTARTS, SharedCounters

LATENCY_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
ROW_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
ENDPOINT_LABELS = ("endpoint", "model", "version")
LATENCY_LABELS = (*ENDPOINT_LABELS, "outcome")
_OUTCOME_BY_STATUS = {429: "shed", 499: "abandoned", 503: "shed", 504: "shed"}
_OUTCOME_BY_FIRST_DIGIT = {2: "ok", 4: "refused", 5: "failed"}


@dataclass(frozen=True, slots=True)
class _RequestMetrics:
    """The numbers that a request changes. They are cached per label set, which saves a look-up in every metric."""

    latency_labels: Labels
    requests: Values
    total: Values
    computed: tuple[Values, Values, Values] | None  # rows, queue, compute; None for requests without rows
    problems: "Values | None"  # None for requests without an error


class Metrics(Collector):
    """All metrics. Only the event loop's thread may update them.

    Args:
        counters: the counters of all processes.
        alert_half_life: half-life of the mean severity, in rows; see `AnomalyMetrics`.
        alert_max_age: age in seconds above which a row is history; see `AnomalyMetrics`.
        has_keys: whether the server has API keys. The counters of requests then have a label for the name of the key.
            Names come from the file of keys, never from a client, so the number of label sets is bounded.
    """

    def __init__(
        self,
        counters: SharedCounters,
        alert_half_life: float = 3.0,
        alert_max_age: float = math.inf,
        has_keys: bool = False,
    ) -> None:
        key_label = ("key",) if has_keys else ()
        self._has_keys = has_keys
        self.is_leader = counters.is_leader
        self.registry = CollectorRegistry()
        self._requests = Counter(
            counters,
            "elbo_requests",
            "Requests that have ended, by status code",
            (*ENDPOINT_LABELS, "status", *key_label),
        )
        self._problems = Counter(
            counters,
            "elbo_problems",
            "Requests that ended with an error, by error code",
            (*ENDPOINT_LABELS, "code", *key_label),
        )
        self._rows = Counter(counters, "elbo_rows", "Rows in successful requests", (*ENDPOINT_LABELS, *key_label))
        self._total = Histogram(
            counters,
            "elbo_request_seconds",
            "Time from the request head to the end of the response",
            LATENCY_LABELS,
            LATENCY_BOUNDS,
        )
        self._queue = Histogram(
            counters, "elbo_queue_seconds", "Time in the queue for the model", LATENCY_LABELS, LATENCY_BOUNDS
        )
        self._compute = Histogram(
            counters, "elbo_compute_seconds", "Time in the model, of the whole batch", LATENCY_LABELS, LATENCY_BOUNDS
        )
        self._batches = Histogram(counters, "elbo_batch_rows", "Rows per batch", ("operation",), ROW_BOUNDS)
        self._pending_rows = Gauge(counters, "elbo_pending_rows", "Rows admitted and not yet answered")
        self._pending_bytes = Gauge(counters, "elbo_pending_bytes", "Bytes of request bodies held in memory")
        self._unread_bytes = Gauge(
            counters, "elbo_unread_bytes", "Bytes of responses that clients have not read, and of requests behind them"
        )
        self._open_connections = Gauge(counters, "elbo_connections", "Open connections")
        self._closed = Counter(
            counters, "elbo_connections_closed", "Connections that the server closed because of the client", ("reason",)
        )
        self._restarts = Counter(counters, RESTARTS, "Worker processes that ended unexpectedly and were replaced")
        self._lost_log_lines = Counter(
            counters,
            LOST_LOG_LINES,
            "Log lines that were lost because standard output or standard error was blocked or failed",
        )
        self._spans = Counter(
            counters,
            "elbo_spans",
            "Spans of traced requests: exported, or lost because the queue was full or the export failed",
            ("outcome",),
        )
        self.tracer: Tracer | None = None
        self._exemplars: dict[tuple[Labels, int], Exemplar] = {}  # of this process
        self._repository_polls = Counter(
            counters, "elbo_repository_polls", "Polls of the remote repository of artifacts, by outcome", ("outcome",)
        )
        self._last_repository_poll = Gauge(
            counters,
            "elbo_repository_last_poll_timestamp_seconds",
            "Time of the last poll to which the remote repository responded, in seconds since 1970; 0 without one",
        )
        self.lost_log_lines = self._lost_log_lines.local(())
        self.pending_rows = self._pending_rows.local(())
        self.pending_bytes = self._pending_bytes.local(())
        self.open_connections = self._open_connections.local(())
        self.unread_bytes = self._unread_bytes.local(())
        self.anomalies = AnomalyMetrics(counters, alert_half_life, alert_max_age)
        self._exported: tuple[Counter | Gauge | Histogram, ...] = (
            self._requests, self._problems, self._rows, self._total, self._queue, self._compute, self._batches,
            self._pending_rows, self._pending_bytes, self._unread_bytes, self._open_connections, self._closed,
            self._restarts, self._lost_log_lines, self._spans, self._repository_polls,
            self._last_repository_poll, *self.anomalies.exported,
        )  # fmt: skip
        self._unserved = UnservedSeries(
            counters,
            (*self._exported, *self.anomalies.all),
            {alert_causes.FAMILY: slice(1, 3), alert_states.FAMILY: slice(1, 3)},
        )
        self._catalogue = Catalogue()
        self._request_metrics = lru_cache(maxsize=4096)(self._find_request_metrics)
        self.registry.register(self)

    def count(self, record: RequestRecord) -> None:
        """Count a request that has ended, even if its client disconnected."""
        metrics = self._request_metrics(
            record.endpoint, record.model, record.version, record.status, record.rows > 0, record.problem, record.key
        )
        if self.tracer and self.tracer.finish(record):
            self._keep_exemplar(record, metrics.latency_labels)
        metrics.requests[0] += 1.0
        observe(metrics.total, LATENCY_BOUNDS, record.total)
        if metrics.computed:
            rows, queue, compute = metrics.computed
            rows[0] += record.rows if record.status == 200 else 0
            observe(queue, LATENCY_BOUNDS, record.queue)
            observe(compute, LATENCY_BOUNDS, record.compute)
        if metrics.problems:
            metrics.problems[0] += 1.0

    def _find_request_metrics(
        self, endpoint: str, model: str, version: int, status: int, has_rows: bool, problem: str, key: str
    ) -> _RequestMetrics:
        endpoint_labels = endpoint, model, str(version) if version else ""
        outcome = _OUTCOME_BY_STATUS.get(status) or _OUTCOME_BY_FIRST_DIGIT.get(status // 100, "abandoned")
        latency_labels = (*endpoint_labels, outcome)
        key_labels = (key,) if self._has_keys else ()
        computed = None
        if has_rows:
            rows = self._rows.local((*endpoint_labels, *key_labels))
            computed = rows, self._queue.local(latency_labels), self._compute.local(latency_labels)
        return _RequestMetrics(
            latency_labels,
            requests=self._requests.local((*endpoint_labels, str(status), *key_labels)),
            total=self._total.local(latency_labels),
            computed=computed,
            problems=self._problems.local((*endpoint_labels, problem, *key_labels)) if problem else None,
        )

    def trace_requests(self, environment: Mapping[str, str]) -> None:
        """Trace requests from now on if the environment asks for it. Raises TracingError."""
        outcomes = {outcome: self._spans.local((outcome,)) for outcome in OUTCOMES}

        def count(outcome: str, spans: int) -> None:
            outcomes[outcome][0] += spans

        self.tracer = tracer_of(environment, count)

    def _keep_exemplar(self, record: RequestRecord, labels: Labels) -> None:
        """Keep a traced request as the example of its bucket of the latency."""
        bucket = bisect_left(LATENCY_BOUNDS, record.total)
        self._exemplars[labels, bucket] = Exemplar({"trace_id": record.trace_id}, record.total, time())

    def count_closed(self, reason: str) -> None:
        """Count a connection that the server has closed because of its client."""
        self._closed.add((reason,))

    def count_batch(self, operation: str, rows: int) -> None:
        """Count a batch that has run."""
        self._batches.observe((operation,), rows)

    def count_repository_poll(self, outcome: str) -> None:
        """Count a poll of the remote repository: ok, incomplete, failed or skipped."""
        self._repository_polls.add((outcome,))
        if outcome in ("ok", "incomplete"):
            self._last_repository_poll.local(())[0] = time()

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, without the series of versions that are no longer served."""
        hidden = self._unserved.hidden()
        for family in self._exported:
            metric = self._total.metric(self._exemplars) if family is self._total else family.metric()
            if hidden and "version" in family.labels:
                metric.samples = [
                    sample
                    for sample in metric.samples
                    if (sample.labels["model"], sample.labels["version"]) not in hidden
                ]
            yield metric
        yield from _model_metrics(self._catalogue)

    def free_unserved(self, catalogue: Catalogue) -> None:
        """Renew the leases of the versions in `catalogue`, and free the numbers of versions that are no longer served.

        Call this every RENEWAL_SECONDS, in every process.
        """
        self._unserved.renew(catalogue)
        freed = self._unserved.free()
        if freed:
            self._request_metrics.cache_clear()
            self._exemplars.clear()
            self.anomalies.forget(freed)

    def exposition(self, catalogue: Catalogue, *, is_open_metrics: bool = False) -> bytes:
        """Return the text that Prometheus scrapes.

        Args:
            catalogue: the models that this process has loaded.
            is_open_metrics: whether the format is OpenMetrics, which has the trace ids of some requests.
        """
        self._catalogue = catalogue
        self._unserved.renew(catalogue)
        if not is_open_metrics:
            return generate_latest(self.registry)
        text: bytes = openmetrics.generate_latest(self.registry)  # type: ignore[no-untyped-call] # it has no types
        return text


def _model_metrics(catalogue: Catalogue) -> Iterator[Metric]:
    loaded = [served for versions in catalogue.models.values() for served in versions.values()]
    labels = ("model", "version")
    info = GaugeMetricFamily("elbo_model_info", "1 for each loaded model version", labels=(*labels, "kind"))
    load = GaugeMetricFamily(
        "elbo_model_load_seconds", "Time to load and verify the artifact and to choose the backend", labels=labels
    )
    warm = GaugeMetricFamily(
        "elbo_model_warm_seconds", "Time to warm up: every operation at every batch size", labels=labels
    )
    for served in loaded:
        info.add_metric((served.name, str(served.version), served.manifest.kind), 1)
        load.add_metric((served.name, str(served.version)), served.load_seconds)
        warm.add_metric((served.name, str(served.version)), served.warm_seconds)
    yield info
    yield load
    yield warm
    failures = len(catalogue.failures)
    yield GaugeMetricFamily("elbo_model_load_failures", "Model versions that failed to load", failures)
