"""A request's bytes to its fields: JSON, npy or safetensors, whichever its Content-Type says."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from service.codec import npy, safetensors, simdjson_rows
from service.codec.rows import describe
from service.errors import InvalidJson, UnsupportedMediaType

JSON = "application/json"


class Fields(NamedTuple):
    """What a body says. `careful`: whether booleans, NaN or infinity may stand where numbers belong."""

    values: dict[str, Any]
    careful: bool = False


NO_FORMATS: Mapping[str, Callable[[bytes], Fields]] = {}


@lru_cache(maxsize=256)
def media_type_of(content_type: str) -> str:
    """The media type that a Content-Type header names, without its parameters."""
    return content_type.partition(";")[0].strip().lower()


@lru_cache(maxsize=256)
def is_array(content_type: str) -> bool:
    """Whether a body of this type is the bytes of arrays."""
    return media_type_of(content_type) in (npy.MEDIA_TYPE, safetensors.MEDIA_TYPE)


def read_fields(
    content_type: str,
    body: bytes,
    main: str | None,
    width: int = 0,
    formats: Mapping[str, Callable[[bytes], Fields]] = NO_FORMATS,
) -> Fields:
    """The fields of `body`; the array of a binary body is the field `main`. An empty body has none.

    JSON rows of `width` numbers in the field `main` are read as an array. `formats` are readers by media type, beside
    JSON and npy.

    Raises UnsupportedMediaType, InvalidJson, InvalidNpy, InvalidSafetensors, and what `formats` raise.
    """
    media_type = media_type_of(content_type)
    if not body:
        return Fields({})
    if media_type in ("", JSON) or media_type.endswith("+json"):
        fields = simdjson_rows.read(body, main, width) if main else None
        return _json_fields(body) if fields is None else Fields(fields)
    if media_type == npy.MEDIA_TYPE and main is not None:
        return Fields({main: npy.loads(body)})
    if media_type == safetensors.MEDIA_TYPE and main is not None:
        return Fields({main: safetensors.loads(body, main)})
    if media_type in formats:
        return formats[media_type](body)
    accepted = " or ".join([JSON, *([npy.MEDIA_TYPE, safetensors.MEDIA_TYPE] if main else []), *formats])
    raise UnsupportedMediaType(
        f"expected a body of {accepted}, got {media_type}",
        expected=accepted,
        got=media_type,
        hint=f"send the header Content-Type: {JSON}",
    )


def loads_value(text: bytes) -> Any:
    """What the JSON `text` says, NaN and infinity let pass. Raises InvalidJson, for a key that stands twice too."""
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        document = _with_non_finite(text, error)
    if text.count(b'"') != 2 * _count_strings(document):
        _refuse_duplicates(text)
    return document


def _json_fields(body: bytes) -> Fields:
    lenient = False
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        document, lenient = _with_non_finite(body, error), True
    if type(document) is not dict:
        got = describe(document)
        raise InvalidJson(f"expected a JSON object, got {got}", pointer="", expected="an object", got=got)
    if body.count(b'"') != 2 * _count_strings(document):
        _refuse_duplicates(body)
    return Fields(document, lenient or _hides_booleans(body, document))


def _hides_booleans(body: bytes, document: dict[str, Any]) -> bool:
    """Whether a boolean may stand deeper in `document` than as the value of a field."""
    # A search for one byte runs at memory speed: of all that numbers consist of, only true has an r and false an f.
    if b"r" not in body and b"f" not in body:
        return False
    plain = sum(type(value) is bool for value in document.values())
    return body.count(b"true") + body.count(b"false") > plain


def _with_non_finite(body: bytes, error: orjson.JSONDecodeError) -> Any:
    """What Python's own reader makes of a body with NaN, Infinity or 1e999: the rows' reader then says where it stands.

    Other faults stay faults; so do escapes, of which that reader lets lone surrogates pass.
    """
    try:
        if not (b"NaN" in body or b"Infinity" in body or "infinity" in str(error)) or rb"\u" in body:
            raise error
        return json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidJson(
            f"the body is no JSON: {error}", expected="a JSON object in UTF-8", hint="check the quotes and commas"
        ) from error


def _count_strings(value: Any) -> int:
    """Strings in `value`, keys included, leaving out those in lists of lists, where only numbers belong."""
    if type(value) is str:
        return 1
    if type(value) is dict:
        return len(value) + sum(map(_count_strings, value.values()))
    if type(value) is list and value and type(value[0]) is dict:
        return sum(map(_count_strings, value))
    return 0


def _refuse_duplicates(body: bytes) -> None:
    """Raise InvalidJson if an object has a key twice: readers disagree about which one counts.

    Only called when the quotation marks in the body are not those of the strings that were read.
    """

    def once(pairs: list[tuple[str, Any]]) -> None:
        counts = Counter(key for key, _ in pairs)
        twice = [key for key, count in counts.items() if count > 1]
        if twice:
            raise InvalidJson(f"the key {twice[0]!r} stands twice in one object", expected="each key once")

    try:
        json.loads(body, object_pairs_hook=once)
    except RecursionError as error:
        raise InvalidJson("the body is nested too deeply", expected="at most 4 levels") from error
