"""The paths of the Open Inference Protocol, and the form that errors have on them."""

import re

import orjson

from service.errors import ServiceError

ROOT = "/v2"
INFER = "/v2/models/{name}/infer"
INFER_VERSION = "/v2/models/{name}/versions/{version}/infer"
ERROR_MEDIA_TYPE = "application/json"
_INFER_PATH = re.compile(r"(.*)/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")  # the prefix is a proxy's


def is_protocol_path(path: str) -> bool:
    """Return whether errors on `path` have the form of the protocol."""
    return path == ROOT or path.startswith(ROOT + "/")


def infer_route(path: str) -> str:
    """Return the route of a request for inference, after its prefix; `path` itself if it is no such request."""
    match = _INFER_PATH.fullmatch(path) if path.endswith("/infer") else None
    if match is None:
        return path
    return f"{match[1]}{INFER if match[3] is None else INFER_VERSION}"


def model_and_version(path: str) -> tuple[str, str | None]:
    """Return the name and the version of the model in the path of a request for inference."""
    match = _INFER_PATH.fullmatch(path)
    assert match is not None
    return match[2], match[3]


def error_body(error: ServiceError) -> bytes:
    """Return the body of an error: an object with the field `error`, a text."""
    place = f" ({error.pointer})" if error.pointer else ""
    hint = f"; {error.hint}" if error.hint else ""
    return orjson.dumps({"error": f"{error.detail}{place}{hint}"})
