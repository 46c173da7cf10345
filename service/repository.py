"""The models that are served: found in the artifact folder, loaded and warmed away from the requests, swapped at once.

The folder is looked at every few seconds. What a request sees is one immutable `Catalogue`, so a swap never shows half
of itself. A version that cannot be loaded leaves the others serving; it is told once in the log, shown in /models, and
not tried again until its file changes.
"""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from models.artifact import load
from models.errors import ElboError
from models.manifest import FILE_NAME, Manifest, names, versions
from service import operations
from service.backends import WARM_ROUNDS, Backend, choose
from service.codec import png
from service.codec.rows import RowFormat
from service.errors import ModelNotFound, NotReady
from service.latents import Noise

log = logging.getLogger("elbo.repository")
WARM_ROWS = (1, 16)

Signature = tuple[int, int, int]  # of a file: inode, size, time of its last change


@dataclass(frozen=True, eq=False)
class Served:
    """One version of one model, loaded and warm."""

    name: str
    version: int
    manifest: Manifest
    backend: Backend
    load_seconds: float
    exhibits: Mapping[str, bytes] = field(default_factory=dict)  # what people look at
    headers: tuple[tuple[bytes, bytes], ...] = field(init=False)  # of every answer that it gives
    rows: RowFormat = field(init=False)
    latents: RowFormat = field(init=False)

    def __post_init__(self) -> None:
        features = self.manifest.features
        names, optional = [feature.name for feature in features], [feature.missing > 0 for feature in features]
        object.__setattr__(self, "headers", ((b"elbo-model", f"{self.name}@{self.version}".encode()),))
        object.__setattr__(self, "rows", RowFormat(self.manifest.shape, names, optional))
        object.__setattr__(self, "latents", RowFormat([self.manifest.latents]))

    @cached_property
    def pictures(self) -> bool:
        """Whether its outputs can be answered as image/png."""
        return png.is_picture(self.manifest.shape, self.manifest.pixel_range)


@dataclass(frozen=True)
class Failure:
    """A version that could not be loaded, and why."""

    name: str
    version: int
    code: str
    detail: str


@dataclass(frozen=True)
class Catalogue:
    """What is served at one moment: versions by model name, ascending; and what is not, though it is there."""

    models: Mapping[str, Mapping[int, Served]] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    default: str | None = None

    def find(self, reference: str | None) -> Served:
        """The model that `name` (its newest version) or `name@version` means, or the default. Raises ModelNotFound."""
        if self.default is None:
            raise NotReady(
                "no model is served yet",
                hint="publish one with `elbo demo` or `elbo train`: it is found without a restart",
            )
        name, _, version = (reference if reference is not None else self.default).partition("@")
        present = self.models.get(name, {})
        if present and not version:
            return present[max(present)]
        for number, served in present.items():
            if str(number) == version:
                return served
        listed = ", ".join(f"{name}@{number}" for name, numbers in self.models.items() for number in numbers)
        raise ModelNotFound(
            f"{reference} is not served", expected=f"one of {listed}", got=reference, hint="GET /models tells them all"
        )


@dataclass
class _Known:
    """What became of one version's file."""

    signature: Signature
    served: Served | None
    failure: Failure | None


