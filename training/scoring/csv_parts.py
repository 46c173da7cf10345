"""Divide a CSV file into parts of whole lines, which can be read in any order."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from training.data.readers.csv_text import read_csv_head

PIECE_BYTES = 4 << 20
LINE_END = ord("\n")
# Lines whose quotations all begin and end at the borders of a cell, within their line. Every line is then one record.
REGULAR = re.compile(rb'(?:(?: *+"(?:[^"\n]|"")*+"|[^",\n]*+)[,\n])*+(?: *+"(?:[^"\n]|"")*+"|[^",\n]*+)')
QUOTED_BLANK = re.compile(rb'(?:^|\n) *"[ \t]*"(?:\n|$)')  # a line that is no row, because its only cell is blank


class CsvPart(NamedTuple):
    """Whole lines of a CSV file."""

    start: int  # position of the first byte
    stop: int  # position after the last byte
    first_line: int
    first_row: int
    rows: int


def divide_csv(path: Path, escape: str | None, part_rows: int) -> list[CsvPart] | None:
    """Return parts of at least `part_rows` rows, except the last. Together they have all rows of the file.

    Return None if the lines of the file may not be its records: a quotation contains a line end or is not valid, a
    line is only a blank quotation, or lines end in CR alone. Only a reader that starts at the beginning can find the
    rows of such a file.
    """
    head = read_csv_head(path, escape)
    if head.newline != b"\n":
        return None
    parts: list[CsvPart] = []
    with path.open("rb") as file:
        for _ in range(head.lines):
            file.readline()
        start = last = file.tell()  # start: of the part; last: the position after the last row that is not empty
        line = first_line = head.lines + 1
        row = first_row = last_row = 0
        for piece in _pieces(file, part_rows):
            text = _as_lines(piece, escape, head.columns)
            if text is None:
                return None
            line_ends, rows = _count(text)
            if (filled := len(piece.rstrip(b',"\r\n'))) > 0:
                end = piece.find(b"\n", filled) + 1 or len(piece)
                last = file.tell() - len(piece) + end
                last_row = row + (rows if end == len(piece) else _count(piece[:end].replace(b"\r\n", b"\n"))[1])
            line, row = line + line_ends, row + rows
            if row - first_row >= part_rows:
                parts.append(CsvPart(start, file.tell(), first_line, first_row, row - first_row))
                start, first_line, first_row = file.tell(), line, row
    parts.append(CsvPart(start, last, first_line, first_row, row - first_row))
    return _without_empty_end(parts, last, last_row)


def _pieces(file: BinaryIO, part_rows: int) -> Iterator[bytes]:
    """Yield the rest of the file in pieces of whole lines.

    A piece has about 64 bytes for each of `part_rows` rows, but at most PIECE_BYTES. A part ends with a piece, so the
    smaller the piece, the fewer rows a part has in excess.
    """
    size = min(PIECE_BYTES, 64 * part_rows)
    while piece := file.read(size):
        yield piece if piece.endswith(b"\n") else piece + file.readline()


def _as_lines(piece: bytes, escape: str | None, columns: int) -> bytes | None:
    """Return `piece` with LF instead of CRLF at the ends of lines; None if its lines may not be its records."""
    text = piece.replace(b"\r\n", b"\n") if b"\r" in piece else piece
    if b"\r" in text or (escape == "backslash" and b"\\" in text):
        return None
    if b'"' in text and (columns == 1 or QUOTED_BLANK.search(text) or not REGULAR.fullmatch(text)):
        return None
    return text


def _count(text: bytes) -> tuple[int, int]:
    """Return the number of line ends in `text`, and the number of lines that are not blank."""
    content = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(content == LINE_END)
    following = content[ends[: len(ends) - text.endswith(b"\n")] + 1]  # the first character of each line but the first
    may_be_blank = (following == LINE_END) | (following == ord(" ")) | (following == ord("\t"))
    if text.startswith((b"\n", b" ", b"\t")) or may_be_blank.any():
        return len(ends), sum(bool(line.strip()) for line in text.split(b"\n"))
    return len(ends), len(ends) + bool(text and not text.endswith(b"\n"))


def _without_empty_end(parts: list[CsvPart], last: int, last_row: int) -> list[CsvPart]:
    """Return `parts` without the empty rows at the end of the file, such as `,,`, which are not rows.

    Args:
        last: the position after the last row that is not empty.
        last_row: the number of rows up to this position.
    """
    return [
        part._replace(stop=min(part.stop, last), rows=min(part.rows, last_row - part.first_row))
        for part in parts
        if part.start < last and part.first_row < last_row
    ]
