"""Sources that are refused. Every case is a real file, and every message is one line that says what to do."""

import pickle
import zipfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from models.errors import ElboError
from training.data.table import DataError, read_table


def refusal(source: str) -> str:
    with pytest.raises(DataError) as caught:
        read_table(source)
    message = str(caught.value)
    assert isinstance(caught.value, ElboError)
    assert caught.value.code == "data_error"
    assert "\n" not in message
    assert source in message
    return message.replace(source, "FILE")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "FILE is empty: expected a header line with column names, then rows of numbers"),
        ("\n\n", "FILE is empty: expected a header line"),
        ("a,b\n", "FILE has no rows of numbers (shape [0, 2]): expected at least one"),
        (
            "a,b\n1,2\n3,x\n5,y\n7,8\n9,1\n",
            "'b': expected numbers, got 'x' in row 1 (line 3): correct the cell (a missing value is an empty cell)",
        ),
        ("a,b\n1,true\n2,5\n", "column 'b': expected numbers, got 'true' in row 0 (line 2): write 0 and 1"),
        ('a,b\n1,"2,5"\n2,3\n3,4\n', "column 'b': expected numbers, got '2,5' in row 0 (line 2)"),
        ("a,b\n1,\n3,NaN\n", "FILE: column 'b' has no value in any row: add --drop b"),
        ("a,b c,d\n1,,\n3,,\n", "FILE: columns b c, d have no value in any row: add --drop 'b c,d'"),
        ("a,b\n1,2\n1,\n1,2\n", "FILE: all 3 rows are equal except for missing values: expected rows that differ"),
        ("a,b\n1,2\n-inf,4\n", "column 'a' has the value -inf in row 1 (line 3): expected finite numbers"),
        (
            "a,b\n1,2\n1e39,4\n",
            "column 'a' has the value 1e+39, beyond the range of float32 (3.4e38), in row 1 (line 3)",
        ),
        ("a,b\n1,2\n3\n", "line 3 has 1 values, but the header has 2: correct the line"),
        ("a,b\n1,2\n3,4,5\n", "line 3 has 3 values, but the header has 2: correct the line"),
        ("a;b\n1;2\n", "FILE separates its columns by semicolons: expected commas; convert it"),
        ("a\tb\n1\t2\n", "FILE separates its columns by tabs: expected commas; convert it"),
        ("1.5,2\n3,4\n", "FILE has numbers in its first line: expected a header; put column names above the rows"),
        ("a,b,a\n1,2,3\n", "columns 1 and 3 are both named 'a': rename one"),
        ("a [s],a [ms]\n1,2\n", "columns 1 and 2 are both named 'a': rename one"),
        (",a,b\n0,1,2\n", "column 1 has no name: name it (pandas: write with index=False)"),
        ("a,b\n1,2\n1,2\n1,2\n", "FILE: all 3 rows are equal: expected rows that differ, to learn from"),
        (
            'a,b\n1,"2\n3,4\n',
            "FILE: line 2 opens a quotation that does not end: write a quotation mark inside a quoted",
        ),
    ],
)
def test_csv_without_a_table_of_numbers_raises(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    assert message in refusal(str(path))


@pytest.mark.parametrize(
    ("cell", "advice"),
    [
        ("45%", "write the number alone, and its unit in the header, as in 'load [%]'"),
        ("12.5 ms", "write the number alone, and its unit in the header, as in 'load [%]'"),
        ("-3GiB", "write the number alone, and its unit in the header, as in 'load [%]'"),
        ("$ 4.20", "write the number alone, and its unit in the header, as in 'price [€]'"),
        ('"2,5"', "write a decimal point instead of the decimal comma"),
        ('"1.234,5"', "write a decimal point instead of the decimal comma"),
        ('"1,234"', "write a decimal point instead of the comma, or no thousands separators"),
        ('"1,234.5"', "write the number without thousands separators"),
        ("1 234", "write the number without thousands separators"),
        ("1.234.567", "write the number without thousands separators"),
        ("\u22125", "write a negative number with a hyphen before it, as in -5"),
        ("(5)", "write a negative number with a hyphen before it, as in -5"),
        ("5-", "write a negative number with a hyphen before it, as in -5"),
    ],
)
@pytest.mark.parametrize("count", [1, 30])
def test_number_in_a_notation_that_is_not_read_raises_without_the_advice_to_drop_the_column(
    tmp_path: Path, cell: str, advice: str, count: int
) -> None:
    path = tmp_path / "a.csv"
    path.write_text("host,load,b\n" + f"x,{cell},2\n" * count + "y,7,3\n" * 5)
    text = cell.strip('"')
    assert refusal(str(path)) == (f"FILE: column 'load': expected numbers, got {text!r} in row 0 (line 2): {advice}")


@pytest.mark.parametrize(
    "content",
    [
        "a,b\u00e9\n1,2\n".encode("latin-1"),
        "a,b\n1,2\n".encode("utf-16"),
        "a,b\n1,2\n".encode("utf-16-le"),
        b"\x89PNG\xff",
    ],
)
def test_csv_in_an_encoding_other_than_utf8_raises(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    assert refusal(str(path)) == "FILE is not UTF-8 text: save it as CSV in UTF-8"


def test_csv_with_an_invalid_character_after_the_header_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,b\n" + b"1,2\n" * 5000 + b"1,\xe9\n")
    assert refusal(str(path)) == "FILE: line 5002 is not UTF-8 text: save the file as CSV in UTF-8"


@pytest.mark.parametrize("header", ["0,1,2", "1,2,3"])
def test_csv_is_accepted_if_the_header_consists_of_column_positions(tmp_path: Path, header: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(header + "\n4,5,6\n7,8,9\n")
    assert read_table(str(path)).names == header.split(",")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(10.0), "FILE: expected rows of features, [N, D], got shape [10]: reshape the array"),
        (np.array(3.0), "FILE: expected rows of features, [N, D], got shape []"),
        (np.empty((0, 4)), "FILE has no rows of numbers (shape [0, 4])"),
        (np.empty((4, 0)), "FILE has no rows of numbers (shape [4, 0])"),
        (np.ones((3, 2), complex), "FILE: expected an array of real numbers, got complex128: convert them"),
        (
            np.ones((3, 2), bool),
            "FILE: expected an array of real numbers, got bool: convert them with x.astype(",
        ),
        (np.array([["a", "b"]]), "FILE: expected an array of real numbers, got <U1"),
        (np.zeros(3, [("a", "f4"), ("b", "f4")]), "FILE: expected an array of real numbers, got [('a'"),
        (np.array([["a", 1]], dtype=object), "FILE holds Python objects: expected numbers; save x.astype('float32')"),
        (np.array([[1, np.nan], [3, np.nan]]), "column 'x[1]' has no value in any row: add --drop 'x[1]'"),
        (np.array([[1.0, 2], [np.inf, 4]]), "column 'x[0]' has the value inf in row 1: expected finite numbers"),
        (
            np.array([[1.0, 2], [3, -1e300]]),
            "column 'x[1]' has the value -1e+300, beyond the range of float32 (3.4e38), in row 1",
        ),
        (np.full((5, 2, 2), 3.0), "FILE: all 5 rows are equal"),
        (
            2**60 + np.arange(20).reshape(10, 2) % 7,
            "FILE: in float32, which holds 7 digits, all 10 rows are equal, because values near 1.15e+18 differ too ",
        ),
    ],
)
def test_array_without_rows_of_finite_numbers_raises(tmp_path: Path, array: Any, message: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, array, allow_pickle=True)
    assert message in refusal(str(path))


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        ({"train": np.ones((4, 2)), "test": np.ones((3, 2))}, "train (4, 2), test (3, 2)"),
        ({"y": np.arange(4)}, "y (4,)"),
        ({}, "nothing"),
    ],
)
def test_archive_raises_if_it_is_unclear_which_array_holds_the_rows(
    tmp_path: Path, arrays: dict[str, Any], found: str
) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    expected = f"FILE: expected an array named x, got {found}: save the rows with numpy.savez(path, x=rows)"
    assert refusal(str(path)) == expected


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["u", "v"], "column 'b' (text, 'u' in row 0) is not a measurement: add --drop b"),
        ([None, "v"], "column 'b' (text, 'v' in row 1) is not a measurement: add --drop b"),
        ([date(2026, 1, 1), None], "column 'b' (dates, 2026-01-01 in row 0) is not a measurement: add --drop b"),
        ([[1], [2]], "column 'b' (List(Int64), [1] in row 0) is not a measurement: add --drop b"),
        ([None, None], "column 'b' has no value in any row: add --drop b"),
        ([1.0, float("inf")], "column 'b' has the value inf in row 1"),
    ],
)
def test_parquet_column_without_numbers_raises(tmp_path: Path, column: list[Any], message: str) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame({"a": [1, 2], "b": column}).write_parquet(path)
    assert message in refusal(str(path))


