"""The parts of the service that a request meets, and how each step of a request's way uses them."""

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from service.anomaly.inputs import InputRows
from service.anomaly.verdicts import Scores, Verdicts, decide
from service.codec import npy, png, safetensors
from service.codec.compression import decompress_gzip, is_gzip
from service.codec.request_body import JSON, NO_EXTRA_READERS, BodyReader, is_array, read_fields
from service.codec.response_body import array_fields, negotiate_media_type, require_finite, to_json
from service.endpoints.validation import merge, validate
from service.errors import ClientGone, InvalidField, NotReady, Overloaded, TooManyRows
from service.http.admission import AdmissionControl
from service.http.request import BodyLimits, HttpResponse, RequestContext
from service.inference import operations
from service.inference.batcher import Batcher
from service.inference.operations import Operation
from service.inference.registry import ModelRegistry, ServedModel
from service.monitoring.metrics import Metrics
from service.monitoring.timings import RequestRecord
from service.schemas import AnomalyBody, Body
from service.settings import Settings

Array = npt.NDArray[np.float32]
LARGE = 512 * 1024  # bytes: parsing or writing more than this, about 2 ms, must not hold up the event loop
ARRAY = 8  # times as many bytes of arrays, which are copied as they are, count as much
RETRY_SECONDS = 0.02  # before rows that found the queue full are tried again
B = TypeVar("B", bound=Body)
T = TypeVar("T")
Offer = Callable[[ServedModel], tuple[str, ...]]  # the formats in which a model can answer, the default first


@dataclass
class ServiceContext:
    """What the endpoints share. `draining` is set when the server begins to shut down."""

    settings: Settings
    registry: ModelRegistry
    batcher: Batcher
    metrics: Metrics
    limits: BodyLimits
    admission: AdmissionControl
    draining: bool = False

    def find(self, reference: str | None) -> ServedModel:
        """The model that answers. Raises NotReady, ModelNotFound."""
        return self.registry.catalogue.find(reference)

    def require_ready(self) -> None:
        """Raise NotReady unless requests are welcome."""
        if self.draining:
            raise NotReady("the server is shutting down")
        self.find(None)


@dataclass(slots=True)
class ParsedRequest(Generic[B]):
    """One request, read: who answers, what is asked, in which format, until when by `perf_counter`.

    `x` is what its rows were read as.
    """

    request: RequestContext
    record: RequestRecord
    served: ServedModel
    media_type: str
    deadline: float
    body: B
    x: Any


async def read(
    service: ServiceContext,
    request: RequestContext,
    schema: type[B],
    offered: Offer,
    main: str | None,
    extract: Callable[[ServedModel, B, bool], T],
    extra_readers: Mapping[str, BodyReader] = NO_EXTRA_READERS,
) -> ParsedRequest[B]:
    """Read a request to its end.

    Args:
        service: of the app.
        schema: what its fields must be.
        offered: the formats in which a model can answer it, the default first.
        main: the field that holds its rows or codes, if it has one: an npy body is that field.
        extract: gives `x` from the model, the fields, and whether booleans or NaN may be among the numbers.
        extra_readers: readers of bodies by media type, beside JSON, npy and safetensors.
    """
    record, query = request.record, request.query
    served = service.find(query.model)
    record.model, record.version = served.name, served.version
    media_type = negotiate_media_type(request.header(b"accept", "*/*"), offered(served))
    packed = request.headers.get(b"content-encoding") is not None and is_gzip(request.header(b"content-encoding"))
    deadline = _deadline(service, request)
    sent = await _let_in(service, request, packed, deadline)

    def parse() -> tuple[B, T]:
        content = decompress_gzip(sent, request.max_body_bytes) if packed else sent
        width = served.latent_schema.width if main == "latents" else served.row_schema.width
        fields = read_fields(request.header(b"content-type"), content, main, width, extra_readers)
        body = validate(schema, merge(fields.values, query.options) if query.options else fields.values)
        return body, extract(served, body, fields.may_contain_non_floats)

    started = perf_counter()
    size = len(sent) // (ARRAY if is_array(request.header(b"content-type")) else 1)
    body, x = await aside(parse, LARGE + 1 if packed else size)
    record.parse += perf_counter() - started
    return ParsedRequest(request, record, served, media_type, deadline, body, x)


async def _let_in(service: ServiceContext, request: RequestContext, packed: bool, deadline: float) -> bytes:
    """The body of a request that has its place at work. Raises Overloaded, DeadlineExceeded, and what its body does."""
    service.batcher.require_room(1)  # a full queue refuses whoever comes before it costs anything to read what he sends
    sent = await request.body()
    if packed:  # gzip ends with the number of its bytes unpacked; if that is a lie, unpacking fails
        request.hold(min(int.from_bytes(sent[-4:], "little"), request.max_body_bytes))
    await service.admission.enter(request, deadline)
    return sent


async def run(
    service: ServiceContext, call: ParsedRequest[Any], operation: Operation, *inputs: Array
) -> tuple[Array, ...]:
    """`operation` on `inputs` by the model of `call`. Raises ClientGone if the client leaves meanwhile."""
    watch = _Watch(call.request)
    try:
        ran = await service.batcher.run(call.served, operation, *inputs, deadline=call.deadline, late=watch.begin)
    except asyncio.CancelledError:
        watch.explain()
        raise
    finally:
        watch.end()
    call.record.rows = len(inputs[0])
    call.record.queue += ran.queued
    call.record.compute += ran.computed
    return ran.outputs


