"""The handlers of the Open Inference Protocol."""

from functools import partial
from importlib.metadata import version as installed_version
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
from starlette.requests import Request
from starlette.responses import Response

from models.errors import join_names
from service.anomaly.inputs import InputRows, with_default_alpha
from service.codec import npy
from service.codec import open_inference as codec
from service.codec.budget import NO_LIMIT, Budget
from service.codec.compression import decompress_gzip, is_gzip
from service.codec.request_body import is_json, loads_value, media_type_of
from service.endpoints import offload
from service.endpoints.conditions import without_conditions
from service.endpoints.context import ServiceContext
from service.endpoints.inference import ANOMALY, DECODE, RECONSTRUCT, SAMPLE, InferenceEndpoints
from service.endpoints.offload import read_within_budget, run_in_thread_if_long
from service.endpoints.open_inference.models import (
    ENCODE_TASK,
    IGNORED_OPTIONS,
    RECONSTRUCT_TASK,
    SCORE_TASK,
    ProtocolModel,
    describe,
    find_model,
    require_outputs,
)
from service.endpoints.pipeline import (
    ParsedRequest,
    RequestSpec,
    admit,
    deadline_of,
    require_row_limit,
    run_operation,
    take_turn,
)
from service.endpoints.scoring import is_live_traffic, score_rows
from service.endpoints.validation import validate
from service.errors import InvalidField, InvalidJson, InvalidRows, UnsupportedMediaType
from service.http.open_inference import model_and_version
from service.http.request import HttpResponse, RequestContext
from service.inference import operations
from service.schemas import AnomalyBody, Body, SampleBody

EXTENSIONS = ["binary_tensor_data"]
ARRAY_FIELDS = frozenset(("inputs", "latents"))
Outputs = dict[str, npt.NDArray[Any]]


class ReadRequest(NamedTuple):
    """A request for inference that has been read.

    Args:
        asked: the request in the terms of the protocol.
        outputs: the outputs to respond with, in order.
        seconds: the time limit of the request; None if it has none.
        body: the fields of the request as a request to the model's own endpoint.
        inputs: the rows or latents [B, ...], or what samples start from; None if only scores are asked for.
        scored: the fields and the rows as a request to /anomaly; None if no score is asked for.
    """

    asked: codec.InferenceRequest
    outputs: tuple[codec.RequestedOutput, ...]
    seconds: float | None
    body: Body | None
    inputs: Any
    scored: tuple[AnomalyBody, InputRows] | None


