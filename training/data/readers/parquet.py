"""Parquet files, read slice by slice."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from training.data.readers.columns import choose_columns, raw_table
from training.data.readers.source import RawTable, ReadOptions
from training.data.row_store import rows_per_block
from training.errors import DataError

if TYPE_CHECKING:
    import polars as pl


def read_parquet(path: Path, request: ReadOptions) -> RawTable:
    """The columns of a Parquet file. Raises DataError."""
    import polars as pl

    with _intact(path):
        scan = pl.scan_parquet(path, glob=False)
        header = scan.collect_schema().names()
        rows = int(scan.select(pl.len()).collect().item())
    columns = choose_columns(header, path, request, typed=True)
    wanted = scan.select(pl.nth([column.index for column in columns]))
    return raw_table(_slices(wanted, rows, rows_per_block(len(columns)), path), columns, request, path, rows)


@contextmanager
def _intact(path: Path) -> Iterator[None]:
    import polars as pl

    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"{path} is damaged or no Parquet file: write it again") from error


def _slices(scan: "pl.LazyFrame", rows: int, step: int, path: Path) -> Iterator["pl.DataFrame"]:
    """Only the pages of a slice are decoded, so a slice costs its own size even where a row group is the whole file."""
    for start in range(0, rows, step):
        with _intact(path):
            frame = scan.slice(start, step).collect()
        yield frame
