"""Pure ASGI middleware, each class doing one thing to every HTTP request."""

import logging
import secrets

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTooLarge, ClientGone, InternalError, ServiceError, problem_response
from service.telemetry import Telemetry
from service.tracing import begin, trace_of

LONGEST_REQUEST_ID = 128
access = logging.getLogger("elbo.access")
log = logging.getLogger("elbo.service")


class HttpLayer:
    """What the others have in common: an app beneath them, and no interest in anything but HTTP."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        await (self.handle if scope["type"] == "http" else self.app)(scope, receive, send)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request."""
        raise NotImplementedError


def _with_header(message: Message, name: bytes, value: str) -> Message:
    return {**message, "headers": [*message["headers"], (name, value.encode("latin-1"))]}


class Tracing(HttpLayer):
    """Gives each request a trace and an id: the client's X-Request-Id if it is printable and short, or a new one."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request."""
        asked = Headers(scope=scope).get("x-request-id", "")
        sane = 0 < len(asked) <= LONGEST_REQUEST_ID and asked.isascii() and asked.isprintable()
        trace = begin(scope, asked if sane else secrets.token_hex(8))

        async def traced_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
                message = _with_header(message, b"x-request-id", trace.request_id)
            await send(message)

        await self.app(scope, receive, traced_send)


class AccessLog(HttpLayer):
    """Writes one line for each request, when it has been answered."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request."""
        try:
            await self.app(scope, receive, send)
        finally:
            trace = trace_of(scope)
            client = scope.get("client")
            fields = {
                "request_id": trace.request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": trace.status,
                "client": client[0] if client else None,
                "ms": round(trace.elapsed * 1e3, 3),
            }
            if trace.model:
                fields |= {"model": trace.model, "version": trace.version, "rows": trace.rows}
                fields |= {f"{name}_ms": round(seconds * 1e3, 3) for name, seconds in trace.spans.items()}
            access.info("request", extra={"fields": fields})


class Metering(HttpLayer):
    """Counts each request, when it has been answered."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        super().__init__(app)
        self.telemetry = telemetry

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request."""
        try:
            await self.app(scope, receive, send)
        finally:
            trace = trace_of(scope)
            who = (trace.endpoint, trace.model)
            self.telemetry.requests.labels(*who, trace.status).inc()
            self.telemetry.seconds.labels(*who).observe(trace.elapsed)
            if trace.status == 200 and trace.rows:
                self.telemetry.rows.labels(*who).inc(trace.rows)
                self.telemetry.queue.labels(*who).observe(trace.spans.get("queue", 0.0))
                self.telemetry.compute.labels(*who).observe(trace.spans.get("compute", 0.0))


class ServerTiming(HttpLayer):
    """Tells the client where its time went, in milliseconds (the Server-Timing header)."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request."""

        async def timed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                trace = trace_of(scope)
                spans = {**trace.spans, "total": trace.elapsed}
                value = ", ".join(f"{name};dur={seconds * 1e3:.3f}" for name, seconds in spans.items())
                message = _with_header(message, b"server-timing", value)
            await send(message)

        await self.app(scope, receive, timed_send)


class Problems(HttpLayer):
    """Turns every exception into an answer; those that nobody foresaw into a 500 that tells nothing but its id."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request."""
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except Exception as error:
            trace = trace_of(scope)
            problem = _in_words(error)
            if isinstance(problem, InternalError):
                fields = {"request_id": trace.request_id, "path": scope["path"]}
                log.exception("unhandled error", extra={"fields": fields})
            if started:
                raise
            await problem_response(problem, trace.request_id)(scope, receive, send)


def _in_words(error: Exception) -> ServiceError:
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, ClientDisconnect):
        return ClientGone("the client left before it had sent the whole body")
    return InternalError("the server failed; its log has the details under this request id")


class BodyLimit(HttpLayer):
    """Refuses a body that is too large: at once if its Content-Length says so, else at the first byte too many."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        super().__init__(app)
        self.max_body_bytes = max_body_bytes

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request."""
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self.max_body_bytes:
            raise self._too_large(f"{length} bytes")
        read = 0

        async def limited_receive() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body_bytes:
                raise self._too_large("more")
            return message

        await self.app(scope, limited_receive, send)

    def _too_large(self, got: str) -> BodyTooLarge:
        return BodyTooLarge(
            f"the body may have {self.max_body_bytes} bytes, got {got}",
            expected=f"at most {self.max_body_bytes} bytes",
            got=got,
            hint="send fewer rows at a time, or application/x-npy",
            headers={"Connection": "close"},  # or the server would have to read the rest
        )


class HeadAsGet(HttpLayer):
    """Answers HEAD wherever GET is answered; the server leaves the body out."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request."""
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send)
