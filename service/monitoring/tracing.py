"""OpenTelemetry spans of requests: one for the request, and one each for parse, queue, compute and write.

A request costs a check for the header `traceparent` and a random number. If the request is sampled, its record is
queued. A thread makes the spans of queued records and sends them to the collector, so the event loop never waits for
the collector. If the queue is full, or if the collector refuses the spans, they are counted as lost.

The environment variables are those of OpenTelemetry. OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT
switches tracing on. Only then are the packages of the extra `tracing` imported.
"""

import logging
import math
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from random import getrandbits
from time import perf_counter, time
from typing import Any, NamedTuple

from models.errors import ElboError
from service.monitoring.request_record import RequestRecord, SampledRequest

log = logging.getLogger("elbo.tracing")
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SPANS_PER_REQUEST = 5
CLOSE_SECONDS = 3.0  # half of the time that the end of the server waits for the last spans
SAMPLERS = (
    "always_on", "always_off", "traceidratio",
    "parentbased_always_on", "parentbased_always_off", "parentbased_traceidratio",
)  # fmt: skip
EXPORTED, QUEUE_FULL, EXPORT_FAILED = OUTCOMES = ("exported", "queue_full", "export_failed")
# A version above 00 may have further fields; version ff is invalid (W3C Trace Context, 3.2).
_TRACEPARENT = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
LOWER_BITS = 2**64 - 1
_SAMPLED = 1  # flag of a traceparent

Export = Callable[[Sequence[Any]], bool]
Count = Callable[[str, int], None]


class TracingError(ElboError):
    """Tracing is switched on, but a variable is not valid, or the packages of the extra `tracing` are missing."""

    code = "tracing_error"


class Parent(NamedTuple):
    """The span of the client, as the header `traceparent` names it."""

    trace_id: int
    span_id: int
    is_sampled: bool


class Sampler(NamedTuple):
    """Decides which requests are traced.

    Args:
        bound: a request is traced if the lower 64 bits of its trace id are below it.
        follows_parent: whether the decision of the client comes first.
    """

    bound: int
    follows_parent: bool

    def samples(self, parent: Parent) -> bool:
        """Return whether to trace a request with this header `traceparent`."""
        return parent.is_sampled if self.follows_parent else parent.trace_id & LOWER_BITS < self.bound


class Tracer:
    """Queues the records of sampled requests. A thread makes their spans, and sends them.

    Args:
        sampler: decides which requests are traced.
        export: sends spans to the collector, and returns whether this succeeded.
        make: returns the spans of a request, given the Unix time of zero on the `perf_counter` clock.
        count: counts spans by outcome, one of OUTCOMES. The thread counts EXPORTED and EXPORT_FAILED.
        max_requests: how many requests the queue holds.
        batch_requests: the spans of at most this many requests are sent together.
        delay: when a batch is full, the thread sends full batches. After this many seconds without one, it sends all
            requests in the queue.
        stop: lets `export` no longer pause and try again.
    """

    def __init__(
        self,
        sampler: Sampler,
        export: Export,
        make: Callable[[SampledRequest, float], Sequence[Any]],
        count: Count,
        *,
        max_requests: int = 400,
        batch_requests: int = 100,
        delay: float = 5.0,
        stop: Callable[[], object] = lambda: None,
    ) -> None:
        self._sampler = sampler
        self._bound = sampler.bound
        self._export = export
        self._make = make
        self._count = count
        self._max_requests = max_requests
        self._batch_requests = batch_requests
        self._delay = delay
        self._stop_export = stop
        self._queue: deque[SampledRequest] = deque()
        self._wake = threading.Event()
        self._is_closing = False
        self._thread: threading.Thread | None = None  # starts with the first spans: a process that forks has none

    def finish(self, record: RequestRecord) -> bool:
        """Set the trace id of a request that has ended, and queue it if it is sampled. Return whether it is sampled."""
        parent_id = None
        if record.traceparent and (parent := read_traceparent(record.traceparent)):
            trace_id, parent_id = parent.trace_id, parent.span_id
            record.trace_id = f"{trace_id:032x}"
            if not self._sampler.samples(parent):
                return False
        else:
            low = getrandbits(64)
            if low >= self._bound:  # most requests end here, so the cost of the rest hardly matters
                return False
            trace_id = getrandbits(64) << 64 | (low or 1)
            record.trace_id = f"{trace_id:032x}"
        if len(self._queue) >= self._max_requests:
            self._count(QUEUE_FULL, _count_spans(record))
            return True
        self._queue.append(SampledRequest(record, trace_id, parent_id))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tracing", daemon=True)
            self._thread.start()
        if len(self._queue) == self._batch_requests:
            self._wake.set()
        return True

    @property
    def queued_requests(self) -> int:
        """How many requests wait for their spans to be sent."""
        return len(self._queue)

    def close(self) -> None:
        """Send the queued spans, for at most 2 * CLOSE_SECONDS. In the second half, no failed try is repeated."""
        self._is_closing = True
        if self._thread:
            self._wake.set()
            self._thread.join(CLOSE_SECONDS)
            self._stop_export()
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while not self._is_closing:
            is_full = self._wake.wait(self._delay)
            self._wake.clear()
            # Under load, a few requests end while a batch is sent: they wait for a full batch, or for the next delay.
            remaining = len(self._queue)
            while remaining >= self._batch_requests or (remaining and not is_full):
                sent = self._send_batch()
                remaining = len(self._queue) if is_full else remaining - sent
        while self._queue:
            self._send_batch()

    def _send_batch(self) -> int:
        """Send the spans of the oldest requests in the queue, up to `batch_requests`. Return the number of requests."""
        clock_offset = time() - perf_counter()
        requests = [self._queue.popleft() for _ in range(min(self._batch_requests, len(self._queue)))]
        spans: list[Any] = []
        error: Exception | None = None
        for request in requests:
            try:
                spans += self._make(request, clock_offset)
            except Exception as raised:  # noqa: BLE001 - logged below, once a batch
                error = raised
                self._count(EXPORT_FAILED, _count_spans(request.record))
        is_sent = False
        try:
            is_sent = self._export(spans)
        except Exception as raised:  # noqa: BLE001
            error = raised
        if error is not None:
            log.error("failed to send spans", exc_info=error)
        self._count(EXPORTED if is_sent else EXPORT_FAILED, len(spans))
        return len(requests)


