"""How long batches take on one model: what the batcher expects of the next, judging by the last of its kind."""

import math

LATELY = 0.2  # weight of the last batch


class LatencyEstimate:
    """Seconds of a batch, by its backend's clock, by operation and, to a factor of two, rows."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int], float] = {}

    def expected(self, operation: str, rows: int) -> float:
        """Seconds; infinity for what has never run."""
        return self._seconds.get((operation, rows.bit_length()), math.inf)

    def learn(self, operation: str, rows: int, seconds: float) -> None:
        """A batch has taken `seconds`."""
        kind = operation, rows.bit_length()
        before = self._seconds.get(kind, seconds)
        self._seconds[kind] = before + LATELY * (seconds - before)
