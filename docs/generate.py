"""Write the reference tables of the documentation from the code that defines them.

In a page, a comment such as `<!-- generated: settings -->` marks the place of a table. `TABLES` lists the names of the
tables. MkDocs calls `on_page_markdown` for every page while it builds the site, so no table can be out of date.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import gettempdir
from typing import Any, get_args, get_origin

import typer
from fastapi import FastAPI
from pydantic.fields import FieldInfo

from elbo import cli
from service.access.scopes import ROUTES
from service.app import create_app
from service.errors import ERRORS
from service.settings import Settings

MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
REFERENCE = re.compile(r"#/components/schemas/(\w+)")
LIMITS = {
    "minimum": "≥", "exclusiveMinimum": ">", "ge": "≥", "gt": ">",
    "maximum": "≤", "exclusiveMaximum": "<", "le": "≤", "lt": "<",
}  # fmt: skip
SUFFIXES = {"counter": "_total"}
HELP_COLUMNS = 100


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return the page with every marker replaced by its table. MkDocs calls this function by its name."""
    return MARKER.sub(lambda found: TABLES[found[1]](), markdown)


def settings() -> str:
    """Return a table of every setting: variable, default, allowed values and meaning."""
    rows = (
        (f"`ELBO_{name.upper()}`", f"`{field.default}`" if field.default not in ("", None) else "none",
         _allowed(field), field.description or "")
        for name, field in Settings.model_fields.items()
    )  # fmt: skip
    return _table(("variable", "default", "allowed", "meaning"), rows)


def errors() -> str:
    """Return a table of every error code: status, code, title and meaning."""
    rows = ((str(error.status), f"`{error.code}`", error.title, _first_paragraph(error)) for error in ERRORS)
    return _table(("status", "code", "title", "when"), rows)


def metrics() -> str:
    """Return a table of every metric: name, type, labels and meaning."""
    rows = (
        (f"`{family.name}{SUFFIXES.get(family.type, '')}`", family.type,
         ", ".join(f"`{label}`" for label in family._labelnames), family.documentation)
        for family in _application().state.service.metrics.registry.collect()
    )  # fmt: skip
    return _table(("metric", "type", "labels", "meaning"), rows)


def endpoints() -> str:
    """Return a section for every endpoint: media types, fields of the request and of the response, error statuses."""
    document = _application().openapi()
    schemas = document["components"]["schemas"]
    parts = []
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"### {method.upper()} {path}\n\n{_sentence(operation['description'])}")
            body = operation.get("requestBody", {}).get("content", {})
            parts += _content("Request body", body, schemas)
            answers = operation["responses"]
            answered: dict[str, Any] = next((answers[status] for status in answers if status.startswith("2")), {})
            parts += _content("Response", answered.get("content", {}), schemas)
            statuses = [status for status in answers if not status.startswith("2")]
            if statuses:
                parts.append(f"Errors: {', '.join(statuses)}.")
    return "\n\n".join(parts)


def scopes() -> str:
    """Return a table of every route and the scope that it needs."""
    rows = ((f"`{route.removesuffix(':path}').replace('{path', '…')}`", f"`{scope}`" if scope else "no key")
            for route, scope in ROUTES.items())  # fmt: skip
    return _table(("path", "scope"), rows)


def schemas() -> str:
    """Return a section for every object that occurs inside a request or a response."""
    all_schemas = _application().openapi()["components"]["schemas"]
    inner = {name for schema in all_schemas.values() for name in REFERENCE.findall(str(schema))}
    return "\n\n".join(
        f"### {name}\n\n{_sentence(all_schemas[name].get('description', ''))}\n\n{_fields(all_schemas[name])}"
        for name in sorted(inner)
    )


def commands() -> str:
    """Return the help of every command, as a terminal shows it."""
    group: Any = typer.main.get_command(cli.app)
    context = typer.Context(group, info_name="elbo", terminal_width=HELP_COLUMNS, max_content_width=HELP_COLUMNS)
    return "\n\n".join([f"```text\n{group.get_help(context)}\n```", *_help_of_commands(group, context)])


