"""`elbo train --time`, and `score`, `calibrate` and `inspect` of such a model, through the command."""

import json
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from models.artifact import load
from models.manifest import Manifest, read_manifest
from tests.commands import in_process
from tests.conftest import require
from tests.data import DATA_FOLDER, ROOT
from tests.preloaded import PreloadedProcess
from tests.training.reporters import RecordingReporter
from tests.training.series import START, STEP, host_metrics, save
from training.config import TrainConfig
from training.data.table import read_table
from training.errors import FitError
from training.train import train

pytestmark = pytest.mark.slow


def run(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> tuple[int, str, str]:
    places = ["--artifacts", str(folder / "a")]
    if arguments[0] in ("train", "calibrate"):
        places += ["--runs", str(folder / "runs")]
    return in_process(capsys, *arguments, *places)


def train_hosts(capsys: pytest.CaptureFixture[str], folder: Path, source: str, *options: str) -> tuple[str, Manifest]:
    """Train a PCA with times and groups. Return standard error and the manifest."""
    arguments = [source, "--model", "pca", "--name", "hosts", "--time", "ts", "--group", "host", *options]
    code, out, err = run(capsys, folder, "train", *arguments)
    assert code == 0, err
    return err, read_manifest(Path(out.splitlines()[0].partition(": ")[2]))


def test_csv_and_parquet_in_any_order_give_the_same_model_split_by_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = host_metrics(400)
    manifests = []
    for name, rows in (
        ("a.csv", frame),
        ("b.parquet", frame.sample(fraction=1.0, shuffle=True, seed=1)),
        ("c.parquet", frame.with_columns(pl.col("ts").dt.epoch("ms"))),
    ):
        err, manifest = train_hosts(capsys, tmp_path, save(tmp_path / name, rows))
        manifests.append(manifest)
        assert "split by time: fit 2024-01-01 00:00 to 2024-01-02 22:30 UTC (840 rows), held out" in err
    first = manifests[0]
    assert [feature.name for feature in first.features] == ["cpu", "mem", "disk"]
    assert len({manifest.weights_sha256 for manifest in manifests}) == 1
    assert len({manifest.data.fingerprint for manifest in manifests}) == 1
    assert first.timeline is not None
    assert (first.timeline.time_column, first.timeline.group_column, first.timeline.groups) == ("ts", "host", 3)
    assert (first.timeline.usual_step_seconds, first.timeline.gap_rows) == (600.0, 1)
    assert "blocks" not in first.model_dump()["timeline"]  # earlier releases refuse it
    assert (first.data.fit, first.data.held_out, first.data.calibration) == (840, 117, 237)
    assert first.timeline.fit.first == START.isoformat()
    assert first.timeline.held_out.first == (START + 281 * STEP).isoformat()
    assert first.timeline.calibration is not None
    assert first.timeline.calibration.first == (START + 321 * STEP).isoformat()
    assert first.timeline.calibration.last == (START + 399 * STEP).isoformat()
    assert {key: first.training[key] for key in ("time", "group")} == {"time": "ts", "group": "host"}


def test_newest_rows_calibrate_and_only_the_oldest_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    days = pl.int_range(pl.len()) // 3 // 40  # ten blocks of 40 steps
    frame = host_metrics(400).with_columns((days + 0.01 * pl.col("disk")).alias("block"))
    source = save(tmp_path / "a.csv", frame.sample(fraction=1.0, shuffle=True, seed=2))
    _, manifest = train_hosts(capsys, tmp_path, source, "--keep", "block")
    block = next(feature for feature in manifest.features if feature.name == "block")
    assert block.maximum == pytest.approx(6, abs=0.1)  # blocks 0 to 6 fit, 7 is held out, 8 and 9 calibrate
    artifact = load(tmp_path / "a" / "hosts" / "1" / "model.pt")
    newest = read_table(source, time="ts", group="host", keep=["block"])
    assert newest.timeline is not None
    rows = newest.x.take(np.flatnonzero(newest.timeline.time >= int((START + 321 * STEP).timestamp()) * 10**9))
    p_values = artifact.module.p_value(artifact.module.score(torch.from_numpy(rows))[0]).sort().values
    count = manifest.data.calibration
    assert count == len(rows)
    ranks = [(rank + 2) / (count + 1) for rank in range(count)]  # + 2, because the row itself is one of them
    assert p_values.tolist() == pytest.approx(ranks, abs=2.1 / count)  # rounding may swap two scores


def test_card_and_inspect_say_which_period_each_part_covers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = host_metrics(400).filter(~((pl.col("host") == "web-1") & pl.int_range(pl.len()).is_between(300, 330)))
    train_hosts(capsys, tmp_path, save(tmp_path / "a.csv", frame))
    card = (tmp_path / "runs" / "hosts" / "1" / "card.md").read_text()
    for line in (
        # Of the 1,190 rows, 833 come before step 281, and 953 before step 321.
        "- fit: 2024-01-01 00:00 to 2024-01-02 22:40 UTC",
        "- held out: 2024-01-02 23:00 to 2024-01-03 05:20 UTC",
        "- calibration: 2024-01-03 05:40 to 2024-01-03 18:30 UTC",
        "- between two parts, 1 row of each group left out",
        "The calibration rows are from 2024-01-03 05:40 to 2024-01-03 18:30 UTC.",
    ):
        assert line in card
    assert "1 gap in time in 1 of 3 groups; the longest, of 'web-1', lasts 1 h 50 min" in card
    assert "--time ts --group host" in card
    code, out, _ = run(capsys, tmp_path, "inspect", "hosts")
    assert code == 0
    assert "time         'ts', a row every 600 s, 3 groups by 'host'".replace(" ", "") in out.replace(" ", "")
    assert "calibration 2024-01-03 05:40 to 2024-01-03 18:30 UTC" in out


def test_card_after_a_split_in_blocks_lists_the_periods_and_warns_about_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = host_metrics(400)
    source = save(tmp_path / "a.csv", frame)
    err, manifest = train_hosts(capsys, tmp_path, source, "--split", "blocks", "--window", "5")
    assert "split by time into 5 blocks: fit 2024-01-01 00:10 to 2024-01-03 " in err
    assert "figures on held-out rows are better than those on later rows will be" in err
    assert manifest.timeline is not None
    assert manifest.training["split"] == "blocks"
    # Each of 14 gaps takes 5 rows of each of 3 hosts. Of each host, the first row has too short a window.
    used = manifest.data.fit + manifest.data.held_out + manifest.data.calibration
    assert used == 3 * (400 - 14 * 5 - 1)
    blocks = manifest.timeline.blocks
    assert len(blocks) == len(manifest.model_dump()["timeline"]["blocks"]) == 5
    second = blocks[1].held_out
    assert second is not None
    days = " to ".join(moment[:16].replace("T", " ") for moment in (second.first, second.last))
    card = (tmp_path / "runs" / "hosts" / "1" / "card.md").read_text()
    code, out, _ = run(capsys, tmp_path, "inspect", "hosts")
    assert code == 0
    for text in (card, out):
        assert f"{days} UTC" in text
    for line in (
        "Rows of the same days fit the model, so figures on held-out rows are better than those on later rows",
        "The fit rows include other rows of the same days, so more than alpha of the later rows may raise a",
        "--split blocks",
    ):
        assert line in card
    later = host_metrics(100, seed=5).with_columns(pl.col("ts") + pl.duration(days=10))
    code, _, err = run(capsys, tmp_path, "calibrate", "hosts", save(tmp_path / "later.csv", later))
    assert code == 0, err
    again = read_manifest(tmp_path / "a" / "hosts" / "2" / "model.pt").timeline
    assert again is not None
    assert [block.fit for block in again.blocks] == [block.fit for block in blocks]
    assert {block.calibration for block in again.blocks} == {None}
    assert again.calibration is not None
    assert again.calibration.first.startswith("2024-01-11")
    card = (tmp_path / "runs" / "hosts" / "2" / "card.md").read_text()
    assert "- calibration: 2024-01-11 " in card
    assert "The fit rows include other rows" not in card
    code, _, err = run(capsys, tmp_path, "calibrate", "hosts@1", save(tmp_path / "part.csv", frame[300:600]))
    assert code == 2
    assert "that hosts@1 was trained on, and scores of training rows are too low" in err


@pytest.mark.parametrize("options", [[], ["--split", "blocks"]])
def test_backtest_and_evaluate_recognise_the_rows_that_trained_the_model(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "a.csv", host_metrics(400))
    _, manifest = train_hosts(capsys, tmp_path, source, *options)
    assert manifest.timeline is not None
    code, _, err = run(capsys, tmp_path, "backtest", "hosts", source)
    assert code == 0, err
    last = max(manifest.timeline.fit.last, manifest.timeline.held_out.last)
    assert re.search(
        r"a\.csv: about \d\d % of the rows were used to train hosts, whose scores of them are too low", err
    )
    assert f"such as those after {last}" in err
    code, out, err = run(capsys, tmp_path, "evaluate", "hosts", source, "--samples", "--json")
    assert code == 0, err
    assert json.loads(out)["samples"]["rows"] == manifest.data.held_out + manifest.data.calibration
    later = host_metrics(100, seed=5).with_columns(pl.col("ts") + pl.duration(days=10))
    code, _, err = run(capsys, tmp_path, "backtest", "hosts", save(tmp_path / "later.csv", later))
    assert code == 0, err
    assert "used to train" not in err


def test_score_passes_on_times_and_groups_if_the_file_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = host_metrics(400)
    train_hosts(capsys, tmp_path, save(tmp_path / "a.csv", frame))
    later = host_metrics(20, seed=5).with_columns(pl.col("ts") + pl.duration(days=10))
    code, out, err = run(capsys, tmp_path, "score", "hosts", save(tmp_path / "later.csv", later))
    assert code == 0, err
    results = [json.loads(line) for line in out.splitlines()]
    assert [result["group"] for result in results[:3]] == ["web-0", "web-1", "web-2"]
    assert results[0]["time"] == (START + timedelta(days=10)).timestamp()
    code, bare, err = run(capsys, tmp_path, "score", "hosts", save(tmp_path / "bare.csv", later.drop("ts", "host")))
    assert code == 0, err
    assert [json.loads(line)["score"] for line in bare.splitlines()] == [result["score"] for result in results]
    renamed = save(tmp_path / "renamed.csv", later.rename({"ts": "timestamp"}))
    code, out, _ = run(capsys, tmp_path, "score", "hosts", renamed)
    assert json.loads(out.splitlines()[0])["time"] == results[0]["time"]


def test_calibrate_records_the_period_of_the_rows_if_they_have_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, first = train_hosts(capsys, tmp_path, save(tmp_path / "a.csv", host_metrics(400)))
    later = host_metrics(100, seed=5).with_columns(pl.col("ts") + pl.duration(days=10))
    shuffled = later.sample(fraction=1.0, shuffle=True, seed=1)
    code, _, err = run(capsys, tmp_path, "calibrate", "hosts", save(tmp_path / "later.parquet", shuffled))
    assert code == 0, err
    assert "times are read from 'ts': 2024-01-11 00:00 to 2024-01-11 16:30 UTC" in err
    second = read_manifest(tmp_path / "a" / "hosts" / "2" / "model.pt")
    assert first.timeline is not None
    assert second.timeline is not None
    assert second.timeline.calibration is not None
    assert second.timeline.calibration.last == (START + timedelta(days=10) + 99 * STEP).isoformat()
    assert second.timeline.fit == first.timeline.fit
    bare = save(tmp_path / "bare.csv", later.drop("ts", "host"))
    code, _, err = run(capsys, tmp_path, "calibrate", "hosts@1", bare)
    assert code == 0, err
    third = read_manifest(tmp_path / "a" / "hosts" / "3" / "model.pt")
    assert third.timeline is not None
    assert third.timeline.calibration is None
    code, out, _ = run(capsys, tmp_path, "inspect", "hosts@3")
    assert code == 0
    assert "calibration  300 of 300 rows" in out


def test_calibrate_refuses_a_faulty_time_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_hosts(capsys, tmp_path, save(tmp_path / "a.csv", host_metrics(400)))
    path = tmp_path / "later.csv"
    save(path, host_metrics(100, seed=5).with_columns(pl.col("ts") + pl.duration(days=10)))
    lines = path.read_text().splitlines()
    lines[7] = "soon" + lines[7][lines[7].index(",") :]
    path.write_text("\n".join(lines))
    code, _, err = run(capsys, tmp_path, "calibrate", "hosts", str(path))
    assert code == 2
    assert "column 'ts': 'soon' in row 6 (line 8) is not a time" in err


def test_manifest_has_no_fields_about_times_if_the_rows_have_no_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "a.csv", host_metrics(100).drop("ts", "host"))
    code, _, err = run(capsys, tmp_path, "train", source, "--model", "pca", "--name", "m")
    assert code == 0, err
    code, out, _ = run(capsys, tmp_path, "inspect", "m", "--json")
    fields = json.loads(out)
    assert "timeline" not in fields
    assert not {"time", "group"} & fields["training"].keys()


