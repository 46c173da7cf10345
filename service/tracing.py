"""What is known of one request while it is under way: for its log line, its metrics and its Server-Timing."""

from dataclasses import dataclass, field
from time import perf_counter


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
    problem: str = ""  # the code of the error that it got instead of an answer
    spans: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        """Adds to the span `name`."""
        self.spans[name] = self.spans.get(name, 0.0) + seconds

    @property
    def elapsed(self) -> float:
        """Since the request's head was read."""
        return perf_counter() - self.started
