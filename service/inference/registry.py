"""The models that are served: found in the artifact folder, loaded and warmed away from the requests, swapped at once.

The folder is looked at every few seconds. What a request sees is one immutable `Catalogue`, so a swap never shows half
of itself. A version that cannot be loaded leaves the others serving; it is told once in the log, shown in /models, and
not tried again until its file changes.
"""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from models.artifact import Artifact, load
from models.errors import ElboError
from models.manifest import FILE_NAME, Manifest, names, versions
from service.codec import png
from service.codec.feature_names import FeatureSelectors
from service.codec.row_schema import RowSchema
from service.errors import ModelNotFound, NotReady
from service.inference import operations
from service.inference.backends import BACKENDS, WARM_ROUNDS, Array, Backend, choose, is_out_of_memory
from service.inference.sampling import NoiseSource
from service.shared_memory import SharedCounters, SharedDecisions

log = logging.getLogger("elbo.registry")
WARM_ROWS = (1, 16)
WARM_SECONDS = 5.0

Signature = tuple[int, int, int]  # of a file: inode, size, time of its last change


@dataclass(frozen=True, eq=False)
class ServedModel:
    """One version of one model, loaded and warm."""

    name: str
    version: int
    manifest: Manifest
    backend: Backend
    load_seconds: float  # to load, verify, and choose the backend
    warm_seconds: float = 0.0
    exhibits: Mapping[str, bytes] = field(default_factory=dict)  # what people look at
    headers: tuple[tuple[bytes, bytes], ...] = field(init=False)  # of every answer that it gives
    who: tuple[str, str] = field(init=False)  # its labels in metrics
    row_schema: RowSchema = field(init=False)
    latent_schema: RowSchema = field(init=False)
    row_bytes: int = field(init=False)  # where a row is widest

    def __post_init__(self) -> None:
        features = self.manifest.features
        names, optional = [feature.name for feature in features], [feature.missing > 0 for feature in features]
        object.__setattr__(self, "headers", ((b"elbo-model", f"{self.name}@{self.version}".encode()),))
        object.__setattr__(self, "who", (self.name, str(self.version)))
        medians = [feature.median for feature in features]
        object.__setattr__(self, "row_schema", RowSchema(self.manifest.shape, names, optional, medians))
        object.__setattr__(self, "latent_schema", RowSchema([self.manifest.latents]))
        object.__setattr__(self, "row_bytes", 4 * max(self.row_schema.width, self.latent_schema.width))

    @cached_property
    def selectors(self) -> FeatureSelectors:
        """Which feature a measurement means, by its name and labels."""
        return FeatureSelectors({name: name for name in self.row_schema.names})

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

    models: Mapping[str, Mapping[int, ServedModel]] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    default: str | None = None

    def find(self, reference: str | None) -> ServedModel:
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
    served: ServedModel | None
    failure: Failure | None