def test_each_copy_of_a_row_counts_at_its_own_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    idle = pl.int_range(pl.len()) // 3 % 4 != 0  # each host is idle in three of four rows
    frame = host_metrics(400).with_columns(
        pl.when(idle).then(0.0).otherwise(pl.col(name)).alias(name) for name in ("cpu", "mem", "disk")
    )
    err, manifest = train_hosts(capsys, tmp_path, save(tmp_path / "a.csv", frame))
    assert "only 301 of the 1,200 rows are distinct" in err
    assert "each counts at its own time" in err
    assert (manifest.data.fit, manifest.data.held_out, manifest.data.calibration) == (840, 117, 237)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group", "host"], "--group: expected --time too, because rows are put in order within a group, got 'host'"),
        (["--time", "ts", "--group", "ts"], "--group: expected another column than that of --time, got 'ts'"),
        (
            ["--split", "blocks"],
            "--split: expected --time too, because the blocks are parts of the history, got 'blocks'",
        ),
        (["--time", "when"], "has no column 'when' for --time"),
        (["--time", "host"], "column 'host': 'web-0' in row 0 (line 2) and in 299 more rows is not a time"),
    ],
)
def test_wrong_column_options_end_with_status_2_and_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tmp_path / "a.csv", host_metrics(100))
    drop = [] if "--group" in options else ["--drop", "ts" if "host" in options else "ts,host"]
    code, _, err = run(capsys, tmp_path, "train", source, "--model", "pca", "--name", "m", *drop, *options)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_interrupted_run_with_times_resumes_to_the_same_weights(tmp_path: Path) -> None:
    source = save(tmp_path / "a.csv", host_metrics(400).sample(fraction=1.0, shuffle=True, seed=1))
    options = ["--model", "ae", "--name", "hosts", "--time", "ts", "--group", "host", "--epochs", "25", "--force"]

    def start(folder: str, *more: str) -> "subprocess.Popen[str]":
        places = ["--artifacts", str(tmp_path / folder / "a"), "--runs", str(tmp_path / folder / "runs")]
        command = [sys.executable, "-m", "elbo", "train", source, *options, *places, "--checkpoint-seconds", "0", *more]
        return PreloadedProcess(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)

    with start("whole") as whole:
        assert whole.wait(timeout=300) == 0
    with start("parts") as parts:
        history = tmp_path / "parts" / "runs" / "hosts" / "metrics.jsonl"
        while parts.poll() is None and not (history.exists() and len(history.read_text().splitlines()) >= 3):
            time.sleep(0.02)
        parts.send_signal(signal.SIGKILL)
        parts.wait(timeout=60)
    assert not (tmp_path / "parts" / "a" / "hosts" / "1").exists()
    with start("parts", "--resume") as rest:
        assert rest.wait(timeout=300) == 0
    one, other = (
        read_manifest(tmp_path / folder / "a" / "hosts" / "1" / "model.pt").weights_sha256
        for folder in ("whole", "parts")
    )
    assert one == other


