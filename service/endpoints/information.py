"""The GET endpoints: models and what their artifacts show, probes, metrics, the front page."""

from dataclasses import asdict
from pathlib import Path

import orjson
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from models.artifact import CALIBRATION, CARD, HELD_OUT
from service.codec.request_body import JSON
from service.endpoints.pipeline import ServiceContext
from service.errors import NotShown
from service.inference.registry import ServedModel, describe

STATIC = Path(__file__).parents[1] / "static"
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DETAIL = {
    "features", "training", "data", "recalibration", "versions", "weights_sha256",
    "history", "latent_report", "spectrum", "total_variance", "comparison",
}  # fmt: skip


class InformationEndpoints:
    """The endpoints of one service."""

    def __init__(self, service: ServiceContext) -> None:
        self.service = service
        self._page = (STATIC / "index.html").read_bytes()

    async def models(self, _: Request) -> Response:
        """Every loaded version, and those that failed to load."""
        catalogue = self.service.registry.catalogue
        found = [
            describe(served)
            for numbers in catalogue.models.values()
            for _, served in sorted(numbers.items(), reverse=True)
        ]
        failures = [asdict(failure) for failure in catalogue.failures]
        return _json({"default": catalogue.default, "models": found, "failures": failures})

    async def model(self, request: Request) -> Response:
        """One version with its features, training and data, and how its training went."""
        served = self.service.find(request.path_params["reference"])
        return _json({**describe(served), **served.manifest.model_dump(include=DETAIL)})

    async def held_out(self, request: Request) -> Response:
        """Codes of rows that did not train the model, their labels, and the first of these rows."""
        return self._exhibit(request, HELD_OUT)

    async def calibration(self, request: Request) -> Response:
        """The scores that p-values and thresholds rest on, ascending."""
        return self._exhibit(request, CALIBRATION)

    async def card(self, request: Request) -> Response:
        """The model card, in Markdown."""
        _, content = self._shown(request, CARD)
        return Response(content, media_type="text/markdown; charset=utf-8")

    def _exhibit(self, request: Request, name: str) -> Response:
        """The JSON object `name` of the artifact as it stands there, with the model's name and version before it."""
        served, content = self._shown(request, name)
        who = orjson.dumps({"model": served.name, "version": served.version})
        return Response(who[:-1] + b"," + content[1:], media_type=JSON)

    def _shown(self, request: Request, name: str) -> tuple[ServedModel, bytes]:
        served = self.service.find(request.path_params["reference"])
        if name not in served.exhibits:
            raise NotShown(
                f"{served.name}@{served.version} carries no {name}",
                hint="train it again with this version of Elbo, and without --private",
            )
        return served, served.exhibits[name]

    async def livez(self, _: Request) -> Response:
        """Whether the process answers at all."""
        return _json({"status": "alive"})

    async def readyz(self, _: Request) -> Response:
        """Whether requests are welcome: 503 until a model is served, and from the moment of shutting down."""
        self.service.require_ready()
        return _json({"status": "ready"})

    async def metrics(self, _: Request) -> Response:
        """Metrics for Prometheus, of all processes that serve here."""
        text = self.service.metrics.exposition(self.service.registry.catalogue)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    async def page(self, _: Request) -> Response:
        """What is served, for a person."""
        return HTMLResponse(self._page, headers={"content-security-policy": PAGE_POLICY})


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type=JSON)
