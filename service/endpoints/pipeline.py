"""The steps of an inference request: parse the request, run the model, write the response."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from time import perf_counter
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from service.codec import npy, png, safetensors
from service.codec.budget import NO_LIMIT, Budget
from service.codec.compression import decompress_gzip, is_gzip
from service.codec.json_rows import JsonRows
from service.codec.long_work import join
from service.codec.request_body import (
    JSON,
    NO_EXTRA_READERS,
    BodyReader,
    RequestFields,
    is_array,
    is_picture,
    read_fields,
    read_plain_rows,
)
from service.codec.response_body import (
    ARRAY_FORMATS,
    IMAGE_FORMATS,
    JSON_FORMATS,
    array_fields,
    negotiate_media_type,
    require_finite,
    to_json,
)
from service.codec.simdjson_rows import MAX_WHOLE_BYTES
from service.endpoints import offload
from service.endpoints.context import ServiceContext
from service.endpoints.disconnects import DisconnectWatch
from service.endpoints.offload import read_within_budget, run_in_thread_if_long
from service.endpoints.query_options import read_options
from service.endpoints.validation import merge, validate
from service.errors import InvalidField, NotSupported, TooManyRows
from service.http.request import HttpResponse, Query, RequestContext
from service.inference.operations import Operation
from service.inference.served_model import ServedModel
from service.monitoring.request_record import RequestRecord
from service.schemas import Body

Array = npt.NDArray[np.float32]
JSON_NUMBER_BYTES = 12  # a float32 of 9 digits, with its decimal point, its comma and often a sign
B = TypeVar("B", bound=Body)
T = TypeVar("T")


@dataclass(frozen=True)
class RequestSpec(Generic[B, T]):
    """The request that one endpoint accepts.

    Args:
        schema: the schema of the fields.
        read: reads the model's inputs from the fields. Its arguments are the model, the fields, whether the JSON
            arrays may contain booleans, NaN or infinity, and the budget.
        row_fields: the fields that hold rows. Each may hold at most ELBO_MAX_ROWS rows.
        count_field: the field that holds the number of rows to generate, which may be at most ELBO_MAX_ROWS.
        array_field: the field that holds the array of an npy or safetensors body; if None, such a body is refused.
        readers: for each further media type, the function that parses its bodies.
        pictures: whether the body can be a PNG or JPEG picture if the model takes images.
        png_output: whether the response of an image model can be image/png.
        json_output: whether the response is always JSON.
        needs_latents: whether only models that encode rows and decode latents can respond.
    """

    schema: type[B]
    read: Callable[[ServedModel, B, bool, Budget], T]
    row_fields: tuple[str, ...] = ()
    count_field: str | None = None
    array_field: str | None = None
    readers: Mapping[str, BodyReader] = field(default_factory=lambda: NO_EXTRA_READERS)
    pictures: bool = False
    png_output: bool = False
    json_output: bool = False
    needs_latents: bool = False


@dataclass(slots=True)
class ParsedRequest(Generic[B, T]):
    """A request that has been read and validated.

    Args:
        request: the HTTP request.
        record: the data about the request for the metrics and the access log.
        served: the model that computes the response.
        media_type: the media type of the response.
        deadline: when the request times out, on the `perf_counter` clock.
        body: the validated fields.
        inputs: what the endpoint's `RequestSpec.read` returned.
    """

    request: RequestContext
    record: RequestRecord
    served: ServedModel
    media_type: str
    deadline: float
    body: B
    inputs: T


async def parse_request(
    service: ServiceContext, request: RequestContext, spec: RequestSpec[B, T]
) -> ParsedRequest[B, T]:
    """Read the whole request and validate it against `spec`. Raises a ServiceError if the request is refused."""
    record, query = request.record, request.query
    served = service.find(query.model)
    record.model, record.version = served.name, served.version
    if spec.needs_latents:
        require_latents(served)
    media_types = IMAGE_FORMATS if spec.png_output and served.has_png_output else ARRAY_FORMATS
    if spec.json_output:
        media_types = JSON_FORMATS
    media_type = negotiate_media_type(request.header(b"accept", "*/*"), media_types)
    compressed = b"content-encoding" in request.headers and is_gzip(request.header(b"content-encoding"))
    deadline = deadline_of(service, request)
    raw_body = await admit(service, request, deadline)
    content_type = request.header(b"content-type")

    started = perf_counter()
    max_rows, main = service.settings.max_rows, spec.array_field
    width = served.latent_schema.width if main == "latents" else served.row_schema.width
    fields = read_plain_rows(content_type, raw_body, main, width) if main and not compressed else None
    has_few_rows = fields is not None and main and len(fields.values[main]) <= offload.FEW_ROWS
    # A row of text takes two bytes at least, so a small body has no more than `max_rows` rows.
    is_small = len(raw_body) <= min(offload.SMALL_BODY, 2 * max_rows)
    if has_few_rows or (is_small and not compressed and not is_picture(content_type)):
        if fields is None:
            picture = served.picture_row if spec.pictures else None
            fields = read_fields(content_type, raw_body, main, 0, spec.readers, picture)
        body, inputs = _read_inputs(spec, served, query, max_rows, fields, NO_LIMIT)
    else:
        longest = max(width, served.input_width) if served.window_schema else width
        budget = request.budget(max_rows=max_rows, width=longest, deadline=deadline)
        body, inputs = await _read_costly(service, request, spec, served, raw_body, fields, width, budget)
    record.read_at = perf_counter()
    record.parse += record.read_at - started
    return ParsedRequest(request, record, served, media_type, deadline, body, inputs)


def require_latents(served: ServedModel) -> None:
    """Raise NotSupported if the model only reconstructs and scores rows."""
    if served.manifest.only_reconstructs:
        source = "its module" if served.manifest.adoption is None else served.manifest.adoption.source
        raise NotSupported(
            f"{served.name}@{served.version} has no latents: {source} was adopted without an encoder and a decoder",
            hint="use /reconstruct or /anomaly; or adopt the module again with encode= and decode=",
        )


def _read_inputs(
    spec: RequestSpec[B, T], served: ServedModel, query: Query, max_rows: int, fields: RequestFields, budget: Budget
) -> tuple[B, T]:
    """Return the validated fields of a request, and the model's inputs in them."""
    values, may_contain_non_floats = fields
    if query.options:
        options = read_options(spec.schema, query.options)
        values = merge(values, options.values)
        may_contain_non_floats = may_contain_non_floats or options.may_contain_non_floats
    body = validate(spec.schema, values)
    require_row_limit(spec, body, max_rows)
    return body, spec.read(served, body, may_contain_non_floats, budget)


