"""Every endpoint, listed once: its path, its handler, and what the OpenAPI document says of it."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from inspect import getdoc
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from service.anomaly.inputs import RECORD_READERS
from service.codec import npy, png, remote_write, safetensors
from service.codec.request_body import JSON
from service.endpoints.examples import EXAMPLES, TEXTS
from service.endpoints.inference import InferenceEndpoints
from service.endpoints.information import InformationEndpoints
from service.endpoints.pipeline import ServiceContext
from service.endpoints.remote_write import RemoteWriteEndpoint
from service.errors import PROBLEM_JSON
from service.http.request import request_of
from service.schemas import (
    AnomalyAnswer,
    AnomalyBody,
    Body,
    CalibrationScores,
    DecodeAnswer,
    DecodeBody,
    EncodeAnswer,
    EncodeBody,
    Health,
    HeldOut,
    InterpolateAnswer,
    InterpolateBody,
    ModelDetail,
    ModelList,
    Problem,
    ReconstructAnswer,
    ReconstructBody,
    SampleAnswer,
    SampleBody,
)

Handler = Callable[[Any], Awaitable[Any]]
CALL_ERRORS = (404, 406, 408, 413, 415, 422, 429, 500, 503, 504)
WRITE_ERRORS = (408, 413, 415, 422, 500, 503)
BINARY = {"schema": {"type": "string", "format": "binary"}}


@dataclass(frozen=True)
class Endpoint:
    """One path and method.

    `array` and `picture`: whether npy and safetensors come in, and whether image/png goes out.
    `reads`: other media types of its body.
    """

    path: str
    handler: Handler
    answer: type[BaseModel] | None
    body: type[Body] | None = None
    array: bool = False
    picture: bool = False
    errors: tuple[int, ...] = CALL_ERRORS
    media_type: str = JSON
    reads: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """POST where there is a body."""
        return "POST" if self.body or self.reads else "GET"


def endpoints(service: ServiceContext, receiver: RemoteWriteEndpoint) -> list[Endpoint]:
    """All of them, the busiest first: the router tries one after the other."""
    infer, inform = InferenceEndpoints(service), InformationEndpoints(service)
    return [
        Endpoint("/anomaly", infer.anomaly, AnomalyAnswer, AnomalyBody, array=True, reads=tuple(RECORD_READERS)),
        Endpoint("/reconstruct", infer.reconstruct, ReconstructAnswer, ReconstructBody, True, True),
        Endpoint("/encode", infer.encode, EncodeAnswer, EncodeBody, array=True),
        Endpoint("/decode", infer.decode, DecodeAnswer, DecodeBody, True, True),
        Endpoint("/sample", infer.sample, SampleAnswer, SampleBody, picture=True),
        Endpoint("/interpolate", infer.interpolate, InterpolateAnswer, InterpolateBody, picture=True),
        Endpoint("/api/v1/write", receiver.write, None, errors=WRITE_ERRORS, reads=(remote_write.MEDIA_TYPE,)),
        Endpoint("/models", inform.models, ModelList, errors=()),
        Endpoint("/models/{reference}", inform.model, ModelDetail, errors=(404, 503)),
        Endpoint("/models/{reference}/held-out", inform.held_out, HeldOut, errors=(404, 503)),
        Endpoint("/models/{reference}/calibration", inform.calibration, CalibrationScores, errors=(404, 503)),
        Endpoint("/models/{reference}/card", inform.card, None, errors=(404, 503), media_type="text/markdown"),
        Endpoint("/livez", inform.livez, Health, errors=()),
        Endpoint("/readyz", inform.readyz, Health, errors=(503,)),
        Endpoint("/metrics", inform.metrics, None, errors=(), media_type="text/plain"),
        Endpoint("/", inform.page, None, errors=(), media_type="text/html"),
    ]


def handlers(found: Iterable[Endpoint]) -> dict[str, Handler]:
    """Return the handlers of the POST endpoints by path: `RequestMiddleware` calls them, not FastAPI."""
    return {endpoint.path: endpoint.handler for endpoint in found if endpoint.method == "POST"}


def admission_paths(found: Iterable[Endpoint]) -> frozenset[str]:
    """Return the paths under admission control. Remote write is exempt: refusing it would lose samples."""
    return frozenset(endpoint.path for endpoint in found if endpoint.body)


def register(app: FastAPI, found: Iterable[Endpoint]) -> None:
    """Add every endpoint to `app`: GET endpoints to be served, POST endpoints to be documented."""
    for endpoint in found:
        app.add_api_route(
            endpoint.path,
            _documented_only if endpoint.method == "POST" else _labelled(endpoint),
            methods=[endpoint.method],
            response_model=None,
            responses=_responses(endpoint),
            openapi_extra=_request(endpoint),
            summary=(endpoint.handler.__doc__ or "").partition("\n")[0],
            description=getdoc(endpoint.handler),
            tags=["models" if endpoint.method == "POST" else "service"],
            name=endpoint.handler.__name__,
            operation_id=endpoint.handler.__name__,
        )


async def _documented_only() -> None:
    raise AssertionError("RequestMiddleware answers POST endpoints")


def _labelled(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler of a GET endpoint; metrics label its requests with the endpoint's path."""

    async def handle(request: Request) -> Response:
        request_of(request.scope).record.endpoint = endpoint.path
        response: Response = await endpoint.handler(request)
        return response

    return handle


def _responses(endpoint: Endpoint) -> dict[int | str, dict[str, Any]]:
    problem = {"schema": {"$ref": "#/components/schemas/Problem"}}
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"description": "a problem", "content": {PROBLEM_JSON: problem}} for status in endpoint.errors
    }
    if endpoint.method == "POST" and not endpoint.body:
        return {204: {"description": "taken"}, **refusals}
    answer: dict[str, Any] = {"description": "the answer", "content": {}}
    if endpoint.answer:
        answer["model"] = endpoint.answer
    else:
        answer["content"][endpoint.media_type] = {"schema": {"type": "string"}}
    if endpoint.body:
        answer["content"][npy.MEDIA_TYPE] = answer["content"][safetensors.MEDIA_TYPE] = BINARY
        answer["headers"] = {
            "Elbo-Model": {"schema": {"type": "string"}, "description": "name@version of the model that answered"}
        }
    if endpoint.picture:
        answer["content"][png.MEDIA_TYPE] = BINARY
    return {200: answer, **refusals}


def _request(endpoint: Endpoint) -> dict[str, Any] | None:
    content: dict[str, Any] = {media_type: TEXTS.get(media_type, BINARY) for media_type in endpoint.reads}
    if endpoint.body is None:
        return {"requestBody": {"required": True, "content": content}} if content else None
    schema = {"$ref": f"#/components/schemas/{endpoint.body.__name__}"}
    content = {JSON: {"schema": schema, "examples": EXAMPLES[endpoint.body]}, **content}
    if endpoint.array:
        content[npy.MEDIA_TYPE] = content[safetensors.MEDIA_TYPE] = BINARY
    model = {
        "name": "model", "in": "query", "required": False, "schema": {"type": "string"},
        "description": "`name` (its newest version) or `name@version`; without it the default model answers",
    }  # fmt: skip
    return {"requestBody": {"required": True, "content": content}, "parameters": [model]}


def components() -> list[type[BaseModel]]:
    """The schemas that the document names by reference, which FastAPI does not find by itself."""
    return [Problem, *EXAMPLES]
