"""Requests for inference of Google Vertex AI: `{"instances", "parameters"}`, answered by `{"predictions"}`."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from service.anomaly.verdicts import Verdicts, results_and_errors
from service.codec.budget import NO_LIMIT, Budget
from service.codec.compression import decompress_gzip, is_gzip
from service.codec.json_rows import JsonRows
from service.codec.json_values import describe_value
from service.codec.request_body import JSON, is_json, media_type_of, read_json
from service.codec.response_body import require_finite, to_json
from service.endpoints import offload
from service.endpoints.conditions import without_conditions
from service.endpoints.context import ServiceContext
from service.endpoints.inference import ANOMALY, DECODE, ENCODE, RECONSTRUCT, InferenceEndpoints, Spec
from service.endpoints.offload import read_within_budget, run_in_thread_if_long
from service.endpoints.pipeline import (
    ParsedRequest,
    admit,
    deadline_of,
    require_latents,
    require_row_limit,
    run_operation,
)
from service.endpoints.validation import validate
from service.errors import InvalidField, ServiceError, UnsupportedMediaType
from service.http.request import HttpResponse, RequestContext
from service.inference import operations
from service.inference.operations import Operation
from service.inference.served_model import ServedModel
from service.schemas import AnomalyBody, Body

SPECS: dict[str, Spec] = {"anomaly": ANOMALY, "reconstruct": RECONSTRUCT, "encode": ENCODE, "decode": DECODE}
FIELDS = {"reconstruct": ("output", "error"), "encode": ("latent", "std"), "decode": ("output",)}
PIECE_ROWS = 256  # rows of the arrays that become Python objects at once
Array = npt.NDArray[np.float32]


class ReadInstances(NamedTuple):
    """A request that has been read.

    Args:
        method: a key of SPECS.
        served: the model.
        body: the fields of the request, as the body of the endpoint with the name of the method.
        inputs: the rows, as this endpoint's reader returns them.
    """

    method: str
    served: ServedModel
    body: Body
    inputs: Any


class VertexEndpoint:
    """The handler of the path in AIP_PREDICT_ROUTE.

    Args:
        service: the components of the application.
        inference: the handlers of the other endpoints.
    """

    def __init__(self, service: ServiceContext, inference: InferenceEndpoints) -> None:
        self._service = service
        self._inference = inference

    async def predict(self, request: RequestContext) -> HttpResponse:
        """Return a prediction for each instance.

        The parameter `method` is anomaly (the default), reconstruct, encode or decode, and the parameter `model` names
        the model. The other parameters are the options of the endpoint with the name of the method.
        """
        service, record = self._service, request.record
        got = media_type_of(request.header(b"content-type"))
        if not is_json(got):
            raise UnsupportedMediaType(
                f"expected a body of type {JSON}, got {got or 'no Content-Type'}", expected=JSON, got=got
            )
        deadline = deadline_of(service, request)
        raw_body = await admit(service, request, deadline)
        started = perf_counter()
        found = await self._read(request, raw_body, deadline)
        record.read_at = perf_counter()
        record.parse += record.read_at - started
        record.model, record.version = found.served.name, found.served.version
        parsed: ParsedRequest[Any, Any] = ParsedRequest(
            request, record, found.served, JSON, deadline, found.body, found.inputs
        )
        if found.method == "anomaly":
            verdicts = await self._inference.judge(parsed)
            assert verdicts is not None  # `_read` refuses JSON without a valid row
            cost: float = offload.VERDICT * parsed.inputs.rows_received + offload.ONSET * verdicts.explained_rows
            make: Callable[[], Any] = partial(_verdicts, found.served, parsed.body, verdicts)
        else:
            arrays = await self._run(parsed, found.method)
            cost = offload.NUMBER * sum(array.size for array in arrays)
            make = partial(_in_pieces, FIELDS[found.method], arrays)
        started = perf_counter()
        content = await run_in_thread_if_long(lambda: to_json({"predictions": make()}), cost)
        record.write += perf_counter() - started
        return HttpResponse(content, JSON.encode(), found.served.headers)

    async def _read(self, request: RequestContext, raw_body: bytes, deadline: float) -> ReadInstances:
        """Return the request in `raw_body`. A large body is read in another thread."""
        max_rows = self._service.settings.max_rows
        compressed = b"content-encoding" in request.headers and is_gzip(request.header(b"content-encoding"))

        def read(budget: Budget) -> ReadInstances:
            body = decompress_gzip(raw_body, request.max_body_bytes, budget) if compressed else raw_body
            return read_instances(self._service, body, budget)

        if len(raw_body) <= min(offload.SMALL_BODY, 2 * max_rows) and not compressed:
            return read(NO_LIMIT)
        served = self._service.registry.catalogue.models.values()
        width = max((each.row_schema.width for versions in served for each in versions.values()), default=1)
        budget = request.budget(max_rows=max_rows, width=width, deadline=deadline)
        cost = offload.GZIP_BODY if compressed else len(raw_body) * offload.RECORD_BYTE
        readers, on_long = self._service.readers, request.ticket.mark_large
        return await read_within_budget(readers, partial(read, budget), budget, cost, on_long=on_long)

    async def _run(self, parsed: ParsedRequest[Any, Any], method: str) -> list[Array]:
        """Run the model, and return the arrays in FIELDS[method], each of which has one row per instance."""
        operation: Operation = operations.ENCODE if method == "encode" else operations.DECODE
        if method == "reconstruct":
            operation = operations.reconstruct(parsed.served.row_schema.allows_missing)
        arrays = await run_operation(self._service, parsed, operation, parsed.inputs)
        if method == "encode":
            arrays = tuple(without_conditions(parsed.served, array) for array in arrays)
        for name, array in zip(FIELDS[method], arrays, strict=True):
            require_finite(name, array)
        return list(arrays)


def read_instances(service: ServiceContext, raw_body: bytes, budget: Budget) -> ReadInstances:
    """Return the request in `raw_body`, validated for its method and its model.

    Raises:
        InvalidJson, InvalidField, InvalidRows, TooManyRows, ModelNotFound, NotSupported: the request is not valid.
    """
    values, may_contain_non_floats = read_json(raw_body, budget)
    parameters = values.get("parameters") or {}
    if type(parameters) is not dict:
        raise _invalid("/parameters", "an object", describe_value(parameters))
    instances = values.get("instances")
    if not isinstance(instances, list | JsonRows) or not len(instances):
        raise _invalid("/instances", "a list with an instance per row", describe_value(instances))
    options = {name: value for name, value in parameters.items() if name not in ("method", "model")}
    method, model = parameters.get("method", "anomaly"), parameters.get("model")
    if type(method) is not str or method not in SPECS:
        got = method[:40] if type(method) is str else describe_value(method)
        raise _invalid("/parameters/method", ", ".join(SPECS), got)
    if model is not None and type(model) is not str:
        raise _invalid("/parameters/model", "the name of a model", describe_value(model))
    served, spec = service.find(model), SPECS[method]
    if spec.needs_latents:
        require_latents(served)
    is_object = method != "decode" and type(next(iter(instances), None)) is dict
    field = "records" if is_object else spec.array_field or ""
    if field in options:
        raise _invalid(
            f"/parameters/{field}", "absent, because the instances are the rows", describe_value(options[field])
        )
    try:
        body = validate(spec.schema, {field: instances, **options})
        require_row_limit(spec, body, service.settings.max_rows)
        return ReadInstances(method, served, body, spec.read(served, body, may_contain_non_floats, budget))
    except ServiceError as error:
        error.pointer = _place(error.pointer, field)
        raise


def _invalid(pointer: str, expected: str, got: str) -> InvalidField:
    return InvalidField(f"{pointer[1:]} should be {expected}, got {got}", pointer=pointer, expected=expected, got=got)


def _place(pointer: str | None, field: str) -> str | None:
    """Return a JSON pointer into the request of Vertex AI, for `pointer` into the body of an endpoint.

    Args:
        pointer: the pointer; None or "" for the whole body.
        field: the field of that body that has the rows.
    """
    if not pointer:
        return pointer
    name, slash, rest = pointer[1:].partition("/")
    return f"/instances{slash}{rest}" if name == field else f"/parameters{pointer}"


def _verdicts(served: ServedModel, body: AnomalyBody, verdicts: Verdicts) -> list[dict[str, Any]]:
    """Return the verdict on each row, or why it has none, in the order of the rows."""
    found, errors = results_and_errors(verdicts, body.explain, served.row_schema.names, served.manifest.parts)
    for error in errors:
        error["pointer"] = _place(error["pointer"], "inputs" if body.records is None else "records")
    return sorted(found + errors, key=lambda prediction: prediction["row"])


def _in_pieces(names: Sequence[str], arrays: Sequence[Array]) -> Iterator[list[dict[str, Any]]]:
    """Yield lists of predictions. A prediction has one row of each array, by the name of the array."""
    for start in range(0, len(arrays[0]), PIECE_ROWS):
        pieces = [array[start : start + PIECE_ROWS] for array in arrays]
        yield [dict(zip(names, row, strict=True)) for row in zip(*pieces, strict=True)]
