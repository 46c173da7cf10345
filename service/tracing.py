"""What is known of one request while it is under way: for its log line, its metrics and its Server-Timing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

from starlette.types import Scope

_KEY = "elbo.trace"


@dataclass(slots=True)
class Trace:
    """Filled in by whoever learns something. Times in seconds."""

    request_id: str
    started: float = field(default_factory=perf_counter)
    endpoint: str = "other"
    model: str = ""
    version: int = 0
    rows: int = 0
    status: int = 0
    spans: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Adds the time that the block takes to the span `name`."""
        started = perf_counter()
        try:
            yield
        finally:
            self.add(name, perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        """Adds to the span `name`."""
        self.spans[name] = self.spans.get(name, 0.0) + seconds

    @property
    def elapsed(self) -> float:
        """Since the request's head was read."""
        return perf_counter() - self.started


def begin(scope: Scope, request_id: str) -> Trace:
    """A new trace, kept in `scope`."""
    trace: Trace = Trace(request_id)
    scope[_KEY] = trace
    return trace


def trace_of(scope: Scope) -> Trace:
    """The trace of the request that `scope` belongs to."""
    trace: Trace = scope[_KEY]
    return trace
