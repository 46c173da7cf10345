"""Data that do not fit in memory: the same table as in memory, at a cost in memory that does not grow with them."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.data import ROOT, values
from training.data.row_store import FileArray, RowStore, RowWriter
from training.data.table import MAX_HELD_OUT_ROWS, DataError, read_table, split_rows

LIMIT = 1000  # bytes: any table here is larger
RANDOM = np.random.RandomState(0)


def measurements(rows: int) -> np.ndarray:
    """[rows, 5], some missing, with a constant column and one too large for what it varies by."""
    x = np.round(RANDOM.standard_normal((rows, 5)), 4)
    x[::7, 1] = np.nan
    x[:, 3] = 5
    x[:, 4] = 1e9 + np.arange(rows) % 3
    return x


def npy(path: Path, x: np.ndarray) -> None:
    np.save(path, x)


def by_columns(path: Path, x: np.ndarray) -> None:
    np.save(path, np.asfortranarray(x))


def npz(path: Path, x: np.ndarray) -> None:
    np.savez_compressed(path, x=x, y=np.arange(len(x)) % 2)


def npz_by_columns(path: Path, x: np.ndarray) -> None:
    np.savez(path, x=np.asfortranarray(x), y=np.arange(len(x)) % 2)


def frame_of(x: np.ndarray) -> pl.DataFrame:
    return pl.DataFrame({f"c{i} [ms]": x[:, i] for i in range(x.shape[1])}).fill_nan(None)


def csv(path: Path, x: np.ndarray) -> None:
    frame_of(x).write_csv(path)


def quoted_csv(path: Path, x: np.ndarray) -> None:
    frame_of(x).write_csv(path, quote_style="always", line_terminator="\r\n")


def parquet(path: Path, x: np.ndarray) -> None:
    frame_of(x).write_parquet(path, row_group_size=1000)


WRITERS: list[tuple[str, Callable[[Path, np.ndarray], None]]] = [
    ("a.npy", npy),
    ("a.npy", by_columns),
    ("a.npz", npz),
    ("a.npz", npz_by_columns),
    ("a.csv", csv),
    ("a.csv", quoted_csv),
    ("a.parquet", parquet),
]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_on_disk_a_table_is_what_it_is_in_memory(
    tmp_path: Path, name: str, write: Callable[[Path, np.ndarray], None]
) -> None:
    x = measurements(250_000)  # several blocks of every reader
    write(tmp_path / name, x)
    small, large = read_table(str(tmp_path / name)), read_table(str(tmp_path / name), limit=LIMIT)
    assert (small.x.on_disk, large.x.on_disk) == (False, True)
    assert np.array_equal(values(large), x.astype(np.float32), equal_nan=True)
    assert np.array_equal(values(small), values(large), equal_nan=True)
    assert small.fingerprint == large.fingerprint
    assert (small.names, small.units, small.notes, small.shape) == (large.names, large.units, large.notes, large.shape)
    assert small.missing.tolist() == large.missing.tolist() == [0, 35715, 0, 0, 0]
    assert (small.labels is None) == (large.labels is None) == (name != "a.npz")
    if small.labels is not None and large.labels is not None:
        assert np.array_equal(small.labels, large.labels)


def test_pictures_in_an_array_stay_bytes_on_disk(tmp_path: Path) -> None:
    x = RANDOM.randint(0, 256, (3000, 20, 30)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", x=x)
    table = read_table(str(tmp_path / "a.npz"), limit=LIMIT)
    assert (table.shape, table.pixel_range, table.x.on_disk) == ((20, 30), (0, 255), True)
    assert np.array_equal(values(table).reshape(x.shape), x)


def test_what_is_wrong_far_into_a_file_is_named_by_its_row(tmp_path: Path) -> None:
    x = measurements(150_000)
    x[123_456, 2] = np.inf
    np.save(tmp_path / "a.npy", x)
    csv(tmp_path / "a.csv", x)
    for name, where in (("a.npy", "row 123456: "), ("a.csv", "row 123456 (line 123458): ")):
        with pytest.raises(DataError) as caught:
            read_table(str(tmp_path / name), limit=LIMIT)
        assert f"has the value inf in {where}expected finite numbers" in str(caught.value)


@pytest.mark.parametrize(("line", "fields"), [("1,2,3", 3), ("1,2,3,4,5,6", 6), ('1,2,"3,4,5', 3)])
def test_a_broken_line_far_into_a_csv_file_is_refused(tmp_path: Path, line: str, fields: int) -> None:
    csv(tmp_path / "a.csv", measurements(150_000))
    with (tmp_path / "a.csv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=f"line 150002 has {fields} values, the header has 5: correct the line"):
        read_table(str(tmp_path / "a.csv"), limit=LIMIT)


def test_quoted_line_ends_and_commas_do_not_cut_a_row(tmp_path: Path) -> None:
    """A text column that is dropped may hold anything, wherever a piece of the file happens to end."""
    words = ['"a ""b"", c\n d"', "plain", '"\r\n"', '""']
    lines = [f"{words[i % 4]},{i * i % 1009}\n" for i in range(400_000)]
    (tmp_path / "a.csv").write_text("note,value\n" + "".join(lines), newline="")
    table = read_table(str(tmp_path / "a.csv"), drop=["note"], limit=LIMIT)
    assert values(table)[:, 0].tolist() == [i * i % 1009 for i in range(400_000)]


@pytest.mark.parametrize("dtype", ["u1", "<i8", ">f8", "f2"])
def test_rows_of_a_file_are_read_in_any_order(tmp_path: Path, dtype: str) -> None:
    x = RANDOM.randint(0, 100, (1000, 3)).astype(dtype)
    (tmp_path / "rows").write_bytes(b"header" + x.tobytes())
    with (tmp_path / "rows").open("rb") as file:
        stored = FileArray(file, x.dtype, 6, x.shape)
    (tmp_path / "rows").unlink()
    rows = RowStore(stored)
    indices = RANDOM.randint(0, 1000, 200)
    assert np.array_equal(rows.take(indices), x[indices])
    assert rows.take(indices).dtype == np.float32
    assert np.array_equal(rows.span(990, 2000), x[990:])
    assert rows.take(np.array([], np.int64)).shape == (0, 3)


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", measurements(1000))
    table = read_table(str(tmp_path / "a.npy"), limit=LIMIT)
    os.truncate(tmp_path / "a.npy", 2000)
    with pytest.raises(DataError, match="the file of rows ends before row 999"):
        table.x.take(np.array([999]))


def test_rows_that_come_in_pieces_go_to_disk_when_they_no_longer_fit() -> None:
    spool = RowWriter(2, np.float32, 80)
    spool.add(np.ones((10, 2)))
    assert not spool.rows().on_disk
    spool = RowWriter(2, np.float32, 80)
    spool.add(np.ones((10, 2)))
    spool.add(np.zeros((1, 2)))
    rows = spool.rows()
    spool.close()
    assert rows.on_disk
    assert rows.span(8, 11).tolist() == [[1, 1], [1, 1], [0, 0]]


def test_rows_that_judge_and_calibrate_fit_in_memory_however_many_there_are() -> None:
    assert [len(part) for part in vars(split_rows(10**6, 0)).values()] == [
        900_000,
        MAX_HELD_OUT_ROWS,
        MAX_HELD_OUT_ROWS,
    ]
    assert [len(part) for part in vars(split_rows(100_000, 0, 12_288)).values()] == [97_270, 1365, 1365]  # 64 MiB each
    assert np.array_equal(split_rows(1000, 3).fit, split_rows(1000, 3, 12_288).fit)


# In a process of its own

READING = """
import json, re, sys
from pathlib import Path
import numpy as np, polars
from training.data.table import read_table, split_rows
from training.data.row_store import column_medians

