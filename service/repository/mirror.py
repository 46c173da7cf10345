"""The mirror of a remote repository in a local folder, which the registry reads like any artifact folder.

One process of a server polls the repository. It downloads the files of a version into a staging folder, compares their
hashes with the index, and renames the folder, so the registry never sees an incomplete or altered version. If the
repository is unreachable, the versions in the mirror stay, also after a restart.
"""

import ctypes
import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Literal

from models.errors import ArtifactError, ElboError
from models.manifest import FILE_NAME, folders, model_folder, read_sealed, version_folder, versions
from models.signatures import SIGNATURE_NAME
from models.staging import staging_folder
from service.repository.index import (
    INDEX_NAME,
    Entries,
    FileEntry,
    VersionEntry,
    VersionName,
    entries_of,
    parse_index,
)
from service.repository.location import Location
from service.repository.storage import (
    Interrupted,
    RepositoryCorrupt,
    RepositoryFileMissing,
    RepositoryUnavailable,
    Storage,
    open_storage,
    sha256_of,
)

LOCK, FAILURES = ".mirror.lock", ".mirror-failures.json"
SPARE_VERSIONS = 1  # versions besides those that are served: the registry serves it if a newer one fails to load
SPARE_BYTES = 64 * 2**20  # space on the disk that downloads leave free
MIN_RETRY_SECONDS = 5.0  # pause before a faulty version is downloaded again; each failure doubles it
MAX_RETRY_SECONDS = 600.0
MAX_UNAVAILABLE = 3  # versions that cannot be downloaded, before a poll ends: then the repository is unavailable
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # constants of Linux, see renameat2(2)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger("elbo.repository")


class CacheUnwritable(ElboError):
    """The cache of a remote repository is on a full disk, or this user may not write to it."""

    code = "cache_unwritable"


@dataclass(frozen=True)
class MirrorFailure:
    """Why a version cannot be mirrored; or why the repository cannot be polled, if `name` is None."""

    name: str | None
    version: int | None
    code: str
    detail: str


@dataclass(frozen=True)
class Poll:
    """What a poll did.

    Args:
        outcome: ok; incomplete (a version could not be mirrored); failed (the repository did not respond, or the cache
            is not writable); skipped (another process mirrors into the folder, or the server stops).
        changed: whether a version or a failure was added, replaced or removed.
    """

    outcome: Literal["ok", "incomplete", "failed", "skipped"]
    changed: bool = False


@dataclass
class _Retry:
    """A version that could not be mirrored. It is tried again at `due`, or as soon as its entry changes."""

    entry: VersionEntry
    failure: MirrorFailure
    pause: float
    due: float


