"""Read the options in a query string as the values of a schema's fields.

A value in the query is judged like the same value in a JSON body. Only its spelling is freer, because programs write
numbers and booleans into queries in their own ways: `.05`, `+1`, `True`.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import orjson

from service.codec.request_body import loads_value
from service.errors import InvalidJson, escape
from service.schemas import Body

MAX_CACHED_CHARACTERS = 512  # options that are longer together are not cached
_INTEGER = re.compile(r"[+-]?[0-9]{1,400}", re.ASCII)
# With `\.?` instead of the inner brackets, digits could be divided in many ways, and the time to match them would grow
# with the square of their number.
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)

Options = tuple[tuple[str, str], ...]


class QueryOptions(NamedTuple):
    """The options in a query.

    `may_contain_non_floats`: whether true, false, NaN or infinity may be among the numbers of rows.
    """

    values: tuple[tuple[str, Any], ...]
    may_contain_non_floats: bool


def read_options(schema: type[Body], options: Options) -> QueryOptions:
    """Return the names in `options` with the values that their texts mean for the fields of `schema`.

    Raises:
        InvalidJson: a list or an object is not valid JSON, or an object has a duplicate key.
    """
    if sum(len(name) + len(text) for name, text in options) <= MAX_CACHED_CHARACTERS:
        return _read_options_cached(schema, options)
    return _read_options(schema, options)


def _read_options(schema: type[Body], options: Options) -> QueryOptions:
    text_fields = _text_fields(schema)
    values = tuple((name, _text(text) if name in text_fields else _value(name, text)) for name, text in options)
    return QueryOptions(values, any(type(value) in (list, dict) for _, value in values))


_read_options_cached = lru_cache(maxsize=1024)(_read_options)


@lru_cache(maxsize=64)
def _text_fields(schema: type[Body]) -> frozenset[str]:
    """Return the names of the fields whose values are texts."""
    return frozenset(
        name for name, field in schema.model_fields.items() if any(map(_is_text, _kinds(field.annotation)))
    )


def _kinds(annotation: Any) -> Iterable[Any]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _is_text(kind: Any) -> bool:
    return kind is str or get_origin(kind) is Literal


def _text(text: str) -> str:
    """Return the value of a field that is a text: `text` itself, or its content if it is a JSON string."""
    if text.startswith('"'):
        value = _json(text)
        return value if type(value) is str else text
    return text


def _value(name: str, text: str) -> Any:
    """Return the value of any other field. A text that is no number, boolean or JSON stays as it is."""
    word = text.strip()
    if word[:1] in ("[", "{"):
        try:
            return loads_value(word.encode())
        except InvalidJson as error:
            error.pointer = f"/{escape(name)}"
            raise
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    if _INTEGER.fullmatch(word):
        number = int(word)
        return number if -(2**63) <= number < 2**64 else float(word)  # as in a JSON body
    if _NUMBER.fullmatch(word):
        return float(word)
    return _json(text)


def _json(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
