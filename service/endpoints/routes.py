"""The table of all endpoints: the path, the handler and the OpenAPI description of each endpoint."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from inspect import getdoc
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from service.access.scopes import OPEN, ROUTES
from service.backtest.answer import BacktestAnswer
from service.codec import ndjson, open_inference, pictures, remote_write
from service.codec.request_body import ARRAY_MEDIA_TYPES, JSON
from service.codec.response_body import ARRAY_FORMATS, IMAGE_FORMATS
from service.endpoints.backtest import BACKTEST, BacktestEndpoint
from service.endpoints.cloud.sagemaker import SageMakerEndpoint
from service.endpoints.cloud.vertex import VertexEndpoint
from service.endpoints.context import ServiceContext
from service.endpoints.examples import EXAMPLES, TEXTS
from service.endpoints.feedback import FEEDBACK, FeedbackEndpoint
from service.endpoints.inference import (
    ANOMALY,
    DECODE,
    ENCODE,
    IMPUTE,
    INTERPOLATE,
    RECONSTRUCT,
    SAMPLE,
    InferenceEndpoints,
)
from service.endpoints.information import InformationEndpoints
from service.endpoints.latent_tools import EDIT, NEIGHBOURS, LatentEndpoints
from service.endpoints.open_inference.endpoints import OpenInferenceEndpoints
from service.endpoints.open_inference.schemas import (
    InferenceAnswer,
    InferenceBody,
    InferenceError,
    ModelMetadata,
    ModelReady,
    ServerLive,
    ServerMetadata,
    ServerReady,
)
from service.endpoints.peers import PeersEndpoint
from service.endpoints.pipeline import RequestSpec
from service.endpoints.remote_write import RemoteWriteEndpoint
from service.errors import PROBLEM_JSON
from service.http.open_inference import INFER, INFER_VERSION, is_protocol_path
from service.http.request import request_of
from service.schemas import (
    AnomalyAnswer,
    Body,
    CalibrationScores,
    DecodeAnswer,
    EditAnswer,
    EncodeAnswer,
    FeedbackAnswer,
    Health,
    HeldOut,
    ImputeAnswer,
    InterpolateAnswer,
    ModelDetail,
    ModelList,
    NeighboursAnswer,
    PeersAnswer,
    PeersQuery,
    Problem,
    ReconstructAnswer,
    SampleAnswer,
)
from service.settings import Settings

Handler = Callable[[Any], Awaitable[Any]]
MODEL_ERRORS = (404, 406, 408, 413, 415, 422, 429, 500, 503, 504)
SUPPORT_ERRORS = (*MODEL_ERRORS, 409)  # of endpoints that not every model supports
WRITE_ERRORS = (408, 413, 415, 422, 500, 503)
LOOKUP_ERRORS = (404, 503)
PEERS_ERRORS = (*LOOKUP_ERRORS, 409, 422)
INFER_ERRORS = (404, 408, 409, 413, 415, 422, 429, 500, 503, 504)
FIND_ERRORS = (404, 409, 503)
KEY_ERRORS = (401, 403, 429)  # of routes that need an API key
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "an API key that `elbo key add` has made"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "the same key in another header"},
}
BINARY = {"schema": {"type": "string", "format": "binary"}}
TEXT = {"schema": {"type": "string"}}
STREAMED = (ndjson.MEDIA_TYPES[0],)  # media types of streamed responses
MODEL_PARAMETER = {
    "name": "model",
    "in": "query",
    "required": False,
    "schema": {"type": "string"},
    "description": "`name` (its newest version) or `name@version`; by default the default model",
}
REFERENCE_PARAMETER = {
    "name": "reference",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
    "description": "`name` (its newest version) or `name@version`; GET /models lists the names",
}
MODEL_NAME_PARAMETER = {
    "name": "name",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
    "description": "`NAME`, `NAME:decode` or `NAME:sample`, for a name that GET /models lists",
}
VERSION_PARAMETER = {
    "name": "version",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
    "description": "the version of the model",
}
JSON_LENGTH_HEADER = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "required": False,
    "schema": {"type": "integer", "minimum": 1},
    "description": "number of bytes of the JSON object, if binary numbers follow it in the body",
}
COMPRESSION_HEADER = {  # of remote write
    "name": "Content-Encoding",
    "in": "header",
    "required": True,
    "schema": {"type": "string", "enum": ["snappy"]},
    "description": "remote write is always compressed with snappy",
}
# Values that /docs fills in. A request that somebody only tries must not raise an alert.
PARAMETER_EXAMPLES = {"observe": False}


@dataclass(frozen=True)
class Endpoint:
    """One path, its handler, and its description in the OpenAPI document.

    Args:
        path: the path, with parameters in braces.
        handler: the function that responds to requests.
        errors: statuses of error responses.
        response: schema of a JSON response.
        media_type: media type of a response without a schema.
        spec: the request that an endpoint accepts; None for an endpoint that does not run a model.
        reads: media types of the request body, for an endpoint whose request body has no schema.
        query: schema of the options in the query of an endpoint without a body.
        body: schema of a JSON request body, for an endpoint of the Open Inference Protocol that reads one.
    """

    path: str
    handler: Handler
    errors: tuple[int, ...] = ()
    response: type[BaseModel] | None = None
    media_type: str = JSON
    spec: RequestSpec[Any, Any] | None = None
    reads: tuple[str, ...] = ()
    query: type[Body] | None = None
    body: type[BaseModel] | None = None

    @property
    def method(self) -> str:
        """Return POST for an endpoint that reads a body, otherwise GET."""
        return "POST" if self.spec or self.reads or self.body else "GET"


def endpoints(service: ServiceContext, receiver: RemoteWriteEndpoint) -> list[Endpoint]:
    """Return all endpoints."""
    infer, inform, rehearse = InferenceEndpoints(service), InformationEndpoints(service), BacktestEndpoint(service)
    latent = LatentEndpoints(service)
    model = "/models/{reference}"
    return [
        Endpoint("/anomaly", infer.anomaly, MODEL_ERRORS, AnomalyAnswer, spec=ANOMALY),
        Endpoint("/reconstruct", infer.reconstruct, MODEL_ERRORS, ReconstructAnswer, spec=RECONSTRUCT),
        Endpoint("/encode", infer.encode, SUPPORT_ERRORS, EncodeAnswer, spec=ENCODE),
        Endpoint("/decode", infer.decode, SUPPORT_ERRORS, DecodeAnswer, spec=DECODE),
        Endpoint("/sample", infer.sample, SUPPORT_ERRORS, SampleAnswer, spec=SAMPLE),
        Endpoint("/interpolate", infer.interpolate, SUPPORT_ERRORS, InterpolateAnswer, spec=INTERPOLATE),
        Endpoint("/edit", latent.edit, SUPPORT_ERRORS, EditAnswer, spec=EDIT),
        Endpoint("/neighbours", latent.neighbours, SUPPORT_ERRORS, NeighboursAnswer, spec=NEIGHBOURS),
        Endpoint("/impute", infer.impute, SUPPORT_ERRORS, ImputeAnswer, spec=IMPUTE),
        Endpoint("/backtest", rehearse.backtest, MODEL_ERRORS, BacktestAnswer, spec=BACKTEST),
        Endpoint("/feedback", FeedbackEndpoint(service).feedback, SUPPORT_ERRORS, FeedbackAnswer, spec=FEEDBACK),
        Endpoint("/api/v1/write", receiver.write, WRITE_ERRORS, reads=(remote_write.MEDIA_TYPE,)),
        Endpoint("/models", inform.models, response=ModelList),
        Endpoint(model, inform.model, LOOKUP_ERRORS, ModelDetail),
        Endpoint(f"{model}/peers", PeersEndpoint(service).peers, PEERS_ERRORS, PeersAnswer, query=PeersQuery),
        Endpoint(f"{model}/held-out", inform.held_out, LOOKUP_ERRORS, HeldOut),
        Endpoint(f"{model}/calibration", inform.calibration, LOOKUP_ERRORS, CalibrationScores),
        Endpoint(f"{model}/card", inform.card, LOOKUP_ERRORS, media_type="text/markdown"),
        Endpoint("/livez", inform.livez, response=Health),
        Endpoint("/readyz", inform.readyz, errors=(503,), response=Health),
        Endpoint("/metrics", inform.metrics, media_type="text/plain"),
        Endpoint("/", inform.page, media_type="text/html"),
        Endpoint("/docs", inform.docs, media_type="text/html"),
        *_open_inference_endpoints(OpenInferenceEndpoints(service, infer)),
    ]


def _open_inference_endpoints(protocol: OpenInferenceEndpoints) -> list[Endpoint]:
    model = "/v2/models/{name}"
    version = f"{model}/versions/{{version}}"
    return [
        Endpoint("/v2", protocol.server_metadata, response=ServerMetadata),
        Endpoint("/v2/health/live", protocol.server_live, response=ServerLive),
        Endpoint("/v2/health/ready", protocol.server_ready, (503,), ServerReady),
        Endpoint(model, protocol.model_metadata, FIND_ERRORS, ModelMetadata),
        Endpoint(version, protocol.version_metadata, FIND_ERRORS, ModelMetadata),
        Endpoint(f"{model}/ready", protocol.model_ready, FIND_ERRORS, ModelReady),
        Endpoint(f"{version}/ready", protocol.version_ready, FIND_ERRORS, ModelReady),
        Endpoint(INFER, protocol.infer, INFER_ERRORS, InferenceAnswer, body=InferenceBody),
        Endpoint(INFER_VERSION, protocol.infer_version, INFER_ERRORS, InferenceAnswer, body=InferenceBody),
    ]


def handlers(found: Iterable[Endpoint]) -> dict[str, Handler]:
    """Return the handlers of the POST endpoints by path. `RequestMiddleware` calls these handlers; FastAPI does not."""
    return {endpoint.path: endpoint.handler for endpoint in found if endpoint.method == "POST"}


def platform_handlers(service: ServiceContext, settings: Settings) -> dict[str, Handler]:
    """Return the handler of the cloud platform's requests for inference by path; none outside of a platform."""
    if not settings.predict_route:
        return {}
    inference = InferenceEndpoints(service)
    if settings.platform == "vertex":
        return {settings.predict_route: VertexEndpoint(service, inference).predict}
    return {settings.predict_route: SageMakerEndpoint(service, inference).invoke}


