"""Tables on disk equal tables in memory, and reading larger files does not need more memory."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.data import ROOT, values
from tests.preloaded import PreloadedProcess, run_preloaded
from training.data.row_store import FileArray, RowStore, RowWriter
from training.data.table import MAX_HELD_OUT_ROWS, DataError, read_table, split_rows

pytestmark = pytest.mark.slow

LIMIT = 1000  # bytes of memory for a table; every table in this module is larger
RANDOM = np.random.RandomState(0)


def measurements(rows: int) -> np.ndarray:
    """Return an array [rows, 5] with missing values, a constant column, and a column of large, similar values."""
    x = np.round(RANDOM.standard_normal((rows, 5)), 4)
    x[::7, 1] = np.nan
    x[:, 3] = 5
    x[:, 4] = 1e9 + np.arange(rows) % 3
    return x


def write_npy(path: Path, x: np.ndarray) -> None:
    np.save(path, x)


def write_npy_in_fortran_order(path: Path, x: np.ndarray) -> None:
    np.save(path, np.asfortranarray(x))


def write_npz(path: Path, x: np.ndarray) -> None:
    np.savez_compressed(path, x=x, y=np.arange(len(x)) % 2)


def write_npz_in_fortran_order(path: Path, x: np.ndarray) -> None:
    np.savez(path, x=np.asfortranarray(x), y=np.arange(len(x)) % 2)


def frame_of(x: np.ndarray) -> pl.DataFrame:
    return pl.DataFrame({f"c{i} [ms]": x[:, i] for i in range(x.shape[1])}).fill_nan(None)


def write_csv(path: Path, x: np.ndarray) -> None:
    frame_of(x).write_csv(path)


def write_quoted_csv(path: Path, x: np.ndarray) -> None:
    frame_of(x).write_csv(path, quote_style="always", line_terminator="\r\n")


def write_parquet(path: Path, x: np.ndarray) -> None:
    frame_of(x).write_parquet(path, row_group_size=1000)


WRITERS: list[tuple[str, Callable[[Path, np.ndarray], None]]] = [
    ("a.npy", write_npy),
    ("a.npy", write_npy_in_fortran_order),
    ("a.npz", write_npz),
    ("a.npz", write_npz_in_fortran_order),
    ("a.csv", write_csv),
    ("a.csv", write_quoted_csv),
    ("a.parquet", write_parquet),
]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_table_on_disk_equals_table_in_memory(
    tmp_path: Path, name: str, write: Callable[[Path, np.ndarray], None]
) -> None:
    x = measurements(250_000)  # enough for several blocks of every reader
    write(tmp_path / name, x)
    in_memory, on_disk = read_table(str(tmp_path / name)), read_table(str(tmp_path / name), limit=LIMIT)
    assert (in_memory.x.on_disk, on_disk.x.on_disk) == (False, True)
    assert np.array_equal(values(on_disk), x.astype(np.float32), equal_nan=True)
    assert np.array_equal(values(in_memory), values(on_disk), equal_nan=True)
    assert in_memory.fingerprint == on_disk.fingerprint
    assert (in_memory.names, in_memory.units, in_memory.notes, in_memory.shape) == (
        on_disk.names,
        on_disk.units,
        on_disk.notes,
        on_disk.shape,
    )
    assert in_memory.missing.tolist() == on_disk.missing.tolist() == [0, 35715, 0, 0, 0]
    assert (in_memory.labels is None) == (on_disk.labels is None) == (name != "a.npz")
    if in_memory.labels is not None and on_disk.labels is not None:
        assert np.array_equal(in_memory.labels, on_disk.labels)


def test_array_of_byte_images_keeps_its_values_on_disk(tmp_path: Path) -> None:
    x = RANDOM.randint(0, 256, (3000, 20, 30)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", x=x)
    table = read_table(str(tmp_path / "a.npz"), limit=LIMIT)
    assert (table.shape, table.pixel_range, table.x.on_disk) == ((20, 30), (0, 255), True)
    assert np.array_equal(values(table).reshape(x.shape), x)


def test_error_about_a_value_far_into_a_file_names_the_row(tmp_path: Path) -> None:
    x = measurements(150_000)
    x[123_456, 2] = np.inf
    np.save(tmp_path / "a.npy", x)
    write_csv(tmp_path / "a.csv", x)
    for name, where in (("a.npy", "row 123456: "), ("a.csv", "row 123456 (line 123458): ")):
        with pytest.raises(DataError) as caught:
            read_table(str(tmp_path / name), limit=LIMIT)
        assert f"has the value inf in {where}expected finite numbers" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2,3", "line 150002 has 3 values, but the header has 5: correct the line"),
        ("1,2,3,4,5,6", "line 150002 has 6 values, but the header has 5: correct the line"),
        ('1,2,"3,4,5', "line 150002 opens a quotation that does not end: write a quotation mark"),
    ],
)
def test_error_about_a_ragged_line_far_into_a_csv_file_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    write_csv(tmp_path / "a.csv", measurements(150_000))
    with (tmp_path / "a.csv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        read_table(str(tmp_path / "a.csv"), limit=LIMIT)


def test_quoted_line_ends_and_commas_do_not_split_rows(tmp_path: Path) -> None:
    """The file is read in pieces. A piece may end inside a quoted cell of the dropped column."""
    words = ['"a ""b"", c\n d"', "plain", '"\r\n"', '""']
    lines = [f"{words[i % 4]},{i * i % 1009}\n" for i in range(400_000)]
    (tmp_path / "a.csv").write_text("note,value\n" + "".join(lines), newline="")
    table = read_table(str(tmp_path / "a.csv"), drop=["note"], limit=LIMIT)
    assert values(table)[:, 0].tolist() == [i * i % 1009 for i in range(400_000)]


@pytest.mark.parametrize("dtype", ["u1", "<i8", ">f8", "f2"])
def test_file_array_reads_rows_in_any_order_after_the_file_is_deleted(tmp_path: Path, dtype: str) -> None:
    x = RANDOM.randint(0, 100, (1000, 3)).astype(dtype)
    (tmp_path / "rows").write_bytes(b"header" + x.tobytes())
    with (tmp_path / "rows").open("rb") as file:
        file_array = FileArray(file, x.dtype, 6, x.shape)
    (tmp_path / "rows").unlink()
    rows = RowStore(file_array)
    indices = RANDOM.randint(0, 1000, 200)
    assert np.array_equal(rows.take(indices), x[indices])
    assert rows.take(indices).dtype == np.float32
    assert np.array_equal(rows.read_range(990, 2000), x[990:])
    assert rows.take(np.array([], np.int64)).shape == (0, 3)


def test_reading_raises_instead_of_crashing_if_the_file_was_truncated_after_opening(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", measurements(1000))
    table = read_table(str(tmp_path / "a.npy"), limit=LIMIT)
    os.truncate(tmp_path / "a.npy", 2000)
    with pytest.raises(DataError, match="the data file ends before row 999"):
        table.x.take(np.array([999]))


def test_row_writer_moves_rows_to_disk_when_they_exceed_the_limit() -> None:
    writer = RowWriter(2, np.float32, 80)
    writer.add(np.ones((10, 2)))
    assert not writer.rows().on_disk
    writer = RowWriter(2, np.float32, 80)
    writer.add(np.ones((10, 2)))
    writer.add(np.zeros((1, 2)))
    rows = writer.rows()
    writer.close()
    assert rows.on_disk
    assert rows.read_range(8, 11).tolist() == [[1, 1], [1, 1], [0, 0]]


def test_numbers_of_held_out_and_calibration_rows_are_limited() -> None:
    assert [len(part) for part in vars(split_rows(10**6, 0)).values()] == [
        900_000,
        MAX_HELD_OUT_ROWS,
        MAX_HELD_OUT_ROWS,
    ]
    assert [len(part) for part in vars(split_rows(100_000, 0, 12_288)).values()] == [97_270, 1365, 1365]  # 64 MiB each
    assert np.array_equal(split_rows(1000, 3).fit, split_rows(1000, 3, 12_288).fit)


# Tests that read in a separate process

READING = """
import json, re, sys
from pathlib import Path
import numpy as np, polars
from training.data.table import read_table, split_rows
from training.data.row_store import column_medians

