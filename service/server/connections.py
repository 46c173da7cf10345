"""Open connections, limit their number, and close those that wait longest for their clients.

Every connection is an open file. Without a limit, a few hundred idle clients can use up all files that the process may
open: the server can then accept no probe, load no model and open no log.
"""

import asyncio
import logging
import resource
import socket
from collections.abc import Callable, Collection, Mapping
from functools import partial
from time import perf_counter
from typing import Any

from service.http.protocol import GRACE_SECONDS

RESERVED_FILES = 100  # open files for models that are loaded, logs and the event loop
DEFAULT_LIMIT = 10_000
LOG_SECONDS = 60.0  # shortest time between two log lines about the limit
# Share of the connections that is closed at once when the limit is reached: finding them takes longer than closing one.
CLOSED_SHARE = 1 / 32

log = logging.getLogger("elbo.service")


def connection_limit(setting: int | None) -> int:
    """Return the limit on open connections per process.

    Args:
        setting: ELBO_MAX_CONNECTIONS, or None for the default.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return setting or DEFAULT_LIMIT
    available = max(files - RESERVED_FILES, files // 2)
    if setting is not None and setting > available:
        log.warning(
            "ELBO_MAX_CONNECTIONS is %d, but only %d files may be open: at most %d connections are open at once; raise "
            "the limit on open files (ulimit -n, or LimitNOFILE in systemd) to %d",
            setting,
            files,
            available,
            setting + RESERVED_FILES,
        )
    return min(DEFAULT_LIMIT if setting is None else setting, available)


class ConnectionLimit:
    """Keeps the number of open connections of one process at most `limit`.

    Connections above the limit stay in the kernel's backlog, where they need no file and where clients need not retry,
    until the server has closed connections that wait for their clients. `Protocol.waits_for_client` defines the order:
    clients that have sent no request yet come before idle ones, and of each kind, the longest wait comes first. A
    connection whose request is being computed is never closed.

    Args:
        limit: the largest number of open connections.
        connections: the open connections, each a `service.http.protocol.Protocol`.
    """

    def __init__(self, limit: int, connections: Collection[Any]) -> None:
        self.limit = limit
        self._connections = connections
        self._logged_at = float("-inf")  # on the `perf_counter` clock

    def has_room(self, opening: int) -> bool:
        """Return whether another connection may be opened.

        Args:
            opening: connections that are accepted, but not yet among the open ones.
        """
        return len(self._connections) + opening < self.limit

    def close_waiting(self) -> int:
        """Close the connections that wait longest for their clients. Return how many were closed."""
        now = perf_counter()
        waiting = [
            (rank, -seconds, number, connection)
            for number, connection in enumerate(self._connections)
            for rank, seconds in connection.waits_for_client(now)
        ]
        waiting.sort()
        chosen = waiting[: max(1, int(self.limit * CLOSED_SHARE))]
        for _, _, _, connection in chosen:
            connection.drop("connection_limit")
        self.report(f"the server has reached its limit of {self.limit} open connections (ELBO_MAX_CONNECTIONS)")
        return len(chosen)

    def report(self, problem: str) -> None:
        """Log `problem` and what to do, unless the last such line is recent: many connections have the same problem."""
        now = perf_counter()
        if now - self._logged_at < LOG_SECONDS:
            return
        self._logged_at = now
        log.error(
            "%s; the server closes connections that wait for their clients, the longest wait first, and lets new ones "
            "wait: look for clients that open connections and do not use them, or raise ELBO_MAX_CONNECTIONS and the "
            "limit on open files (ulimit -n)",
            problem,
        )


class OpeningConnections:
    """Accepted connections that are being opened: most are TLS handshakes.

    Args:
        create_protocol: creates the protocol of a connection, whose `transport` is None until the connection is open.
        count_failed: called for each connection that could not be opened.
        tls_options: the arguments with which the event loop opens a TLS connection.
    """

    def __init__(
        self,
        create_protocol: Callable[[], Any],
        count_failed: Callable[[], None],
        tls_options: Mapping[str, Any],
    ) -> None:
        self._create_protocol = create_protocol
        self._count_failed = count_failed
        self._tls_options = tls_options
        # The protocol of each, and when it was accepted, on the `perf_counter` clock: uvloop's own clock stands still
        # during a pass of the event loop.
        self._opening: dict[asyncio.Task[Any], tuple[Any, float]] = {}

    def __len__(self) -> int:
        return len(self._opening)

    def open(self, connection: socket.socket) -> None:
        """Serve an accepted connection."""
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        protocol = self._create_protocol()
        task = loop.create_task(loop.connect_accepted_socket(lambda: protocol, connection, **self._tls_options))
        self._opening[task] = protocol, perf_counter()
        task.add_done_callback(partial(self._opened, protocol))

    def cancel_slow(self) -> bool:
        """Cancel the oldest opening that has taken longer than GRACE_SECONDS. Return whether there was one.

        A connection that is open is left alone, although its task has not ended.
        """
        latest = perf_counter() - GRACE_SECONDS
        for task, (protocol, since) in self._opening.items():
            if since > latest:
                return False
            if protocol.transport is None:
                del self._opening[task]
                return task.cancel()
        return False

    async def wait(self) -> None:
        """Wait until all connections are open, or have failed to open."""
        if self._opening:
            await asyncio.wait(self._opening)

    def _opened(self, protocol: Any, task: "asyncio.Task[Any]") -> None:
        self._opening.pop(task, None)
        if not task.cancelled() and not task.exception():
            return
        if protocol.transport is None:  # the client has disconnected in the meantime, or was too slow
            self._count_failed()
        else:  # opened just before the cancellation: uvloop tells the protocol of a TLS connection, but of no other
            protocol.connection_lost(ConnectionAbortedError("the opening of the connection was cancelled"))
