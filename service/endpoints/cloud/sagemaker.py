"""`POST /invocations` of Amazon SageMaker. The custom attributes of a request choose which endpoint answers it.

SageMaker forwards the body and the headers Content-Type, Accept and X-Amzn-SageMaker-Custom-Attributes. It forwards no
query. Files for SageMaker have one row per line, and its CSV files have no header.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from typing import Any
from urllib.parse import urlencode

from service.codec import csv_rows, ndjson
from service.codec.budget import Budget
from service.codec.request_body import BodyReader, RequestFields, media_type_of
from service.codec.row_errors import MalformedRow
from service.endpoints import anomaly_stream
from service.endpoints.context import ServiceContext
from service.endpoints.inference import ANOMALY, DECODE, ENCODE, IMPUTE, RECONSTRUCT, InferenceEndpoints, Spec
from service.errors import InvalidCsv, InvalidField, InvalidJson
from service.http.request import HttpResponse, RequestContext

ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"
_HEADER = ATTRIBUTES.lower().encode()
METHOD = "method"
MAX_READ_ROWS = 2**40  # for `islice`, which takes no infinity; more rows than any request has
SPECS: dict[str, Spec] = {
    "anomaly": ANOMALY, "reconstruct": RECONSTRUCT, "encode": ENCODE, "decode": DECODE, "impute": IMPUTE,
}  # fmt: skip


class SageMakerEndpoint:
    """The handler of /invocations.

    Args:
        service: the components of the application.
        inference: the handlers of the other endpoints.
    """

    def __init__(self, service: ServiceContext, inference: InferenceEndpoints) -> None:
        self._service = service
        self._of_rows: dict[str, Callable[[RequestContext, Spec], Awaitable[HttpResponse]]] = {
            "anomaly": inference.anomaly,
            "reconstruct": inference.reconstruct,
            "encode": inference.encode,
            "decode": inference.decode,
            "impute": inference.impute,
        }
        self._others = {"sample": inference.sample, "interpolate": inference.interpolate}

    async def invoke(self, request: RequestContext) -> HttpResponse:
        """Answer a request as the endpoint that the attribute `method` names, by default as /anomaly.

        All other attributes are the query of that endpoint.
        """
        method, query = read_attributes(request.header(_HEADER))
        request.scope = {**request.scope, "query_string": query}
        if method in self._others:
            return await self._others[method](request)
        if method not in self._of_rows:
            known = ", ".join((*self._of_rows, *self._others))
            raise InvalidField(
                f"{ATTRIBUTES} names the method {method[:40]!r}, but the methods are {known}",
                pointer=f"/{METHOD}",
                expected=known,
                got=method[:40],
            )
        if method == "anomaly" and (media_type := anomaly_stream.media_type(request)):
            # One line for each row: batch transform joins the lines of the response with those of the request.
            return anomaly_stream.AnomalyStream(self._service, request, media_type, has_counts=False).response()
        return await self._of_rows[method](request, _spec(method, _has_header(request.header(b"content-type"))))


def read_attributes(text: str) -> tuple[str, bytes]:
    """Return the method in the custom attributes of a request, and its other attributes as a query string.

    Commas separate attributes, as in `method=encode,model=web@2`. A text without `=` is ignored, because SageMaker's
    users also send ids in this header.
    """
    pairs = [part.partition("=")[::2] for part in text.split(",") if "=" in part]
    attributes = [(name.strip(), value.strip()) for name, value in pairs]
    method = next((value for name, value in attributes if name == METHOD), "anomaly")
    return method, urlencode([pair for pair in attributes if pair[0] != METHOD]).encode()


def _has_header(content_type: str) -> bool | None:
    """Return what the parameter `header` of a Content-Type says about a CSV (RFC 4180); None if it is absent."""
    for parameter in content_type.lower().split(";")[1:]:
        name, _, value = parameter.strip().partition("=")
        if name == "header" and media_type_of(content_type) == csv_rows.MEDIA_TYPE:
            return value.strip('" ') == "present"
    return None


@cache
def _spec(method: str, has_header: bool | None) -> Spec:
    """Return the Spec of a method, with readers for CSV without a header and for JSON Lines."""
    spec = SPECS[method]
    field = "records" if method == "anomaly" else spec.array_field or ""
    readers: dict[str, BodyReader] = {csv_rows.MEDIA_TYPE: partial(_read_csv, field, has_header)}
    if field != "records":
        readers |= dict.fromkeys(ndjson.MEDIA_TYPES, partial(_read_lines, field))
    return replace(spec, readers={**spec.readers, **readers})


def _read_csv(field: str, has_header: bool | None, body: bytes, budget: Budget) -> RequestFields:
    """Return the rows of a CSV. Without a header, the values of a row are in the order of the model's features."""
    if csv_rows.has_header(body, budget) if has_header is None else has_header:
        return csv_rows.read_fields(body, budget)
    rows = ndjson.NdjsonRows(partial(csv_rows.read_rows, body, budget))
    if field == "records":
        return RequestFields({field: rows}, may_contain_non_floats=True)
    return _all_rows(field, rows, budget, InvalidCsv)


def _read_lines(field: str, body: bytes, budget: Budget) -> RequestFields:
    """Return the rows of JSON Lines, each of which is a list."""
    return _all_rows(field, ndjson.read_fields(body, budget).values.get("records", ()), budget, InvalidJson)


def _all_rows(field: str, rows: Any, budget: Budget, error: type[InvalidCsv | InvalidJson]) -> RequestFields:
    """Return `rows` as a list, but at most one row more than a request may have. Raise `error` for a faulty row."""
    found = []
    for index, row in enumerate(islice(rows, min(budget.max_rows + 1, MAX_READ_ROWS))):
        if isinstance(row, MalformedRow):
            raise error(row.detail, pointer=f"/{field}/{index}", expected=row.expected, got=row.got)
        found.append(row)
    return RequestFields({field: found}, may_contain_non_floats=True)
