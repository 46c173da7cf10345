"""An answer's fields to bytes, in the format that the Accept header prefers."""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from service.codec import npy, png, safetensors
from service.codec.float32 import is_finite
from service.codec.request_body import JSON
from service.errors import NotAcceptable, OverflowInModel

JSON_ONLY = (JSON,)
ARRAY = (JSON, npy.MEDIA_TYPE, safetensors.MEDIA_TYPE)
PICTURE = (*ARRAY, png.MEDIA_TYPE)


@lru_cache(maxsize=256)
def choose(accept: str, offered: tuple[str, ...]) -> str:
    """The media type of `offered` that `accept` gives the highest quality; on a tie the first.

    A more specific range goes before a wildcard (RFC 9110, 12.5.1). Raises NotAcceptable.
    """
    ranges = [_media_range(part) for part in accept.split(",") if part.strip()] or [("*/*", 1.0)]
    qualities = [_quality(media_type, ranges) for media_type in offered]
    best = max(qualities)
    if best <= 0:
        raise NotAcceptable(f"this answer comes as {', '.join(offered)}", expected=", ".join(offered), got=accept[:200])
    return offered[qualities.index(best)]


def _media_range(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    weight = next((parameter[2:] for parameter in parameters if parameter.startswith("q=")), "1")
    try:
        return name, float(weight)
    except ValueError:
        return name, 0.0


def _quality(media_type: str, ranges: list[tuple[str, float]]) -> float:
    for pattern in (media_type, media_type.partition("/")[0] + "/*", "*/*"):
        found = [quality for name, quality in ranges if name == pattern]
        if found:
            return max(found)
    return 0.0


def to_json(fields: dict[str, Any]) -> bytes:
    """`fields` as JSON. Raises OverflowInModel if an array is not finite: JSON has no other numbers."""
    for name, value in fields.items():
        if type(value) is np.ndarray:
            require_finite(name, value)
    return orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)


def arrays(fields: dict[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
    """Those of `fields` that are arrays."""
    return {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}


def require_finite(name: str, array: npt.NDArray[np.float32], holes: bool = False) -> None:
    """Raise OverflowInModel if `array` [N, ...] holds a value that is not finite; with `holes`, NaN may be there."""
    if is_finite(array) or (holes and not np.isinf(array).any()):
        return
    row = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])
    raise OverflowInModel(
        f"the {name} of row {row} are not finite: the values asked for lie too far from the training data",
        expected="values whose answer fits float32",
        hint="GET /models/{name} lists each feature's usual range",
    )