def test_parquet_without_rows_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame({"a": []}, schema={"a": pl.Float64}).write_parquet(path)
    assert refusal(str(path)) == "FILE has no rows of numbers (shape [0, 1]): expected at least one"


def write_npy(path: Path) -> None:
    np.save(path, np.ones((50, 5)))


def write_npz(path: Path) -> None:
    np.savez(path, x=np.ones((50, 5)))


def write_parquet(path: Path) -> None:
    pl.DataFrame({"a": range(500)}).write_parquet(path)


WRITERS: list[tuple[str, Callable[[Path], None]]] = [
    ("a.npy", write_npy),
    ("a.npz", write_npz),
    ("a.parquet", write_parquet),
]


@pytest.mark.parametrize(("name", "write"), WRITERS)
@pytest.mark.parametrize("end", [0, 3, 100, -8])
def test_truncated_file_raises(tmp_path: Path, name: str, write: Callable[[Path], None], end: int) -> None:
    path = tmp_path / name
    write(path)
    path.write_bytes(path.read_bytes()[:end])
    assert refusal(str(path)).startswith("FILE is damaged or not a ")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.parquet"])
def test_file_raises_if_the_format_differs_from_the_suffix(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("text of some length instead of the format of the suffix")
    assert refusal(str(path)).startswith("FILE is damaged or not a ")


def test_archive_with_one_flipped_bit_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_npz(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert refusal(str(path)).startswith("FILE is damaged or not a NumPy file")


class TouchWhenUnpickled:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_pickled_code_is_never_executed(tmp_path: Path, name: str) -> None:
    path, touched = tmp_path / name, tmp_path / "touched"
    array = np.empty((1, 1), dtype=object)
    array[0, 0] = TouchWhenUnpickled(touched)
    np.save(tmp_path / "inner.npy", array, allow_pickle=True)
    if name == "a.npy":
        path.write_bytes(pickle.dumps(TouchWhenUnpickled(touched)))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "inner.npy", "x.npy")
    assert refusal(str(path)).startswith("FILE ")
    assert not touched.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "gone.csv",
            "FILE does not exist: expected a file (.npy, .npz, .csv, .parquet), a folder of images, or 'digits'",
        ),
        (
            "folder",
            "FILE has no images: expected .png, .jpg, .jpeg, .bmp, .webp, .gif, .tif, .tiff in it or its folders",
        ),
        (
            "a.xlsx",
            "FILE has the suffix '.xlsx': expected .npy, .npz, .csv, .parquet; convert the file to one of these",
        ),
        ("bare", "FILE has no suffix: expected .npy, .npz, .csv, .parquet; convert the file to one of these"),
    ],
)
def test_source_that_is_not_a_data_file_raises(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.xlsx").touch()
    (tmp_path / "bare").touch()
    assert refusal(str(tmp_path / name)) == message


@pytest.mark.parametrize("shape", ["(-1, 4)", "(-1, -4)", "(True, 4)", "(1, True, 4)", "(" + "1, " * 70 + ")"])
@pytest.mark.parametrize("data", [b"", b"\0" * 16])
def test_npy_file_of_an_impossible_shape_is_damaged(tmp_path: Path, shape: str, data: bytes) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".encode()
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + data)
    with pytest.raises(DataError, match="is damaged or not a NumPy file"):
        read_table(str(path))
