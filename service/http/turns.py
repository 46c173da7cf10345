"""Work that goes on during a long pass of the event loop.

While a server is overloaded, thousands of sockets are readable at once, and the event loop runs timers, callbacks and
tasks only when it has read all of them. What must not wait for the end of this pass therefore takes turns with the
reads. A pass that still takes too long is ended by `ReadingWindow`.
"""

import asyncio
from collections.abc import Callable, Collection
from time import perf_counter
from typing import Any

from service.http.reading_window import LONG_SECONDS, ReadingWindow

TURN_SECONDS = 0.002  # between two turns


class Turns:
    """Runs callbacks during a long pass of the event loop, between two reads.

    Attributes:
        work: the callbacks, in the order in which they run. Each takes at most a few ms, and may have nothing to do.
    """

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self._window = ReadingWindow()
        self._next = 0.0  # when the next turn is due, on the `perf_counter` clock
        self._pass_since: float | None = None  # when `take` was first called in this pass

    def take(self, connections: Collection[Any]) -> None:
        """Run the callbacks if TURN_SECONDS have passed in this pass since their last turn, or since the first call.

        Call this after each read that a handler has answered, queued or refused at once.

        Args:
            connections: the open connections of the server, each a `Protocol`.
        """
        now = perf_counter()
        if self._pass_since is None:
            self._pass_since = now
            self._next = now + TURN_SECONDS
            asyncio.get_running_loop().call_soon(self._end_pass)
            return
        if now < self._next:
            return
        if now - self._pass_since > LONG_SECONDS and not self._window.is_open:
            self._window.open(connections)
        for callback in self.work:
            try:
                callback()
            except Exception as error:  # noqa: BLE001 - the connection that called this method is not the cause
                context = {"message": "work during a long pass of the event loop failed", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)
        self._next = perf_counter() + TURN_SECONDS

    def stop(self, *callbacks: Callable[[], object]) -> None:
        """Run `callbacks` no more, and let all connections read from now on: the server is about to close them."""
        self.work = [callback for callback in self.work if callback not in callbacks]
        self._window.end()

    def _end_pass(self) -> None:
        self._pass_since = None