def _count_spans(record: RequestRecord) -> int:
    """Return the number of spans of a request: its own, and those of its steps."""
    return SPANS_PER_REQUEST if record.compute else 1


def read_traceparent(header: bytes) -> Parent | None:
    """Return the span in the header `traceparent`, or None if the header is not valid (W3C Trace Context)."""
    found = _TRACEPARENT.fullmatch(header.strip()) if len(header) <= 512 else None
    if found is None or (found[1] == b"00" and found[5]):
        return None
    return Parent(int(found[2], 16), int(found[3], 16), bool(int(found[4], 16) & _SAMPLED))


def sampler_of(environment: Mapping[str, str]) -> Sampler:
    """Return the sampler that OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG name. Raises TracingError."""
    name = environment.get("OTEL_TRACES_SAMPLER") or "parentbased_always_on"
    if name not in SAMPLERS:
        raise TracingError(f"OTEL_TRACES_SAMPLER should be one of {', '.join(SAMPLERS)}, got {name!r}")
    kind = name.removeprefix("parentbased_")
    share = {"always_on": 1.0, "always_off": 0.0}.get(kind, 1.0)
    if kind == "traceidratio":
        text = environment.get("OTEL_TRACES_SAMPLER_ARG") or "1"
        try:
            share = float(text)
        except ValueError:
            share = math.nan
        if not 0 <= share <= 1:
            raise TracingError(f"OTEL_TRACES_SAMPLER_ARG should be a number from 0 to 1, got {text!r}")
    return Sampler(round(share * 2**64), name != kind)


def tracer_of(environment: Mapping[str, str], count: Count) -> Tracer | None:
    """Return the tracer that the environment asks for; None if it asks for none.

    Args:
        environment: the environment variables.
        count: counts spans by outcome.

    Raises:
        TracingError: a variable is not valid, or the packages of the extra `tracing` are not installed.
    """
    is_off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    is_off = is_off or environment.get("OTEL_TRACES_EXPORTER", "otlp") == "none"
    if is_off or not any(environment.get(name) for name in ENDPOINTS):
        return None
    sampler = sampler_of(environment)
    try:
        from service.monitoring.otlp import create_exporter, spans_of
    except ImportError as error:
        raise TracingError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT switches tracing on, but the package {error.name} is not installed: "
            "install elbo with the extra tracing, or set OTEL_SDK_DISABLED=true"
        ) from error
    try:
        export, stop = create_exporter()
    except AttributeError as error:
        raise TracingError(
            "the installed opentelemetry-exporter-otlp-proto-http cannot be used: install the version that the extra "
            "tracing of elbo requires, or set OTEL_SDK_DISABLED=true"
        ) from error
    except (OSError, ValueError) as error:
        raise TracingError(f"a variable OTEL_EXPORTER_OTLP_* is not valid: {error}") from error
    max_requests = max(1, _number(environment, "OTEL_BSP_MAX_QUEUE_SIZE", 2048) // SPANS_PER_REQUEST)
    batch_requests = max(1, _number(environment, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512) // SPANS_PER_REQUEST)
    return Tracer(
        sampler,
        export,
        spans_of,
        count,
        max_requests=max_requests,
        batch_requests=min(batch_requests, max_requests),  # a full queue is sent at once
        delay=_number(environment, "OTEL_BSP_SCHEDULE_DELAY", 5000) / 1e3,
        stop=stop,
    )


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise TracingError(f"{name} should be a whole number above 0, got {text!r}")
    return int(text)
