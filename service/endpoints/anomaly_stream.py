"""Streamed anomaly scoring: each NDJSON line of the request is a row, and each line of the response is a verdict.

Memory use does not grow with the number of rows. The body is read in pieces of at most 64 KiB. The rows of one piece
are scored, and their verdicts are sent, before the next piece is read. The server therefore stops reading the request
while the client does not read the response, and stops scoring when the client disconnects.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial
from time import perf_counter

from starlette.requests import ClientDisconnect

from service.anomaly.inputs import InputRows, parse_record_rows, with_default_alpha, with_timeline_keys
from service.anomaly.verdicts import Verdicts, parsing_errors, results_and_errors
from service.codec import compression, ndjson
from service.codec.budget import NoLimit, max_row_bytes
from service.codec.conditions import no_conditions
from service.codec.response_body import stream_media_type
from service.codec.row_errors import MalformedRow
from service.endpoints import offload
from service.endpoints.context import ServiceContext
from service.endpoints.offload import run_in_thread_if_long
from service.endpoints.pixel_warning import pixel_warning
from service.endpoints.query_options import read_options
from service.endpoints.scoring import is_live_traffic, run_when_free, score_rows
from service.endpoints.validation import merge, validate
from service.errors import BodyTooSlow, ClientGone, InvalidField
from service.http.middleware import as_service_error
from service.http.request import HttpResponse, RequestContext
from service.inference.served_model import ServedModel
from service.schemas import AnomalyBody

BATCH_COST = 1024  # maximum cost of the rows that are scored together: 1 for a row, MALFORMED_COST for an error
MALFORMED_COST = 8


def media_type(request: RequestContext) -> str | None:
    """Return the media type of the stream that `request` asks for, or None if it asks for a whole response."""
    return stream_media_type(request.header(b"content-type"), request.header(b"accept"))


class AnomalyStream:
    """A request whose rows are scored as they arrive, and whose response has the type `media_type`.

    The constructor raises a ServiceError if the query or a header is invalid.

    Args:
        service: the components of the application.
        request: the request.
        media_type: the media type of the response.
        has_counts: whether the response ends with a line that has the counts.
    """

    def __init__(
        self, service: ServiceContext, request: RequestContext, media_type: str, *, has_counts: bool = True
    ) -> None:
        self._has_counts = has_counts
        self._service = service
        self._media_type = media_type
        self._request = request
        self._record = request.record
        self._record.endpoint += ":stream"
        self._served = service.find(request.query.model)
        self._record.model = self._served.name
        self._record.version = self._served.version
        options = read_options(AnomalyBody, request.query.options)
        body = with_timeline_keys(self._served, validate(AnomalyBody, merge({}, options.values)))
        self._body = with_default_alpha(self._served, body)
        self._is_live = is_live_traffic(service, request, self._body)
        is_gzip = compression.is_gzip(request.header(b"content-encoding"))
        self._gunzip = compression.GzipDecompressor() if is_gzip else None
        self._warning: dict[str, str] = {}
        self._counts = {"rows": 0, "anomalies": 0, "failed": 0, "unknown_fields": 0}
        if self._body.condition is not None:
            if self._served.conditions is None:
                raise no_conditions(self._served.name)
            self._served.conditions.read(self._body.condition)  # refuse an unknown level before the first row
        for name in ("fdr", "half_life", "half_life_rows"):
            if getattr(self._body, name) is not None:
                raise InvalidField(
                    f"{name} cannot be used on a stream: it needs all rows of the request at once",
                    pointer=f"/{name}",
                    expected="no such field",
                    got=name,
                    hint="leave the field out, or send the header Accept: application/json",
                )

    def response(self) -> HttpResponse:
        """Return a response whose content is produced while the request body arrives."""
        return HttpResponse(self._lines(), self._media_type.encode(), self._served.headers)

    async def _lines(self) -> AsyncIterator[bytes]:
        """Yield the lines of the rows, in order. The last line has the counts, or the error that ended the stream."""
        width = self._served.row_schema.width
        splitter = ndjson.LineSplitter(NoLimit(width, max_row_bytes(width)))
        line_started = perf_counter()
        try:
            async for piece in self._unpacked_pieces():
                values, has_records, is_done = splitter.feed(piece), False, False
                while not is_done:
                    next_batch = partial(_next_batch, values)
                    records, is_done = await run_in_thread_if_long(next_batch, offload.RECORD_BYTE * len(piece))
                    if records:
                        has_records = True
                        yield await self._score(records)
                        await self._request.charge_rows(len(records))
                        await asyncio.sleep(0)  # let other requests run, even if no work was moved to a thread
                if has_records or not splitter.has_incomplete_line:
                    line_started = perf_counter()
                elif perf_counter() - line_started > self._request.body_seconds:
                    raise BodyTooSlow(
                        f"a line had not arrived after {self._request.body_seconds:g} s",
                        headers={"Connection": "close"},
                    )
            if rest := splitter.finish():
                yield await self._score(rest)
            if self._has_counts:
                yield ndjson.dumps(
                    {"model": self._served.name, "version": self._served.version, **self._counts, **self._warning}
                )
        except (ClientDisconnect, ClientGone):
            raise  # nobody reads another line
        except Exception as error:  # noqa: BLE001 - a client must not take a broken stream for a complete one
            problem = as_service_error(self._request, error)
            yield ndjson.dumps(problem.problem(self._record.request_id))

    async def _unpacked_pieces(self) -> AsyncIterator[bytes]:
        async for piece in self._request.stream():
            if self._gunzip is None:
                yield piece
                continue
            for unpacked in self._gunzip.feed(piece):
                yield unpacked
        if self._gunzip:
            self._gunzip.finish()

    async def _score(self, records: list[object]) -> bytes:
        """Return the response lines for `records`."""
        served, body = self._served, self._body
        first_row = self._counts["rows"]
        parse = partial(
            parse_record_rows,
            served.row_schema,
            body,
            ndjson.NdjsonRows(lambda: records),
            may_contain_non_floats=True,
            pointer="",
            minimum=0,
        )
        input_rows = await run_in_thread_if_long(parse, offload.RECORD_VALUE * served.row_schema.width * len(records))
        run = partial(run_when_free, self._service, served)
        verdicts = await score_rows(self._service, served, input_rows, body, run, self._is_live, request=self._request)
        self._count(input_rows, verdicts)
        write = partial(_response_lines, served, body, input_rows, verdicts, first_row)
        onsets = offload.ONSET * verdicts.explained_rows if verdicts else 0
        return await run_in_thread_if_long(write, offload.VERDICT * len(records) + onsets)

    def _count(self, input_rows: InputRows, verdicts: Verdicts | None) -> None:
        scored = verdicts.scores.usable_count if verdicts else 0
        if not self._warning and (warning := pixel_warning(self._served, input_rows.parsed.x)):
            self._warning = {"warning": warning}
        self._counts["rows"] += input_rows.rows_received
        self._counts["failed"] += input_rows.rows_received - scored
        self._counts["unknown_fields"] += input_rows.unknown_fields
        self._counts["anomalies"] += sum(verdicts.is_anomaly) if verdicts else 0
        self._record.rows = self._counts["rows"]


def _next_batch(values: Iterator[object]) -> tuple[list[object], bool]:
    """Return the next values, and whether no more will follow. A piece of 64 KiB may have 32,768 invalid lines."""
    batch: list[object] = []
    cost = 0
    for value in values:
        batch.append(value)
        cost += MALFORMED_COST if isinstance(value, MalformedRow) else 1
        if cost >= BATCH_COST:
            return batch, False
    return batch, True


def _response_lines(
    served: ServedModel, body: AnomalyBody, input_rows: InputRows, verdicts: Verdicts | None, first_row: int
) -> bytes:
    """Return one line per row, with the result or the error of that row, in the order of the rows.

    If `detail` is "none", there are no lines. The first row has the number 0 in `verdicts`, and
    the number `first_row` in the whole stream.
    """
    if body.detail == "none":
        return b""
    if verdicts:
        scored, errors = results_and_errors(verdicts, body.explain, served.row_schema.names, served.manifest.parts)
    else:
        scored, errors = [], parsing_errors(input_rows.parsed)
    for error in errors:
        row, _, place = (error["pointer"] or f"/{error['row']}").removeprefix("/").partition("/")
        error["pointer"] = f"/{first_row + int(row)}" + (f"/{place}" if place else "")
    lines = sorted(scored + errors, key=lambda line: line["row"])
    for line in lines:
        line["row"] += first_row
    return b"".join(map(ndjson.dumps, lines))