class ModelRegistry:
    """Keeps `catalogue` true to the folder.

    Args:
        root: folder of artifacts.
        device: "cpu" or "cuda".
        default: name of the model that answers when none is named, if it is served.
        keep_versions: newest versions of each model that stay loaded.
        backend: "auto", "torchscript" or "onnx", see `service.inference.backends.choose`.
        threads: for one batch.
        precision: float32 or bfloat16.
        max_batch_rows, max_batch_bytes: of the largest batch that the batcher will run.
        votes: on the backend, with the other processes that serve the same.
    """

    def __init__(
        self,
        root: Path,
        device: str,
        default: str,
        keep_versions: int,
        backend: str = "auto",
        threads: int = 1,
        precision: str = "float32",
        max_batch_rows: int = 1024,
        max_batch_bytes: int = 64 * 2**20,
        votes: SharedDecisions | None = None,
    ) -> None:
        self._root = root
        self._device = device
        self._default = default
        self._keep = keep_versions
        self._backend = backend
        self._threads = threads
        self._precision = precision
        self._max_batch_rows = max_batch_rows
        self._max_batch_bytes = max_batch_bytes
        self._votes = votes or SharedDecisions(SharedCounters(), "backend", BACKENDS)
        self._known: dict[tuple[str, int], _Known] = {}
        self.catalogue = Catalogue()

    async def look(self) -> None:
        """Refresh, aside from the event loop. A folder that cannot be read, as it may be for a while, is told."""
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

    def _newest(self, name: str, known: dict[tuple[str, int], _Known]) -> dict[int, ServedModel]:
        """The newest versions of `name` that load, at most as many as are kept, ascending; notes each in `known`."""
        served: dict[int, ServedModel] = {}
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

    def _choose(self, artifact: Artifact) -> Backend:
        """What is measured faster; as another worker has chosen, where one has, so that all give the same answers."""
        which = artifact.manifest.weights_sha256
        decided = self._votes.choice(which) if self._backend == "auto" else None
        backend = choose(artifact, decided or self._backend, self._threads, self._precision)
        self._votes.record_choice(which, backend.name)
        return replace(backend, reason="chosen when these weights were first loaded here") if decided else backend

    def _load(self, name: str, version: int, path: Path) -> ServedModel:
        started = perf_counter()
        artifact = load(path, self._device)
        backend = self._choose(artifact)
        loaded = perf_counter()
        served = ServedModel(name, version, artifact.manifest, backend, loaded - started, exhibits=artifact.exhibits)
        most = max(1, min(self._max_batch_rows, self._max_batch_bytes // served.row_bytes))
        _warm(served, self._threads, most)
        return replace(served, warm_seconds=perf_counter() - loaded)


def _tell_changes(before: Catalogue, after: Catalogue) -> None:
    old, new = (
        {served for numbers in moment.models.values() for served in numbers.values()} for moment in (before, after)
    )
    for served in sorted(new - old, key=lambda served: (served.name, served.version)):
        told = served.name, served.version, served.backend.name, served.backend.reason, served.load_seconds
        log.info("serving %s@%d with %s (%s), loaded in %.2f s", *told)
    for served in sorted(old - new, key=lambda served: (served.name, served.version)):
        log.info("no longer serving %s@%d", served.name, served.version)


def _warm(served: ServedModel, threads: int, most_rows: int) -> None:
    """Run every operation often enough, and at every size of batch, that the first request meets optimised code.

    It teaches the batcher how long each takes. Sizes that would take too long in all, or more memory than there is, are
    left out.
    """
    torch.set_num_threads(threads)
    end = perf_counter() + WARM_SECONDS
    for rows in WARM_ROWS * WARM_ROUNDS:
        outputs = _run_all(served, rows)
    if served.pictures:
        assert served.manifest.pixel_range is not None
        png.dumps(outputs[:1], served.manifest.shape, served.manifest.pixel_range)  # imports Pillow, which takes 0.2 s
    rows = 1
    while perf_counter() < end:
        try:
            _run_all(served, min(rows, most_rows))
        except Exception as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
            served.backend.too_many(rows)
            return
        if rows >= most_rows:
            return
        rows = 2 * rows + 1  # the largest of each size
    log.info("%s@%d is not warmed beyond %d rows at once: it took too long", served.name, served.version, rows // 2)


def _run_all(served: ServedModel, rows: int) -> Array:
    """Every operation on a batch of `rows`; gives decoded rows."""
    manifest, backend = served.manifest, served.backend
    median = np.array([[feature.median for feature in manifest.features]], np.float32)
    x, noise = median.repeat(rows, axis=0), NoiseSource().draw(0, rows, manifest.latents)
    asked = {
        operations.ENCODE: (x,),
        operations.reconstruct(served.row_schema.allows_missing): (x,),
        operations.anomaly(0.05): (x,),
        operations.SAMPLE: noise,
        operations.DECODE: noise[:1],
    }
    for operation, inputs in asked.items():
        started = backend.clock()
        outputs = backend.run(operation, inputs)
        backend.pace.learn(operation.name, rows, backend.clock() - started)
    return outputs[0]


def describe(served: ServedModel) -> dict[str, Any]:
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
        "backend": {
            "name": served.backend.name,
            "reason": served.backend.reason,
            "precision": served.backend.precision,
            "errors": dict(served.backend.errors),
        },
        "load_seconds": round(served.load_seconds, 3),
        "warm_seconds": round(served.warm_seconds, 3),
    }
