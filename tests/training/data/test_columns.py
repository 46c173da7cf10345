"""Columns of text, dates and identifiers among the measurements, and missing values."""

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data import values
from tests.training.manifests import manifest_of
from training.data.row_store import RowStore, column_medians
from training.data.table import DataError, read_for_model, read_table

NAN = float("nan")
RANDOM = np.random.RandomState(0)
HOSTS = "host,time,id,cpu [%],disk\n" + "".join(
    f"web-{i % 3},2026-01-02 03:{i:02},{100 + i},{i * 7 % 11},{i * 5 % 13}\n" for i in range(12)
)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def csv_with(column: str, numbers: list[Any]) -> str:
    """Return a CSV with a column of `numbers` and a column of measurements."""
    return f"{column},cpu\n" + "".join(f"{number},{i * 7 % 11}\n" for i, number in enumerate(numbers))


def refusal(source: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_table(source, **options)
    return str(caught.value).replace(source, "FILE")


def test_one_message_names_all_columns_of_text_dates_or_identifiers_and_suggests_dropping_them(tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "a.csv", HOSTS)) == (
        "FILE: columns 'host' (text, 'web-0' in row 0 (line 2)), 'time' (dates, '2026-01-02 03:00' in row 0 (line 2)), "
        "'id' (an identifier: it counts the rows) are not measurements: add --drop host,time,id, "
        "or --keep id to learn from id anyway; if 'time' is the time of a row, use it with --time time"
    )


def test_message_about_refused_parquet_columns_names_the_kind_of_each_column(tmp_path: Path) -> None:
    frame = pl.read_csv(HOSTS.encode(), try_parse_dates=True).with_columns(pl.lit(None).alias("empty"))
    frame.with_columns(pl.col("host").cast(pl.Categorical)).write_parquet(tmp_path / "a.parquet")
    message = refusal(str(tmp_path / "a.parquet"))
    assert "'host' (text, 'web-0' in row 0), 'time' (dates, 2026-01-02 03:00:00 in row 0), 'id' (an" in message
    table = read_table(str(tmp_path / "a.parquet"), drop=["host", "time", "id", "empty"])
    assert table.names == ["cpu", "disk"]


def test_option_drop_removes_any_column_and_option_keep_retains_only_identifiers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", HOSTS)
    table = read_table(path, drop=["host", "time"], keep=["id"])
    assert (table.names, table.units) == (["id", "cpu", "disk"], [None, "%", None])
    assert values(table)[:3].tolist() == [[100, 0, 0], [101, 7, 5], [102, 3, 10]]
    assert "'host' (text, " in refusal(path, drop=["time", "id"], keep=["host"])


