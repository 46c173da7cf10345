"""One HTTP request in progress: its headers, query and body, and the response to it."""

import asyncio
import io
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import randbytes
from typing import NamedTuple

import orjson
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from service.access.control import GrantedKey
from service.codec.budget import ROW_BYTES, Budget
from service.errors import PROBLEM_JSON, BodyTooLarge, BodyTooSlow, ClientGone, InvalidField, ServiceError
from service.http import open_inference, security_headers
from service.http.admission import Ticket
from service.http.unread import SMALL_RESPONSE
from service.monitoring.request_record import RequestRecord

MAX_REQUEST_ID = 128  # characters
ROW_LIMIT_SECONDS = 0.05  # pause before a stream checks again whether its key may send more rows
LIST_HEADERS = (b"accept", b"content-encoding")  # a request may split the list over several lines (RFC 9110, 5.3)
MAX_HEADER = 1024  # bytes that are read of one header; caches hold the parsed forms of hundreds of values
MAX_KEPT_BYTES = 256 * 1024  # bytes of a streamed body that arrive while its rows wait; see `wait_for_disconnect`
MAX_CACHED_QUERY = 512  # bytes; the parsed forms of shorter queries are cached
_REQUEST_KEY = "elbo.request"  # key of the RequestContext in an ASGI scope
_SERVER_TIMING = b"parse;dur=%.3f, queue;dur=%.3f, compute;dur=%.3f, write;dur=%.3f, total;dur=%.3f"  # milliseconds

Header = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Query:
    """A parsed query string.

    Args:
        model: the value of `model`, if given.
        options: the names and texts of the other parameters, in order.
    """

    model: str | None
    options: tuple[tuple[str, str], ...]


