"""A fast reader for JSON bodies that consist of rows of numbers. It creates no Python object per number.

simdjson parses a document into its own memory, from which the numbers are copied. This is five times faster than a
parser that creates lists. If simdjson refuses a body, or if the body does not consist of rows of numbers, the reader in
request_body.py parses the body and reports errors.
"""

import threading
from typing import Any

import numpy as np
import simdjson

MAX_SEARCHES = 64  # `_occurs` calls find() repeatedly for up to this many occurrences, and bytes.count for more
_THREAD_LOCAL = threading.local()  # one parser per thread: parsing invalidates the parser's previous document
_PARSING_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)


def read_fields(body: bytes, main: str, width: int) -> dict[str, Any] | None:
    """Return the fields of `body`, with `main` as float64 [N, width].

    Return None unless `main` is a list of rows of `width` numbers and every other field is a number or a boolean.
    """
    try:
        return _read_fields(body, main, width)
    except _PARSING_ERRORS:
        return None


def _read_fields(body: bytes, main: str, width: int) -> dict[str, Any] | None:
    document: Any = _parser().parse(body)
    keys = set(document.keys())
    rows = document[main]
    for row in rows:
        if len(row) != width:
            return None
    count = len(rows)
    # A row of the right length may still contain nested lists, which simdjson would flatten. A nested list adds an
    # opening bracket to the expected `count + 1` brackets. Likewise, a duplicate key or a string value adds quotation
    # marks to the expected two per distinct key.
    if not count * width or not _occurs(body, b"[", count + 1) or not _occurs(body, b'"', 2 * len(keys)):
        return None
    fields: dict[str, Any] = {main: np.frombuffer(rows.as_buffer(of_type="d"), np.float64).reshape(count, width)}
    for key in keys:
        if key != main:
            fields[key] = document[key]
            if type(fields[key]) not in (int, float, bool):
                return None
    return fields


def _occurs(body: bytes, character: bytes, times: int) -> bool:
    """Return whether `character` occurs exactly `times` times in `body`.

    For few occurrences, repeated find() is faster than bytes.count, because find() runs at memory speed.
    """
    if times > MAX_SEARCHES:
        return body.count(character) == times
    position = -1
    for _ in range(times):
        position = body.find(character, position + 1)
        if position < 0:
            return False
    return body.find(character, position + 1) < 0


def _parser() -> simdjson.Parser:
    """Return the parser of this thread."""
    try:
        parser: simdjson.Parser = _THREAD_LOCAL.parser
    except AttributeError:
        parser = _THREAD_LOCAL.parser = simdjson.Parser()
    return parser