class OpenInferenceEndpoints:
    """The handlers of the paths below /v2."""

    def __init__(self, service: ServiceContext, inference: InferenceEndpoints) -> None:
        self._service = service
        self._inference = inference

    async def server_metadata(self, _: Request) -> Response:
        """Return the name and the version of the server, and the extensions of the protocol that it supports."""
        return _json({"name": "elbo", "version": installed_version("elbo"), "extensions": EXTENSIONS})

    async def server_live(self, _: Request) -> Response:
        """Respond with 200 while the process runs."""
        return _json({"live": True})

    async def server_ready(self, _: Request) -> Response:
        """Respond with 200 while requests are accepted; with 503 until a model is served and during shutdown."""
        self._service.require_ready()
        return _json({"ready": True})

    async def model_metadata(self, request: Request) -> Response:
        """Return the inputs and the outputs of a model, and its versions."""
        return _json(describe(self._service, self._find(request)))

    async def version_metadata(self, request: Request) -> Response:
        """Return the inputs and the outputs of one version of a model."""
        return await self.model_metadata(request)

    async def model_ready(self, request: Request) -> Response:
        """Respond with 200 while the model accepts requests; with 503 during shutdown."""
        self._service.require_ready()
        return _json({"name": self._find(request).name, "ready": True})

    async def version_ready(self, request: Request) -> Response:
        """Respond with 200 while this version of the model accepts requests; with 503 during shutdown."""
        return await self.model_ready(request)

    def _find(self, request: Request) -> ProtocolModel:
        parameters = request.path_params
        return find_model(self._service, parameters["name"], parameters.get("version"))

    async def infer_version(self, request: RequestContext) -> HttpResponse:
        """Run one version of a model of the Open Inference Protocol on the inputs."""
        return await self.infer(request)

    async def infer(self, request: RequestContext) -> HttpResponse:
        """Run a model of the Open Inference Protocol on the inputs, and return the outputs that are asked for.

        The model `NAME` takes rows, `NAME:decode` takes latents, and `NAME:sample` draws new rows.
        """
        model = find_model(self._service, *model_and_version(request.scope["path"]))
        served, record = model.served, request.record
        record.model, record.version = served.name, served.version
        _require_media_type(request)
        compressed = b"content-encoding" in request.headers and is_gzip(request.header(b"content-encoding"))
        deadline = deadline_of(self._service, request)
        raw_body = await admit(self._service, request, deadline)

        started = perf_counter()
        found = await self._read(request, model, raw_body, compressed, deadline)
        record.read_at = perf_counter()
        record.parse += record.read_at - started
        if found.seconds is not None:
            deadline = min(deadline, record.started + found.seconds)
        # By the media type, `take_turn` estimates the size of a response: binary numbers are as long as those of npy.
        media_type = npy.MEDIA_TYPE if all(output.is_binary for output in found.outputs) else codec.JSON
        parsed: ParsedRequest[Any, Any] = ParsedRequest(
            request, record, served, media_type, deadline, found.body, found.inputs
        )
        parameters: dict[str, Any] = {}
        if model.method == "sample":
            outputs = await self._sample(parsed, parameters)
        elif model.method == "decode":
            (rows,) = await run_operation(self._service, parsed, operations.DECODE, parsed.inputs)
            outputs = {"x_hat": rows}
        else:
            outputs = await self._judge(parsed, found, model)
        return await _render(model, found, outputs, parameters, parsed)

    async def _read(
        self, request: RequestContext, model: ProtocolModel, raw_body: bytes, compressed: bool, deadline: float
    ) -> ReadRequest:
        """Return the request in `raw_body`, validated for `model`. A large body is read in another thread."""
        max_rows = self._service.settings.max_rows
        header_length = request.headers.get(codec.HEADER_LENGTH)

        def read(budget: Budget) -> ReadRequest:
            body = decompress_gzip(raw_body, request.max_body_bytes, budget) if compressed else raw_body
            return read_for_model(model, codec.read_request(body, header_length, budget), max_rows, budget)

        if len(raw_body) <= min(offload.SMALL_BODY, 2 * max_rows) and not compressed:
            return read(NO_LIMIT)
        width = max(model.served.row_schema.width, model.served.input_width)
        budget = request.budget(max_rows=max_rows, width=width, deadline=deadline)
        is_text = header_length is None
        cost = len(raw_body) * (offload.RECORD_BYTE if is_text else offload.ARRAY_BYTE)
        cost = offload.GZIP_BODY if compressed else cost
        on_long = request.ticket.mark_large
        return await read_within_budget(self._service.readers, partial(read, budget), budget, cost, on_long=on_long)

    async def _sample(self, parsed: ParsedRequest[SampleBody, Any], parameters: dict[str, Any]) -> Outputs:
        """Return the outputs of drawing, and set the parameter `seed` of the response."""
        samples = await self._inference.draw_samples(parsed, parsed.inputs)
        parameters["seed"] = samples.seed
        return {"x": samples.outputs, "z": samples.latents}

    async def _judge(self, parsed: ParsedRequest[Any, Any], found: ReadRequest, model: ProtocolModel) -> Outputs:
        """Return the outputs of a model of rows that are asked for."""
        tasks = {model.outputs[output.name].task for output in found.outputs}
        rows = len(parsed.inputs) if found.scored is None else found.scored[1].rows_received
        if rows > self._service.admission.max_small_rows:
            arrays = sum(model.outputs[output.name].is_row for output in found.outputs)
            await take_turn(parsed, rows, arrays)
        outputs: Outputs = {}
        if RECONSTRUCT_TASK in tasks:
            operation = operations.reconstruct(parsed.served.row_schema.allows_missing)
            outputs["x_hat"], outputs["error"] = await run_operation(self._service, parsed, operation, parsed.inputs)
        if ENCODE_TASK in tasks:
            mean, std = await run_operation(self._service, parsed, operations.ENCODE, parsed.inputs)
            outputs["mean"] = without_conditions(parsed.served, mean)
            outputs["std"] = without_conditions(parsed.served, std)
        if found.scored is not None:
            outputs |= await self._score(parsed, *found.scored)
        return outputs

    async def _score(self, parsed: ParsedRequest[Any, Any], body: AnomalyBody, input_rows: InputRows) -> Outputs:
        """Return the outputs of scoring, as /anomaly finds them. The rows are live traffic as they are there."""
        service, served = self._service, parsed.served
        run = partial(run_operation, service, parsed)
        is_live = is_live_traffic(service, parsed.request, body)
        verdicts = await score_rows(service, served, input_rows, body, run, is_live, parsed.deadline, parsed.request)
        assert verdicts is not None
        parsed.record.rows = input_rows.rows_received
        scores = verdicts.scores.clipped
        return {
            "score": scores.score,
            "p_value": scores.p_value,
            "severity": scores.severity,
            "is_anomaly": np.array(verdicts.is_anomaly, np.bool_),
            "parts": scores.parts,
            "contribution": scores.contribution,
            "expected": scores.expected,
        }


