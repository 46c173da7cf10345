"""Each source of data as raw numbers: the bundled digits, NumPy files, CSV and Parquet.

Rows count from 0 in every message, as in the answers of the service; CSV messages add the line of the file.
polars and scikit-learn are imported by the reader that needs them, so importing this module is cheap.
"""

import csv
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.errors import ElboError

if TYPE_CHECKING:
    import polars as pl

DIGITS = "digits"
LABEL_COLUMNS = ("label", "y")
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})
BOOLEANS = frozenset({"true", "false", "yes", "no"})
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
UNIT = re.compile(r"(?P<name>.*\S)\s+\[(?P<unit>[^\[\]]+)\]")


class DataError(ElboError):
    """The data cannot be learnt from as they are; the message names the place and says what to do."""

    code = "data_error"


@dataclass(frozen=True)
class Raw:
    """What a reader finds: numbers of any real dtype, unchecked, and what the source says about them."""

    values: np.ndarray[Any, Any]  # [N, ...]
    names: list[str] | None = None  # of the columns, where the source has names
    units: list[str | None] | None = None
    labels: np.ndarray[Any, Any] | None = None  # [N]
    pixel_range: tuple[float, float] | None = None
    first_line: int | None = None  # text files: the line on which row 0 stands
    notes: list[str] = field(default_factory=list)


Reader = Callable[[Path, Sequence[str] | None], Raw]


def load(source: str, wanted: Sequence[str] | None = None) -> Raw:
    """The numbers behind `source`: "digits" or a path.

    `wanted` picks columns by name, in that order, where the source has names; a column called label or y
    beside them then gives the labels. Raises DataError.
    """
    if source == DIGITS:
        return _read_digits()
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{source} is a directory: expected a file ({', '.join(READERS)}) or {DIGITS!r}")
    if not path.exists():
        raise DataError(f"{source} does not exist: expected a file ({', '.join(READERS)}) or {DIGITS!r}")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        got = f"suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise DataError(f"{source} has {got}: expected {', '.join(READERS)}; convert it to one of these")
    try:
        return reader(path, wanted)
    except PermissionError as error:
        raise DataError(f"{source} cannot be read ({error.strerror}): check its permissions") from error
    except ModuleNotFoundError as error:
        raise DataError(f"{source}: reading it needs {error.name}: pip install 'elbo[train]'") from error


def _read_digits() -> Raw:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return Raw(images.reshape(-1, 8, 8) / 16.0, labels=labels, pixel_range=(0.0, 1.0))


# NumPy files


def _read_numpy(path: Path, _wanted: Sequence[str] | None) -> Raw:
    try:
        with path.open("rb") as file:  # numpy leaves a file open that it opened itself and found damaged
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return Raw(content)
            return _from_archive({key: content[key] for key in content.files}, path)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError) as error:
        if "Object arrays" in str(error):
            raise DataError(f"{path} holds Python objects: expected numbers; save x.astype('float32')") from error
        raise DataError(f"{path} is damaged or no NumPy file: write it again with numpy.save or numpy.savez") from error


def _from_archive(arrays: dict[str, np.ndarray[Any, Any]], path: Path) -> Raw:
    tables = [key for key, array in arrays.items() if array.ndim >= 2 and array.dtype.kind in "iuf"]
    named = [key for key in ("x", "X") if key in arrays]
    if not named and len(tables) != 1:
        found = ", ".join(f"{key} {array.shape}" for key, array in arrays.items()) or "nothing"
        advice = "save the rows with numpy.savez(path, x=rows)"
        raise DataError(f"{path}: expected an array named x, got {found}: {advice}")
    return _with_labels(arrays[(named or tables)[0]], arrays.get("y"))


def _with_labels(values: np.ndarray[Any, Any], labels: np.ndarray[Any, Any] | None) -> Raw:
    if labels is None:
        return Raw(values)
    if labels.shape != values.shape[:1]:
        return Raw(values, notes=[f"labels are ignored: expected {len(values)}, one a row, got shape {labels.shape}"])
    if labels.dtype.kind not in "iub" and not (labels.dtype.kind == "f" and np.array_equal(labels, np.rint(labels))):
        return Raw(values, notes=[f"labels are ignored: expected whole numbers, got {labels.dtype}"])
    return Raw(values, labels=labels)


# CSV and Parquet


def _read_csv(path: Path, wanted: Sequence[str] | None) -> Raw:
    import polars as pl

    header = _csv_header(path)
    try:
        frame = pl.read_csv(path, infer_schema=False, glob=False)
    except pl.exceptions.PolarsError as error:
        _refuse_ragged(path, len(header))
        raise DataError(f"{path} is no valid CSV in UTF-8 ({str(error).splitlines()[0]}): write it again") from error
    frame = _without_blank_end(frame)
    if frame.width != len(header):
        raise DataError(f"{path}: expected the column names in its first line, got {frame.columns}: move them there")
    if any(column.null_count() for column in frame):
        _refuse_ragged(path, len(header))
    return _from_frame(frame, header, wanted, path, _number_from_text, first_line=2)


