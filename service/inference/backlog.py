"""How much work is waiting, and how long it is expected to take at the rate measured last."""

from time import perf_counter

from service.shared_memory import SharedNumber

WINDOW = 0.25  # seconds of work per measurement of the rate
SMOOTHING = 0.5  # weight of the newest measurement


class Backlog:
    """An amount of unfinished work, and the measured rate at which it is finished.

    Only time with unfinished work counts towards the rate: an idle hour does not make the server slow.

    Args:
        level: keeps the amount as its first number; by default a number of this object alone.
    """

    def __init__(self, level: SharedNumber | None = None) -> None:
        self._level: SharedNumber = [0.0] if level is None else level
        self._counted_until = 0.0  # by perf_counter
        self._busy_seconds = 0.0  # in the present window
        self._finished = 0.0  # in the present window
        self._rate = 0.0  # per second; 0 until the first window is complete

    @property
    def amount(self) -> float:
        """Unfinished work."""
        return self._level[0]

    def add(self, amount: float) -> None:
        """Add work."""
        before = self._level[0]
        if not before:
            self._counted_until = perf_counter()
        self._level[0] = before + amount

    def finish(self, amount: float) -> None:
        """Remove work that is done or abandoned."""
        rest = self._level[0] = self._level[0] - amount
        self._finished += amount
        now = perf_counter()
        if rest > 0 and now - self._counted_until < WINDOW:
            return
        self._busy_seconds += now - self._counted_until
        self._counted_until = now
        if self._busy_seconds >= WINDOW:
            rate = self._finished / self._busy_seconds
            self._rate = rate if not self._rate else self._rate + SMOOTHING * (rate - self._rate)
            self._busy_seconds = self._finished = 0.0

    def seconds_for(self, amount: float) -> float:
        """Return the expected seconds until `amount` is finished; 0 until a rate has been measured."""
        return amount / self._rate if self._rate else 0.0

    @property
    def expected_wait(self) -> float:
        """Expected seconds until all unfinished work is finished; 0 until a rate has been measured."""
        return self.seconds_for(self._level[0])
