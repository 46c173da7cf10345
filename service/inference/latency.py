"""Estimate how long batches take on a model, so that the batcher knows which batches are short."""

import math

SMOOTHING = 0.2  # weight of the newest batch in the estimate


class LatencyEstimate:
    """Weighted averages of the seconds per batch, by operation and batch size.

    Batch sizes with the same number of binary digits, such as 4 to 7, share an average.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int], float] = {}

    def expected(self, operation: str, rows: int) -> float:
        """Return the expected seconds of a batch, or infinity if no batch of similar size has been recorded."""
        return self._seconds.get((operation, rows.bit_length()), math.inf)

    def record(self, operation: str, rows: int, seconds: float) -> None:
        """Update the estimate with a finished batch."""
        kind = operation, rows.bit_length()
        before = self._seconds.get(kind, seconds)
        self._seconds[kind] = before + SMOOTHING * (seconds - before)