def peak_memory():  # getrusage would inherit the peak of the parent process
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

small, *larger = sys.argv[1:]
read_table(small)  # imports libraries and starts their threads, which would count as growth
before = peak_memory()
for large in larger:
    table = read_table(large, limit=16 << 20)
    table.fingerprint
    fit = split_rows(len(table.x), 0, table.x.width).fit
    for start in range(0, 100_000, 1000):
        table.x.take(fit[start : start + 1000])
    column_medians(table.x, fit)
    print(json.dumps({"growth": peak_memory() - before, "bytes": 4 * len(table.x) * table.x.width}))
    del table
"""


def run_python(program: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a program in a new process, with further environment variables."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "2"} | environment
    return run_preloaded([sys.executable, "-c", program, *arguments], cwd=ROOT, env=variables, text=True, timeout=120)


def write_repeated_npy(path: Path, x: np.ndarray, times: int) -> None:
    np.save(path, np.tile(x, (times, 1)))


def write_repeated_npz(path: Path, x: np.ndarray, times: int) -> None:
    np.savez(path, x=np.tile(x, (times, 1)))


def write_repeated_parquet(path: Path, x: np.ndarray, times: int) -> None:
    pl.DataFrame(np.tile(x, (times, 1))).write_parquet(path, row_group_size=100_000)


def write_repeated_csv(path: Path, x: np.ndarray, times: int) -> None:
    header, lines = pl.DataFrame(x).write_csv().split("\n", 1)
    path.write_text(header + "\n" + lines * times)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.npy", write_repeated_npy),
        ("a.npz", write_repeated_npz),
        ("a.parquet", write_repeated_parquet),
        ("a.csv", write_repeated_csv),
    ],
)
def test_reading_a_larger_file_needs_no_more_memory(
    tmp_path: Path, name: str, write: Callable[[Path, np.ndarray, int], None]
) -> None:
    rows = RANDOM.randint(0, 1000, (10_000, 20)).astype(np.float32)
    write(tmp_path / f"small-{name}", rows[:1000], 1)
    for times in (25, 100):
        write(tmp_path / f"{times}-{name}", rows, times)
    run = run_python(READING, *(str(tmp_path / f"{each}-{name}") for each in ("small", 25, 100)))
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert [result["bytes"] for result in results] == [25 * rows.nbytes, 100 * rows.nbytes]
    assert 25 * rows.nbytes > 16 << 20
    growth = [result["growth"] for result in results]
    assert growth[1] - growth[0] < 75 * rows.nbytes / 2
    assert growth[1] < 96 << 20


OPEN_TABLE = """
import os, sys
from training.data.table import read_table

