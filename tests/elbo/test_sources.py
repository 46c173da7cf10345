"""Every type of data that stands for the same rows gives the same model and the same scores."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from elbo.sources import as_source
from tests.elbo.conftest import metric_rows
from training.data.readers import InMemory
from training.data.table import Table, read_for_model, read_table
from training.errors import DataError

TITLES = ["cpu [%]", "latency [ms]", "errors"]
ROWS = metric_rows(50)


def read(data: Any, **options: Any) -> Table:
    return read_table(as_source(data), **options)


def all_rows(table: Table) -> np.ndarray[Any, Any]:
    return table.x.read_range(0, len(table.x))


class ArrowOnly:
    """A frame of which only the Arrow interface is known."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self._frame = frame

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self._frame.__arrow_c_stream__(requested_schema)


FRAMES: dict[str, Callable[[], Any]] = {
    "polars": lambda: pl.DataFrame(ROWS, schema=TITLES),
    "lazy polars": lambda: pl.DataFrame(ROWS, schema=TITLES).lazy(),
    "pandas": lambda: pd.DataFrame(ROWS, columns=TITLES, index=range(100, 150)),
    "arrow": lambda: ArrowOnly(pl.DataFrame(ROWS, schema=TITLES)),
    "records": lambda: [dict(zip(TITLES, row, strict=True)) for row in ROWS.tolist()],
    "columns": lambda: dict(zip(TITLES, ROWS.T.tolist(), strict=True)),
}
ARRAYS: dict[str, Callable[[], Any]] = {
    "float32": lambda: ROWS,
    "float64 in the order of Fortran": lambda: np.asfortranarray(ROWS, np.float64),
    "tensor": lambda: torch.from_numpy(ROWS).requires_grad_(),
    "list": ROWS.tolist,
    "list of arrays": lambda: list(ROWS),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_frame_of_any_library_gives_the_table_of_a_csv_file_with_the_same_rows(kind: str, tmp_path: Path) -> None:
    pl.DataFrame(ROWS, schema=TITLES).write_csv(tmp_path / "rows.csv")
    expected, table = read_table(str(tmp_path / "rows.csv")), read(FRAMES[kind]())
    assert table.fingerprint == expected.fingerprint
    assert (table.names, table.units) == (["cpu", "latency", "errors"], ["%", "ms", None])
    assert table.source == "data"


@pytest.mark.parametrize("kind", ARRAYS)
def test_array_of_any_library_gives_the_table_of_a_npy_file_with_the_same_rows(kind: str, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", ROWS)
    table = read(ARRAYS[kind]())
    assert table.fingerprint == read_table(str(tmp_path / "rows.npy")).fingerprint
    assert table.names == ["x[0]", "x[1]", "x[2]"]


def test_array_with_feature_names_gives_the_table_of_a_frame_with_these_columns() -> None:
    named = as_source(ROWS, feature_names=TITLES)
    assert read_table(named).fingerprint == read(FRAMES["polars"]()).fingerprint


def test_missing_values_of_any_type_of_pandas_become_nan() -> None:
    frame = pd.DataFrame(
        {
            "float": [1.5, None, 3.0] * 5,
            "nullable": pd.array([1, None, 3] * 5, dtype="Int64"),
            "boolean": pd.array([True, None, False] * 5, dtype="boolean"),
            "object": np.array([1, None, 2.5] * 5, dtype=object),
        }
    )
    expected = np.array([[1.5, 1, 1, 1], [np.nan] * 4, [3, 3, 0, 2.5]] * 5, np.float32)
    np.testing.assert_array_equal(all_rows(read(frame.assign(other=np.arange(15) % 4)))[:, :4], expected)


def test_times_groups_and_labels_of_pandas_are_read_as_those_of_csv() -> None:
    start = datetime(2024, 3, 1, tzinfo=UTC)
    times = pd.DatetimeIndex([start + timedelta(minutes=i) for i in range(50)]).tz_convert("Europe/Berlin")
    frame = pd.DataFrame(ROWS, columns=TITLES).assign(
        when=times, host=pd.Categorical(["a", "b"] * 25), label=["ok", "ok", "fault", "ok", "ok"] * 10
    )
    table = read(frame, time="when", group="host")
    assert table.timeline is not None
    assert table.timeline.groups == ("a", "b")
    assert table.timeline.time[0] / 1e9 == start.timestamp()
    assert table.names == ["cpu", "latency", "errors"]
    assert table.anomalous is not None
    assert table.anomalous.sum() == 10


def test_labels_of_arrays_and_frames_are_the_labels_of_the_table() -> None:
    labels = ["good", "bad"] * 25
    for data, name in ((ROWS, None), (FRAMES["polars"](), "label")):
        table = read_table(as_source(data, labels), label=[name] if name else [])
        assert table.label_names is not None
        assert table.labels is not None
        assert [table.label_names[code] for code in table.labels] == labels


def test_images_keep_their_shape_and_their_type() -> None:
    images = np.random.RandomState(0).randint(0, 256, (20, 6, 5)).astype(np.uint8)
    table = read(torch.from_numpy(images))
    assert (table.shape, table.pixel_range) == ((6, 5), (0, 255))


def test_columns_of_a_frame_are_found_by_name_for_a_model(site: Any) -> None:
    manifest = site.fitted["web"].manifest
    frame = FRAMES["pandas"]()[["errors", "cpu [%]", "latency [ms]"]].assign(other="text")
    assert np.array_equal(all_rows(read_for_model(as_source(frame), manifest)), ROWS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (17, "data is of the type int: expected a path, an array, a tensor, a frame or a list of rows"),
        ([[1.0, 2.0], [3.0]], "data is no array of numbers"),
        ([["a", "b"]] * 20, "data is no array of numbers"),
        (np.array([["a", "b"]] * 20), "data is no array of numbers"),
        (np.zeros(20), r"data: expected rows of features, \[N, D\], got shape \[20\]"),
        (np.zeros((20, 2), complex), "data has complex numbers: expected real numbers"),
        ({"a": [1, 2], "b": [1]}, "data is no table"),
        (pd.DataFrame(np.zeros((9, 2)), columns=["a", "a"]), "data has two columns named 'a': rename one"),
        (pd.DataFrame({"a": [1.0, 2.0] * 9, "b": ["x", "y"] * 9}), "data: column 'b' .*'x'.* is not"),
        (np.zeros((0, 3)), r"data has no rows of numbers \(shape \[0, 3\]\)"),
        (pd.Series([1.0, 2.0]), r"data is a Series, which may be one row or one column: give frame\.iloc"),
    ],
)
def test_data_that_are_no_rows_of_numbers_raise_an_error_that_says_why(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": ROWS, "labels": [1, 2]}, r"the labels of data have the shape \[2\]: expected one label per row"),
        ({"data": FRAMES["polars"](), "labels": [1, 2]}, "labels has 2 entries for 50 rows"),
        ({"data": FRAMES["polars"](), "feature_names": TITLES}, "leave feature_names out"),
        ({"data": ROWS, "feature_names": ["a"]}, r"feature_names has 1 names: expected data of shape \[N, 1\]"),
        ({"data": "rows.csv", "labels": [1]}, "rows.csv is a file"),
    ],
)
def test_labels_and_names_that_do_not_fit_the_rows_raise_an_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_table(as_source(**arguments))


def test_path_is_passed_on_as_text(tmp_path: Path) -> None:
    assert as_source(tmp_path / "rows.csv") == str(tmp_path / "rows.csv")
    assert isinstance(as_source(ROWS), InMemory)
