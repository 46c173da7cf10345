"""Staging folders: those of killed processes are removed, those in use never."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from models.staging import ABANDONED_SECONDS, staging_folder
from tests.data import ROOT
from tests.models.publishing import publish
from tests.preloaded import PreloadedProcess

HOLD = """
import sys, time
from pathlib import Path
from models.staging import staging_folder
with staging_folder(Path(sys.argv[1])) as staging:
    (staging / "model.pt").write_text("half")
    print(staging, flush=True)
    sys.stdin.read()
    staging.rename(Path(sys.argv[1]) / "1")
"""


@contextmanager
def holder(parent: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """Yield a process that uses a staging folder in `parent` until its input ends, and the path of the folder."""
    arguments = [sys.executable, "-c", HOLD, str(parent)]
    process = subprocess.Popen(arguments, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.communicate()


def leftovers(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if path.name.startswith((".staging-", ".trial-")))


def make_old(path: Path) -> None:
    """Set the times of `path`, and of the files in it, back by more than ABANDONED_SECONDS."""
    then = time.time() - ABANDONED_SECONDS - 60
    for each in (*path.glob("*"), path):
        os.utime(each, (then, then), follow_symlinks=False)


def abandoned_elsewhere(parent: Path, owner: str | None, prefix: str = ".staging-") -> Path:
    """Create a staging folder as another host leaves it, with the lock file `owner`; None: without a lock file."""
    staging = parent / f"{prefix}0123"
    staging.mkdir()
    (staging / "model.pt").write_text("half")
    if owner is not None:
        (parent / f"{prefix}0123.lock").write_text(owner)
    return staging


@pytest.mark.slow
def test_next_publisher_removes_the_staging_folder_of_a_killed_one(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.models.publishing import publish\n"
        "while True: publish(Path(sys.argv[1]))"
    )
    model = tmp_path / "model"
    for _ in range(20):
        process = PreloadedProcess([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
        while not (model.exists() and any(path.is_dir() for path in model.glob(".staging-*"))):
            assert process.poll() is None
        process.kill()
        process.wait()
        if leftovers(model):
            break
    assert leftovers(model), "no kill hit a publisher that was writing"
    publish(tmp_path)
    assert leftovers(model) == []


def test_staging_folder_of_a_killed_process_is_removed_by_the_next_one(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, staging):
        process.kill()
        process.wait()
        assert (staging / "model.pt").exists()
        with staging_folder(tmp_path) as own:
            assert leftovers(tmp_path) == [own.name, f"{own.name}.lock"]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("is_stopped", [False, True], ids=["running", "stopped"])
@pytest.mark.parametrize("is_old", [False, True], ids=["young", "old"])
def test_staging_folder_in_use_is_never_removed(tmp_path: Path, is_old: bool, is_stopped: bool) -> None:
    with holder(tmp_path) as (process, staging):
        if is_old:
            make_old(staging)
            make_old(staging.with_name(f"{staging.name}.lock"))
        if is_stopped:
            process.send_signal(signal.SIGSTOP)
        for _ in range(3):
            with staging_folder(tmp_path):
                pass
        assert (staging / "model.pt").read_text() == "half"
        process.send_signal(signal.SIGCONT)
        process.communicate("")
        assert process.returncode == 0
    assert (tmp_path / "1" / "model.pt").read_text() == "half"
    assert leftovers(tmp_path) == []


def test_staging_folder_in_use_by_a_child_of_a_killed_process_stays(tmp_path: Path) -> None:
    """A child that was forked inherits the lock, as the workers of a data loader do."""
    with staging_folder(tmp_path) as staging:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        try:
            with staging_folder(tmp_path):
                assert staging.is_dir()
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize("owner", ["another-kernel 7\n", "", None], ids=["another host", "unnamed", "no lock file"])
@pytest.mark.parametrize("prefix", [".staging-", ".trial-"])
def test_staging_folder_of_an_unknown_owner_is_removed_only_after_a_day(
    tmp_path: Path, owner: str | None, prefix: str
) -> None:
    staging = abandoned_elsewhere(tmp_path, owner, prefix)
    with staging_folder(tmp_path):
        assert staging.is_dir()
    for path in tmp_path.glob(f"{prefix}*"):
        make_old(path)
    os.utime(staging / "model.pt")  # it is still written to
    with staging_folder(tmp_path):
        assert staging.is_dir()
    make_old(staging)
    with staging_folder(tmp_path):
        assert not staging.exists()
    assert leftovers(tmp_path) == []


def test_symbolic_links_and_pipes_with_names_of_staging_files_do_no_harm(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("content")
    parent = tmp_path / "model"
    parent.mkdir()
    (parent / ".staging-link").symlink_to(precious)
    make_old(parent / ".staging-link")
    make_old(precious)
    (parent / ".staging-lock.lock").symlink_to(precious / "file")
    os.mkfifo(parent / ".staging-pipe.lock")
    with staging_folder(parent) as staging:
        (staging / "file").write_text("")
    assert (precious / "file").read_text() == "content"


def test_staging_folder_that_was_renamed_stays(tmp_path: Path) -> None:
    with staging_folder(tmp_path) as staging:
        (staging / "file").write_text("content")
        staging.rename(tmp_path / "1")
    assert (tmp_path / "1" / "file").read_text() == "content"
    assert leftovers(tmp_path) == []


def test_staging_folder_is_removed_if_an_error_occurs_while_it_is_in_use(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staging_folder(tmp_path) as staging:
        (staging / "file").rename(tmp_path / "absent" / "file")
    assert leftovers(tmp_path) == []