def peak():  # not getrusage: its peak is inherited from the process that started this one
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak()
table = read_table(sys.argv[1], limit=16 << 20)
table.fingerprint
fit = split_rows(len(table.x), 0, table.x.width).fit
for start in range(0, 100_000, 1000):
    table.x.take(fit[start : start + 1000])
column_medians(table.x, fit)
print(json.dumps({"grown": peak() - before, "bytes": 4 * len(table.x) * table.x.width}))
"""


def python(program: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "2"}
    environment |= options.pop("environment", {})
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def repeated_npy(path: Path, x: np.ndarray, times: int) -> None:
    np.save(path, np.tile(x, (times, 1)))


def repeated_npz(path: Path, x: np.ndarray, times: int) -> None:
    np.savez(path, x=np.tile(x, (times, 1)))


def repeated_parquet(path: Path, x: np.ndarray, times: int) -> None:
    pl.DataFrame(np.tile(x, (times, 1))).write_parquet(path, row_group_size=100_000)


def repeated_csv(path: Path, x: np.ndarray, times: int) -> None:
    header, lines = pl.DataFrame(x).write_csv().split("\n", 1)
    path.write_text(header + "\n" + lines * times)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.npy", repeated_npy), ("a.npz", repeated_npz), ("a.parquet", repeated_parquet), ("a.csv", repeated_csv)],
)
def test_memory_does_not_grow_with_the_data(
    tmp_path: Path, name: str, write: Callable[[Path, np.ndarray, int], None]
) -> None:
    few, grown = RANDOM.randint(0, 1000, (10_000, 20)).astype(np.float32), []
    for times in (25, 100):
        write(tmp_path / name, few, times)
        run = python(READING, str(tmp_path / name))
        assert run.returncode == 0, run.stderr
        told = json.loads(run.stdout)
        assert told["bytes"] == times * few.nbytes > 16 << 20
        grown.append(told["grown"])
    assert grown[1] - grown[0] < 75 * few.nbytes / 2
    assert grown[1] < 128 << 20


LEAVING = """
import os, sys
from training.data.table import read_table

table = read_table(sys.argv[1], limit=1000)
assert table.x.on_disk
print(os.listdir(os.environ["TMPDIR"]), flush=True)
sys.stdin.read()
"""


def test_nothing_is_left_on_disk_even_when_the_process_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    csv(tmp_path / "a.csv", measurements(50_000))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    with subprocess.Popen(
        [sys.executable, "-c", LEAVING, str(tmp_path / "a.csv")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "[]\n"  # not even while it runs
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(folder.iterdir()) == []


FULL = """
import sys
from training.data.table import DataError, read_table

try:
    read_table(sys.argv[1], limit=1000)
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize(("name", "write"), [("a.csv", csv), ("a.npz", npz), ("a.npz", npz_by_columns)])
def test_a_full_disk_is_told_with_the_room_that_is_needed(
    tmp_path: Path, name: str, write: Callable[[Path, np.ndarray], None]
) -> None:
    write(tmp_path / name, measurements(100_000))
    run = python(
        FULL,
        str(tmp_path / name),
        environment={"TMPDIR": str(tmp_path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )
    assert run.returncode == 0, run.stderr
    size = "more room" if write is npz_by_columns else "about 0.002 GB"
    assert run.stdout == (
        f"{tmp_path / name}: its rows do not fit into {tmp_path} (File too large): they need {size}; "
        "set TMPDIR to a folder with that much room\n"
    )
