"""CSV with a header line. Each further line is a record. An invalid line does not affect the other lines."""

import codecs
import csv
import io
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from models.columns import MISSING, parse_cell, swallows_lines
from service.codec.budget import NO_LIMIT, PIECE_BYTES, Budget
from service.codec.request_body import BYTE_ORDER_MARK, RequestFields
from service.codec.row_errors import MalformedRow
from service.errors import InvalidCsv

MEDIA_TYPE = "text/csv"
# After an invalid quotation, its lines are read again. The number of characters that are read again is limited to
# FREE_REREAD + MAX_REREAD times the length of the body: otherwise, reading N lines could take N^2 / 2 steps.
FREE_REREAD = 2**20
MAX_REREAD = 4
DECODED_BYTES = 16 * 1024  # how much of a line that is not UTF-8 is decoded at once
QUOTATION_RULE = "values separated by commas; a quotation mark inside a quoted value is written twice"


class CsvRecords:
    """The records after the header. Their values are text. An invalid line is a `MalformedRow`.

    The lines are parsed while the caller iterates, so that only a few of them are in memory at a time.
    """

    def __init__(self, body: bytes, header: list[str], budget: Budget) -> None:
        self.header = header
        self._body = body
        self._budget = budget
        self._first_pass = self._read()
        self._first = next(self._first_pass, None)

    def __bool__(self) -> bool:
        return self._first is not None

    def __iter__(self) -> Iterator[dict[str, str] | MalformedRow]:
        if self._first is None:
            return self._read()
        first, self._first = self._first, None
        return chain([first], self._first_pass)

    def _read(self) -> Iterator[dict[str, str] | MalformedRow]:
        records = _records(self._body, self._budget)
        next(records)  # the header
        blank_lines = 0  # spreadsheets write lines of commas after the last row: these are not records
        for cells in records:
            if type(cells) is list and len(cells) == len(self.header) and not "".join(cells).strip():
                blank_lines += 1
                continue
            for _ in range(blank_lines):
                yield dict.fromkeys(self.header, "")
            blank_lines = 0
            yield _record(self.header, cells)

    def with_values(self, keys: Sequence[str], features: Collection[str], time: str) -> Iterator[Any]:
        """Yield the records with the new keys `keys`, one per column. The text of a feature becomes a number.

        A missing value of a feature or of `time` becomes None. True, yes, false and no become 1 and 0 in a column whose
        other values are 0 and 1. Any other cell of a feature stays as it is. The record parser then reports its
        position.
        """
        readers = [_number if key in features else _none_if_missing if key == time else str for key in keys]
        columns: frozenset[str] | None = None  # the columns of booleans, searched when the first boolean is read
        for record in self:
            if type(record) is not dict:
                yield record
                continue
            values = {key: read(cell) for key, read, cell in zip(keys, readers, record.values(), strict=True)}
            booleans = {key: value for key, value in values.items() if type(value) is bool}
            if booleans:
                columns = self._boolean_columns(keys, features) if columns is None else columns
                values |= {key: float(value) for key, value in booleans.items() if key in columns}
            yield values

    def _boolean_columns(self, keys: Sequence[str], features: Collection[str]) -> frozenset[str]:
        """Return the features that contain no number except 0 and 1."""
        others: set[str] = set()
        columns = [(index, key) for index, key in enumerate(keys) if key in features]
        for record in islice(self, self._budget.max_rows):
            self._budget.check_time()
            if type(record) is dict:
                cells = list(record.values())
                others |= {key for index, key in columns if _is_other_number(parse_cell(cells[index]))}
        return frozenset(key for _, key in columns) - others


def _is_other_number(value: float | bool | str) -> bool:
    """Return whether `value` is a number other than 0, 1 and NaN, which means a missing value."""
    return type(value) is float and value == value and value not in (0.0, 1.0)


def read_fields(body: bytes, budget: Budget = NO_LIMIT) -> RequestFields:
    """Return the lines of `body` after the header as the field `records`. Blank lines are skipped.

    Raises InvalidCsv if the header is missing or invalid. While the records are read, InvalidCsv is raised if too many
    quotations are invalid.
    """
    first = next(_records(body, budget), None)
    if first is None or isinstance(first, MalformedRow):
        raise InvalidCsv("the CSV has no header", expected="a first line that names the columns", got="none")
    header = [name.strip() for name in first]
    _check_header(header)
    records = CsvRecords(body, header, budget)
    return RequestFields({"records": records} if records else {}, may_contain_non_floats=True)


def read_rows(body: bytes, budget: Budget = NO_LIMIT) -> Iterator[list[Any] | MalformedRow]:
    """Yield the values of each line of a CSV without a header. A number is a float, and a missing value None."""
    for record in _records(body, budget):
        yield record if isinstance(record, MalformedRow) else [_number(cell) for cell in record]