class Repository:
    """Keeps `catalogue` true to the folder.

    Args:
        root: folder of artifacts.
        device: "cpu" or "cuda".
        default: name of the model that answers when none is named, if it is served.
        keep_versions: newest versions of each model that stay loaded.
        backend: "auto", "torchscript" or "onnx", see `service.backends.choose`.
        threads: for one batch.
    """

    def __init__(
        self, root: Path, device: str, default: str, keep_versions: int, backend: str = "auto", threads: int = 1
    ) -> None:
        self._root = root
        self._device = device
        self._default = default
        self._keep = keep_versions
        self._backend = backend
        self._threads = threads
        self._known: dict[tuple[str, int], _Known] = {}
        self.catalogue = Catalogue()

    async def watch(self, every_seconds: float) -> None:
        """Refresh for ever."""
        while True:
            await asyncio.sleep(every_seconds)
            try:
                await asyncio.to_thread(self.refresh)
            except OSError as error:
                log.warning("cannot look at %s: %s", self._root, error)

    def refresh(self) -> None:
        """Look at the folder once: load what is new, drop what is gone, show the result. Not for the event loop."""
        models = {}
        known: dict[tuple[str, int], _Known] = {}
        for name in names(self._root):
            served = self._newest(name, known)
            if served:
                models[name] = served
        self._known = known
        failures = tuple(entry.failure for entry in known.values() if entry.failure)
        default = self._default if self._default in models else next(iter(models), None)
        before, self.catalogue = self.catalogue, Catalogue(models, failures, default)
        _tell_changes(before, self.catalogue)

    def _newest(self, name: str, known: dict[tuple[str, int], _Known]) -> dict[int, Served]:
        """The newest versions of `name` that load, at most as many as are kept, ascending; notes each in `known`."""
        served: dict[int, Served] = {}
        for version in reversed(versions(self._root, name)):
            if len(served) == self._keep:
                break
            with suppress(FileNotFoundError):  # removed since it was listed
                entry = known[name, version] = self._examine(name, version)
                if entry.served:
                    served[version] = entry.served
        return dict(sorted(served.items()))

    def _examine(self, name: str, version: int) -> _Known:
        path = self._root / name / str(version) / FILE_NAME
        status = path.stat()
        signature = (status.st_ino, status.st_size, status.st_mtime_ns)
        before = self._known.get((name, version))
        if before and before.signature == signature:
            return before
        try:
            return _Known(signature, self._load(name, version, path), None)
        except Exception as error:
            expected = isinstance(error, ElboError)
            log.error("%s@%d cannot be served: %s", name, version, error, exc_info=not expected)
            code = error.code if isinstance(error, ElboError) else "load_failed"
            failure = Failure(name, version, code, str(error).splitlines()[0] if str(error) else type(error).__name__)
            return _Known(signature, before.served if before else None, failure)

    def _load(self, name: str, version: int, path: Path) -> Served:
        started = perf_counter()
        artifact = load(path, self._device)
        backend = choose(artifact, self._backend, self._threads)
        seconds = perf_counter() - started
        served = Served(name, version, artifact.manifest, backend, seconds, artifact.exhibits)
        _warm(served)
        return served


def _tell_changes(before: Catalogue, after: Catalogue) -> None:
    old, new = (
        {served for numbers in moment.models.values() for served in numbers.values()} for moment in (before, after)
    )
    for served in sorted(new - old, key=lambda served: (served.name, served.version)):
        told = served.name, served.version, served.backend.name, served.backend.reason, served.load_seconds
        log.info("serving %s@%d with %s (%s), loaded in %.2f s", *told)
    for served in sorted(old - new, key=lambda served: (served.name, served.version)):
        log.info("no longer serving %s@%d", served.name, served.version)


def _warm(served: Served) -> None:
    """Run every operation often enough that the first request meets optimised code."""
    manifest = served.manifest
    median = np.array([[feature.median for feature in manifest.features]], np.float32)
    noise, run = Noise(), served.backend.run
    for rows in WARM_ROWS * WARM_ROUNDS:
        x, z = median.repeat(rows, axis=0), noise.draw(0, rows, manifest.latents)
        for operation in (operations.ENCODE, operations.reconstruct(served.rows.gaps), operations.anomaly(0.05)):
            run(operation, (x,))
        run(operations.SAMPLE, z)
        (outputs,) = run(operations.DECODE, z[:1])
    if served.pictures:
        assert manifest.pixel_range is not None
        png.dumps(outputs, manifest.shape, manifest.pixel_range)  # imports Pillow, which takes 0.2 s


def describe(served: Served) -> dict[str, Any]:
    """What /models tells of a version: everything a client needs to know before it asks."""
    manifest = served.manifest
    return {
        "name": served.name,
        "version": served.version,
        "kind": manifest.kind,
        "created": manifest.created,
        "shape": manifest.shape,
        "width": manifest.width,
        "latents": manifest.latents,
        "parts": manifest.parts,
        "pixel_range": manifest.pixel_range,
        "pictures": served.pictures,
        "exhibits": [name.partition(".")[0] for name in served.exhibits],
        "metrics": manifest.metrics,
        "calibration": manifest.calibration.model_dump(),
        "device": str(served.backend.device),
        "backend": {"name": served.backend.name, "reason": served.backend.reason},
        "load_seconds": round(served.load_seconds, 3),
    }
