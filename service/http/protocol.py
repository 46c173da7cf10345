"""uvicorn's HTTP protocol with admission control, and with limits on the head of a request.

uvicorn itself limits neither the size of a head nor the time that a head takes to arrive.
"""

import asyncio
from collections.abc import Collection
from time import perf_counter
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.codec.response_body import stream_media_type
from service.http.admission import TICKET, AdmissionControl, Refusal, Ticket
from service.http.refusal import HeadRefusal

CONNECTION_CLOSE = (b"connection", b"close")  # header of every response once the server is shutting down
MAX_HEAD = 64 * 1024  # bytes


class Protocol(HttpToolsProtocol):
    """One HTTP connection.

    Args:
        admission: decides which requests are accepted.
        head_refusal: writes the responses to refused requests.
        paths: the paths whose POST requests are under admission control.
        options: uvicorn's own arguments.

    Attributes:
        head_since: the time at which the connection began to wait for the end of a head, on the `perf_counter` clock;
            None from the end of a head until the next head begins.
    """

    head_since: float | None = None
    _head_bytes = 0  # number of bytes received so far of an incomplete head
    _is_refused = False  # whether the request whose body arrives now is refused
    _ticket: Ticket | None = None  # ticket of the request whose body arrives now

    def __init__(
        self, *, admission: AdmissionControl, head_refusal: HeadRefusal, paths: Collection[str], **options: Any
    ) -> None:
        super().__init__(**options)
        self._admission = admission
        self._head_refusal = head_refusal
        self._paths = paths

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self.head_since = perf_counter()

    def data_received(self, data: bytes) -> None:
        """Parse `data`, and refuse a head of more than MAX_HEAD bytes."""
        super().data_received(data)
        if self.head_since is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        """Begin to wait for the end of a head."""
        self.head_since = perf_counter()
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Refuse the request, or start its ASGI task with a ticket in its scope."""
        self.head_since = None
        self._head_bytes = 0
        self._ticket = None
        refusal = self._admission.refusal(rows=1)
        if refusal and self._may_refuse():
            self._refuse(refusal)
            return
        super().on_headers_complete()
        if self._is_controlled(self.scope.get("path", "")):
            scope: Any = self.scope
            self._ticket = scope[TICKET] = self._admission.ticket()

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body, or drop it if the request is refused."""
        if self._is_refused:
            return
        cycle: Any = self.cycle
        if not cycle.body:
            cycle.body = b""  # b"" + body does not copy the body; uvicorn's bytearray would copy the body twice
        elif type(cycle.body) is bytes:
            cycle.body = bytearray(cycle.body)  # appending a piece to bytes would copy all previous pieces
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Acquire the ticket of the complete request. If the request was refused, go on to the next request."""
        if self._is_refused:
            self._is_refused = False
            if not self.parser.should_keep_alive() or CONNECTION_CLOSE in self.server_state.default_headers:
                self.transport.close()
            self.on_response_complete()
            return
        super().on_message_complete()
        if self._ticket and not self.pipeline:  # a pipelined request acquires its ticket when its task starts
            self._ticket.acquire()

    def _is_controlled(self, path: str) -> bool:
        return path in self._paths and self.parser.get_method() == b"POST"

    def _may_refuse(self) -> bool:
        """Return whether the request is under admission control and the refusal can be written now.

        A request that streams rows is not refused, because the server reads its rows only as fast as the queue permits.
        """
        cycle: Any = self.cycle  # None before the first request
        if (cycle and not cycle.response_complete) or self.expect_100_continue or self.flow.write_paused:
            return False
        return self._is_controlled(self._path()) and not self._is_stream()

    def _is_stream(self) -> bool:
        """Return whether the request streams rows and asks for a stream of verdicts."""
        accept = b", ".join(value for name, value in self.headers if name == b"accept")
        content_type = next((value for name, value in self.headers if name == b"content-type"), b"")
        return stream_media_type(content_type.decode("latin-1"), accept.decode("latin-1")) is not None

    def _refuse(self, refusal: Refusal) -> None:
        self._is_refused = True
        scope: Any = self.scope
        scope["method"] = "POST"
        scope["path"] = self._path()
        self.transport.write(self._head_refusal.response(scope, refusal, self.server_state.default_headers))

    def _path(self) -> str:
        return self.url.partition(b"?")[0].decode("latin-1")

    def close_if_slow(self, seconds: float) -> None:
        """Close the connection if it has waited longer than `seconds` for the end of a head."""
        if self.head_since is not None and perf_counter() - self.head_since > seconds:
            self.transport.close()


def close_slow(connections: set[Any], seconds: float) -> None:
    """Close the connections that have waited longer than `seconds` for the end of a head."""
    for connection in list(connections):
        connection.close_if_slow(seconds)
