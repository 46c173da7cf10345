"""Read the fields of a request body in JSON, npy or safetensors. The Content-Type header determines the format."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from service.codec import npy, pictures, safetensors, simdjson_rows
from service.codec.budget import NO_LIMIT, PIECE_BYTES, Budget
from service.codec.json_rows import require_few_values, take_apart
from service.codec.json_values import describe_value
from service.codec.simdjson_rows import MAX_WHOLE_BYTES
from service.errors import InvalidJson, UnsupportedMediaType

JSON = "application/json"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some programs write it before UTF-8 text; it is not part of the text
NON_FLOATS = (b"r", b"f", b"N", b"I", b"e", b"E")  # true, false, NaN, Infinity and 1e999 have one of these characters
_WITHOUT_STRINGS = frozenset((float, int, bool, type(None)))  # types of values that contain no strings
ARRAY_MEDIA_TYPES = (npy.MEDIA_TYPE, safetensors.MEDIA_TYPE)  # types of bodies that hold arrays in binary form


class RequestFields(NamedTuple):
    """The fields of a request body.

    `may_contain_non_floats`: whether true, false, NaN or infinity may be among the numbers of the rows.
    """

    values: dict[str, Any]
    may_contain_non_floats: bool = False


BodyReader = Callable[[bytes, Budget], RequestFields]
NO_EXTRA_READERS: Mapping[str, BodyReader] = {}


@lru_cache(maxsize=256)
def media_type_of(content_type: str) -> str:
    """Return the media type in a Content-Type header, without its parameters, in lower case."""
    return content_type.partition(";")[0].strip().lower()


@lru_cache(maxsize=256)
def is_array(content_type: str) -> bool:
    """Return whether a body with this Content-Type holds arrays in binary form."""
    return media_type_of(content_type) in ARRAY_MEDIA_TYPES


@lru_cache(maxsize=256)
def is_picture(content_type: str) -> bool:
    """Return whether a body with this Content-Type is a picture."""
    return media_type_of(content_type) in pictures.MEDIA_TYPES


@lru_cache(maxsize=256)
def is_json(content_type: str) -> bool:
    """Return whether a body with this Content-Type is a JSON document."""
    media_type = media_type_of(content_type)
    return media_type == JSON or media_type.endswith("+json")


def read_plain_rows(content_type: str, body: bytes, main: str, width: int) -> RequestFields | None:
    """Return the fields of a JSON body of at most MAX_WHOLE_BYTES with rows of numbers, or None for any other body.

    Such a body needs no budget: it takes a few milliseconds, and no objects are created.
    """
    if len(body) > MAX_WHOLE_BYTES or not is_json(content_type):
        return None
    fields = simdjson_rows.read_fields(body, main, width)
    return None if fields is None else RequestFields(fields)


def read_fields(
    content_type: str,
    body: bytes,
    main: str | None,
    width: int = 0,
    extra_readers: Mapping[str, BodyReader] = NO_EXTRA_READERS,
    picture: pictures.PictureRow | None = None,
    budget: Budget = NO_LIMIT,
) -> RequestFields:
    """Return the fields of `body`. An empty body has no fields.

    Args:
        content_type: the Content-Type header.
        body: the body, decompressed.
        main: the name of the field that holds the rows; None if the endpoint takes no rows. The array of an npy or
            safetensors body becomes this field. The rows of a JSON body become an array if each row has
            `width` numbers.
        width: the number of values per row; 0 if `read_plain_rows` has found no such rows in `body`.
        extra_readers: for each further media type, the function that reads its bodies.
        picture: the shape and pixel range of the row to make of a PNG or JPEG body; None if the endpoint or the model
            takes no pictures.
        budget: what reading may cost.

    Raises:
        UnsupportedMediaType, InvalidJson, InvalidNpy, InvalidSafetensors, InvalidPicture, and the errors of
        `extra_readers` and of `Budget`.
    """
    media_type = media_type_of(content_type)
    if not body:
        return RequestFields({})
    if is_json(content_type):
        fields = simdjson_rows.read_fields(body, main, width, budget) if main and width else None
        return read_json(body, budget) if fields is None else RequestFields(fields)
    if media_type == npy.MEDIA_TYPE and main is not None:
        return RequestFields({main: npy.loads(body)})
    if media_type == safetensors.MEDIA_TYPE and main is not None:
        return RequestFields({main: safetensors.loads(body, main)})
    if media_type in extra_readers:
        return extra_readers[media_type](body, budget)
    if picture and media_type in pictures.MEDIA_TYPES and main is not None:
        return RequestFields({main: pictures.loads(body, media_type, picture)})
    picture_types = pictures.MEDIA_TYPES if picture else ()
    accepted = " or ".join([JSON, *(ARRAY_MEDIA_TYPES if main else ()), *picture_types, *extra_readers])
    got = media_type or "no Content-Type"  # which a page of any other site can send without asking the server
    raise UnsupportedMediaType(
        f"expected a body of type {accepted}, got {got}",
        expected=accepted,
        got=got,
        hint=f"send the header Content-Type: {JSON}",
    )


def loads_value(text: bytes) -> Any:
    """Return the value of the JSON `text`, in which NaN and infinity are allowed.

    Raises InvalidJson if `text` is not JSON, or if an object in it has a duplicate key.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        value = _loads_non_finite(text, error)
    if text.count(b'"') != 2 * _count_strings(value):
        _refuse_duplicate_keys(text)
    return value