def has_header(body: bytes, budget: Budget = NO_LIMIT) -> bool:
    """Return whether the first line of a CSV names the columns: whether some of its cells are texts."""
    first = next(read_rows(body, budget), None)
    return not isinstance(first, list) or any(type(value) is str for value in first)


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
    """An iterator over the lines of a body that can go back to an earlier line of the current record."""

    def __init__(self, body: bytes, budget: Budget) -> None:
        self._body = body
        self._budget = budget
        self._offset = len(BYTE_ORDER_MARK) if body.startswith(BYTE_ORDER_MARK) else 0  # where the next piece begins
        self._next: deque[str] = deque()  # decoded lines
        self._is_too_long = False  # whether the line after those in `_next` is too long and was dropped
        self.record: list[str] = []  # the lines of the current record
        self._record_length = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self._next:
            self._fill()
        if not self._next:
            if not self._is_too_long:
                raise StopIteration
            self._is_too_long = bool(self.record)  # a record that has begun fails now, and the line at the next call
            raise _TooLong
        self._record_length += len(self._next[0])
        if self.record and self._record_length > self._budget.max_row_bytes:
            raise _TooLong
        self.record.append(self._next.popleft())
        return self.record[-1]

    def begin_record(self) -> None:
        """Begin a record at the next line."""
        self.record = []
        self._record_length = 0

    def go_back(self) -> int:
        """Go back to the second line of the current record. Return the number of characters to read again."""
        again = self.record[1:]
        self._next.extendleft(reversed(again))
        return sum(map(len, again))

    def _fill(self) -> None:
        """Decode the next lines, at most PIECE_BYTES, or one line if it is longer."""
        body, limit = self._body, self._budget.max_row_bytes
        while not self._next and not self._is_too_long and self._offset < len(body):
            self._budget.check_time()
            start, piece_end = self._offset, self._offset + PIECE_BYTES
            end = body.rfind(b"\n", start, piece_end) + 1
            if not end:
                end = body.rfind(b"\r", start, piece_end - 1) + 1
            if not end:
                end = body.find(b"\n", start, start + limit) + 1
            if not end and len(body) - start <= limit:
                end = len(body)
            if not end:
                self._is_too_long = True
                self._offset = body.find(b"\n", start + limit) + 1 or len(body)
                return
            self._offset = end
            piece = body[start:end]
            if self.record or piece.strip(b"\r\n"):  # outside a quotation, a blank line is no record
                self._next.extend(io.StringIO(self._decode(piece), newline=""))

    def _decode(self, piece: bytes) -> str:
        try:
            return piece.decode()
        except UnicodeDecodeError:
            pass
        # Python replaces invalid bytes one by one. A long line is decoded in parts, so that no part holds the
        # interpreter lock for long.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        parts = []
        for start in range(0, len(piece), DECODED_BYTES):
            self._budget.check_time()
            parts.append(decoder.decode(piece[start : start + DECODED_BYTES]))
        return "".join([*parts, decoder.decode(b"", final=True)])


class _TooLong(Exception):
    """A record is longer than a row may be."""


def _records(body: bytes, budget: Budget) -> Iterator[list[str] | MalformedRow]:
    """Yield the cells of each record that is not blank, the header first.

    If a quotation is invalid, or probably spans several records, the line where it opens becomes a `MalformedRow`, and
    the next line is read as a new record. An invalid quotation therefore costs one row.

    Raises InvalidCsv if so many invalid quotations span so many lines that reading would take too long.
    """
    lines = _Lines(body, budget)
    may_reread = FREE_REREAD + MAX_REREAD * len(body)  # characters
    reader = csv.reader(lines, strict=True, skipinitialspace=True)
    width: int | None = None  # the number of values in the header
    while True:
        budget.check_time()
        lines.begin_record()
        fault = None
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = _invalid_quotation(str(error))
        except _TooLong:
            fault = _too_long(budget.max_row_bytes)
        else:
            if len(lines.record) > 1 and width is not None and _spans_records(record, lines.record, width):
                fault = _invalid_quotation("a quotation spans several lines")
        if fault:
            may_reread -= lines.go_back()
            if may_reread < 0:
                raise InvalidCsv(
                    "too many quotations in the CSV are invalid",
                    expected=QUOTATION_RULE,
                    hint="write the file with a CSV library",
                )
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


def _too_long(limit: int) -> MalformedRow:
    expected = f"at most {limit} bytes"
    return MalformedRow(f"the line is too long: expected {expected}", expected, "a longer line")


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


def _number(cell: str) -> float | bool | str | None:
    value = parse_cell(cell)
    return None if value != value else value


def _none_if_missing(cell: str) -> str | None:
    return None if cell.strip().lower() in MISSING else cell
