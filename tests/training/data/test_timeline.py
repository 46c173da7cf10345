"""The time and the group of each row: reading, order, gaps, and messages about faulty cells."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.data import values
from tests.training.series import START, STEP, csv_of_times, host_metrics, save
from training.data.table import DataError, Table, read_table
from training.data.timeline import Timeline, describe_duration

NANOSECOND = 10**9
START_SECONDS = int(START.timestamp())


def timeline_of(table: Table) -> Timeline:
    assert table.timeline is not None
    return table.timeline


def refusal(source: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_table(source, **options)
    return str(caught.value).replace(source, "FILE")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_in_any_order_are_sorted_by_group_and_time_with_their_values(suffix: str, tmp_path: Path) -> None:
    frame = host_metrics(40)
    shuffled = frame.sample(fraction=1.0, shuffle=True, seed=1)
    table = read_table(save(tmp_path / f"a{suffix}", shuffled), time="ts", group="host")
    timeline = timeline_of(table)
    expected = frame.sort("host", "ts")
    assert table.names == ["cpu", "mem", "disk"]
    assert np.array_equal(values(table), expected.select("cpu", "mem", "disk").to_numpy().astype(np.float32))
    assert timeline.time.tolist() == expected["ts"].dt.epoch("ns").to_list()
    assert [timeline.groups[code] for code in timeline.group] == expected["host"].to_list()
    assert timeline.starts.tolist() == [0, 40, 80, 120]
    assert timeline.usual_step == STEP.total_seconds() * NANOSECOND
    assert not timeline.after_gap.any()
    read_in_order = shuffled.with_row_index().sort("host", "ts")["index"].to_list()
    assert timeline.source_rows.tolist() == read_in_order
    assert "the rows of the source are not in the order of their times: they were put in order" in table.notes


def test_fingerprint_depends_on_the_times_but_not_on_the_order_of_the_file(tmp_path: Path) -> None:
    frame = host_metrics(40)
    late = frame.with_columns(pl.col("ts") + pl.duration(hours=1))
    shuffled = frame.sample(fraction=1.0, shuffle=True, seed=1)
    sources = [save(tmp_path / f"{index}.parquet", each) for index, each in enumerate((frame, shuffled, late))]
    first, second, third = (read_table(source, time="ts", group="host").fingerprint for source in sources)
    assert first == second != third
    assert read_table(sources[0], drop=["ts", "host"]).fingerprint != first


def test_table_on_disk_is_sorted_like_a_table_in_memory(tmp_path: Path) -> None:
    path = save(tmp_path / "a.csv", host_metrics(60).sample(fraction=1.0, shuffle=True, seed=1))
    in_memory = read_table(path, time="ts", group="host")
    on_disk = read_table(path, time="ts", group="host", limit=100)
    assert on_disk.x.on_disk
    assert not in_memory.x.on_disk
    assert np.array_equal(values(on_disk), values(in_memory))


@pytest.mark.parametrize(
    "form",
    [
        lambda i: START_SECONDS + 60 * i,
        lambda i: f"{START_SECONDS + 60 * i}.0",
        lambda i: (START_SECONDS + 60 * i) * 1000,
        lambda i: (START_SECONDS + 60 * i) * 10**6,
        lambda i: (START_SECONDS + 60 * i) * 10**9,
        lambda i: (START + timedelta(minutes=i)).isoformat(),
        lambda i: (START + timedelta(minutes=i)).isoformat(" ").removesuffix("+00:00"),
        lambda i: (START + timedelta(minutes=i)).astimezone().isoformat(),
        lambda i: (START + timedelta(minutes=i, hours=2)).isoformat().replace("+00:00", "+02:00"),
    ],
    ids=["s", "float s", "ms", "us", "ns", "iso", "iso without zone", "local zone", "offset"],
)
def test_times_in_each_form_are_read_alike(form: Any, tmp_path: Path) -> None:
    table = read_table(csv_of_times(tmp_path / "a.csv", [form(index) for index in range(30)]), time="ts")
    timeline = timeline_of(table)
    assert timeline.time.tolist() == [(START_SECONDS + 60 * index) * NANOSECOND for index in range(30)]
    assert timeline.groups == ("",)


@pytest.mark.parametrize(
    "column",
    [
        pl.Series("ts", [START + timedelta(days=i) for i in range(30)], dtype=pl.Datetime("us", "UTC")),
        pl.Series("ts", [START + timedelta(days=i) for i in range(30)]).dt.convert_time_zone("Asia/Tokyo"),
        pl.Series("ts", [START + timedelta(days=i) for i in range(30)], dtype=pl.Datetime("ns", "UTC")),
        pl.Series("ts", [(START + timedelta(days=i)).replace(tzinfo=None) for i in range(30)], dtype=pl.Datetime("ms")),
        pl.Series("ts", [date(2024, 1, 1) + timedelta(days=i) for i in range(30)]),
        pl.Series("ts", [START_SECONDS + 86_400 * i for i in range(30)]),
        pl.Series("ts", [START_SECONDS + 86_400 * i for i in range(30)], dtype=pl.UInt64),
        pl.Series("ts", [float(START_SECONDS + 86_400 * i) for i in range(30)]),
        pl.Series("ts", [(START + timedelta(days=i)).isoformat() for i in range(30)], dtype=pl.Categorical),
    ],
    ids=lambda column: str(column.dtype),
)
def test_parquet_times_of_each_type_are_read_alike(column: pl.Series, tmp_path: Path) -> None:
    frame = pl.DataFrame({"cpu": np.random.RandomState(0).standard_normal(30)}).with_columns(column)
    timeline = timeline_of(read_table(save(tmp_path / "a.parquet", frame), time="ts"))
    assert timeline.time.tolist() == [(START_SECONDS + 86_400 * index) * NANOSECOND for index in range(30)]


ISO = [(START + timedelta(minutes=index)).isoformat() for index in range(30)]
UNIX = [START_SECONDS + 60 * index for index in range(30)]


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([*ISO[:5], "", *ISO[6:]], "FILE: column 'ts' has no time in row 5 (line 7): fill in the cells, or remove"),
        ([*ISO[:5], "-", "NaN", *ISO[7:]], "has no time in row 5 (line 7) and in 1 more rows: fill in"),
        ([*ISO[:5], "soon", *ISO[6:]], "column 'ts': 'soon' in row 5 (line 7) is not a time: expected ISO 8601"),
        ([*ISO[:5], "31.01.2024", "x", *ISO[7:]], "'31.01.2024' in row 5 (line 7) and in 1 more rows is not a time"),
        ([*UNIX[:5], "9223372036854775808", *UNIX[6:]], "'9223372036854775808' in row 5 (line 7) is not a time"),
        ([*UNIX[:5], "-9223372036854775808", *UNIX[6:]], "808' in row 5 (line 7) is not a time"),
        (
            [*ISO[:5], *(text.removesuffix("+00:00") for text in ISO[5:])],
            (
                "mixes times: '2024-01-01T00:00:00+00:00' in row 0 (line 2) is text with a time zone, but "
                "'2024-01-01T00:05:00' in row 5 (line 7) is text without a time zone: write all times in UTC"
            ),
        ),
        (
            [*UNIX[:5], *(1000 * second for second in UNIX[5:])],
            (
                "in row 0 (line 2) is Unix time in s, but '1704067500000' in row 5 (line 7) is Unix time in ms: "
                "write all times in one unit"
            ),
        ),
        ([*UNIX[:5], *ISO[5:]], "is Unix time in s, but '2024-01-01T00:05:00+00:00' in row 5 (line 7) is text with a"),
        (
            [f"202401{day:02}" for day in range(1, 31)],
            "holds dates such as '20240101' (row 0 (line 2)), which would be",
        ),
        ([f"20240131{hour:02}00" for hour in range(20)], "holds dates such as '202401310000'"),
    ],
)
def test_time_that_cannot_be_used_is_refused_with_its_line(times: list[Any], message: str, tmp_path: Path) -> None:
    found = refusal(csv_of_times(tmp_path / "a.csv", times), time="ts")
    assert message in found


def test_message_names_the_right_line_after_blank_lines_and_quoted_cells(tmp_path: Path) -> None:
    lines = ["ts,cpu", "", *(f'"{time}",{index * 7 % 11}' for index, time in enumerate(ISO)), "", "never,1"]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    assert "'never' in row 30 (line 34) is not a time" in refusal(str(tmp_path / "a.csv"), time="ts")


def test_row_without_measurements_needs_no_time_and_leaves_a_gap(tmp_path: Path) -> None:
    lines = ["ts,cpu,mem", *(f"{time},{index * 7 % 11},{index * 5 % 13}" for index, time in enumerate(ISO))]
    lines[11:13] = [f"{ISO[10]},,", ",,"]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    timeline = timeline_of(table := read_table(str(tmp_path / "a.csv"), time="ts"))
    assert len(table.x) == len(timeline) == 28
    assert timeline.source_rows.tolist() == [*range(10), *range(12, 30)]
    assert timeline.after_gap.nonzero()[0].tolist() == [10]
    assert (
        "1 gap in time; the longest lasts 3 min (2024-01-01 00:09 to 2024-01-01 00:12 UTC, before row 12 (line 14))"
        in table.notes
    )


def test_group_that_is_missing_is_refused_with_its_line(tmp_path: Path) -> None:
    source = csv_of_times(tmp_path / "a.csv", ISO, ["a"] * 9 + [" "] + ["a"] * 20)
    assert "column 'host' has no group in row 9 (line 11): fill in" in refusal(source, time="ts", group="host")


def test_group_column_with_a_different_value_in_each_row_is_refused(tmp_path: Path) -> None:
    source = csv_of_times(tmp_path / "a.csv", ISO, [f"request-{index}" for index in range(30)])
    assert "column 'host' has 30 groups in 30 rows: expected a column that names the host" in refusal(
        source, time="ts", group="host"
    )


def test_groups_may_be_whole_numbers_of_any_type(tmp_path: Path) -> None:
    frame = host_metrics(20).with_columns(pl.col("host").str.slice(4).cast(pl.Float64))
    assert timeline_of(read_table(save(tmp_path / "a.parquet", frame), time="ts", group="host")).groups == (
        "0",
        "1",
        "2",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": "TS"}, "FILE has no column 'TS' for --time: "),
        ({"time": "ts", "group": "hots"}, "FILE has no column 'hots' for --group: did you mean 'host' or 'ts'?"),
        ({"time": "ts", "keep": ["ts"]}, "FILE: --time and --keep both name 'ts': leave one out"),
        ({"time": "ts", "group": "host", "label": ["host"]}, "FILE: --group and --label both name 'host'"),
        ({}, "if 'ts' is the time of a row, use it with --time ts"),
        ({"time": "ts", "group": "host", "drop": ["cpu", "mem", "disk"]}, "all 5 columns are dropped, or are times"),
    ],
)
def test_options_that_do_not_fit_the_columns_are_refused(options: Any, message: str, tmp_path: Path) -> None:
    assert message in refusal(save(tmp_path / "a.csv", host_metrics(20)), **options)


def test_source_without_named_columns_refuses_a_time(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.random.RandomState(0).standard_normal((30, 3)))
    assert "--time names a column, and FILE has no named columns" in refusal(str(tmp_path / "a.npy"), time="ts")


def test_label_column_is_sorted_with_its_rows(tmp_path: Path) -> None:
    frame = host_metrics(40).with_columns((pl.col("cpu") > 1.5).cast(pl.Int64).alias("label"))
    path = save(tmp_path / "a.csv", frame.sample(fraction=1.0, shuffle=True, seed=3))
    table = read_table(path, time="ts", group="host")
    assert table.labels is not None
    assert table.labels.tolist() == frame.sort("host", "ts")["label"].to_list()


def test_row_that_repeats_a_row_exactly_is_left_out(tmp_path: Path) -> None:
    frame = host_metrics(40).with_columns(pl.when(pl.col("cpu") < 0.1).then(None).otherwise(pl.col("mem")).alias("mem"))
    table = read_table(save(tmp_path / "a.csv", pl.concat([frame, frame[7:12]])), time="ts", group="host")
    assert len(table.x) == len(timeline_of(table)) == 120
    assert table.missing.tolist() == [0, frame["mem"].null_count(), 0]
    assert "rows that repeat a row of the same time and group are left out: 5" in table.notes


def test_rows_with_equal_times_and_different_values_keep_their_order_and_give_a_warning(
    tmp_path: Path,
) -> None:
    times = [*ISO[:10], ISO[9], *ISO[10:]]
    table = read_table(csv_of_times(tmp_path / "a.csv", times, ["a"] * 31), time="ts", group="host")
    assert timeline_of(table).source_rows.tolist() == list(range(31))
    warning = next(note for note in table.notes if note.startswith("WARNING"))
    assert (
        "1 rows have the same time as another row of 'a', but other values (the first: row 9 (line 11) and " in warning
    )
    assert "row 10 (line 12), 2024-01-01 00:09)" in warning
    assert "correct the times in 'ts'" in warning


def test_rows_of_several_hosts_without_a_group_give_a_warning_that_names_the_option(tmp_path: Path) -> None:
    table = read_table(save(tmp_path / "a.csv", host_metrics(40)), drop=["host"], time="ts")
    warning = next(note for note in table.notes if note.startswith("WARNING"))
    assert "80 rows have the same time as another row, but other values" in warning
    assert "name the column of the host with --group" in warning


def test_gaps_are_measured_in_usual_steps_of_their_group(tmp_path: Path) -> None:
    every_minute = [START + timedelta(minutes=i) for i in range(60) if i != 30]
    every_hour = [START + timedelta(hours=i) for i in range(60)]
    random = np.random.RandomState(0)
    frame = pl.DataFrame(
        {
            "ts": [*every_minute, *every_hour],
            "host": ["a"] * 59 + ["b"] * 60,
            "cpu": random.standard_normal(119),
        },
        schema_overrides={"ts": pl.Datetime("ms", "UTC")},
    )
    table = read_table(save(tmp_path / "a.parquet", frame), time="ts", group="host")
    timeline = timeline_of(table)
    assert timeline.usual_steps.tolist() == [60 * NANOSECOND, 3600 * NANOSECOND]
    assert timeline.after_gap.nonzero()[0].tolist() == [30]
    assert (
        "1 gap in time in 1 of 2 groups; the longest, of 'a', lasts 2 min "
        "(2024-01-01 00:29 to 2024-01-01 00:31 UTC, before row 30)"
    ) in table.notes


def test_irregular_rows_give_a_note_about_their_steps_and_none_about_gaps(tmp_path: Path) -> None:
    seconds = np.cumsum(np.random.RandomState(0).exponential(600, 300)).round(3) + START_SECONDS
    table = read_table(csv_of_times(tmp_path / "a.csv", seconds.tolist()), time="ts")
    assert any(note.startswith("the rows are not evenly spaced in time: eight of ten") for note in table.notes)
    assert not any("gap" in note for note in table.notes)


@pytest.mark.parametrize("order", ["shuffled", "many hosts"])
def test_counter_is_refused_if_only_the_times_show_that_it_rises(order: str, tmp_path: Path) -> None:
    frame = host_metrics(100, 20 if order == "many hosts" else 1)
    served = pl.col("ts").rank("dense").over("host") * (1 + pl.col("host").str.slice(4).cast(pl.Int64) % 7)
    frame = frame.with_columns((served + 1000 * pl.col("host").str.slice(4).cast(pl.Int64)).alias("served"))
    frame = frame.sample(fraction=1.0, shuffle=True, seed=1)
    source = save(tmp_path / "a.csv", frame)
    assert "column 'served' (a counter: it rises with the time) is not a measurement: add --drop served" in refusal(
        source, time="ts", group="host"
    )
    assert "served" in read_table(source, time="ts", group="host", keep=["served"]).names


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (5, "5 ns"),
        (1500, "1.5 us"),
        (250 * 10**6, "250 ms"),
        (30 * NANOSECOND, "30 s"),
        (90 * NANOSECOND, "1 min 30 s"),
        (600 * NANOSECOND, "10 min"),
        (7800 * NANOSECOND, "2 h 10 min"),
        (90_000 * NANOSECOND, "1 d 1 h"),
    ],
)
def test_duration_is_described_in_its_largest_units(nanoseconds: int, text: str) -> None:
    assert describe_duration(nanoseconds) == text


def test_text_times_that_differ_by_one_nanosecond_are_put_in_order(tmp_path: Path) -> None:
    times = [f"2024-01-01T00:00:00.{999 - index:09d}Z" for index in range(30)]
    timeline = timeline_of(read_table(csv_of_times(tmp_path / "a.csv", times), time="ts"))
    assert timeline.source_rows.tolist() == list(range(29, -1, -1))
    first = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp()) * NANOSECOND
    assert (timeline.time - first).tolist() == list(range(970, 1000))


def test_times_that_count_seconds_from_zero_are_sorted_and_give_a_note(
    tmp_path: Path,
) -> None:
    seconds = [f"{index / 10:.1f}" for index in range(29, -1, -1)]
    table = read_table(csv_of_times(tmp_path / "a.csv", seconds), time="ts")
    assert timeline_of(table).time.tolist() == [index * NANOSECOND // 10 for index in range(30)]
    assert any("the times in 'ts' lie before 1980: if they count from a start" in note for note in table.notes)
    recent = read_table(csv_of_times(tmp_path / "b.csv", UNIX), time="ts")
    assert not any("before 1980" in note for note in recent.notes)
