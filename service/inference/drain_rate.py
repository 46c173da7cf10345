"""How fast a queue empties, as measured, and so when there will be room in it again."""

import math
from time import perf_counter

WINDOW = 0.25  # seconds of work that make a measurement
LATELY = 0.5  # weight of the last one
LONGEST = 60  # seconds that anyone is told to wait


class DrainRate:
    """Counts what leaves a queue while there is something in it: an idle hour says nothing of its speed."""

    def __init__(self) -> None:
        self._since = 0.0  # when the time began that is being counted
        self._busy = 0.0  # seconds of the window
        self._left = 0.0  # what left in them
        self._rate = 0.0  # a second

    def began(self) -> None:
        """The queue was empty, and is no more."""
        self._since = perf_counter()

    def left(self, amount: float, rest: float) -> None:
        """`amount` has left it, `rest` is still there."""
        self._left += amount
        now = perf_counter()
        if rest > 0 and now - self._since < WINDOW:
            return
        self._busy += now - self._since
        self._since = now
        if self._busy >= WINDOW:
            rate = self._left / self._busy
            self._rate = rate if not self._rate else self._rate + LATELY * (rate - self._rate)
            self._busy = self._left = 0.0

    def wait(self, amount: float) -> float:
        """Seconds until `amount` will have left; none as long as nothing has been measured."""
        return amount / self._rate if self._rate else 0.0

    def seconds(self, amount: float) -> int:
        """Whole seconds until `amount` will have left, at least one: the value of Retry-After."""
        return min(LONGEST, max(1, math.ceil(self.wait(amount))))
