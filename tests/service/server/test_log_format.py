"""The format of the log of `elbo serve`, on a real pseudo-terminal and on a pipe."""

import json
import os
import pty
import signal
import sys
from pathlib import Path

import pytest

from tests.data import ROOT
from tests.preloaded import PreloadedProcess

pytestmark = pytest.mark.slow


def first_log_line(artifacts: Path, *, on_terminal: bool, log_format: str | None) -> str:
    """Return the line that a server without models logs when it listens, without its line end."""
    reader, writer = pty.openpty() if on_terminal else os.pipe()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ELBO_")}
    environment |= {"ELBO_ARTIFACTS": str(artifacts), "ELBO_PORT": "0"}
    environment |= {} if log_format is None else {"ELBO_LOG_FORMAT": log_format}
    process = PreloadedProcess([sys.executable, "-m", "elbo", "serve"], cwd=ROOT, stdout=writer, env=environment)
    os.close(writer)
    try:
        with os.fdopen(reader, encoding="utf-8") as log:
            return next(line for line in log if "listening on" in line).rstrip("\r\n")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("on_terminal", "log_format", "expected"),
    [
        (True, None, "text"),
        (True, "json", "json"),
        (False, "auto", "json"),
        (False, "text", "text"),
    ],
)
def test_log_is_text_on_a_terminal_and_json_elsewhere_unless_a_format_is_set(
    on_terminal: bool, log_format: str | None, expected: str, tmp_path: Path
) -> None:
    line = first_log_line(tmp_path, on_terminal=on_terminal, log_format=log_format)
    if expected == "json":
        assert json.loads(line)["message"].startswith("listening on http://127.0.0.1:")
    else:
        assert " INFO    listening on http://127.0.0.1:" in line
        assert line.startswith("20")
