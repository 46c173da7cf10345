"""Build the ASGI application from the components of the service."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import RedirectResponse
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from models.artifact import choose_device
from models.signatures import TrustedKeySource
from service.access.control import AccessControl
from service.access.limits import REFRESH_SECONDS
from service.anomaly import series_mapping
from service.anomaly.group_memory import GroupMemory
from service.endpoints import routes
from service.endpoints.context import ServiceContext
from service.endpoints.direct import DirectInference
from service.endpoints.information import DOCS_STATIC, STATIC
from service.endpoints.remote_write import RemoteWriteEndpoint
from service.errors import from_http_exception
from service.freed_memory import RETURN_SECONDS, return_freed_memory
from service.http.admission import AdmissionControl
from service.http.cross_site import AllowedHosts
from service.http.direct import DirectHeads
from service.http.middleware import RequestMiddleware
from service.http.platform_routes import PlatformRoutes
from service.http.protocol import Protocol
from service.http.refusal import HeadRefusal
from service.http.request import BodyLimits
from service.http.turns import Turns
from service.inference.backend_selection import BACKENDS, DECISIONS
from service.inference.batcher import Batcher
from service.inference.model_loader import ModelLoader
from service.inference.registry import ModelRegistry
from service.inference.trial import TrialClient
from service.mirroring import RepositoryPolling, registry_failures
from service.monitoring.background import BackgroundMonitor
from service.monitoring.logs import AccessLog, choose_format
from service.monitoring.metrics import Metrics
from service.monitoring.periodic import PeriodicTask
from service.monitoring.unserved_series import RENEWAL_SECONDS
from service.settings import Settings
from service.shared_memory import SharedCounters, SharedDecisions

DESCRIPTION = """Run the served models: encode, decode, reconstruct, sample, interpolate, and score anomalies.

A request body is JSON. A single array may also be sent as application/x-npy or application/x-safetensors; the
other fields are then query parameters. A field must not be in the body and in the query at once.

