"""Every reader takes `ReadOptions` and returns a `RawTable`, whose numbers are not checked yet."""

import csv
import io
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from models.manifest import Category
from training.data.categories import LevelReader
from training.data.line_numbers import LineNumbers
from training.data.readers.condition_columns import ConditionReader
from training.data.readers.time_columns import TimelineReader
from training.data.row_store import FileArray

if TYPE_CHECKING:
    import polars as pl

Array = np.ndarray[Any, Any]
Block = tuple[Array, Array | None]  # rows [n, D] of any real dtype, and their labels [n] if the source has labels


@dataclass(frozen=True)
class SourcePart:
    """A part of a file that is read on its own: rows `start` to `stop`, or in a CSV file, bytes `start` to `stop`."""

    start: int
    stop: int
    first_line: int = 1  # CSV: the number of the line at `start`


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Which columns to read, and how to convert images."""

    names: Sequence[str] | None = None  # columns to read, in this order; None for all; ignored by sources without names
    drop: Sequence[str] = ()  # columns to leave out
    keep: Sequence[str] = ()  # columns to accept even if they look like identifiers
    label: Sequence[str] = ()  # columns of labels: the first is read; if empty, one is found by its name
    size: tuple[int, int] | None = None  # height and width to which images are resized
    shape: tuple[int, ...] | None = None  # shape of one row, if a model requires it
    pixel_range: tuple[float, float] | None = None  # values of black and white, if a model requires them
    tolerant: bool = False  # whether faulty rows are recorded in `RawTable.details` instead of raising DataError
    extra: Sequence[str] = ()  # if tolerant: further columns whose cells are recorded in `RawTable.details`
    layout: str | None = None  # what the dimensions of an array mean: nhwc, nchw, ntc or flat
    escape: str | None = None  # how CSV writes a quotation mark inside a quoted cell: double or backslash
    time: str | None = None  # column with the time of each row
    group: str | None = None  # column with the group of each row, such as its host
    timeline_optional: bool = False  # whether the source may lack these two columns
    category: Sequence[str] = ()  # columns whose values are levels although they are numbers
    categories: Sequence[Category] = ()  # with `names`: the categories of the model, after its columns of numbers
    condition: Sequence[str] = ()  # columns of conditions; if `names` is given, the source may lack them
    part: SourcePart | None = None  # the part of a .npy, CSV or Parquet file to read; None for the whole


@dataclass
class BlockDetails:
    """What a tolerant reader records about the rows of the latest block, besides their numbers."""

    faults: dict[int, str] = field(default_factory=dict)  # by row, counted from 0: why the row is faulty
    cells: "dict[str, pl.Series]" = field(default_factory=dict)  # by name: the cells of an extra column
    # By row, counted from 0: the column and the text of each level that the model does not know.
    unknown_levels: dict[int, list[tuple[str, str]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RawTable:
    """An opened source. Its rows are read while `blocks` is iterated."""

    blocks: Iterator[Block]  # iteration raises DataError if the source is damaged or does not contain numbers
    shape: tuple[int, ...]  # shape of one row; the product is D
    dtype: np.dtype[Any] = field(default_factory=lambda: np.dtype(np.float32))  # a dtype that can store all values
    rows: int | None = None  # number of rows N, if known in advance; an estimate for CSV
    names: list[str] | None = None  # names of the D columns, if the source has names
    units: list[str | None] | None = None
    has_header: bool = False  # whether the file names its columns; `RowStream.max_missing` depends on it
    pixel_range: tuple[float, float] | None = None
    lines: LineNumbers | None = None  # for text files; complete when all blocks have been read
    label_column: str | None = None  # the name of the column that holds the labels, if the source has columns
    # The different labels: the labels of `blocks` are indices of this list, or -1 for a missing label. None if `blocks`
    # contains the labels themselves. Complete when all blocks have been read.
    label_names: list[str] | None = None
    extra: tuple[str, ...] = ()  # the columns of `ReadOptions.extra` that the source has
    details: BlockDetails = field(default_factory=BlockDetails)  # about the latest block of `blocks`
    notes: list[str] = field(default_factory=list)  # notes for the user; complete when all blocks have been read
    timeline: TimelineReader | None = None  # reads the times and groups of the rows of `blocks`
    conditions: Sequence[ConditionReader] = ()  # read the conditions of the rows of `blocks`
    # In training: the categories among the columns, by the name of the column. Complete when all blocks have been read.
    categories: dict[str, LevelReader] = field(default_factory=dict)
    file_array: FileArray | None = None  # values [N, D] in the source file, if the rows can be read in any order


def format_option(option: str, columns: Sequence[str]) -> str:
    """Return the command-line option for these columns, quoted for a shell, such as --drop 'b c,d'."""
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(columns)
    return f"{option} {shlex.quote(text.getvalue())}"
