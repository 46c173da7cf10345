"""Convert rows to arrays and records. Callers pass arrays, data frames of pandas or polars, or records."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeGuard, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from elbo.client.formats import to_float32
from elbo.client.results import Array, Model


@runtime_checkable
class Frame(Protocol):
    """A data frame of pandas or polars."""

    @property
    def columns(self) -> Iterable[Any]:
        """The names of the columns."""
        ...

    def to_numpy(self) -> npt.NDArray[Any]:
        """Return the values [N, D]."""
        ...

    def __getitem__(self, name: Any, /) -> Any:
        """Return one column."""
        ...


Record = Mapping[str, Any]
Rows = npt.ArrayLike | Frame | Sequence[Record]


def is_frame(rows: object) -> TypeGuard[Frame]:
    """Return whether `rows` is a data frame of pandas or polars."""
    return not isinstance(rows, np.ndarray) and hasattr(rows, "columns") and hasattr(rows, "to_numpy")


def is_records(rows: object) -> TypeGuard[Sequence[Record]]:
    """Return whether `rows` is a list of records: mappings from feature name to value."""
    return (
        not isinstance(rows, np.ndarray)
        and isinstance(rows, Sequence)
        and len(rows) > 0
        and isinstance(rows[0], Mapping)
    )


def to_array(rows: Any) -> Array:
    """Return rows without feature names as float32 [N, ...]. None becomes NaN.

    Raises:
        TypeError: the values are not numbers.
    """
    if hasattr(rows, "detach"):  # a tensor of PyTorch
        rows = rows.detach().cpu().numpy()
    try:
        return to_float32(rows)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"expected rows of numbers [N, D], a data frame or a list of records, got {type(rows).__name__}: {error}"
        ) from error


def to_records(rows: Frame | Sequence[Record]) -> list[Record]:
    """Return one record per row, with the value of each column by its name. NaN stays NaN."""
    if not is_frame(rows):
        return list(cast("Sequence[Record]", rows))
    if hasattr(rows, "to_dicts"):
        polars_records: list[Record] = rows.to_dicts()
        return polars_records
    names = [str(name) for name in rows.columns]
    columns = [rows[name].tolist() for name in rows.columns]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def to_ordered_array(rows: Frame | Sequence[Record], model: Model) -> Array:
    """Return the values of the features of `model`, in its order, as float32 [N, D]. An absent value is NaN.

    A title may have the unit of the feature, such as "load [%]". Columns that are not features are ignored.

    Raises:
        ValueError: a feature has no column, or two columns.
    """
    if is_frame(rows):
        found = _titles(rows.columns, model)
        return np.ascontiguousarray(np.stack([_column(rows[found[name]]) for name in model.features], axis=1))
    records = cast("Sequence[Record]", rows)
    found = _titles({key: None for record in records for key in record}, model)
    return to_array([[record.get(found[name]) for name in model.features] for record in records])


def _titles(titles: Iterable[Any], model: Model) -> dict[str, Any]:
    """Return the title of each feature of `model`. Raises ValueError if a feature has none, or two."""
    features = {name: name for name in model.features}
    for each in model.fields.get("features", ()):
        if unit := each.get("unit"):
            features.setdefault(f"{each['name']} [{unit}]", each["name"])
    titles = list(titles)
    found: dict[str, Any] = {}
    for title in titles:
        name = features.get(str(title)) or features.get(" ".join(str(title).split()))
        if name in found:
            raise ValueError(f"{found[name]!r} and {title!r} are both the feature {name!r}: remove one of them")
        if name is not None:
            found[name] = title
    _require_features([name for name in model.features if name not in found], titles, model.name)
    return found


def only_features(rows: Frame, names: Sequence[str], source: str) -> Frame:
    """Return the columns of a data frame that are features. A title may have a unit, such as "load [%]".

    Args:
        rows: a data frame.
        names: the names of the features.
        source: the name of the model, for messages.

    Raises:
        ValueError: no column is a feature.
    """
    known = set(names)
    titles = list(rows.columns)
    chosen = [title for title in titles if " ".join(str(title).split()).split(" [")[0] in known or str(title) in known]
    if not chosen:
        _require_features(names, titles, source)
    if len(chosen) == len(titles):
        return rows
    found: Frame = rows[chosen]
    return found


def _column(values: Any) -> Array:
    """Return one column of a data frame as float32 [N]."""
    array = values.to_numpy()
    return to_array(array.tolist() if array.dtype == object else array)


def _require_features(missing: Sequence[str], titles: Sequence[Any], source: str) -> None:
    if missing:
        shown = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
        got = ", ".join(repr(str(title)) for title in titles[:10]) or "none"
        raise ValueError(f"the rows have no column {shown}, which the model {source} needs; they have {got}")


def split(array: Array, most_rows: int) -> Iterator[Array]:
    """Yield `array` [N, ...] in parts of at most `most_rows` rows; an array without rows is one part."""
    for start in range(0, max(1, len(array)), most_rows):
        yield array[start : start + most_rows]
