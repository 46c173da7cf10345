"""Read rows that are in memory: an array, or a frame of polars."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.data.readers.arrays import read_array
from training.data.readers.parquet import read_frame
from training.data.readers.raw_table import Array, RawTable, ReadOptions
from training.errors import DataError

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, eq=False)
class InMemory:
    """Rows in memory, which are read as those of a file.

    Args:
        rows: an array [N, ...] of real numbers, or a polars DataFrame.
        labels: the label of each row, [N], integers or text; None without labels. For an array only: the labels of a
            frame are one of its columns.
        name: name of the source in messages.
    """

    rows: "Array | pl.DataFrame"
    labels: Array | None = None
    name: str = "data"

    def __str__(self) -> str:
        return self.name

    @property
    def has_columns(self) -> bool:
        """Whether the rows have named columns."""
        return not isinstance(self.rows, np.ndarray)


def read_in_memory(source: InMemory, options: ReadOptions) -> RawTable:
    """Open `source`.

    Raises:
        DataError: the rows are no numbers, or an option is not for them.
    """
    _refuse_other_options(source, options)
    path, rows = Path(source.name), source.rows
    if not isinstance(rows, np.ndarray):
        return read_frame(rows.lazy(), rows.columns, rows.height, path, options)
    labels = source.labels
    if labels is not None and labels.shape != (len(rows),):
        raise DataError(
            f"the labels of {source} have the shape {list(labels.shape)}: expected one label per row, [{len(rows)}]"
        )
    return read_array(rows, labels, path, options)


def _refuse_other_options(source: InMemory, options: ReadOptions) -> None:
    if options.size:
        raise DataError(f"--size resizes the images of a folder, and {source} is not a folder: leave --size out")
    if options.layout and source.has_columns:
        raise DataError(f"--layout is for arrays, and {source} is none: leave --layout out")
    in_training = options.names is None
    if source.has_columns or not in_training:
        return
    for option, value in (("--label", options.label), ("--time", options.time), ("--group", options.group)):
        if value:
            raise DataError(f"{option} names a column, and {source} has no named columns: expected a frame")
