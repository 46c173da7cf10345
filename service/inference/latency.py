"""How long batches take on one model, so that the batcher knows which of them are short."""

import math

SMOOTHING = 0.2  # weight of the newest batch


class LatencyEstimate:
    """Smoothed seconds per batch, by operation and, to a factor of two, by number of rows."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int], float] = {}

    def expected(self, operation: str, rows: int) -> float:
        """Return the expected seconds of a batch; infinity if none of its kind has run."""
        return self._seconds.get((operation, rows.bit_length()), math.inf)

    def record(self, operation: str, rows: int, seconds: float) -> None:
        """Take a finished batch into account."""
        kind = operation, rows.bit_length()
        before = self._seconds.get(kind, seconds)
        self._seconds[kind] = before + SMOOTHING * (seconds - before)
