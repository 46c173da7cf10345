"""The GET endpoints: models and their exhibits, health probes, metrics, the explorer page."""

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from fastapi.openapi.docs import get_swagger_ui_html
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPEN_METRICS_LATEST
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from models.artifact import CALIBRATION, CARD, HELD_OUT
from service.anomaly.group_memory import rules_of
from service.anomaly.online_calibration import default_incident_rows
from service.codec.request_body import JSON
from service.endpoints.context import ServiceContext
from service.endpoints.offload import MAX_LOOP_NS, run_in_thread_if_long
from service.errors import NotShown
from service.http.security_headers import page_policy
from service.inference.latent_space import BadExhibitError
from service.inference.served_model import ServedModel, describe

STATIC = Path(__file__).parents[1] / "static"
OPEN_METRICS = "application/openmetrics-text"
DOCS_STATIC = "/static/docs"  # where fastapi-offline serves the files of Swagger UI
DETAIL_FIELDS = {
    "features", "policy", "training", "data", "recalibration", "versions", "weights_sha256",
    "history", "latent_report", "spectrum", "total_variance", "comparison", "timeline",
}  # fmt: skip


class InformationEndpoints:
    """The handlers of the GET endpoints."""

    def __init__(self, service: ServiceContext) -> None:
        self._service = service
        self._page = (STATIC / "index.html").read_bytes()

    async def models(self, _: Request) -> Response:
        """List the model versions that are loaded, and the model versions that failed to load."""
        catalogue = self._service.registry.catalogue
        models = [
            describe(served)
            for versions in catalogue.models.values()
            for _, served in sorted(versions.items(), reverse=True)
        ]
        failures = [asdict(failure) for failure in catalogue.failures]
        return _json({"default": catalogue.default, "models": models, "failures": failures})

    async def model(self, request: Request) -> Response:
        """Describe one model version: the features, the training data and the history of the training run."""
        served = self._find(request)
        directions = await run_in_thread_if_long(partial(_labels, served), math.inf)
        details = served.manifest.model_dump(include=DETAIL_FIELDS)
        return _json({**describe(served), **details, **_in_time(served), "directions": directions})

    async def held_out(self, request: Request) -> Response:
        """Return the latents and labels of held-out rows, and the values of the first few of these rows."""
        return self._json_exhibit(request, HELD_OUT)

    async def calibration(self, request: Request) -> Response:
        """Return the calibration scores in ascending order. P-values and thresholds are computed from these scores."""
        return self._json_exhibit(request, CALIBRATION)

    async def card(self, request: Request) -> Response:
        """Return the model card in Markdown."""
        _, content = self._exhibit(request, CARD)
        return Response(content, media_type="text/markdown; charset=utf-8")

    async def livez(self, _: Request) -> Response:
        """Respond with 200 while the process runs."""
        return _json({"status": "alive"})

    async def readyz(self, _: Request) -> Response:
        """Respond with 200 while requests are accepted; with 503 until a model is served and during shutdown."""
        self._service.require_ready()
        return _json({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """Return the metrics of all workers for Prometheus.

        If requests are traced, a scraper that accepts OpenMetrics gets this format, with trace ids as exemplars.
        """
        metrics = self._service.metrics
        is_open = metrics.tracer is not None and OPEN_METRICS in request.headers.get("accept", "")
        write = partial(metrics.exposition, self._service.registry.catalogue, is_open_metrics=is_open)
        # In the event loop, which owns the metrics, and at most once per pass of the loop: it takes several ms.
        text = await run_in_thread_if_long(write, MAX_LOOP_NS)
        media_type = OPEN_METRICS_LATEST if is_open else CONTENT_TYPE_LATEST
        return Response(text, headers={"content-type": media_type})

    async def page(self, _: Request) -> Response:
        """Return the explorer page."""
        return HTMLResponse(self._page, headers={"content-security-policy": page_policy()})

    async def docs(self, request: Request) -> Response:
        """Return the page that shows the OpenAPI document and sends requests."""
        root = request.scope.get("root_path", "")
        static = root + DOCS_STATIC
        page = get_swagger_ui_html(
            openapi_url=f"{root}/openapi.json",
            title="Elbo - HTTP reference",
            swagger_js_url=f"{static}/swagger-ui-bundle.js",
            swagger_css_url=f"{static}/swagger-ui.css",
            swagger_favicon_url=f"{static}/favicon.png",
        )
        page.headers["content-security-policy"] = page_policy(bytes(page.body))
        return page

    def _find(self, request: Request) -> ServedModel:
        return self._service.find(request.path_params["reference"])

    def _json_exhibit(self, request: Request, name: str) -> Response:
        """Return a JSON exhibit of the artifact, with the model's name and version as additional first fields.

        The two fields are inserted into the JSON text without parsing it.
        """
        served, content = self._exhibit(request, name)
        head = orjson.dumps({"model": served.name, "version": served.version})
        return Response(head[:-1] + b"," + content[1:], media_type=JSON)

    def _exhibit(self, request: Request, name: str) -> tuple[ServedModel, bytes]:
        served = self._find(request)
        if name not in served.exhibits:
            raise NotShown(
                f"{served.name}@{served.version} has no {name} in its artifact",
                hint="train the model again with this version of Elbo and without --private",
            )
        return served, served.exhibits[name]


def _labels(served: ServedModel) -> list[str]:
    """Return the labels towards which /edit can move rows. Run this in a thread: it may take 60 ms."""
    try:
        return list(served.label_means)
    except BadExhibitError:
        return []


def _in_time(served: ServedModel) -> dict[str, Any]:
    """Return the fields of a `ModelDetail` that only models with times have, besides `timeline`."""
    if served.manifest.timeline is None:
        return {}
    rules = rules_of(served, has_calibration=True)
    return {
        "incident_rows": rules.incident_rows or default_incident_rows(rules.rows),
        "scaled_by_group": rules.features is not None,
    }


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type=JSON)
