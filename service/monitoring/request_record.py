"""What the access log, the metrics and the Server-Timing header report about a request."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple


@dataclass(slots=True)
class RequestRecord:
    """The facts about one request. They are filled in while the request is processed. Durations are in seconds."""

    request_id: str
    method: str
    path: str
    client: str | None
    started: float = field(default_factory=perf_counter)  # when the request head was read, on the `perf_counter` clock
    endpoint: str = "other"
    model: str = ""
    version: int = 0
    rows: int = 0
    status: int = 0
    problem: str = ""  # error code, if the request failed
    key: str = ""  # name of the API key of the request; empty if there is none
    parse: float = 0.0
    queue: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    total: float = 0.0  # set when the request has ended
    read_at: float = 0.0  # when the request had been parsed, on the `perf_counter` clock; 0 if it was not
    computed_at: float = 0.0  # when the model had run for the last time, on the same clock
    traceparent: bytes = b""  # the header
    trace_id: str = ""  # set if the request has ended and tracing is on; empty if it belongs to no trace

    @property
    def elapsed(self) -> float:
        """Seconds since the request head was read."""
        return perf_counter() - self.started


class SampledRequest(NamedTuple):
    """A request that has ended, and its place in its trace."""

    record: RequestRecord
    trace_id: int
    parent_id: int | None


def steps_of(record: RequestRecord) -> Iterator[tuple[str, float, float]]:
    """Yield the name, the start and the end of each step of a request, on the `perf_counter` clock.

    The steps are as long as the header Server-Timing says. A request that runs the model several times has one step for
    all of its runs, which ends with the last one. Writing ends with the request.
    """
    if not record.compute:
        return
    ends = {
        "parse": record.read_at,
        "queue": record.computed_at - record.compute,
        "compute": record.computed_at,
        "write": record.started + record.total,
    }
    for name, end in ends.items():
        yield name, end - getattr(record, name), end
