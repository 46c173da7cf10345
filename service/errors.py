"""The error responses of the service, in application/problem+json. Each error has a status, a code and a title.

ElboError (models.errors)
└── ServiceError
    ├── BadRequest                          400
    ├── Unauthorized                        401
    ├── Forbidden                           403
    ├── NotFound, ModelNotFound, NotShown, NotRemembered   404
    ├── MethodNotAllowed                    405
    ├── NotAcceptable                       406
    ├── BodyTooSlow                         408
    ├── NotSupported, NoOnlineCalibration, TooFewPeers   409
    ├── BodyTooLarge, TooManyRows           413
    ├── UnsupportedMediaType                415
    ├── InvalidJson, InvalidNpy, InvalidSafetensors, InvalidPicture, InvalidCsv,
    │   InvalidEncoding, InvalidProtobuf, InvalidField, InvalidRows, OverflowInModel   422
    ├── Overloaded, RateLimited             429
    ├── ClientGone                          499, only in logs and metrics
    ├── InternalError                       500
    ├── NotReady                            503
    └── DeadlineExceeded                    504
"""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

from models.errors import ElboError

PROBLEM_JSON = "application/problem+json"


class ServiceError(ElboError):
    """Base class of the errors with which a request can fail.

    Args:
        detail: what happened, in one sentence.
        pointer: JSON pointer (RFC 6901) to the invalid value.
        expected: what would have been valid.
        got: what the request had instead.
        hint: what the client can do.
        headers: additional headers of the response.
    """

    status = 500
    code = "internal_error"
    title = "Internal error"

    def __init__(
        self,
        detail: str,
        *,
        pointer: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        hint: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.pointer = pointer
        self.expected = expected
        self.got = got
        self.hint = hint
        self.headers = dict(headers or {})

    def problem(self, request_id: str) -> dict[str, Any]:
        """Return the body of the response (RFC 9457)."""
        optional = {"pointer": self.pointer, "expected": self.expected, "got": self.got, "hint": self.hint}
        return {
            "type": f"urn:elbo:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "request_id": request_id,
            **{key: value for key, value in optional.items() if value is not None},
        }


class BadRequest(ServiceError):
    """The request does not have exactly one Host header, or its body has a transfer encoding other than chunked."""

    status, code, title = 400, "bad_request", "Bad request"


class Unauthorized(ServiceError):
    """The request has no valid API key, and the server requires one (ELBO_API_KEYS_FILE)."""

    status, code, title = 401, "unauthorized", "API key required"


class Forbidden(ServiceError):
    """The API key does not have the scope that the request needs."""

    status, code, title = 403, "forbidden", "Not allowed with this API key"


class NotFound(ServiceError):
    """The path does not exist."""

    status, code, title = 404, "not_found", "No such path"


class ModelNotFound(ServiceError):
    """The model or the version is not served; `expected` lists what is served."""

    status, code, title = 404, "model_not_found", "No such model"


class NotShown(ServiceError):
    """The exhibit is not in the artifact: the model was trained with --private, or by an earlier version of Elbo."""

    status, code, title = 404, "not_shown", "Not in the artifact"


class NotRemembered(ServiceError):
    """Feedback refers to a group, or to rows of a group, that the server does not remember."""

    status, code, title = 404, "not_remembered", "Not remembered"


class MethodNotAllowed(ServiceError):
    """The path does not support this method; the Allow header lists the methods that it supports."""

    status, code, title = 405, "method_not_allowed", "Method not allowed"


class NotAcceptable(ServiceError):
    """The Accept header allows none of the response formats that this endpoint supports for this model."""

    status, code, title = 406, "not_acceptable", "No acceptable format"


class BodyTooSlow(ServiceError):
    """The body did not arrive within ELBO_REQUEST_TIMEOUT."""

    status, code, title = 408, "body_too_slow", "Body too slow"


class NotSupported(ServiceError):
    """The model cannot do what the request asks for."""

    status, code, title = 409, "not_supported", "Not supported"


class NoOnlineCalibration(ServiceError):
    """The request needs the online calibrations of groups, and the model or the server has none."""

    status, code, title = 409, "no_online_calibration", "No online calibration"


class TooFewPeers(ServiceError):
    """Too few groups have a row of about the same time, so that no group can be compared with its peers."""

    status, code, title = 409, "too_few_peers", "Too few peers"


class BodyTooLarge(ServiceError):
    """The body is larger than ELBO_MAX_BODY_BYTES."""

    status, code, title = 413, "body_too_large", "Body too large"


class TooManyRows(ServiceError):
    """The request has more rows than ELBO_MAX_ROWS."""

    status, code, title = 413, "too_many_rows", "Too many rows"


class UnsupportedMediaType(ServiceError):
    """The endpoint does not read bodies with this Content-Type; `expected` lists the types that it reads."""

    status, code, title = 415, "unsupported_media_type", "Unsupported media type"


class InvalidJson(ServiceError):
    """The body is not a JSON object, or an object in it has a duplicate key."""

    status, code, title = 422, "invalid_json", "Invalid JSON"


class InvalidNpy(ServiceError):
    """The body is not an npy file of real numbers, or the file is truncated."""

    status, code, title = 422, "invalid_npy", "Invalid npy"


class InvalidSafetensors(ServiceError):
    """The body is not a safetensors file with one real-valued tensor of the right name, or the file is truncated."""

    status, code, title = 422, "invalid_safetensors", "Invalid safetensors"


class InvalidPicture(ServiceError):
    """The body is not a PNG or JPEG picture as its Content-Type states, is damaged, or has too many pixels."""

    status, code, title = 422, "invalid_picture", "Invalid picture"


class InvalidCsv(ServiceError):
    """The body is not CSV with a header line that names the columns."""

    status, code, title = 422, "invalid_csv", "Invalid CSV"


class InvalidEncoding(ServiceError):
    """The body is not compressed as the Content-Encoding header states, or the body is truncated."""

    status, code, title = 422, "invalid_encoding", "Invalid encoding"


class InvalidProtobuf(ServiceError):
    """The body is not the protobuf message that this endpoint reads."""

    status, code, title = 422, "invalid_protobuf", "Invalid protobuf"


class InvalidField(ServiceError):
    """A field of the body or the query is missing, unknown, given twice or out of bounds."""

    status, code, title = 422, "invalid_field", "Invalid field"


class InvalidRows(ServiceError):
    """Rows, latents or records do not have the model's shape, or hold a value that is not a finite number."""

    status, code, title = 422, "invalid_rows", "Invalid rows"
    # Whether the row is readable, but lacks too many features although they may be imputed, or has several numbers for
    # one feature.
    is_partial = False

    @property
    def text_length(self) -> int:
        """The number of characters in the texts of the error, from which its memory is estimated."""
        return sum(len(text) for text in (self.detail, self.pointer, self.expected, self.got, self.hint) if text)

    def without_frames(self) -> "InvalidRows":
        """Return this error without the traceback that it carries: its frames would keep the row in memory."""
        self.__context__ = self.__cause__ = None
        return self.with_traceback(None)


class OverflowInModel(ServiceError):
    """The input values are finite but so extreme that the model's output overflows float32."""

    status, code, title = 422, "overflow_in_model", "Values too extreme for the model"


class Overloaded(ServiceError):
    """The server has no capacity for the request now; the Retry-After header says when to try again."""

    status, code, title = 429, "overloaded", "Overloaded"


class RateLimited(ServiceError):
    """The API key has reached one of its limits; the Retry-After header says when to try again."""

    status, code, title = 429, "rate_limited", "Limit of the API key reached"


class ClientGone(ServiceError):
    """The client disconnected before the response was ready; the access log and the metrics record this status."""

    status, code, title = 499, "client_gone", "Client closed the connection"


class InternalError(ServiceError):
    """An error in the server; its log has the details under the request id."""


class NotReady(ServiceError):
    """No model is served yet, or the server is shutting down."""

    status, code, title = 503, "not_ready", "Not ready"


class DeadlineExceeded(ServiceError):
    """The response was not ready within the time limit: the X-Request-Timeout header, or else ELBO_REQUEST_TIMEOUT."""

    status, code, title = 504, "deadline_exceeded", "Deadline exceeded"


ERRORS: tuple[type[ServiceError], ...] = tuple(ServiceError.__subclasses__())  # in the order of this file


def from_http_exception(error: HTTPException, method: str, path: str, allowed: Sequence[str]) -> ServiceError:
    """Return the router's 404 or 405 as a ServiceError; `allowed` lists the methods that `path` supports."""
    if error.status_code == 404:
        return NotFound(f"the path {path} does not exist", hint="GET /docs lists all paths")
    if error.status_code == 405:
        allow = ", ".join(allowed)
        return MethodNotAllowed(
            f"{path} supports {allow}, got {method}", expected=allow, got=method, headers={"Allow": allow}
        )
    return InternalError("an error occurred in the server; its log has the details under this request id")


def escape(key: str) -> str:
    """Return `key` as one reference token of a JSON pointer (RFC 6901)."""
    return key.replace("~", "~0").replace("/", "~1")
