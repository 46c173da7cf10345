"""Readers of raw numbers from the bundled digits and hosts, NumPy files, CSV, Parquet, folders of images, and memory.

Messages count rows from 0, as the service does. Messages about CSV files also name the line. Each reader imports its
library (polars, scikit-learn or Pillow) when it is called, so importing this package is cheap.
"""

from collections.abc import Callable
from pathlib import Path

from training.data.readers.arrays import read_digits, read_numpy
from training.data.readers.csv_text import read_csv
from training.data.readers.images import read_images
from training.data.readers.in_memory import InMemory, read_in_memory
from training.data.readers.parquet import read_parquet
from training.data.readers.raw_table import RawTable, ReadOptions, SourcePart, format_option
from training.data.readers.simulated_hosts import SOURCES as SIMULATED
from training.data.readers.simulated_hosts import read_simulated_hosts
from training.errors import DataError

__all__ = [
    "READERS",
    "InMemory",
    "RawTable",
    "ReadOptions",
    "SourcePart",
    "format_option",
    "load",
]

DIGITS = "digits"
READERS: dict[str, Callable[[Path, ReadOptions], RawTable]] = {
    ".npy": read_numpy,
    ".npz": read_numpy,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
WITH_LABELS = (".csv", ".parquet", ".npz")  # files that name their columns or their arrays
ARRAYS = [suffix for suffix, reader in READERS.items() if reader is read_numpy]
TABLES = [suffix for suffix in READERS if suffix not in ARRAYS]


def load(source: str | InMemory, options: ReadOptions) -> RawTable:
    """Open `source`: "digits", "simulated-hosts", "simulated-hosts-later", a file, a folder of images, or rows.

    If `options.names` is given, a label column that is not among these names is read as the labels.

    Raises:
        DataError: the source does not exist, has an unknown format, or cannot be read.
    """
    if isinstance(source, InMemory):
        return read_in_memory(source, options)
    path = Path(source)
    _refuse_other_options(path, source, options)
    if source == DIGITS:
        return read_digits(options)
    if source in SIMULATED:
        return read_simulated_hosts(source, options)
    suffixes = ", ".join(READERS)
    if not path.exists():
        raise DataError(f"{source} does not exist: expected a file ({suffixes}), a folder of images, or {DIGITS!r}")
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"{source} is a pipe or a device, and Elbo reads data twice: write the rows to a file first")
    reader = read_images if path.is_dir() else READERS.get(path.suffix.lower())
    if reader is None:
        got = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise DataError(f"{source} has {got}: expected {suffixes}; convert the file to one of these")
    try:
        return reader(path, options)
    except PermissionError as error:
        raise DataError(f"{source} cannot be read ({error.strerror}): check its permissions") from error
    except ModuleNotFoundError as error:
        raise DataError(f"reading {source} needs the package {error.name}: pip install 'elbo[train]'") from error


def _refuse_other_options(path: Path, source: str, options: ReadOptions) -> None:
    """Raise DataError for an option that is not for this kind of source."""
    if options.size and not path.is_dir():
        raise DataError(f"--size resizes the images of a folder, and {source} is not a folder: leave --size out")
    if options.layout and path.suffix.lower() not in ARRAYS:
        raise DataError(f"--layout is for arrays ({', '.join(ARRAYS)}), and {source} is none: leave --layout out")
    if options.label and options.names is None and path.suffix.lower() not in WITH_LABELS and source not in SIMULATED:
        formats = ", ".join(WITH_LABELS)
        raise DataError(f"--label names a column or an array of a file ({formats}), and {source} is none of these")
    if options.time and not options.timeline_optional and path.suffix.lower() not in TABLES and source not in SIMULATED:
        raise DataError(f"--time names a column, and {source} has no named columns: expected {' or '.join(TABLES)}")
