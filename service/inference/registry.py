"""The registry of served models: loads new artifacts from the artifact folder, and drops removed ones.

The folder is polled every few seconds, outside the event loop. Requests read an immutable `Catalogue`, and each poll
replaces it by a new one. A version that fails to load does not affect other versions. The failure is logged once and
listed in /models. The version is loaded again when its file, its signature, the rights of its file or the trusted keys
change.

A file or folder that the operating system refuses to read is a failure too. It is read again at every poll, because the
repair of a disk or of a network does not change the file. Meanwhile, what is already loaded stays served.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from models.errors import ArtifactMissing, ArtifactUnreadable, ElboError, KeyInvalid
from models.manifest import FILE_NAME, folders, names, version_folder, versions
from models.signatures import SIGNATURE_NAME, TrustedKeys, TrustedKeySource, trusted_keys
from service.errors import ModelNotFound, NotReady
from service.freed_memory import return_freed_memory
from service.inference.model_loader import ModelLoader
from service.inference.served_model import ServedModel

log = logging.getLogger("elbo.registry")

MAX_LISTINGS = 5  # per poll, of the versions of a model that are removed while they load
LOAD_FAILED = "load_failed"  # code of a failure that is neither an ElboError nor an OSError
FolderId = tuple[int, int]  # device and inode of a folder


@dataclass(frozen=True)
class FileState:
    """What the operating system reports about the file of a version.

    Args:
        content: inode, size and modification time (nanoseconds). They change when the file is replaced or written to.
        rights: device, time of the last change (nanoseconds), mode and owner of the file, mode and owner of the folders
            of its version and its model, and the state of its signature. The time of the last change is new even
            if a program such as `cp -p` or `rsync -t` sets the modification time back.
    """

    content: tuple[int, ...]
    rights: tuple[int, ...]


@dataclass(frozen=True)
class Failure:
    """A version that failed to load, or a folder that cannot be read.

    Args:
        name: name of the model; None if the artifact folder itself cannot be read.
        version: version of the model; None if a folder cannot be read, so that its versions are unknown.
        code: code of the error if it is an `ElboError`; artifact_unreadable for an OSError; otherwise LOAD_FAILED.
        detail: first line of the error's message.
    """

    name: str | None
    version: int | None
    code: str
    detail: str

    def __str__(self) -> str:
        """Return the failure as one line for the log."""
        if self.name is None:
            return self.detail
        reference = self.name if self.version is None else f"{self.name}@{self.version}"
        return f"failed to load {reference}: {self.detail}"


@dataclass(frozen=True)
class Catalogue:
    """An immutable snapshot of the served models.

    Args:
        models: served models by name and version, with versions in ascending order.
        failures: versions that failed to load, and folders that cannot be read.
        default: name of the model that answers requests that name no model; None if no model is served.
    """

    models: Mapping[str, Mapping[int, ServedModel]] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    default: str | None = None

    def find(self, reference: str | None) -> ServedModel:
        """Return the model that `reference` names.

        A reference `name` means the newest version of that model, and `name@version` means that version. None means the
        newest version of the default model.

        Raises:
            NotReady: no model is served.
            ModelNotFound: `reference` names no served model.
        """
        if self.default is None:
            raise NotReady(
                "no model is served yet",
                hint="GET /models lists the reasons under failures"
                if self.failures
                else "publish a model with `elbo demo` or `elbo train`: the server loads it without a restart",
            )
        name, _, version = (reference if reference is not None else self.default).partition("@")
        present = self.models.get(name, {})
        if present and not version:
            return present[max(present)]
        for number, served in present.items():
            if str(number) == version:
                return served
        available = ", ".join(f"{name}@{number}" for name, numbers in self.models.items() for number in numbers)
        raise ModelNotFound(
            f"model {reference!r} is not served",
            expected=f"one of {available}",
            got=reference,
            hint="GET /models lists the served models",
        )


@dataclass(frozen=True)
class _Entry:
    """The state of one model version in the artifact folder.

    Args:
        state: the state of the file just before it was last loaded; None if the operating system refused to tell.
        keys: the keys that were trusted then; None if no signature is needed.
        served: the last model of this version that has loaded; None if none has loaded. If the present file failed to
            load, this model is from an older file.
        failure: why the present file failed to load; None if it has loaded.
        refused: whether the operating system refused to read the file. It is then read again at the next poll.
    """

    state: FileState | None
    keys: TrustedKeys | None
    served: ServedModel | None
    failure: Failure | None
    refused: bool = False

    def is_current(self, state: FileState, keys: TrustedKeys | None) -> bool:
        """Return whether loading the version again is unnecessary if its file is in `state` and `keys` are trusted."""
        if self.failure is None:
            return self.state is not None and self.state.content == state.content
        return (self.state, self.keys) == (state, keys) and not self.refused


class ModelRegistry:
    """Keeps `catalogue` up to date with the artifact folder.

    Args:
        root: the artifact folder.
        loader: loads artifacts.
        default_model: name of the default model; if it is not served, the first model by name is the default.
        keep_versions: how many of the newest versions of each model are served.
        keys: the keys of which one must have signed an artifact; None: no signature is needed.
        read_failures: returns why versions are missing from the folder, if it mirrors a remote repository.
    """

    def __init__(
        self,
        root: Path,
        loader: ModelLoader,
        *,
        default_model: str,
        keep_versions: int,
        keys: TrustedKeySource | None = None,
        read_failures: Callable[[], tuple[Failure, ...]] = tuple,
    ) -> None:
        self._root = root
        self._loader = loader
        self._default_model = default_model
        self._keep_versions = keep_versions
        self._keys = keys
        self._read_failures = read_failures
        self._entries: dict[tuple[str, int], _Entry] = {}
        self._next_path: Path | None = None  # the artifact that `refresh` will probably load next
        self._folder_id: FolderId | None = None  # of the artifact folder, when a model was last found in it
        self._thread = ThreadPoolExecutor(1, "registry")
        self.catalogue = Catalogue()

    async def poll(self) -> None:
        """Refresh the catalogue in the registry's own thread.

        The allocator (glibc) keeps up to 20 MiB for each thread that has loaded models, so all loads share one thread.
        """
        await asyncio.get_running_loop().run_in_executor(self._thread, self._refresh_and_trim)

    def _refresh_and_trim(self) -> None:
        before = _identities(self.catalogue)
        self.refresh()
        if _identities(self.catalogue) != before:
            return_freed_memory()

    def refresh(self) -> None:
        """Scan the artifact folder: load new artifacts, drop removed ones, and replace the catalogue.

        If the artifact folder is missing or cannot be read, the loaded models stay served. The call blocks while models
        load: do not make it in the event loop.
        """
        failures: tuple[Failure, ...] = (*self._read_keys(), *self._read_failures())
        scanned = self._scan()
        if isinstance(scanned, Failure):
            of_models = [failure for failure in self.catalogue.failures if failure.name is not None]
            models = {name: self._trusted_versions(name) for name in self.catalogue.models}
            self._publish(models, (*failures, scanned, *of_models))
            return
        models = {}
        entries: dict[tuple[str, int], _Entry] = {}
        later = list(scanned)
        for name, found in scanned.items():
            later.remove(name)
            self._next_path = self._first_new(later, scanned)
            if isinstance(found, Failure):
                failures = (*failures, found)
                entries |= {key: entry for key, entry in self._entries.items() if key[0] == name}
                models[name] = self._trusted_versions(name)
            else:
                models[name] = self._load_while_replaced(name, found, entries)
        self._entries = entries
        self._publish(models, (*failures, *(entry.failure for entry in entries.values() if entry.failure)))

    def _first_new(self, later: list[str], scanned: "Mapping[str, list[int] | Failure]") -> Path | None:
        """Find the first model in `later` whose newest version was not loaded yet. Return this version, or None."""
        for name in later:
            found = scanned[name]
            if not isinstance(found, Failure) and (name, found[-1]) not in self._entries:
                return version_folder(self._root, name, found[-1]) / FILE_NAME
        return None

    def _publish(self, models: Mapping[str, Mapping[int, ServedModel]], failures: tuple[Failure, ...]) -> None:
        """Replace the catalogue, and log what has changed. Models without versions are left out."""
        served = {name: numbers for name, numbers in models.items() if numbers}
        default = self._default_model if self._default_model in served else next(iter(served), None)
        previous, self.catalogue = self.catalogue, Catalogue(served, failures, default)
        _log_changes(previous, self.catalogue)

    def _read_keys(self) -> tuple[Failure, ...]:
        """Read the trusted keys again if their file has changed. If that fails, the keys stay as they are."""
        if self._keys is None:
            return ()
        try:
            self._keys.refresh()
        except KeyInvalid as error:
            return (Failure(None, None, error.code, f"{error}; the keys that were read before stay trusted"),)
        return ()

    def _is_trusted(self, served: ServedModel) -> bool:
        """Return whether a loaded model may be served: its key is still trusted, or no signature is needed."""
        return self._keys is None or served.signed_by in self._keys.keys.keys

    def _trusted_versions(self, name: str) -> dict[int, ServedModel]:
        """Return the loaded versions of `name` that may be served."""
        versions_of_model = self.catalogue.models.get(name, {})
        return {version: served for version, served in versions_of_model.items() if self._is_trusted(served)}

    def _scan(self) -> "dict[str, list[int] | Failure] | Failure":
        """Return the versions of each model, or a failure in place of the versions if the model's folder is unreadable.

        Return only a failure if the artifact folder is unreadable, missing, or another folder without any model, such
        as an empty mount point. Before the first model is found, a missing or empty folder is no failure.
        """
        try:
            status = self._root.stat()
            names = folders(self._root)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not self.catalogue.models:
                return {}
            self._folder_id = None
            return self._folder_failure(error.strerror or str(error))
        found: dict[str, list[int] | Failure] = {}
        for name in names:
            try:
                if numbers := versions(self._root, name):
                    found[name] = numbers
            except ArtifactUnreadable as error:
                found[name] = Failure(name, None, error.code, str(error))
        folder_id = status.st_dev, status.st_ino
        if not found and self.catalogue.models and folder_id != self._folder_id:
            return self._folder_failure("it was replaced by a folder without models")
        if found:
            self._folder_id = folder_id
        return found

    def _folder_failure(self, reason: str) -> Failure:
        stays = "; the loaded models stay served" if self.catalogue.models else ""
        detail = f"cannot read the artifact folder {self._root}: {reason}{stays}"
        return Failure(None, None, ArtifactUnreadable.code, detail)

    def _load_while_replaced(
        self, name: str, numbers: list[int], entries: dict[tuple[str, int], _Entry]
    ) -> dict[int, ServedModel]:
        """Call `_load_newest`, and again if all versions are removed while they load and newer ones take their place.

        Otherwise a worker that loads more slowly than versions come and go would serve no version of the model.
        """
        for _ in range(MAX_LISTINGS):
            found: dict[tuple[str, int], _Entry] = {}
            served = self._load_newest(name, numbers, found)
            if served:
                break
            try:
                listed = versions(self._root, name)
            except ArtifactUnreadable:
                break  # the next poll reports it
            if not listed or not set(numbers).isdisjoint(listed):
                break
            numbers = listed
        entries |= found
        return served

    def _load_newest(
        self, name: str, numbers: list[int], entries: dict[tuple[str, int], _Entry]
    ) -> dict[int, ServedModel]:
        """Return the newest `keep_versions` versions of `name` that load, in ascending order.

        Args:
            name: the name of the model.
            numbers: its versions in the artifact folder, ascending.
            entries: the state of every version that this method tries is added.
        """
        served: dict[int, ServedModel] = {}
        for version in reversed(numbers):
            if len(served) == self._keep_versions:
                break
            with suppress(FileNotFoundError):  # the file was removed after it was listed
                entry = entries[name, version] = self._load_if_changed(name, version)
                if entry.served:
                    served[version] = entry.served
        return dict(sorted(served.items()))

    def _load_if_changed(self, name: str, version: int) -> _Entry:
        path = version_folder(self._root, name, version) / FILE_NAME
        previous = self._entries.get((name, version))
        older = previous.served if previous and previous.served and self._is_trusted(previous.served) else None
        keys = None if self._keys is None else self._keys.keys
        state = None
        try:
            state = _file_state(path)
            if previous and previous.served is older and previous.is_current(state, keys):
                return previous
            return _Entry(state, keys, self._loader.load(path, name, version, keys, self._next_path), None)
        except FileNotFoundError:
            raise
        except Exception as error:
            refused = isinstance(error, OSError | ArtifactUnreadable | ArtifactMissing)
            entry = _Entry(state, keys, older, _failure(name, version, error), refused)
            if previous is None or (state, keys, entry.failure) != (previous.state, previous.keys, previous.failure):
                unexpected = not isinstance(error, OSError | ElboError)
                log.error("%s", entry.failure, exc_info=error if unexpected else None)
            return entry


def begin_first_trial(root: Path, loader: ModelLoader, trusted: str | None) -> None:
    """Let the trial process try out the model that a registry will load first, while the server is still starting.

    If that fails, the registry reports the reason when it loads the model.

    Args:
        root: the artifact folder.
        loader: a loader with a trial process.
        trusted: the value of ELBO_TRUSTED_KEYS.
    """
    with suppress(ElboError, OSError):
        for name in names(root)[:1]:
            newest = version_folder(root, name, versions(root, name)[-1]) / FILE_NAME
            loader.begin_trial(newest, trusted_keys(trusted))


def _file_state(path: Path) -> FileState:
    file, folders = path.stat(), (path.parent.stat(), path.parents[1].stat())
    rights = [number for each in (file, *folders) for number in (each.st_mode, each.st_uid, each.st_gid)]
    with suppress(OSError):
        signature = path.with_name(SIGNATURE_NAME).stat()
        rights += [signature.st_ino, signature.st_size, signature.st_ctime_ns]
    return FileState((file.st_ino, file.st_size, file.st_mtime_ns), (file.st_dev, file.st_ctime_ns, *rights))


def _failure(name: str, version: int, error: Exception) -> Failure:
    detail = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, ElboError):
        return Failure(name, version, error.code, detail)
    return Failure(name, version, ArtifactUnreadable.code if isinstance(error, OSError) else LOAD_FAILED, detail)


def _log_changes(before: Catalogue, after: Catalogue) -> None:
    for failure in after.failures:
        if failure.version is None and failure not in before.failures:  # `_load_if_changed` logs failed versions
            log.error("%s", failure)
    for failure in before.failures:
        if failure.version is None and failure not in after.failures:
            log.info("resolved: %s", failure)
    old, new = _served_models(before), _served_models(after)
    for served in sorted(new - old, key=lambda served: (served.name, served.version)):
        log.info(
            "serving %s@%d with %s (%s), loaded in %.2f s",
            served.name,
            served.version,
            served.backend.name,
            served.selection.reason,
            served.load_seconds,
        )
    for served in sorted(old - new, key=lambda served: (served.name, served.version)):
        log.info("no longer serving %s@%d", served.name, served.version)


def _identities(catalogue: Catalogue) -> set[int]:
    """Return the ids of the served models. Ids can be compared later, but do not keep a removed model in memory."""
    return {id(served) for served in _served_models(catalogue)}


def _served_models(catalogue: Catalogue) -> set[ServedModel]:
    return {served for versions_of_model in catalogue.models.values() for served in versions_of_model.values()}