def admission_paths(found: Iterable[Endpoint]) -> frozenset[str]:
    """Return the paths under admission control. Remote write is exempt, because refused samples would be lost."""
    return frozenset(endpoint.path for endpoint in found if endpoint.spec or endpoint.body)


def register(app: FastAPI, found: Iterable[Endpoint], has_keys: bool) -> None:
    """Add every endpoint to `app`.

    `app` calls the handlers of the GET endpoints. It only documents the POST endpoints: the middleware handles them.

    Args:
        app: the application.
        found: the endpoints.
        has_keys: whether requests need an API key; if so, the document says which scope each endpoint needs.
    """
    for endpoint in found:
        app.add_api_route(
            endpoint.path,
            _documented_only if endpoint.method == "POST" else _handler_with_label(endpoint),
            methods=[endpoint.method],
            response_model=None,
            response_class=Response,  # otherwise the document would claim that every response can be JSON
            responses=_responses(endpoint, has_keys),
            openapi_extra={
                **_request_body(endpoint),
                "parameters": _parameters(endpoint),
                **(_security(endpoint) if has_keys else {}),
            },
            summary=(endpoint.handler.__doc__ or "").partition("\n")[0],
            description=getdoc(endpoint.handler),
            tags=[_tag(endpoint)],
            name=endpoint.handler.__name__,
            operation_id=endpoint.handler.__name__,
        )