async def score_rows(
    service: ServiceContext, served: ServedModel, input_rows: InputRows, body: AnomalyBody
) -> Verdicts | None:
    """What `served` says of rows for which no single request waits; None if none could be read. SharedCounters them.

    A full queue is waited for, which holds back whoever sends. Raises Overloaded, DeadlineExceeded.
    """
    scores: Scores | None = None
    deadline = perf_counter() + service.settings.request_timeout
    x = served.row_schema.impute(input_rows.parsed)
    operation = operations.anomaly(body.alpha)
    while input_rows.parsed.rows and scores is None:
        try:
            ran = await service.batcher.run(served, operation, x, deadline=deadline)
            scores = Scores(*ran.outputs)
        except Overloaded:
            if perf_counter() > deadline:
                raise
            await asyncio.sleep(RETRY_SECONDS)
    verdicts = decide(input_rows, scores, body) if scores else None
    service.metrics.judged.count(served, input_rows, verdicts)
    return verdicts


def _deadline(service: ServiceContext, request: RequestContext) -> float:
    """When the client of `request` gives up, by `perf_counter`. Raises InvalidField."""
    asked = request.headers.get(b"x-request-timeout")
    if asked is None:
        return request.record.started + service.settings.request_timeout
    try:
        seconds = float(asked)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        got = asked.decode("latin-1")[:40]
        raise InvalidField(f"X-Request-Timeout should be seconds, got {got}", expected="a number above 0", got=got)
    return request.record.started + seconds


async def answer(
    call: ParsedRequest[Any], fields: dict[str, Any], main: Array, columns: int | None = None, holes: bool = False
) -> HttpResponse:
    """The answer in the format that was asked for: `fields` as JSON, those that are arrays as safetensors, or `main`.

    What is not finite is an error in every format, but for rows without a verdict, which are NaN in a table of them.

    columns: of the picture.
    holes: whether it is such a table.
    """
    served = call.served
    headers = served.headers
    if isinstance(fields.get("seed"), int):
        headers = (*headers, (b"elbo-seed", b"%d" % fields["seed"]))

    def write() -> bytes:
        if call.media_type == JSON:
            return to_json({"model": served.name, "version": served.version, **fields})
        if call.media_type == safetensors.MEDIA_TYPE:
            metadata = {key: str(value) for key, value in fields.items() if isinstance(value, int)}
            tensors = array_fields(fields)
            for name, tensor in tensors.items():
                require_finite(name, tensor, holes)
            metadata |= {"model": served.name, "version": str(served.version)}
            return safetensors.dumps(tensors, metadata)
        require_finite("outputs", main, holes)
        if call.media_type == npy.MEDIA_TYPE:
            return npy.dumps(main)
        assert served.manifest.pixel_range is not None
        return png.dumps(main, served.manifest.shape, served.manifest.pixel_range, columns)

    started = perf_counter()
    content = await aside(write, main.nbytes // ARRAY if is_array(call.media_type) else 10 * main.size)
    call.record.write += perf_counter() - started
    return HttpResponse(content, call.media_type.encode(), headers)


def require_rows(service: ServiceContext, rows: Any, pointer: str) -> None:
    """Raise TooManyRows if `rows`, a list or an array, has more than one request may."""
    limit = service.settings.max_rows
    sized = isinstance(rows, list) or (isinstance(rows, np.ndarray) and rows.ndim)
    if sized and len(rows) > limit:
        raise TooManyRows(
            f"a request may have {limit} rows, got {len(rows)}",
            pointer=pointer, expected=f"at most {limit} rows", got=str(len(rows)), hint="send several requests",
        )  # fmt: skip


def require_count(service: ServiceContext, name: str, count: int) -> None:
    """Raise InvalidField if the field `name` asks for more rows than one request may."""
    limit = service.settings.max_rows
    if count > limit:
        expected = f"at most {limit}"
        raise InvalidField(f"{name} may be {limit}, got {count}", pointer=f"/{name}", expected=expected, got=str(count))


async def aside(work: Callable[[], T], size: int) -> T:
    """`work()`, in another thread if it is about more than LARGE bytes."""
    if size > LARGE:
        return await asyncio.to_thread(work)
    return work()


class _Watch:
    """Cancels the request's task when its client leaves. Begun for the few that wait long: the others never pay."""

    def __init__(self, request: RequestContext) -> None:
        self._exchange = request
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._gone = False

    def begin(self) -> None:
        """Begin to watch."""
        self._watcher = asyncio.get_running_loop().create_task(self._wait())

    def end(self) -> None:
        """Look no more."""
        if self._watcher:
            self._watcher.cancel()

    def explain(self) -> None:
        """Raise ClientGone if it was this that cancelled the task."""
        if self._gone and self._task and self._task.uncancel() == 0:
            raise ClientGone("the client left before its answer was ready")

    async def _wait(self) -> None:
        while (await self._exchange.receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        if self._task:
            self._task.cancel()
