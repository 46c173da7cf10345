"""`elbo train --window`, and `score`, `evaluate`, `calibrate` and `inspect` of such a model, through the command."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from models.artifact import Artifact, load
from models.manifest import Window
from models.windows import default_scales
from tests.commands import in_process
from tests.training.reporters import RecordingReporter
from tests.training.series import STEP, host_metrics, save
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Table, read_table
from training.data.time_split import TimeSplit, split_table
from training.data.timeline import SECOND, Timeline
from training.data.windows import TableWindows
from training.errors import FitError
from training.fitting.prepared_data import PreparedData
from training.fitting.windows import choose_window, prepare
from training.train import train

ROWS, HOSTS = 400, 3
pytestmark = pytest.mark.plots  # no other tests draw the plots of a model with a window
FEATURES = ["cpu", "mem", "disk"]
TIMES = {"time": "ts", "group": "host"}


def run(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> tuple[int, str, str]:
    places = ["--artifacts", str(folder / "a")]
    if arguments[0] in ("train", "calibrate"):
        places += ["--runs", str(folder / "runs")]
    return in_process(capsys, *arguments, *places)


def config(window: int | str | None = 12, **options: Any) -> TrainConfig:
    return TrainConfig.model_validate({"model": "pca", "name": "hosts", **TIMES, "window": window, **options})


def table(frame: pl.DataFrame, folder: Path) -> Table:
    return read_table(save(folder / "rows.parquet", frame), time="ts", group="host")


def with_gap(frame: pl.DataFrame) -> pl.DataFrame:
    """Return `frame` without the rows of web-1 from number 100 to 120."""
    numbers = pl.int_range(pl.len()).over("host")
    return frame.filter(~((pl.col("host") == "web-1") & numbers.is_between(100, 120)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with hosts@1, a PCA with a window of 12 rows, and its training rows with a gap."""
    folder = tmp_path_factory.mktemp("window")
    train(config(), table(with_gap(host_metrics(ROWS, HOSTS)), folder), folder / "a", RecordingReporter())
    return folder


@pytest.fixture(scope="module")
def hosts(root: Path) -> Artifact:
    return load(root / "a" / "hosts" / "1" / "model.pt")


@pytest.fixture(scope="module")
def data(root: Path) -> PreparedData:
    return prepare(config(), table(with_gap(host_metrics(ROWS, HOSTS)), root))[0]


@pytest.mark.parametrize("split_name", ["newest", "blocks"])
def test_parts_of_the_split_share_no_row_even_through_their_windows(split_name: str, root: Path) -> None:
    rows = table(with_gap(host_metrics(900, HOSTS)), root)
    data, _ = prepare(config(split=split_name), rows)
    assert data.windows is not None
    numbered = RowStore(np.arange(len(rows.x), dtype=np.float32)[:, None])
    windows = TableWindows(numbered, data.windows.window, data.windows.in_table.earlier)
    split = data.rows.split
    assert isinstance(split, TimeSplit)
    assert rows.timeline is not None
    part_of = np.searchsorted(split.cuts, rows.timeline.time, side="right")
    seen: dict[int, set[int]] = {}
    for row in np.concatenate((split.fit, split.held_out, split.calibration)):
        window = windows.take(np.array([row])).ravel()
        seen.setdefault(int(part_of[row]), set()).update(window[~np.isnan(window)].astype(int).tolist())
    assert len(seen) == len(split.cuts) + 1 == (3 if split_name == "newest" else 15)
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))


def test_rows_with_fewer_than_a_third_of_a_window_are_left_out(data: PreparedData) -> None:
    assert data.windows is not None
    earlier = data.windows.in_table.earlier
    assert data.windows.window == Window(rows=12, scales=[4, 12])
    used = np.concatenate((data.rows.split.fit, data.rows.split.held_out, data.rows.split.calibration))
    assert earlier[used].min() == 3
    assert len(data.table.x) == len(earlier) - 3 * (HOSTS + 1)  # three groups, and one row after the gap


