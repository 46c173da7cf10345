"""Read CSV files in pieces that end at the end of a line."""

import csv
import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from training.data.readers.columns import build_raw_table, choose_columns
from training.data.readers.raw_table import RawTable, ReadOptions
from training.errors import DataError

if TYPE_CHECKING:
    import polars as pl

PIECE_BYTES = 2 << 20
MAX_PIECE_BYTES = 32 * PIECE_BYTES  # size at which a piece is cut even if a quotation is open
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some programs write it before UTF-8 text


def read_csv(path: Path, options: ReadOptions) -> RawTable:
    """Return the columns of a CSV file in UTF-8 with a header.

    Raises:
        DataError: the file is not CSV in UTF-8 with a header, or its columns are not as the options require.
    """
    with path.open("rb") as file:
        header, header_end = _read_header(file, path)
        start = file.tell()
        sample = file.read(PIECE_BYTES)
    estimated_rows = round(sample.count(b"\n") / max(1, len(sample)) * (path.stat().st_size - start))
    columns = choose_columns(header, path, options, typed=False)
    indices = [column.index for column in columns]
    frames = (frame[:, indices] for frame in _read_frames(path, start, len(header), header_end))
    return build_raw_table(frames, columns, options, path, estimated_rows, first_line=header_end + 1)


def _read_header(file: IO[bytes], path: Path) -> tuple[list[str], int]:
    """Return the column names and the number of the header's last line. Leave `file` at the line after the header."""

    def lines() -> Iterator[str]:
        yield file.readline().removeprefix(BYTE_ORDER_MARK).decode()
        while line := file.readline():
            yield line.decode()

    try:
        rows = csv.reader(lines())
        header = next((row for row in rows if row), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not UTF-8 text: save it as CSV in UTF-8") from error
    if not header:
        raise DataError(f"{path} is empty: expected a header line with column names, then rows of numbers")
    if len(header) == 1:
        for separator, word in SEPARATORS.items():
            if separator in header[0]:
                raise DataError(f"{path} separates its columns by {word}: expected commas; convert it")
    # A header that counts the columns from 0 or 1 is allowed: pandas writes it if the columns have no names.
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


def _read_pieces(path: Path, start: int) -> Iterator[bytes]:
    """Yield the bytes from `start` on, in pieces. Each piece ends at the end of a line, outside any quotation."""
    with path.open("rb") as file:
        file.seek(start)
        rest = b""
        while content := file.read(PIECE_BYTES):
            rest += content
            cut = rest.rfind(b"\n") + 1
            quotes = rest.count(b'"', 0, cut)
            while quotes % 2:  # a quotation is open at the cut: move the cut to the line end before the quotation
                opened = rest.rfind(b'"', 0, cut)
                before = rest.rfind(b"\n", 0, opened) + 1
                quotes -= rest.count(b'"', before, cut)
                cut = before
            if len(rest) > MAX_PIECE_BYTES:
                cut = cut or len(rest)
            if cut:
                yield rest[:cut]
                rest = rest[cut:]
        if rest:
            yield rest


def _read_frames(path: Path, start: int, width: int, line: int) -> Iterator["pl.DataFrame"]:
    """Yield the rows as text, with null for an empty cell. Empty lines at the end of the file are not rows.

    Args:
        line: the number of the last line before `start`, counted from 1.
    """
    import polars as pl

    names = [str(index) for index in range(width)]
    blank = pl.DataFrame(schema=dict.fromkeys(names, pl.String))  # trailing empty rows, kept until a filled row follows
    for piece in _read_pieces(path, start):
        try:
            frame = pl.read_csv(",".join(names).encode() + b"\n" + piece, infer_schema=False)
        except pl.exceptions.PolarsError as error:
            _refuse_ragged_lines(piece, width, path, line)
            reason = str(error).splitlines()[0]
            raise DataError(f"{path} is not valid CSV in UTF-8 ({reason}): write it again") from error
        if any(column.null_count() for column in frame):
            _refuse_ragged_lines(piece, width, path, line)
        line += piece.count(b"\n")
        frame = pl.concat([blank, frame])
        filled = frame.select(pl.any_horizontal(pl.all().is_not_null()).arg_true()).to_series()
        end = int(filled[-1]) + 1 if len(filled) else 0
        blank = frame[end:]
        if end:
            yield frame[:end]


def _refuse_ragged_lines(piece: bytes, width: int, path: Path, line: int) -> None:
    """Raise DataError for the first line of `piece` that has more or fewer values than the header.

    Args:
        line: the number of the last line before the piece, counted from 1.
    """
    with suppress(csv.Error):
        rows = csv.reader(io.StringIO(piece.decode(errors="replace"), newline=""))
        for row in rows:
            if row and len(row) != width:
                number = line + rows.line_num
                raise DataError(
                    f"{path}: line {number} has {len(row)} values, but the header has {width}: correct the line"
                )
