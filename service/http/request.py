"""One HTTP request under way: what it asks, and the answer that it gets."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import orjson
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from service.errors import PROBLEM_JSON, BodyTooLarge, BodyTooSlow, ClientGone, ServiceError
from service.http.admission import Ticket
from service.monitoring.request_record import RequestRecord

LONGEST_REQUEST_ID = 128
_KEY = "elbo.request"
SHORT_QUERY = 512  # bytes: what is shorter is decoded once, not for each request
Header = tuple[bytes, bytes]
_SPANS = b"parse;dur=%.3f, queue;dur=%.3f, compute;dur=%.3f, write;dur=%.3f, "  # of Server-Timing, in milliseconds


@dataclass(frozen=True, slots=True)
class Query:
    """The query, decoded: the model that it names, and what else it says in its order, values as JSON or as text."""

    model: str | None
    options: tuple[tuple[str, Any], ...]


class HttpResponse(NamedTuple):
    """What is sent back. `headers` besides those that every answer has: its length, its request id, its timing.

    Content that is made as it is sent has no length.
    """

    content: bytes | AsyncIterator[bytes]
    media_type: bytes
    headers: tuple[Header, ...] = ()
    status: int = 200


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits on the body of one request.

    Args:
        max_bytes: largest body.
        seconds: longest time for a body to arrive.
    """

    max_bytes: int
    seconds: float