def test_train_refuses_a_table_without_times_if_the_config_names_a_column_of_times(tmp_path: Path) -> None:
    source = save(tmp_path / "a.csv", host_metrics(100))
    config = TrainConfig(model="pca", name="m", time="ts", group="host")
    with pytest.raises(FitError, match=r"read with time=None and group=None, but the options are time='ts' and group"):
        train(config, read_table(source, drop=["ts", "host"]), tmp_path / "a", RecordingReporter())
    table = read_table(source, time="ts", group="host")
    assert read_manifest(train(config, table, tmp_path / "a", RecordingReporter())).timeline is not None


@pytest.mark.parametrize("server", ["omi-4", "machine-2-1"])
def test_training_on_server_metrics_warns_unless_they_are_split_by_time(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if str(DATA_FOLDER) == "none":
        pytest.skip("ELBO_DATA=none: this machine has no server metrics")
    path = DATA_FOLDER / "server-metrics" / f"{server}.npz"
    require(path.is_file(), f"{path} does not exist")
    rows = np.load(path)["train"][:6000]
    metrics: dict[str, Any] = {f"metric{column}": rows[:, column] for column in range(rows.shape[1])}
    times = [START + timedelta(minutes=index) for index in range(len(rows))]
    frame = pl.DataFrame({"ts": times, **metrics}, schema_overrides={"ts": pl.Datetime("ms", "UTC")})
    source = save(tmp_path / f"{server}.parquet", frame)
    model = ["--model", "pca", "--name", server]
    code, _, err = run(capsys, tmp_path, "train", source, *model, "--drop", "ts", "--force")
    assert code == 0, err
    assert "WARNING: rows that follow each other in the file resemble each other" in err
    assert "train with --time COLUMN" in err
    code, _, err = run(capsys, tmp_path, "train", source, *model, "--time", "ts", "--force")
    assert code == 0, err
    assert "WARNING: rows that follow" not in err
    manifest = read_manifest(tmp_path / "a" / server / "2" / "model.pt")
    assert manifest.timeline is not None
    assert manifest.timeline.usual_step_seconds == 60.0
    count = len(rows)
    first = round(0.8 * count) + 1
    assert manifest.timeline.calibration is not None
    assert manifest.timeline.calibration.first == times[first].isoformat()
    assert manifest.timeline.calibration.last == times[-1].isoformat()
    assert manifest.data.calibration == count - first
