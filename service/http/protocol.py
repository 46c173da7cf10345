"""uvicorn's HTTP protocol, with bounds on the head of a request: uvicorn waits for one, and gathers it, without end.

It also turns away, at the head, what the admission has no room for.
"""

import asyncio
from time import perf_counter
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.http.admission import AdmissionControl

LAST = (b"connection", b"close")  # on every answer from the moment when the end begins
MAX_HEAD = 64 * 1024  # bytes


class Protocol(HttpToolsProtocol):
    """One connection. `head_since` is when it began to wait for a head that is not whole; None while there is none."""

    head_since: float | None = None
    _head_bytes = 0
    _turned_away = False  # the request whose body comes now

    def __init__(self, *, admission: AdmissionControl, **options: Any) -> None:
        super().__init__(**options)
        self._door = admission

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
        if self._door.full and self._may_be_turned_away():
            self._turn_away()
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """What comes of a body that nobody reads is dropped."""
        if self._turned_away:
            return
        cycle: Any = self.cycle
        if not cycle.body:
            cycle.body = b""  # what is added to no bytes is not copied; to uvicorn's bytearray and back it is, twice
        elif type(cycle.body) is bytes:
            cycle.body = bytearray(cycle.body)  # each of many small chunks would copy all before it
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole, and stands in the line if it is one that computes."""
        if self._turned_away:
            self._turned_away = False
            if not self.parser.should_keep_alive() or LAST in self.server_state.default_headers:
                self.transport.close()
            self.on_response_complete()
            return
        super().on_message_complete()
        scope = self.scope
        if not self.pipeline and self._door.leads_to(self.parser.get_method(), scope.get("path", "")):
            self._door.came(scope)

    def _may_be_turned_away(self) -> bool:
        """Whether it would stand in the line, and an answer can be written now. A stream is held back instead."""
        cycle: Any = self.cycle  # None before the first
        if (cycle and not cycle.response_complete) or self.expect_100_continue or self.flow.write_paused:
            return False
        streams = any(name == b"accept" and b"ndjson" in value for name, value in self.headers)
        path = self.url.partition(b"?")[0].decode("latin-1")
        return self._door.leads_to(self.parser.get_method(), path) and not streams

    def _turn_away(self) -> None:
        self._turned_away = True
        self.scope["method"], self.scope["path"] = "POST", self.url.partition(b"?")[0].decode("latin-1")
        self.transport.write(self._door.refusal(self.scope, self.server_state.default_headers))

    def close_if_slow(self, seconds: float) -> None:
        """Close it if a head has not come in `seconds`."""
        if self.head_since is not None and perf_counter() - self.head_since > seconds:
            self.transport.close()


def close_slow(connections: set[Any], seconds: float) -> None:
    """Close those whose client takes longer than `seconds` for the head of a request."""
    for connection in list(connections):
        connection.close_if_slow(seconds)