@pytest.mark.parametrize(
    ("column", "numbers", "why"),
    [
        ("n", range(1000, 1010), "an identifier: it counts the rows"),
        ("n", range(1000, 1009), None),  # too few rows
        ("n", [*range(9), 10], None),
        ("n", range(0, 20, 2), None),
        ("host_id", range(0, 20, 2), "an identifier: a different integer in every row"),
        ("ID", [5, 3, 9, 1, 7, 2, 8, 4, 6, 0], "an identifier: a different integer in every row"),
        ("uuid", [5, 3, 9, 1, 7, 2, 8, 4, 6, 5], None),
        ("index", [0.5, 3, 9, 1, 7, 2, 8, 4, 6, 0], None),
        ("index", [5, "", 9, 1, 7, 2, 8, 4, 6, 0], None),
        ("humid", [5, 3, 9, 1, 7, 2, 8, 4, 6, 0], None),
    ],
)
def test_identifier_column_is_detected_by_its_numbers_and_its_name(
    tmp_path: Path, column: str, numbers: Any, why: str | None
) -> None:
    path = write(tmp_path / "a.csv", csv_with(column, list(numbers)))
    if why is None:
        assert read_table(path).names == [column, "cpu"]
    else:
        assert f"column {column!r} ({why}) is not a measurement: add --drop {column}" in refusal(path)
        assert read_table(path, keep=[column]).names == [column, "cpu"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": ["hots"]}, "FILE has no column 'hots' to drop: did you mean 'host'?"),
        ({"keep": ["x"]}, "FILE has no column 'x' to keep: it has host, time, id, cpu, disk"),
        (
            {"drop": ["host", "time", "id", "cpu", "disk"]},
            "FILE: all 5 columns are dropped: keep at least one to learn from",
        ),
    ],
)
def test_error_about_an_unknown_column_or_no_remaining_column_gives_advice(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    assert refusal(write(tmp_path / "a.csv", HOSTS), **options) == message


def test_drop_removes_columns_of_an_array_by_their_index(tmp_path: Path) -> None:
    x = np.random.RandomState(0).standard_normal((10, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "a.npz", x=x)
    for name in ("a.npy", "a.npz"):
        table = read_table(str(tmp_path / name), drop=["x[1]"])
        assert table.names == ["x[0]", "x[2]"]
        assert np.array_equal(values(table), x[:, [0, 2]])
        assert (
            refusal(str(tmp_path / name), drop=["x[3]"]) == "FILE has no column 'x[3]' to drop: expected x[0] to x[2]"
        )


@pytest.mark.parametrize("words", [("true", "false"), ("TRUE", "False"), ("yes", "no"), ("1", "false")])
def test_true_and_false_in_csv_are_read_as_1_and_0_with_a_note(tmp_path: Path, words: tuple[str, str]) -> None:
    table = read_table(write(tmp_path / "a.csv", f"a,b\n1,{words[0]}\n2,{words[1]}\n3,\n"))
    assert values(table)[:2, 1].tolist() == [1, 0]
    assert np.isnan(values(table)[2, 1])
    assert table.notes[0] == "true and yes are read as 1, false and no as 0: b"


def test_booleans_in_parquet_are_read_as_1_and_0_with_a_note(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1, 2], "b": [True, False]}).write_parquet(tmp_path / "a.parquet")
    table = read_table(str(tmp_path / "a.parquet"))
    assert values(table)[:, 1].tolist() == [1, 0]
    assert table.notes == ["true and yes are read as 1, false and no as 0: b"]


# Missing values


def test_missing_values_stay_nan_and_are_counted(tmp_path: Path) -> None:
    cells = ["", "NA", "n/a", "NaN", "null", "-", "?", "5", "6", "7", "8"]
    table = read_table(
        write(tmp_path / "a.csv", "cpu,disk,net\n" + "".join(f"{c},{i * i},1\n" for i, c in enumerate(cells)))
    )
    assert table.missing.tolist() == [7, 0, 0]
    assert np.isnan(values(table)[:7, 0]).all()
    assert values(table)[7:, 0].tolist() == [5, 6, 7, 8]
    assert table.notes == [
        "7 missing values in 1 of 3 columns (cpu 7): they are replaced by the column's training median",
        "more than half of the values are missing in cpu: consider --drop cpu",
        "1 of 3 features are constant and carry no information: net",
    ]


def test_column_median_ignores_missing_values_and_is_nan_if_all_values_are_missing() -> None:
    x = np.array([[1, NAN], [5, NAN], [NAN, NAN], [2, 4], [100, 100]], np.float32)
    assert column_medians(RowStore(x), np.array([0, 1, 2, 3])).tolist() == [2, 4]
    assert np.isnan(column_medians(RowStore(x), np.array([0, 1]))[1])


@pytest.mark.parametrize(
    ("ordinary", "sentinel", "count"),
    [
        (np.linspace(0.1, 11.9, 200), -200, 40),
        (np.linspace(-20, 40, 200), -9999, 3),
        (np.linspace(0, 300, 200), 999, 10),
        (np.arange(1000) % 83, 65535, 3),
        (np.linspace(5, 6, 100), -1, 5),
        (np.linspace(0, 1, 100), 77.5, 5),
        (np.linspace(0, 100, 200), -99.9, 5),
    ],
)
def test_value_that_piles_up_far_from_the_other_values_of_its_column_gets_a_note(
    tmp_path: Path, ordinary: np.ndarray, sentinel: float, count: int
) -> None:
    cells = RANDOM.permutation(np.concatenate([ordinary, np.full(count, sentinel)]))
    np.save(tmp_path / "a.npy", np.stack([RANDOM.standard_normal(len(cells)), cells], axis=1))
    (note,) = read_table(str(tmp_path / "a.npy")).notes
    assert note == (
        f"these values occur often, and far from all other values of their column: {sentinel:g} in x[1]; if they stand "
        "for missing values, leave those cells empty"
    )


