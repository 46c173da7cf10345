"""Read CSV files in pieces that end at the end of a record.

polars reads the pieces without quotation marks, in which every line is a record. Python's csv module in strict mode
reads the other pieces, because polars swallows lines without an error if a quotation mark inside a cell is not doubled.
"""

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from models.columns import is_number, swallows_lines
from training.data.line_numbers import LineNumbers
from training.data.readers.columns import (
    build_raw_table,
    choose_columns,
    choose_condition_columns,
    choose_label_column,
    choose_timeline_columns,
)
from training.data.readers.raw_table import BlockDetails, RawTable, ReadOptions, SourcePart
from training.errors import DataError

if TYPE_CHECKING:
    from _csv import Reader

    import polars as pl

PIECE_BYTES = 2 << 20
MAX_LINE_BYTES = 64 << 20
MAX_REREAD_LINES = 1_000_000  # limits the time for a file in which many quotations swallow many lines
MAX_SHOWN_LINES = 100  # a record of more lines is judged by its first ones
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some programs write it before UTF-8 text
SEPARATOR_LINE = ["sep=", ""]  # the line `sep=,`, from which Excel reads the separator


def read_csv(path: Path, options: ReadOptions) -> RawTable:
    """Return the columns of a CSV file in UTF-8 with a header. Lines end in LF, CRLF or CR. Blank lines are skipped.

    A line may end with a separator: a value more than the header has is ignored if it is empty.

    Raises:
        DataError: the file is not CSV in UTF-8 with a header, or its columns are not as the options require.
    """
    details = BlockDetails()
    reader = _CsvReader(path, options.escape, details.faults if options.tolerant else None, options.part)
    columns = choose_columns(reader.header, path, options, typed=False)
    if options.part is not None:
        texts = {*options.extra, *(category.name for category in options.categories)}
        reader.numbers = {column.index for column in columns if column.name not in texts}
    labels = choose_label_column(reader.header, path, options)
    return build_raw_table(
        reader.frames(),
        columns,
        labels,
        options,
        path,
        reader.estimated_rows,
        lines=reader.lines,
        notes=reader.notes,
        details=details,
        timeline=choose_timeline_columns(reader.header, path, options),
        conditions=choose_condition_columns(reader.header, path, options),
    )


class CsvHead(NamedTuple):
    """What must be known of a CSV file before its rows are read."""

    columns: int
    lines: int  # number of lines up to the end of the header
    newline: bytes


def read_csv_head(path: Path, escape: str | None) -> CsvHead:
    """Read the header of a CSV file.

    Raises:
        DataError: the file has no header, or is not UTF-8.
    """
    reader = _CsvReader(path, escape)
    return CsvHead(len(reader.header), reader.header_lines, reader.newline)


class _LineSource:
    """The lines of an open file, as bytes with their line ends, one by one or many at once.

    Args:
        stop: the position in the file where the lines end; None for the end of the file.
    """

    def __init__(self, file: BinaryIO, path: Path, stop: int | None = None) -> None:
        self._file, self._path = file, path
        self._left = sys.maxsize if stop is None else stop - file.tell()  # number of bytes that may still be read
        self._content = self._read()
        while self._content.startswith(BYTE_ORDER_MARK):
            self._content = self._content.removeprefix(BYTE_ORDER_MARK)
        self.newline = b"\r" if b"\n" not in self._content and b"\r" in self._content else b"\n"

    def line(self) -> bytes:
        """Return the next line, or b"" at the end of the file."""
        end = self._content.find(self.newline) + 1
        while not end and self._read_more():
            end = self._content.find(self.newline) + 1
        return self._take(end or len(self._content))

    def piece(self) -> bytes:
        """Return all lines that end in the next PIECE_BYTES of the file, at least one; b"" at the end of the file."""
        if len(self._content) < PIECE_BYTES:
            self._read_more()
        end = self._content.rfind(self.newline) + 1
        while not end and self._read_more():
            end = self._content.rfind(self.newline) + 1
        return self._take(end or len(self._content))

    def _read_more(self) -> bool:
        if len(self._content) > MAX_LINE_BYTES:
            raise DataError(f"{self._path} has a line of more than {MAX_LINE_BYTES >> 20} MiB: expected CSV")
        more = self._read()
        self._content += more
        return bool(more)

    def _read(self) -> bytes:
        content = self._file.read(min(PIECE_BYTES, self._left))
        self._left -= len(content)
        return content

    def _take(self, end: int) -> bytes:
        taken, self._content = self._content[:end], self._content[end:]
        return taken


