"""Columns that are functions of the row number, and identifiers, are refused in every format."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

from tests.training.manifests import manifest_of
from training.data.table import DataError, read_for_model, read_table

ROWS = 500
RANDOM = np.random.RandomState(0)
NUMBER = np.arange(ROWS)
SEQUENCES = "a time or a counter: it rises with the row number, but restarts or belongs to several sources"
WRITTEN, DAYS = "a time, written as a number", "a date, as a number of days"
TIME, UNIX_TIME, UNIQUE = "a time or a counter: it rises", "a time: Unix time", "an identifier: a different integer"
FALLS, COUNTS = "a time or a counter: it falls", "an identifier: it counts the rows"

Values = npt.NDArray[np.float64]


def gaps() -> Values:
    values = 1.7e9 + 60.0 * NUMBER
    values[::7] = np.nan
    return np.asarray(values, np.float64)


COLUMNS: list[tuple[str, Any, str]] = [
    ("epoch", 1.7e9 + 60.0 * NUMBER, UNIX_TIME),
    ("x", 1.7e9 + 60.0 * NUMBER, TIME),
    ("x", 1.7e12 + 1000.0 * NUMBER, TIME),  # milliseconds
    ("x", gaps(), TIME),
    ("elapsed", 0.37 * NUMBER, TIME),
    ("elapsed", 0.37 * NUMBER + 3 * RANDOM.standard_normal(ROWS), TIME),  # nearly monotone
    ("x", np.repeat(NUMBER[: ROWS // 5], 5) * 10.0, TIME),  # five rows at a time
    ("x", np.exp(NUMBER / 50), TIME),  # not linear
    ("order_no", 5000 + NUMBER * 3, UNIQUE),
    ("order_no", RANDOM.permutation(5000 + NUMBER * 3), UNIQUE),
    ("Unnamed: 0", NUMBER, COUNTS),
    ("Unnamed: 0", RANDOM.permutation(NUMBER), UNIQUE),
    ("CustomerId", RANDOM.permutation(15_000_000 + 7 * NUMBER), UNIQUE),
    ("customerid", RANDOM.permutation(15_000_000 + 7 * NUMBER), UNIQUE),
    ("RecordID", RANDOM.permutation(NUMBER), UNIQUE),
    ("remaining", 10_000 - NUMBER, FALLS),
    ("remaining", 10_000 - 2.5 * NUMBER, FALLS),
    ("timestamp", RANDOM.permutation(1.7e9 + 60.0 * NUMBER), UNIX_TIME),  # shuffled
    ("startTime", RANDOM.permutation(1.7e12 + 60.0 * NUMBER), UNIX_TIME),
    *(
        (name, RANDOM.permutation(1.7e12 + 60.0 * NUMBER), UNIX_TIME)
        for name in ("t", "created_at", "ts_ms", "time (ms)")
    ),
    ("updatedAt", RANDOM.permutation(1.7e9 + 60.0 * NUMBER), UNIX_TIME),
    ("date", RANDOM.permutation(20240100 + 100 * (NUMBER % 12) + 1 + NUMBER % 28), WRITTEN),
    ("timestamp", RANDOM.permutation(20240100_000000 + 1_000_000 * (1 + NUMBER % 28) + NUMBER), WRITTEN),
    ("order_date", RANDOM.permutation(45_292 + NUMBER / 24), DAYS),
    ("uptime", NUMBER * 10.0 % 1700, SEQUENCES),
    ("requests_total", np.cumsum(RANDOM.poisson(20, ROWS)) % 6000, SEQUENCES),
    ("x", 1.7e9 + NUMBER % 250 * 60.0, SEQUENCES),  # two hosts, one after the other
    ("x", np.where(NUMBER % 2, 5e6, 0.0) + NUMBER * 7, SEQUENCES),  # two hosts, their rows alternate
    ("x", RANDOM.randint(0, 3, ROWS) * 1e5 + NUMBER * 7, SEQUENCES),  # three hosts, their rows are mixed
    ("remaining", -NUMBER * 10.0 % 3000, SEQUENCES.replace("rises", "falls")),
    ("Unnamed: 0.1", RANDOM.permutation(NUMBER), UNIQUE),
    ("__index_level_0__", RANDOM.permutation(NUMBER), UNIQUE),
    ("id", np.where(NUMBER % 50 == 7, np.nan, RANDOM.permutation(NUMBER)), UNIQUE),
]


def write_csv(path: Path, name: str, values: Any) -> str:
    frame = pl.DataFrame(
        {"load": RANDOM.standard_normal(len(values)), name: values, "temp": RANDOM.uniform(size=len(values))}
    )
    frame.fill_nan(None).write_csv(path)
    return str(path)


@pytest.mark.parametrize(("name", "values", "reason"), COLUMNS)
def test_column_that_is_a_time_a_counter_or_an_identifier_is_refused_with_advice(
    name: str, values: Any, reason: str, tmp_path: Path
) -> None:
    path = write_csv(tmp_path / "a.csv", name, values)
    with pytest.raises(DataError) as error:
        read_table(path)
    message = str(error.value)
    assert f"column {name!r} ({reason}" in message
    assert "--drop" in message
    assert "--keep" in message
    assert read_table(path, drop=[name]).names == ["load", "temp"]
    kept = read_table(path, keep=[name])
    assert kept.names == ["load", name, "temp"]
    assert len(read_for_model(path, manifest_of(kept)).x) == ROWS  # rows for a model are not checked


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("walk", np.cumsum(np.random.RandomState(1).standard_normal(ROWS))),
        ("trend", 0.02 * NUMBER + 5 * np.random.RandomState(1).standard_normal(ROWS)),
        ("minute", NUMBER % 60),
        ("switched", (NUMBER > 250).astype(float)),
        ("hour", NUMBER % 24),
        ("wear", NUMBER * 0.7 % 40),  # 8 tools
        ("charge", np.abs(100 - NUMBER % 200)),
        ("errors", np.where(NUMBER % 25 == 3, np.random.RandomState(1).exponential(30, ROWS), 0)),
        ("day", np.sin(NUMBER / 80)),
        ("response_at_load", np.random.RandomState(1).permutation(1.7e9 + NUMBER)),
        ("level", NUMBER // 100),  # sorted by one of five levels
        ("humid", np.random.RandomState(1).permutation(NUMBER)),
        ("volcano", np.random.RandomState(1).permutation(NUMBER)),
        ("time", np.random.RandomState(1).exponential(30, ROWS)),  # a duration
        ("constant", np.ones(ROWS)),
        ("short", None),
    ],
)
def test_measurement_is_accepted_although_it_drifts_repeats_or_has_a_similar_name(
    name: str, values: Any, tmp_path: Path
) -> None:
    values = np.arange(19) * 1.5 if values is None else values  # too few rows to tell
    assert read_table(write_csv(tmp_path / "a.csv", name, values)).names == ["load", name, "temp"]


def test_note_names_an_identifier_that_occurs_in_several_rows(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", "customer_id", RANDOM.randint(0, 99, ROWS))
    assert (
        "customer_id is a feature: a model flags all rows with new identifiers, so if this is what they are, add "
        "--drop customer_id"
    ) in read_table(path).notes
    assert not any("identifiers" in note for note in read_table(path, keep=["customer_id"]).notes)


@pytest.mark.parametrize("suffix", ["npy", "npz", "parquet"])
@pytest.mark.parametrize("sign", [1, -1])
def test_column_that_follows_the_row_number_is_refused_in_other_formats(suffix: str, sign: int, tmp_path: Path) -> None:
    x = RANDOM.standard_normal((ROWS, 3))
    x[:, 1] = sign * (1.7e9 + 60.0 * NUMBER)
    path = str(tmp_path / f"a.{suffix}")
    if suffix == "npy":
        np.save(path, x)
    elif suffix == "npz":
        np.savez(path, x=x)
    else:
        pl.DataFrame({f"x[{column}]": x[:, column] for column in range(3)}).write_parquet(path)
    with pytest.raises(
        DataError, match=r"column 'x\[1\]' \(a time or a counter: it (rises|falls) .*: add --drop 'x\[1\]', or"
    ):
        read_table(path)
    assert read_table(path, keep=["x[1]"]).x.width == 3
    assert read_table(path, drop=["x[1]"]).x.width == 2


def test_images_are_never_refused_as_counters(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.linspace(0, 1, ROWS * 6).reshape(ROWS, 2, 3))
    assert read_table(str(tmp_path / "a.npy")).shape == (2, 3)


def test_column_is_recognised_in_a_table_of_many_blocks(tmp_path: Path) -> None:
    x = np.random.RandomState(0).standard_normal((300_000, 6)).astype(np.float32)
    x[:, 4] = np.arange(300_000) / 7
    np.save(tmp_path / "a.npy", x)
    with pytest.raises(DataError, match=r"column 'x\[4\]' \(a time or a counter: it rises"):
        read_table(str(tmp_path / "a.npy"))


def test_option_keep_of_an_unknown_array_column_raises(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", RANDOM.standard_normal((20, 2)))
    with pytest.raises(DataError, match=r"has no column 'cpu' to keep: expected x\[0\] to x\[1\]"):
        read_table(str(tmp_path / "a.npy"), keep=["cpu"])
