"""CSV files, read piece by piece, each a whole number of lines."""

import csv
import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from training.data.readers.columns import choose_columns, raw_table
from training.data.readers.source import RawTable, ReadOptions
from training.errors import DataError

if TYPE_CHECKING:
    import polars as pl

PIECE_BYTES = 2 << 20
LONGEST = 32 * PIECE_BYTES  # of a piece in which a quotation is still open
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
MARK = b"\xef\xbb\xbf"  # the byte order mark that some programs put before UTF-8


def read_csv(path: Path, request: ReadOptions) -> RawTable:
    """The columns of a CSV file in UTF-8 with a header. Raises DataError."""
    with path.open("rb") as file:
        header, lines = _header(file, path)
        start = file.tell()
        sample = file.read(PIECE_BYTES)
    rows = round(sample.count(b"\n") / max(1, len(sample)) * (path.stat().st_size - start))
    columns = choose_columns(header, path, request, typed=False)
    frames = _frames(path, start, len(header), lines)
    chosen = [column.index for column in columns]
    return raw_table((frame[:, chosen] for frame in frames), columns, request, path, rows, first_line=lines + 1)


def _header(file: IO[bytes], path: Path) -> tuple[list[str], int]:
    """The column names, and the number of the line in which they end; the file is left just behind it."""

    def text() -> Iterator[str]:
        yield file.readline().removeprefix(MARK).decode()
        while line := file.readline():
            yield line.decode()

    try:
        rows = csv.reader(text())
        header = next((row for row in rows if row), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no UTF-8 text: save it as CSV in UTF-8") from error
    if not header:
        raise DataError(f"{path} is empty: expected a header line with column names, then rows of numbers")
    if len(header) == 1:
        for separator, word in SEPARATORS.items():
            if separator in header[0]:
                raise DataError(f"{path} separates its columns by {word}: expected commas; convert it")
    positions = [[str(start + i) for i in range(len(header))] for start in (0, 1)]
    if all(_is_number(name) for name in header) and header not in positions:
        raise DataError(f"{path} has numbers in its first line: expected a header; put column names above the rows")
    return header, rows.line_num


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _pieces(path: Path, start: int) -> Iterator[bytes]:
    """The bytes from `start` on, cut behind ends of line that are in no quotation."""
    with path.open("rb") as file:
        file.seek(start)
        rest = b""
        while content := file.read(PIECE_BYTES):
            rest += content
            cut = rest.rfind(b"\n") + 1
            quotes = rest.count(b'"', 0, cut)
            while quotes % 2:  # go back before the quotation that is open there
                opened = rest.rfind(b'"', 0, cut)
                before = rest.rfind(b"\n", 0, opened) + 1
                quotes -= rest.count(b'"', before, cut)
                cut = before
            if len(rest) > LONGEST:
                cut = cut or len(rest)
            if cut:
                yield rest[:cut]
                rest = rest[cut:]
        if rest:
            yield rest


def _frames(path: Path, start: int, width: int, line: int) -> Iterator["pl.DataFrame"]:
    """The rows as text, null where a cell is empty; empty lines at the end of the file are no rows."""
    import polars as pl

    names = [str(index) for index in range(width)]
    blank = pl.DataFrame(schema=dict.fromkeys(names, pl.String))
    for piece in _pieces(path, start):
        try:
            frame = pl.read_csv(",".join(names).encode() + b"\n" + piece, infer_schema=False)
        except pl.exceptions.PolarsError as error:
            _refuse_ragged(piece, width, path, line)
            complaint = str(error).splitlines()[0]
            raise DataError(f"{path} is no valid CSV in UTF-8 ({complaint}): write it again") from error
        if any(column.null_count() for column in frame):
            _refuse_ragged(piece, width, path, line)
        line += piece.count(b"\n")
        frame = pl.concat([blank, frame])
        filled = frame.select(pl.any_horizontal(pl.all().is_not_null()).arg_true()).to_series()
        end = int(filled[-1]) + 1 if len(filled) else 0
        blank = frame[end:]
        if end:
            yield frame[:end]


def _refuse_ragged(piece: bytes, width: int, path: Path, line: int) -> None:
    """Name the first line whose number of fields is not the header's; `line` is the number of the one before."""
    with suppress(csv.Error):
        rows = csv.reader(io.StringIO(piece.decode(errors="replace"), newline=""))
        for row in rows:
            if row and len(row) != width:
                number = line + rows.line_num
                raise DataError(
                    f"{path}: line {number} has {len(row)} values, the header has {width}: correct the line"
                )
