"""uvicorn's HTTP protocol, with bounds on the head of a request: uvicorn waits for one, and gathers it, without end."""

import asyncio
from time import perf_counter
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 * 1024  # bytes


class Protocol(HttpToolsProtocol):
    """One connection. `head_since` is when it began to wait for a head that is not whole; None while there is none."""

    head_since: float | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """The first head is awaited."""
        super().connection_made(transport)
        self.head_since = perf_counter()

    def data_received(self, data: bytes) -> None:
        """Refuses a head that does not end."""
        super().data_received(data)
        if self.head_since is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        """A head begins."""
        self.head_since, self._head_bytes = perf_counter(), 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """It is whole."""
        self.head_since, self._head_bytes = None, 0
        super().on_headers_complete()

    def close_if_slow(self, seconds: float) -> None:
        """Close it if a head has not come in `seconds`."""
        if self.head_since is not None and perf_counter() - self.head_since > seconds:
            self.transport.close()


def close_slow(connections: set[Any], seconds: float) -> None:
    """Close those whose client takes longer than `seconds` for the head of a request."""
    for connection in list(connections):
        connection.close_if_slow(seconds)
