"""What every reader gives: blocks of raw numbers, unchecked, and what the source says about them."""

import csv
import io
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training.data.row_store import FileArray

Array = np.ndarray[Any, Any]
Block = tuple[Array, Array | None]  # rows [n, D] of any real dtype, and their labels [n] where the source has any


@dataclass(frozen=True)
class ReadOptions:
    """What is wanted of a source."""

    names: Sequence[str] | None = None  # these columns, in this order, if the source has names; None: all
    drop: Sequence[str] = ()  # but these
    keep: Sequence[str] = ()  # columns that may look like identifiers
    size: tuple[int, int] | None = None  # pictures are resized to this height and width
    shape: tuple[int, ...] | None = None  # of one row, where a model demands it
    pixel_range: tuple[float, float] | None = None  # what black and white shall become, where a model demands it


@dataclass(frozen=True)
class RawTable:
    """A source that was opened."""

    blocks: Iterator[Block]  # raises DataError where the source turns out to be damaged or no numbers
    shape: tuple[int, ...]  # of one row; its product is D
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))  # fit for all values in a file
    rows: int | None = None  # N where it is known in advance
    names: list[str] | None = None  # of the D columns, where the source has names
    units: list[str | None] | None = None
    pixel_range: tuple[float, float] | None = None
    first_line: int | None = None  # text files: the line on which row 0 stands
    label_names: list[str] | None = None  # what labels 0, 1, ... mean
    notes: list[str] = field(default_factory=list)  # complete when the blocks are through
    stored: FileArray | None = None  # [N, D]: the file itself, where it can be read at random


def describe_row(row: int, first_line: int | None) -> str:
    """Where `row` (from 0) is found, for a message."""
    return f"row {row}" if first_line is None else f"row {row} (line {row + first_line})"


def format_option(name: str, columns: Sequence[str]) -> str:
    """The command line option `name` for these columns, ready to paste into a shell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(columns)
    return f"{name} {shlex.quote(text.getvalue())}"
