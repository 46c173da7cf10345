"""NDJSON in, NDJSON out: a verdict a line as the rows come, for any number of rows in constant memory.

The rows of a piece of the body, at most 64 KiB, are judged together and answered before the next piece is read, so that
a client that does not read is not read from either, and one that leaves ends the work.
"""

from collections.abc import AsyncIterator
from functools import partial

from service.anomaly.inputs import InputRows, parse_record_rows
from service.anomaly.verdicts import Verdicts, parsing_errors, results_and_errors
from service.codec import compression, ndjson
from service.codec.request_body import media_type_of
from service.endpoints.pipeline import ServiceContext, aside, score_rows
from service.endpoints.validation import merge, validate
from service.errors import InvalidField, ServiceError
from service.http.request import HttpResponse, RequestContext
from service.inference.registry import ServedModel
from service.schemas import AnomalyBody

LONGEST_LINE = 2**20  # bytes; for wide rows more
NUMBER_BYTES = 32  # in which a JSON number with its comma fits
COSTLY = 8  # how many times as long as other JSON a byte of records takes


def asked_for(request: RequestContext) -> bool:
    """Whether a request sends NDJSON and wants NDJSON."""
    return (
        b"ndjson" in request.headers.get(b"accept", b"")
        and media_type_of(request.header(b"content-type")) in ndjson.MEDIA_TYPES
    )


class Stream:
    """One request's rows, judged as they come."""

    def __init__(self, service: ServiceContext, request: RequestContext) -> None:
        self._service, self._exchange = service, request
        request.record.endpoint += ":stream"
        self._served = served = service.find(request.query.model)
        request.record.model, request.record.version = served.name, served.version
        self._body = validate(AnomalyBody, merge({}, request.query.options))
        self._gunzip = (
            compression.GzipDecompressor() if compression.is_gzip(request.header(b"content-encoding")) else None
        )
        self._counts = {"rows": 0, "anomalies": 0, "failed": 0, "unknown_fields": 0}
        for name in ("fdr", "half_life", "half_life_rows"):
            if getattr(self._body, name) is not None:
                raise InvalidField(
                    f"{name} decides over a whole request, which a stream never is",
                    pointer=f"/{name}", expected="no such field", got=name, hint="answer as application/json",
                )  # fmt: skip

    def answer(self) -> HttpResponse:
        """The answer, whose content is made as the rows come."""
        return HttpResponse(self._lines(), ndjson.MEDIA_TYPE.encode(), self._served.headers)

    async def _lines(self) -> AsyncIterator[bytes]:
        """A line a row, in their order; at the end the counts, or the problem that ended it."""
        try:
            splitter = ndjson.LineSplitter(max(LONGEST_LINE, NUMBER_BYTES * self._served.row_schema.width))
            async for piece in self._pieces():
                found = await aside(partial(splitter.feed, piece), COSTLY * len(piece))
                if found:
                    yield await self._judge(found)
            if last := splitter.finish():
                yield await self._judge(last)
            head = {"model": self._served.name, "version": self._served.version}
            yield ndjson.dumps(head | self._counts)
        except ServiceError as error:
            self._exchange.record.problem = error.code
            yield ndjson.dumps(error.problem(self._exchange.record.request_id))

    async def _pieces(self) -> AsyncIterator[bytes]:
        async for piece in self._exchange.pieces():
            if self._gunzip is None:
                yield piece
                continue
            for unpacked in self._gunzip.feed(piece):
                yield unpacked
        if self._gunzip:
            self._gunzip.finish()

    async def _judge(self, found: list[object]) -> bytes:
        """The lines of the answer for the rows in `found`."""
        first = self._counts["rows"]
        schema, body = self._served.row_schema, self._body
        parse = partial(
            parse_record_rows,
            schema,
            body,
            ndjson.NdjsonRows(found),
            may_contain_non_floats=True,
            pointer="",
            minimum=0,
        )
        input_rows = await aside(parse, COSTLY * schema.width * len(found))
        verdicts = await score_rows(self._service, self._served, input_rows, body)
        self._count(input_rows, verdicts)
        return await aside(partial(_written, self._served, body, input_rows, verdicts, first), 400 * len(found))

    def _count(self, input_rows: InputRows, verdicts: Verdicts | None) -> None:
        judged = verdicts.scores.usable_count if verdicts else 0
        self._counts["rows"] += input_rows.rows_received
        self._counts["failed"] += input_rows.rows_received - judged
        self._counts["unknown_fields"] += input_rows.unknown_fields
        self._counts["anomalies"] += sum(verdicts.is_anomaly) if verdicts else 0
        self._exchange.record.rows = self._counts["rows"]


def _written(
    served: ServedModel, body: AnomalyBody, input_rows: InputRows, verdicts: Verdicts | None, first: int
) -> bytes:
    """The results and errors of rows that begin with row `first`, one a line in their order."""
    if body.detail == "none":
        return b""
    told_of = body.explain, served.row_schema.names, served.manifest.parts
    found, errors = results_and_errors(verdicts, *told_of) if verdicts else ([], parsing_errors(input_rows.parsed))
    for error in errors:
        at, _, place = (error["pointer"] or f"/{error['row']}").removeprefix("/").partition("/")
        error["pointer"] = f"/{first + int(at)}" + (f"/{place}" if place else "")
    told = sorted(found + errors, key=lambda line: line["row"])
    for line in told:
        line["row"] += first
    return b"".join(map(ndjson.dumps, told))
