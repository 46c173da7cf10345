"""The paths of the Open Inference Protocol, and the form that errors have on them."""

import re
from functools import lru_cache
from typing import NamedTuple

import orjson

from service.errors import ServiceError

ROOT = "/v2"
INFER = "/v2/models/{name}/infer"
INFER_VERSION = "/v2/models/{name}/versions/{version}/infer"
ERROR_MEDIA_TYPE = "application/json"
MAX_PATH = 1024  # characters; a longer path names no model
_INFER_PATH = re.compile(r"(.*)/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")  # the prefix is a proxy's


def is_protocol_path(path: str) -> bool:
    """Return whether errors on `path` have the form of the protocol."""
    return path == ROOT or path.startswith(ROOT + "/")


class InferPath(NamedTuple):
    """The path of a request for inference: its route after its prefix, and the model and the version in it."""

    route: str
    model: str
    version: str | None


@lru_cache(maxsize=256)
def _parse(path: str) -> InferPath | None:
    match = _INFER_PATH.fullmatch(path)
    if match is None:
        return None
    return InferPath(f"{match[1]}{INFER if match[3] is None else INFER_VERSION}", match[2], match[3])


def parse_infer_path(path: str) -> InferPath | None:
    """Return what the path of a request for inference says; None if `path` is not the path of one."""
    return _parse(path) if len(path) <= MAX_PATH and path.endswith("/infer") else None


def infer_route(path: str) -> str:
    """Return the route of a request for inference, after its prefix; `path` itself if it is no such request."""
    found = parse_infer_path(path)
    return path if found is None else found.route


def model_and_version(path: str) -> tuple[str, str | None]:
    """Return the name and the version of the model in the path of a request for inference."""
    found = _parse(path)
    assert found is not None
    return found.model, found.version


def error_body(error: ServiceError) -> bytes:
    """Return the body of an error: an object with the field `error`, a text."""
    place = f" ({error.pointer})" if error.pointer else ""
    hint = f"; {error.hint}" if error.hint else ""
    return orjson.dumps({"error": f"{error.detail}{place}{hint}"})
