"""The exceptions of the client.

ElboClientError
├── ConnectionFailed      there is no complete response: the server cannot be reached, or the connection broke
├── TimedOut              there is no response within the timeout
│   ├── ConnectTimedOut   the connection could not be opened in time (also a ConnectionFailed)
│   └── ServerTimedOut    408, 504: the server gave up (also an ElboHTTPError)
├── InvalidReply          the response does not have the form of Elbo's responses
└── ElboHTTPError         the server refused the request
    ├── BadRequest        400, 405, 406, 413, 415, 422, and any other status below 500
    ├── NotAuthorised     401, 403
    ├── NotFound          404
    ├── NotSupported      409
    ├── TooManyRequests   429
    └── ServerError       5xx
        └── NotReady      503
"""

from collections.abc import Mapping
from typing import Any

import orjson


class ElboClientError(Exception):
    """Base of the exceptions that the client raises for failed requests. `str(error)` is one line that says why."""


class ConnectionFailed(ElboClientError):
    """There is no complete response: the server cannot be reached, or the connection broke.

    `sent` says whether the server may have received a part of the request.
    """

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class TimedOut(ElboClientError):
    """There is no response within the timeout.

    `sent` says whether the server may have received a part of the request.
    """

    def __init__(self, message: str, *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


class ConnectTimedOut(ConnectionFailed, TimedOut):
    """The connection could not be opened in time. Nothing was sent, so it is safe to repeat the request."""

    def __init__(self, message: str) -> None:
        super().__init__(message, sent=False)


class InvalidReply(ElboClientError):
    """The response does not have the form of Elbo's responses. Perhaps a login page or another server sent it."""


class ElboHTTPError(ElboClientError):
    """The server refused the request.

    Args:
        status: the HTTP status.
        code: the stable identifier of the problem, such as "invalid_rows"; docs/reference/errors.md lists them.
        message: what happened, in one sentence.
        request_id: the identifier of the request in the server's log.
        pointer: JSON pointer to the invalid value, such as "/inputs/3/17".
        expected: what would have been valid.
        got: what the request had instead.
        hint: what to do, as the server says.
        retry_after: seconds after which the server expects to accept the request; None if it does not say.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        request_id: str = "",
        pointer: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        hint: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.status = status
        self.code = code
        self.message = message
        self.request_id = request_id
        self.pointer = pointer
        self.expected = expected
        self.got = got
        self.hint = hint
        self.retry_after = retry_after
        parts = [
            f"{message} ({status} {code})",
            f"at {pointer}" if pointer else "",
            f"expected {expected}, got {got}" if expected and got and expected not in message else "",
            hint or self.advice(),
            f"request id {request_id}" if request_id else "",
        ]
        super().__init__("; ".join(part for part in parts if part))

    def advice(self) -> str:
        """Return what to do if the server gives no hint."""
        return ""


class BadRequest(ElboHTTPError):
    """The request is not valid: its rows, a field, its format or its size (400, 405, 406, 413, 415, 422).

    Redirects and all other statuses below 500 raise this exception, too.
    """


class NotAuthorised(ElboHTTPError):
    """The key is missing, unknown, or lacks the scope that the request needs (401, 403)."""

    def advice(self) -> str:
        """Return what to do if the server gives no hint."""
        return "pass key=... to the client; elbo key add makes a key"


class NotFound(ElboHTTPError):
    """There is no such model, version, exhibit or path (404)."""

    def advice(self) -> str:
        """Return what to do if the server gives no hint."""
        return "models() lists what is served"


class NotSupported(ElboHTTPError):
    """The model cannot do what the request asks for (409)."""


class TooManyRequests(ElboHTTPError):
    """The server or a limit of the key has no room for the request now (429)."""

    def advice(self) -> str:
        """Return what to do if the server gives no hint."""
        wait = f" after {self.retry_after:g} s" if self.retry_after is not None else " later"
        return f"send the request again{wait}, with fewer requests at a time"


class ServerError(ElboHTTPError):
    """The server, or a proxy before it, failed (5xx). The server's log has the details under the request id."""


class NotReady(ServerError):
    """The server serves no model yet, or it is shutting down (503)."""


class ServerTimedOut(ElboHTTPError, TimedOut):
    """The server gave up: it did not finish within the timeout, or the body arrived too slowly (408, 504)."""

    def advice(self) -> str:
        """Return what to do if the server gives no hint."""
        return "send fewer rows per request, or raise timeout="


_BY_STATUS: dict[int, type[ElboHTTPError]] = {
    401: NotAuthorised,
    403: NotAuthorised,
    404: NotFound,
    408: ServerTimedOut,
    409: NotSupported,
    429: TooManyRequests,
    503: NotReady,
    504: ServerTimedOut,
}


def class_for(status: int) -> type[ElboHTTPError]:
    """Return the class of the exception for an HTTP status that is not 200."""
    return _BY_STATUS.get(status, BadRequest if status < 500 else ServerError)


def from_problem(problem: Mapping[str, Any], retry_after: float | None = None) -> ElboHTTPError:
    """Return the exception for `problem`, the problem details (RFC 9457) of a response or of a line of a stream."""
    status = int(problem.get("status", 500))
    optional = {name: problem.get(name) for name in ("pointer", "expected", "got", "hint")}
    return class_for(status)(
        status,
        str(problem.get("code", "unknown")),
        str(problem.get("detail", problem.get("title", "the server gave no reason"))),
        request_id=str(problem.get("request_id", "")),
        retry_after=retry_after,
        **optional,
    )


def from_response(
    status: int, content: bytes, request_id: str, retry_after: float | None, reason: str
) -> ElboHTTPError:
    """Return the exception for a response with an HTTP status that is not 200.

    The exception for a response that another program sent, such as a proxy, has the code "unknown".
    """
    try:
        problem = orjson.loads(content)
    except orjson.JSONDecodeError:
        problem = None
    if isinstance(problem, dict) and "code" in problem:
        return from_problem({"request_id": request_id, **problem, "status": status}, retry_after)
    message = f"a server or proxy that is not Elbo responded: {reason}"
    return class_for(status)(status, "unknown", message, request_id=request_id, retry_after=retry_after)