A response is JSON, application/x-npy, application/x-safetensors or, for images, image/png: the Accept header chooses.
An error is application/problem+json with a stable `code`."""

RESPONSE_HEADERS = (  # that pages of other origins may read
    "Elbo-Model", "Elbo-Seed", "RateLimit", "RateLimit-Policy", "Retry-After", "Server-Timing", "WWW-Authenticate",
    "X-Request-Id",
)  # fmt: skip


def create_app(
    settings: Settings,
    counters: SharedCounters | None = None,
    trials: TrialClient | None = None,
    temporary_folder: Path | None = None,
) -> FastAPI:
    """Return the application.

    `app.state.service` is its `ServiceContext`. `app.state.protocol` is uvicorn's HTTP protocol with admission control.
    The application also runs under another protocol, with three drawbacks: a request is refused only after its task has
    started, some waits for a client have no time limit, and the body of a request that offers an upgrade may be lost.

    `RequestMiddleware` replaces FastAPI's whole middleware stack. The outermost layer of that stack would turn errors
    into responses of its own format before `RequestMiddleware` could handle them.

    Args:
        settings: the settings of the service.
        counters: the counters that all workers share; by default, counters of this process alone.
        trials: tries artifacts out in another process before this one loads them, as `elbo serve` does; by default,
            artifacts are inspected, but not tried out.
        temporary_folder: the folder of the memory of groups if ELBO_STATE is not set; by default, the application makes
            one when it first needs it.

    Raises:
        ElboError: if the device is not available, if the file of API keys, ELBO_TRUSTED_KEYS, ELBO_REMOTE_WRITE or a
            variable of OpenTelemetry is not valid, or if the folder ELBO_STATE cannot be used.
    """
    counters = counters or SharedCounters()
    metrics = Metrics(
        counters,
        settings.alert_half_life,
        settings.alert_max_age_seconds,
        has_keys=settings.api_keys_file is not None,
    )
    metrics.trace_requests(os.environ)
    access = AccessLog(choose_format(settings.log_format), enabled=settings.log_level in ("debug", "info"))
    access.lines.count_lost_in(metrics.lost_log_lines)
    loader = ModelLoader(
        device=choose_device(settings.device),
        backend=settings.backend,
        threads=settings.threads,
        precision=settings.precision,
        max_batch_rows=settings.max_batch_rows,
        max_batch_bytes=settings.max_batch_bytes,
        decisions=SharedDecisions(counters, DECISIONS, BACKENDS),
        trials=trials,
    )
    registry = ModelRegistry(
        settings.artifact_folder,
        loader,
        default_model=settings.default_model,
        keep_versions=settings.keep_versions,
        keys=TrustedKeySource(settings.trusted_keys) if settings.trusted_keys else None,
        read_failures=partial(registry_failures, settings) if settings.repository else tuple,
    )
    batcher = Batcher(
        max_batch_rows=settings.max_batch_rows,
        max_batch_bytes=settings.max_batch_bytes,
        threads=settings.threads,
        on_batch=metrics.count_batch,
        exported_rows=metrics.pending_rows,
    )
    admission = AdmissionControl(
        batcher,
        max_rows=settings.queue_rows,
        max_wait=settings.queue_seconds,
        max_held_bytes=settings.held_bytes,
        exported_bytes=metrics.pending_bytes,
        exported_unread=metrics.unread_bytes,
    )
    service = ServiceContext(
        settings=settings,
        registry=registry,
        batcher=batcher,
        metrics=metrics,
        admission=admission,
        groups=GroupMemory(
            settings.state or temporary_folder,
            settings.max_groups,
            has_calibration=settings.online_calibration,
            is_temporary=settings.state is None,
        ),
    )
    if trials:
        trials.is_stopped = lambda: service.draining
    keys = AccessControl(settings.api_keys_file, counters) if settings.api_keys_file else None
    receiver = RemoteWriteEndpoint(service, series_mapping.read_mappings(settings.remote_write))
    app = FastAPIOffline(
        title="Elbo",
        description=DESCRIPTION,
        version="1",
        lifespan=_lifespan(service, receiver, BackgroundMonitor(settings, metrics, registry), access, keys),
        redirect_slashes=False,
        docs_url=None,  # `InformationEndpoints.docs`, which has a Content-Security-Policy
        redoc_url=None,
        static_url=DOCS_STATIC,
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False},  # sends nothing
    )
    app.state.service = service
    endpoints = routes.endpoints(service, receiver)
    routes.register(app, endpoints, has_keys=keys is not None)
    app.mount("/static", StaticFiles(directory=STATIC))
    allowed_hosts = AllowedHosts(settings.allowed_hosts.split(",")) if settings.allowed_hosts else None
    platform = PlatformRoutes(settings.health_route, settings.predict_route, settings.platform == "vertex")
    platform_handlers = routes.platform_handlers(service, settings)
    entry_point: ASGIApp = RequestMiddleware(
        _router_of(app),
        handlers=routes.handlers(endpoints) | platform_handlers,
        metrics=metrics,
        access=access,
        limits=BodyLimits(max_bytes=settings.max_body_bytes, seconds=settings.request_timeout),
        admission=admission,
        keys=keys,
        root_path=settings.root_path,
        allowed_hosts=allowed_hosts,
        platform=platform,
    )
    if settings.cors_origins:
        entry_point = CORSMiddleware(
            entry_point,
            allow_origins=settings.cors_origins.split(","),
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=RESPONSE_HEADERS,
        )
    app.middleware_stack = entry_point
    paths = routes.admission_paths(endpoints).union(platform_handlers)
    direct = DirectInference(service, access, allowed_hosts, keys)
    head_refusal = HeadRefusal(metrics, access, settings.root_path, keys, platform)
    turns = app.state.turns = Turns()
    turns.work += direct.go_on, head_refusal.delayed.send_due
    app.state.protocol = partial(
        Protocol,
        admission=admission,
        head_refusal=head_refusal,
        count_closed=metrics.count_closed,
        paths=paths | {settings.root_path + path for path in paths},
        turns=turns,
        direct=DirectHeads(direct, settings.max_body_bytes),
    )
    app.openapi = lambda: _openapi(app, endpoints, keys is not None)  # type: ignore[method-assign] # FastAPI's documented way
    return app


def _lifespan(
    service: ServiceContext,
    receiver: RemoteWriteEndpoint,
    monitor: BackgroundMonitor,
    access: AccessLog,
    keys: AccessControl | None,
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    scanning = PeriodicTask(service.registry.poll, service.settings.poll_seconds, "failed to scan the artifact folder")
    repository = RepositoryPolling(service.settings, service.metrics, scanning.run_now)
    service.on_reload.append(scanning.run_now)

    async def free_unserved_series() -> None:
        service.metrics.free_unserved(service.registry.catalogue)
        service.groups.close_unserved(service.registry.catalogue)
        if service.metrics.is_leader:
            await asyncio.to_thread(service.groups.remove_unserved, service.registry.catalogue)

    counting = PeriodicTask(service.count_groups, RENEWAL_SECONDS, "failed to count the groups that are remembered")
    returning = PeriodicTask(
        partial(asyncio.to_thread, return_freed_memory), RETURN_SECONDS, "failed to return free memory"
    )
    freeing = PeriodicTask(free_unserved_series, RENEWAL_SECONDS, "failed to free the metrics of removed versions")
    key_tasks = []
    if keys:
        service.on_reload.append(partial(keys.reload, always=True))
        key_tasks.append(PeriodicTask(keys.reload, service.settings.poll_seconds, "failed to read the API keys"))
        key_tasks.append(PeriodicTask(keys.refresh_limits, REFRESH_SECONDS, "failed to count requests per API key"))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        """Load and warm every model before the first request; finish every request before the process ends."""
        await repository.start()
        await service.registry.poll()
        service.batcher.start()
        receiver.start()
        await monitor.start()
        scanning.start()
        await free_unserved_series()
        freeing.start()
        returning.start()
        if service.metrics.is_leader:
            await service.count_groups()
            counting.start()
        for task in key_tasks:
            task.start()
        try:
            yield
        finally:
            service.draining = True
            await repository.close()
            await scanning.close()
            await freeing.close()
            await returning.close()
            if service.metrics.is_leader:
                await counting.close()
            for task in key_tasks:
                await task.close()
            await receiver.close()  # while the batcher can still score the receiver's last rows
            await service.batcher.close()
            service.groups.close()
            service.readers.shutdown(wait=False, cancel_futures=True)
            await monitor.close()
            await access.close()
            if service.metrics.tracer:
                await asyncio.to_thread(service.metrics.tracer.close)

    return lifespan


def _router_of(app: FastAPI) -> ASGIApp:
    """Return the router of `app`, without FastAPI's middleware. The router raises 404 and 405 as a ServiceError."""
    router = AsyncExitStackMiddleware(app.router)  # route handlers expect FastAPI's exit stack in the scope

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = app
        root_path = scope.get("root_path")
        if root_path and scope["path"] == root_path:  # the page has relative links, which need a path that ends with /
            await RedirectResponse(root_path + "/")(scope, receive, send)
            return
        try:
            await router(scope, receive, send)
        except HTTPException as error:
            allowed = _allowed_methods(app, scope)
            raise from_http_exception(error, scope["method"], scope["path"], allowed) from None

    return route


def _allowed_methods(app: FastAPI, scope: Scope) -> list[str]:
    matching = [route for route in app.router.routes if route.matches(scope)[0] is not Match.NONE]
    methods = {method for route in matching for method in getattr(route, "methods", None) or ()}
    methods = methods or {"GET"}  # a mounted folder of static files has no `methods`
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def _openapi(app: FastAPI, endpoints: list[routes.Endpoint], has_keys: bool) -> dict[str, Any]:
    """Return the OpenAPI document, including the schemas that FastAPI cannot find in the handlers' signatures."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        models = [(model, "validation") for model in routes.components()]
        _, definitions = models_json_schema(
            models,  # type: ignore[arg-type] # "validation" is a literal type
            ref_template="#/components/schemas/{model}",
        )
        document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        routes.state_row_limit(document, endpoints, app.state.service.settings.max_rows)
        if has_keys:
            document["components"]["securitySchemes"] = routes.SECURITY_SCHEMES
        app.openapi_schema = document
    return app.openapi_schema