def read_for_model(model: ProtocolModel, asked: codec.InferenceRequest, max_rows: int, budget: Budget) -> ReadRequest:
    """Return the request `asked`, validated for `model`.

    Raises:
        InvalidField: an input, an output or a parameter is missing, unknown or not valid.
        InvalidRows: the input has another shape than the model needs, or a number is not valid.
        TooManyRows: the request or its response would have more than `max_rows` rows.
    """
    options, seconds = _read_parameters(model, asked.parameters)
    wanted = asked.outputs or tuple(codec.RequestedOutput(name, asked.is_binary) for name in model.outputs)
    require_outputs(model, [output.name for output in wanted])
    array = _the_input(model, asked)
    if asked.texts:
        rows = 0 if array is None or array.ndim == 0 else len(array)  # the shape of the array is checked later
        options["condition"] = _condition_of_texts(asked, options, rows)
    if model.method:
        spec: RequestSpec[Any, Any] = SAMPLE if array is None else DECODE
        fields = options if array is None else {"latents": array, **options}
        body, inputs = _read_inputs(model, spec, fields, max_rows, budget)
        return ReadRequest(asked, wanted, seconds, body, inputs, None)
    tasks = {model.outputs[output.name].task for output in wanted}
    body = inputs = scored = None
    if tasks & {RECONSTRUCT_TASK, ENCODE_TASK}:
        condition = {name: value for name, value in options.items() if name == "condition"}
        body, inputs = _read_inputs(model, RECONSTRUCT, {"inputs": array, **condition}, max_rows, budget)
    if SCORE_TASK in tasks:
        scored = _read_inputs(model, ANOMALY, {"inputs": array, **options}, max_rows, budget)
        if scored[1].parsed.errors:
            raise _in_terms_of_input(model, scored[1].parsed.errors[0].error)
        scored = with_default_alpha(model.served, scored[0]), scored[1]
    elif options:
        validate(AnomalyBody, options)
    return ReadRequest(asked, wanted, seconds, body, inputs, scored)


def _read_inputs(
    model: ProtocolModel, spec: RequestSpec[Any, Any], fields: dict[str, Any], max_rows: int, budget: Budget
) -> tuple[Any, Any]:
    """Return `fields` as the body of a request to a task endpoint, and the model's inputs in it."""
    # `read` validates the array, so without options there is nothing else to validate.
    has_options = not fields.keys() <= ARRAY_FIELDS
    body = validate(spec.schema, fields) if has_options else spec.schema.model_construct(**fields)
    try:
        require_row_limit(spec, body, max_rows)
        return body, spec.read(model.served, body, True, budget)
    except InvalidRows as error:
        raise _in_terms_of_input(model, error) from error


def _in_terms_of_input(model: ProtocolModel, error: InvalidRows) -> InvalidRows:
    """Return `error` with a pointer that begins with the name of the input, such as x/3/0: row 3, value 0."""
    place = (error.pointer or "").removeprefix("/inputs").removeprefix("/latents")
    error.pointer = f"{model.input}{place}"
    return error


def _the_input(model: ProtocolModel, asked: codec.InferenceRequest) -> npt.NDArray[Any] | None:
    """Return the input of the request; None if the model takes none. Raises InvalidField."""
    known = [model.input] if model.input else []
    got = ", ".join([*asked.inputs, *(f"{name} (BYTES)" for name in asked.texts)])[:100] or "none"
    if list(asked.inputs) != known or not asked.texts.keys() <= set(model.condition_inputs):
        expected = f"the input {model.input}" if model.input else "no input"
        if model.condition_inputs:
            expected += f", and as BYTES {join_names(list(model.condition_inputs))}"
        raise InvalidField(
            f"{model.name} takes {expected}, got {got}", pointer="/inputs", expected=model.input or "none", got=got
        )
    return asked.inputs[model.input] if model.input else None