def _csv_header(path: Path) -> list[str]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = next((row for row in csv.reader(file) if row), [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no UTF-8 text: save it as CSV in UTF-8") from error
    if not header:
        raise DataError(f"{path} is empty: expected a header line with column names, then rows of numbers")
    if len(header) == 1:
        for separator, word in SEPARATORS.items():
            if separator in header[0]:
                raise DataError(f"{path} separates its columns by {word}: expected commas; convert it")
    positions = [[str(start + i) for i in range(len(header))] for start in (0, 1)]
    if all(_is_number(name) for name in header) and header not in positions:
        raise DataError(f"{path} has numbers in its first line: expected a header; put column names above the rows")
    return header


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _refuse_ragged(path: Path, width: int) -> None:
    """Name the first line whose number of fields is not the header's."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file, suppress(csv.Error):
        rows = csv.reader(file)
        for row in rows:
            if row and len(row) != width:
                raise DataError(
                    f"{path}: line {rows.line_num} has {len(row)} values, the header has {width}: correct the line"
                )


def _without_blank_end(frame: "pl.DataFrame") -> "pl.DataFrame":
    import polars as pl

    filled = frame.select(pl.any_horizontal(pl.all().is_not_null()).arg_true()).to_series()
    return frame.head(int(filled[-1]) + 1 if len(filled) else 0)


def _number_from_text(column: "pl.Series", name: str, place: Callable[[int], str]) -> np.ndarray[Any, Any]:
    """float64 [N], NaN where a value is missing."""
    import polars as pl

    text = column.str.strip_chars()
    absent = text.is_null() | text.str.to_lowercase().is_in(MISSING)
    number = text.cast(pl.Float64, strict=False)
    wrong = (number.is_null() & ~absent).arg_true()
    if len(wrong):
        value = text[int(wrong[0])]
        advice = "write 0 and 1" if value.lower() in BOOLEANS else "drop the column, or turn it into numbers"
        raise DataError(f"column {name!r} expected numbers, got {value!r} in {place(int(wrong[0]))}: {advice}")
    return number.fill_null(float("nan")).to_numpy()


def _read_parquet(path: Path, wanted: Sequence[str] | None) -> Raw:
    import polars as pl

    try:
        frame = pl.read_parquet(path, glob=False)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise DataError(f"{path} is damaged or no Parquet file: write it again") from error
    return _from_frame(frame, frame.columns, wanted, path, _number_from_typed)


def _number_from_typed(column: "pl.Series", name: str, place: Callable[[int], str]) -> np.ndarray[Any, Any]:
    """float64 [N], NaN where a value is missing."""
    import polars as pl

    if column.dtype == pl.Boolean:
        raise DataError(f"column {name!r} expected numbers, got booleans: store 0 and 1")
    if not column.dtype.is_numeric() and column.dtype != pl.Null:
        row = int(column.is_not_null().arg_max() or 0)
        value = column.slice(row, 1).to_list()[0]
        raise DataError(
            f"column {name!r} expected numbers, got {column.dtype} ({value!r} in {place(row)}): "
            "drop the column, or turn it into numbers"
        )
    return column.cast(pl.Float64).fill_null(float("nan")).to_numpy()


def _from_frame(
    frame: "pl.DataFrame",
    header: Sequence[str],
    wanted: Sequence[str] | None,
    path: Path,
    number: "Callable[[pl.Series, str, Callable[[int], str]], np.ndarray[Any, Any]]",
    first_line: int | None = None,
) -> Raw:
    names, units = _names_and_units(header, path)
    chosen = _chosen(names, wanted, path)
    labels = None
    values = np.empty((frame.height, len(chosen)))
    try:
        for position, index in enumerate(chosen):
            values[:, position] = number(frame.to_series(index), names[index], lambda row: place(row, first_line))
        if wanted is not None and (label := next((n for n in LABEL_COLUMNS if n in names and n not in wanted), None)):
            labels = number(frame.to_series(names.index(label)), label, lambda row: place(row, first_line))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    raw = _with_labels(values, labels)
    return replace(raw, names=[names[i] for i in chosen], units=[units[i] for i in chosen], first_line=first_line)


def place(row: int, first_line: int | None) -> str:
    """Where `row` (from 0) is found, for a message."""
    return f"row {row}" if first_line is None else f"row {row} (line {row + first_line})"


def _names_and_units(header: Sequence[str], path: Path) -> tuple[list[str], list[str | None]]:
    """`load [%]` is the column "load" in "%"."""
    names: list[str] = []
    units: list[str | None] = []
    for index, title in enumerate(header):
        line = " ".join(title.split())
        match = UNIT.fullmatch(line)
        name = match["name"] if match else line
        if not name:
            raise DataError(f"{path}: column {index + 1} has no name: name it (pandas: write with index=False)")
        if name in names:
            first = names.index(name) + 1
            raise DataError(f"{path}: columns {first} and {index + 1} are both named {name!r}: rename one")
        names.append(name)
        units.append(match["unit"].strip() if match else None)
    return names, units


def _chosen(names: Sequence[str], wanted: Sequence[str] | None, path: Path) -> list[int]:
    if wanted is None:
        return list(range(len(names)))
    absent = [name for name in wanted if name not in names]
    if absent:
        raise DataError(
            f"{path} lacks {len(absent)} of the model's {len(wanted)} columns, first {absent[0]!r}: "
            f"expected a column of that name, got {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        )
    return [names.index(name) for name in wanted]


READERS: dict[str, Reader] = {".npy": _read_numpy, ".npz": _read_numpy, ".csv": _read_csv, ".parquet": _read_parquet}
