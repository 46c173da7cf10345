"""Poll a condition until it holds."""

import time
from collections.abc import Callable


def wait_until(
    condition: Callable[[], object], seconds: float = 20, ignore: type[Exception] | tuple[type[Exception], ...] = ()
) -> None:
    """Return when `condition()` is true, and fail the test after `seconds`.

    Args:
        ignore: exceptions that count as "not yet"; any other exception ends the wait.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except ignore:
            pass
        assert time.monotonic() < deadline, f"the condition does not hold after {seconds:g} s"
        time.sleep(0.02)
