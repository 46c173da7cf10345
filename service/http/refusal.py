"""Refuse a request as soon as its head has arrived.

The response is written to the connection without an ASGI task, at a fraction of the cost of a normal response.
"""

from collections.abc import Mapping
from functools import lru_cache

import orjson
from starlette.types import Scope

from service.access.control import AccessControl, GrantedKey
from service.access.scopes import scope_of
from service.errors import PROBLEM_JSON, BadRequest, Forbidden, Overloaded, Unauthorized
from service.http import open_inference
from service.http.admission import Refusal
from service.http.platform_routes import NO_PLATFORM, PlatformRoutes
from service.http.repeated_refusals import DelayedAnswers, RefusedHead, RefusedHeads
from service.http.request import Header, new_record, new_request_id
from service.monitoring.logs import AccessLog
from service.monitoring.metrics import Metrics
from service.monitoring.request_record import RequestRecord

_HEAD = b"HTTP/1.1 429 Too Many Requests\r\ncontent-type: %b\r\nretry-after: %d\r\n"
_RESPONSE = b"%b%bx-request-id: %b\r\ncontent-length: %d\r\n\r\n%b%b%b"


class HeadRefusal:
    """Writes 429 responses, and counts and logs the refused requests.

    Args:
        metrics: counts the requests.
        access: logs the requests.
        root_path: path under which a proxy publishes the server; empty for none.
        keys: the API keys of the server; None if requests need no key.
        platform: the paths of the cloud platform that runs the server.

    Attributes:
        heads: the heads of requests that were refused.
        delayed: counts the answers that are delayed.
    """

    def __init__(
        self,
        metrics: Metrics,
        access: AccessLog,
        root_path: str = "",
        keys: AccessControl | None = None,
        platform: PlatformRoutes = NO_PLATFORM,
    ) -> None:
        self._platform = platform
        self._metrics = metrics
        self._access = access
        self._root_path = root_path
        self._keys = keys
        self._default_headers: list[Header] | None = None
        self._default_lines = b""  # these headers as they are sent
        self.heads = RefusedHeads()
        self.delayed = DelayedAnswers()

    def response(self, scope: Scope, refusal: Refusal, default_headers: list[Header]) -> bytes | None:
        """Return the whole response, or None if the request lacks an API key with the scope that it needs.

        If this returns None, `RequestMiddleware` refuses the request because of its key, so that only clients with a
        key learn how busy the server is.

        Args:
            scope: the ASGI scope, with method, path and headers.
            refusal: why the request is refused.
            default_headers: headers that the server adds to every response.
        """
        headers_by_name = dict(reversed(scope["headers"]))
        record = new_record(scope, headers_by_name)
        path = scope["path"].removeprefix(self._root_path)
        record.endpoint = open_inference.infer_route(path)
        if self._keys:
            try:
                key = self._find_key(self._keys, path, headers_by_name)
            except (BadRequest, Unauthorized, Forbidden):
                return None
            record.key = key.name
        return self._answer(record, path, refusal, default_headers)

    def repeat(
        self, head: RefusedHead, client: tuple[str, int] | None, refusal: Refusal, default_headers: list[Header]
    ) -> bytes | None:
        """Return the whole response to another request with a head that was refused before.

        Return None if the API key in the head is not in use any more.

        Args:
            head: the head of the request.
            client: address and port of the client.
            refusal: why the request is refused.
            default_headers: headers that the server adds to every response.
        """
        if head.key and self._keys and self._keys.current(head.key) is not head.key:
            return None
        record = RequestRecord(new_request_id(), "POST", head.path, client[0] if client else None)
        if head.key:
            record.key = head.key.name
        record.endpoint = open_inference.infer_route(head.endpoint)
        return self._answer(record, head.endpoint, refusal, default_headers)

    def remember(self, data: bytes, path: str, headers: list[Header]) -> None:
        """Remember the head of a request that was refused, with its API key. See `RefusedHeads.remember`."""
        endpoint = path.removeprefix(self._root_path)
        key = self._find_key(self._keys, endpoint, dict(reversed(headers))) if self._keys else None
        self.heads.remember(data, path, endpoint, headers, key)

    def _find_key(self, keys: AccessControl, path: str, headers: Mapping[bytes, bytes]) -> GrantedKey:
        """Return the API key of a request. Raises an error if it does not permit the request."""
        key = keys.find(headers)
        key.require(scope_of(self._platform.known_path(path)))
        return key

    def _answer(self, record: RequestRecord, path: str, refusal: Refusal, default_headers: list[Header]) -> bytes:
        """Count and log a refused request, and return the whole response. `path` is without the root path."""
        record.status = Overloaded.status
        record.problem = Overloaded.code
        if open_inference.is_protocol_path(path) or self._platform.has_text_error(path):
            head, body_start, body_end = _protocol_template(refusal)
            request_id = b""
        else:
            head, body_start, body_end = _template(refusal)
            request_id = orjson.dumps(record.request_id)
        length = len(body_start) + len(request_id) + len(body_end)
        if default_headers is not self._default_headers:  # uvicorn makes a new list once per second
            self._default_headers = default_headers
            self._default_lines = b"".join([b"%b: %b\r\n" % header for header in default_headers])
        record.total = record.elapsed
        self._metrics.count(record)
        self._access.log(record)
        start = head, self._default_lines, record.request_id.encode(), length
        return _RESPONSE % (*start, body_start, request_id, body_end)


@lru_cache(maxsize=256)
def _template(refusal: Refusal) -> tuple[bytes, bytes, bytes]:
    """Return the head of the response, the body up to the request id, and the body after the request id."""
    body_start, body_end = orjson.dumps(refusal.error().problem("<id>")).split(b'"<id>"')
    return _HEAD % (PROBLEM_JSON.encode(), refusal.retry_after), body_start, body_end


@lru_cache(maxsize=256)
def _protocol_template(refusal: Refusal) -> tuple[bytes, bytes, bytes]:
    """Return the same for a request of the Open Inference Protocol, whose errors have no request id."""
    head = _HEAD % (open_inference.ERROR_MEDIA_TYPE.encode(), refusal.retry_after)
    return head, open_inference.error_body(refusal.error()), b""
