"""Load an artifact, select its backend, and warm it up."""

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import torch

from models.artifact import Artifact, load, load_content, prepare_trials, record_profiles
from models.errors import ArtifactError, ArtifactMismatch
from models.manifest import DIGEST_LENGTH, read_sealed
from models.signatures import TrustedKeys, identify
from models.trial import Verdict
from service.codec import png
from service.inference import operations
from service.inference.backend_selection import BACKENDS, DECISIONS, Selection, select_backend
from service.inference.backends import OnnxBackend, TorchScriptBackend, is_out_of_memory
from service.inference.latency import LatencyEstimate
from service.inference.sampling import NoiseSource
from service.inference.served_model import ServedModel
from service.inference.trial import TrialClient
from service.shared_memory import SharedCounters, SharedDecisions

log = logging.getLogger("elbo.registry")
COMPILED_ROWS = {  # the batches of the warm-up that let TorchScript compile, by the type of the device
    "cpu": (1,),  # without profiles, TorchScript compiles a method once, at its first call
    "cuda": (1, 16) * 3,  # with profiles, it compiles during the second and third calls, too
}
MAX_WARM_UP_SECONDS = 5.0
MAX_TRIAL_SECONDS = 5.0  # a trial runs no batch that would take longer
TRIAL_GROWTH = 16  # each batch of a trial is 16 times as large as the batch before it


