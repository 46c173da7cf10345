"""NDJSON in, NDJSON out: a verdict a line as the rows come, for any number of rows in constant memory.

The rows of a piece of the body, at most 64 KiB, are judged together and answered before the next piece is read, so that
a client that does not read is not read from either, and one that leaves ends the work.
"""

from collections.abc import AsyncIterator
from functools import partial

from service.anomaly.inputs import Intake, of_records
from service.anomaly.verdicts import Verdicts, results, unread
from service.codec import compression, ndjson
from service.codec.request_body import media_type_of
from service.endpoints.pipeline import Service, aside, judge_now
from service.endpoints.validation import merge, validate
from service.errors import InvalidField, ServiceError
from service.http.request import Answer, Exchange
from service.inference.registry import Served
from service.schemas import AnomalyBody

LONGEST_LINE = 2**20  # bytes; for wide rows more
NUMBER_BYTES = 32  # in which a JSON number with its comma fits
COSTLY = 8  # how many times as long as other JSON a byte of records takes


def asked_for(exchange: Exchange) -> bool:
    """Whether a request sends NDJSON and wants NDJSON."""
    return (
        b"ndjson" in exchange.headers.get(b"accept", b"")
        and media_type_of(exchange.header(b"content-type")) in ndjson.MEDIA_TYPES
    )


class Stream:
    """One request's rows, judged as they come."""

    def __init__(self, service: Service, exchange: Exchange) -> None:
        self._service, self._exchange = service, exchange
        exchange.trace.endpoint += ":stream"
        self._served = served = service.find(exchange.query.model)
        exchange.trace.model, exchange.trace.version = served.name, served.version
        self._body = validate(AnomalyBody, merge({}, exchange.query.options))
        self._gunzip = compression.Gunzip() if compression.gzipped(exchange.header(b"content-encoding")) else None
        self._counts = {"rows": 0, "anomalies": 0, "failed": 0, "unknown_fields": 0}
        for name in ("fdr", "half_life", "half_life_rows"):
            if getattr(self._body, name) is not None:
                raise InvalidField(
                    f"{name} decides over a whole request, which a stream never is",
                    pointer=f"/{name}", expected="no such field", got=name, hint="answer as application/json",
                )  # fmt: skip

    def answer(self) -> Answer:
        """The answer, whose content is made as the rows come."""
        return Answer(self._lines(), ndjson.MEDIA_TYPE.encode(), self._served.headers)

    async def _lines(self) -> AsyncIterator[bytes]:
        """A line a row, in their order; at the end the counts, or the problem that ended it."""
        try:
            splitter = ndjson.Splitter(max(LONGEST_LINE, NUMBER_BYTES * self._served.rows.width))
            async for piece in self._pieces():
                found = await aside(partial(splitter.feed, piece), COSTLY * len(piece))
                if found:
                    yield await self._judge(found)
            if last := splitter.end():
                yield await self._judge(last)
            head = {"model": self._served.name, "version": self._served.version}
            yield ndjson.dumps(head | self._counts)
        except ServiceError as error:
            self._exchange.trace.problem = error.code
            yield ndjson.dumps(error.problem(self._exchange.trace.request_id))

    async def _pieces(self) -> AsyncIterator[bytes]:
        async for piece in self._exchange.pieces():
            if self._gunzip is None:
                yield piece
                continue
            for unpacked in self._gunzip.feed(piece):
                yield unpacked
        if self._gunzip:
            self._gunzip.end()

    async def _judge(self, found: list[object]) -> bytes:
        """The lines of the answer for the rows in `found`."""
        first = self._counts["rows"]
        rows, body = self._served.rows, self._body
        take = partial(of_records, rows, body, ndjson.Lines(found), careful=True, pointer="", least=0)
        intake = await aside(take, COSTLY * rows.width * len(found))
        verdicts = await judge_now(self._service, self._served, intake, body)
        self._count(intake, verdicts)
        return await aside(partial(_written, self._served, body, intake, verdicts, first), 400 * len(found))

    def _count(self, intake: Intake, verdicts: Verdicts | None) -> None:
        judged = verdicts.scores.count if verdicts else 0
        self._counts["rows"] += intake.sent
        self._counts["failed"] += intake.sent - judged
        self._counts["unknown_fields"] += intake.unknown
        self._counts["anomalies"] += sum(verdicts.flags) if verdicts else 0
        self._exchange.trace.rows = self._counts["rows"]


def _written(served: Served, body: AnomalyBody, intake: Intake, verdicts: Verdicts | None, first: int) -> bytes:
    """The results and errors of rows that begin with row `first`, one a line in their order."""
    if body.detail == "none":
        return b""
    told_of = body.explain, served.rows.names, served.manifest.parts
    found, errors = results(verdicts, *told_of) if verdicts else ([], unread(intake.reading))
    for error in errors:
        at, _, place = (error["pointer"] or f"/{error['row']}").removeprefix("/").partition("/")
        error["pointer"] = f"/{first + int(at)}" + (f"/{place}" if place else "")
    told = sorted(found + errors, key=lambda line: line["row"])
    for line in told:
        line["row"] += first
    return b"".join(map(ndjson.dumps, told))