class RequestContext:
    """A request and its answer. `started` is true from the moment when the answer's head has been sent.

    Args:
        scope, receive, send: of ASGI.
        limits: on its body.
        ticket: what it occupies; the bytes of its body until `end`.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: BodyLimits, ticket: Ticket) -> None:
        self.scope = scope
        self.headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # the first of a name counts
        self.record = record_of(scope, self.headers)
        self.started = False
        self.ticket = ticket
        self._receive = receive
        self._send = send
        self._limits = limits

    def header(self, name: bytes, default: str = "") -> str:
        """The first header called `name`, in lower case."""
        value = self.headers.get(name)
        return default if value is None else value.decode("latin-1")

    @property
    def query(self) -> Query:
        """What stands behind the path."""
        text = self.scope["query_string"]
        return _decoded_once(text) if len(text) < SHORT_QUERY else _decoded(text)

    async def body(self) -> bytes:
        """The whole body.

        Raises BodyTooLarge, BodyTooSlow, Overloaded, and ClientDisconnect if the client leaves before its end.
        """
        length = self.headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._limits.max_bytes:
            raise self._too_large(f"{int(length)} bytes")
        message = await self.receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            whole: bytes = message.get("body", b"")
            return whole
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await self._rest(message)
        except TimeoutError:
            raise BodyTooSlow(
                f"the body had not arrived after {self._limits.seconds:g} s", headers={"Connection": "close"}
            ) from None

    async def _rest(self, message: Message) -> bytes:
        parts = []
        while message["type"] == "http.request":
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                return b"".join(parts)
            message = await self.receive()
        raise ClientDisconnect

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, however long: a piece is held until the next is asked for.

        Raises BodyTooSlow, Overloaded, and ClientDisconnect if the client leaves before its end.
        """
        more = True
        while more:
            try:
                async with asyncio.timeout(self._limits.seconds):
                    message = await self._receive()
            except TimeoutError:
                raise BodyTooSlow(f"nothing more of the body came for {self._limits.seconds:g} s") from None
            if message["type"] != "http.request":
                raise ClientDisconnect
            self.ticket.hold(len(message["body"]))
            yield message["body"]
            self.ticket.release_bytes()
            more = message.get("more_body", False)

    @property
    def max_body_bytes(self) -> int:
        """Of its body, unpacked."""
        return self._limits.max_bytes

    async def receive(self) -> Message:
        """ASGI's `receive`. Raises BodyTooLarge at the first byte too many, Overloaded if others hold too much."""
        message = await self._receive()
        self.ticket.hold(len(message.get("body", b"")))
        if self.ticket.held_bytes > self._limits.max_bytes:
            raise self._too_large("more")
        return message

    def end(self) -> None:
        """Note the total time and release the bytes of the body."""
        self.record.total = self.record.elapsed
        self.ticket.release_bytes()

    async def send(self, message: Message) -> None:
        """ASGI's `send`, for answers that are not an `HttpResponse`; adds the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.started = True
            self.record.status = message["status"]
            message = {**message, "headers": [*message["headers"], *self._own_headers()]}
        await self._send(message)

    async def answer(self, answer: HttpResponse) -> None:
        """Send `answer` and be done."""
        if not isinstance(answer.content, bytes):
            await self._stream(answer, answer.content)
            return
        self.started = True
        self.record.status = answer.status
        length = b"%d" % len(answer.content)
        fixed = ((b"content-type", answer.media_type), (b"content-length", length))
        headers = [*(fixed if answer.content else ()), *answer.headers, *self._own_headers()]
        await self._send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": answer.content})

    async def _stream(self, answer: HttpResponse, pieces: AsyncIterator[bytes]) -> None:
        """Send the pieces as they are made. Raises ClientGone if the client does not take them."""
        try:
            async for piece in pieces:
                async with asyncio.timeout(self._limits.seconds):
                    if not self.started:
                        self.started, self.record.status = True, answer.status
                        headers = [(b"content-type", answer.media_type), *answer.headers, *self._own_headers()]
                        await self._send({"type": "http.response.start", "status": answer.status, "headers": headers})
                    await self._send({"type": "http.response.body", "body": piece, "more_body": True})
            await self._send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            raise ClientGone(f"the client took nothing for {self._limits.seconds:g} s") from None

    async def refuse(self, error: ServiceError) -> None:
        """Answer with `error`."""
        headers = tuple((name.lower().encode(), value.encode("latin-1")) for name, value in error.headers.items())
        content = orjson.dumps(error.problem(self.record.request_id))
        await self.answer(HttpResponse(content, PROBLEM_JSON.encode(), headers, error.status))

    def _own_headers(self) -> tuple[Header, Header]:
        """The request id, and where the time went: the Server-Timing header, in milliseconds."""
        record = self.record
        timing = b"total;dur=%.3f" % (record.elapsed * 1e3)
        if record.compute:
            spans = (record.parse * 1e3, record.queue * 1e3, record.compute * 1e3, record.write * 1e3)
            timing = _SPANS % spans + timing
        return (b"x-request-id", record.request_id.encode()), (b"server-timing", timing)

    def _too_large(self, got: str) -> BodyTooLarge:
        return BodyTooLarge(
            f"the body may have {self._limits.max_bytes} bytes, got {got}",
            expected=f"at most {self._limits.max_bytes} bytes",
            got=got,
            hint="send fewer rows at a time, or application/x-npy",
            headers={"Connection": "close"},  # or the server would have to read the rest
        )


def _decoded(text: bytes) -> Query:
    said = QueryParams(text)
    options = [(name, _value(value)) for name, value in said.multi_items() if name != "model"]
    return Query(said.get("model"), tuple(options))


def _value(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


_decoded_once = lru_cache(maxsize=1024)(_decoded)


def visible_in(scope: Scope, request: RequestContext) -> Scope:
    """Return a copy of `scope` from which `request_of` returns `request`.

    A copy, because `request` refers to its scope: a reference cycle would wait for the garbage collector.
    """
    return {**scope, _KEY: request}


def request_of(scope: Scope) -> RequestContext:
    """Return the request that `visible_in` has put into `scope`."""
    request: RequestContext = scope[_KEY]
    return request


def record_of(scope: Scope, headers: Mapping[bytes, bytes]) -> RequestRecord:
    """What is known of the request of `scope` from its head."""
    client = scope.get("client")
    request_id = request_id_of(headers.get(b"x-request-id", b""))
    return RequestRecord(request_id, scope["method"], scope["path"], client[0] if client else None)


def request_id_of(asked: bytes) -> str:
    """The client's, if it is printable and short, or a new one."""
    if 0 < len(asked) <= LONGEST_REQUEST_ID and asked.isascii() and (text := asked.decode()).isprintable():
        return text
    return os.urandom(8).hex()
