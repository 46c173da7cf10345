"""The output of the progress reporters on a real pipe and on a real pseudo-terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path
from typing import Any

import pytest

from tests.commands import in_process, succeed, two_factor_rows, write
from tests.data import ROOT
from tests.preloaded import PreloadedProcess

SCRIPT = """
import sys
from training.progress import reporter
report = reporter()
report.note("a note on pixel[0,3] [bold]")
report.start("vae (vae)", 400)
for epoch in range(1, 41):
    report.epoch(epoch, 10 * epoch, {"reconstruction": 23.456789, "kl": 4.25, "elbo": 19.206789})
    if epoch == 20:
        report.note("halfway")
report.done({"reconstruction_error": 0.0123})
report.close()
print("rich" in sys.modules)
"""
TERMS = "reconstruction 23.46  kl 4.25  elbo 19.21 nats"


def run_on_terminal(
    code: str, *arguments: str, start: type[subprocess.Popen[Any]] = subprocess.Popen, **environment: str
) -> tuple[str, str]:
    """Run `code` with standard error on an 80-column terminal and standard output in a file. Return both outputs.

    `start=PreloadedProcess` saves the import of torch if the code needs it.
    """
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = (
        {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"} | environment
    )
    file = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed below
    command = [sys.executable, "-c", code, *arguments]
    process = start(command, cwd=ROOT, stdout=file, stderr=child, env=environment)
    os.close(child)
    error_output = b""
    try:
        while chunk := os.read(parent, 65536):
            error_output += chunk
    except OSError:  # EIO: the child has closed its end
        pass
    finally:
        os.close(parent)
    process.wait(timeout=30)
    with file:
        file.seek(0)
        return error_output.decode(), file.read()


def run_through_pipe(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)


def test_reporter_prints_every_note_and_one_line_per_tenth_of_the_run_to_a_pipe() -> None:
    lines = run_through_pipe(SCRIPT).stderr.splitlines()
    assert lines[:2] == ["a note on pixel[0,3] [bold]", "training vae (vae)"]
    assert lines[7] == "halfway"
    progress_lines = lines[2:7] + lines[8:13]
    for tenth, line in enumerate(progress_lines, start=1):
        assert re.fullmatch(rf"{10 * tenth:3d} %  epoch {4 * tenth}  {TERMS}  \d+ s left", line)
    assert re.fullmatch(r"trained in \d+\.\d s  reconstruction_error 0\.0123", lines[-1])
    assert len(lines) == 14


def test_reporter_on_a_pipe_prints_no_control_characters_and_does_not_import_rich() -> None:
    run = run_through_pipe(SCRIPT)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", run.stderr)
    assert run.stdout == "False\n"


def test_note_on_a_pipe_is_flushed_immediately() -> None:
    code = "from training.progress import reporter; reporter().note('now'); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "now\n"  # the child still waits for input
    assert process.poll() is None
    process.communicate("\n", timeout=30)


def test_reporter_redraws_a_bar_with_the_loss_terms_below_it_on_a_terminal() -> None:
    screen, rich_imported = run_on_terminal(SCRIPT)
    assert rich_imported == "True\n"
    assert "\u2501" in screen
    assert "\x1b[1A" in screen  # cursor up one line, to redraw
    assert "vae (vae)" in screen
    assert "100%" in screen
    assert f"epoch 40  {TERMS}" in screen
    assert " 10 %  epoch" not in screen  # the plain lines have this format


def test_reporter_on_a_terminal_prints_each_note_once_and_verbatim() -> None:
    screen, _ = run_on_terminal(SCRIPT)
    assert screen.count("a note on pixel[0,3] [bold]") == 1
    assert screen.count("halfway") == 1
    assert re.search(r"trained in \d+\.\d s  reconstruction_error 0\.0123\r\n$", screen)


STAGES = [
    "computing the score statistics",
    "calibrating",
    "calibrating the estimates of missing values",
    "evaluating on the held-out rows",
    "exporting the ONNX twin",
    "writing the artifact",
    "drawing the plots",
]


TWO_RUNS = """
import sys
from elbo import cli
for options in (["--model", "pca", "--name", "a"], ["--model", "ae", "--name", "b", "--epochs", "10", "--force"]):
    try:
        cli.main(["train", "digits", *options, *sys.argv[1:]])
    except SystemExit as end:
        assert not end.code
    print("the end of a run", file=sys.stderr)
