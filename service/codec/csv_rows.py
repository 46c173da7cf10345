"""CSV with a header: one record a line, of which a bad one costs only itself."""

import csv
import io
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from service.codec.request_body import Fields
from service.codec.rows import Unreadable
from service.errors import InvalidCsv

MEDIA_TYPE = "text/csv"
MISSING = frozenset(("", "nan", "null", "none", "na", "n/a"))  # in small letters


class Cells(list[Any]):
    """Records whose values are still text, and an `Unreadable` for each line that does not fit the header."""

    def numbers(self, names: Collection[str]) -> list[Any]:
        """The records with the values of `names` as numbers, None where a cell says that it is missing.

        What is no number stays text, for the rows' reader to refuse.
        """
        return Cells(_numbers(record, names) if type(record) is dict else record for record in self)

    @property
    def header(self) -> list[str]:
        """The names of the columns, as far as a line tells them."""
        return next((list(record) for record in self if type(record) is dict), [])


def read(body: bytes) -> Fields:
    """The lines of `body` as the field `records`. Raises InvalidCsv if its header is none."""
    text = io.StringIO(body.decode("utf-8-sig", errors="replace"), newline="")
    lines = _lines(csv.reader(text))
    header = next((line for line in lines if line), None)
    if header is None or isinstance(header, Unreadable):
        raise InvalidCsv("the CSV has no header", expected="a first line that names the columns", got="none")
    header = [name.strip() for name in header]
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise InvalidCsv(f"two columns are called {twice[0]!r}", expected="each name once", got=twice[0])
    records = Cells(_record(header, line) for line in lines if line)
    return Fields({"records": records} if records else {}, careful=True)


def _lines(reader: Iterator[list[str]]) -> Iterator[list[str] | Unreadable]:
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Unreadable(f"the line is no CSV: {error}", "values between commas", "something else")


def _record(header: list[str], line: list[str] | Unreadable) -> dict[str, str] | Unreadable:
    if isinstance(line, Unreadable):
        return line
    if len(line) != len(header):
        expected, got = f"{len(header)} values", f"{len(line)} values"
        return Unreadable(f"the header has {len(header)} columns, the line {got}", expected, got)
    return dict(zip(header, line, strict=True))


def _numbers(record: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: _number(cell) if name in names else cell for name, cell in record.items()}


def _number(cell: str) -> float | str | None:
    try:
        value = float(cell)
    except ValueError:
        return None if cell.strip().lower() in MISSING else cell
    return value if value == value else None
