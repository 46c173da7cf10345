"""The HTTP entry point: calls inference handlers directly, and turns errors into responses, metrics and log lines."""

import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from service.access.control import NAMES_OF_HEADERS, AccessControl
from service.access.scopes import OPEN, scope_of
from service.errors import BadRequest, ClientGone, InternalError, ServiceError
from service.http.admission import TICKET, AdmissionControl
from service.http.cross_site import AllowedHosts, check_origin
from service.http.open_inference import infer_route
from service.http.platform_routes import NO_PLATFORM, PlatformRoutes
from service.http.request import BodyLimits, HttpResponse, RequestContext, scope_with_request
from service.monitoring.logs import AccessLog, logged_path
from service.monitoring.metrics import Metrics

log = logging.getLogger("elbo.service")
Handler = Callable[[RequestContext], Awaitable[HttpResponse]]


class RequestMiddleware:
    """The ASGI middleware that every request passes through.

    It calls the `handlers` of POST requests directly, without FastAPI. FastAPI would spend time on its middleware
    stack, router, dependency resolution and response validation, and inference uses none of these four.
    `benchmarks/serving/request_cost.py` measures the time per request.

    Args:
        app: the application that handles all requests without an entry in `handlers`.
        handlers: the handlers of POST requests, by path. For the Open Inference Protocol, by route: the path with names
            and versions of models replaced by placeholders.
        metrics: counts the requests.
        access: logs the requests.
        limits: limits on request bodies.
        admission: issues the tickets of requests.
        keys: the API keys of the server; None if requests need no key.
        root_path: path under which a proxy publishes the server; empty for none.
        allowed_hosts: the hosts that requests may be for; None for every host.
        platform: the paths of the cloud platform that runs the server.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        handlers: Mapping[str, Handler],
        metrics: Metrics,
        access: AccessLog,
        limits: BodyLimits,
        admission: AdmissionControl,
        keys: AccessControl | None = None,
        root_path: str = "",
        allowed_hosts: AllowedHosts | None = None,
        platform: PlatformRoutes = NO_PLATFORM,
    ) -> None:
        self._platform = None if platform == NO_PLATFORM else platform
        self._app = app
        self._handlers = handlers
        self._metrics = metrics
        self._access = access
        self._limits = limits
        self._admission = admission
        self._keys = keys
        self._root_path = root_path
        self._allowed_hosts = allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, as an ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._root_path:
            _set_root_path(scope, self._root_path)
        ticket = scope.get(TICKET) or self._admission.ticket()  # only `Protocol` adds a ticket to the scope
        request = RequestContext(scope, receive, send, self._limits, ticket)
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # root_path: prefix at which the app is mounted
        handler, route = self._find_handler(path) if scope["method"] == "POST" else (None, path)
        if self._platform:
            path = self._enter_platform_path(self._platform, request, path)
        try:
            if handler:
                request.record.endpoint = route
            self._check(request, path)
            if handler:
                await request.respond(await _respond(handler, request))
            else:
                await self._pass_on(request)
        except Exception as error:
            if request.response_started:
                as_service_error(request, error)
                if not isinstance(error, ClientDisconnect):
                    raise  # closes the connection, so that the client does not take the response for a complete one
            else:
                await request.respond_with_error(as_service_error(request, error))
                # Free the body now: the frames of the traceback refer to it. If a variable of a frame is the error,
                # this is a reference cycle, which would stay until the garbage collector runs.
                traceback.clear_frames(error.__traceback__)
        finally:
            request.finish()
            self._metrics.count(request.record)
            self._access.log(request.record)

    def _find_handler(self, path: str) -> tuple[Handler | None, str]:
        """Return the handler of POST requests for `path`, and their route."""
        handler = self._handlers.get(path)
        if handler:
            return handler, path
        route = infer_route(path)
        return self._handlers.get(route), route

    def _enter_platform_path(self, platform: PlatformRoutes, request: RequestContext, path: str) -> str:
        """Return the path of this server whose scope `path` needs. A probe of the platform becomes one of this path."""
        known = platform.known_path(path)
        request.has_text_errors = platform.has_text_error(path)
        if path and path == platform.health:
            request.scope["path"] = request.scope.get("root_path", "") + known
        return known

    def _check(self, request: RequestContext, path: str) -> None:
        """Raise an error if the head of the request is not acceptable. The body is read only after this check."""
        headers, lines = request.headers, request.scope["headers"]
        # More headers than names: some name occurs twice.
        if b"host" not in headers or b"transfer-encoding" in headers or len(headers) != len(lines):
            _check_head(request.scope)
        if b"origin" in headers:
            check_origin(headers)
        if self._allowed_hosts:
            self._allowed_hosts.check(path, request.header(b"host"))
        if self._keys:
            _check_access(self._keys, request, path)

    async def _pass_on(self, request: RequestContext) -> None:
        """Let the application handle the request."""
        scope = scope_with_request(request)
        if scope["method"] == "HEAD":  # handled like GET: the server omits the body
            scope["method"] = "GET"
        await self._app(scope, request.receive, request.send)


def _set_root_path(scope: Scope, root_path: str) -> None:
    """Set the root path of a request, and complete the path of a request from which the proxy has removed it."""
    if scope.get("root_path"):  # another application has mounted this one
        return
    scope["root_path"] = root_path
    if scope["path"] != root_path and not scope["path"].startswith(root_path + "/"):
        scope["path"] = root_path + scope["path"]


def _check_head(scope: Scope) -> None:
    """Raise BadRequest if two servers could read the head of a request in different ways (RFC 9112, 3.2 and 6.1)."""
    version = scope.get("http_version")
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        raise _bad_request("a request needs one Host header", "one Host header", ", ".join(hosts) or "none")
    codings = [value.decode("latin-1") for name, value in scope["headers"] if name == b"transfer-encoding"]
    coding = ", ".join(codings).strip().lower()
    if codings and (coding != "chunked" or version == "1.0"):
        expected = "Transfer-Encoding: chunked" if version != "1.0" else "no Transfer-Encoding in HTTP/1.0"
        raise _bad_request("the server cannot read the transfer encoding of the body", expected, coding)


def _check_access(keys: AccessControl, request: RequestContext, path: str) -> None:
    """Raise an error if the API key of the request does not permit it.

    Raises:
        BadRequest: the request has two keys, or two lines of one header with a key.
        Unauthorized: the request has no valid key.
        Forbidden: the key does not have the scope of the route.
        RateLimited: the key has reached a limit.
    """
    scope = scope_of(path or "/")  # an empty path is redirected to the page
    if scope is OPEN:
        return
    lines = request.scope["headers"]
    if len(request.headers) != len(lines):  # the check by a proxy and this check could read different lines
        for name in NAMES_OF_HEADERS:
            count = sum(name == other for other, _ in lines)
            if count > 1:
                raise _bad_request(f"a request needs one {name.decode()} header", "one header", str(count))
    key = keys.find(request.headers)
    request.record.key = key.name
    key.require(scope)
    key.enter()
    request.key = key


def _bad_request(detail: str, expected: str, got: str) -> BadRequest:
    return BadRequest(f"{detail}, got {got}", expected=expected, got=got, headers={"Connection": "close"})


async def _respond(handler: Handler, request: RequestContext) -> HttpResponse:
    """Return the response, and release the ticket, because a client that reads slowly should not keep the ticket."""
    try:
        return await handler(request)
    finally:
        request.ticket.release()


def as_service_error(request: RequestContext, error: Exception) -> ServiceError:
    """Return the error that the client receives, and record its code. Log an unexpected error with traceback."""
    if isinstance(error, ServiceError):
        problem = error
    elif isinstance(error, ClientDisconnect):
        problem = ClientGone("the client disconnected before it had sent the whole request body")
    else:
        problem = InternalError("an error occurred in the server; its log has the details under this request id")
    if isinstance(problem, InternalError):
        fields = {"request_id": request.record.request_id, "path": logged_path(request.scope["path"])}
        log.exception("unhandled error", extra={"fields": fields})
    request.record.problem = problem.code
    return problem
