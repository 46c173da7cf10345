"""SIGHUP: reload what is configured in files, or end with the terminal."""

import os
import signal
from collections.abc import Callable

from service.monitoring.log_output import STANDARD_OUTPUT

STANDARD_INPUT = 0


class Hangup:
    """Distinguishes the two meanings of SIGHUP. Create it before the server serves.

    A service manager or an administrator sends SIGHUP so that the server reloads. The kernel sends SIGHUP when the
    terminal that the server was started from closes, and the server then stops. If the signal was ignored when the
    server started, as under `nohup`, it stays ignored.
    """

    def __init__(self) -> None:
        self._had_terminal = _has_terminal()

    @staticmethod
    def handle(handler: Callable[[], object]) -> bool:
        """Call `handler` at each SIGHUP from now on. Return False if the signal stays ignored."""
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            return False
        signal.signal(signal.SIGHUP, lambda *_: handler())
        return True

    def terminal_has_closed(self) -> bool:
        """Return whether the terminal of the server has closed."""
        return self._had_terminal and not _has_terminal()


def _has_terminal() -> bool:
    return os.isatty(STANDARD_INPUT) or os.isatty(STANDARD_OUTPUT)
