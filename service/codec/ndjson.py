"""NDJSON: one JSON value a line, of which a bad one costs only itself."""

import orjson

from service.codec.request_body import Fields, loads_value
from service.codec.rows import Unreadable
from service.errors import InvalidJson

MEDIA_TYPE = "application/x-ndjson"
MEDIA_TYPES = (MEDIA_TYPE, "application/ndjson", "application/jsonl", "application/x-jsonlines")
SHOWN = 40  # characters of a bad line that an error quotes


class Lines(list[object]):
    """What the lines hold: records, rows, and an `Unreadable` for each that is no JSON."""


def read(body: bytes) -> Fields:
    """The lines of `body` as the field `records`; blank ones are none."""
    values = Lines(parse(line) for line in body.split(b"\n") if line and not line.isspace())
    return Fields({"records": values} if values else {}, careful=True)


def parse(line: bytes) -> object:
    """What one line holds."""
    try:
        value = loads_value(line)
    except InvalidJson as error:
        got = line[:SHOWN].decode(errors="replace").strip()
        return Unreadable(error.detail, "a JSON object or list in UTF-8", got)
    return value


def dumps(value: object) -> bytes:
    """`value` as a line."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


class Splitter:
    """Cuts a stream of bytes into lines, of which one that is too long costs only itself, not its memory.

    longest: bytes that a line may have.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._rest = b""
        self._skipping = False

    def feed(self, piece: bytes) -> list[object]:
        """What the lines that end in `piece` hold, as `parse` gives it."""
        *whole, self._rest = (self._rest + piece).split(b"\n")
        found = [value for line in whole for value in self._values(line)]
        if len(self._rest) > self._longest:
            self._rest, self._skipping = b"", True
        return found

    def end(self) -> list[object]:
        """What the last line holds, if no newline ended it."""
        last, self._rest = self._rest, b""
        return self._values(last)

    def _values(self, line: bytes) -> list[object]:
        """What a line holds: nothing if it is blank."""
        if self._skipping or len(line) > self._longest:
            self._skipping = False
            return [Unreadable("the line is too long", f"at most {self._longest} bytes", "more")]
        return [parse(line)] if line and not line.isspace() else []