def test_summaries_are_those_of_the_windows_that_the_model_gets(data: PreparedData, hosts: Artifact) -> None:
    assert data.windows is not None
    rows = data.rows.split.held_out[:50]
    windows = torch.from_numpy(data.windows.in_table.take(rows))
    expected = torch.from_numpy(data.table.x.take(data.split.held_out[:50]))
    torch.testing.assert_close(hosts.module.summarise(windows), expected, rtol=1e-4, atol=1e-5)


def test_manifest_describes_rows_and_their_split_and_not_the_summaries(hosts: Artifact) -> None:
    manifest = hosts.manifest
    assert manifest.window == Window(rows=12, scales=[4, 12])
    assert [feature.name for feature in manifest.features] == FEATURES
    assert manifest.shape == [3]
    assert manifest.timeline is not None
    assert manifest.timeline.gap_rows == 12
    assert manifest.data.rows == ROWS * HOSTS - 21
    assert manifest.training["window"] == 12
    assert np.array(manifest.golden.inputs["x"], np.float32).shape == (3, 12, 3)
    assert "log_likelihood" not in manifest.metrics
    assert 0 < manifest.metrics["reconstruction_error"] < manifest.metrics["baseline_error"]
    assert hosts.twin is not None


def test_calibration_is_that_of_the_calibration_rows(data: PreparedData, hosts: Artifact) -> None:
    assert data.windows is not None
    windows = torch.from_numpy(data.windows.in_table.take(data.rows.split.calibration))
    p_value = hosts.module.p_value(hosts.module.score(windows)[0]).sort().values
    rank = torch.arange(1, len(windows) + 1) / (len(windows) + 1)
    assert (p_value - rank).abs().max() <= 2.5 / (len(windows) + 1)  # each row counts itself


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ae", "vae", "ensemble"])
def test_networks_train_on_windows_and_find_a_shift_that_a_single_row_hides(tmp_path: Path, kind: str) -> None:
    path = train(config(12, model=kind, name=kind, epochs=20), table(host_metrics(ROWS, 2), tmp_path), tmp_path,
                 RecordingReporter())  # fmt: skip
    artifact = load(path)
    later = host_metrics(ROWS, 1, seed=1).select(FEATURES).to_numpy().astype(np.float32)
    shifted = later.copy()
    shifted[200:240, 2] += 1.5  # standard deviations of a single row
    windows = np.stack([later[row - 11 : row + 1] for row in range(211, 240)])
    moved = np.stack([shifted[row - 11 : row + 1] for row in range(211, 240)])
    scores = [artifact.module.score(torch.from_numpy(x))[0] for x in (windows, moved)]
    assert (scores[1] > scores[0]).double().mean() > 0.9
    assert {"pca", "ae", "vae", "ensemble"} >= {artifact.manifest.kind}
    assert artifact.twin is not None


def small_table(groups: list[int], features: int = 2) -> Table:
    """Return a table of groups with these numbers of rows."""
    count = sum(groups)
    group = np.repeat(np.arange(len(groups), dtype=np.int32), groups)
    time = np.concatenate([np.arange(rows) * 60 * SECOND for rows in groups])
    names = tuple(f"web-{index:04}" for index in range(len(groups)))
    x = np.random.RandomState(0).standard_normal((count, features)).astype(np.float32)
    timeline = Timeline(time, group, names, "ts", "host", np.arange(count))
    columns = [f"x{index}" for index in range(features)]
    missing = np.zeros(features, np.int64)
    return Table(
        RowStore(x), (features,), columns, [None] * features, None, None, "made up", missing=missing, timeline=timeline
    )


@pytest.mark.parametrize(
    ("groups", "features", "rows"),
    [
        ([600] * 10, 2, 30),
        ([600] * 9 + [20], 2, 30),  # nine of ten groups carry it
        ([600] * 8 + [20] * 2, 2, None),
        ([200] * 10, 2, 10),
        ([100] * 10, 2, None),
        ([3000], 40, None),  # 2,100 fit rows, but 280 summaries of 30 rows need 5,600, and 200 of 10 rows need 4,000
        ([6000], 40, 10),  # 4,200 fit rows
        ([700], 683, None),  # too many features for any window
    ],
)
def test_automatic_window_is_the_largest_that_the_rows_carry(
    groups: list[int], features: int, rows: int | None
) -> None:
    window, notes = choose_window(config("auto"), small_table(groups, features))
    assert (None if window is None else window.rows) == rows
    assert "auto" in notes[0]
    assert "no window" in notes[0] if window is None else f"chose {window.rows} rows" in notes[0]


