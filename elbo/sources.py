"""Convert arrays, tensors, frames and lists to sources for the readers of `training.data`.

Every function of `elbo` that takes rows takes the same types: see `as_source`.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, Union

import numpy as np
import numpy.typing as npt

from training.data.readers import InMemory
from training.errors import DataError

if TYPE_CHECKING:
    import polars as pl
    import torch


class ArrowFrame(Protocol):
    """A frame that exports its columns by the Arrow PyCapsule interface, such as one of pyarrow, polars or DuckDB."""

    def __arrow_c_stream__(self, requested_schema: object | None = None, /) -> object:
        """Return the columns as a stream."""


class PandasFrame(Protocol):
    """A DataFrame of pandas."""

    @property
    def columns(self) -> Any:
        """The names of the columns."""

    @property
    def dtypes(self) -> Any:
        """The types of the columns."""


Data: TypeAlias = Union[
    str,
    "os.PathLike[str]",
    npt.NDArray[Any],
    "torch.Tensor",
    ArrowFrame,
    PandasFrame,
    Sequence[Any],
    Mapping[str, Any],
]
Labels: TypeAlias = Union[Sequence[Any], npt.NDArray[Any], "torch.Tensor"]
LABEL_COLUMN = "label"  # name of the column to which the labels of a frame are written


def as_source(data: Data, labels: Labels | None = None, feature_names: Sequence[str] | None = None) -> str | InMemory:
    """Return `data` as a source for `training.data.table.read_table`.

    Args:
        data: one of
            - a path, or the name of bundled data, as on the command line: returned as text;
            - a NumPy array or a torch tensor [N, ...], or anything with `__array__`;
            - a DataFrame of polars or pandas, or anything with `__arrow_c_stream__`;
            - a list of rows, each a list of numbers, with None for a missing value;
            - a list of records, each a mapping by feature name, or a mapping from names to columns.
        labels: the label of each row. For a frame, they become the column LABEL_COLUMN.
        feature_names: names of the columns of an array [N, D].

    Raises:
        DataError: `data` has another type, or cannot have labels or names.
    """
    if isinstance(data, str | os.PathLike):
        if labels is not None or feature_names is not None:
            raise DataError(
                f"{data} is a file: leave labels and feature_names out, and put labels and names into the file"
            )
        return os.fspath(data)
    values = None if labels is None else _as_labels(labels)
    frame = _as_frame(data)
    if frame is not None and feature_names is not None:
        raise DataError("data has named columns: leave feature_names out")
    if frame is None:
        rows = _as_array(data)
        if feature_names is None:
            return InMemory(rows, values)
        frame = _named(rows, feature_names)
    return InMemory(frame if values is None else _with_labels(frame, values))


def _as_frame(data: Any) -> "pl.DataFrame | None":
    """Return `data` as a frame of polars; None if it has no named columns."""
    polars, pandas = sys.modules.get("polars"), sys.modules.get("pandas")
    if polars is not None and isinstance(data, polars.DataFrame | polars.LazyFrame):
        frame: pl.DataFrame = data if isinstance(data, polars.DataFrame) else data.collect()
        return frame
    if pandas is not None and isinstance(data, pandas.DataFrame):
        return _from_pandas(data)
    if pandas is not None and isinstance(data, pandas.Series):
        raise DataError(
            "data is a Series, which may be one row or one column: give frame.iloc[[0]] for a row, or "
            "series.to_frame() for a column"
        )
    is_columns = isinstance(data, Mapping)
    is_records = isinstance(data, Sequence) and bool(data) and isinstance(data[0], Mapping)
    if is_columns or is_records or hasattr(data, "__arrow_c_stream__"):
        return _from_columns(data)
    return None


def _from_columns(data: Any) -> "pl.DataFrame":
    import polars as pl

    try:
        if hasattr(data, "__arrow_c_stream__"):
            return pl.DataFrame(data)
        return pl.DataFrame(data, strict=False, infer_schema_length=None)
    except (pl.exceptions.PolarsError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"data is no table ({reason}): expected columns of equal length, each of one type") from error


def _from_pandas(frame: Any) -> "pl.DataFrame":
    """Return a frame of pandas as a frame of polars, without its index. pyarrow is not needed.

    Raises:
        DataError: two columns have the same name.
    """
    import polars as pl

    names = [str(name) for name in frame.columns]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"data has two columns named {twice!r}: rename one")
    return pl.DataFrame([_column(name, frame.iloc[:, index]) for index, name in enumerate(names)])


def _column(name: str, column: Any) -> "pl.Series":
    """Return a column of pandas as one of polars. Missing values become null."""
    import polars as pl

    kind = getattr(column.dtype, "kind", "O")
    if isinstance(column.dtype, np.dtype) and kind in "biuf":
        return pl.Series(name, column.to_numpy())
    if kind == "M":  # a time, with or without a time zone
        utc = column.dt.tz_convert("UTC").dt.tz_localize(None) if getattr(column.dt, "tz", None) else column
        return pl.Series(name, utc.to_numpy().astype("datetime64[us]"))
    absent = column.isna().to_numpy(dtype=bool)
    if kind in "biuf":  # a type of pandas that can lack values, such as Int64
        return pl.Series(name, np.where(absent, np.nan, column.to_numpy(dtype=np.float64, na_value=np.nan)))
    values = [None if is_absent else value for value, is_absent in zip(column.tolist(), absent.tolist(), strict=True)]
    return pl.Series(name, values, strict=False)


def _as_array(data: Any) -> npt.NDArray[Any]:
    """Return `data` as an array. Raises DataError if `data` is not an array of real numbers."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(data, torch.Tensor):
        tensor = data.detach().cpu()
        array: npt.NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        return array
    if isinstance(data, np.ndarray) and data.dtype.kind in "biuf":
        return data.astype(np.uint8) if data.dtype.kind == "b" else data
    if getattr(getattr(data, "dtype", None), "kind", "f") == "c":
        raise DataError("data has complex numbers: expected real numbers")
    if not isinstance(data, Sequence) and not hasattr(data, "__array__"):
        raise DataError(
            f"data is of the type {type(data).__name__}: expected a path, an array, a tensor, a frame or a list of rows"
        )
    try:
        return np.array(data, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError) as error:
        raise DataError(
            f"data is no array of numbers ({error}): expected rows of equal length, with None for a missing value"
        ) from error


def _named(rows: npt.NDArray[Any], names: Sequence[str]) -> "pl.DataFrame":
    import polars as pl

    if rows.ndim != 2 or rows.shape[1] != len(names):
        raise DataError(
            f"feature_names has {len(names)} names: expected data of shape [N, {len(names)}], got {list(rows.shape)}"
        )
    return pl.DataFrame({name: rows[:, index] for index, name in enumerate(names)})


def _as_labels(labels: Any) -> npt.NDArray[Any]:
    """Return labels as an array of integers or text, [N]."""
    values = np.array(labels.tolist() if hasattr(labels, "tolist") else list(labels))
    return values.astype(np.str_) if values.dtype.kind in "OSU" else values


def _with_labels(frame: "pl.DataFrame", labels: npt.NDArray[Any]) -> "pl.DataFrame":
    import polars as pl

    if LABEL_COLUMN in frame.columns:
        raise DataError(f"data has a column {LABEL_COLUMN!r} already: leave labels out, or drop the column")
    if len(labels) != frame.height:
        raise DataError(f"labels has {len(labels)} entries for {frame.height} rows: expected one per row")
    return frame.with_columns(pl.Series(LABEL_COLUMN, labels))
