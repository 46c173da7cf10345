"""The limit on open connections: derive it, and close the connections that wait longest for their clients.

Every connection is an open file. Without a limit, a few hundred idle clients can use up all files that the process may
open: the server can then accept no probe, load no model and open no log.
"""

import logging
import resource
from collections.abc import Collection
from time import perf_counter
from typing import Any

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