def _condition_of_texts(
    asked: codec.InferenceRequest, options: dict[str, Any], rows: int
) -> dict[str, str | None] | list[dict[str, str | None]]:
    """Return the condition that the inputs of texts give: one for all rows, or a list with one per row.

    An empty text is an unknown level.

    Raises:
        InvalidField: the parameter `condition` is given, too, or an input has another number of texts than rows.
    """
    if "condition" in options:
        names = ", ".join(asked.texts)
        raise InvalidField(
            f"the condition is given twice, as the parameter `condition` and as the input {names}",
            pointer="/parameters/condition",
            expected="one of them",
        )
    for name, texts in asked.texts.items():
        if texts.shape not in ([rows], [rows, 1], [1], [1, 1]):
            raise InvalidField(
                f"the input {name} has the shape {texts.shape} for {rows} rows",
                pointer=f"{texts.pointer}/shape",
                expected=f"[{rows}, 1], or [1, 1] for one condition of all rows",
                got=str(texts.shape),
            )
    if all(len(texts.values) == 1 for texts in asked.texts.values()):
        return {name: texts.values[0] or None for name, texts in asked.texts.items()}
    columns = [texts.values * rows if len(texts.values) == 1 else texts.values for texts in asked.texts.values()]
    return [
        {name: text or None for name, text in zip(asked.texts, of_row, strict=True)}
        for of_row in zip(*columns, strict=True)
    ]


def _read_parameters(model: ProtocolModel, parameters: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
    """Return the options of the model among `parameters`, and the time limit in seconds. Raises InvalidField."""
    options: dict[str, Any] = {}
    seconds = None
    for name, value in parameters.items():
        if name == "condition" and name in model.options:
            options[name] = _read_condition(value)
        elif name in model.options:
            options[name] = value
        elif name == "timeout":
            seconds = _read_timeout(value)
        elif name not in IGNORED_OPTIONS:
            known = ", ".join((*model.options, "timeout", "binary_data_output"))
            raise InvalidField(
                f"{model.name} has no parameter {name[:100]!r}",
                pointer="/parameters",
                expected=known,
                got=name[:100],
                hint=f"the parameters are {known}",
            )
    return options, seconds


def _read_condition(value: Any) -> Any:
    """Return a condition. Some clients can only send texts as parameters, so it may be an object or its JSON text."""
    if type(value) is not str:
        return value
    try:
        return loads_value(value.encode())
    except InvalidJson as error:
        error.pointer = "/parameters/condition"
        raise


def _read_timeout(value: Any) -> float:
    """Return the parameter `timeout`, which is in microseconds, in seconds. Raises InvalidField."""
    if type(value) is not int or value < 1:
        raise InvalidField(
            "timeout should be a whole number of microseconds above 0",
            pointer="/parameters/timeout",
            expected="a whole number above 0",
            got=str(value)[:40],
        )
    return value / 1e6


async def _render(
    model: ProtocolModel,
    found: ReadRequest,
    outputs: Outputs,
    parameters: dict[str, Any],
    parsed: ParsedRequest[Any, Any],
) -> HttpResponse:
    """Return the response with the outputs that are asked for."""
    fields: dict[str, Any] = {"model_name": model.name, "model_version": str(model.served.version)}
    if found.asked.id is not None:
        fields["id"] = found.asked.id
    if parameters:
        fields["parameters"] = parameters
    asked = [(each.name, np.ascontiguousarray(outputs[each.name]), each.is_binary) for each in found.outputs]
    cost = sum(
        array.nbytes * offload.ARRAY_BYTE if is_binary else array.size * offload.NUMBER for _, array, is_binary in asked
    )
    started = perf_counter()
    content, length = await run_in_thread_if_long(partial(codec.write_response, fields, asked), cost)
    parsed.record.write += perf_counter() - started
    if length is None:
        return HttpResponse(content, codec.JSON.encode(), model.served.headers)
    headers = (*model.served.headers, (codec.HEADER_LENGTH, b"%d" % length))
    return HttpResponse(content, codec.BINARY.encode(), headers)


def _require_media_type(request: RequestContext) -> None:
    """Raise UnsupportedMediaType if the body is neither JSON nor binary.

    Triton's client sends no Content-Type. A browser may send such a body for a page of any other site, without asking
    the server first, but then also sends the header Origin.
    """
    if request.headers.get(b"content-type") == b"application/octet-stream":
        return
    got = media_type_of(request.header(b"content-type"))
    if got == codec.BINARY or is_json(got) or (not got and b"origin" not in request.headers):
        return
    expected = f"{codec.JSON} or {codec.BINARY}"
    raise UnsupportedMediaType(
        f"expected a body of type {expected}, got {got or 'no Content-Type'}",
        expected=expected,
        got=got or "no Content-Type",
        hint=f"send the header Content-Type: {codec.JSON}",
    )


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type=codec.JSON)
