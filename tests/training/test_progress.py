"""Progress as a person sees it: through a real pipe and on a real pseudo-terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

from tests.data import ROOT

RUN = """
import sys
from training.progress import reporter
report = reporter()
report.note("a note on pixel[0,3] [bold]")
report.start("vae (vae)", 400)
for epoch in range(1, 41):
    report.epoch(epoch, 10 * epoch, {"reconstruction": 23.456789, "kl": 4.25, "elbo": 19.206789})
    if epoch == 20:
        report.note("half way")
report.done({"reconstruction_error": 0.0123})
report.close()
print("rich" in sys.modules)
"""
TERMS = "reconstruction 23.46  kl 4.25  elbo 19.21 nats"


def on_terminal(code: str, **environment: str) -> tuple[str, str]:
    """Everything that `code` writes to standard error, a terminal of 80 columns, and to standard output, a pipe."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = (
        {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"} | environment
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=child, env=environment, text=True
    )
    os.close(child)
    seen = b""
    try:
        while chunk := os.read(parent, 65536):
            seen += chunk
    except OSError:  # EIO: the other side is closed
        pass
    finally:
        os.close(parent)
    printed, _ = process.communicate(timeout=30)
    return seen.decode(), printed


def through_pipe(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)


def test_a_pipe_gets_a_line_for_every_tenth_of_the_run_and_every_note() -> None:
    lines = through_pipe(RUN).stderr.splitlines()
    assert lines[:2] == ["a note on pixel[0,3] [bold]", "training vae (vae)"]
    assert lines[7] == "half way"
    told = lines[2:7] + lines[8:13]
    for tenth, line in enumerate(told, start=1):
        assert re.fullmatch(rf"{10 * tenth:3d} %  epoch {4 * tenth}  {TERMS}  \d+ s left", line)
    assert re.fullmatch(r"trained in \d+\.\d s  reconstruction_error 0\.0123", lines[-1])
    assert len(lines) == 14


def test_a_pipe_sees_no_control_characters_and_costs_no_import_of_rich() -> None:
    run = through_pipe(RUN)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", run.stderr)
    assert run.stdout == "False\n"


def test_a_line_reaches_the_pipe_at_once() -> None:
    code = "from training.progress import reporter; reporter().note('now'); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "now\n"  # while the child waits for its input
    assert process.poll() is None
    process.communicate("go on\n", timeout=30)


def test_a_terminal_gets_a_bar_that_is_redrawn_in_place_with_the_terms_under_it() -> None:
    seen, printed = on_terminal(RUN)
    assert printed == "True\n"
    assert "\u2501" in seen
    assert "\x1b[1A" in seen  # one line up, to draw again
    assert "vae (vae)" in seen
    assert "100%" in seen
    assert f"epoch 40  {TERMS}" in seen
    assert " 10 %  epoch" not in seen  # the plain lines


def test_a_terminal_shows_each_note_once_and_as_it_was_written() -> None:
    seen, _ = on_terminal(RUN)
    assert seen.count("a note on pixel[0,3] [bold]") == 1
    assert seen.count("half way") == 1
    assert re.search(r"trained in \d+\.\d s  reconstruction_error 0\.0123\r\n$", seen)


def test_the_cursor_comes_back_when_a_run_fails() -> None:
    code = """
from training.progress import reporter
report = reporter()
try:
    report.start("ae (ae)", 10)
    raise SystemExit(3)
finally:
    report.close()
"""
    seen, _ = on_terminal(code)
    assert "\x1b[?25l" in seen
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")


def test_a_dumb_terminal_gets_plain_lines() -> None:
    seen, _ = on_terminal(RUN, TERM="dumb")
    assert "\x1b" not in seen
    assert " 10 %  epoch 4" in seen


def test_a_run_of_one_step_says_that_it_began_and_ended() -> None:
    code = """
from training.progress import reporter
report = reporter()
report.start("pca (pca)", 1)
report.done({})
"""
    first, last = through_pipe(code).stderr.splitlines()
    assert first == "training pca (pca)"
    assert re.fullmatch(r"trained in \d+\.\d s *", last)


def test_long_work_says_how_far_it_is_and_short_work_nothing() -> None:
    code = """
import time
from training.progress import SlowProgress
quick, slow = SlowProgress("quick", 3), SlowProgress("evaluating a.csv", 4, seconds=0.01)
for _ in range(4):
    time.sleep(0.02)
    quick.advance(1)
    slow.advance(1)
"""
    lines = through_pipe(code).stderr.splitlines()
    assert [line.split(" %")[0] for line in lines] == [f"evaluating a.csv: {share}" for share in (25, 50, 75)]
    assert all(re.fullmatch(r".* %, \d+ s left", line) for line in lines)