"""


@pytest.mark.slow
def test_bar_on_a_terminal_is_full_only_after_the_last_stage(tmp_path: Path) -> None:
    folders = ["--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs")]
    screen, out = run_on_terminal(TWO_RUNS, *folders, "--plots", start=PreloadedProcess)
    assert re.findall("published [^:]*", out) == ["published a@1", "published b@1"]
    for title, part in zip(("a (pca)", "b (ae)"), screen.split("the end of a run")[:2], strict=True):
        places = [part.index(f"{title}: {stage}") for stage in STAGES]
        assert places == sorted(places)
        assert "100%" not in part[: places[-1]]
        assert "100%" in part[places[-1] :]


@pytest.mark.slow
def test_reporter_prints_the_stages_before_the_metrics_if_the_output_is_not_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", "pca", "--name", "m", "--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs")]
    code, _, err = in_process(capsys, "train", "digits", *options)
    assert code == 0
    lines = err.splitlines()
    assert lines[1:-1] == ["training m (pca)", *STAGES[:4]]  # the first line is a note on the data
    assert lines[-1].startswith("trained in ")


@pytest.mark.slow
def test_score_shows_its_progress_on_a_terminal_if_the_results_go_elsewhere(tmp_path: Path) -> None:
    data = write(tmp_path / "a.csv", two_factor_rows(3000, seed=0))
    folders = ["--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs")]
    succeed("train", data, "--model", "pca", "--name", "hosts", *folders)
    screen, out = run_on_terminal(
        f"from elbo import cli; cli.main({['score', 'hosts', data, '--artifacts', str(tmp_path)]})",
        start=PreloadedProcess,
    )
    assert len(out.splitlines()) == 3000
    counts = [int(count) for count in re.findall(r"(\d+)/\d+", screen)]
    assert counts == sorted(counts)
    assert {0, 3000} <= set(counts)
    assert "scoring" in screen


def test_cursor_is_shown_again_after_a_failed_run() -> None:
    code = """
from training.progress import reporter
report = reporter()
try:
    report.start("ae (ae)", 10)
    raise SystemExit(3)
finally:
    report.close()
"""
    screen, _ = run_on_terminal(code)
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert hide in screen
    assert screen.rindex(show) > screen.rindex(hide)


def test_reporter_on_a_dumb_terminal_prints_plain_lines() -> None:
    screen, _ = run_on_terminal(SCRIPT, TERM="dumb")
    assert "\x1b" not in screen
    assert " 10 %  epoch 4" in screen


def test_reporter_for_a_run_of_one_step_prints_the_start_and_the_end() -> None:
    code = """
from training.progress import reporter
report = reporter()
report.start("pca (pca)", 1)
report.done({})
"""
    first, last = run_through_pipe(code).stderr.splitlines()
    assert first == "training pca (pca)"
    assert re.fullmatch(r"trained in \d+\.\d s *", last)


def test_progress_lines_appear_only_if_the_work_takes_long() -> None:
    code = """
import time
from training.progress import SlowProgress
quick, slow = SlowProgress("quick", 3), SlowProgress("evaluating a.csv", 4, seconds=0.01)
time.sleep(0.02)
slow.advance(0)  # elbo score reports 0 rows after it has divided a large file
for _ in range(4):
    time.sleep(0.02)
    quick.advance(1)
    slow.advance(1)
"""
    lines = run_through_pipe(code).stderr.splitlines()
    assert [line.split(" %")[0] for line in lines] == [f"evaluating a.csv: {share}" for share in (25, 50, 75)]
    assert all(re.fullmatch(r".* %, \d+ s left", line) for line in lines)
