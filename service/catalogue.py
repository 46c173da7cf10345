"""The GET endpoints: models, probes, metrics, the front page."""

from dataclasses import asdict
from pathlib import Path

import orjson
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from service.api import Service
from service.codec.body import JSON
from service.repository import describe

STATIC = Path(__file__).parent / "static"
DETAIL = {"features", "training", "data", "recalibration", "versions", "weights_sha256"}  # of the manifest
PAGE_POLICY = "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"


class Information:
    """The endpoints of one service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._page = (STATIC / "index.html").read_bytes()

    async def models(self, _: Request) -> Response:
        """Every loaded version, and those that failed to load."""
        catalogue = self.service.repository.catalogue
        found = [
            describe(served)
            for numbers in catalogue.models.values()
            for _, served in sorted(numbers.items(), reverse=True)
        ]
        failures = [asdict(failure) for failure in catalogue.failures]
        return _json({"default": catalogue.default, "models": found, "failures": failures})

    async def model(self, request: Request) -> Response:
        """One version with its features, training and data."""
        served = self.service.find(request.path_params["reference"])
        manifest = served.manifest
        detail = manifest.model_dump(include=DETAIL)
        return _json({**describe(served), **detail})

    async def livez(self, _: Request) -> Response:
        """Whether the process answers at all."""
        return _json({"status": "alive"})

    async def readyz(self, _: Request) -> Response:
        """Whether requests are welcome: 503 until a model is served, and from the moment of shutting down."""
        self.service.require_ready()
        return _json({"status": "ready"})

    async def metrics(self, _: Request) -> Response:
        """Metrics for Prometheus, of all processes that serve here."""
        text = self.service.telemetry.exposition(self.service.repository.catalogue)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def page(self, _: Request) -> Response:
        """What is served, for a person."""
        return HTMLResponse(self._page, headers={"content-security-policy": PAGE_POLICY})


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type=JSON)