def read_json(body: bytes, budget: Budget = NO_LIMIT) -> RequestFields:
    """Return the fields of a JSON object. A large array becomes `JsonRows`. Raises InvalidJson."""
    body = body.removeprefix(BYTE_ORDER_MARK)
    if len(body) <= PIECE_BYTES or budget is NO_LIMIT:
        return _read_object(body)

    def loads(text: bytes) -> Any:
        require_few_values(text, budget)
        return loads_value(text)

    rest, arrays = take_apart(body, loads, budget)
    require_few_values(rest, budget)
    values, _ = _read_object(rest)
    values = {name: arrays.get(value, value) if type(value) is str else value for name, value in values.items()}
    return RequestFields(values, any(character in body for character in NON_FLOATS))


def _read_object(body: bytes) -> RequestFields:
    has_non_finite = False
    if not body:
        return RequestFields({})
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        document, has_non_finite = _loads_non_finite(body, error), True
    if type(document) is not dict:
        got = describe_value(document)
        raise InvalidJson(f"expected a JSON object, got {got}", pointer="", expected="an object", got=got)
    if body.count(b'"') != 2 * _count_strings(document):
        _refuse_duplicate_keys(body)
    return RequestFields(document, has_non_finite or _may_nest_booleans(body, document))


def _may_nest_booleans(body: bytes, document: dict[str, Any]) -> bool:
    """Return whether a list or object in a field of `document` may contain a boolean."""
    # A search for one byte is fast, and without the letters r and f, the body contains neither `true` nor `false`.
    if b"r" not in body and b"f" not in body:
        return False
    top_level = sum(type(value) is bool for value in document.values())
    return body.count(b"true") + body.count(b"false") > top_level


def _loads_non_finite(body: bytes, error: orjson.JSONDecodeError) -> Any:
    """Parse, with Python's json module, a body that orjson refused because of NaN, Infinity or 1e999.

    The row parser later reports the position of that value. Raises InvalidJson if orjson refused the body for any
    other reason. Raises InvalidJson also if the body contains Unicode escapes, because the json module accepts lone
    surrogates.
    """
    message = str(error)
    if (b"NaN" in body or b"Infinity" in body or "infinity" in message) and rb"\u" not in body:
        with suppress(ValueError, RecursionError):
            return json.loads(body)
    raise InvalidJson(
        f"invalid JSON: {message}", expected="a JSON object in UTF-8", hint="check the quotation marks and commas"
    ) from error


def _count_strings(value: Any) -> int:
    """Return the number of strings in `value`, including keys.

    Strings in a list count only if the first element of the list is an object. Other lists should hold numbers.
    """
    count, pending = 0, [value]
    while pending:  # a loop, because recursion would fail at about 980 levels, and orjson reads 1,024
        value = pending.pop()
        if type(value) is str:
            count += 1
        elif type(value) is dict:
            count += len(value)
            if not _WITHOUT_STRINGS.issuperset(map(type, value.values())):
                pending.extend(value.values())
        elif type(value) is list and value and type(value[0]) is dict:
            pending.extend(value)
    return count


def _refuse_duplicate_keys(body: bytes) -> None:
    """Raise InvalidJson if an object has a duplicate key, because JSON readers disagree about which value counts.

    A duplicate key makes the number of quotation marks in the body differ from twice the number of parsed strings.
    Callers call this function only if these numbers differ, because the function parses the body again.
    """

    def check(pairs: list[tuple[str, Any]]) -> None:
        counts = Counter(key for key, _ in pairs)
        duplicates = [key for key, count in counts.items() if count > 1]
        if duplicates:
            raise InvalidJson(
                f"duplicate key {duplicates[0]!r}", expected="each key once per object", hint="remove one of the two"
            )

    try:
        json.loads(body, object_pairs_hook=check)
    except RecursionError as error:
        raise InvalidJson("the JSON is nested too deeply", expected="at most 5 levels") from error