def _tag(endpoint: Endpoint) -> str:
    if is_protocol_path(endpoint.path):
        return "open inference protocol"
    return "models" if endpoint.method == "POST" else "service"


async def _documented_only() -> None:
    raise AssertionError("RequestMiddleware handles POST requests")


def _handler_with_label(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """Return a function that sets the endpoint label of a request's metrics, then calls the endpoint's handler."""

    async def handle(request: Request) -> Response:
        request_of(request.scope).record.endpoint = endpoint.path
        response: Response = await endpoint.handler(request)
        return response

    return handle


def _security(endpoint: Endpoint) -> dict[str, Any]:
    """Return which scope the API key of a request needs; nothing for an endpoint that needs no key."""
    scope = ROUTES[endpoint.path]
    return {} if scope is OPEN else {"security": [{scheme: [str(scope)]} for scheme in SECURITY_SCHEMES]}


def _responses(endpoint: Endpoint, has_keys: bool) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI responses by status."""
    problem = {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    if is_protocol_path(endpoint.path):
        problem = {JSON: {"schema": {"$ref": "#/components/schemas/InferenceError"}}}
    statuses = {*endpoint.errors, *(KEY_ERRORS if has_keys and ROUTES[endpoint.path] is not OPEN else ())}
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": "an error", "content": problem} for status in sorted(statuses)
    }
    if endpoint.reads:
        return {204: {"description": "the samples are accepted"}, **errors}
    success: dict[str, Any] = {"description": "success", "content": {}}
    if endpoint.response:
        success["content"][JSON] = {}  # FastAPI adds the schema; generated clients read the first format
        success["model"] = endpoint.response
    else:
        success["content"][endpoint.media_type] = TEXT
    if endpoint.body:
        success["content"][open_inference.BINARY] = BINARY
    if endpoint.spec:
        if not endpoint.spec.json_output:
            binary_formats = (IMAGE_FORMATS if endpoint.spec.png_output else ARRAY_FORMATS)[1:]  # without JSON
            success["content"] |= dict.fromkeys(binary_formats, BINARY)
            success["content"] |= {name: TEXT for name in endpoint.spec.readers if name in STREAMED}
        success["headers"] = {
            "Elbo-Model": {
                "schema": {"type": "string"},
                "description": "name@version of the model",
            }
        }
    return {200: success, **errors}


def _request_body(endpoint: Endpoint) -> dict[str, Any]:
    """Return the OpenAPI request body of a POST endpoint; nothing for a GET endpoint."""
    if endpoint.reads:
        return {"requestBody": {"required": True, "content": dict.fromkeys(endpoint.reads, BINARY)}}
    if endpoint.body:
        json_body = {"schema": {"$ref": f"#/components/schemas/{endpoint.body.__name__}"}}
        return {"requestBody": {"required": True, "content": {JSON: json_body, open_inference.BINARY: BINARY}}}
    spec = endpoint.spec
    if spec is None:
        return {}
    schema = {"$ref": f"#/components/schemas/{spec.schema.__name__}"}
    content: dict[str, Any] = {JSON: {"schema": schema, "examples": EXAMPLES[spec.schema]}}
    content |= {media_type: TEXTS[media_type] for media_type in spec.readers}
    if spec.pictures:
        content |= dict.fromkeys(pictures.MEDIA_TYPES, BINARY)
    if spec.array_field:
        content |= dict.fromkeys(ARRAY_MEDIA_TYPES, BINARY)
    needs_body = bool(spec.row_fields) or any(field.is_required() for field in spec.schema.model_fields.values())
    return {"requestBody": {"required": needs_body, "content": content}}


def _parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    """Return the OpenAPI parameters: in the path, in the query, or in a header."""
    if endpoint.spec:
        return [MODEL_PARAMETER, *_query_options(endpoint.spec.schema)]
    if endpoint.reads:
        return [COMPRESSION_HEADER]
    if is_protocol_path(endpoint.path):
        named = {"name": MODEL_NAME_PARAMETER, "version": VERSION_PARAMETER}
        in_path = [parameter for name, parameter in named.items() if f"{{{name}}}" in endpoint.path]
        return [*in_path, JSON_LENGTH_HEADER] if endpoint.body else in_path
    options = _query_options(endpoint.query) if endpoint.query else []
    return [REFERENCE_PARAMETER, *options] if "{reference}" in endpoint.path else options


def _query_options(schema: type[Body]) -> list[dict[str, Any]]:
    """Return a query parameter for each field that is neither an array nor an object.

    A default is described but not declared: /docs and generated clients would send a declared default, and the same
    field in the body would then be given twice.
    """
    options = []
    for name, field in schema.model_json_schema()["properties"].items():
        description, default = field.pop("description", ""), field.pop("default", None)
        field.pop("title", None)
        types = [part for part in field.pop("anyOf", ()) if part != {"type": "null"}]
        value = types[0] if len(types) == 1 else field
        if value.get("type") not in ("boolean", "integer", "number", "string"):
            continue
        if default is not None:
            description += f". By default {str(default).lower() if isinstance(default, bool) else default}"
        option = {"name": name, "in": "query", "required": False, "schema": value, "description": description}
        if name in PARAMETER_EXAMPLES:
            option["example"] = PARAMETER_EXAMPLES[name]
        options.append(option)
    return options


def state_row_limit(document: dict[str, Any], found: Iterable[Endpoint], max_rows: int) -> None:
    """Write ELBO_MAX_ROWS into the fields of an OpenAPI document that hold rows, or that ask for a number of rows."""
    for endpoint in found:
        if spec := endpoint.spec:
            properties = document["components"]["schemas"][spec.schema.__name__]["properties"]
            for name in spec.row_fields:
                properties[name]["maxItems"] = max_rows
            if spec.count_field:
                properties[spec.count_field]["maximum"] = max_rows
                for parameter in document["paths"][endpoint.path]["post"]["parameters"]:
                    if parameter["name"] == spec.count_field:
                        parameter["schema"]["maximum"] = max_rows


def components() -> list[type[BaseModel]]:
    """Return the schemas that the OpenAPI document needs but FastAPI cannot find in the signatures of the handlers."""
    return [Problem, InferenceError, InferenceBody, *EXAMPLES]
