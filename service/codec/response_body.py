"""Choose the format of a response by the Accept header, and write its fields as JSON."""

import re
from collections.abc import Iterator
from functools import lru_cache
from types import GeneratorType
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from service.codec import ndjson, png
from service.codec.float32 import is_finite
from service.codec.long_work import LargeContent, pause_if_due
from service.codec.request_body import ARRAY_MEDIA_TYPES, JSON, media_type_of
from service.errors import NotAcceptable, OverflowInModel

# The formats that endpoints offer. The default is first.
JSON_ONLY = (JSON,)
JSON_FORMATS: tuple[str, ...] = (JSON,)
ARRAY_FORMATS: tuple[str, ...] = (JSON, *ARRAY_MEDIA_TYPES)
IMAGE_FORMATS: tuple[str, ...] = (*ARRAY_FORMATS, png.MEDIA_TYPE)


PIECE_NUMBERS = 2**12  # numbers of a response that are written at once, while the interpreter lock is held
_PIECE_ELEMENTS = 256  # elements of a list that are written at once
_PART = re.compile(r'(?:[^,"]|"(?:\\.|[^"\\])*"?)+')  # one element of a list; commas in quotation marks do not end it
_QUALITY = re.compile(r"\d+(?:\.\d*)?|\.\d+", re.ASCII)


@lru_cache(maxsize=256)
def negotiate_media_type(accept: str, offered: tuple[str, ...]) -> str:
    """Return the media type in `offered` to which the Accept header gives the highest quality.

    If several have the highest quality, return the first of them. A specific media range takes precedence over a
    wildcard (RFC 9110, 12.5.1). Raises NotAcceptable.
    """
    ranges = _media_ranges(accept)
    qualities = [_quality(media_type, ranges) for media_type in offered]
    best = max(qualities)
    if best <= 0:
        available = ", ".join(offered)
        raise NotAcceptable(
            f"the response is available as {available}, but the Accept header allows none of them",
            expected=available,
            got=accept[:200],
        )
    return offered[qualities.index(best)]


@lru_cache(maxsize=256)
def stream_media_type(content_type: str, accept: str) -> str | None:
    """Return the media type of a streamed response, or None if the response is not streamed.

    The response is streamed if the body is NDJSON, and if the Accept header names NDJSON and gives no higher quality to
    any other format. A wildcard does not name NDJSON.
    """
    if media_type_of(content_type) not in ndjson.MEDIA_TYPES:
        return None
    ranges = _media_ranges(accept)
    named = {name: quality for name, quality in ranges if name in ndjson.MEDIA_TYPES}
    best = max(named, key=lambda name: named[name], default=None)
    if best is None or named[best] <= 0:
        return None
    is_preferred = named[best] >= max(_quality(media_type, ranges) for media_type in ARRAY_FORMATS)
    return best if is_preferred else None


def _media_ranges(accept: str) -> list[tuple[str, float]]:
    """Return the media ranges of an Accept header with their qualities. An empty header accepts everything."""
    return [_media_range(part) for part in _PART.findall(accept) if part.strip()] or [("*/*", 1.0)]


def _media_range(part: str) -> tuple[str, float]:
    """Return the media range and the quality in one part of an Accept header.

    A quality above 1 counts as 1, and a quality that is not a number counts as 0.
    """
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    weight = next((parameter[2:] for parameter in parameters if parameter.startswith("q=")), "1")
    return name, min(float(weight), 1.0) if _QUALITY.fullmatch(weight) else 0.0


def _quality(media_type: str, ranges: list[tuple[str, float]]) -> float:
    for pattern in (media_type, media_type.partition("/")[0] + "/*", "*/*"):
        qualities = [quality for name, quality in ranges if name == pattern]
        if qualities:
            return max(qualities)
    return 0.0


def to_json(fields: dict[str, Any]) -> bytes | memoryview:
    """Return `fields` as JSON. A field may be a generator of lists, which are written as one list.

    Raises OverflowInModel if an array is not finite: JSON has neither NaN nor infinity.
    """
    is_large = False
    for name, value in fields.items():
        if type(value) is np.ndarray:
            require_finite(name, value)
            is_large = is_large or value.size > PIECE_NUMBERS
        elif (type(value) is list and len(value) > _PIECE_ELEMENTS) or type(value) is GeneratorType:
            is_large = True
    return _write_in_pieces(fields) if is_large else orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)


def _write_in_pieces(fields: dict[str, Any]) -> bytes | memoryview:
    """Return `fields` as JSON. Large arrays and long lists are written in pieces.

    orjson holds Python's interpreter lock, and so does copying bytes. Writing a large array at once would stop every
    other thread meanwhile, and so would joining large pieces.
    """
    written = LargeContent()
    before = b"{"
    for name, value in fields.items():
        written.write(before + orjson.dumps(name) + b":")
        before = b","
        if type(value) is np.ndarray and value.size > PIECE_NUMBERS:
            write_array(value, written)
        elif type(value) in (list, GeneratorType):
            _write_list(value, written)
        else:
            written.write(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))
    written.write(b"}")
    return written.view()


def write_array(array: npt.NDArray[Any], written: LargeContent) -> None:
    """Write `array` [N, ...] as JSON in pieces of at most PIECE_NUMBERS numbers, but at least one row."""
    rows = max(1, PIECE_NUMBERS * len(array) // array.size)
    before = b"["
    for start in range(0, len(array), rows):
        piece = orjson.dumps(array[start : start + rows], option=orjson.OPT_SERIALIZE_NUMPY)
        if not start:
            written.reserve(int(1.05 * len(piece) * len(array) / rows))
        written.write(before)
        written.write(memoryview(piece)[1:-1])
        before = b","
        pause_if_due()
    written.write(b"]")


def _write_list(lists: list[Any] | Iterator[list[Any]], written: LargeContent) -> None:
    """Write a list as JSON in pieces. The lists of a generator are written as one list; any of them may be empty."""
    pieces = _pieces(lists) if isinstance(lists, list) else lists
    before = b"["
    for piece in pieces:
        if piece:
            text = orjson.dumps(piece, option=orjson.OPT_SERIALIZE_NUMPY)
            written.write(before + text[1:-1])
            before = b","
        pause_if_due()
    written.write(b"[]" if before == b"[" else b"]")


def _pieces(elements: list[Any]) -> Iterator[list[Any]]:
    return (elements[start : start + _PIECE_ELEMENTS] for start in range(0, len(elements), _PIECE_ELEMENTS))


def array_fields(fields: dict[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
    """Return the fields whose values are arrays."""
    return {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}


def require_finite(name: str, array: npt.NDArray[np.float32], allow_nan: bool = False) -> None:
    """Raise OverflowInModel if `array` [N, ...] contains infinity. Raise it also for NaN, unless `allow_nan` is set."""
    if is_finite(array) or (allow_nan and not np.isinf(array).any()):
        return
    row = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])
    raise OverflowInModel(
        f"the {name} of row {row} overflow float32: the values sent are too far from the training data",
        expected="values for which the model's output fits float32",
        hint="GET /models/{name} lists the range of each feature in the training data",
    )
