"""Let a part of the connections read at a time, so that every pass of the event loop ends soon.

libuv asks for 1,024 readable sockets at a time, and goes on with the same pass while it gets as many, up to 48 times.
If thousands of clients send faster than the server refuses, a pass takes 10 to 17 s (measured with 12,000 connections).
Meanwhile no timer fires, no task runs and no accepted connection is opened, so that probes get no answer. A pass cannot
be ended from inside: only fewer readable sockets end it.
"""

import asyncio
from collections.abc import Collection
from time import perf_counter
from typing import Any

LONG_SECONDS = 0.1  # a pass, or a rotation through all connections, that takes longer is too long
WINDOW = 256  # connections that read in one pass; refusing all their requests takes about 25 ms


class ReadingWindow:
    """Rotates through the connections, WINDOW at a time, until one rotation takes at most LONG_SECONDS.

    Beginning and ending the reading of a connection takes 1.2 µs, a hundredth of what its refused request takes.
    """

    def __init__(self) -> None:
        self._connections: Collection[Any] = ()
        self._rotation: list[Any] = []  # the connections that were open when the rotation began
        self._place = 0  # of the next window in the rotation
        self._window: list[Any] = []  # the connections that read in this pass
        self._rotation_started = 0.0  # on the `perf_counter` clock
        self.is_open = False  # whether all connections read, or the others wait for their window

    def open(self, connections: Collection[Any]) -> None:
        """Let only a window of `connections`, each a `Protocol`, read from the next pass on. End this pass."""
        self.is_open = True
        self._connections = connections
        self._start_rotation()
        asyncio.get_running_loop().call_soon(self._move)

    def _start_rotation(self) -> None:
        self._rotation_started = perf_counter()
        self._rotation = list(self._connections)
        self._place = 0
        _pause(self._rotation)

    def _move(self) -> None:
        """Let the next window read in the next pass, or all connections if the rotation took at most LONG_SECONDS."""
        _pause(self._window)
        if self._place >= len(self._rotation):
            if perf_counter() - self._rotation_started <= LONG_SECONDS:
                _resume(self._connections)
                self._rotation, self._window, self.is_open = [], [], False
                return
            self._start_rotation()
        self._window = self._rotation[self._place : self._place + WINDOW]
        self._place += WINDOW
        _resume(self._window)
        # In two steps: unlike uvloop, the event loop of asyncio would call `_move` before it reads in the same pass.
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._move)


def _pause(connections: Collection[Any]) -> None:
    for connection in connections:
        connection.transport.pause_reading()


def _resume(connections: Collection[Any]) -> None:
    for connection in connections:
        if not connection.flow.read_paused:
            connection.transport.resume_reading()