def _help_of_commands(group: Any, context: typer.Context) -> list[str]:
    """Return a section for each command of `group`, and for the commands of the groups in it."""
    parts = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = typer.Context(
            command, info_name=name, parent=context, terminal_width=HELP_COLUMNS, max_content_width=HELP_COLUMNS
        )
        parts.append(f"## {inner.command_path}\n\n```text\n{command.get_help(inner)}\n```")
        if hasattr(command, "list_commands"):
            parts += _help_of_commands(command, inner)
    return parts


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "errors": errors,
    "metrics": metrics,
    "endpoints": endpoints,
    "schemas": schemas,
    "scopes": scopes,
    "commands": commands,
}


@cache
def _application() -> FastAPI:
    """Return an application without models. Its endpoints and metrics are the same as with models."""
    return create_app(Settings(artifacts=Path(gettempdir()) / "elbo-documentation-has-no-models"))


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(_cell(cell) for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Return `text` on one line. Escape every vertical bar, and every `<` outside of code."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(part.replace("<", "&lt;") if place % 2 == 0 else part for place, part in enumerate(parts))


def _sentence(text: str) -> str:
    return " ".join(text.split())


def _first_paragraph(thing: type) -> str:
    return (thing.__doc__ or "").split("\n\n")[0]


def _allowed(field: FieldInfo) -> str:
    choices = get_args(field.annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return ", ".join(f"`{choice}`" for choice in choices)
    limits = ((name, getattr(bound, name, None)) for bound in field.metadata for name in ("ge", "gt", "le", "lt"))
    found = [f"{LIMITS[name]} {limit:g}" if isinstance(limit, float) else f"{LIMITS[name]} {limit}"
             for name, limit in limits if limit is not None]  # fmt: skip
    return ", ".join(found) or _name_of(field.annotation)


def _name_of(annotation: Any) -> str:
    names = {str: "text", Path: "path", int: "integer", float: "number", bool: "`true`, `false`"}
    kinds = (
        [kind for kind in get_args(annotation) if kind is not type(None)] if get_origin(annotation) else [annotation]
    )
    return ", ".join(names.get(kind, str(kind)) for kind in kinds)


def _content(title: str, content: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """Return a line with the media types. If the JSON has a named schema, also return a table of its fields."""
    content = {name: body for name, body in content.items() if body.get("schema")}  # FastAPI adds JSON without a schema
    if not content:
        return []
    parts = [f"**{title}**: {', '.join(f'`{media_type}`' for media_type in content)}"]
    reference = content.get("application/json", {}).get("schema", {}).get("$ref", "")
    if reference:
        parts.append(_fields(schemas[reference.rsplit("/", 1)[-1]]))
    return parts


def _fields(schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = (
        (f"`{name}`", _type(field), _default(name, field, required), field.get("description", ""))
        for name, field in schema.get("properties", {}).items()
    )
    return _table(("field", "type", "default", "meaning"), rows)


def _default(name: str, field: dict[str, Any], required: set[str]) -> str:
    if name in required:
        return "required"
    default = field.get("default")
    return "–" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _type(schema: dict[str, Any]) -> str:
    """Return the type of a field in a few words, with its bounds."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type", "any")
    words = " or ".join(part for part in kind if part != "null") if isinstance(kind, list) else str(kind)
    if words == "array":
        items = schema.get("items", {})
        words = f"array of {_type(items)}" if "$ref" in items else _array(items)
    limits = [f"{LIMITS[name]} {schema[name]:g}" for name in LIMITS if name in schema]
    return f"{words}, {', '.join(limits)}" if limits else words


def _array(items: dict[str, Any]) -> str:
    kinds = {"array": "arrays", "object": "objects", "number": "numbers", "integer": "integers", "string": "strings"}
    kind = items.get("type")
    if isinstance(kind, str):
        return f"array of {kinds.get(kind, kind)}"
    return "array of rows" if "anyOf" in items else "array"