table = read_table(sys.argv[1], limit=1000)
assert table.x.on_disk
print(os.listdir(os.environ["TMPDIR"]), flush=True)
sys.stdin.read()
"""


def test_temporary_file_disappears_when_the_process_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    write_csv(tmp_path / "a.csv", measurements(50_000))
    with PreloadedProcess(
        [sys.executable, "-c", OPEN_TABLE, str(tmp_path / "a.csv")],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[]\n"  # the temporary file has no name
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(folder.iterdir()) == []


READ_TABLE = """
import resource, sys
from training.data.table import DataError, read_table

resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    read_table(sys.argv[1], limit=1000)
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "write"), [("a.csv", write_csv), ("a.npz", write_npz), ("a.npz", write_npz_in_fortran_order)]
)
def test_error_about_a_full_disk_says_how_much_space_the_rows_need(
    tmp_path: Path, name: str, write: Callable[[Path, np.ndarray], None]
) -> None:
    write(tmp_path / name, measurements(100_000))
    run = run_python(READ_TABLE, str(tmp_path / name), TMPDIR=str(tmp_path))
    assert run.returncode == 0, run.stderr
    size = "more space" if write is write_npz_in_fortran_order else "about 0.002 GB"
    assert run.stdout == (
        f"{tmp_path / name}: the rows do not fit into {tmp_path} (File too large): they need {size}; "
        "free some space there, or set TMPDIR to a folder with enough space\n"
    )
