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
IDLE_SECONDS = 20e-6  # of a rotation that a connection may take without sending anything; over TLS it takes 10 µs
WINDOW = 256  # connections that read in one pass; refusing all their requests takes about 25 ms


class ReadingWindow:
    """Rotates through the connections, WINDOW at a time, until a rotation is short.

    Beginning and ending the reading of a connection takes 1.2 µs, a hundredth of what its refused request takes.
    """

    def __init__(self) -> None:
        self._connections: Collection[Any] = ()
        self._rotation: list[Any] = []  # the connections that were open when the rotation began
        self._place = 0  # of the next window in the rotation
        self._window: list[Any] = []  # the connections that read in this pass
        self._paused: set[Any] = set()  # the connections that wait for their window
        self._rotation_started = 0.0  # on the `perf_counter` clock
        self._has_ended = False
        self.is_open = False  # whether only a window of the connections reads

    def open(self, connections: Collection[Any]) -> None:
        """Let only a window of `connections`, each a `Protocol`, read from the next pass on. End this pass."""
        if self._has_ended:
            return
        self.is_open = True
        self._connections = connections
        self._start_rotation()
        asyncio.get_running_loop().call_soon(self._move)

    def end(self) -> None:
        """Let all connections read from now on, and never open again."""
        self._has_ended = True
        self._close()

    def _close(self) -> None:
        self._resume(list(self._paused))
        self._rotation, self._window, self.is_open = [], [], False

    def _start_rotation(self) -> None:
        self._rotation_started = perf_counter()
        self._rotation = list(self._connections)
        self._place = 0
        self._pause(self._rotation)

    def _move(self) -> None:
        """Let the next window read in the next pass, or all connections if the rotation was short."""
        if not self.is_open:
            return
        self._pause(self._window)
        if self._place >= len(self._rotation):
            seconds = perf_counter() - self._rotation_started
            if seconds <= LONG_SECONDS + IDLE_SECONDS * len(self._rotation):
                self._close()
                return
            self._start_rotation()
        self._window = self._rotation[self._place : self._place + WINDOW]
        self._place += WINDOW
        self._resume(self._window)
        # In two steps: unlike uvloop, the event loop of asyncio would call `_move` before it reads in the same pass.
        loop = asyncio.get_running_loop()
        loop.call_soon(loop.call_soon, self._move)

    def _pause(self, connections: Collection[Any]) -> None:
        """Pause the connections that read. Others, such as those whose clients send nothing more, are never resumed."""
        for connection in connections:
            if connection.transport.is_reading():
                connection.transport.pause_reading()
                self._paused.add(connection)

    def _resume(self, connections: Collection[Any]) -> None:
        for connection in connections:
            if connection in self._paused:
                self._paused.remove(connection)
                if not connection.flow.read_paused:
                    connection.transport.resume_reading()
