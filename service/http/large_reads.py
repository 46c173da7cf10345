"""Let connections take turns with large reads: one read from each of 60 connections blocks the event loop for 35 ms."""

import asyncio
from collections import deque
from typing import Any, Protocol

READS_PER_PASS = 8  # 8 reads of 256,000 bytes take about 2 ms


class Connection(Protocol):
    """A connection that has paused after a large read."""

    loop: Any  # an `asyncio.AbstractEventLoop`

    def continue_reading(self) -> None:
        """Read on."""


class LargeReads:
    """The connections of one event loop that wait until they may read on.

    In each pass of the loop, READS_PER_PASS of them read on, in order of arrival.
    """

    def __init__(self) -> None:
        self._waiting: deque[Connection] = deque()

    def put(self, connection: Connection) -> None:
        """Let `connection` read on in its turn."""
        self._waiting.append(connection)
        if len(self._waiting) == 1:
            connection.loop.call_soon(self._next, connection.loop)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        for _ in range(min(READS_PER_PASS, len(self._waiting))):
            loop.call_soon(self._waiting.popleft().continue_reading)
        if self._waiting:
            loop.call_soon(self._next, loop)