class ModelLoader:
    """Loads artifacts as models that are ready to answer requests.

    Args:
        device: "cpu" or "cuda".
        backend: "auto", "torchscript" or "onnx"; see `select_backend`.
        threads: the number of threads per batch.
        precision: "float32" or "bfloat16".
        max_batch_rows: maximum number of rows per batch.
        max_batch_bytes: maximum number of bytes per batch; each row counts as `ServedModel.row_bytes` bytes.
        decisions: the backend that workers of this server have already selected for a model, by the SHA-256 of the
            weights.
        trials: tries artifacts out in another process before this one loads them; None loads them at once.
    """

    def __init__(
        self,
        *,
        device: str = "cpu",
        backend: str = "auto",
        threads: int = 1,
        precision: str = "float32",
        max_batch_rows: int = 1024,
        max_batch_bytes: int = 64 * 2**20,
        decisions: SharedDecisions | None = None,
        trials: TrialClient | None = None,
    ) -> None:
        self._device = device
        self._backend = backend
        self._threads = threads
        self._precision = precision
        self._max_batch_rows = max_batch_rows
        self._max_batch_bytes = max_batch_bytes
        self._trials = trials
        self._decisions = decisions or SharedDecisions(SharedCounters(), DECISIONS, BACKENDS)

    def load(
        self, path: Path, name: str, version: int, keys: TrustedKeys | None = None, next_path: Path | None = None
    ) -> ServedModel:
        """Load the artifact at `path` as `name`@`version`, select its backend, and warm it up.

        Args:
            path: the artifact, `<name>/<version>/model.pt`.
            name: name of the model.
            version: version of the model.
            keys: one of these keys must have signed the artifact; None: no signature is needed.
            next_path: the artifact that is loaded next. The trial process tries it out while this one loads.

        Raises:
            ArtifactError: the artifact cannot be read or verified, or the requested backend cannot run it.
        """
        started = perf_counter()
        verdict: Verdict = self._trials.try_out(path, _verified_digest(path, keys)) if self._trials else {}
        if next_path:
            self.begin_trial(next_path, keys)
        record_profiles(self._device != "cpu")
        artifact = load(path, self._device, keys, verdict.get("digest"))
        selection = self._select_backend(artifact)
        loaded = perf_counter()
        served = ServedModel(
            name=name,
            version=version,
            manifest=artifact.manifest,
            selection=selection,
            load_seconds=loaded - started,
            exhibits=artifact.exhibits,
            signed_by=artifact.signed_by,
            baseline=artifact.baseline,
            course=artifact.course,
        )
        _ = served.silences  # raises ArtifactMismatch now, not when the first row comes
        if rows := verdict.get("rows"):
            served.backend.max_rows = min(served.backend.max_rows, rows)
            log.warning(
                "%s@%d: batches have at most %d rows, because the trial ran no larger batch", name, version, rows
            )
        self._warm_up(served)
        if served.has_png_output:
            assert served.manifest.pixel_range is not None
            row = np.zeros((1, served.manifest.width), np.float32)
            png.dumps(row, served.manifest.shape, served.manifest.pixel_range)  # imports Pillow, which takes 0.2 s
        return replace(served, warm_seconds=perf_counter() - loaded)

    def _select_backend(self, artifact: Artifact) -> Selection:
        """Select the same backend in all workers, so that all workers give the same outputs.

        Speed is measured only if no worker has selected a backend for these weights yet.
        """
        weights = artifact.manifest.weights_sha256
        decided = self._decisions.choice(weights) if self._backend == "auto" else None
        selection = select_backend(
            artifact, requested=decided or self._backend, threads=self._threads, precision=self._precision
        )
        self._decisions.record_choice(weights, selection.backend.name)
        if decided:
            return replace(selection, reason="selected when this server first loaded these weights")
        return selection

    def begin_trial(self, path: Path, keys: TrustedKeys | None) -> None:
        """Let the trial process try the artifact at `path` out. If it cannot, `load` reports the reason later."""
        if self._trials:
            with suppress(OSError, ArtifactError):
                self._trials.begin(path, _verified_digest(path, keys))

    def prepare_trials(self) -> None:
        """Prepare this process, from which the trial process is forked. See `models.artifact.prepare_trials`."""
        prepare_trials()

    def try_out(self, content: bytes, path: Path) -> Verdict:
        """Load the artifact in `content` on the CPU, and run all operations on both backends. See `TrialClient`.

        Returns:
            `rows`: the largest batch that was tried and fits in memory; None if batches of all sizes do.

        Raises:
            ArtifactError: the artifact cannot be verified or run.
        """
        torch.set_num_threads(1)  # no other thread runs in a process that was forked
        record_profiles(False)
        artifact = load_content(content, path)
        torchscript = TorchScriptBackend.name
        requested = torchscript if self._backend == torchscript else OnnxBackend.name
        try:
            backend = select_backend(artifact, requested=requested).backend
        except ArtifactMismatch:  # the server serves the model with TorchScript, or reports that the twin is wrong
            backend = select_backend(artifact, requested=torchscript).backend
        backends = [TorchScriptBackend(artifact.module, artifact.device, backend.calibration), backend]
        served = [ServedModel("", 0, artifact.manifest, Selection(one, ""), 0.0) for one in backends]
        rows = min(map(self._try_batches, served))
        return {"rows": rows if rows < self._max_rows(served[0]) else None}

    def _try_batches(self, served: ServedModel) -> int:
        """Run all operations on larger and larger batches. Return the rows of the largest batch that fits in memory.

        A batch that would take longer than MAX_TRIAL_SECONDS is not tried. It counts as one that does not fit, because
        its memory is unknown; smaller batches hardly slow down a model that needs so long. Only processor time counts,
        so that a busy machine does not make the batches smaller.
        """
        max_rows, rows, fitting = self._max_rows(served), 1, 0
        while True:
            started = process_time()
            try:
                _run_operations(served, rows, completes=True)
            except (RuntimeError, MemoryError) as error:
                if not fitting or not is_out_of_memory(error):
                    raise
                return fitting
            fitting = rows
            if rows == max_rows or (process_time() - started) * TRIAL_GROWTH > MAX_TRIAL_SECONDS:
                return rows
            rows = min(rows * TRIAL_GROWTH, max_rows)

    def _max_rows(self, served: ServedModel) -> int:
        """Return the maximum number of rows per batch."""
        limits = (self._max_batch_rows, self._max_batch_bytes // served.row_bytes, served.backend.max_rows)
        return max(1, min(limits))

    def _warm_up(self, served: ServedModel) -> None:
        """Run all operations until TorchScript has compiled them, then run larger and larger batches.

        The batches grow until one has the maximum size or does not fit in memory, or until the warm-up has taken
        MAX_WARM_UP_SECONDS. The latency of every run after the compilation is recorded for the batcher.

        The operations that complete rows are not run. They have no latency, so the batcher runs them on the inference
        thread, where their compilation (25 ms) stops nothing else.
        """
        torch.set_num_threads(self._threads)
        end = perf_counter() + MAX_WARM_UP_SECONDS
        for rows in COMPILED_ROWS[served.backend.device.type]:
            _run_operations(served, rows, completes=False)
        served.backend.latency = LatencyEstimate()  # without the time of the compilation
        max_rows = self._max_rows(served)
        rows = 1
        while perf_counter() < end:
            try:
                _run_operations(served, min(rows, max_rows), completes=False)
            except Exception as error:
                if rows == 1 or not is_out_of_memory(error):
                    raise
                served.backend.limit_rows(rows)
                return
            if rows >= max_rows:
                return
            rows = 2 * rows + 1  # the largest size with one more binary digit; see LatencyEstimate
        log.info(
            "warmed up %s@%d with batches of at most %d rows: the warm-up has reached its limit of %g s",
            served.name,
            served.version,
            rows // 2,
            MAX_WARM_UP_SECONDS,
        )


def _verified_digest(path: Path, keys: TrustedKeys | None) -> str | None:
    """Return the digest of the artifact at `path` after its signature was verified; None if no signature is needed.

    Nothing unsigned runs, not even in a trial, and not even if the file is replaced after its signature was verified.
    """
    if keys is None:
        return None
    content = read_sealed(path)
    keys.verify(content, path, *identify(path))
    return content[-DIGEST_LENGTH:].decode()


def _run_operations(served: ServedModel, rows: int, completes: bool) -> None:
    """Run all operations on a batch of `rows` rows, and record their latencies.

    If `completes`, also run the operations that complete rows. They take about a millisecond per row, and 25 ms when
    they run for the first time.
    """
    manifest, backend = served.manifest, served.backend
    medians = np.array([[feature.median for feature in manifest.features]], np.float32)
    x = medians.repeat(rows, axis=0)
    if manifest.window is not None:
        x = np.repeat(x[:, None], manifest.window.rows, axis=1)
    noise, choice = NoiseSource().draw(0, rows, max(1, manifest.latents))
    if served.conditions is not None:
        x, noise = served.conditions.join(x), served.conditions.join(noise)
    inputs_by_operation = {
        operations.ENCODE: (x,),
        operations.reconstruct(served.row_schema.allows_missing): (x,),
        operations.anomaly(0.05): (x,),
        operations.SAMPLE: (noise, choice),
        operations.DECODE: (noise,),
    }
    if manifest.only_reconstructs:
        for operation in (operations.ENCODE, operations.SAMPLE, operations.DECODE):
            del inputs_by_operation[operation]
    elif served.has_observation_noise:
        row_noise = NoiseSource().draw_rows(0, rows, manifest.width)
        inputs_by_operation = {operations.SAMPLE_ROWS: (noise, choice, row_noise), **inputs_by_operation}
    completes &= manifest.window is None and rows <= operations.imputed_rows(manifest.width)
    gaps = np.where(np.arange(manifest.width) % 2, x[..., : manifest.width], np.float32(np.nan))
    if completes and served.scores_gaps and operations.SCORE.for_gaps is not None:
        inputs_by_operation[operations.SCORE.for_gaps] = (gaps,)
    if completes and served.completes_rows:
        twice = NoiseSource().draw_rows(0, rows, 2 * manifest.width)
        inputs_by_operation |= {operations.IMPUTE: (gaps,), operations.COMPLETE: (noise, choice, twice, gaps)}
    for operation, inputs in inputs_by_operation.items():
        started = backend.clock()
        backend.run(operation, inputs)
        backend.latency.record(operation.name, rows, backend.clock() - started)
