"""Direct requests: small requests that the server answers without an ASGI task.

A task, its messages, its future and the objects around them take longer than a small model. If a whole request arrives
in one read, and `DirectHandler` knows how to respond to it, the protocol therefore hands its body to the handler at
once. The handler puts the rows into the batcher's queue, and writes the response when their batch has run. Every other
request takes the way through the middleware. So does a direct request that turns out to be unusual: a task then handles
it from the beginning, and reports its errors.

Most clients send the same head again and again, except for the Content-Length. The protocol recognises such a head
without parsing it: a head that the parser has accepted is accepted again. A head with a header that differs in each
request, such as X-Request-Id, is parsed each time.
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from service.access.control import GrantedKey
from service.http.unread import SMALL_RESPONSE

MAX_HEADS = 1024  # heads that are remembered
MAX_BODY = 2**20  # bytes
HELD_SECONDS = 0.05  # how long a request is held for the rest of its body; a task then waits for it
MAX_HEAD_BYTES = 2048  # a longer head is parsed each time
_LENGTH = re.compile(rb"\r\ncontent-length: ([0-9]{1,7})\r\n", re.IGNORECASE)
_CLOSE = (b"connection", b"close")
CHANGING_HEADERS = frozenset((b"traceparent", b"x-request-id"))  # most clients and proxies send new values each time

Header = tuple[bytes, bytes]
Content = tuple[bytes | memoryview, ...]  # the parts of a body


def size_of(content: Content) -> int:
    """Return the size of a body in bytes."""
    return sum(map(len, content))


@dataclass(frozen=True, slots=True)
class DirectHead:
    """The head of a request that the handler may answer directly.

    Args:
        path: the path, decoded.
        url: the path and the query as they were sent.
        headers: the headers. The value of Content-Length is that of the first request with this head.
        by_name: the values of these headers by name. Each name occurs once.
        length: the Content-Length of that request.
        route: what the handler has made of them.
    """

    path: str
    url: bytes
    headers: tuple[Header, ...]
    by_name: dict[bytes, bytes]
    length: int
    route: Any


class DirectHandler(Protocol):
    """Answers direct requests."""

    def route(self, path: str, query: bytes, headers: dict[bytes, bytes]) -> Any:
        """Return what `start` needs to know of a POST request with this head, or None if it needs a task."""

    def max_body(self, route: Any) -> int:
        """Return the size in bytes above which the body of a request with this head needs a task."""

    def start(self, request: "DirectRequest") -> bool:
        """Begin to answer `request`. Return false if it needs a task; nothing has then been counted or kept."""

    def abandon(self, request: "DirectRequest") -> None:
        """Forget a request whose client has disconnected."""


class DirectRequest:
    """A direct request in progress, in the place of uvicorn's cycle of a request and its response.

    Args:
        connection: the `Protocol` of the connection.
        head: the head of the request.
        body: the body that the client has sent.
        started: when the head arrived, on the `perf_counter` clock.

    Attributes:
        work: what the handler knows of the request.
        key: the API key that has counted the request; None if the server has no keys.
        keep_alive: whether the connection stays open after the response.
        disconnected: whether the client has disconnected.
        is_over: whether the response is written, or the client has disconnected.
    """

    __slots__ = (
        "connection", "disconnected", "head", "is_over", "keep_alive", "key", "response_complete", "response_started",
        "sent", "started", "work",
    )  # fmt: skip
    # Attributes of uvicorn's cycle that never change here. The other attributes of the cycle are among the slots.
    more_body = False
    body = b""

    def __init__(self, connection: Any, head: DirectHead, body: bytes, started: float) -> None:
        self.connection = connection
        self.head = head
        self.sent = body
        self.started = started
        self.work: Any = None
        self.key: GrantedKey | None = None
        self.keep_alive = True
        self.disconnected = False
        self.is_over = False
        self.response_started = False
        self.response_complete = False

    def write(self, head: bytes, content: Content) -> None:
        """Write the response, and go on with the next request of the connection."""
        self.is_over = self.response_started = self.response_complete = True
        connection = self.connection
        self.detach()
        self.sent = b""  # the connection keeps this object until its next request
        transport = connection.transport
        if size_of(content) > SMALL_RESPONSE:
            transport.write(head)
            for part in content:
                transport.write(part)
        else:
            transport.write(b"".join((head, *content)))
        if not self.keep_alive:
            transport.close()
        connection.on_direct_response()

    def detach(self) -> None:
        """Break the reference cycles with the connection and the job, so that reference counting frees all of them."""
        self.connection = self.work = None

    @property
    def message_event(self) -> "DirectRequest":
        """An object with the method `set`, which uvicorn calls when the client has disconnected."""
        return self

    def set(self) -> None:
        """Do nothing: no task waits for a message."""


class KnownHead(NamedTuple):
    """A head at the start of a read."""

    head: DirectHead
    size: int  # bytes, with the empty line


class DirectHeads:
    """The heads of direct requests.

    Args:
        handler: answers direct requests.
        max_body_bytes: the size from which every body needs a task.
    """

    def __init__(self, handler: DirectHandler, max_body_bytes: int) -> None:
        self.handler = handler
        self._max_body_bytes = min(MAX_BODY, max_body_bytes)
        self._heads: dict[bytes, DirectHead] = {}

    def find(self, data: bytes) -> KnownHead | None:
        """Return the head if `data` is one whole request with a head that is known."""
        size = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
        length = _LENGTH.search(data, 0, size)
        if length is None or size + int(length[1]) != len(data) or len(data) - size > self._max_body_bytes:
            return None
        head = self._heads.get(data[: length.start(1)] + data[length.end(1) : size])
        return None if head is None else KnownHead(head, size)

    def remember(self, data: bytes, head: DirectHead) -> None:
        """Remember the head at the start of `data`, which the parser has accepted.

        A head with one of CHANGING_HEADERS would only displace heads that repeat.
        """
        if not CHANGING_HEADERS.isdisjoint(head.by_name):
            return
        size = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
        length = _LENGTH.search(data, 0, size)
        if length is None or size + int(length[1]) != len(data):
            return
        if len(self._heads) >= MAX_HEADS:
            self._heads.clear()
        self._heads[data[: length.start(1)] + data[length.end(1) : size]] = head

    def read(self, url: bytes, headers: list[Header]) -> DirectHead | None:
        """Return the head of a POST request of HTTP/1.1 that the parser has read, or None if it needs a task."""
        path, _, query = url.partition(b"?")
        by_name = dict(headers)
        text = by_name.get(b"content-length", b"")
        if b"%" in path or b"#" in url or not url.isascii() or not text.isdigit() or len(by_name) != len(headers):
            return None
        length = int(text)
        route = self.handler.route(path.decode(), query, by_name)
        if route is None or length > min(self._max_body_bytes, self.handler.max_body(route)):
            return None
        return DirectHead(path.decode(), url, tuple(headers), by_name, length, route)


class ResponseHeads:
    """The beginning of responses with status 200, up to the headers that differ from response to response."""

    def __init__(self) -> None:
        self._default_headers: list[Header] | None = None
        self._start = b""
        self.closes = False  # whether the default headers close the connection

    def start(self, default_headers: list[Header]) -> bytes:
        """Return the status line and uvicorn's default headers, which change once per second."""
        if default_headers is not self._default_headers:
            self._default_headers = default_headers
            self._start = b"HTTP/1.1 200 OK\r\n" + b"".join([b"%b: %b\r\n" % header for header in default_headers])
            self.closes = _CLOSE in default_headers
        return self._start
