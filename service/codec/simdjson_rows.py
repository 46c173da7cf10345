"""JSON whose main field is rows of numbers, read without making a Python object of each.

simdjson keeps the document on a tape of its own and copies the numbers out of it, five times faster than a parser that
makes lists. Whatever it refuses, and whatever is not plainly rows of numbers, goes to the reader that knows why.
"""

import threading
from typing import Any

import numpy as np
import simdjson

FEW = 64  # times that a character is searched for rather than counted
_OWN = threading.local()  # a parser's document lives until its next one: each thread has its own
_REFUSED = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)


def read(body: bytes, main: str, width: int) -> dict[str, Any] | None:
    """The fields of `body`, `main` as float64 [N, width]; None if they are not plainly numbers and booleans."""
    try:
        return _read(body, main, width)
    except _REFUSED:
        return None


def _read(body: bytes, main: str, width: int) -> dict[str, Any] | None:
    document: Any = _parser().parse(body)
    keys = set(document.keys())
    rows = document[main]
    for row in rows:
        if len(row) != width:
            return None
    count = len(rows)
    # Rows of the right length can still hold lists, which simdjson would flatten: then there are more brackets. A key
    # that stands twice, or a text, brings more quotation marks.
    if not count * width or not _stands(body, b"[", count + 1) or not _stands(body, b'"', 2 * len(keys)):
        return None
    fields: dict[str, Any] = {main: np.frombuffer(rows.as_buffer(of_type="d"), np.float64).reshape(count, width)}
    for key in keys:
        if key != main:
            fields[key] = document[key]
            if type(fields[key]) not in (int, float, bool):
                return None
    return fields


def _stands(body: bytes, character: bytes, times: int) -> bool:
    """Whether it stands there so many times. Searching for the next one runs at memory speed, counting does not."""
    if times > FEW:
        return body.count(character) == times
    at = -1
    for _ in range(times):
        at = body.find(character, at + 1)
        if at < 0:
            return False
    return body.find(character, at + 1) < 0


def _parser() -> simdjson.Parser:
    try:
        parser: simdjson.Parser = _OWN.parser
    except AttributeError:
        parser = _OWN.parser = simdjson.Parser()
    return parser