async def _read_costly(
    service: ServiceContext,
    request: RequestContext,
    spec: RequestSpec[B, T],
    served: ServedModel,
    raw_body: bytes,
    plain_fields: RequestFields | None,
    width: int,
    budget: Budget,
) -> tuple[B, T]:
    """Return the validated fields of a request whose body may take long to read, and the model's inputs in them.

    Args:
        service: the components of the application.
        request: the HTTP request.
        spec: the request that the endpoint accepts.
        served: the model.
        raw_body: the body, which may be compressed.
        plain_fields: what `read_plain_rows` has returned.
        width: the number of values per row.
        budget: what reading may cost.
    """
    content_type = request.header(b"content-type")
    compressed = b"content-encoding" in request.headers and is_gzip(request.header(b"content-encoding"))
    has_no_plain_rows = plain_fields is None and not compressed and len(raw_body) <= MAX_WHOLE_BYTES

    def read() -> tuple[B, T]:
        fields = plain_fields
        if fields is None:
            content = decompress_gzip(raw_body, request.max_body_bytes, budget) if compressed else raw_body
            picture = served.picture_row if spec.pictures else None
            row_width = 0 if has_no_plain_rows else width
            fields = read_fields(content_type, content, spec.array_field, row_width, spec.readers, picture, budget)
        return _read_inputs(spec, served, request.query, service.settings.max_rows, fields, budget)

    if compressed:
        cost = offload.GZIP_BODY
    elif plain_fields is None:
        cost = len(raw_body) * _cost_per_byte(content_type)
    else:
        cost = len(raw_body) * offload.JSON_BYTE
    return await read_within_budget(service.readers, read, budget, cost, on_long=request.ticket.mark_large)


async def admit(service: ServiceContext, request: RequestContext, deadline: float) -> bytes:
    """Read the request body, wait for a work slot, and return the body.

    Raises:
        Overloaded: admission control refuses the request. If the queue is full, the body is not read.
        DeadlineExceeded: the request timed out in the queue.
        BodyTooLarge, BodyTooSlow, ClientDisconnect: see `RequestContext.body`.
    """
    ticket = request.ticket
    service.admission.check(rows=1, is_queued=ticket.is_queued)
    body = await request.body()
    ticket.acquire()
    await ticket.start(deadline)
    return body


@lru_cache(maxsize=256)
def _cost_per_byte(content_type: str) -> float:
    """Return the estimated time to read one byte of a body with this Content-Type, in nanoseconds.

    Not for a JSON body of plain rows.
    """
    if is_picture(content_type):
        return offload.PICTURE_BYTE
    return offload.ARRAY_BYTE if is_array(content_type) else offload.RECORD_BYTE


def deadline_of(service: ServiceContext, request: RequestContext) -> float:
    """Return the deadline of `request`, on the `perf_counter` clock. Raises InvalidField for an invalid header."""
    header = request.headers.get(b"x-request-timeout")
    if header is None:
        return request.record.started + service.settings.request_timeout
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        got = header.decode("latin-1")[:40]
        raise InvalidField(
            f"the header X-Request-Timeout should be a number of seconds above 0, got {got}",
            expected="a number above 0",
            got=got,
        )
    return request.record.started + seconds


