"""One training run, from a table to a published artifact: fit, select, publish, report."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from models.manifest import Manifest
from models.pipeline import Pipeline
from training.config import AUTO_KINDS, TrainConfig
from training.data.table import Table, split_rows
from training.errors import FitError
from training.evaluation.metrics import held_out_metrics, pca_metrics
from training.evaluation.model_selection import Candidate, compare
from training.fitting.checkpoint import CheckpointStore
from training.fitting.distributed import ProcessGroup
from training.fitting.pipeline import fit_pipeline
from training.fitting.prepared_data import PreparedData, prepare_data
from training.progress import Reporter, SilentReporter
from training.publishing.publish import publish
from training.reports.history import HistoryRecorder
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
    """Fit, evaluate, calibrate and publish a model. Return the path of the new artifact.

    Deterministic: the same table, options and library versions give the same weights, however often the run was killed
    and resumed.

    Args:
        config: options of the run; the model `auto` trains several kinds and publishes the best.
        table: training data.
        artifacts: artifact folder.
        report: receives the progress.
        runs: folder for checkpoints, in <name>/, and for the report, in <name>/<version>/; None keeps neither.
        resume: continue from the checkpoint in `runs`.
        checkpoint_seconds: time between checkpoints.
        tensorboard: also write TensorBoard event files.
        processes: processes that train together; each of them calls this function with the same arguments.

    Raises:
        DataError: the table cannot be used.
        FitError: the options do not fit the data, the fit failed, or there is nothing to resume.
    """
    report = report if processes.is_first else SilentReporter()
    for note in table.notes:
        report.note(note)
    kinds = AUTO_KINDS if config.model == "auto" else (config.model,)
    configs = [config.model_copy(update={"model": kind}) for kind in kinds]
    stores = [_checkpoint_store(each, table, runs, len(kinds) > 1, checkpoint_seconds) for each in configs]
    if resume:
        stores = _resumed(stores)
    with _one_thread():
        data = prepare_data(table, split_rows(len(table.x), config.seed, table.x.width), config.robust)
        candidates = [
            _fit_candidate(each, data, report, store, tensorboard, processes)
            for each, store in zip(configs, stores, strict=True)
        ]
        path = _finish(candidates, stores, data, artifacts, report) if processes.is_first else None
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


def _fit_candidate(
    config: TrainConfig,
    data: PreparedData,
    report: Reporter,
    checkpoints: CheckpointStore | None,
    tensorboard: bool,
    processes: ProcessGroup,
) -> Candidate:
    """Fit and evaluate a model of one kind."""
    recorded = checkpoints is not None and processes.is_first
    folder = checkpoints.folder if checkpoints and recorded else None
    recorder = HistoryRecorder(report, folder, bool(checkpoints and checkpoints.resume), tensorboard and recorded)
    pipeline = fit_pipeline(config, data, recorder, checkpoints=checkpoints, processes=processes)
    baseline_pca = data.pca(pipeline.scaling, pipeline.prior.means.shape[1])
    centre = data.moments.mean.float()
    metrics = held_out_metrics(
        pipeline, data.held_out, centre, None if config.model == "pca" else baseline_pca, config.seed
    )
    others = {}
    if baseline_pca is not None and config.model != "pca":
        others["pca"] = pca_metrics(baseline_pca.float(), pipeline.scaling, data.held_out)
    recorder.done(metrics)
    return Candidate(config, pipeline, metrics, others, recorder)


def _finish(
    candidates: Sequence[Candidate],
    stores: Sequence[CheckpointStore | None],
    data: PreparedData,
    artifacts: Path,
    report: Reporter,
) -> Path:
    """Publish the best candidate, write its report, and remove the checkpoints."""
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
            _write_report(folder, manifest, candidate.pipeline, data, notes, report)
    return path


def _write_report(
    folder: Path, manifest: Manifest, pipeline: Pipeline, data: PreparedData, notes: list[str], report: Reporter
) -> None:
    """Write the card and the plots into `folder`, whose name is the version."""
    table, labels = data.table, data.table.labels
    held_out_labels = None if labels is None else labels[data.split.held_out]
    version = int(folder.name)
    write_run(folder, manifest, version, pipeline, data.held_out, held_out_labels, table.label_names, notes, report)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread: as fast for small networks, and results do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
