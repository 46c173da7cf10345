"""Read Parquet files and frames slice by slice."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from training.data.readers.columns import (
    build_raw_table,
    choose_columns,
    choose_condition_columns,
    choose_label_column,
    choose_timeline_columns,
)
from training.data.readers.raw_table import RawTable, ReadOptions, SourcePart
from training.data.row_store import rows_per_block
from training.errors import DataError

if TYPE_CHECKING:
    import polars as pl


def read_parquet(path: Path, options: ReadOptions) -> RawTable:
    """Return the columns of a Parquet file.

    Raises:
        DataError: the file is damaged, or its columns are not as the options require.
    """
    import polars as pl

    with _damage_as_data_error(path):
        scan = pl.scan_parquet(path, glob=False)
        header = scan.collect_schema().names()
        rows = int(scan.select(pl.len()).collect().item())
    return read_frame(scan, header, rows, path, options)


def read_frame(scan: "pl.LazyFrame", header: Sequence[str], rows: int, path: Path, options: ReadOptions) -> RawTable:
    """Return the columns of a frame with `rows` rows, whose columns have the titles `header`.

    Args:
        path: name of the source, for messages.

    Raises:
        DataError: the source is damaged, or its columns are not as the options require.
    """
    import polars as pl

    columns = choose_columns(header, path, options, typed=True)
    labels = choose_label_column(header, path, options)
    timeline = choose_timeline_columns(header, path, options)
    conditions = choose_condition_columns(header, path, options)
    read = [*columns, *([labels] if labels else []), *(timeline.columns if timeline else []), *conditions]
    used = sorted({column.index for column in read})
    for column in read:
        column.index = used.index(column.index)  # the position in the frames, which contain only the used columns
    wanted = scan.select(pl.nth(used))
    part = options.part or SourcePart(0, rows)
    frames = _slices(wanted, part, rows_per_block(len(columns)), path)
    return build_raw_table(
        frames, columns, labels, options, path, part.stop - part.start, timeline=timeline, conditions=conditions
    )


@contextmanager
def _damage_as_data_error(path: Path) -> Iterator[None]:
    import polars as pl

    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"{path} is damaged or not a Parquet file: write it again") from error


def _slices(scan: "pl.LazyFrame", part: SourcePart, step: int, path: Path) -> Iterator["pl.DataFrame"]:
    """Yield the rows of `part` in slices. polars decodes only the pages that a slice needs, even within a row group."""
    for start in range(part.start, part.stop, step):
        with _damage_as_data_error(path):
            frame = scan.slice(start, min(step, part.stop - start)).collect()
        yield frame
