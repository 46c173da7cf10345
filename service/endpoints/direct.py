"""Answer direct requests to /encode, /decode, /reconstruct and /anomaly, and to the infer paths of the Open Inference
Protocol if all numbers are binary and no score is requested. `service.http.direct` says what direct requests are.

Work that the requests of a batch share is done once for the batch: the check that all numbers are finite, the verdicts,
the numbers of the metrics. Responses are byte for byte those of `InferenceEndpoints` and `OpenInferenceEndpoints`.
These handle all other requests.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
import numpy.typing as npt
import orjson
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from service.access.control import NAMES_OF_HEADERS, AccessControl, GrantedKey
from service.access.scopes import Scope
from service.anomaly.inputs import InputRows, with_default_alpha
from service.anomaly.verdicts import Scores, Verdicts, largest
from service.codec import npy
from service.codec import open_inference as codec
from service.codec.float32 import is_finite
from service.codec.plain_rows import read_plain_json
from service.codec.request_body import JSON, media_type_of
from service.codec.response_body import ARRAY_FORMATS, IMAGE_FORMATS, negotiate_media_type
from service.codec.row_arrays import parse_array
from service.codec.row_schema import ParsedRows, RowSchema
from service.endpoints import offload
from service.endpoints.context import ServiceContext
from service.endpoints.inference import ANOMALY, DECODE, ENCODE, RECONSTRUCT, anomaly_fields
from service.endpoints.open_inference.models import DECODE as DECODE_METHOD
from service.endpoints.open_inference.models import ProtocolModel
from service.endpoints.pipeline import RequestSpec
from service.endpoints.pixel_warning import may_be_out_of_range, pixel_warning
from service.endpoints.query_options import read_options
from service.endpoints.validation import merge, validate
from service.errors import PROBLEM_JSON, ClientGone, DeadlineExceeded, ServiceError
from service.http import security_headers
from service.http.admission import timed_out
from service.http.cross_site import AllowedHosts
from service.http.direct import MAX_BODY, Content, DirectRequest, Header, ResponseHeads, size_of
from service.http.open_inference import ERROR_MEDIA_TYPE, INFER, INFER_VERSION, error_body, parse_infer_path
from service.http.request import (
    MAX_HEADER,
    Query,
    as_headers,
    new_request_id,
    parse_query,
    valid_request_id,
)
from service.http.unread import SMALL_RESPONSE
from service.inference import operations
from service.inference.batch_queue import BatchRun, Job
from service.inference.operations import Operation
from service.inference.served_model import ServedModel
from service.monitoring.logs import AccessLog
from service.monitoring.request_record import RequestRecord
from service.schemas import AnomalyBody

Array = npt.NDArray[np.float32]
MAX_IN_PROGRESS = 64  # like the work slots of other requests: so a pass of the event loop takes a few ms
MAX_NUMBERS = 8192  # of a response in JSON, which takes 0.3 ms to write; larger responses are written in pieces
MAX_ROWS = 64  # of a response in JSON
FEW_FEATURES = 32  # a row with at most this many features is written as a whole before the numbers are picked
NUMBER_BYTES = 12  # of a number in the JSON of most clients
# Headers that change what a request means, and that a direct request therefore must not have.
UNUSUAL = frozenset((b"content-encoding", b"expect", b"origin", b"transfer-encoding", b"upgrade"))
# Everything in a head that a route depends on, besides the path and the query
ROUTE_HEADERS = (
    b"host", b"content-type", b"accept", b"x-request-timeout", codec.HEADER_LENGTH, *NAMES_OF_HEADERS,
)  # fmt: skip
MAX_ROUTES = 1024  # that are remembered
MAX_OBJECTS = 64  # JSON objects of the Open Inference Protocol that are remembered for each model
MAX_ROUTE_BYTES = 2048  # of the query and the headers of a route; a larger one is not remembered
SPECS: dict[str, RequestSpec[Any, Any]] = {
    "/encode": ENCODE, "/decode": DECODE, "/reconstruct": RECONSTRUCT, "/anomaly": ANOMALY,
}  # fmt: skip
_HEAD = (
    b"%bcontent-type: %b\r\ncontent-length: %d\r\n%bx-request-id: %b\r\n"
    b"server-timing: parse;dur=%.3f, queue;dur=%.3f, compute;dur=%.3f, write;dur=%.3f, total;dur=%.3f\r\n"
)


class ProtocolHead(NamedTuple):
    """What the head of a request of the Open Inference Protocol says.

    Args:
        method: "" for a model of rows, DECODE for a model of latents.
        json_length: the length of the JSON object before the binary numbers, in bytes.
    """

    method: str
    json_length: int


class Route:
    """What the heads of some requests say: the endpoint, the options and the formats.

    Args:
        endpoint: the path; for the Open Inference Protocol, its template with {name}.
        query: the parsed query.
        accept: the Accept header.
        is_binary: whether the numbers of the body are binary, not JSON.
        protocol: what the head of a request of the Open Inference Protocol says besides; None for other requests.

    Attributes:
        path: the path for the access log, with ELBO_ROOT_PATH.
        timeout: the seconds in the header X-Request-Timeout, or ELBO_REQUEST_TIMEOUT.
        key: the API key in the head; None if the server has no keys.
    """

    __slots__ = ("accept", "endpoint", "is_binary", "key", "model", "path", "plan", "protocol", "query", "timeout")

    def __init__(
        self,
        endpoint: str,
        query: Query,
        accept: str,
        is_binary: bool,
        protocol: ProtocolHead | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.query = query
        self.accept = accept
        self.is_binary = is_binary
        self.protocol = protocol
        self.path = ""
        self.timeout = 0.0
        self.key: GrantedKey | None = None
        self.model: Callable[[], ServedModel | None] = _no_model  # a weak reference to the model of `plan`
        self.plan: Plan | None = None  # how this model answers; None if it needs a task


class Plan:
    """How one model answers the requests of one route.

    Args:
        served: the model.
        route: the route.
        media_type: media type of the responses.
        operation: the operation of the model.
        schema: the schema of the rows.
        numbers_per_row: the numbers of a response per row.
    """

    def __init__(
        self,
        served: ServedModel,
        route: Route,
        media_type: str,
        operation: Operation,
        schema: RowSchema,
        numbers_per_row: int,
    ) -> None:
        self.name, self.version = served.name, served.version
        self.operation = operation
        self.media_type = media_type.encode()
        self.header_lines = _lines(served.headers)
        self.main = "" if route.protocol else SPECS[route.endpoint].array_field or ""
        self.pointer = f"/{self.main}"
        self.is_binary = route.is_binary
        self.schema = schema
        self.numbers_per_row = numbers_per_row
        self.max_rows = max(1, MAX_NUMBERS // numbers_per_row) if media_type == JSON else MAX_NUMBERS
        if media_type == JSON:
            self.max_rows = min(self.max_rows, MAX_ROWS)
        # A larger body probably has more than `max_rows` rows.
        self.max_body = MAX_BODY if route.is_binary else 1000 + NUMBER_BYTES * self.max_rows * schema.width

    def read(self, body: bytes) -> tuple["Plan", Array] | None:
        """Return the rows of `body` and the plan for them, or None if it is not plain rows of finite numbers."""
        if not self.is_binary:
            x = read_plain_json(body, self.main, self.schema)
            return None if x is None else (self, x)
        try:
            return self.parse_rows(npy.loads(body))
        except ServiceError:
            return None

    def parse_rows(self, array: npt.NDArray[Any]) -> tuple["Plan", Array] | None:
        """Return `array` as rows, and this plan; None if a number is missing. Raises InvalidRows."""
        x = parse_array(self.schema, array, self.pointer)
        if self.schema.allows_missing and not is_finite(x):  # otherwise all numbers are finite anyway
            return None
        return self, x

    def answer(self, jobs: Sequence["DirectJob"], outputs: tuple[Array, ...]) -> "Answer | None":
        """Return the responses to `jobs`, or None if one of them needs a task, such as for a number that overflows.

        Args:
            jobs: jobs of one batch.
            outputs: the outputs for the rows of these jobs, one after the other.
        """
        raise NotImplementedError


class Answer(NamedTuple):
    """The responses to the jobs of a batch.

    Args:
        contents: the bodies of the responses.
        count_rows: counts the rows in the metrics. Called after the responses are written, so that no client waits.
    """

    contents: list[Content]
    count_rows: Callable[[], None] | None = None


class ArrayPlan(Plan):
    """Responses whose fields are arrays, such as those of /reconstruct."""

    fields: tuple[str, ...] = ()

    def __init__(self, served: ServedModel, route: Route, *arguments: Any, fields: tuple[str, ...]) -> None:
        super().__init__(served, route, *arguments)
        self.fields = fields
        self._model = ref(served)
        self._has_pixels = route.endpoint == "/reconstruct" and served.manifest.pixel_range is not None

    def answer(self, jobs: Sequence["DirectJob"], outputs: tuple[Array, ...]) -> Answer | None:
        """Return the arrays in JSON or npy."""
        if not all(map(is_finite, outputs)):
            return None
        found: list[Content] = []
        start = 0
        for job in jobs:
            arrays = [output[start : start + job.rows] for output in outputs]
            start += job.rows
            if self._has_pixels and self._has_warning(job.inputs[0], arrays):
                return None
            if self.media_type == b"application/json":
                values = dict(zip(self.fields, arrays, strict=True))
                answer = {"model": self.name, "version": self.version, **values}
                found.append((orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY),))
            else:
                found.append(npy.parts(arrays[0]))
        return Answer(found)

    def _has_warning(self, x: Array, arrays: Sequence[Array]) -> bool:
        """Return whether the response needs a warning about the pixels in x. `arrays`: the arrays of the response."""
        served = self._model()
        if served is None:
            return True
        return may_be_out_of_range(served, x, arrays[-1]) and pixel_warning(served, x) is not None


class TensorPlan(Plan):
    """Responses of the Open Inference Protocol to requests that have the same JSON object before their numbers.

    Args:
        model: the model of the protocol.
        shape: the shape of the input.
        asked: the JSON object of the request.
        indices: the index of each requested output among the outputs of the operation.
    """

    def __init__(
        self,
        route: Route,
        *arguments: Any,
        model: ProtocolModel,
        shape: list[int],
        asked: codec.RequestObject,
        indices: list[int],
    ) -> None:
        super().__init__(model.served, route, *arguments)
        self.shape = shape
        self._indices = indices
        fields = {"model_name": model.name, "model_version": str(model.served.version)}
        if asked.id is not None:
            fields["id"] = asked.id
        # All responses have the same JSON object, because all have the same number of rows.
        shapes = {each.name: (shape[0], *model.outputs[each.name].shape(model.served)) for each in asked.outputs or ()}
        outputs = [(name, np.broadcast_to(np.float32(0), each)) for name, each in shapes.items()]
        self._text = codec.write_object(fields, outputs)
        self.header_lines += _lines([(codec.HEADER_LENGTH, b"%d" % len(self._text))])

    def answer(self, jobs: Sequence["DirectJob"], outputs: tuple[Array, ...]) -> Answer | None:
        """Return the JSON object and the numbers."""
        wanted = [outputs[index] for index in self._indices]
        if not all(map(is_finite, wanted)):
            return None
        rows = self.shape[0]
        return Answer(
            [
                (self._text, *[np.ascontiguousarray(each[start : start + rows]).data.cast("B") for each in wanted])
                for start in range(0, rows * len(jobs), rows)
            ]
        )


class ProtocolPlan(Plan):
    """Chooses the `TensorPlan` of a request of the Open Inference Protocol by the JSON object in its body.

    Args:
        plans: the plans of the model, by method and JSON object; None if requests with this object need a task. At most
            MAX_OBJECTS of them are kept, for all routes of the model.
        operations: operations of the model, each with the protocol's names of its outputs.
    """

    def __init__(
        self,
        served: ServedModel,
        route: Route,
        *arguments: Any,
        plans: dict[tuple[str, bytes], TensorPlan | None],
        operations: Sequence[tuple[Operation, tuple[str, ...]]],
    ) -> None:
        super().__init__(served, route, *arguments)
        assert route.protocol
        self._plans = plans
        self._operations = operations
        self._model = ref(served)
        self._route = route
        self._method, self._length = route.protocol

    def read(self, body: bytes) -> tuple[Plan, Array] | None:
        """Return the rows of `body` and the plan for them, or None if it is not plain rows of finite numbers."""
        key = self._method, body[: self._length]
        if key not in self._plans:
            if len(self._plans) >= MAX_OBJECTS:
                self._plans.clear()
            self._plans[key] = self._create(key[1])
        plan = self._plans[key]
        if plan is None or len(body) - self._length != codec.FLOAT32_BYTES * math.prod(plan.shape):
            return None
        try:
            return plan.parse_rows(np.frombuffer(body, "<f4", offset=self._length).reshape(plan.shape))
        except ServiceError:
            return None

    def _create(self, text: bytes) -> TensorPlan | None:
        """Return the plan for requests with the JSON object `text`, or None if they need a task."""
        served = self._model()
        if served is None:
            return None
        try:
            asked = codec.read_short_object(text)
            given = codec.binary_float32_input(asked)
        except ServiceError:
            return None
        model = ProtocolModel(served, self._method)
        if asked.parameters or given is None or given[0] != model.input:
            return None
        shape, outputs = given[1], asked.outputs or ()
        if len(shape) < 2 or not 0 < codec.FLOAT32_BYTES * math.prod(shape) <= MAX_BODY:
            return None
        if not all(each.is_binary for each in outputs):
            return None
        wanted = [each.name for each in outputs]
        for operation, names in self._operations:
            if wanted and set(wanted) <= set(names):
                arguments = codec.BINARY, operation, self.schema, self.numbers_per_row
                indices = list(map(names.index, wanted))
                return TensorPlan(self._route, *arguments, model=model, shape=shape, asked=asked, indices=indices)
        return None


class AnomalyPlan(Plan):
    """Responses of /anomaly.

    The numbers of all rows of a batch are written at once, and then set between the names of the fields. This takes a
    third of the time that orjson takes for a dictionary per row and per feature.

    If the model has at most FEW_FEATURES features, the numbers of all features are written, not only those of the
    features that the response explains. One check then finds all numbers that are not finite. For one row of 20
    features, the response takes 12 µs less than with an array of only the numbers that it needs.
    """

    def __init__(
        self,
        service: ServiceContext,
        served: ServedModel,
        route: Route,
        *arguments: Any,
        body: AnomalyBody,
        is_live: bool,
    ) -> None:
        super().__init__(served, route, *arguments)
        self._service = service
        self._model = ref(served)
        self._explained = min(body.explain, served.row_schema.width)
        self._parts = len(served.manifest.parts)
        self._names = [b'"name":' + orjson.dumps(name) for name in served.row_schema.names]
        self._is_live = is_live
        # The response to a request without rows, split where the counts and the results belong.
        empty = {
            "model": self.name,
            "version": self.version,
            **anomaly_fields(served, body, _without_rows(served), None),
        }
        text = orjson.dumps(empty, option=orjson.OPT_SERIALIZE_NUMPY).replace(b"%", b"%%")
        text = text.replace(b'"rows":0,"anomalies":0', b'"rows":%d,"anomalies":%d', 1)
        self._answer = text.replace(b'"results":[]', b'"results":[%b]', 1)
        parts = b",".join([orjson.dumps(name).replace(b"%", b"%%") + b":%b" for name in served.manifest.parts])
        features = b",".join([b'{%b,"value":%b,"expected":%b,"contribution":%b}'] * self._explained)
        self._result = (
            b'{"row":%d,"score":%b,"p_value":%b,"severity":%b,"is_anomaly":%b,"parts":{'
            + parts
            + b'},"features":['
            + features
            + b"]}"
        )

    def answer(self, jobs: Sequence["DirectJob"], outputs: tuple[Array, ...]) -> Answer | None:
        """Return the verdicts."""
        served = self._model()
        if served is None:
            return None
        x = jobs[0].inputs[0] if len(jobs) == 1 else np.concatenate([job.inputs[0] for job in jobs])
        numbers = _all_numbers(x, *outputs) if x.shape[1] <= FEW_FEATURES else None
        if (numbers is None or not is_finite(numbers)) and not Scores(*outputs).all_finite:
            return None
        is_anomaly = (outputs[2] > 1).tolist()  # by the severity, as `decide` does for requests of this plan
        if numbers is None:
            lines = self._lines(x, Scores.of_finite(*outputs))
        else:
            lines = self._lines_of_few(numbers, contribution=outputs[4])
        found: list[Content] = []
        start = 0
        for job in jobs:
            flags = is_anomaly[start : start + job.rows]
            results = [
                self._result % (row, *line[:3], b"true" if flag else b"false", *line[3:])
                for row, (flag, line) in enumerate(zip(flags, lines[start : start + job.rows], strict=True))
            ]
            start += job.rows
            found.append((self._answer % (job.rows, sum(flags), b",".join(results)),))
        return Answer(found, partial(self._count, served, x, outputs, is_anomaly))

    def _count(self, served: ServedModel, x: Array, outputs: tuple[Array, ...], is_anomaly: list[bool]) -> None:
        """Count the rows in the metrics."""
        anomalies = self._service.metrics.anomalies
        input_rows = InputRows(ParsedRows(x, list(range(len(x))), [], None), len(x))
        if self._is_live:
            anomalies.count(served, input_rows, Verdicts(input_rows, Scores.of_finite(*outputs), is_anomaly, None))
        else:
            anomalies.count_unobserved(served, input_rows)

    def _lines_of_few(self, numbers: Array, contribution: Array) -> list[list[bytes]]:
        """Return what `_lines` returns, from the result of `_all_numbers`."""
        names, first = self._names, 3 + self._parts
        width = len(names)
        lines = []
        texts = orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY)[2:-2].split(b"],[")
        for text, columns in zip(texts, largest(contribution, self._explained).tolist(), strict=True):
            cells = text.split(b",")
            line = cells[:first]
            for column in columns:
                place = first + column
                line += (names[column], cells[place], cells[place + width], cells[place + 2 * width])
            lines.append(line)
        return lines

    def _lines(self, x: Array, scores: Scores) -> list[list[bytes]]:
        """Return, for each row, score, p-value, severity, parts, and four texts per feature that is explained."""
        k, first = self._explained, 3 + self._parts
        top = largest(scores.contribution, k)
        numbers = np.empty((len(x), first + 3 * k), np.float32)
        numbers[:, 0], numbers[:, 1], numbers[:, 2] = scores.score, scores.p_value, scores.severity
        numbers[:, 3:first] = scores.parts
        places = top if len(x) == 1 else top + x.shape[1] * np.arange(len(x))[:, None]  # in the flattened arrays
        numbers[:, first : first + k] = x.take(places)
        numbers[:, first + k : first + 2 * k] = scores.expected.take(places)
        numbers[:, first + 2 * k :] = scores.contribution.take(places)
        texts = orjson.dumps(numbers, option=orjson.OPT_SERIALIZE_NUMPY)[2:-2].split(b"],[")
        lines = []
        for text, columns in zip(texts, top.tolist(), strict=True):
            line = text.split(b",")
            features: list[Any] = [None] * (4 * k)
            features[::4] = [self._names[column] for column in columns]
            features[1::4] = line[first : first + k]
            features[2::4] = line[first + k : first + 2 * k]
            features[3::4] = line[first + 2 * k :]
            lines.append(line[:first] + features)
        return lines


class DirectJob(Job):
    """The rows of a direct request in the queue of the batcher.

    Args:
        request: the request.
        plan: how the model answers it.
        rows: the rows [B, D].
        deadline: when the request times out, on the `perf_counter` clock.
        queued_at: when the rows had been read, on the same clock.
        parse: how long reading them took, in seconds.
        on_result: called with this job when it has a result.

    Attributes:
        result: the batch that has run, or an error; None at first.
        start: where the rows begin in this batch.
    """

    __slots__ = ("_on_result", "parse", "plan", "request", "result", "start")

    def __init__(
        self,
        request: DirectRequest,
        plan: Plan,
        rows: Array,
        deadline: float,
        queued_at: float,
        parse: float,
        on_result: Callable[["DirectJob"], None],
    ) -> None:
        super().__init__((rows,), deadline, queued_at)
        self.request = request
        self.plan = plan
        self.parse = parse
        self.result: BatchRun | BaseException | None = None
        self.start = 0
        self._on_result = on_result

    @property
    def is_over(self) -> bool:
        """Whether there is a result, or nobody waits for it."""
        return self.result is not None or self.request.is_over

    def finish(self, run: BatchRun, start: int) -> None:
        """Take the batch that has run. `DirectInference.respond` runs when the other jobs of the batch have it, too."""
        self.result = run
        self.start = start
        self._on_result(self)

    def fail(self, error: BaseException) -> None:
        """Take an error."""
        self.result = error
        self._on_result(self)


class DirectInference:
    """Answers direct requests, as a `DirectHandler`.

    Args:
        service: the components of the application.
        access: logs the requests.
        allowed_hosts: the hosts that requests may be for; None for every host.
        keys: the API keys of the server; None if requests need no key.
    """

    def __init__(
        self,
        service: ServiceContext,
        access: AccessLog,
        allowed_hosts: AllowedHosts | None = None,
        keys: AccessControl | None = None,
    ) -> None:
        self._service = service
        self._keys = keys
        self._allowed_hosts = allowed_hosts
        self._root_path = service.settings.root_path
        self._max_rows = service.settings.max_rows
        self._access = access
        self._admission = service.admission
        self._batcher = service.batcher
        self._batcher.after_batch = self._respond
        self._heads = ResponseHeads()
        self._routes: dict[tuple[object, ...], Route] = {}
        self._plans_of_objects: WeakKeyDictionary[ServedModel, dict[tuple[str, bytes], TensorPlan | None]]
        self._plans_of_objects = WeakKeyDictionary()  # see `ProtocolPlan`
        self._in_progress = 0  # jobs in the batcher
        self._waiting: deque[DirectRequest] = deque()  # requests whose bodies have not been read yet
        self._is_start_scheduled = False
        self._finished: list[DirectJob] = []  # jobs with a result, whose responses are not written yet

    def route(self, path: str, query: bytes, headers: dict[bytes, bytes]) -> Route | None:
        """Return what the head says, or None if the request needs a task.

        Heads that differ only in other headers than ROUTE_HEADERS share one route, and so its plan.
        """
        endpoint = path.removeprefix(self._root_path)  # a proxy may have removed it already
        is_known = endpoint in SPECS or codec.HEADER_LENGTH in headers
        if not is_known or not UNUSUAL.isdisjoint(headers) or b"host" not in headers:
            return None
        if max(map(len, headers.values())) > MAX_HEADER:
            return None
        values = [headers.get(name) for name in ROUTE_HEADERS]
        key = (endpoint, query, *values)
        route = self._routes.get(key)
        if route is None:
            route = self._new_route(endpoint, query, headers)
            if route is None or len(query) + sum([len(value) for value in values if value]) > MAX_ROUTE_BYTES:
                return route
            if len(self._routes) >= MAX_ROUTES:
                self._routes.clear()
            self._routes[key] = route
        return route

    def _new_route(self, endpoint: str, query: bytes, headers: dict[bytes, bytes]) -> Route | None:
        """Return what `query` and ROUTE_HEADERS say, or None if the request needs a task."""
        try:
            timeout = float(headers.get(b"x-request-timeout", self._service.settings.request_timeout))
            key = self._keys.find(headers) if self._keys else None
            if self._allowed_hosts:
                self._allowed_hosts.check(endpoint, headers[b"host"].decode("latin-1"))
            find = _endpoint_route if endpoint in SPECS else _protocol_route
            route = find(endpoint, query, headers) if 0 < timeout < math.inf else None
        except (ValueError, ServiceError):
            return None
        if route is not None:
            route.path, route.timeout, route.key = self._root_path + endpoint, timeout, key
        return route

    def max_body(self, route: Route) -> int:
        """Return the size in bytes above which the body of a request with this head needs a task."""
        plan = self._plan_of(route)
        return 0 if plan is None else plan.max_body

    def start(self, request: DirectRequest) -> bool:
        """Count `request` for its key, read its rows and queue them. Return false if it needs a task."""
        if self._keys is None:
            return self._begin(request)
        if not self._enter(self._keys, request):
            return False
        if self._begin(request):
            return True
        _undo_enter(request)
        return False

    def _enter(self, keys: AccessControl, request: DirectRequest) -> bool:
        """Count a request for the limits of its API key. Return false if its key does not permit it."""
        route: Route = request.head.route
        key = None if route.key is None else keys.current(route.key)
        if key is None:
            return False
        if key is not route.key:  # the file of keys has changed
            route.key, route.model, route.plan = key, _no_model, None
        try:
            key.require(Scope.INFER)
            key.enter()
        except ServiceError:
            return False
        request.key = key
        return True

    def _begin(self, request: DirectRequest) -> bool:
        plan = self._plan_of(request.head.route)
        if plan is None or len(request.sent) > plan.max_body:
            return False
        if self._waiting or self._in_progress >= MAX_IN_PROGRESS or not _has_time(plan, request):
            return self._wait(request)
        job = self._read(request, plan, is_queued=False)
        if job is None:
            return False
        if not self._take_place(request):
            request.work = None
            return False
        self._submit(job)
        return True

    def go_on(self) -> None:
        """Answer requests whose batch has run, and start waiting requests and the next batch.

        The event loop does this once per pass. In a pass that refuses thousands of requests, `Turns` calls this method:
        otherwise only MAX_IN_PROGRESS requests would be answered in such a pass.
        """
        if self._is_start_scheduled:
            self._start_waiting()
        self._batcher.step_now()

    def abandon(self, request: DirectRequest) -> None:
        """Forget a request whose client has disconnected."""
        job: DirectJob | None = request.work
        if job is not None and job.result is None:
            self._release([job])
        elif job is None:
            self._forget(1, len(request.sent))
        record = self._record(request, perf_counter())
        record.status, record.problem = ClientGone.status, ClientGone.code
        self._count(record)
        _exit(request, 0 if job is None else job.rows)
        request.detach()

    def _plan_of(self, route: Route) -> Plan | None:
        try:
            served = self._service.find(route.query.model)
            if route.model() is not served:
                route.model, route.plan = ref(served), None
                route.plan = self._create_plan(served, route)
        except Exception:  # noqa: BLE001 - a task meets the same error, and reports it
            return None
        return route.plan

    def _create_plan(self, served: ServedModel, route: Route) -> Plan | None:
        if not route.protocol:
            return create_plan(self._service, served, route)
        plans = self._plans_of_objects.setdefault(served, {})
        return create_protocol_plan(served, route, route.protocol, plans)

    def _wait(self, request: DirectRequest) -> bool:
        """Let a request wait until there is time to read its body. Return false if it is refused."""
        if self._admission.refusal(rows=1):
            return False
        if not self._take_place(request):
            return False
        self._waiting.append(request)
        self._schedule_start()
        return True

    def _take_place(self, request: DirectRequest) -> bool:
        """Count a request and the memory of its body. Return false if there is no room for the body."""
        try:
            self._admission.hold_bytes(len(request.sent))
        except ServiceError:
            return False
        self._admission.requests.add(1)
        return True

    def _schedule_start(self) -> None:
        if not self._is_start_scheduled and self._waiting and self._in_progress < MAX_IN_PROGRESS:
            self._is_start_scheduled = True
            self._waiting[0].connection.loop.call_soon(self._start_waiting)

    def _start_waiting(self) -> None:
        """Read the bodies of waiting requests, as far as there is time in this pass of the event loop."""
        self._is_start_scheduled = False
        while self._waiting and self._in_progress < MAX_IN_PROGRESS:
            request = self._waiting[0]
            plan = None if request.is_over else self._plan_of(request.head.route)
            if plan is not None and not _has_time(plan, request):
                break
            self._waiting.popleft()  # before the start, which may write a response and so begin the next request
            if not request.is_over:
                self._start_after_wait(request, plan)
        self._schedule_start()

    def _start_after_wait(self, request: DirectRequest, plan: Plan | None) -> None:
        if perf_counter() > request.started + request.head.route.timeout:
            self._forget(1, len(request.sent))
            self._respond_with_error(request, timed_out())
            return
        job = None if plan is None else self._read(request, plan, is_queued=True)
        if job is None:
            self._forget(1, len(request.sent))
            start_task(request)
        else:
            self._submit(job)

    def _read(self, request: DirectRequest, plan: Plan, is_queued: bool) -> DirectJob | None:
        """Return the job of a request, or None if it needs a task."""
        started = perf_counter()
        try:
            found = plan.read(request.sent)
        except Exception:  # noqa: BLE001 - a task meets the same error, and reports it
            return None
        served = request.head.route.model()
        if found is None or served is None:
            return None
        plan, rows = found
        if len(rows) > min(plan.max_rows, self._max_rows) or not self._batcher.accepts(served, len(rows)):
            return None
        if self._admission.refusal(rows=len(rows), is_queued=is_queued):
            return None
        now = perf_counter()
        deadline = request.started + request.head.route.timeout
        job = request.work = DirectJob(request, plan, rows, deadline, now, now - started, self._on_result)
        return job

    def _submit(self, job: DirectJob) -> None:
        served = job.request.head.route.model()
        assert served is not None  # `_read` has found it
        self._in_progress += 1
        self._batcher.submit(served, job.plan.operation, job)

    def _on_result(self, job: DirectJob) -> None:
        self._finished.append(job)
        if isinstance(job.result, DeadlineExceeded):  # outside of a batch
            job.request.connection.loop.call_soon(self._respond)

    def _respond(self) -> None:
        """Respond to the requests whose jobs have results."""
        if not self._finished:
            return
        finished, self._finished = self._finished, []
        self._release(finished)
        groups: dict[tuple[int, int], list[DirectJob]] = {}
        for job in finished:
            if not job.request.is_over:
                groups.setdefault((id(job.plan), id(job.result)), []).append(job)
        for jobs in groups.values():
            self._respond_alike(jobs)
        self._schedule_start()

    def _release(self, jobs: Sequence[DirectJob]) -> None:
        self._in_progress -= len(jobs)
        self._batcher.release(sum([job.rows for job in jobs]))
        self._forget(len(jobs), sum([len(job.request.sent) for job in jobs]))

    def _forget(self, requests: int, size: int) -> None:
        """Count requests as over, and the `size` bytes of their bodies as freed."""
        self._admission.requests.finish(requests)
        self._admission.release_bytes(size)

    def _respond_alike(self, jobs: list[DirectJob]) -> None:
        """Respond to the requests of one plan in one batch."""
        run, plan = jobs[0].result, jobs[0].plan
        if not isinstance(run, BatchRun):
            self._respond_to_failed(jobs, run)
            return
        started = perf_counter()
        try:
            answer = plan.answer(jobs, _outputs_of(jobs, run))
            for content in answer.contents if answer else ():
                if (size := size_of(content)) > SMALL_RESPONSE:
                    self._admission.check_response(size)
        except Exception:  # noqa: BLE001 - a task meets the same error, and reports it
            answer = None
        if answer is None:
            if len(jobs) == 1:
                start_task(jobs[0].request)
            else:
                for job in jobs:
                    self._respond_alike([job])
            return
        self._write(jobs, run, answer, perf_counter() - started)

    def _write(self, jobs: Sequence[DirectJob], run: BatchRun, answer: Answer, seconds: float) -> None:
        """Write the responses, and count and log the requests. `seconds`: how long it took to make all of them."""
        records = []
        now = perf_counter()
        for job, content in zip(jobs, answer.contents, strict=True):
            request = job.request
            record = self._record(request, now)
            record.model, record.version = job.plan.name, job.plan.version
            record.status = 200
            record.rows = job.rows
            record.parse, record.queue = job.parse, run.started - job.queued_at
            record.compute, record.write = run.seconds, seconds
            record.read_at, record.computed_at = job.queued_at, run.started + run.seconds
            head = _HEAD % (
                self._heads.start(request.connection.server_state.default_headers),
                job.plan.media_type,
                size_of(content),
                job.plan.header_lines,
                record.request_id.encode(),
                1e3 * record.parse,
                1e3 * record.queue,
                1e3 * run.seconds,
                1e3 * seconds,
                1e3 * record.total,
            )
            if request.key:
                head += _lines(request.key.headers())
                request.key.exit(job.rows)
            self._end(request, head, content)
            records.append(record)
        for record in records:
            self._count(record)
        if answer.count_rows:
            try:
                answer.count_rows()
            except Exception as error:  # noqa: BLE001 - the other requests of the batch still need their responses
                context = {"message": "the rows of a batch were not counted", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)

    def _end(self, request: DirectRequest, head: bytes, content: Content) -> None:
        """Write a response. `head` lacks the last empty line."""
        if self._heads.closes:
            request.keep_alive = False
        elif not request.keep_alive:
            head += b"connection: close\r\n"
        request.write(head + b"\r\n", content)

    def _respond_to_failed(self, jobs: Sequence[DirectJob], error: BaseException | None) -> None:
        """Report that the time is over. Any other error is met again, and reported, by a task."""
        for job in jobs:
            if isinstance(error, DeadlineExceeded):
                self._respond_with_error(job.request, error)
            else:
                start_task(job.request)

    def _respond_with_error(self, request: DirectRequest, error: ServiceError) -> None:
        record = self._record(request, perf_counter())
        record.status, record.problem = error.status, error.code
        content, media_type = orjson.dumps(error.problem(record.request_id)), PROBLEM_JSON
        if request.head.route.protocol:
            content, media_type = error_body(error), ERROR_MEDIA_TYPE
        default_headers = request.connection.server_state.default_headers
        self._heads.start(default_headers)
        headers = [
            *default_headers,
            (b"content-type", media_type.encode()),
            (b"content-length", b"%d" % len(content)),
            *security_headers.complete(as_headers(error.headers)),
            (b"x-request-id", record.request_id.encode()),
            (b"server-timing", b"total;dur=%.3f" % (1e3 * record.total)),
            *(request.key.headers() if request.key else ()),
        ]
        job: DirectJob | None = request.work
        _exit(request, 0 if job is None else job.rows)
        self._end(request, STATUS_LINE[error.status] + _lines(headers), (content,))
        self._count(record)

    def _count(self, record: RequestRecord) -> None:
        """Count and log a request that has ended."""
        self._service.metrics.count(record)
        self._access.log(record)

    def _record(self, request: DirectRequest, now: float) -> RequestRecord:
        """Return the record of a request that ends now."""
        route, headers = request.head.route, request.head.by_name
        client = client_host(request.connection, headers.get(b"x-forwarded-for"))
        request_id = valid_request_id(headers.get(b"x-request-id", b"")) or new_request_id()
        record = RequestRecord(request_id, "POST", route.path, client, request.started, route.endpoint)
        record.total = now - request.started
        record.traceparent = headers.get(b"traceparent", b"")
        if request.key:
            record.key = request.key.name
        return record


def _all_numbers(
    x: Array, score: Array, p_value: Array, severity: Array, parts: Array, contribution: Array, expected: Array
) -> Array:
    """Return score, p-value, severity, parts, x, expected values and contributions side by side, [B, 3 + P + 3 D]."""
    columns = (score[:, None], p_value[:, None], severity[:, None], parts, x, expected, contribution)
    return np.concatenate(columns, axis=1, dtype=np.float32)


def client_host(connection: Any, forwarded: bytes | None) -> str | None:
    """Return the address of the client, which a trusted proxy states in X-Forwarded-For, as uvicorn finds it."""
    host = connection.client[0] if connection.client else None
    if forwarded is None or not isinstance(connection.app, ProxyHeadersMiddleware):
        return host
    trusted = connection.app.trusted_hosts
    return (trusted.get_trusted_client_address(forwarded.decode("latin-1"))[0] or host) if host in trusted else host


def start_task(request: DirectRequest) -> None:
    """Let a task answer `request` from the beginning."""
    _undo_enter(request)
    request.connection.start_task(request)


def _undo_enter(request: DirectRequest) -> None:
    """Forget that the API key of a request has counted it, because a task counts it again."""
    if request.key:
        request.key.undo_enter()
        request.key = None


def _exit(request: DirectRequest, rows: int) -> None:
    """Count the end of a request, and its rows, for the limits of its API key."""
    if request.key:
        request.key.exit(rows)


def _lines(headers: Iterable[Header]) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def _endpoint_route(endpoint: str, query: bytes, headers: dict[bytes, bytes]) -> Route | None:
    """Return the route of a request to an endpoint in SPECS, or None if it needs a task. Raises ServiceError."""
    media_type = media_type_of(headers.get(b"content-type", b"").decode("latin-1"))
    if media_type not in (JSON, npy.MEDIA_TYPE):
        return None
    accept = headers.get(b"accept", b"*/*").decode("latin-1")
    return Route(endpoint, parse_query(query), accept, is_binary=media_type == npy.MEDIA_TYPE)


def _protocol_route(path: str, query: bytes, headers: dict[bytes, bytes]) -> Route | None:
    """Return the route of a request of the Open Inference Protocol, or None if it needs a task."""
    found = parse_infer_path(path)
    length = headers[codec.HEADER_LENGTH]
    is_usual = not query and headers.get(b"content-type", codec.BINARY.encode()) == codec.BINARY.encode()
    if found is None or found.route not in (INFER, INFER_VERSION) or not is_usual:
        return None
    if not length.isdigit() or int(length[:9]) > codec.MAX_CACHED_BYTES or len(length) > 9:
        return None
    name, _, method = found.model.partition(":")
    if method not in ("", DECODE_METHOD) or (":" in found.model and not method):
        return None
    reference = name if found.version is None else f"{name}@{found.version}"
    return Route(found.route, Query(reference, ()), "", is_binary=True, protocol=ProtocolHead(method, int(length)))


def create_plan(service: ServiceContext, served: ServedModel, route: Route) -> Plan | None:
    """Return how `served` answers the requests of `route`, or None if they need a task."""
    spec = SPECS[route.endpoint]
    if _has_unusual_rows(served):
        return None
    if spec.needs_latents and served.manifest.only_reconstructs:
        return None
    formats = IMAGE_FORMATS if spec.png_output and served.has_png_output else ARRAY_FORMATS
    try:
        media_type = negotiate_media_type(route.accept, formats)
        options = read_options(spec.schema, route.query.options).values
        body = validate(spec.schema, merge({spec.array_field or "": []}, options))
    except ServiceError:
        return None
    if media_type not in (JSON, npy.MEDIA_TYPE):
        return None
    if route.endpoint == "/anomaly":
        return _anomaly_plan(service, served, route, media_type, with_default_alpha(served, body))
    return _array_plan(served, route, media_type, body)


def create_protocol_plan(
    served: ServedModel, route: Route, head: ProtocolHead, plans: dict[tuple[str, bytes], TensorPlan | None]
) -> Plan | None:
    """Return how `served` answers requests of the Open Inference Protocol, or None if they need a task.

    All routes of the model share the cache `plans`, see `ProtocolPlan`.
    """
    if _has_unusual_rows(served) or (head.method and served.manifest.only_reconstructs):
        return None
    schema = served.latent_schema if head.method else served.row_schema
    found: list[tuple[Operation, tuple[str, ...]]]
    if head.method:
        found = [(operations.DECODE, ("x_hat",))]
    else:
        found = [(operations.reconstruct(schema.allows_missing), ("x_hat", "error"))]
        if not served.manifest.only_reconstructs:
            found.append((operations.ENCODE, ("mean", "std")))
    arguments = codec.BINARY, found[0][0], schema, served.manifest.width
    return ProtocolPlan(served, route, *arguments, plans=plans, operations=found)


def _has_unusual_rows(served: ServedModel) -> bool:
    """Return whether the rows of a model are more than numbers: windows, rows with conditions, or with categories."""
    return served.window_schema is not None or served.conditions is not None or served.columns is not None


def _array_plan(served: ServedModel, route: Route, media_type: str, body: Any) -> Plan | None:
    """Return the plan of an endpoint whose responses are arrays. `body` has the options of the request."""
    manifest, schema = served.manifest, served.row_schema
    fields: tuple[str, ...]
    if body.model_fields_set - {"inputs", "latents"}:
        return None
    if route.endpoint == "/encode":
        if manifest.pixel_range is not None:
            return None
        operation, fields, width = operations.ENCODE, ("latents", "std"), 2 * manifest.latents
    elif route.endpoint == "/decode":
        operation, fields, width, schema = operations.DECODE, ("outputs",), manifest.width, served.latent_schema
    else:
        operation = operations.reconstruct(schema.allows_missing)
        fields, width = ("outputs", "errors"), manifest.width + 1
    return ArrayPlan(served, route, media_type, operation, schema, width, fields=fields)


def _anomaly_plan(
    service: ServiceContext, served: ServedModel, route: Route, media_type: str, body: AnomalyBody
) -> Plan | None:
    """Return the plan of /anomaly. `body` has the options of the request."""
    is_usual = body.detail == "full" and body.fdr is None and body.condition is None
    is_smoothed = body.half_life is not None or body.half_life_rows is not None
    given = body.records is not None or body.metrics is not None
    has_fixed_rows = served.silences is None and served.manifest.pixel_range is None
    if not is_usual or is_smoothed or given or not has_fixed_rows or media_type != JSON:
        return None
    is_live = service.settings.observe if body.observe is None else body.observe
    if route.key and Scope.WRITE not in route.key.scopes:
        if body.observe:
            return None  # refused, see `is_live_traffic` in `scoring.py`
        is_live = False
    operation = operations.anomaly(body.alpha, body.extrapolated)
    numbers = 3 + len(served.manifest.parts) + 4 * min(body.explain, served.row_schema.width)
    arguments = media_type, operation, served.row_schema, numbers
    return AnomalyPlan(service, served, route, *arguments, body=body, is_live=is_live)


def _without_rows(served: ServedModel) -> InputRows:
    return InputRows(ParsedRows(np.empty((0, served.row_schema.width), np.float32), [], [], None), 0)


def _has_time(plan: Plan, request: DirectRequest) -> bool:
    """Return whether there is time to read the body of a request in this pass of the event loop, and take the time."""
    estimated_ns = len(request.sent) * (offload.ARRAY_BYTE if plan.is_binary else offload.JSON_BYTE)
    return offload.take_loop_time(request.connection.loop, estimated_ns)


def _outputs_of(jobs: Sequence[DirectJob], run: BatchRun) -> tuple[Array, ...]:
    """Return the outputs of `run` for the rows of `jobs`, which are in the order of the run."""
    start, end = jobs[0].start, jobs[-1].start + jobs[-1].rows
    if sum([job.rows for job in jobs]) == end - start:
        return tuple([output[start:end] for output in run.outputs])
    places = np.concatenate([np.arange(job.start, job.start + job.rows) for job in jobs])
    return tuple([output[places] for output in run.outputs])


def _no_model() -> None:
    return None
