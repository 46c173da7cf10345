"""One training run, from a table to a published artifact."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from models.manifest import Manifest
from models.pipeline import Pipeline
from training.config import KINDS, TrainConfig
from training.data.table import Table, split_rows
from training.errors import FitError
from training.evaluation.metrics import held_out_metrics, rival_metrics
from training.evaluation.model_selection import Candidate, compare
from training.fitting.checkpoint import CheckpointStore
from training.fitting.distributed import ProcessGroup
from training.fitting.pipeline import fit_pipeline
from training.fitting.prepared_data import PreparedData, prepare_data
from training.progress import Reporter, SilentReporter
from training.publishing.publish import publish
from training.reports.history import Recorder
from training.reports.run_report import write_run


def train(
    config: TrainConfig,
    table: Table,
    artifacts: Path,
    report: Reporter,
    runs: Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    tensorboard: bool = False,
    processes: ProcessGroup = ProcessGroup(),  # noqa: B008  # frozen
) -> Path:
    """Fit, judge, calibrate and publish; gives the path of the new artifact.

    Deterministic: the same table, configuration and versions give the same weights, however often the run was killed
    and resumed on the way. Raises DataError and FitError.

    Args:
        runs: where the run keeps its state while it trains, in a folder of its name, and its report when it is done, in
            a folder of its version in that; without it, it keeps none.
        resume: continue from that state.
        checkpoint_seconds: between two savings of it.
        tensorboard: write TensorBoard's files too.
        processes: those that train together; each calls this alike.
    """
    report = report if processes.is_first else SilentReporter()
    for note in table.notes:
        report.note(note)
    kinds = KINDS if config.model == "auto" else (config.model,)
    configs = [config.model_copy(update={"model": kind}) for kind in kinds]
    stores = [_checkpoint_store(each, table, runs, len(kinds) > 1, checkpoint_seconds) for each in configs]
    if resume:
        stores = _resumed(stores)
    with _one_thread():
        data = prepare_data(table, split_rows(len(table.x), config.seed, table.x.width), config.robust)
        candidates = [
            _candidate(each, data, report, store, tensorboard, processes)
            for each, store in zip(configs, stores, strict=True)
        ]
        path = _finished(candidates, stores, data, artifacts, report) if processes.is_first else None
        return processes.broadcast_path(path)


def _checkpoint_store(
    config: TrainConfig, table: Table, runs: Path | None, several: bool, seconds: float
) -> CheckpointStore | None:
    """Return where the run saves its checkpoints: in runs/<name>, or in a folder per kind if there are several."""
    if runs is None:
        return None
    folder = runs / config.name / config.model if several else runs / config.name
    identity = f"{config.model_dump_json()} {table.fingerprint} {torch.__version__}"
    return CheckpointStore(folder, hashlib.sha256(identity.encode()).hexdigest(), interval_seconds=seconds)


def _resumed(stores: Sequence[CheckpointStore | None]) -> list[CheckpointStore | None]:
    """Return the stores, set to resume where there is a checkpoint. Raise FitError if there is none at all."""
    if not any(store and store.exists() for store in stores):
        path = next((store.path for store in stores if store), "a checkpoint")
        raise FitError(f"nothing to resume: {path} does not exist; train without --resume")
    return [store and replace(store, resume=store.exists()) for store in stores]


def _candidate(
    config: TrainConfig,
    data: PreparedData,
    report: Reporter,
    checkpoints: CheckpointStore | None,
    tensorboard: bool,
    processes: ProcessGroup,
) -> Candidate:
    """A model of one kind, fitted and judged."""
    recorded = checkpoints is not None and processes.is_first
    folder = checkpoints.folder if checkpoints and recorded else None
    recorder = Recorder(report, folder, bool(checkpoints and checkpoints.resume), tensorboard and recorded)
    pipeline = fit_pipeline(config, data, recorder, checkpoints=checkpoints, processes=processes)
    rival = data.pca(pipeline.scaling, pipeline.prior.means.shape[1])
    centre = data.moments.mean.float()
    metrics = held_out_metrics(pipeline, data.held_out, centre, None if config.model == "pca" else rival, config.seed)
    others = {}
    if rival is not None and config.model != "pca":
        others["pca"] = rival_metrics(rival.float(), pipeline.scaling, data.held_out)
    recorder.done(metrics)
    return Candidate(config, pipeline, metrics, others, recorder)


def _finished(
    candidates: Sequence[Candidate],
    stores: Sequence[CheckpointStore | None],
    data: PreparedData,
    artifacts: Path,
    report: Reporter,
) -> Path:
    """Publish the best candidate, write its report, and forget the state of the run."""
    chosen, comparison = compare(candidates, data, report)
    path, manifest = publish(chosen, comparison, data, artifacts, report)
    for candidate, store in zip(candidates, stores, strict=True):
        if store is None:
            continue
        store.remove()
        folder = (store.folder.parent if len(candidates) > 1 else store.folder) / path.parent.name
        candidate.recorder.move(folder if candidate is chosen else folder / candidate.config.model)
        if candidate is chosen:
            notes = [*data.table.notes, *candidate.recorder.notes]
            _report(folder, manifest, candidate.pipeline, data, notes, report)
    return path


def _report(
    folder: Path, manifest: Manifest, pipeline: Pipeline, data: PreparedData, notes: list[str], report: Reporter
) -> None:
    """The card and the pictures, in `folder`, whose name is the version."""
    table, labels = data.table, data.table.labels
    shown = None if labels is None else labels[data.split.held_out]
    version = int(folder.name)
    write_run(folder, manifest, version, pipeline, data.held_out, shown, table.label_names, notes, report)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: as fast for networks of this size, and the sums do not depend on how many cores a machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