def require_row_limit(spec: RequestSpec[Any, Any], body: Body, limit: int) -> None:
    """Raise an error if the request or its response would have more than `limit` rows.

    Raises:
        TooManyRows: a field of the request has more than `limit` rows.
        InvalidField: the request asks for more than `limit` rows.
    """
    for name in spec.row_fields:
        rows = getattr(body, name)
        has_length = isinstance(rows, list | JsonRows) or (isinstance(rows, np.ndarray) and rows.ndim)
        if has_length and len(rows) > limit:
            raise TooManyRows(
                f"a request may have at most {limit} rows (ELBO_MAX_ROWS), got {len(rows)}",
                pointer=f"/{name}",
                expected=f"at most {limit} rows",
                got=str(len(rows)),
                hint="split the rows over several requests",
            )
    if spec.count_field and (count := getattr(body, spec.count_field)) > limit:
        raise InvalidField(
            f"{spec.count_field} may be at most {limit} (ELBO_MAX_ROWS), got {count}",
            pointer=f"/{spec.count_field}",
            expected=f"at most {limit}",
            got=str(count),
        )


async def run_operation(
    service: ServiceContext, parsed: ParsedRequest[Any, Any], operation: Operation, *inputs: Array
) -> tuple[Array, ...]:
    """Run `operation` on `inputs` with the model of `parsed`. Raises ClientGone if the client disconnects meanwhile."""
    rows = len(inputs[0])
    if rows > service.admission.max_small_rows:
        await take_turn(parsed, rows)
    parsed.request.ticket.check(rows)
    watch = DisconnectWatch(parsed.request)
    try:
        result = await service.batcher.run(
            parsed.served, operation, *inputs, deadline=parsed.deadline, on_delay=watch.start
        )
    except asyncio.CancelledError:
        watch.raise_if_disconnected()
        raise
    finally:
        watch.stop()
    parsed.record.rows = rows
    parsed.record.computed_at = perf_counter()
    parsed.record.queue += result.queued
    parsed.record.compute += result.computed
    return result.outputs


async def take_turn(parsed: ParsedRequest[Any, Any], rows: int, arrays: int = 1) -> None:
    """Wait for the turn to compute `rows` rows, and for room for the response.

    Args:
        parsed: the request.
        rows: the number of rows.
        arrays: how many arrays with the features of every row the response has.

    Raises:
        ClientGone: the client disconnected meanwhile.
        Overloaded, DeadlineExceeded: see `Ticket.take_turn`.
    """
    number_bytes = 4 if is_array(parsed.media_type) else JSON_NUMBER_BYTES
    response_bytes = arrays * rows * parsed.served.manifest.width * number_bytes
    await run_while_connected(parsed, parsed.request.ticket.take_turn(rows, parsed.deadline, response_bytes))


async def run_while_connected(parsed: ParsedRequest[Any, Any], work: Awaitable[T]) -> T:
    """Return the result of `work`, which is cancelled if the client disconnects. Raises ClientGone."""
    watch = DisconnectWatch(parsed.request)
    watch.start()
    try:
        return await work
    except asyncio.CancelledError:
        watch.raise_if_disconnected()
        raise
    finally:
        watch.stop()


async def render_response(
    parsed: ParsedRequest[Any, Any],
    fields: dict[str, Any],
    main: Array,
    columns: int | None = None,
    allow_nan: bool = False,
    write_ns: float = 0.0,
) -> HttpResponse:
    """Return the response in the media type of `parsed`.

    Args:
        parsed: the request.
        fields: the fields of a JSON response. A safetensors response contains the arrays among these fields as tensors,
            and the integers as metadata.
        main: the array of an npy or image/png response.
        columns: tiles per line of the image; by default the image is about square.
        allow_nan: whether an npy or safetensors response may contain NaN, which marks rows without a verdict.
        write_ns: the estimated time to write the fields that are not arrays, in nanoseconds.

    Raises:
        OverflowInModel: if a number of the response is not finite.
    """
    headers = parsed.served.headers
    if isinstance(fields.get("seed"), int):
        headers = (*headers, (b"elbo-seed", b"%d" % fields["seed"]))
    if "warning" in fields:
        headers = (*headers, (b"elbo-warning", fields["warning"].encode("ascii")))

    def write() -> bytes | memoryview:
        served = parsed.served
        if parsed.media_type == JSON:
            return to_json({"model": served.name, "version": served.version, **fields})
        if parsed.media_type == safetensors.MEDIA_TYPE:
            metadata = {name: str(value) for name, value in fields.items() if isinstance(value, int)}
            metadata |= {"model": served.name, "version": str(served.version)}
            tensors = array_fields(fields)
            for name, tensor in tensors.items():
                require_finite(name, tensor, allow_nan)
            return join(safetensors.parts(tensors, metadata))
        require_finite("outputs", main, allow_nan)
        if parsed.media_type == npy.MEDIA_TYPE:
            return join(npy.parts(main))
        assert parsed.media_type == png.MEDIA_TYPE
        assert served.manifest.pixel_range is not None
        return png.dumps(main, served.manifest.shape, served.manifest.pixel_range, columns)

    cost = main.nbytes * offload.ARRAY_BYTE if is_array(parsed.media_type) else main.size * offload.NUMBER
    started = perf_counter()
    content = await run_in_thread_if_long(write, cost + write_ns)
    parsed.record.write += perf_counter() - started
    return HttpResponse(content, parsed.media_type.encode(), headers)
