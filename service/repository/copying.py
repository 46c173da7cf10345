"""Copy versions between repositories: folders, and remote repositories.

The files of a version are written first, and the index last. If a copy ends half-way, readers see the repository as it
was before, and the next copy writes the versions that are missing in the index.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from models.errors import ArtifactMissing, printable
from models.manifest import FILE_NAME, model_folder, names, parse, read_sealed, version_folder, versions
from models.signatures import MAX_SIGNATURE_BYTES, SIGNATURE_NAME, TrustedKeys
from models.staging import staging_folder
from models.versions import unwritable_as_artifact_error
from service.repository.index import (
    INDEX_NAME,
    MAX_FILE_BYTES,
    Entries,
    FileEntry,
    VersionEntry,
    VersionName,
    entries_of,
    parse_index,
    render_index,
)
from service.repository.location import Location, RepositoryInvalid, is_url, parse_location
from service.repository.mlflow_registry import PLACE, MlflowRepository
from service.repository.storage import (
    CopyConflict,
    RepositoryConflict,
    RepositoryCorrupt,
    RepositoryFileMissing,
    Storage,
    entry_of_folder,
    open_storage,
    sha256_of,
)

MAX_TRIES = 8  # to write the index while other processes write it, too
REQUEST_ATTEMPTS = 4  # of a request to S3, before the copy fails
STAGING_PREFIX = "elbo-copy-"


@dataclass(frozen=True)
class Copied:
    """The result of copying one version.

    Args:
        name: the version.
        bytes: the size of the artifact.
        action: "copied", "signature" (only the signature was copied), or "present" (the destination had both already).
    """

    name: VersionName
    bytes: int
    action: str


class Repository(Protocol):
    """A place from which versions are copied, or to which they are copied."""

    def entries(self) -> Entries:
        """Return the versions. The hashes of files may be missing."""

    def complete(self, name: VersionName, entry: VersionEntry) -> VersionEntry:
        """Return the entry of a version with the hashes of its files."""

    def fetch(self, name: VersionName, entry: VersionEntry, staging: Path) -> None:
        """Copy the files of a version into the folder `staging`."""

    def store(self, name: VersionName, staging: Path, only_signature: bool) -> None:
        """Copy the files in the folder `staging` into the repository.

        Args:
            name: the version.
            staging: a folder with the artifact, and the signature if the version has one.
            only_signature: whether the repository has the artifact already.

        Raises:
            CopyConflict: the repository has another artifact under this name and version.
        """

    def write_index(self, added: Entries) -> None:
        """Write the index. Call this method after `store`.

        Args:
            added: the entries, with hashes, of the versions that were copied.
        """

    def rewrite_index(self) -> Entries:
        """Write the index of all files that the repository has now, with new hashes, and return it."""


def open_repository(place: str) -> Repository:
    """Return the repository at `place`: a URL, `mlflow:`, or the path of a folder. Raises RepositoryInvalid."""
    if place.rstrip("/") == PLACE:
        return MlflowRepository()
    if not is_url(place):
        return FolderRepository(Path(place))
    location = parse_location(place)
    if location.scheme == "file":
        return FolderRepository(Path(location.url.removeprefix("file://")), has_index=True)
    return RemoteRepository(location)


class FolderRepository:
    """An artifact folder.

    Args:
        root: the folder.
        has_index: whether `write_index` writes an index even if there is none yet.
    """

    def __init__(self, root: Path, has_index: bool = False) -> None:
        self._root = root
        self._has_index = has_index

    def entries(self) -> Entries:
        """See `Repository`. The folder itself is read, not its index."""
        files = {}
        for name in names(self._root):
            for version in versions(self._root, name):
                for path in VersionName(name, version).files:
                    file = self._root / path
                    if file.exists():
                        # `complete` and `fetch` refuse a file with a size that is not valid, and name it
                        files[path] = FileEntry(bytes=min(max(1, file.stat().st_size), MAX_FILE_BYTES))
        return entries_of(files)

    def complete(self, name: VersionName, entry: VersionEntry) -> VersionEntry:  # noqa: ARG002 - as in `Repository`
        """See `Repository`."""
        return entry_of_folder(version_folder(self._root, name.name, name.version))

    def fetch(self, name: VersionName, entry: VersionEntry, staging: Path) -> None:
        """See `Repository`."""
        folder = version_folder(self._root, name.name, name.version)
        (staging / FILE_NAME).write_bytes(read_sealed(folder / FILE_NAME))
        if entry.signature:
            (staging / SIGNATURE_NAME).write_bytes((folder / SIGNATURE_NAME).read_bytes())

    def store(self, name: VersionName, staging: Path, only_signature: bool) -> None:
        """See `Repository`."""
        parent = model_folder(self._root, name.name)
        with unwritable_as_artifact_error(parent):
            parent.mkdir(parents=True, exist_ok=True)
            with staging_folder(parent) as own:
                own.chmod(0o755)
                for file in (FILE_NAME, SIGNATURE_NAME):
                    if (staging / file).exists():
                        _copy_synced(staging / file, own / file)
                folder = version_folder(self._root, name.name, name.version)
                if only_signature:
                    (own / SIGNATURE_NAME).replace(folder / SIGNATURE_NAME)
                    return
                try:
                    own.rename(folder)
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                    _require_same(name, sha256_of(folder / FILE_NAME), sha256_of(own / FILE_NAME))
                    if (own / SIGNATURE_NAME).exists():
                        (own / SIGNATURE_NAME).replace(folder / SIGNATURE_NAME)

    def write_index(self, added: Entries) -> None:
        """See `Repository`. The index lists the versions that the folder has now."""
        index = self._root / INDEX_NAME
        if self._has_index or index.exists():
            self._write_index(added, parse_index(index.read_bytes(), str(self._root)) if index.exists() else {})

    def rewrite_index(self) -> Entries:
        """See `Repository`."""
        if not self._root.is_dir():
            raise RepositoryInvalid(f"{self._root} is no folder: expected an artifact folder")
        return self._write_index()

    def _write_index(self, *known: Entries) -> Entries:
        """Write the index, and return it. The hashes of versions that are not in `known` are computed."""
        with unwritable_as_artifact_error(self._root), staging_folder(self._root) as staging:
            complete = {
                name: {
                    version: next(filter(None, (_known(each, name, version, entry) for each in known)), None)
                    or self.complete(VersionName(name, version), entry)
                    for version, entry in found.items()
                }
                for name, found in self.entries().items()
            }
            (staging / INDEX_NAME).write_bytes(render_index(complete))
            (staging / INDEX_NAME).chmod(0o644)
            (staging / INDEX_NAME).replace(self._root / INDEX_NAME)
        return complete


def _known(entries: Entries, name: str, version: int, entry: VersionEntry) -> VersionEntry | None:
    """Return the entry of a version in `entries` if the version has no signature, and its size is that in `entry`.

    All signatures have about the same size, so the size does not say whether a signature is the same.
    """
    known = entries.get(name, {}).get(version)
    if known is None or known.model.bytes != entry.model.bytes:
        return None
    return known if known.signature is None and entry.signature is None else None


class RemoteRepository:
    """A remote repository. After each copy into it, it has an index.

    Args:
        location: the place of the repository.
        storage: its files; by default, those at `location`.
    """

    def __init__(self, location: Location, storage: Storage | None = None) -> None:
        self._location = location
        self._storage = storage or open_storage(location, REQUEST_ATTEMPTS)

    def entries(self) -> Entries:
        """See `Repository`."""
        try:
            return parse_index(self._storage.read(INDEX_NAME), str(self._location))
        except RepositoryFileMissing:
            return entries_of(self._storage.list_files())

    def complete(self, name: VersionName, entry: VersionEntry) -> VersionEntry:
        """See `Repository`. Files without a hash in the index are downloaded, to compute their hashes."""
        if entry.model.sha256 and (entry.signature is None or entry.signature.sha256):
            return entry
        with _staging() as staging:
            self.fetch(name, entry, staging)
            return entry_of_folder(staging)

    def fetch(self, name: VersionName, entry: VersionEntry, staging: Path) -> None:
        """See `Repository`."""
        files = zip(name.files, (FILE_NAME, SIGNATURE_NAME), (entry.model, entry.signature), strict=True)
        for path, file, expected in files:
            if expected is None:
                continue
            target = staging / file
            self._storage.download(path, target, expected.bytes, lambda: False)
            found = sha256_of(target)
            if expected.sha256 not in (None, found):
                raise RepositoryCorrupt(
                    f"{self._location}/{path} has the SHA-256 {found}, and {INDEX_NAME} names {expected.sha256}: the "
                    "file was altered or damaged after it was pushed"
                )

    def store(self, name: VersionName, staging: Path, only_signature: bool) -> None:
        """See `Repository`. The signature of a new version comes first, so that no reader finds the version unsigned.

        If another push has written a signature, it is replaced only after the repository is known to have our artifact.
        """
        model, signature = name.files
        is_signed = (staging / SIGNATURE_NAME).exists()
        is_uploaded = False
        if not only_signature:
            if not is_signed and self._storage.tag(model) is None and self._storage.tag(signature) is not None:
                raise CopyConflict(
                    f"the destination has a signature of {name} from an unfinished push, and this {name} has none: "
                    f"sign it with elbo sign {name.name}, and push it again"
                )
            if is_signed and self._storage.tag(model) is None:
                with suppress(RepositoryConflict):
                    self._storage.upload(staging / SIGNATURE_NAME, signature, is_new=True)
                    is_uploaded = True
            try:
                self._storage.upload(staging / FILE_NAME, model, is_new=True)
            except RepositoryConflict:
                with _staging() as downloaded:
                    self._storage.download(model, downloaded / FILE_NAME, MAX_FILE_BYTES, lambda: False)
                    _require_same(name, sha256_of(downloaded / FILE_NAME), sha256_of(staging / FILE_NAME))
        if is_signed and not is_uploaded:
            self._storage.upload(staging / SIGNATURE_NAME, signature, is_new=False)

    def write_index(self, added: Entries) -> None:
        """See `Repository`. If another process writes the index at the same time, its versions are kept, too."""
        for _ in range(MAX_TRIES):
            tag = self._storage.tag(INDEX_NAME)
            found = self._with_hashes(added)
            for name, numbers in self._with_signatures(added).items():
                found[name] = {**found.get(name, {}), **numbers}
            try:
                self._storage.write(INDEX_NAME, render_index(found), tag)
            except RepositoryConflict:
                continue
            written = parse_index(self._storage.read(INDEX_NAME), str(self._location))
            if _contains(written, self._with_signatures(added)):
                return
        raise RepositoryConflict(
            f"cannot write {INDEX_NAME} of {self._location}, because other processes replaced it {MAX_TRIES} times: "
            "the files of the versions are copied, but servers do not see them yet; run the command again"
        )

    def _with_signatures(self, added: Entries) -> Entries:
        """Return `added` with the signatures that the repository has now: another push may have replaced them."""
        return {
            name: {
                version: entry.model_copy(update={"signature": self._signature_of(VersionName(name, version))})
                for version, entry in numbers.items()
            }
            for name, numbers in added.items()
        }

    def _signature_of(self, name: VersionName) -> FileEntry | None:
        _, path = name.files
        with _staging() as staging:
            try:
                self._storage.download(path, staging / SIGNATURE_NAME, MAX_SIGNATURE_BYTES, lambda: False)
            except RepositoryFileMissing:
                return None
            return FileEntry(
                bytes=(staging / SIGNATURE_NAME).stat().st_size, sha256=sha256_of(staging / SIGNATURE_NAME)
            )

    def _with_hashes(self, added: Entries) -> Entries:
        """Return the versions of the repository, with hashes. Those in `added` are left out: they have hashes."""
        return {
            name: {
                version: self.complete(VersionName(name, version), entry)
                for version, entry in numbers.items()
                if version not in added.get(name, {})
            }
            for name, numbers in self.entries().items()
        }

    def rewrite_index(self) -> Entries:
        """See `Repository`. Every file is downloaded once.

        Raises:
            RepositoryConflict: another process has written the index since this method began to list the files.
        """
        tag = self._storage.tag(INDEX_NAME)
        found = entries_of(self._storage.list_files())
        complete = {
            name: {version: self.complete(VersionName(name, version), entry) for version, entry in numbers.items()}
            for name, numbers in found.items()
        }
        self._storage.write(INDEX_NAME, render_index(complete), tag)
        return complete


def copy_versions(
    source: Repository,
    destination: Repository,
    references: Sequence[str] = (),
    keys: TrustedKeys | None = None,
    report: Callable[[Copied], None] = lambda _copied: None,
) -> list[Copied]:
    """Copy versions from `source` to `destination`, unless the destination has them.

    Args:
        source: has the versions.
        destination: gets the versions.
        references: names (the newest version) or name@version; by default, the newest version of every model.
        keys: one of these keys must have signed each version; None: no signature is needed.
        report: called after each version.

    Raises:
        ElboError: a version does not exist, is damaged, untrusted, or differs from that of the destination; or a
            repository cannot be read or written. The versions before it have been copied.
    """
    available = source.entries()
    existing = destination.entries()
    done, added = [], Entries()
    try:
        for name in select(available, references):
            entry = available[name.name][name.version]
            there = existing.get(name.name, {}).get(name.version)
            copied, complete = _copy(source, destination, name, entry, there, keys)
            if complete != there:  # otherwise the index has it, perhaps by now with a signature of another process
                added.setdefault(name.name, {})[name.version] = complete
            done.append(copied)
            report(copied)
    finally:
        if added:
            destination.write_index(added)
    return done


def _copy(
    source: Repository,
    destination: Repository,
    name: VersionName,
    entry: VersionEntry,
    there: VersionEntry | None,
    keys: TrustedKeys | None,
) -> tuple[Copied, VersionEntry]:
    """Copy one version, whose entry in the destination is `there`. Return the result, and its new entry there."""
    if there is not None:
        ours, theirs = source.complete(name, entry), destination.complete(name, there)
        _require_same(name, theirs.model.sha256, ours.model.sha256)
        if ours.signature is None or ours.signature == theirs.signature:
            if keys is not None:
                with _staging() as staging:
                    destination.fetch(name, theirs, staging)
                    _verify(name, staging, keys)
            return Copied(name, ours.model.bytes, "present"), theirs
    with _staging() as staging:
        source.fetch(name, entry, staging)
        _verify(name, staging, keys)
        complete = entry_of_folder(staging)
        destination.store(name, staging, only_signature=there is not None)
        return Copied(name, complete.model.bytes, "copied" if there is None else "signature"), complete


def _require_same(name: VersionName, theirs: str | None, ours: str | None) -> None:
    """Raise CopyConflict if the artifact of the destination has another hash than ours."""
    if ours != theirs:
        raise CopyConflict(
            f"the destination has another {name}, with the SHA-256 {theirs}, expected {ours}. A version never changes: "
            "pull the versions of the destination first, so that the next model that you train gets a new number. If "
            "elbo pull does not find this version, an earlier push was interrupted: run elbo index on the destination"
        )


def _verify(name: VersionName, folder: Path, keys: TrustedKeys | None) -> None:
    """Verify the seal of the artifact in `folder`, and, if `keys` is given, its signature. Raises ArtifactError."""
    content = read_sealed(folder / FILE_NAME)
    parse(content, folder / FILE_NAME)
    if keys is not None:
        keys.verify(content, folder / FILE_NAME, name.name, name.version)


def select(available: Entries, references: Sequence[str]) -> list[VersionName]:
    """Return the versions in `available` that `references` name: name (the newest version) or name@version.

    Without references, return the newest version of every model.

    Raises:
        ArtifactMissing: a model or a version does not exist.
    """
    if not references:
        return [VersionName(name, max(found)) for name, found in available.items() if found]
    selected = []
    for reference in references:
        name, at, version = reference.partition("@")
        found = available.get(name, {})
        if not found:
            models = ", ".join(available) or "none"
            raise ArtifactMissing(f"the source has no model {printable(name)!r} (available: {models})")
        if at and version not in map(str, found):
            numbers = ", ".join(map(str, found))
            raise ArtifactMissing(f"{name!r} has no version {printable(version)!r} in the source (has: {numbers})")
        selected.append(VersionName(name, int(version or max(found))))
    return selected


def write_index_of(place: str) -> int:
    """Write the index of the repository at `place`, and return the number of its versions.

    Raises:
        RepositoryInvalid: the repository can only be read, or is not a folder.
    """
    return sum(map(len, open_repository(place).rewrite_index().values()))


def _copy_synced(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())


def _contains(entries: Entries, added: Entries) -> bool:
    return all(
        entries.get(name, {}).get(version) == entry for name, found in added.items() for version, entry in found.items()
    )


@contextmanager
def _staging() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=STAGING_PREFIX) as folder:
        yield Path(folder)
