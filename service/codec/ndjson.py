"""NDJSON: every line is a JSON value. An invalid line does not affect the other lines."""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import orjson

from service.codec.budget import NO_LIMIT, PIECE_BYTES, Budget
from service.codec.json_rows import require_few_values
from service.codec.request_body import BYTE_ORDER_MARK, RequestFields, loads_value
from service.codec.row_errors import MalformedRow
from service.errors import InvalidJson

MEDIA_TYPE = "application/x-ndjson"
# The last one is the type of SageMaker.
MEDIA_TYPES = (
    MEDIA_TYPE, "application/ndjson", "application/jsonl", "application/x-jsonlines", "application/jsonlines",
)  # fmt: skip
_BLANK_LINES = re.compile(rb"\n[ \t\r\n]+")
SHORT_LINE = 8  # bytes; if the lines of a chunk are shorter on average, most of them may be blank
_OBJECT = ord("{")
QUOTED_CHARACTERS = 40  # an error quotes at most this many characters of an invalid line


class NdjsonRows:
    """One value per line: a record, a row as a list, or a `MalformedRow` if the line is not valid JSON.

    The lines are parsed while the caller iterates, so that only one of them is in memory at a time.
    """

    def __init__(self, values: Callable[[], Iterable[object]]) -> None:
        self._values = values

    def __iter__(self) -> Iterator[object]:
        return iter(self._values())


def read_fields(body: bytes, budget: Budget = NO_LIMIT) -> RequestFields:
    """Return the values of the lines as the field `records`. Blank lines are skipped."""
    for _ in _values(body, budget):
        return RequestFields({"records": NdjsonRows(partial(_values, body, budget))}, may_contain_non_floats=True)
    return RequestFields({}, may_contain_non_floats=True)


def _values(body: bytes, budget: Budget) -> Iterator[object]:
    splitter = LineSplitter(budget)
    for start in range(0, len(body), PIECE_BYTES):
        budget.check_time()
        yield from splitter.feed(body[start : start + PIECE_BYTES])
    yield from splitter.finish()


def parse_line(line: bytes, budget: Budget = NO_LIMIT) -> list[object]:
    """Return a list with the value of one line, or an empty list for a blank line.

    The value of a line that is not valid JSON is a `MalformedRow`. A byte order mark before the line is ignored: it
    stands before the first line of some files, and in the middle after such files have been concatenated.
    """
    line = line.removeprefix(BYTE_ORDER_MARK)
    if not line or line.isspace():
        return []
    try:
        if len(line) > PIECE_BYTES:
            require_few_values(line, budget)
        return [loads_value(line)]
    except InvalidJson as error:
        got = line[:QUOTED_CHARACTERS].decode(errors="replace").strip()
        return [MalformedRow(error.detail, "a JSON object or list in UTF-8", got)]


def dumps(value: object) -> bytes:
    """Return `value` as one line of NDJSON."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


class LineSplitter:
    """Splits a stream of bytes into lines. A line that is too long becomes a `MalformedRow` and is not kept in memory.

    Args:
        budget: limits the length of a line and the number of its values.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._max_line_bytes = budget.max_row_bytes
        self._rest = bytearray()  # a bytearray, because `bytes` would copy the line for every chunk
        self._skipping = False  # whether the current line is too long and is dropped up to its newline

    @property
    def has_incomplete_line(self) -> bool:
        """Whether a line has begun that has not ended."""
        return bool(self._rest) or self._skipping

    def feed(self, chunk: bytes) -> Iterator[object]:
        """Parse the lines that end in `chunk`, and yield one value per line that is not blank."""
        # Other chunks skip the substitution, because it takes as long as reading a row.
        if chunk.count(b"\n") * SHORT_LINE > len(chunk):
            chunk = _BLANK_LINES.sub(b"\n", chunk)
        self._rest += chunk
        if b"\n" in chunk:
            *lines, rest = bytes(self._rest).split(b"\n")
            self._rest = bytearray(rest)
            for line in lines:
                if 0 < len(line) <= PIECE_BYTES and not self._skipping and line[0] == _OBJECT:  # almost always
                    try:
                        yield loads_value(line)
                    except InvalidJson:
                        yield from self._parse(line)
                elif line or self._skipping:
                    yield from self._parse(line)
        if len(self._rest) > self._max_line_bytes:
            self._rest, self._skipping = bytearray(), True

    def finish(self) -> list[object]:
        """Parse a last line that has no newline. Return a list with its value, or an empty list if there is none."""
        last, self._rest = bytes(self._rest), bytearray()
        return self._parse(last)

    def _parse(self, line: bytes) -> list[object]:
        """Return a list with the value of `line`, or an empty list if `line` is blank."""
        if self._skipping or len(line) > self._max_line_bytes:
            self._skipping = False
            limit = f"at most {self._max_line_bytes} bytes"
            return [MalformedRow(f"the line is too long: expected {limit}", limit, "a longer line")]
        return parse_line(line, self._budget)
