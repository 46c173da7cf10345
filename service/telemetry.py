"""The Prometheus metrics, each listed once, in a registry of the app's own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from service.repository import Catalogue

LATENCIES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)


class Telemetry:
    """Counts what the service does. Times are in seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        by_model = ("endpoint", "model")
        self.requests = Counter("elbo_requests", "Requests answered", (*by_model, "status"), registry=self.registry)
        self.rows = Counter("elbo_rows", "Rows in answered requests", by_model, registry=self.registry)
        self.seconds = Histogram(
            "elbo_request_seconds",
            "From the request's head to the answer's end",
            by_model,
            buckets=LATENCIES,
            registry=self.registry,
        )
        self.queue = Histogram(
            "elbo_queue_seconds", "Waiting for the model", by_model, buckets=LATENCIES, registry=self.registry
        )
        self.compute = Histogram(
            "elbo_compute_seconds",
            "In the model, for the whole batch",
            by_model,
            buckets=LATENCIES,
            registry=self.registry,
        )
        self.batch_rows = Histogram(
            "elbo_batch_rows", "Rows in one batch", ("operation",), buckets=ROWS, registry=self.registry
        )
        self.pending_rows = Gauge("elbo_pending_rows", "Rows admitted and not yet answered", registry=self.registry)
        self.model_info = Gauge(
            "elbo_model_info", "1 for each version that is loaded", ("model", "version", "kind"), registry=self.registry
        )
        self.load_failures = Gauge(
            "elbo_model_load_failures", "Versions in the folder that cannot be served", registry=self.registry
        )
        self.load_seconds = Gauge(
            "elbo_model_load_seconds", "To load, verify and warm", ("model", "version"), registry=self.registry
        )

    def count_batch(self, operation: str, rows: int) -> None:
        """A batch has been run."""
        self.batch_rows.labels(operation).observe(rows)

    def exposition(self, catalogue: Catalogue, pending_rows: int) -> bytes:
        """The text that Prometheus scrapes, the gauges as they are now."""
        self.pending_rows.set(pending_rows)
        self.load_failures.set(len(catalogue.failures))
        self.model_info.clear()
        self.load_seconds.clear()
        for numbers in catalogue.models.values():
            for served in numbers.values():
                version = str(served.version)
                self.model_info.labels(served.name, version, served.manifest.kind).set(1)
                self.load_seconds.labels(served.name, version).set(served.load_seconds)
        return generate_latest(self.registry)
