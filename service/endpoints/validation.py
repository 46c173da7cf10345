"""A request's fields, from its body and its query, to one of the schemas; what is wrong, in words."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from service.codec.rows import describe
from service.errors import InvalidField, escape
from service.schemas import Body

B = TypeVar("B", bound=Body)


def merge(fields: dict[str, Any], query: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The body's fields and those of the query. Raises InvalidField where one is given twice."""
    merged = dict(fields)
    for name, value in query:
        if name in merged:
            raise InvalidField(f"{name} is given twice", pointer=f"/{escape(name)}", expected="each field once")
        merged[name] = value
    return merged


def validate(schema: type[B], fields: dict[str, Any]) -> B:
    """`fields` as an instance of `schema`. Raises InvalidField with the first fault."""
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise _in_words(error.errors(include_url=False)[0], schema) from error


def _in_words(fault: ErrorDetails, schema: type[Body]) -> InvalidField:
    path = [str(part) for part in fault["loc"]]
    pointer = "".join(f"/{escape(part)}" for part in path)
    name = ".".join(path)
    if fault["type"] == "missing":
        return InvalidField(f"the field {name} is missing", pointer=pointer, expected=name, got="nothing")
    if fault["type"] == "extra_forbidden":
        known = _fields_at(schema, path[:-1])
        return InvalidField(
            f"there is no field {name}",
            pointer=pointer,
            expected=", ".join(known),
            got=path[-1],
            hint=_hint(path[-1], known),
        )
    got = describe(fault["input"])
    expected = fault["msg"].removeprefix("Input should be ")
    return InvalidField(f"{name} should be {expected}, got {got}", pointer=pointer, expected=expected, got=got)


def _fields_at(schema: type[Body], path: list[str]) -> list[str]:
    for part in path:
        schema = schema.model_fields[part].annotation  # type: ignore[assignment] # only bodies have fields of their own
    return list(schema.model_fields)


def _hint(name: str, known: list[str]) -> str | None:
    if name == "model":
        return "the model is chosen in the query: ?model=name"
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else None
