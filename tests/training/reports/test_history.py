"""The history of a run: it is written every epoch, survives a kill, and is the same in TensorBoard."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from tests.conftest import require
from tests.data import ROOT
from tests.preloaded import PreloadedProcess
from tests.training.reporters import RecordingReporter
from training.reports.history import FILE_NAME, POINTS, HistoryRecorder, thin


def read_lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]


def record_epochs(recorder: HistoryRecorder, epochs: range) -> None:
    recorder.start("m (ae)", 1000)
    for epoch in epochs:
        recorder.epoch(epoch, 10 * epoch, {"squared_error": 1.0 / epoch, "held_out_loss": 2.0 / epoch})


def test_recording_an_epoch_writes_one_line_to_disk_immediately(tmp_path: Path) -> None:
    report = RecordingReporter()
    recorder = HistoryRecorder(report, tmp_path / "m")
    for epoch in (1, 2, 3):
        recorder.epoch(epoch, 10 * epoch, {"squared_error": 1.0 / epoch})
        assert [line["epoch"] for line in read_lines(tmp_path / "m")] == list(range(1, epoch + 1))
    assert [line["step"] for line in read_lines(tmp_path / "m")] == [10, 20, 30]
    assert read_lines(tmp_path / "m") == recorder.history
    assert report.epochs == [{"squared_error": 1.0 / epoch} for epoch in (1, 2, 3)]
    seconds = [line["seconds"] for line in read_lines(tmp_path / "m")]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("last_line", [b"", b'{"epoch":6,"st', b'{"epoch":6,"step":60,"kl":0.1', b"\x00\x00", b"6"])
def test_resumed_history_has_every_epoch_once_if_the_last_line_was_damaged(tmp_path: Path, last_line: bytes) -> None:
    record_epochs(HistoryRecorder(RecordingReporter(), tmp_path), range(1, 6))
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(last_line)
    recorder = HistoryRecorder(RecordingReporter(), tmp_path, resume=True)
    record_epochs(recorder, range(4, 9))  # the checkpoint was written after epoch 3
    assert [line["epoch"] for line in read_lines(tmp_path)] == list(range(1, 9))
    assert read_lines(tmp_path) == recorder.history
    seconds = [line["seconds"] for line in read_lines(tmp_path)]
    assert seconds == sorted(seconds)  # the second recorder continues where the first stopped counting


def test_new_run_without_resume_replaces_the_history_of_an_earlier_run(tmp_path: Path) -> None:
    record_epochs(HistoryRecorder(RecordingReporter(), tmp_path), range(1, 6))
    record_epochs(HistoryRecorder(RecordingReporter(), tmp_path), range(1, 3))
    assert [line["epoch"] for line in read_lines(tmp_path)] == [1, 2]


def test_rewind_drops_epochs_after_the_given_step(tmp_path: Path) -> None:
    record_epochs(HistoryRecorder(RecordingReporter(), tmp_path), range(1, 6))
    recorder = HistoryRecorder(RecordingReporter(), tmp_path, resume=True)
    recorder.rewind(30)
    assert [line["step"] for line in read_lines(tmp_path)] == [10, 20, 30]
    assert [point["epoch"] for point in recorder.history] == [1, 2, 3]


def test_non_finite_value_is_null_in_the_file_and_absent_from_the_history(tmp_path: Path) -> None:
    recorder = HistoryRecorder(RecordingReporter(), tmp_path)
    recorder.epoch(1, 10, {"a": math.nan, "b": math.inf, "c": 1.0})
    assert read_lines(tmp_path)[0]["a"] is read_lines(tmp_path)[0]["b"] is None
    assert recorder.history[0].keys() == {"epoch", "step", "c", "seconds"}
    resumed = HistoryRecorder(RecordingReporter(), tmp_path, resume=True)
    resumed.rewind(10)
    assert resumed.history == recorder.history


@pytest.mark.parametrize("count", [1, POINTS, POINTS + 1, 10_000])
def test_thinned_history_keeps_the_first_and_the_last_point_and_spreads_the_rest_evenly(count: int) -> None:
    points = [{"epoch": float(epoch)} for epoch in range(1, count + 1)]
    kept = [point["epoch"] for point in thin(points)]
    assert len(kept) == min(count, POINTS)
    assert (kept[0], kept[-1]) == (1, count)
    gaps = {after - before for before, after in pairwise(kept)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_recorder_warns_once_and_still_reports_the_run_if_the_folder_is_unwritable(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    report = RecordingReporter()
    recorder = HistoryRecorder(report, tmp_path / "runs" / "m")
    record_epochs(recorder, range(1, 4))
    recorder.done({})
    recorder.move(tmp_path / "elsewhere")
    assert len(report.epochs) == len(recorder.history) == 3
    assert len(report.notes) == 1
    assert report.notes[0].startswith(f"warning: failed to write the history {tmp_path}/runs/m/metrics.jsonl (")


def test_recorder_without_a_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recorder = HistoryRecorder(RecordingReporter(), None)
    record_epochs(recorder, range(1, 4))
    recorder.move(tmp_path / "1")
    assert [point["epoch"] for point in recorder.history] == [1, 2, 3]
    assert list(tmp_path.iterdir()) == []


def test_history_is_moved_to_the_folder_of_the_version(tmp_path: Path) -> None:
    recorder = HistoryRecorder(RecordingReporter(), tmp_path / "m")
    record_epochs(recorder, range(1, 4))
    recorder.move(tmp_path / "m" / "1")
    assert len(read_lines(tmp_path / "m" / "1")) == 3
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["1"]


ENDLESS_RUN = """
import sys, time
from pathlib import Path
from tests.training.reporters import RecordingReporter
from training.reports.history import HistoryRecorder
recorder = HistoryRecorder(RecordingReporter(), Path(sys.argv[1]))
for epoch in range(1, 1_000_000):
    recorder.epoch(epoch, 10 * epoch, {"loss": 1.0 / epoch})