class HttpResponse(NamedTuple):
    """A response. `RequestContext.respond` adds the headers content-length, x-request-id and server-timing.

    If the content is an iterator, each chunk is sent as soon as it is ready, and there is no content-length.
    """

    content: bytes | memoryview | AsyncIterator[bytes]
    media_type: bytes
    headers: tuple[Header, ...] = ()
    status: int = 200


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits on sending and receiving one body.

    Args:
        max_bytes: maximum size of a request body.
        seconds: time limit for a request body to arrive, and for a client to read one chunk of a streamed response.
    """

    max_bytes: int
    seconds: float


class RequestContext:
    """One request and the response to it.

    Args:
        scope: the ASGI scope.
        receive: the ASGI callable that receives messages.
        send: the ASGI callable that sends messages.
        limits: limits on the bodies of the request and the response.
        ticket: the resources of the request. The bytes of the body count as held in memory until `finish` is called.

    Attributes:
        headers: the request headers by lower-case name. If several lines have the same name, their values are
            joined for a header in LIST_HEADERS. For any other header, only the first value is kept.
        record: the data about the request for the metrics and the access log.
        response_started: whether the head of the response has been sent.
        key: the API key of the request; None if the server has no keys, or if the route needs none.
        has_text_errors: whether the body of an error is an object with the text `error`, as a cloud platform expects.
    """

    has_text_errors = False
    _kept: Sequence[Message] = ()  # parts of the body that `wait_for_disconnect` has received, oldest first

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: BodyLimits, ticket: Ticket) -> None:
        self.scope = scope
        self.headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))
        if len(self.headers) < len(scope["headers"]):
            _join_lists(self.headers, scope["headers"])
        self.record = new_record(scope, self.headers)
        self.response_started = False
        self.key: GrantedKey | None = None
        self.ticket = ticket
        self._budget: Budget | None = None
        self._receive = receive
        self._send = send
        self._limits = limits
        self._charged_rows = 0

    def header(self, name: bytes, default: str = "") -> str:
        """Return the first MAX_HEADER bytes of the value of the header `name`, given in lower case."""
        value = self.headers.get(name)
        return default if value is None else value[:MAX_HEADER].decode("latin-1")

    @property
    def query(self) -> Query:
        """The parsed query string. Raises InvalidField if it names two models."""
        text = self.scope["query_string"]
        return parse_query(text)

    @property
    def max_body_bytes(self) -> int:
        """The maximum size of a request body after decompression."""
        return self._limits.max_bytes

    @property
    def body_seconds(self) -> float:
        """The time limit for a request body, or for one row of a stream, to arrive."""
        return self._limits.seconds

    def budget(self, *, max_rows: int, deadline: float, width: int = 0) -> Budget:
        """Return the budget for reading the body.

        With the body, a request takes at most 3 times ELBO_MAX_BODY_BYTES, and ROW_BYTES for each row.
        The memory that readers draw from it counts against ELBO_HELD_BYTES until `finish` is called.
        """
        self._budget = self.ticket.budget(
            max_bytes=2 * self._limits.max_bytes + max_rows * ROW_BYTES,
            max_rows=max_rows,
            width=width,
            deadline=deadline,
        )
        return self._budget

    async def charge_rows(self, rows: int) -> None:
        """Count `rows` of a stream for the limits of the API key, and wait until the key may send more rows.

        Raises:
            Unauthorized: the key has been removed from the file of keys.
        """
        if self.key is None:
            return
        self._charged_rows += rows
        self.key.count_rows(rows)
        while self.key.must_wait():
            await asyncio.sleep(ROW_LIMIT_SECONDS)

    async def body(self) -> bytes:
        """Return the whole body.

        Raises:
            BodyTooLarge: the body is larger than ELBO_MAX_BODY_BYTES.
            BodyTooSlow: the body did not arrive in time.
            Overloaded: the request bodies in memory leave no room for this body.
            ClientDisconnect: the client disconnected before the end of the body.
        """
        length = self.headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._limits.max_bytes:
            raise self._body_too_large(f"{int(length)} bytes")
        if self.ticket.is_queued:  # the whole body has arrived: no timer is needed
            return await self._read_body()
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await self._read_body()
        except TimeoutError:
            raise BodyTooSlow(
                f"the request body had not arrived after {self._limits.seconds:g} s", headers={"Connection": "close"}
            ) from None

    async def _read_body(self) -> bytes:
        whole: io.BytesIO | None = None  # grows without copies; joining pieces of 64 MiB would block the event loop
        while (message := await self.receive())["type"] == "http.request":
            body: bytes = message.get("body", b"")
            if whole is None:
                if not message.get("more_body"):
                    return body  # a body in one piece is not copied
                whole = io.BytesIO()
            whole.write(body)
            if not message.get("more_body"):
                return whole.getvalue()
        raise ClientDisconnect

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the chunks of a body of any length; only one chunk is held in memory at a time.

        Raises:
            BodyTooSlow: the next chunk did not arrive in time.
            Overloaded: the request bodies in memory leave no room for the chunk.
            ClientDisconnect: the client disconnected before the end of the body.
        """
        more_body = True
        while more_body:
            try:
                async with asyncio.timeout(self._limits.seconds):
                    message = await self._receive_next()
            except TimeoutError:
                raise BodyTooSlow(
                    f"no more of the request body arrived within {self._limits.seconds:g} s",
                    headers={"Connection": "close"},
                ) from None
            if message["type"] != "http.request":
                raise ClientDisconnect
            self.ticket.hold(len(message["body"]))
            yield message["body"]
            self.ticket.release_bytes()
            more_body = message.get("more_body", False)

    async def wait_for_disconnect(self) -> None:
        """Return when the client has disconnected. `stream` yields the parts of the body that arrive meanwhile.

        If more than MAX_KEPT_BYTES arrive, nothing more is received: the method then waits for ever.
        """
        while (message := await self._receive())["type"] == "http.request":
            self._kept = [*self._kept, message]
            if sum(len(kept["body"]) for kept in self._kept) > MAX_KEPT_BYTES:
                await asyncio.Event().wait()

    async def _receive_next(self) -> Message:
        """Return the next part of the body, or the message that the client has disconnected."""
        if not self._kept:
            return await self._receive()
        message, *self._kept = self._kept
        return message

    async def receive(self) -> Message:
        """Receive an ASGI message, and count the bytes of the body as held in memory.

        Raises:
            BodyTooLarge: the bytes received so far exceed ELBO_MAX_BODY_BYTES.
            Overloaded: the request bodies in memory leave no room for the received bytes.
        """
        message = await self._receive()
        self.ticket.hold(len(message.get("body", b"")))
        if self.ticket.held_bytes > self._limits.max_bytes:
            raise self._body_too_large("more")
        return message

    async def send(self, message: Message) -> None:
        """Send an ASGI message of a response from FastAPI, and add the headers that every response has."""
        if message["type"] == "http.response.start":
            size = next((int(value) for name, value in message["headers"] if name == b"content-length"), 0)
            if size > SMALL_RESPONSE:
                self.ticket.check_response(size)
            self._start_response(message["status"])
            headers = security_headers.complete(message["headers"])
            message = {**message, "headers": [*headers, *self._common_headers()]}
        await self._send(message)

    async def respond(self, response: HttpResponse) -> None:
        """Send a whole response.

        Raises:
            ClientGone: the client stopped reading a streamed response.
            Overloaded: the responses that clients have not read leave no room for this response.
        """
        content = response.content
        if not isinstance(content, bytes | memoryview):
            await self._respond_in_chunks(response, content)
            return
        if len(content) > SMALL_RESPONSE:
            self.ticket.check_response(len(content))
        self._start_response(response.status)
        content_headers = (b"content-type", response.media_type), (b"content-length", b"%d" % len(content))
        headers = [*(content_headers if content else ()), *response.headers, *self._common_headers()]
        await self._send({"type": "http.response.start", "status": response.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": content})

    async def _respond_in_chunks(self, response: HttpResponse, chunks: AsyncIterator[bytes]) -> None:
        """Send each chunk when it is ready.

        The head is sent with the first chunk, so that an error before the first chunk can still set the status.
        """
        try:
            async for chunk in chunks:
                async with asyncio.timeout(self._limits.seconds):
                    if not self.response_started:
                        self._start_response(response.status)
                        headers = [
                            (b"content-type", response.media_type),
                            *response.headers,
                            *self._common_headers(),
                        ]
                        await self._send({"type": "http.response.start", "status": response.status, "headers": headers})
                    await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
                    # An empty chunk sends nothing, but waits until the client has read the chunks before it. Only then
                    # is the next chunk computed.
                    await self._send({"type": "http.response.body", "body": b"", "more_body": True})
            await self._send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            raise ClientGone(f"the client read nothing of the response for {self._limits.seconds:g} s") from None

    async def respond_with_error(self, error: ServiceError) -> None:
        """Send `error` as application/problem+json, or as the Open Inference Protocol demands on its paths."""
        headers = as_headers(error.headers)
        path = self.scope["path"].removeprefix(self.scope.get("root_path", ""))
        if self.has_text_errors or open_inference.is_protocol_path(path):
            content, media_type = open_inference.error_body(error), open_inference.ERROR_MEDIA_TYPE
        else:
            content, media_type = orjson.dumps(error.problem(self.record.request_id)), PROBLEM_JSON
        complete = tuple(security_headers.complete(headers))
        await self.respond(HttpResponse(content, media_type.encode(), complete, error.status))

    def finish(self) -> None:
        """Record the total time, and release the ticket.

        The handler cannot release the ticket, because a request may end before its handler is called.
        """
        self.record.total = self.record.elapsed
        if self.key:
            self.key.exit(self.record.rows - self._charged_rows)
        self.ticket.release()
        self.ticket.release_bytes()
        if self._budget:
            self._budget.close()

    def _start_response(self, status: int) -> None:
        self.response_started = True
        self.record.status = status

    def _common_headers(self) -> tuple[Header, ...]:
        """Return the headers that every response has: the request id, and Server-Timing in milliseconds.

        If the API key of the request has limits, there are also headers that describe them.
        """
        record = self.record
        total = record.elapsed * 1e3
        if record.compute:
            spans = record.parse * 1e3, record.queue * 1e3, record.compute * 1e3, record.write * 1e3
            timing = _SERVER_TIMING % (*spans, total)
        else:
            timing = b"total;dur=%.3f" % total
        headers = (b"x-request-id", record.request_id.encode()), (b"server-timing", timing)
        return headers + self.key.headers() if self.key else headers

    def _body_too_large(self, got: str) -> BodyTooLarge:
        return BodyTooLarge(
            f"a request body may have at most {self._limits.max_bytes} bytes (ELBO_MAX_BODY_BYTES), got {got}",
            expected=f"at most {self._limits.max_bytes} bytes",
            got=got,
            hint="send fewer rows per request, or send them as application/x-npy",
            headers={"Connection": "close"},  # otherwise the server would have to read the rest of the body
        )


def as_headers(headers: Mapping[str, str]) -> list[Header]:
    """Return `headers` as ASGI headers."""
    return [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]


def _parse_query(text: bytes) -> Query:
    parameters = QueryParams(text).multi_items()
    models = [value for name, value in parameters if name == "model"]
    if len(models) > 1:
        raise InvalidField("model is given twice", pointer="/model", expected="each parameter once")
    options = [(name, value) for name, value in parameters if name != "model"]
    return Query(models[0] if models else None, tuple(options))


_parse_query_cached = lru_cache(maxsize=1024)(_parse_query)


def parse_query(text: bytes) -> Query:
    """Return the parsed query string. Raises InvalidField if it names two models."""
    return _parse_query_cached(text) if len(text) < MAX_CACHED_QUERY else _parse_query(text)


def _join_lists(headers: dict[bytes, bytes], lines: Iterable[Header]) -> None:
    """Set each list header in `headers` to the joined values of its lines. `lines`: all header lines of the request."""
    for name in LIST_HEADERS:
        if name in headers:
            headers[name] = b", ".join(value for other, value in lines if other == name)


def scope_with_request(request: RequestContext) -> Scope:
    """Return a copy of the request's scope in which `request_of` finds the request.

    Storing the request in its own scope would create a reference cycle, and only the garbage collector frees cycles.
    """
    return {**request.scope, _REQUEST_KEY: request}


def request_of(scope: Scope) -> RequestContext:
    """Return the request that `scope_with_request` stored."""
    request: RequestContext = scope[_REQUEST_KEY]
    return request


def new_record(scope: Scope, headers: Mapping[bytes, bytes]) -> RequestRecord:
    """Return the record of a request whose head has arrived."""
    client = scope.get("client")
    request_id = valid_request_id(headers.get(b"x-request-id", b"")) or new_request_id()
    record = RequestRecord(request_id, scope["method"], scope["path"], client[0] if client else None)
    if b"traceparent" in headers:
        record.traceparent = headers[b"traceparent"]
    return record


def valid_request_id(header: bytes) -> str | None:
    """Return the client's X-Request-Id if it is short and printable, or else None."""
    if 0 < len(header) <= MAX_REQUEST_ID and header.isascii() and (text := header.decode()).isprintable():
        return text
    return None


def new_request_id() -> str:
    """Return a new request id. Python gives each forked process another seed."""
    return randbytes(8).hex()  # noqa: S311 - an id is no secret, and `os.urandom` takes 1.9 µs instead of 0.5