class _CsvReader:
    """Reads the records of one CSV file. Lines are counted from 1, and rows from 0.

    Args:
        escape: how a quotation mark inside a quoted cell is written; None if unknown.
        faults: if given, a row that cannot be read is recorded here by number, and read as missing values: one with
            too many or too few values, or one whose quotation does not end where a cell ends. Such a row is one line.
    """

    def __init__(
        self, path: Path, escape: str | None, faults: dict[int, str] | None = None, part: SourcePart | None = None
    ) -> None:
        self._path, self._escape, self._faults, self._part = path, escape, faults, part
        self.numbers: set[int] = set()  # the columns that are read as numbers if all their cells are numbers or empty
        self._reread_lines = 0  # number of lines that were read again after a faulty record
        self.lines = LineNumbers()  # complete when all frames have been read
        self.notes: list[str] = []  # likewise
        self._blank_lines = 0
        with path.open("rb") as file:
            source = _LineSource(file, path)
            self.header, self.header_lines = self._read_header(source)
            self.newline = source.newline
            sample = source.piece()
        newlines = sample.count(b"\n") or sample.count(b"\r")
        size = path.stat().st_size if part is None else part.stop - part.start
        self.estimated_rows = round(newlines / max(1, len(sample)) * size)

    def frames(self) -> Iterator["pl.DataFrame"]:
        """Yield the rows as text. Empty rows at the end of the file, such as `,,`, are not rows.

        A part of the file ends before such rows, so all its rows are yielded.
        """
        import polars as pl

        if self._part is not None:
            yield from self._all_frames()
            return
        blank = pl.DataFrame(schema=dict.fromkeys(map(str, range(len(self.header))), pl.String))
        for new in self._all_frames():
            frame = pl.concat([blank, new])
            filled = frame.select(pl.any_horizontal((pl.all() != "").fill_null(value=False)).arg_true()).to_series()
            end = int(filled[-1]) + 1 if len(filled) else 0
            blank = frame[end:]  # kept until a filled row follows
            if end:
                yield frame[:end]
        if self._blank_lines:
            self.notes.append(f"blank lines are skipped: {self._blank_lines:,}")

    def _all_frames(self) -> Iterator["pl.DataFrame"]:
        row = blank_lines = 0
        with self._path.open("rb") as file:
            if self._part is None:
                source, line = _LineSource(file, self._path), self.header_lines + 1
                for _ in range(self.header_lines):
                    source.line()
            else:
                file.seek(self._part.start)
                source, line = _LineSource(file, self._path, self._part.stop), self._part.first_line
            while piece := source.piece():
                if b'"' in piece or (self._escape == "backslash" and b"\\" in piece):
                    records = self._read_quoted(piece, source, line, row)
                else:
                    records = self._read_plain(piece, line, row)
                if len(records.lines):
                    self.lines.extend(row, records.lines)
                    self._blank_lines += blank_lines + records.blank_before
                    blank_lines = 0
                    row += len(records.lines)
                    yield records.frame
                blank_lines += records.blank_after
                line += records.lines_read

    # Header

    def _read_header(self, source: _LineSource) -> tuple[list[str], int]:
        """Return the column names and the number of the header's last line."""
        try:
            rows = self._csv(_decoded(iter(source.line, b"")))
            header: list[str] = next((row for row in rows if not _is_blank(row) and row != SEPARATOR_LINE), [])
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path} is not UTF-8 text: save it as CSV in UTF-8") from error
        except csv.Error as error:
            raise DataError(f"{self._path}: the header is not valid CSV ({error}): correct the first line") from error
        if any("\0" in name for name in header):  # UTF-16 without a mark, if all characters are ASCII
            raise DataError(f"{self._path} is not UTF-8 text: save it as CSV in UTF-8")
        if not header:
            raise DataError(f"{self._path} is empty: expected a header line with column names, then rows of numbers")
        if len(header) > 1 and not header[-1].strip():
            header.pop()  # every line ends with a separator
        if len(header) == 1:
            for separator, word in SEPARATORS.items():
                if separator in header[0]:
                    raise DataError(f"{self._path} separates its columns by {word}: expected commas; convert it")
        self._refuse_numbers(header)
        return header, rows.line_num

    def _refuse_numbers(self, header: Sequence[str]) -> None:
        """Raise DataError if the first line contains measurements instead of names.

        Names may be numbers if they count up in steps of 1. pandas writes such names if the columns have none, and
        years can be names, too.
        """
        numbers = [float(name) for name in header if is_number(name)]
        counted = len(numbers) > 1 and all(b - a == 1 for a, b in pairwise(numbers))
        if len(numbers) == len(header):
            counted = header in [[str(start + i) for i in range(len(header))] for start in (0, 1)]
        if numbers and not counted:
            number = next(name for name in header if is_number(name))
            where = "numbers" if len(numbers) == len(header) else f"the number {number.strip()}"
            raise DataError(
                f"{self._path} has {where} in its first line: expected a header; put column names above the rows"
            )

    # Records

    def _csv(self, lines: Iterator[str], escape: str | None = None) -> "Reader":
        escaped = (escape or self._escape) == "backslash"
        return csv.reader(lines, strict=True, skipinitialspace=True, escapechar="\\" if escaped else None)

    def _read_plain(self, piece: bytes, first_line: int, first_row: int) -> "_Records":
        """Read a piece without quotation marks."""
        if b"\r" in piece:
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        count = piece.count(b"\n") + (not piece.endswith(b"\n"))
        lines = np.arange(first_line, first_line + count)
        if piece.startswith((b"\n", b" ", b"\t")) or b"\n\n" in piece or b"\n " in piece or b"\n\t" in piece:
            texts = piece.split(b"\n")[:count]
            filled = np.array([bool(text.strip()) for text in texts])
            piece, lines = b"\n".join(text for text in texts if text.strip()), lines[filled]
        if not len(lines):
            return _Records.of([], lines, count, 0, count, len(self.header))
        frame = self._read_lines(piece, lines, first_row)
        blank_after = first_line + count - 1 - int(lines[-1])
        return _Records(frame, lines, count, count - len(lines) - blank_after, blank_after)

    def _read_lines(self, piece: bytes, lines: npt.NDArray[np.int64], first_row: int) -> "pl.DataFrame":
        """Return the records of a piece. Each line is one record; `lines` has their numbers."""
        import polars as pl

        header = ",".join(map(str, range(len(self.header)))).encode() + b"\n"
        frame = self._read_numbers(header + piece)
        if self._faults is not None and not _is_complete(frame, len(lines)):
            regular = self._replace_ragged(piece, first_row).decode(errors="replace").encode()
            if regular != piece:
                piece, frame = regular, self._read_numbers(header + regular)
        try:
            if frame is None:
                frame = pl.read_csv(header + piece, infer_schema=False, quote_char=None)
        except pl.exceptions.PolarsError as error:
            self._refuse_other_encoding(piece, lines)
            shorter = b"\n".join(self._without_last_separator(text) for text in piece.split(b"\n"))
            self._refuse_ragged(shorter, lines)
            try:
                frame = pl.read_csv(header + shorter, infer_schema=False, quote_char=None)
            except pl.exceptions.PolarsError:
                raise self._invalid(str(error).splitlines()[0]) from error
        if not _is_complete(frame, len(lines)):
            self._refuse_ragged(piece, lines)
        if len(frame) != len(lines):
            raise self._invalid(f"{len(lines)} lines contain {len(frame)} records")
        return frame

    def _read_numbers(self, content: bytes) -> "pl.DataFrame | None":
        """Read the columns `numbers` of a piece as numbers. Return None if a cell in them is neither number nor empty.

        This takes half of the time of reading them as text first.
        """
        import polars as pl

        if not self.numbers:
            return None
        types: dict[str, Any] = {
            str(index): pl.Float64 if index in self.numbers else pl.String for index in range(len(self.header))
        }
        try:
            return pl.read_csv(content, schema=types, quote_char=None)
        except pl.exceptions.PolarsError:
            return None

    def _read_quoted(self, piece: bytes, source: _LineSource, first_line: int, first_row: int) -> "_Records":
        """Read a piece with quotation marks, and further lines of `source` if its last record continues in them."""
        if self._faults is None:
            self._refuse_other_encoding(piece, range(first_line, first_line + piece.count(b"\n") + 1))
        texts = list(io.StringIO(piece.decode(errors="replace"), newline=""))
        count = len(texts)
        rest = _appended_to(texts, self._further_lines(source))
        cells: list[list[str]] = []
        lines: list[int] = []
        blank_before = blank_after = start = 0
        records, origin = self._csv(chain(texts[:], rest)), 0  # origin: the line of `texts` where `records` starts
        while start < count:
            line, end = first_line + start, start + 1
            try:
                record = self._next_record(records, texts[start : start + MAX_SHOWN_LINES], line)
                end = origin + records.line_num
            except DataError as error:
                self._reread_lines += origin + records.line_num - end
                if self._faults is None or self._reread_lines > MAX_REREAD_LINES:
                    raise
                # Only the line where the record starts is faulty: its quotation may have swallowed the lines after it.
                self._faults[first_row + len(cells)] = str(error).removeprefix(f"{self._path}: ")
                record, origin, count = self._filler(), end, len(texts)
                records = self._csv(chain(map(texts.__getitem__, range(end, count)), rest))
            if record:
                cells.append(record)
                lines.append(line)
                blank_before, blank_after = blank_before + blank_after, 0
            else:
                blank_after += 1
            start = end
        return _Records.of(cells, np.array(lines, np.int64), start, blank_before, blank_after, len(self.header))

    def _next_record(self, records: "Reader", texts: list[str], line: int) -> list[str]:
        """Return the next record, or [] for a blank line.

        Args:
            texts: the line where the record starts, and lines after it.
            line: the number of that line.

        Raises:
            DataError: the record is not valid CSV, or does not fit the header.
        """
        before = records.line_num
        try:
            record: list[str] = next(records, [])
        except csv.Error as error:
            raise self._invalid_record(texts, line, error) from error
        count = records.line_num - before
        if _is_blank(record) and count <= 1:
            return []
        if len(record) == len(self.header) + 1 and not record[-1].strip():
            record.pop()  # every line ends with a separator
        self._refuse_width(len(record), line)
        if count > 1 and self._escape is None:
            self._refuse_swallowed(record, texts[:count], count, line)
        return record

    def _further_lines(self, source: _LineSource) -> Iterator[str]:
        """Yield the lines of `source` as text."""
        errors = "strict" if self._faults is None else "replace"
        try:
            for line in iter(source.line, b""):
                yield line.decode(errors=errors)
        except UnicodeDecodeError as error:
            raise self._invalid(str(error)) from error

    def _refuse_other_encoding(self, piece: bytes, lines: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Raise DataError if `piece`, whose lines have the numbers `lines`, is not UTF-8."""
        try:
            piece.decode()
        except UnicodeDecodeError as error:
            line = lines[piece.count(b"\n", 0, error.start)]
            raise DataError(f"{self._path}: line {line} is not UTF-8 text: save the file as CSV in UTF-8") from error

    def _refuse_swallowed(self, record: list[str], texts: list[str], count: int, line: int) -> None:
        """Raise DataError if `record`, whose first lines are `texts`, is probably several records."""
        if swallows_lines(record, texts):
            raise DataError(
                f"{self._path}: the quotation that opens in line {line} ends in line {line + count - 1}, but these "
                f"lines look like rows of {len(self.header)} values: write a quotation mark inside a cell twice; "
                f"add --escape double if the cell does contain line ends{self._or_backslash(texts)}"
            )

    def _invalid_record(self, texts: list[str], line: int, error: csv.Error) -> DataError:
        """Return the error for the record that starts with `texts`, at `line`."""
        what = "opens a quotation that does not end where a cell ends"
        if "field limit" in str(error) or "end of data" in str(error):
            what = "opens a quotation that does not end"
        advice = "write a quotation mark inside a quoted cell twice"
        return DataError(f"{self._path}: line {line} {what}: {advice}{self._or_backslash(texts)}")

    def _or_backslash(self, texts: list[str]) -> str:
        """Return the advice to add --escape backslash if the record that starts with `texts` can be read with it."""
        if self._escape is None and '\\"' in "".join(texts):
            with suppress(csv.Error):
                if len(next(self._csv(iter(texts), "backslash"), [])) == len(self.header):
                    return ', or add --escape backslash, which reads \\" as a quotation mark'
        return ""

    def _refuse_ragged(self, piece: bytes, lines: npt.NDArray[np.int64]) -> None:
        for line, text in zip(lines.tolist(), piece.split(b"\n"), strict=False):
            self._refuse_width(text.count(b",") + 1, line)

    def _replace_ragged(self, piece: bytes, first_row: int) -> bytes:
        """Return `piece` with missing values in place of the lines with too many or too few values."""
        assert self._faults is not None
        if _have_separators(piece, len(self.header) - 1):
            return piece
        lines = piece.split(b"\n")
        for index, line in enumerate(lines):
            width = line.count(b",") + 1
            if line and width != len(self.header):
                shorter = self._without_last_separator(line)
                if shorter is line:
                    self._faults[first_row + index] = self._width_fault(width)
                    shorter = ",".join(self._filler()).encode()
                lines[index] = shorter
        return b"\n".join(lines)

    def _without_last_separator(self, line: bytes) -> bytes:
        """Return `line` without the separator at its end if the line has one value more than the header."""
        cells, _, last = line.rpartition(b",")
        return line if last.strip() or line.count(b",") != len(self.header) else cells

    def _filler(self) -> list[str]:
        """Return the cells of a row without values. The first cell is not empty, so the row is not a blank line."""
        return ["nan", *[""] * (len(self.header) - 1)]

    def _width_fault(self, width: int) -> str:
        return f"the line has {width} values, but the header has {len(self.header)}"

    def _refuse_width(self, width: int, line: int) -> None:
        if width != len(self.header):
            raise DataError(
                f"{self._path}: line {line} has {width} values, but the header has {len(self.header)}: correct the line"
            )

    def _invalid(self, reason: str) -> DataError:
        return DataError(f"{self._path} is not valid CSV in UTF-8 ({reason}): write it again")


@dataclass(frozen=True)
class _Records:
    """The rows of one piece, all columns as text."""

    frame: "pl.DataFrame"
    lines: npt.NDArray[np.int64]  # the line number where each row starts
    lines_read: int
    blank_before: int  # number of blank lines before the last row
    blank_after: int  # number of blank lines after the last row

    @classmethod
    def of(
        cls,
        cells: list[list[str]],
        lines: npt.NDArray[np.int64],
        lines_read: int,
        blank_before: int,
        blank_after: int,
        width: int,
    ) -> "_Records":
        """Return the records with these cells, [N][width]."""
        import polars as pl

        columns = list(zip(*cells, strict=True)) or [()] * width
        frame = pl.DataFrame([pl.Series(str(i), column, dtype=pl.String) for i, column in enumerate(columns)])
        return cls(frame, lines, lines_read, blank_before, blank_after)


def _is_complete(frame: "pl.DataFrame | None", rows: int) -> bool:
    """Return whether a frame has this number of rows, and a value in each cell, so that no line was too short."""
    return frame is not None and len(frame) == rows and not any(column.null_count() for column in frame)


def _have_separators(piece: bytes, count: int) -> bool:
    """Return whether every line of `piece` has `count` commas."""
    content = np.frombuffer(piece, np.uint8)
    commas, ends = np.flatnonzero(content == ord(",")), np.flatnonzero(content == ord("\n"))
    if not piece.endswith(b"\n"):
        ends = np.append(ends, len(content))
    counts = np.diff(np.searchsorted(commas, ends), prepend=0)  # [lines]
    return bool((counts == count).all())


def _appended_to(texts: list[str], lines: Iterator[str]) -> Iterator[str]:
    """Yield `lines`, and append each of them to `texts`."""
    for line in lines:
        texts.append(line)
        yield line


def _decoded(lines: Iterator[bytes]) -> Iterator[str]:
    return (line.decode() for line in lines)


def _is_blank(record: list[str]) -> bool:
    return not record or (len(record) == 1 and not record[0].strip())