"""


def test_history_resumed_after_sigkill_has_every_epoch_once(tmp_path: Path) -> None:
    process = PreloadedProcess([sys.executable, "-c", ENDLESS_RUN, str(tmp_path)], cwd=ROOT)
    path, deadline = tmp_path / FILE_NAME, time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 20_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    written = path.read_bytes().count(b"\n")
    assert written > 100
    record_epochs(HistoryRecorder(RecordingReporter(), tmp_path, resume=True), range(written - 20, written + 20))
    assert [line["epoch"] for line in read_lines(tmp_path)] == list(range(1, written + 20))


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_scalars_of_a_resumed_run_have_every_epoch_once(tmp_path: Path) -> None:
    require(find_spec("tensorboard"), "the package tensorboard is not installed")
    unclosed = HistoryRecorder(RecordingReporter(), tmp_path, tensorboard=True)  # left open, as after a kill
    record_epochs(unclosed, range(1, 6))
    recorder = HistoryRecorder(RecordingReporter(), tmp_path, resume=True, tensorboard=True)
    record_epochs(recorder, range(4, 9))
    recorder.done({})
    recorder.move(tmp_path / "1")
    scalars = read_scalars(tmp_path / "1" / "tensorboard")
    assert scalars.keys() == {"squared_error", "held_out_loss"}
    assert [step for step, _ in scalars["squared_error"]] == [10 * epoch for epoch in range(1, 9)]
    assert [value for _, value in scalars["squared_error"]] == pytest.approx([1 / epoch for epoch in range(1, 9)])


def test_error_about_the_missing_tensorboard_package_names_the_install_command(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'tensorboard' else find(name, package)\n"
        "from pathlib import Path; from training.errors import FitError\n"
        "from training.reports.history import HistoryRecorder\n"
        f"try: HistoryRecorder(None, Path({str(tmp_path)!r}), tensorboard=True)\n"
        "except FitError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "--tensorboard needs the package tensorboard: pip install 'elbo[tensorboard]'\n"
