"""CSV with a header line. Each further line is a record. An invalid line does not affect the other lines."""

import csv
import io
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from models.columns import MISSING, parse_cell
from service.codec.request_body import RequestFields
from service.codec.row_errors import MalformedRow
from service.errors import InvalidCsv

MEDIA_TYPE = "text/csv"


class CsvRecords(list[Any]):
    """Records whose values are still text, and a `MalformedRow` for each line that does not fit the header."""

    def __init__(self, records: Iterator[Any], header: list[str]) -> None:
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
    """Return the lines of `body` after the header as the field `records`.

    Raises InvalidCsv if the header is missing or invalid.
    """
    text = io.StringIO(body.decode("utf-8-sig", errors="replace"), newline="")
    lines = _lines(csv.reader(text))
    first = next((line for line in lines if line), None)
    if first is None or isinstance(first, MalformedRow):
        raise InvalidCsv("the CSV has no header", expected="a first line that names the columns", got="none")
    header = [name.strip() for name in first]
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
