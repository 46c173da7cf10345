"""Validate the fields in the body and the query of a request against a schema."""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from models.errors import FieldFault, first_fault
from service.codec.json_values import describe_value
from service.errors import InvalidField, escape
from service.schemas import Body

B = TypeVar("B", bound=Body)
MAX_NAME = 200  # characters of an unknown field that an error quotes


def merge(fields: dict[str, Any], query: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of the body and of the query in one dictionary.

    Raises:
        InvalidField: if a field is both in the body and in the query, or is twice in the query.
    """
    merged = dict(fields)
    for name, value in query:
        if name in merged:
            raise InvalidField(f"{name} is given twice", pointer=f"/{escape(name)}", expected="each field once")
        merged[name] = value
    return merged


def validate(schema: type[B], fields: dict[str, Any]) -> B:
    """Return `fields` as an instance of `schema`.

    Raises:
        InvalidField: for the first field that the schema rejects.
    """
    if unknown := _surplus_field(schema, fields):
        raise _invalid_field(FieldFault(unknown, "extra_forbidden", "", None), schema)
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise _invalid_field(first_fault(error), schema) from error


def _surplus_field(schema: type[Body], fields: dict[str, Any]) -> tuple[str, ...]:
    """Return the path of an unknown field if an object has more fields than its schema; an empty path if none has.

    pydantic would find it too, but slowly: a body may have thousands of unknown fields.
    """
    names, objects = _fields_of(schema)
    if len(fields) > len(names):
        return (next(name for name in fields if name not in names),)
    for name, inner in objects.items():
        value = fields.get(name)
        if type(value) is dict and (path := _surplus_field(inner, value)):
            return (name, *path)
    return ()


@lru_cache
def _fields_of(schema: type[Body]) -> tuple[frozenset[str], dict[str, type[Body]]]:
    """Return the names of the fields of `schema`, and the schema of each field that is an object."""
    types = {name: field.annotation for name, field in schema.model_fields.items()}
    objects = {name: kind for name, kind in types.items() if isinstance(kind, type) and issubclass(kind, Body)}
    return frozenset(types), objects


def _invalid_field(fault: FieldFault, schema: type[Body]) -> InvalidField:
    fault = fault._replace(path=tuple(part[:MAX_NAME] for part in fault.path))
    pointer = "".join(f"/{escape(part)}" for part in fault.path)
    name = ".".join(fault.path)
    if fault.kind == "missing":
        return InvalidField(f"the field {name} is missing", pointer=pointer, expected=name, got="nothing")
    if fault.kind == "extra_forbidden":
        *parents, unknown = fault.path
        known = _field_names(schema, parents)
        return InvalidField(
            f"there is no field {name}",
            pointer=pointer,
            expected=", ".join(known),
            got=unknown,
            hint=_hint(unknown, known),
        )
    got = describe_value(fault.value)
    expected = fault.message.removeprefix("input should be ")
    return InvalidField(f"{name} should be {expected}, got {got}", pointer=pointer, expected=expected, got=got)


def _field_names(schema: type[Body], path: Sequence[str]) -> list[str]:
    """Return the fields of the object at `path` in `schema`."""
    for part in path:
        if part in schema.model_fields:  # otherwise, it is the index of an object in a list
            schema = next(_bodies(schema.model_fields[part].annotation))
    return list(schema.model_fields)


def _bodies(annotation: Any) -> Iterator[type[Body]]:
    """Yield the schemas of objects in a type, such as that of the objects in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Body):
        yield annotation
    for part in get_args(annotation):
        yield from _bodies(part)


def _hint(name: str, known: list[str]) -> str | None:
    if name == "model":
        return "choose the model in the query: ?model=name"
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else None