def test_two_sentinels_at_the_same_end_of_a_column_get_one_note(tmp_path: Path) -> None:
    cells = RANDOM.permutation(np.concatenate([np.linspace(-20, 40, 200), np.repeat([-9999.0, -8888.0], 5)]))
    np.save(tmp_path / "a.npy", np.stack([RANDOM.standard_normal(len(cells)), cells], axis=1))
    (note,) = read_table(str(tmp_path / "a.npy")).notes
    assert ": -9999 in x[1], -8888 in x[1]; if they stand" in note


@pytest.mark.parametrize(
    "cells",
    [
        np.arange(200) % 2,
        np.concatenate([np.arange(100) % 3, np.linspace(95, 105, 100)]),
        np.arange(200) % 4 - 1,
        np.concatenate([np.linspace(0, 1, 199), [-200]]),
        np.concatenate([np.zeros(150), np.linspace(0.5, 3, 50)]),
        np.minimum(np.linspace(0, 100, 200), 60),
    ],
    ids=["binary", "off and on", "small integers from -1", "one outlier", "many zeros", "clipped"],
)
def test_ends_of_a_column_that_are_no_sentinels_get_no_note(tmp_path: Path, cells: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", np.stack([RANDOM.standard_normal(200), RANDOM.permutation(cells)], axis=1))
    assert read_table(str(tmp_path / "a.npy")).notes == []


def model_rows(tmp_path: Path, text: str) -> Any:
    trained = read_table(write(tmp_path / "train.csv", "a,b\n1,2\n3,\n5,6\n"))
    return read_for_model(write(tmp_path / "rows.csv", text), manifest_of(trained))


def test_missing_values_are_accepted_only_in_columns_that_had_some_in_training(tmp_path: Path) -> None:
    table = model_rows(tmp_path, "a,b\n1,\n2,\n")
    assert table.missing.tolist() == [0, 2]
    assert np.isnan(values(table)[:, 1]).all()
    with pytest.raises(DataError, match=r"'a' has no value \(NaN\) in row 1 \(line 3\) and in 1 more: .* without miss"):
        model_rows(tmp_path, "a,b\n1,2\n,2\n,3\n")


# All formats give the same table

CELLS = st.one_of(st.none(), st.floats(-(2.0**100), 2.0**100, width=32), st.integers(-(2**24), 2**24).map(float))
TABLES = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), min_size=2, max_size=30)
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=TABLES)
def test_all_formats_give_the_same_table_for_the_same_values(tmp_path: Path, rows: list[list[float | None]]) -> None:
    x = np.array([[NAN if cell is None else cell for cell in row] for row in rows])
    names = [f"x[{index}]" for index in range(x.shape[1])]
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(x))
    frame = pl.DataFrame({name: [row[index] for row in rows] for index, name in enumerate(names)}, strict=False)
    frame = frame.cast(pl.Float64)
    frame.write_parquet(tmp_path / "a.parquet")
    frame.write_csv(tmp_path / "a.csv")
    options = {"keep": names}
    outcomes = {suffix: outcome(str(tmp_path / f"a.{suffix}"), options) for suffix in ("parquet", "csv")}
    outcomes |= {suffix: outcome(str(tmp_path / f"a.{suffix}"), {}) for suffix in ("npy", "npz")}
    expected = outcomes["npy"]
    assert outcomes["npz"] == expected
    assert outcomes["parquet"] == expected
    last_is_empty = all(cell is None for cell in rows[-1])  # in CSV, an empty last line is not a row
    assert outcomes["csv"] == expected or last_is_empty or x.shape[1] == 1


def outcome(source: str, options: dict[str, Any]) -> Any:
    try:
        table = read_table(source, **options)
    except DataError as error:
        return str(error).replace(source, "FILE").split(" row ")[0]
    return table.fingerprint, table.missing.tolist(), table.notes, values(table).tobytes()


def test_dates_in_parquet_are_not_read_as_numbers(tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": [1, 2], "when": [datetime(2026, 1, 2), datetime(2026, 1, 3)]})  # noqa: DTZ001 - tables contain times without a zone
    frame.write_parquet(tmp_path / "a.parquet")
    assert "'when' (dates, 2026-01-02 00:00:00 in row 0)" in refusal(str(tmp_path / "a.parquet"))
