"""Measure the amount of unfinished work, and estimate how long that work will take."""

from time import perf_counter

WINDOW = 0.25  # in seconds; each measurement of the rate covers at least this much busy time
SMOOTHING = 0.5  # weight of the newest measurement in the rate


class Backlog:
    """An amount of unfinished work, and the measured rate at which work is finished.

    Idle time does not count towards the rate, so that after an idle hour the server does not appear to be slow.

    Attributes:
        amount: the unfinished work.
    """

    def __init__(self) -> None:
        self.amount = 0.0
        self._counted_until = 0.0  # time up to which busy time has been counted, on the `perf_counter` clock
        self._busy_seconds = 0.0  # busy time in the current window
        self._finished = 0.0  # amount of work finished in the current window
        self._rate = 0.0  # amount of work finished per second; 0 until the first window is complete

    def add(self, amount: float) -> None:
        """Add work."""
        if not self.amount:
            self._counted_until = perf_counter()
        self.amount += amount

    def finish(self, amount: float) -> None:
        """Remove work that is done or abandoned."""
        self.amount -= amount
        self._finished += amount
        now = perf_counter()
        if self.amount > 0 and now - self._counted_until < WINDOW:
            return
        self._busy_seconds += now - self._counted_until
        self._counted_until = now
        if self._busy_seconds >= WINDOW:
            rate = self._finished / self._busy_seconds
            self._rate = rate if not self._rate else self._rate + SMOOTHING * (rate - self._rate)
            self._busy_seconds = self._finished = 0.0

    def seconds_for(self, amount: float) -> float:
        """Return the expected number of seconds to finish `amount`; 0 if no rate has been measured yet."""
        return amount / self._rate if self._rate else 0.0

    @property
    def expected_wait(self) -> float:
        """The expected number of seconds to finish all unfinished work; 0 if no rate has been measured yet."""
        return self.seconds_for(self.amount)