@pytest.mark.parametrize(("group_rows", "rows"), [(2200, 30), (2100, 10), (730, 10), (700, None)])
def test_automatic_window_needs_five_times_the_fit_rows_for_five_blocks(group_rows: int, rows: int | None) -> None:
    small = small_table([group_rows] * 10, 2)
    window, notes = choose_window(config("auto", split="blocks"), small)
    assert (None if window is None else window.rows) == rows
    assert f"at least {1500 if rows == 30 else 500:,} fit rows" in notes[0]
    if window is not None:
        assert isinstance(split_table(small, 0, window.rows, "blocks"), TimeSplit)  # it is not refused


@pytest.mark.parametrize(
    ("features", "scales"), [(73, [3, 10, 30]), (74, [10, 30]), (102, [10, 30]), (103, [30]), (682, [30])]
)
def test_window_of_many_features_has_fewer_scales(features: int, scales: list[int]) -> None:
    window, notes = choose_window(config(30), small_table([30], features))
    assert window is not None
    assert window.scales == scales
    assert bool(notes) == (tuple(scales) != default_scales(30))


def test_window_of_too_many_features_is_refused() -> None:
    with pytest.raises(FitError, match=r"expected at most 682 features; drop some with --drop"):
        choose_window(config(30), small_table([30], 683))


def test_group_without_a_window_is_named(tmp_path: Path) -> None:
    frame = host_metrics(400, 3).filter((pl.col("host") != "web-2") | (pl.int_range(pl.len()) < 9))  # three rows
    data, notes = prepare(config(), table(frame, tmp_path))
    assert notes == []
    assert any("1 of 3 groups have no window of 4 rows without a gap: web-2" in note for note in data.notes)


def test_too_few_windows_are_refused(tmp_path: Path) -> None:
    frame = host_metrics(1000, 1).filter(pl.int_range(pl.len()) % 10 < 3)  # three rows, then a gap of eight steps
    with pytest.raises(FitError, match=r"too few windows of 12 rows: 0 to fit, 0 held out and 0 to calibrate"):
        prepare(config(), table(frame, tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "30"], "expected --time too"),
        (["--window", "1", "--time", "ts"], "2 to 1000 rows, got '?1"),
        (["--window", "many", "--time", "ts"], "--window"),
    ],
)
def test_window_that_is_impossible_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    data = save(tmp_path / "a.csv", host_metrics(20))
    code, _, err = run(capsys, tmp_path, "train", data, "--model", "pca", "--name", "m", *options)
    assert code == 2
    assert re.search(message, err)


