"""Every reader takes `ReadOptions` and returns a `RawTable`, whose numbers are not checked yet."""

import csv
import io
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training.data.row_store import FileArray

Array = np.ndarray[Any, Any]
Block = tuple[Array, Array | None]  # rows [n, D] of any real dtype, and their labels [n] if the source has labels


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Which columns to read, and how to convert images."""

    names: Sequence[str] | None = None  # columns to read, in this order; None for all; ignored by sources without names
    drop: Sequence[str] = ()  # columns to leave out
    keep: Sequence[str] = ()  # columns to accept even if they look like identifiers
    size: tuple[int, int] | None = None  # height and width to which images are resized
    shape: tuple[int, ...] | None = None  # shape of one row, if a model requires it
    pixel_range: tuple[float, float] | None = None  # values of black and white, if a model requires them


@dataclass(frozen=True, kw_only=True)
class RawTable:
    """An opened source. Its rows are read while `blocks` is iterated."""

    blocks: Iterator[Block]  # iteration raises DataError if the source is damaged or does not contain numbers
    shape: tuple[int, ...]  # shape of one row; the product is D
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))  # a dtype that can store all values
    rows: int | None = None  # number of rows N, if known in advance; an estimate for CSV
    names: list[str] | None = None  # names of the D columns, if the source has names
    units: list[str | None] | None = None
    pixel_range: tuple[float, float] | None = None
    first_line: int | None = None  # line number of row 0 if the source is a text file, else None
    label_names: list[str] | None = None  # the meaning of labels 0, 1, ...
    notes: list[str] = field(default_factory=list)  # notes for the user; complete when all blocks have been read
    file_array: FileArray | None = None  # values [N, D] in the source file, if the rows can be read in any order


def describe_row(row: int, first_line: int | None) -> str:
    """Return how a message refers to `row`, counted from 0: `row 3`, or `row 3 (line 5)` for a text file."""
    return f"row {row}" if first_line is None else f"row {row} (line {row + first_line})"


def format_option(option: str, columns: Sequence[str]) -> str:
    """Return the command-line option for these columns, quoted for a shell, such as --drop 'b c,d'."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(columns)
    return f"{option} {shlex.quote(text.getvalue())}"
