"""Reading valid sources. Sources that are refused are tested in test_bad_data.py."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.data import ROOT, values
from tests.training.manifests import manifest_of
from training.data.table import DataError, Table, read_for_model, read_table

RANDOM = np.random.RandomState(0)


def save_array(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


def write_text(path: Path, text: str) -> str:
    path.write_bytes(text.encode())
    return str(path)


def test_digits_are_the_1797_grey_images_of_scikit_learn_with_values_from_0_to_1() -> None:
    table = read_table("digits")
    assert values(table).shape == (1797, 64)
    assert values(table).dtype == np.float32
    assert (values(table).min(), values(table).max()) == (0, 1)
    assert np.array_equal(values(table) * 16, np.rint(values(table) * 16))  # multiples of 1/16, exact in float32
    assert (table.shape, table.pixel_range) == ((8, 8), (0, 1))
    assert table.names[:2] == ["pixel[0,0]", "pixel[0,1]"]
    assert table.names[-1] == "pixel[7,7]"
    assert table.labels is not None
    assert table.labels[:10].tolist() == list(range(10))  # the first ten images are 0 to 9
    assert table.notes == ["3 of 64 features are constant and carry no information: pixel[0,0], pixel[4,0], pixel[4,7]"]


def test_matrix_of_floats_is_read_as_a_table_with_numbered_columns(tmp_path: Path) -> None:
    x = RANDOM.standard_normal((20, 3))
    table = read_table(save_array(tmp_path / "a.npy", x))
    assert np.array_equal(values(table), x.astype(np.float32))
    assert (table.shape, table.pixel_range, table.labels) == ((3,), None, None)
    assert table.names == ["x[0]", "x[1]", "x[2]"]
    assert table.units == [None] * 3


@pytest.mark.parametrize("dtype", ["u1", "i2", "<i8", ">i4", "f2", ">f8"])
def test_array_of_any_real_dtype_keeps_its_values(tmp_path: Path, dtype: str) -> None:
    x = np.arange(30).reshape(10, 3)
    assert np.array_equal(values(read_table(save_array(tmp_path / "a.npy", x.astype(dtype)))), x)


def test_matrix_of_bytes_is_not_read_as_an_image(tmp_path: Path) -> None:
    assert read_table(save_array(tmp_path / "a.npy", np.arange(30, dtype=np.uint8).reshape(10, 3))).pixel_range is None


def test_bytes_in_three_dimensions_are_read_as_images_with_values_from_0_to_255(tmp_path: Path) -> None:
    x = RANDOM.randint(0, 100, (12, 5, 4)).astype(np.uint8)
    table = read_table(save_array(tmp_path / "a.npy", x))
    assert (table.shape, table.pixel_range) == ((5, 4), (0, 255))
    assert table.names[-1] == "pixel[4,3]"
    assert np.array_equal(values(table).reshape(12, 5, 4), x)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, (0, 1)),
        (0.01, 0.9, (0, 1)),
        (-0.9, 1, (-1, 1)),
        (0, 250, (0, 255)),
        (0, 16, (0, 16)),
        (3, 7.0004, (3, 7)),
    ],
)
def test_pixel_range_of_floats_is_a_usual_range_or_else_the_rounded_minimum_and_maximum(
    tmp_path: Path, low: float, high: float, expected: tuple[float, float]
) -> None:
    x = np.linspace(low, high, 10 * 6).reshape(10, 2, 3)
    assert read_table(save_array(tmp_path / "a.npy", x)).pixel_range == expected


def test_pixel_names_have_three_indices_if_images_have_channels(tmp_path: Path) -> None:
    table = read_table(save_array(tmp_path / "a.npy", RANDOM.uniform(size=(10, 3, 2, 2))))
    assert table.shape == (3, 2, 2)
    assert table.names[-1] == "pixel[2,1,1]"


@pytest.mark.parametrize("key", ["x", "X", "rows"])
def test_array_y_of_an_archive_is_read_as_labels(tmp_path: Path, key: str) -> None:
    x, y = RANDOM.standard_normal((10, 2)), np.arange(10) % 2
    arrays: dict[str, Any] = {key: x, "y": y}
    np.savez(tmp_path / "a.npz", **arrays)
    table = read_table(str(tmp_path / "a.npz"))
    assert np.array_equal(values(table), x.astype(np.float32))
    assert table.labels is not None
    assert table.labels.dtype == np.int64
    assert np.array_equal(table.labels, y)


@pytest.mark.parametrize("y", [np.arange(9), np.full(10, 0.5), np.array(["a"] * 10, dtype=object)])
def test_labels_are_ignored_with_a_note_unless_there_is_one_integer_per_row(tmp_path: Path, y: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", x=RANDOM.standard_normal((10, 2)), y=y)
    table = read_table(str(tmp_path / "a.npz"))
    assert table.labels is None
    assert len(table.notes) == 1
    assert table.notes[0].startswith("labels are ignored: expected ")


CSV = "load [%],temperature [deg C],fans\n1,20.5,3\n2,21,4\n3,1e2,5\n"
ROWS = [[1, 20.5, 3], [2, 21, 4], [3, 100, 5]]


@pytest.mark.parametrize(
    "text",
    [
        CSV,
        "\ufeff" + CSV,
        CSV.replace("\n", "\r\n"),
        CSV + "\n\n",
        CSV.rstrip("\n"),
        CSV.replace(",", " , "),
        '"load [%]","temperature [deg C]",fans\n"1","20.5",3\n2,21,4\n3,1e2,5\n',
    ],
    ids=["plain", "byte order mark", "CRLF", "blank lines at the end", "no last newline", "spaces", "quotes"],
)
def test_names_and_units_of_csv_columns_come_from_the_header(tmp_path: Path, text: str) -> None:
    table = read_table(write_text(tmp_path / "a.csv", text))
    assert table.names == ["load", "temperature", "fans"]
    assert table.units == ["%", "deg C", None]
    assert values(table).tolist() == ROWS
    assert (table.shape, table.pixel_range, table.labels, table.notes) == ((3,), None, None, [])


def test_csv_numbers_are_rounded_to_the_nearest_float32(tmp_path: Path) -> None:
    texts = ["0.1", "-3.4e38", "16777217", "1e-45", "+5", ".5", "123456789012345678901234567890"]
    table = read_table(write_text(tmp_path / "a.csv", "a\n" + "\n".join(texts)))
    assert values(table)[:, 0].tolist() == [float(np.float32(text)) for text in texts]


@pytest.mark.parametrize("dtype", [pl.Float32, pl.Int64, pl.UInt8, pl.Decimal(10, 2)])
def test_parquet_columns_of_every_numeric_type_are_read(tmp_path: Path, dtype: pl.DataType) -> None:
    frame = pl.DataFrame({"a [ms]": [1, 2, 3], "b": [4, 5, 6]}).cast(dtype)
    frame.write_parquet(tmp_path / "a.parquet")
    table = read_table(str(tmp_path / "a.parquet"))
    assert (table.names, table.units) == (["a", "b"], ["ms", None])
    assert values(table).tolist() == [[1, 4], [2, 5], [3, 6]]


def test_constant_column_is_kept_with_a_note(tmp_path: Path) -> None:
    table = read_table(write_text(tmp_path / "a.csv", "a,b\n1,7\n2,7\n"))
    assert values(table).tolist() == [[1, 7], [2, 7]]
    assert table.notes == ["1 of 2 features are constant and carry no information: b"]


def test_column_with_few_distinct_float32_values_gets_a_note(tmp_path: Path) -> None:
    seconds = 1_700_000_000 + np.arange(100)  # neighbouring float32 values are 128 apart here
    table = read_table(
        save_array(tmp_path / "a.npy", np.stack([seconds, np.arange(100)], axis=1)), keep=["x[0]", "x[1]"]
    )
    (note,) = table.notes
    assert note == (
        "some features lose precision in float32, because their values are large compared with their spread: x[0]; "
        "subtract a constant from them"
    )


def test_fingerprint_is_the_sha256_of_shape_names_and_values(tmp_path: Path) -> None:
    table = read_table(write_text(tmp_path / "a.csv", "a,b\n1,2\n3,4\n"))
    by_hand = b'[[2], ["a", "b"]]' + np.array([1, 2, 3, 4], "<f4").tobytes()
    assert table.fingerprint == hashlib.sha256(by_hand).hexdigest()


@pytest.mark.parametrize("text", ["a,b\n1,2\n3,5\n", "a,c\n1,2\n3,4\n", "a,b\n3,4\n1,2\n", "a,b\n1,2\n3,4\n5,6\n"])
def test_fingerprint_differs_for_tables_that_differ(tmp_path: Path, text: str) -> None:
    same = read_table(write_text(tmp_path / "a.csv", "a [s],b\n1.0,2\n3,4e0\n")).fingerprint
    assert read_table(write_text(tmp_path / "b.csv", "a,b\n1,2\n3,4\n")).fingerprint == same
    assert read_table(write_text(tmp_path / "c.csv", text)).fingerprint != same


def model_rows(tmp_path: Path, text: str, name: str = "rows.csv") -> Table:
    trained_on = read_table(write_text(tmp_path / "train.csv", "a [s],b\n1,2\n3,4\n"))
    return read_for_model(write_text(tmp_path / name, text), manifest_of(trained_on))


def test_read_for_model_finds_columns_by_name(tmp_path: Path) -> None:
    table = model_rows(tmp_path, "host,b,time,a\nx,20,monday,10\ny,40,,30\n")
    assert table.names == ["a", "b"]
    assert table.units == ["s", None]
    assert values(table).tolist() == [[10, 20], [30, 40]]
    assert table.labels is None


@pytest.mark.parametrize("column", ["label", "y"])
def test_read_for_model_returns_labels_from_a_column_that_is_not_a_feature(tmp_path: Path, column: str) -> None:
    table = model_rows(tmp_path, f"a,b,{column}\n1,2,0\n3,4,1\n")
    assert table.labels is not None
    assert table.labels.tolist() == [0, 1]


def test_read_for_model_accepts_a_single_row_and_equal_rows(tmp_path: Path) -> None:
    assert values(model_rows(tmp_path, "a,b\n1,2\n")).tolist() == [[1, 2]]
    assert model_rows(tmp_path, "a,b\n1,2\n1,2\n").notes == []


def test_read_for_model_reshapes_flat_rows_to_images_if_the_model_takes_images(tmp_path: Path) -> None:
    digits = read_table("digits")
    table = read_for_model(save_array(tmp_path / "a.npy", values(digits)), manifest_of(digits))
    assert (table.shape, table.pixel_range) == ((8, 8), (0, 1))
    assert table.fingerprint == digits.fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a,c\n1,2\n",
            r"lacks 1 of the model's 2 columns \(the first is 'b'\): expected a column of that name, got a, c$",
        ),
        ("a [ms],b\n1,2\n", r"column 'a' is in ms, expected s: convert it$"),
        ("a,b\n1,x\n", r"column 'b': expected numbers, got 'x' in row 0 \(line 2\)"),
    ],
)
def test_read_for_model_raises_if_the_columns_do_not_fit_the_model(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        model_rows(tmp_path, text)


def test_read_for_model_raises_if_the_rows_have_the_wrong_width(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"has rows of 63 numbers: expected 64, because model 'm' takes rows of shape \[8, 8\]"
    ):
        read_for_model(save_array(tmp_path / "a.npy", np.ones((3, 63))), manifest_of(read_table("digits")))


def test_importing_the_readers_imports_no_heavy_library() -> None:
    code = "import sys, training.data; print({'polars', 'sklearn', 'torch', 'pydantic'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
