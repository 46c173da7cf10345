"""A fast reader for JSON bodies that consist of rows of numbers. It creates no Python object per number.

simdjson parses a document into its own memory, from which the numbers are copied. This is five times faster than a
parser that creates lists. If simdjson refuses a body, or if the body does not consist of rows of numbers, the reader in
request_body.py parses the body and reports errors.
"""

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import simdjson

from service.codec.budget import NO_LIMIT, Budget
from service.codec.float32 import as_float32

MAX_WHOLE_BYTES = 512 * 1024  # a larger body is read in pieces
LARGE_PIECE_BYTES = 256 * 1024  # simdjson keeps the interpreter lock while it parses a piece
MAX_REST_BYTES = 4096  # of a large body, outside of its rows
MAX_GAP_BYTES = 100  # longest white space between two rows of a large body
MAX_SEARCHES = 64  # `_occurs` calls find() repeatedly for up to this many occurrences, and bytes.count for more
_THREAD_LOCAL = threading.local()  # one parser per thread: parsing invalidates the parser's previous document
_PARSING_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)


def read_fields(body: bytes, main: str, width: int, budget: Budget = NO_LIMIT) -> dict[str, Any] | None:
    """Return the fields of `body`, with `main` as an array [N, width].

    Return None unless `main` is a list of rows of `width` numbers and every other field is a number or a boolean.

    Raises:
        TooManyRows, BodyTooLarge, Overloaded, DeadlineExceeded: see `Budget`.
    """
    if len(body) <= MAX_WHOLE_BYTES:
        try:
            return _read_fields(body, main, width)
        except _PARSING_ERRORS:
            return None
    usage = budget.usage
    try:
        fields = _read_large(body, main, width, budget)
    except _PARSING_ERRORS:
        fields = None
    if fields is None:
        budget.restore_usage(usage)
    return fields


def _read_large(body: bytes, main: str, width: int, budget: Budget) -> dict[str, Any] | None:
    """Return the fields of a large body. simdjson holds the interpreter lock, so it gets only a few rows at a time.

    The result is float32, because float64 would take too much memory. Return None also if a number is beyond float32.
    """
    start, end = body.find(b"[") + 1, body.rfind(b"]")  # the rows, if the body is valid
    rest = body[:start] + body[end:]
    if not start or len(rest) > MAX_REST_BYTES:
        return None
    fields: dict[str, Any] = orjson.loads(rest)
    if type(fields) is not dict or fields.get(main) != [] or rest.count(b'"') != 2 * len(fields):
        return None
    if any(type(value) not in (int, float, bool) for key, value in fields.items() if key != main):
        return None
    numbers = bytearray()
    while start < end:
        budget.check_time()
        piece_end = body.find(b"]", start + LARGE_PIECE_BYTES, end) + 1 or end
        if piece_end - start > LARGE_PIECE_BYTES + budget.max_row_bytes:
            return None
        array = _numbers(body[start:piece_end], width)
        if array is None:
            return None
        budget.take_rows(len(array))
        x, finite = as_float32(array)
        if not finite:
            return None
        budget.take_bytes(x.nbytes)
        numbers += x.data.cast("B")
        start = _start_of_next_row(body, piece_end, end)
    fields[main] = np.frombuffer(numbers, np.float32).reshape(-1, width)
    return fields


def _start_of_next_row(body: bytes, start: int, end: int) -> int:
    """Return where the next row begins, after white space and a comma, or `end` if only white space is left.

    Raises ValueError if there is neither, or if there is more white space than MAX_GAP_BYTES.
    """
    gap, comma, _ = body[start : min(end, start + MAX_GAP_BYTES)].partition(b",")
    if gap.strip(b" \t\r\n") or not (comma or start + len(gap) == end):
        raise ValueError("expected a comma between two rows")
    next_row = start + len(gap) + len(comma)
    if comma and next_row == end:
        raise ValueError("expected a row after a comma")
    return next_row


def _numbers(text: bytes, width: int) -> npt.NDArray[np.float64] | None:
    """Return the rows in `text`, [N, width], or None if `text` is anything but lists of `width` numbers."""
    rows: Any = _parser().parse(b"[%b]" % text)
    for row in rows:
        if len(row) != width:
            return None
    count = len(rows)
    # A row of the right length may still contain nested lists, which simdjson would flatten.
    if not count * width or not _occurs(text, b"[", count) or b'"' in text:
        return None
    return np.frombuffer(rows.as_buffer(of_type="d"), np.float64).reshape(count, width)


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
