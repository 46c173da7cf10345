"""The transport that uvicorn writes to: it sends large responses in slices, and loses no response when it closes."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from service.http.unread import SMALL_RESPONSE

# Sending a slice takes 0.1 ms. One write of 80 MB can take 40 ms, if the client reads while the kernel copies, and no
# other connection is served meanwhile.
SLICE_BYTES = 256 * 1024


class Writer(Protocol):
    """A protocol that writes to a `LingeringTransport`."""

    def linger_if_receiving(self) -> bool:
        """Begin to discard what arrives if the client may still be sending a request. Return whether it may."""

    def begin_unread(self) -> None:
        """Begin to measure how fast the client reads, because the kernel takes no more before the client reads."""

    def count_large_write(self, size: int) -> None:
        """Count `size` bytes of a response, which stay in memory until the client has read the last of them."""

    def pause_writing(self) -> None:
        """Stop writing."""

    def resume_writing(self) -> None:
        """Write again."""


class LingeringTransport:
    """A transport that sends large responses in slices, and lets clients send the rest of a request before it closes.

    If a socket is closed while received bytes are unread, the kernel resets the connection. A client that is still
    sending then gets a broken pipe, and loses the response, such as the 413 that tells it why.

    Args:
        transport: the transport of the connection.
        writer: the protocol of the connection. If it lingers, `close` only ends the response; the protocol discards
            what arrives, and calls `close_now`.
        call_soon: calls a function after the events of other connections.
    """

    def __init__(
        self, transport: asyncio.Transport, writer: Writer, call_soon: Callable[[Callable[[], object]], object]
    ) -> None:
        # Bound once, so that requests pay for no additional call.
        self._write = transport.write
        self.pause_reading = transport.pause_reading
        self.resume_reading = transport.resume_reading
        self.is_reading: Callable[[], bool] = transport.is_reading
        self.get_extra_info = transport.get_extra_info
        self.abort = transport.abort
        self.is_closing: Callable[[], bool] = transport.is_closing
        self._transport: Any = transport
        self._writer: Writer | None = writer
        self._call_soon = call_soon
        self._rest: deque[memoryview] = deque()  # what is not yet written to `transport`
        self._is_full = False  # whether the kernel has once taken no more of the present response
        self._after_rest: Callable[[], object] | None = None  # what to do when all of it is written

    def write(self, data: bytes | memoryview) -> None:
        """Send `data`. The memory of a large response is counted."""
        if len(data) <= SMALL_RESPONSE and not self._rest:
            self._write(data)
            return
        was_empty = not self._rest
        self._rest.append(memoryview(data))
        if was_empty:
            self._is_full = False
            self._write_slice()
            if self._rest and self._writer:
                self._writer.pause_writing()
        if len(data) > SMALL_RESPONSE and self._writer:
            self._writer.count_large_write(len(data))

    def write_rest(self) -> bool:
        """Send the next slice of a large response. Return False if there is none."""
        if not self._rest:
            return False
        self._write_slice()
        if not self._rest and self._can_write() and self._writer:
            self._writer.resume_writing()
        return True

    def _write_slice(self) -> None:
        if self._transport.is_closing():
            self._rest.clear()
            return
        data = self._rest.popleft()
        if len(data) > SLICE_BYTES:
            self._rest.appendleft(data[SLICE_BYTES:])
        self._write(data[:SLICE_BYTES])
        if self._rest:
            if self._can_write():
                self._call_soon(self.write_rest)
            elif not self._is_full and self._writer:  # the transport calls `resume_writing` when the client has read
                self._is_full = True
                self._writer.begin_unread()
        elif self._after_rest:
            self._after_rest()

    def _can_write(self) -> bool:
        """Return whether the transport has taken all that was written, and has not paused the protocol."""
        size: int = self._transport.get_write_buffer_size()
        return size <= SMALL_RESPONSE

    def get_write_buffer_size(self) -> int:
        """Return how many bytes the kernel has not taken."""
        size: int = self._transport.get_write_buffer_size()
        return size + sum(map(len, self._rest))

    def close(self) -> None:
        """End the response. Close the connection, unless the client may still be sending."""
        if self.is_closing():
            return
        if self._writer and self._writer.linger_if_receiving():
            self.is_closing = _always
            if self._transport.can_write_eof():  # not possible with TLS
                self._do_after_rest(self._transport.write_eof)  # tells the client that the response has ended
        else:
            self.close_now()

    def close_now(self) -> None:
        """Close the connection when what was written is sent."""
        self._do_after_rest(self._transport.close)

    def _do_after_rest(self, action: Callable[[], object]) -> None:
        if self._rest:
            self.is_closing = _always
            self._after_rest = action
        else:
            action()

    def detach(self) -> None:
        """Forget what is not sent, and break the reference cycle with the protocol, so that both are freed."""
        self._writer = None
        self._after_rest = None
        self._rest.clear()


def _always() -> bool:
    return True
