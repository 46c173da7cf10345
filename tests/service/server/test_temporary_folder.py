"""The temporary folder for the memory of groups. A server that starts removes the folders of killed servers."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from service.server.run import temporary_folder
from service.settings import Settings
from tests.data import ROOT

pytestmark = pytest.mark.slow
OWNER = """
import sys
from service.server.run import temporary_folder
from service.settings import Settings
with temporary_folder(Settings()) as folder:
    (folder / "web@1.groups").write_bytes(b"x")
    print(folder, flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_server() -> Iterator[tuple[Path, "subprocess.Popen[str]"]]:
    """Run a process with a temporary folder. Yield the folder and the process."""
    environment = os.environ | {"TMPDIR": tempfile.gettempdir()}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=ROOT, env=environment, stdin=-1, stdout=-1, text=True
    ) as process:
        assert process.stdout
        try:
            yield Path(process.stdout.readline().strip()), process
        finally:
            process.kill()


def test_starting_server_removes_the_folders_of_killed_servers_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elbo-state-of-an-earlier-release").mkdir()
    (tmp_path / "other").mkdir()
    with ExitStack() as stack:
        killed, process = stack.enter_context(other_server())
        running, _ = stack.enter_context(other_server())
        assert {killed.parent, running.parent} == {tmp_path}
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert killed.is_dir()
        with temporary_folder(Settings()) as folder:
            assert folder
            assert folder.stat().st_mode & 0o777 == 0o700
            assert not killed.exists()
            assert (running / "web@1.groups").read_bytes() == b"x"
        assert not folder.exists()
    kept = {"elbo-state-of-an-earlier-release", "other", running.name, f"{running.name}.lock"}
    assert {path.name for path in tmp_path.iterdir()} == kept  # the last server was killed, too
    with temporary_folder(Settings()):
        assert not running.exists()


def test_there_is_no_temporary_folder_if_elbo_state_is_set_or_no_folder_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    for settings in (Settings(state=tmp_path), Settings()):
        with temporary_folder(settings) as folder:
            assert folder is None
    assert list(tmp_path.iterdir()) == []
