"""The ASGI application: the parts of the service put together, for any server that speaks ASGI."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from models.artifact import choose_device
from service.anomaly import series_mapping
from service.endpoints import routes
from service.endpoints.information import STATIC
from service.endpoints.pipeline import ServiceContext
from service.endpoints.remote_write import RemoteWriteEndpoint
from service.errors import from_http_exception
from service.http.admission import AdmissionControl
from service.http.middleware import Entrance, RequestMiddleware
from service.http.request import BodyLimits
from service.inference.backends import BACKENDS
from service.inference.batcher import Batcher
from service.inference.registry import ModelRegistry
from service.monitoring.background import BackgroundMonitor
from service.monitoring.logs import AccessLog
from service.monitoring.metrics import Metrics
from service.monitoring.periodic import Periodic
from service.settings import Settings
from service.shared_memory import SharedCounters, SharedDecisions

DESCRIPTION = """Encode, decode, reconstruct, sample, interpolate and score anomalies with the models that are served.

Errors are application/problem+json with a stable `code`. Bodies are JSON or, where a body is one array,
application/x-npy or application/x-safetensors with its options in the query; answers are JSON, either of these two, or
image/png, as Accept says."""


def create_app(settings: Settings, counts: SharedCounters | None = None) -> FastAPI:
    """The application. `app.state.service` is its `ServiceContext`. Raises ElboError if the device is not there.

    `app.state.entrance` is the same application, faster: what computes passes FastAPI by.

    counts: shared with the processes that serve beside this one, if there are any.
    """
    counts = counts or SharedCounters()
    metrics = Metrics(counts, settings.alert_half_life)
    largest = settings.max_batch_rows, settings.max_batch_bytes
    how = settings.backend, settings.threads, settings.precision
    what = settings.artifacts, choose_device(settings.device), settings.default_model, settings.keep_versions
    registry = ModelRegistry(*what, *how, *largest, SharedDecisions(counts, "backend", BACKENDS))
    counted = metrics.count_batch, metrics.pending_rows
    batcher = Batcher(*largest, settings.queue_rows, settings.threads, *counted, settings.queue_seconds)
    access = AccessLog(settings.log_format, enabled=settings.log_level in ("debug", "info"))
    limits = BodyLimits(settings.max_body_bytes, settings.held_bytes, settings.request_timeout, metrics.pending_bytes)
    admission = AdmissionControl(settings.queue_seconds, batcher, metrics, access)
    service = ServiceContext(settings, registry, batcher, metrics, limits, admission)
    receiver = RemoteWriteEndpoint(service, series_mapping.read(settings.remote_write))
    app = FastAPIOffline(
        title="Elbo",
        description=DESCRIPTION,
        version="1",
        lifespan=_lifespan(service, receiver, BackgroundMonitor(settings, metrics, registry), access),
        redirect_slashes=False,
        redoc_url=None,
        static_url="/static/docs",
        exception_handlers={HTTPException: _router_refused},
    )
    app.state.service = service
    endpoints = routes.endpoints(service, receiver)
    admission.paths = routes.in_line(endpoints)
    routes.register(app, endpoints)
    app.mount("/static", StaticFiles(directory=STATIC))
    parts = routes.direct(endpoints), metrics, access, limits, admission
    app.add_middleware(RequestMiddleware, *parts)
    app.state.entrance = Entrance(app, RequestMiddleware(app, *parts))
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign] # FastAPI's documented way
    return app


def _lifespan(
    service: ServiceContext, receiver: RemoteWriteEndpoint, monitor: BackgroundMonitor, access: AccessLog
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    watching = Periodic(service.registry.look, service.settings.poll_seconds, "the models could not be looked at")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        """Load and warm every model before the first request; finish every request before the end."""
        await asyncio.to_thread(service.registry.refresh)
        service.batcher.start()
        receiver.start()
        await monitor.start()
        watching.start()
        try:
            yield
        finally:
            service.draining = True
            await watching.close()
            await receiver.close()
            await service.batcher.close()
            await monitor.close()
            await access.close()

    return lifespan


async def _router_refused(request: Request, error: Exception) -> Response:
    """404 and 405 in our words."""
    assert isinstance(error, HTTPException)
    matching = (route for route in request.app.router.routes if route.matches(request.scope)[0] is not Match.NONE)
    methods = {method for route in matching for method in getattr(route, "methods", None) or ()}
    methods = methods or {"GET"}  # the path is inside a mounted folder
    allowed = sorted(methods | {"HEAD"} if "GET" in methods else methods)
    raise from_http_exception(error, request.method, request.url.path, allowed)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once, with the bodies' schemas that no handler's signature shows."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        template = "#/components/schemas/{model}"
        wanted = [(model, "validation") for model in routes.components()]
        _, definitions = models_json_schema(wanted, ref_template=template)  # type: ignore[arg-type] # a literal
        document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        app.openapi_schema = document
    return app.openapi_schema
