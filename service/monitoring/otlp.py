"""Spans as messages of OTLP, and their export. Needs the packages of the extra `tracing`.

The messages are made directly, without the span classes of the SDK: those take five times as long, and the thread that
makes the spans holds the interpreter lock meanwhile.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from random import getrandbits
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource as ResourceMessage
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status
from opentelemetry.sdk.resources import SERVICE_NAME, Resource

from service.monitoring.request_record import RequestRecord, SampledRequest, steps_of

UNKNOWN_SERVICE = "unknown_service"  # the SDK's name for a service without a name begins with this
MAX_PATH = 1000  # characters
MAX_CLIENT = 100  # characters
SAMPLED = 1  # the flags of a span
HAS_REMOTE_FLAG = 0x100  # IS_REMOTE is known
IS_REMOTE = 0x200  # the parent of the span is in another process


class Exporter(OTLPSpanExporter):
    """Sends messages of OTLP to the collector. OTEL_EXPORTER_OTLP_* configure it.

    The attributes of the server in each message come from OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES.
    """

    def __init__(self) -> None:
        super().__init__()
        resource = Resource.create()
        if str(resource.attributes.get(SERVICE_NAME, UNKNOWN_SERVICE)).startswith(UNKNOWN_SERVICE):
            resource = resource.merge(Resource({SERVICE_NAME: "elbo"}))
        described = [_attribute(name, str(value)) for name, value in resource.attributes.items()]
        self._described = ResourceMessage(attributes=described)
        self._scope = InstrumentationScope(name="elbo")
        # The public method `export` takes only spans of the SDK. So pyproject.toml bounds the version of the package,
        # and another version that lacks this private method is refused when the server starts.
        self._send = self._client.export

    def send(self, spans: Sequence[Span]) -> bool:
        """Send spans, and return whether the collector has accepted them.

        After a failure that may pass, the spans are sent again, for at most OTEL_EXPORTER_OTLP_TIMEOUT.
        """
        scope = ScopeSpans(scope=self._scope, spans=spans)
        message = ExportTraceServiceRequest(
            resource_spans=[ResourceSpans(resource=self._described, scope_spans=[scope])]
        )
        return bool(self._send(message.SerializeToString()).success)


def create_exporter() -> tuple[Callable[[Sequence[Any]], bool], Callable[[], None]]:
    """Return a function that sends spans, and a function that ends its pauses between tries."""
    exporter = Exporter()
    return exporter.send, exporter.shutdown


def spans_of(request: SampledRequest, clock_offset: float) -> list[Span]:
    """Return the span of a request, and those of its steps.

    Args:
        request: the request.
        clock_offset: the Unix time of zero on the `perf_counter` clock, in seconds.
    """
    record = request.record
    trace_id = request.trace_id.to_bytes(16, "big")
    server_id = _span_id()
    root = Span(
        trace_id=trace_id,
        span_id=server_id,
        flags=SAMPLED | HAS_REMOTE_FLAG | (0 if request.parent_id is None else IS_REMOTE),
        name=f"{record.method} {record.endpoint}",
        kind=Span.SPAN_KIND_SERVER,
        start_time_unix_nano=round((clock_offset + record.started) * 1e9),
        end_time_unix_nano=round((clock_offset + record.started + record.total) * 1e9),
        attributes=attributes_of(record),
    )
    if request.parent_id is not None:
        root.parent_span_id = request.parent_id.to_bytes(8, "big")
    if record.status >= 500:
        root.status.code = Status.STATUS_CODE_ERROR
    spans = [root]
    for name, start, end in steps_of(record):
        step = Span(
            trace_id=trace_id,
            span_id=_span_id(),
            parent_span_id=server_id,
            flags=SAMPLED | HAS_REMOTE_FLAG,
            name=name,
            kind=Span.SPAN_KIND_INTERNAL,
            start_time_unix_nano=round((clock_offset + start) * 1e9),
            end_time_unix_nano=round((clock_offset + max(start, end)) * 1e9),
        )
        spans.append(step)
    return spans


def attributes_of(record: RequestRecord) -> list[KeyValue]:
    """Return the attributes of the span of a request, by OpenTelemetry's semantic conventions where there are some."""
    attributes = [
        _shared_attribute("http.request.method", record.method),
        _shared_attribute("http.route", record.endpoint),
        _shared_attribute("http.response.status_code", record.status),
        _attribute("url.path", record.path[:MAX_PATH]),
        _attribute("elbo.request_id", record.request_id),
    ]
    if record.client:
        attributes.append(_attribute("client.address", record.client[:MAX_CLIENT]))
    if record.model:
        attributes += [
            _shared_attribute("elbo.model", record.model),
            _shared_attribute("elbo.version", record.version),
            _shared_attribute("elbo.rows", record.rows),
        ]
    if record.problem:
        attributes.append(_shared_attribute("error.type", record.problem))
    return attributes


def _attribute(name: str, value: str | int) -> KeyValue:
    content = AnyValue(int_value=value) if isinstance(value, int) else AnyValue(string_value=value)
    return KeyValue(key=name, value=content)


_shared_attribute = lru_cache(maxsize=1024)(_attribute)  # safe to share, because a span copies its attributes


def _span_id() -> bytes:
    return (getrandbits(64) or 1).to_bytes(8, "big")
