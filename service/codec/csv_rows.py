"""CSV with a header line. Each further line is a record. An invalid line does not affect the other lines."""

import csv
import io
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

from service.codec.request_body import RequestFields
from service.codec.row_errors import MalformedRow
from service.errors import InvalidCsv

MEDIA_TYPE = "text/csv"
MISSING_CELLS = frozenset(("", "nan", "null", "none", "na", "n/a"))  # cells that mean a missing value, in lower case


class CsvRecords(list[Any]):
    """Records whose values are still text, and a `MalformedRow` for each line that does not fit the header."""

    def __init__(self, records: Iterator[Any], header: list[str]) -> None:
        super().__init__(records)
        self.header = header

    def with_numbers(self, names: Collection[str]) -> list[Any]:
        """Return the records after converting the columns `names` to numbers. A missing value becomes None.

        A cell that holds neither a number nor a missing value stays text. The record parser then reports its position.
        """
        return [_with_numbers(record, names) if type(record) is dict else record for record in self]


def read_fields(body: bytes) -> RequestFields:
    """Return the lines of `body` after the header as the field `records`.

    Raises InvalidCsv if the header is missing or invalid.
    """
    text = io.StringIO(body.decode("utf-8-sig", errors="replace"), newline="")
    lines = _lines(csv.reader(text))
    first = next((line for line in lines if line), None)
    if first is None or isinstance(first, MalformedRow):
        raise InvalidCsv("the CSV has no header", expected="a first line that names the columns", got="none")
    header = [name.strip() for name in first]
    duplicates = [name for name, count in Counter(header).items() if count > 1]
    if duplicates:
        raise InvalidCsv(
            f"duplicate column {duplicates[0]!r} in the CSV header",
            expected="each column name once",
            got=duplicates[0],
            hint="rename or remove one of the columns",
        )
    records = CsvRecords((_record(header, line) for line in lines if line), header)
    return RequestFields({"records": records} if records else {}, may_contain_non_floats=True)


def _lines(reader: Iterator[list[str]]) -> Iterator[list[str] | MalformedRow]:
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield MalformedRow(f"the line is not valid CSV: {error}", "values separated by commas", "an invalid line")


def _record(header: list[str], line: list[str] | MalformedRow) -> dict[str, str] | MalformedRow:
    if isinstance(line, MalformedRow):
        return line
    if len(line) != len(header):
        return MalformedRow(
            f"the CSV header has {len(header)} columns, but the line has {len(line)} values",
            expected=f"{len(header)} values",
            got=f"{len(line)} values",
        )
    return dict(zip(header, line, strict=True))


def _with_numbers(record: dict[str, str], names: Collection[str]) -> dict[str, Any]:
    return {name: _number(cell) if name in names else cell for name, cell in record.items()}


def _number(cell: str) -> float | str | None:
    try:
        value = float(cell)
    except ValueError:
        return None if cell.strip().lower() in MISSING_CELLS else cell
    return value if value == value else None
