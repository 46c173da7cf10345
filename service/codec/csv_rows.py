"""CSV with a header line. Each further line is a record. An invalid line does not affect the other lines."""

import csv
import io
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from models.columns import MISSING, parse_cell, swallows_lines
from service.codec.request_body import RequestFields
from service.codec.row_errors import MalformedRow
from service.errors import InvalidCsv

MEDIA_TYPE = "text/csv"
# After an invalid quotation, its lines are read again. The number of characters that are read again is limited to
# FREE_REREAD + MAX_REREAD times the length of the body: otherwise, reading N lines could take N^2 / 2 steps.
FREE_REREAD = 2**20
MAX_REREAD = 4
QUOTATION_RULE = "values separated by commas; a quotation mark inside a quoted value is written twice"


class CsvRecords(list[Any]):
    """Records whose values are still text, and a `MalformedRow` for each line that does not fit the header."""

    def __init__(self, records: Iterable[Any], header: list[str]) -> None:
        super().__init__(records)
        self.header = header

    def with_values(self, keys: Sequence[str], features: Collection[str], time: str) -> list[Any]:
        """Return the records with `keys` as keys, one per column, and with numbers in place of the text of features.

        A missing value of a feature or of `time` becomes None. True, yes, false and no become 1 and 0 in a column whose
        other values are 0 and 1. Any other cell of a feature stays as it is. The record parser then reports its
        position.
        """
        readers = [_number if key in features else _none_if_missing if key == time else str for key in keys]
        records = [
            {key: read(cell) for key, read, cell in zip(keys, readers, record.values(), strict=True)}
            if type(record) is dict
            else record
            for record in self
        ]
        _convert_booleans([record for record in records if type(record) is dict])
        return records


def read_fields(body: bytes) -> RequestFields:
    """Return the lines of `body` after the header as the field `records`. Blank lines are skipped.

    Raises InvalidCsv if the header is missing or invalid, or if too many quotations are invalid.
    """
    records = _records(body.decode("utf-8-sig", errors="replace"))
    first = next(records, None)
    if first is None or isinstance(first, MalformedRow):
        raise InvalidCsv("the CSV has no header", expected="a first line that names the columns", got="none")
    header = [name.strip() for name in first]
    _check_header(header)
    rows = [_record(header, record) for record in records]
    while rows and type(rows[-1]) is dict and not any(cell.strip() for cell in rows[-1].values()):
        rows.pop()  # spreadsheets write lines of commas after the last row
    return RequestFields({"records": CsvRecords(rows, header)} if rows else {}, may_contain_non_floats=True)


def _check_header(header: list[str]) -> None:
    if any("\ufffd" in name for name in header):
        raise InvalidCsv("the CSV header is not UTF-8", expected="CSV in UTF-8", hint="save the file in UTF-8")
    duplicates = [name for name, count in Counter(header).items() if count > 1]
    if duplicates:
        raise InvalidCsv(
            f"duplicate column {duplicates[0]!r} in the CSV header",
            expected="each column name once",
            got=duplicates[0],
            hint="rename or remove one of the columns",
        )


class _Lines:
    """An iterator over the lines of a text that can go back to an earlier line."""

    def __init__(self, text: str) -> None:
        self._lines = list(io.StringIO(text, newline=""))
        self.position = 0  # index of the next line

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.position == len(self._lines):
            raise StopIteration
        self.position += 1
        return self._lines[self.position - 1]

    def since(self, start: int) -> list[str]:
        """Return the lines from `start` to the current position."""
        return self._lines[start : self.position]


def _records(text: str) -> Iterator[list[str] | MalformedRow]:
    """Yield the cells of each record that is not blank, the header first.

    If a quotation is invalid, or probably spans several records, the line where it opens becomes a `MalformedRow`, and
    the next line is read as a new record. An invalid quotation therefore costs one row.

    Raises InvalidCsv if so many invalid quotations span so many lines that reading would take too long.
    """
    lines = _Lines(text)
    may_reread = FREE_REREAD + MAX_REREAD * len(text)  # characters
    reader = csv.reader(lines, strict=True, skipinitialspace=True)
    width: int | None = None  # the number of values in the header
    while True:
        start = lines.position
        fault = None
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = _invalid_quotation(str(error))
        else:
            if lines.position - start > 1 and width is not None and _spans_records(record, lines.since(start), width):
                fault = _invalid_quotation("a quotation spans several lines")
        if fault:
            may_reread -= sum(map(len, lines.since(start + 1)))
            if may_reread < 0:
                raise InvalidCsv(
                    "too many quotations in the CSV are invalid",
                    expected=QUOTATION_RULE,
                    hint="write the file with a CSV library",
                )
            lines.position = start + 1
            reader = csv.reader(lines, strict=True, skipinitialspace=True)
            yield fault
        elif len(record) > 1 or (record and record[0].strip()):
            width = width or len(record)
            yield record


def _spans_records(record: list[str], lines: list[str], width: int) -> bool:
    return len(record) != width or swallows_lines(record, lines)


def _invalid_quotation(reason: str) -> MalformedRow:
    return MalformedRow(
        f"the line is not valid CSV: {reason}",
        expected=QUOTATION_RULE,
        got="an invalid line",
    )


def _record(header: list[str], record: list[str] | MalformedRow) -> dict[str, str] | MalformedRow:
    if isinstance(record, MalformedRow):
        return record
    if len(record) != len(header):
        return MalformedRow(
            f"the CSV header has {len(header)} columns, but the line has {len(record)} values",
            expected=f"{len(header)} values",
            got=f"{len(record)} values",
        )
    return dict(zip(header, record, strict=True))


def _convert_booleans(records: list[dict[str, Any]]) -> None:
    """Replace booleans by 1 and 0 in every column that contains no number except 0 and 1."""
    for key in {key for record in records for key, value in record.items() if type(value) is bool}:
        if all(type(record[key]) is not float or record[key] in (0.0, 1.0) for record in records):
            for record in records:
                if type(record[key]) is bool:
                    record[key] = float(record[key])


def _number(cell: str) -> float | bool | str | None:
    value = parse_cell(cell)
    return None if value != value else value


def _none_if_missing(cell: str) -> str | None:
    return None if cell.strip().lower() in MISSING else cell
