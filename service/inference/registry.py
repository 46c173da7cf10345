"""The registry of served models: loads new artifacts from the artifact folder, and drops removed ones.

The folder is polled every few seconds, outside the event loop. Requests read an immutable `Catalogue`, and each poll
replaces it by a new one. A version that fails to load does not affect other versions. The failure is logged once and
listed in /models. The file is not loaded again until it changes.
"""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from models.errors import ElboError
from models.manifest import FILE_NAME, names, versions
from service.errors import ModelNotFound, NotReady
from service.inference.model_loader import ModelLoader
from service.inference.served_model import ServedModel

log = logging.getLogger("elbo.registry")

Signature = tuple[int, int, int]  # inode, size and modification time (nanoseconds) of a file


@dataclass(frozen=True)
class Failure:
    """A version that failed to load.

    Args:
        name: name of the model.
        version: version of the model.
        code: code of the error if it is an `ElboError`, otherwise "load_failed".
        detail: first line of the error's message.
    """

    name: str
    version: int
    code: str
    detail: str


@dataclass(frozen=True)
class Catalogue:
    """An immutable snapshot of the served models.

    Args:
        models: served models by name and version, with versions in ascending order.
        failures: versions that failed to load.
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
                hint="publish a model with `elbo demo` or `elbo train`: the server loads it without a restart",
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
        signature: the signature of the file when it was last loaded.
        served: the last model of this version that has loaded; None if none has loaded. If the present file failed to
            load, this model is from an older file.
        failure: why the present file failed to load; None if it has loaded.
    """

    signature: Signature
    served: ServedModel | None
    failure: Failure | None


class ModelRegistry:
    """Keeps `catalogue` up to date with the artifact folder.

    Args:
        root: the artifact folder.
        loader: loads artifacts.
        default_model: name of the default model; if it is not served, the first model by name is the default.
        keep_versions: how many of the newest versions of each model are served.
    """

    def __init__(self, root: Path, loader: ModelLoader, *, default_model: str, keep_versions: int) -> None:
        self._root = root
        self._loader = loader
        self._default_model = default_model
        self._keep_versions = keep_versions
        self._entries: dict[tuple[str, int], _Entry] = {}
        self.catalogue = Catalogue()

    async def poll(self) -> None:
        """Refresh the catalogue in a thread. If the folder cannot be read, log a warning and keep the old catalogue."""
        try:
            await asyncio.to_thread(self.refresh)
        except OSError as error:
            log.warning("failed to scan the artifact folder %s: %s", self._root, error)

    def refresh(self) -> None:
        """Scan the artifact folder: load new artifacts, drop removed ones, and replace the catalogue.

        The call blocks while models load: do not make it in the event loop.

        Raises:
            OSError: the folder cannot be read.
        """
        models = {}
        entries: dict[tuple[str, int], _Entry] = {}
        for name in names(self._root):
            served = self._load_newest(name, entries)
            if served:
                models[name] = served
        self._entries = entries
        failures = tuple(entry.failure for entry in entries.values() if entry.failure)
        default = self._default_model if self._default_model in models else next(iter(models), None)
        previous, self.catalogue = self.catalogue, Catalogue(models, failures, default)
        _log_changes(previous, self.catalogue)

    def _load_newest(self, name: str, entries: dict[tuple[str, int], _Entry]) -> dict[int, ServedModel]:
        """Return the newest `keep_versions` versions of `name` that load, in ascending order.

        The state of every version that this method tries is added to `entries`.
        """
        served: dict[int, ServedModel] = {}
        for version in reversed(versions(self._root, name)):
            if len(served) == self._keep_versions:
                break
            with suppress(FileNotFoundError):  # the file was removed after it was listed
                entry = entries[name, version] = self._load_if_changed(name, version)
                if entry.served:
                    served[version] = entry.served
        return dict(sorted(served.items()))

    def _load_if_changed(self, name: str, version: int) -> _Entry:
        path = self._root / name / str(version) / FILE_NAME
        status = path.stat()
        signature = (status.st_ino, status.st_size, status.st_mtime_ns)
        previous = self._entries.get((name, version))
        if previous and previous.signature == signature:
            return previous
        try:
            return _Entry(signature, self._loader.load(path, name, version), None)
        except Exception as error:
            is_expected = isinstance(error, ElboError)
            log.error("failed to load %s@%d: %s", name, version, error, exc_info=not is_expected)
            code = error.code if isinstance(error, ElboError) else "load_failed"
            detail = str(error).splitlines()[0] if str(error) else type(error).__name__
            return _Entry(signature, previous.served if previous else None, Failure(name, version, code, detail))


def _log_changes(before: Catalogue, after: Catalogue) -> None:
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


def _served_models(catalogue: Catalogue) -> set[ServedModel]:
    return {served for versions_of_model in catalogue.models.values() for served in versions_of_model.values()}
