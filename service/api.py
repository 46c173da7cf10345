"""The parts of the service that a request meets, and how each step of a request's way uses them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import Response

from service.codec import npy, png
from service.codec.answer import choose, to_json
from service.codec.body import JSON, read_fields
from service.engine import Engine
from service.errors import ClientGone, InvalidField, NotReady, TooManyRows
from service.operations import Operation
from service.repository import Repository, Served
from service.schemas import Body
from service.settings import Settings
from service.telemetry import Telemetry
from service.tracing import Trace, trace_of
from service.validation import merge, validate

Array = npt.NDArray[np.float32]
LARGE = 256 * 1024  # bytes: parsing or writing more than this, about 2 ms, must not hold up the event loop
PATIENCE = 0.05  # seconds: a request that is answered faster is not worth watching its client for
B = TypeVar("B", bound=Body)
T = TypeVar("T")
Offer = Callable[[Served], tuple[str, ...]]  # the formats in which a model can answer, the default first


@dataclass
class Service:
    """What the endpoints share. `draining` is set when the server begins to shut down."""

    settings: Settings
    repository: Repository
    engine: Engine
    telemetry: Telemetry
    draining: bool = False

    def find(self, reference: str | None) -> Served:
        """The model that answers. Raises NotReady, ModelNotFound."""
        return self.repository.catalogue.find(reference)

    def require_ready(self) -> None:
        """Raise NotReady unless requests are welcome."""
        if self.draining:
            raise NotReady("the server is shutting down")
        self.find(None)


@dataclass
class Call(Generic[B]):
    """One request, read: who answers, what is asked, in which format. `x` is what its rows were read as."""

    request: Request
    trace: Trace
    served: Served
    media_type: str
    body: B
    x: Any


async def read(
    service: Service,
    request: Request,
    schema: type[B],
    offered: Offer,
    main: str | None,
    extract: Callable[[Served, B, bool], T],
) -> Call[B]:
    """Read `request` to its end.

    Args:
        service: of the app.
        schema: what its fields must be.
        offered: the formats in which a model can answer it, the default first.
        main: the field that an npy body is, if it can be one.
        extract: gives `x` from the model, the fields, and whether booleans or NaN may be among the numbers.
    """
    trace = trace_of(request.scope)
    served = service.find(request.query_params.get("model"))
    trace.model, trace.version = served.name, served.version
    media_type = choose(request.headers.get("accept", "*/*"), offered(served))
    content = await request.body()

    def parse() -> tuple[B, T]:
        fields = read_fields(request.headers.get("content-type", ""), content, main)
        body = validate(schema, merge(fields.values, request.query_params.multi_items()))
        return body, extract(served, body, fields.careful)

    with trace.span("parse"):
        body, x = await aside(parse, len(content))
    return Call(request, trace, served, media_type, body, x)


async def run(service: Service, call: Call[Any], operation: Operation, *inputs: Array) -> tuple[Array, ...]:
    """`operation` on `inputs` by the model of `call`. Raises ClientGone if the client leaves meanwhile."""
    with _Watch(call.request):
        ran = await service.engine.run(call.served, operation, *inputs)
    call.trace.rows = len(inputs[0])
    call.trace.add("queue", ran.queued)
    call.trace.add("compute", ran.computed)
    return ran.outputs


async def answer(call: Call[Any], fields: dict[str, Any], main: Array, columns: int | None = None) -> Response:
    """The answer in the format that was asked for: `fields` as JSON, or `main` as npy or picture.

    columns: of the picture.
    """
    served = call.served
    headers = {"Elbo-Model": f"{served.name}@{served.version}"}
    if isinstance(fields.get("seed"), int):
        headers["Elbo-Seed"] = str(fields["seed"])

    def write() -> bytes:
        if call.media_type == JSON:
            return to_json({"model": served.name, "version": served.version, **fields})
        if call.media_type == npy.MEDIA_TYPE:
            return npy.dumps(main)
        assert served.manifest.pixel_range is not None
        return png.dumps(main, served.manifest.shape, served.manifest.pixel_range, columns)

    with call.trace.span("write"):
        content = await aside(write, 10 * main.size)
    return Response(content, 200, headers, call.media_type)


def require_rows(service: Service, rows: Any, pointer: str) -> None:
    """Raise TooManyRows if `rows`, a list or an array, has more than one request may."""
    limit = service.settings.max_rows
    sized = isinstance(rows, list) or (isinstance(rows, np.ndarray) and rows.ndim)
    if sized and len(rows) > limit:
        raise TooManyRows(
            f"a request may have {limit} rows, got {len(rows)}",
            pointer=pointer, expected=f"at most {limit} rows", got=str(len(rows)), hint="send several requests",
        )  # fmt: skip


def require_count(service: Service, name: str, count: int) -> None:
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
    """Cancels its block when the client leaves, which then raises ClientGone.

    Looks only after PATIENCE seconds: nearly every request is answered sooner, and never pays for it.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._watcher: asyncio.Task[None] | None = None
        self._gone = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._begin)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._timer.cancel()
        if self._watcher:
            self._watcher.cancel()
        if self._gone and kind is asyncio.CancelledError and self._task.uncancel() == 0:
            raise ClientGone("the client left before its answer was ready") from error

    def _begin(self) -> None:
        self._watcher = asyncio.get_running_loop().create_task(self._wait())

    async def _wait(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()
