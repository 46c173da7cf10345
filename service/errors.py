"""The HTTP errors: each has a status, a stable code and a title, and is answered as application/problem+json.

ElboError (models.errors)
└── ServiceError
    ├── NotFound, ModelNotFound             404
    ├── MethodNotAllowed                    405
    ├── NotAcceptable                       406
    ├── BodyTooSlow                         408
    ├── BodyTooLarge, TooManyRows           413
    ├── UnsupportedMediaType                415
    ├── InvalidJson, InvalidNpy, InvalidSafetensors, InvalidCsv,
    │   InvalidEncoding, InvalidProtobuf, InvalidField, InvalidRows, OverflowInModel   422
    ├── Overloaded                          429
    ├── ClientGone                          499, seen in the log and the metrics only
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
    """A request that gets no answer, and why.

    Args:
        detail: one sentence for the caller.
        pointer: JSON pointer (RFC 6901) to the value at fault.
        expected, got: what should have stood there, and what did.
        hint: what to do.
        headers: to send with the answer.
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
        """The body of the answer (RFC 9457)."""
        told = {"pointer": self.pointer, "expected": self.expected, "got": self.got, "hint": self.hint}
        return {
            "type": f"urn:elbo:problem:{self.code}",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "request_id": request_id,
            **{key: value for key, value in told.items() if value is not None},
        }


class NotFound(ServiceError):
    """Nothing is served at this path."""

    status, code, title = 404, "not_found", "No such path"


class ModelNotFound(ServiceError):
    """No such model or version is served; the detail lists those that are."""

    status, code, title = 404, "model_not_found", "No such model"


class MethodNotAllowed(ServiceError):
    """The path exists, but not for this method; the Allow header says for which."""

    status, code, title = 405, "method_not_allowed", "Method not allowed"


class NotAcceptable(ServiceError):
    """The Accept header admits no format that this answer has for this model."""

    status, code, title = 406, "not_acceptable", "No acceptable format"


class BodyTooSlow(ServiceError):
    """The body did not arrive in the time that ELBO_REQUEST_TIMEOUT allows."""

    status, code, title = 408, "body_too_slow", "Body too slow"


class BodyTooLarge(ServiceError):
    """The body is larger than ELBO_MAX_BODY_BYTES."""

    status, code, title = 413, "body_too_large", "Body too large"


class TooManyRows(ServiceError):
    """The request holds or asks for more rows than ELBO_MAX_ROWS."""

    status, code, title = 413, "too_many_rows", "Too many rows"


class UnsupportedMediaType(ServiceError):
    """The body is of a type that the path does not read: application/json and application/x-npy are for most."""

    status, code, title = 415, "unsupported_media_type", "Unsupported media type"


class InvalidJson(ServiceError):
    """The body is no JSON object, or has a key twice."""

    status, code, title = 422, "invalid_json", "Invalid JSON"


class InvalidNpy(ServiceError):
    """The body is no .npy file of real numbers, or is cut off."""

    status, code, title = 422, "invalid_npy", "Invalid npy"


class InvalidSafetensors(ServiceError):
    """The body is no safetensors file of one tensor of real numbers with the right name, or is cut off."""

    status, code, title = 422, "invalid_safetensors", "Invalid safetensors"


class InvalidCsv(ServiceError):
    """The body is no CSV with a header that names the columns."""

    status, code, title = 422, "invalid_csv", "Invalid CSV"


class InvalidEncoding(ServiceError):
    """The body is not compressed as its Content-Encoding says, or cut off."""

    status, code, title = 422, "invalid_encoding", "Invalid encoding"


class InvalidProtobuf(ServiceError):
    """The body is not the protobuf message that the path reads."""

    status, code, title = 422, "invalid_protobuf", "Invalid protobuf"


class InvalidField(ServiceError):
    """A field of the body or of the query is missing, unknown or out of its bounds."""

    status, code, title = 422, "invalid_field", "Invalid field"


class InvalidRows(ServiceError):
    """Rows, latents or records are not of the model's shape, or hold something that is no finite number."""

    status, code, title = 422, "invalid_rows", "Invalid rows"


class OverflowInModel(ServiceError):
    """The numbers are finite, but so extreme that the model's answer is not: it overflows float32."""

    status, code, title = 422, "overflow_in_model", "Values too extreme for the model"


class Overloaded(ServiceError):
    """The queue is full; the Retry-After header says when to try again."""

    status, code, title = 429, "overloaded", "Overloaded"


class ClientGone(ServiceError):
    """The client left before its answer was ready. Nobody reads this answer; the log and the metrics count it."""

    status, code, title = 499, "client_gone", "Client closed the connection"


class InternalError(ServiceError):
    """Elbo's fault. The log has the details under the request id."""


class NotReady(ServiceError):
    """No model is served yet, or the server is shutting down."""

    status, code, title = 503, "not_ready", "Not ready"


class DeadlineExceeded(ServiceError):
    """The answer was not ready in the time that the X-Request-Timeout header or ELBO_REQUEST_TIMEOUT allows."""

    status, code, title = 504, "deadline_exceeded", "Deadline exceeded"


ERRORS: tuple[type[ServiceError], ...] = (
    NotFound,
    ModelNotFound,
    MethodNotAllowed,
    NotAcceptable,
    BodyTooSlow,
    BodyTooLarge,
    TooManyRows,
    UnsupportedMediaType,
    InvalidJson,
    InvalidNpy,
    InvalidSafetensors,
    InvalidCsv,
    InvalidEncoding,
    InvalidProtobuf,
    InvalidField,
    InvalidRows,
    OverflowInModel,
    Overloaded,
    ClientGone,
    InternalError,
    NotReady,
    DeadlineExceeded,
)


def from_http_exception(error: HTTPException, method: str, path: str, allowed: Sequence[str]) -> ServiceError:
    """The router's own refusals (404, 405), in our words; `allowed` are the methods that `path` takes."""
    if error.status_code == 404:
        return NotFound(f"nothing is served at {path}", hint="GET /docs shows every path")
    if error.status_code == 405:
        allow = ", ".join(allowed)
        return MethodNotAllowed(
            f"{path} takes {allow}, not {method}", expected=allow, got=method, headers={"Allow": allow}
        )
    return InternalError("the server failed; its log has the details under this request id")


def escape(key: str) -> str:
    """One reference token of a JSON pointer."""
    return key.replace("~", "~0").replace("/", "~1")
