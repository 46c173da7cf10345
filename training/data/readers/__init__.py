"""Each source of data as raw numbers: the bundled digits, NumPy files, CSV, Parquet and folders of pictures.

Rows count from 0 in every message, as in the answers of the service; CSV messages add the line of the file.
polars, scikit-learn and Pillow are imported by the reader that needs them, so importing this package is cheap.
"""

from collections.abc import Callable
from pathlib import Path

from training.data.readers.arrays import read_digits, read_numpy
from training.data.readers.csv_text import read_csv
from training.data.readers.images import read_images
from training.data.readers.parquet import read_parquet
from training.data.readers.source import Block, RawTable, ReadOptions, describe_row, format_option
from training.errors import DataError

__all__ = ["READERS", "Block", "RawTable", "ReadOptions", "describe_row", "format_option", "load"]

DIGITS = "digits"
READERS: dict[str, Callable[[Path, ReadOptions], RawTable]] = {
    ".npy": read_numpy,
    ".npz": read_numpy,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def load(source: str, request: ReadOptions) -> RawTable:
    """The numbers behind `source`: "digits", a file, or a folder of pictures.

    Where names are requested, a column called label or y beside them gives the labels. Raises DataError.
    """
    path = Path(source)
    if request.size and not path.is_dir():
        raise DataError(f"--size resizes the pictures of a folder: leave it out for {source}")
    if source == DIGITS:
        return read_digits(request)
    if not path.exists():
        raise DataError(f"{source} does not exist: expected a file ({', '.join(READERS)}) or {DIGITS!r}")
    reader = read_images if path.is_dir() else READERS.get(path.suffix.lower())
    if reader is None:
        got = f"suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise DataError(f"{source} has {got}: expected {', '.join(READERS)}; convert it to one of these")
    try:
        return reader(path, request)
    except PermissionError as error:
        raise DataError(f"{source} cannot be read ({error.strerror}): check its permissions") from error
    except ModuleNotFoundError as error:
        raise DataError(f"{source}: reading it needs {error.name}: pip install 'elbo[train]'") from error
