"""Where every request enters and leaves: given an id, brought to its handler, refused in words, counted, logged.

The endpoints that compute are called from here; what else there is, FastAPI's router finds.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ClientGone, InternalError, ServiceError
from service.http.admission import AdmissionControl
from service.http.request import BodyLimits, HttpResponse, RequestContext
from service.monitoring.logs import AccessLog
from service.monitoring.metrics import Metrics

log = logging.getLogger("elbo.service")
Handler = Callable[[RequestContext], Awaitable[HttpResponse]]


class RequestMiddleware:
    """ASGI middleware, one layer of it: each more costs every request what its arithmetic does.

    Args:
        app: answers what `direct` does not.
        direct: the handlers of POST requests by path.
        metrics: counts them.
        access: writes a line for each.
        limits: of the bodies.
        admission: the line that it leaves when its answer is made.
    """

    def __init__(
        self,
        app: ASGIApp,
        direct: Mapping[str, Handler],
        metrics: Metrics,
        access: AccessLog,
        limits: BodyLimits,
        admission: AdmissionControl,
    ) -> None:
        self._app = app
        self._direct = direct
        self._telemetry = metrics
        self._access = access
        self._limits = limits
        self._door = admission

    def answers(self, scope: Scope) -> bool:
        """Whether a request is for a handler that is called from here."""
        return scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._direct

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = RequestContext(scope, receive, send, self._limits)
        try:
            if self.answers(scope):
                request.record.endpoint = scope["path"]
                await request.answer(await self._through_the_door(request))
            else:
                await self._pass_on(request)
        except Exception as error:
            if await _refuse(request, error):
                raise
        finally:
            request.end()
            self._telemetry.count(request.record)
            self._access.tell(request.record)

    async def _through_the_door(self, request: RequestContext) -> HttpResponse:
        """Its answer, made; sending it is in nobody's way."""
        try:
            return await self._direct[request.scope["path"]](request)
        finally:
            self._door.left(request)

    async def _pass_on(self, request: RequestContext) -> None:
        scope = request.scope
        if scope["method"] == "HEAD":  # answered wherever GET is; the server leaves the body out
            scope = {**scope, "method": "GET"}
        await self._app(scope, request.receive, request.send)


class Entrance:
    """ASGI: what `edge` answers goes straight to it, the rest by way of `app`, whose own layers cost it 50 µs."""

    def __init__(self, app: ASGIApp, edge: RequestMiddleware) -> None:
        self._app = app
        self._edge = edge

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        await (self._edge if self._edge.answers(scope) else self._app)(scope, receive, send)


async def _refuse(request: RequestContext, error: Exception) -> bool:
    """Answer with `error` in words; one that nobody foresaw is a 500 that tells nothing but its id.

    True if the answer had begun, so that none can be given.
    """
    told = _in_words(error)
    request.record.problem = told.code
    if isinstance(told, InternalError):
        fields = {"request_id": request.record.request_id, "path": request.scope["path"]}
        log.exception("unhandled error", extra={"fields": fields})
    if not request.started:
        await request.refuse(told)
        return False
    return True


def _in_words(error: Exception) -> ServiceError:
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, ClientDisconnect):
        return ClientGone("the client left before it had sent the whole body")
    return InternalError("the server failed; its log has the details under this request id")
