"""What is known of one request while it is under way: for its log line, its metrics and its Server-Timing."""

from dataclasses import dataclass, field
from time import perf_counter


@dataclass(slots=True)
class RequestRecord:
    """Filled in by whoever learns something. Times in seconds; `total` when it is over."""

    request_id: str
    method: str
    path: str
    client: str | None
    started: float = field(default_factory=perf_counter)
    endpoint: str = "other"
    model: str = ""
    version: int = 0
    rows: int = 0
    status: int = 0
    problem: str = ""  # the code of the error that it got instead of an answer
    parse: float = 0.0
    queue: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    total: float = 0.0

    @property
    def elapsed(self) -> float:
        """Since the request's head was read."""
        return perf_counter() - self.started
