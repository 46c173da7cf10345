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
    read_at: float = 0.0  # when parsing ended, on the `perf_counter` clock; 0 if the request was not parsed
    computed_at: float = 0.0  # when the last run of the model ended, on the same clock
    traceparent: bytes = b""  # the header of this name; empty if there is none
    trace_id: str = ""  # set when the request has ended, if tracing is on; empty if the request belongs to no trace

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

    The steps have the durations of the header Server-Timing. If a request runs the model several times, `compute` has
    the sum of its runs, and ends with the last one. `write` ends with the request. A request that ran no model has no
    steps.
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
