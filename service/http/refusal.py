"""Refuse a request from its head alone.

The response is written to the connection without an ASGI task, at a fraction of the cost of an answer.
"""

import orjson
from starlette.types import Scope

from service.errors import PROBLEM_JSON, Overloaded
from service.http.request import Header, record_of
from service.monitoring.logs import AccessLog
from service.monitoring.metrics import Metrics

_HEAD = (
    b"HTTP/1.1 429 Too Many Requests\r\n"
    b"content-type: " + PROBLEM_JSON.encode() + b"\r\n"
    b"retry-after: %b\r\n"
    b"x-request-id: %b\r\n"
    b"content-length: %d\r\n"
)


class HeadRefusal:
    """Writes 429 responses, and counts and logs the refused requests."""

    def __init__(self, metrics: Metrics, access: AccessLog) -> None:
        self._metrics = metrics
        self._access = access

    def response(self, scope: Scope, error: Overloaded, default_headers: list[Header]) -> bytes:
        """Return the whole response.

        Args:
            scope: of ASGI, with method, path and headers.
            error: why the request is refused.
            default_headers: headers that the server adds to every response.
        """
        record = record_of(scope, dict(reversed(scope["headers"])))
        record.endpoint = scope["path"]
        record.status = error.status
        record.problem = error.code
        body = orjson.dumps(error.problem(record.request_id))
        head = _HEAD % (error.headers["Retry-After"].encode(), record.request_id.encode(), len(body))
        lines = [b"%b: %b\r\n" % header for header in default_headers]
        record.total = record.elapsed
        self._metrics.count(record)
        self._access.log(record)
        return b"".join([head, *lines, b"\r\n", body])