def lines_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_score_puts_rows_in_order_within_their_groups(
    root: Path, hosts: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = with_gap(host_metrics(150, HOSTS, seed=2)).sample(fraction=1.0, shuffle=True, seed=1)
    code, out, err = run(capsys, root, "score", "hosts", save(tmp_path / "b.csv", frame))
    assert code == 0, err
    results = lines_of(out)
    assert [result["row"] for result in results] == list(range(len(frame)))
    assert {result["warming_up"] for result in results} == {False, True}
    keys = frame.select("host", "ts").rows()
    for host in ("web-0", "web-1"):
        mine = frame.filter(pl.col("host") == host).sort("ts")
        x, times = mine.select(FEATURES).to_numpy().astype(np.float32), mine["ts"].to_list()
        start = 0
        for row, time in enumerate(times):
            if row and time - times[row - 1] > 4 * STEP:
                start = row
            window = np.full((12, 3), np.nan, np.float32)
            past = x[max(start, row - 11) : row + 1]
            window[-len(past) :] = past
            result = results[keys.index((host, time))]
            assert result["window_rows"] == len(past)
            assert result["warming_up"] == (len(past) < 12)
            score = float(hosts.module.score(torch.from_numpy(window)[None])[0])
            assert result["score"] == pytest.approx(score, rel=1e-4)
            if len(past) < 4:
                assert not result["is_anomaly"]
                assert result["severity"] <= 1


def test_score_of_repeated_and_faulty_rows_leaves_the_windows_of_other_rows_as_they_were(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = host_metrics(30, 1, seed=3).with_columns(pl.col("ts").dt.strftime("%Y-%m-%dT%H:%M:%S%:z"))
    _, out, _ = run(capsys, root, "score", "hosts", save(tmp_path / "a.csv", frame))
    repeated = frame[20:21].with_columns(cpu=pl.col("cpu") + 9)
    untimed = frame[25:26].with_columns(ts=pl.lit("soon"))
    noisy = save(tmp_path / "b.csv", pl.concat((frame, repeated, untimed)))
    code, more, err = run(capsys, root, "score", "hosts", noisy)
    assert code == 2
    assert "1 of 32 rows is faulty" in err
    assert lines_of(more)[:30] == lines_of(out)
    last = lines_of(more)[30:]
    assert last[0]["window_rows"] == 12
    assert last[0]["score"] > lines_of(out)[20]["score"]
    assert "no time in column 'ts'" in last[1]["detail"]


def test_commands_refuse_rows_without_times(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = save(tmp_path / "a.csv", host_metrics(30).drop("ts"))
    for command in ("score", "evaluate", "calibrate"):
        code, _, err = run(capsys, root, command, "hosts", data)
        assert code == 2
        assert "has no column 'ts' with the time of each row" in err


def test_csv_of_score_has_columns_for_the_window(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = save(tmp_path / "a.csv", host_metrics(12, 1))
    _, out, _ = run(capsys, root, "score", "hosts", data, "--format", "csv", "--explain", "0")
    frame = pl.read_csv(out.encode())
    assert frame["window_rows"].to_list() == list(range(1, 13))
    assert frame["warming_up"].to_list() == [*[1] * 11, 0]


@pytest.mark.slow
def test_evaluate_and_calibrate_leave_out_rows_without_enough_past(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = host_metrics(200, 2, seed=4)
    anomalous = (pl.int_range(pl.len()) >= 300) & (pl.int_range(pl.len()) < 340)
    labelled = frame.with_columns(
        disk=pl.col("disk") + pl.when(anomalous).then(4.0).otherwise(0.0), label=anomalous.cast(pl.Int8)
    )
    data = save(tmp_path / "a.csv", labelled)
    code, out, err = run(capsys, root, "evaluate", "hosts", data, "--json")
    assert code == 0, err
    evaluation = json.loads(out)
    assert evaluation["rows"] == 400 - 2 * 3
    assert evaluation["auroc"] > 0.95
    assert evaluation["log_likelihood"] is None
    code, out, err = run(capsys, root, "calibrate", "hosts", data, "--force")
    assert code == 0, err
    assert "calibrated on 354 rows" in out  # 394 rows, without the 40 that are anomalous
    code, out, err = run(capsys, root, "evaluate", "hosts@2", data, "--json")
    assert json.loads(out)["alarm_rates"]["0.05"] == pytest.approx(0.05, abs=0.005)
    code, out, _ = run(capsys, root, "inspect", "hosts@2")
    assert re.search(r"window +12 rows: each row, and its means and deviations over 4, 12 rows, from 4 on", out)
    card = (root / "runs" / "hosts" / "2" / "card.md").read_text()
    assert "It judges each row together with up to 11 rows before it in its group" in card


def test_missing_values_are_replaced_before_the_summaries(tmp_path: Path) -> None:
    frame = host_metrics(200, 2)
    gaps = frame.with_columns(disk=pl.when(pl.int_range(pl.len()) % 7 == 0).then(None).otherwise(pl.col("disk")))
    artifact = load(train(config(), table(gaps, tmp_path), tmp_path, RecordingReporter()))
    x = frame.select(FEATURES).to_numpy().astype(np.float32)[:24:2][None]
    gap, filled = x.copy(), x.copy()
    gap[0, 5, 2] = np.nan
    filled[0, 5, 2] = artifact.manifest.features[2].median
    scores = [artifact.module.score(torch.from_numpy(rows))[0] for rows in (gap, filled)]
    torch.testing.assert_close(scores[0], scores[1])
    assert artifact.manifest.features[2].missing > 0
