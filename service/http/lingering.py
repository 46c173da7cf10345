"""The transport that uvicorn writes to. It reports large responses, and closes without losing the last response."""

import asyncio
from collections.abc import Callable
from typing import Any

from service.http.unread import SMALL_RESPONSE


class LingeringTransport:
    """A transport whose `close` lets the protocol read the rest of a request before the connection is closed.

    If a socket is closed while received bytes are unread, the kernel resets the connection. A client that is still
    sending then gets a broken pipe, and loses the response, such as the 413 that tells it why.

    Args:
        transport: the transport of the connection.
        must_linger: returns whether the client may still be sending a request. `close` then only ends the
            response; the protocol discards what arrives, and calls `close_now`.
        on_large_write: called with the size of each piece of a response above SMALL_RESPONSE bytes, once the piece has
            been written. The transport keeps the whole piece in memory until the client has read the last byte of it.
    """

    def __init__(
        self, transport: asyncio.Transport, must_linger: Callable[[], bool], on_large_write: Callable[[int], None]
    ) -> None:
        # Bound once, so that requests pay for no additional call.
        self._write = transport.write
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.get_extra_info = transport.get_extra_info
        self.get_write_buffer_size = transport.get_write_buffer_size
        self.abort = transport.abort
        self.is_closing: Callable[[], bool] = transport.is_closing
        self._transport: Any = transport
        self._must_linger: Callable[[], bool] | None = must_linger
        self._on_large_write: Callable[[int], None] | None = on_large_write

    def write(self, data: bytes | memoryview) -> None:
        """Send `data`."""
        self._write(data)
        if len(data) > SMALL_RESPONSE and self._on_large_write:
            self._on_large_write(len(data))

    def close(self) -> None:
        """End the response. Close the connection, unless the client may still be sending."""
        if self.is_closing():
            return
        if self._must_linger and self._must_linger():
            self.is_closing = _always
            if self._transport.can_write_eof():  # not possible with TLS
                self._transport.write_eof()  # tells the client that the response has ended
        else:
            self._transport.close()

    def close_now(self) -> None:
        """Close the connection."""
        self._transport.close()

    def detach(self) -> None:
        """Break the reference cycle with the protocol, so that reference counting frees both."""
        self._must_linger = None
        self._on_large_write = None


def _always() -> bool:
    return True
