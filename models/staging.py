"""Staging folders: where a process prepares files before it renames them to their final place. Imports no torch.

A process that is killed leaves its staging folder behind. The next process that needs a staging folder in the same
place removes it. A staging folder `.staging-<token>` has a lock file `.staging-<token>.lock`, which its owner keeps
locked (flock). The kernel releases the lock when the owner ends, so process numbers do not matter.

Several hosts may mount the folder, and then a lock may be invisible to the other hosts. The lock file therefore names
the kernel and the file system of its owner. A process with another kernel or file system removes the folder only after
ABANDONED_SECONDS. The same holds for folders without a lock file, which earlier releases left behind.
"""

import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX, LOCK = ".staging-", ".lock"
EARLIER_PREFIX = ".trial-"  # the prefix in earlier releases, which left folders behind
ABANDONED_SECONDS = 24 * 3600.0  # an artifact is written in seconds; a day is enough for the slowest disk


@contextmanager
def staging_folder(parent: Path, prefix: str = PREFIX, mode: int = 0o777) -> Iterator[Path]:
    """Create an empty folder in `parent`, and delete it at the end unless it was renamed.

    Before that, remove the staging folders in `parent` that their owners have abandoned.

    Args:
        parent: a folder.
        prefix: the beginning of the folder's name. Only folders with the same beginning are removed.
        mode: the permissions of the folder, from which the umask is subtracted.

    Raises:
        OSError: this user may not write to `parent`, or the disk is full.
    """
    lock, descriptor = _create_lock(parent, prefix)
    staging = lock.with_name(lock.name.removesuffix(LOCK))
    try:
        _remove_abandoned(parent, prefix, os.fstat(descriptor).st_mtime)
        staging.mkdir(mode)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # no effect if the folder was renamed
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _create_lock(parent: Path, prefix: str) -> tuple[Path, int]:
    """Create a lock file in `parent` and lock it. Return its path and its open descriptor."""
    while True:
        path = parent / f"{prefix}{secrets.token_hex(8)}{LOCK}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(descriptor, _owner(descriptor))
        except BlockingIOError:  # another process has locked the new file to examine it, and may remove it
            path.unlink(missing_ok=True)
            os.close(descriptor)
            continue
        except OSError:
            # The file system has no locks, so the file names no owner. Or the disk is full, and then `mkdir` fails.
            os.ftruncate(descriptor, 0)
        return path, descriptor


def _remove_abandoned(parent: Path, prefix: str, now: float) -> None:
    """Remove the staging folders in `parent` that their owners have abandoned, as far as this user may.

    Args:
        parent: a folder.
        prefix: the beginning of their names.
        now: the time in seconds, on the clock of the file system of `parent`, because the clocks of hosts differ.
    """
    prefixes = (PREFIX, EARLIER_PREFIX) if prefix == PREFIX else (prefix,)
    entries = os.listdir(parent)  # noqa: PTH208 - needs only the names
    if prefix != PREFIX:  # a folder without a lock file may be one that an earlier release still uses
        entries = [entry for entry in entries if entry.endswith(LOCK)]
    for token in sorted({entry.removesuffix(LOCK) for entry in entries if entry.startswith(prefixes)}):
        with suppress(OSError):  # another process was faster, or the folder belongs to another user
            _remove_if_abandoned(parent / token, now)


def _remove_if_abandoned(staging: Path, now: float) -> None:
    lock = staging.with_name(staging.name + LOCK)
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        if _is_old(staging, now):
            shutil.rmtree(staging)
        return
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return
        has_ended = _has_ended(descriptor)
        if has_ended or (has_ended is None and _is_old(lock, now) and _is_old(staging, now)):
            if staging.exists():
                shutil.rmtree(staging)
            lock.unlink()
    finally:
        os.close(descriptor)


def _has_ended(descriptor: int) -> bool | None:
    """Return whether the owner of an open lock file has ended; None if this process cannot know."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    owner = os.pread(descriptor, 200, 0)
    return True if owner and owner == _owner(descriptor) else None


def _owner(descriptor: int) -> bytes:
    """Return the running kernel and the file system of an open file; b"" if the kernel has no identity.

    Processes for which both are equal see each other's locks.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return b""
    return f"{boot} {os.fstat(descriptor).st_dev}\n".encode()


def _is_old(path: Path, now: float) -> bool:
    """Return whether `path` and the files in it were last written more than ABANDONED_SECONDS before `now`."""
    try:
        times = [path.lstat().st_mtime, *(each.lstat().st_mtime for each in path.glob("*"))]
    except FileNotFoundError:
        return True
    return now - max(times) > ABANDONED_SECONDS