class Mirror:
    """Mirrors a remote repository into a local folder. Only one process at a time mirrors into a folder.

    Args:
        location: the remote repository.
        folder: the local folder.
        keep_versions: how many of the newest versions of each model are served. The mirror has one more.
        storage: the files of the repository; by default, those at `location`.
        clock: the time in seconds.
    """

    def __init__(
        self,
        location: Location,
        folder: Path,
        keep_versions: int,
        storage: Storage | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._location = location
        self._folder = folder
        self._keep = keep_versions + SPARE_VERSIONS
        self._storage = storage or open_storage(location)
        self._clock = clock
        self._entries: Entries | None = None  # of the last poll, if everything was mirrored
        self._known: dict[Path, tuple[tuple[int, ...], FileEntry]] = {}  # `_state` and entry of files in the mirror
        self._retries: dict[VersionName, _Retry] = {}
        self._changed = False
        self._unavailable = 0  # downloads that failed in this poll because the repository did not send the file
        self._has_warned = False
        self._unwritable = ""  # the last message that was logged about a cache that is not writable
        self.is_stopped = False

    def has_versions(self) -> bool:
        """Return whether the mirror has a version of a model."""
        with suppress(OSError, ArtifactError):
            return any(versions(self._folder, name) for name in folders(self._folder))
        return False

    def poll(self) -> Poll:
        """Mirror the new versions of the repository, and remove those that it no longer has. This method blocks.

        A failure is written to the folder, where `read_failures` finds it.
        """
        self._changed = False
        self._unavailable = 0
        try:
            with self._locked() as is_locked:
                outcome = self._poll_locked() if is_locked else "skipped"
        except OSError as error:
            self._log_unwritable(error)
            return Poll("failed", self._changed)
        self._unwritable = ""
        return Poll(outcome, self._changed)

    def _poll_locked(self) -> Literal["ok", "incomplete", "failed", "skipped"]:
        failures: tuple[MirrorFailure, ...] = ()
        try:
            self._synchronise()
        except Interrupted:
            return "skipped"
        except ElboError as error:
            stays = "; the models in the cache stay served" if self.has_versions() else ""
            failures = (MirrorFailure(None, None, error.code, f"{error}{stays}"),)
        self._write_failures((*failures, *(retry.failure for retry in self._retries.values())))
        return "failed" if failures else "incomplete" if self._retries else "ok"

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Lock the folder in the block, and yield whether no other process has locked it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    def _synchronise(self) -> None:
        entries = self._read_entries()
        if entries == self._entries and not self._retries:
            return
        self._entries = None
        if not entries and self.has_versions():
            raise RepositoryUnavailable(f"{self._location} has no models any more: expected those that it had before")
        self._retries = {
            name: retry
            for name, retry in self._retries.items()
            if entries.get(name.name, {}).get(name.version) == retry.entry
        }
        self._remove_models(set(entries))  # first, because a download may fail for lack of space
        for name, found in entries.items():
            self._mirror_model(name, found)
        if not self._retries:
            self._entries = entries

    def _read_entries(self) -> Entries:
        """Return the versions that the repository has, from its index, or from a list of its files if it has none."""
        try:
            return parse_index(self._storage.read(INDEX_NAME), str(self._location))
        except RepositoryFileMissing:
            entries = entries_of(self._storage.list_files())
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s has no %s, so every poll lists all its files, and only the seals of the models are verified: write "
                "the index with elbo index, and publish with elbo push",
                self._location,
                INDEX_NAME,
            )
        return entries

    def _mirror_model(self, name: str, found: dict[int, VersionEntry]) -> None:
        """Mirror the newest intact versions of a model, and remove older versions and those that `found` lacks."""
        kept: set[int] = set()
        for version in sorted(found, reverse=True):
            if len(kept) == self._keep:
                self._retries.pop(VersionName(name, version), None)  # nobody needs this version any more
            elif self._has_mirrored(VersionName(name, version), found[version]):
                kept.add(version)
        for version in versions(self._folder, name):
            # A version above the kept ones stays, even if the repository has a faulty replacement of it.
            if version not in found or (len(kept) == self._keep and version < min(kept)):
                self._remove(version_folder(self._folder, name, version), f"{name}@{version}")

    def _has_mirrored(self, name: VersionName, entry: VersionEntry) -> bool:
        """Mirror a version if the mirror does not have it yet. Return whether the mirror has it now."""
        retry = self._retries.get(name)
        if retry and self._clock() < retry.due:
            return False
        try:
            self._mirror_version(name, entry)
        except (RepositoryCorrupt, RepositoryUnavailable, ArtifactError, CacheUnwritable) as error:
            if isinstance(error, RepositoryUnavailable) and not isinstance(error, RepositoryFileMissing):
                self._unavailable += 1
                if self._unavailable > MAX_UNAVAILABLE:
                    raise
            failure = MirrorFailure(name.name, name.version, error.code, str(error))
            if retry is None or retry.failure != failure:
                log.error("failed to mirror %s: %s", name, error)
            pause = min(2 * retry.pause, MAX_RETRY_SECONDS) if retry else MIN_RETRY_SECONDS
            self._retries[name] = _Retry(entry, failure, pause, self._clock() + pause)
            return False
        self._retries.pop(name, None)
        return True

    def _mirror_version(self, name: VersionName, entry: VersionEntry) -> None:
        folder = version_folder(self._folder, name.name, name.version)
        model, signature = folder / FILE_NAME, folder / SIGNATURE_NAME
        has_model = self._is_current(model, entry.model)
        has_signature = signature.exists() if entry.signature is None else self._is_current(signature, entry.signature)
        if has_model and has_signature == (entry.signature is not None):
            return
        parent = model_folder(self._folder, name.name)
        parent.mkdir(exist_ok=True)
        with staging_folder(parent) as staging:
            if not has_model:
                self._download(name.files[0], entry.model, staging / FILE_NAME)
            if entry.signature:
                self._download(name.files[1], entry.signature, staging / SIGNATURE_NAME)
            staging.chmod(0o755)
            if not folder.exists():
                staging.rename(folder)
            elif has_model:
                self._replace_signature(staging, folder)
            else:
                _exchange(staging, folder)
        self._remember(model, entry.model)
        if entry.signature:
            self._remember(signature, entry.signature)
        self._changed = True
        log.info("mirrored %s from %s, %d bytes", name, self._location, entry.model.bytes)

    def _replace_signature(self, staging: Path, folder: Path) -> None:
        if (staging / SIGNATURE_NAME).exists():
            (staging / SIGNATURE_NAME).replace(folder / SIGNATURE_NAME)
        else:
            (folder / SIGNATURE_NAME).unlink(missing_ok=True)

    def _download(self, path: str, entry: FileEntry, target: Path) -> None:
        """Download one file, and verify its hash. An artifact without a hash in an index must have a valid seal."""
        free = shutil.disk_usage(target.parent).free
        if free < entry.bytes + SPARE_BYTES:
            raise CacheUnwritable(
                f"the disk of the cache {self._folder} has {free:,} bytes left, and {path} needs {entry.bytes:,} and "
                f"{SPARE_BYTES:,} to spare: free some space, or set ELBO_CACHE to another disk"
            )
        try:
            self._storage.download(path, target, entry.bytes, lambda: self.is_stopped)
            with target.open("rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise CacheUnwritable(
                f"the disk of the cache {self._folder} is full ({error.strerror}): free some space, or set ELBO_CACHE "
                "to another disk"
            ) from error
        size = target.stat().st_size
        if size != entry.bytes:
            raise RepositoryCorrupt(
                f"{self._location}/{path} has {size:,} bytes, expected {entry.bytes:,}: push the version again"
            )
        if entry.sha256 is None:
            if target.name == FILE_NAME:
                read_sealed(target)
        elif (found := sha256_of(target)) != entry.sha256:
            raise RepositoryCorrupt(
                f"{self._location}/{path} has the SHA-256 {found}, and {INDEX_NAME} names {entry.sha256}: the file was "
                "altered or damaged after it was pushed; push the version again"
            )

    def _is_current(self, path: Path, entry: FileEntry) -> bool:
        """Return whether the file of the mirror at `path` is the one that the repository has.

        Its hash is computed when this process first sees the file, and when the file changes.
        """
        try:
            state = _state(path)
        except FileNotFoundError:
            return False
        known = self._known.get(path)
        if known and known[0] == state:
            return known[1] == entry
        if state[1] != entry.bytes:
            return False
        if entry.sha256 is not None:
            is_current = sha256_of(path) == entry.sha256
        else:  # no tag survives a restart: a sealed artifact is kept, and a signature, which is small, downloaded
            is_current = path.name == FILE_NAME and _is_sealed(path)
        if is_current:
            self._known[path] = state, entry
        return is_current

    def _remember(self, path: Path, entry: FileEntry) -> None:
        self._known[path] = _state(path), entry

    def _remove_models(self, present: set[str]) -> None:
        """Remove the models that the repository no longer has."""
        for name in folders(self._folder):
            if name not in present:
                for version in versions(self._folder, name):
                    self._remove(version_folder(self._folder, name, version), f"{name}@{version}")

    def _remove(self, folder: Path, name: str) -> None:
        with staging_folder(folder.parent) as staging:
            folder.rename(staging / folder.name)  # in one step, so a reader never sees a folder that is half removed
        self._known = {path: known for path, known in self._known.items() if path.parent != folder}
        self._changed = True
        log.info("removed %s from the cache: %s no longer has it, or has newer versions", name, self._location)

    def _write_failures(self, failures: tuple[MirrorFailure, ...]) -> None:
        if failures == read_failures(self._folder):
            return
        with staging_folder(self._folder) as staging:
            written = staging / FAILURES
            written.write_text(json.dumps([asdict(failure) for failure in failures]))
            written.replace(self._folder / FAILURES)
        self._changed = True  # the registry reports failures

    def _log_unwritable(self, error: OSError) -> None:
        message = (
            f"cannot write to the cache {self._folder} of {self._location} ({error.strerror or error}): free some "
            "space, change its permissions, or set ELBO_CACHE to another folder"
        )
        if message != self._unwritable:
            log.error("%s", message)
        self._unwritable = message


def read_failures(folder: Path) -> tuple[MirrorFailure, ...]:
    """Return the failures of the last poll for the mirror in `folder`, whichever process polled."""
    try:
        return tuple(MirrorFailure(**fields) for fields in json.loads((folder / FAILURES).read_bytes()))
    except (OSError, ValueError, TypeError):
        return ()


def _exchange(first: Path, second: Path) -> None:
    """Exchange two folders in one step, so that no reader and no crash meets files of both in one folder.

    If the file system cannot do this, there is a moment without the folder `second`.
    """
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux
    paths = os.fsencode(first), os.fsencode(second)
    if rename is not None and rename(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0:
        return
    replaced = first.with_name(f"{first.name}-replaced")
    second.rename(replaced)
    first.rename(second)
    shutil.rmtree(replaced, ignore_errors=True)


def _state(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_sealed(path: Path) -> bool:
    with suppress(ArtifactError):
        read_sealed(path)
        return True
    return False
