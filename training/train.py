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
from training.fitting import checkpoint
from training.fitting.distributed import ProcessGroup
from training.fitting.pipeline import PreparedData, fit_pipeline, prepare_data
from training.fitting.trainer import Run
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
    states = [_run(each, table, runs, len(kinds) > 1, checkpoint_seconds) for each in configs]
    if resume:
        states = _resumed(states)
    with _one_thread():
        data = prepare_data(table, split_rows(len(table.x), config.seed, table.x.width), config.robust)
        candidates = [
            _candidate(each, data, report, state, tensorboard, processes)
            for each, state in zip(configs, states, strict=True)
        ]
        path = _finished(candidates, states, data, artifacts, report) if processes.is_first else None
        return processes.broadcast_path(path)


def _run(config: TrainConfig, table: Table, runs: Path | None, several: bool, seconds: float) -> Run | None:
    """Where the run keeps its state: runs/<name>, or a folder in it for each of several kinds."""
    if runs is None:
        return None
    folder = runs / config.name / config.model if several else runs / config.name
    identity = f"{config.model_dump_json()} {table.fingerprint} {torch.__version__}"
    return Run(folder, hashlib.sha256(identity.encode()).hexdigest(), seconds=seconds)


def _resumed(states: Sequence[Run | None]) -> list[Run | None]:
    """The runs, continuing those that have a state. Raises FitError if none has."""
    if not any(state and checkpoint.exists(state.folder) for state in states):
        folder = next((state.folder for state in states if state), "runs")
        raise FitError(f"nothing to resume: there is no {folder}/{checkpoint.FILE_NAME}; train without --resume")
    return [state and replace(state, resume=checkpoint.exists(state.folder)) for state in states]


def _candidate(
    config: TrainConfig,
    data: PreparedData,
    report: Reporter,
    run: Run | None,
    tensorboard: bool,
    processes: ProcessGroup,
) -> Candidate:
    """A model of one kind, fitted and judged."""
    kept = run is not None and processes.is_first
    recorder = Recorder(report, run.folder if run and kept else None, bool(run and run.resume), tensorboard and kept)
    pipeline = fit_pipeline(config, data, recorder, run, processes)
    rival = data.pca(pipeline.scaling, pipeline.prior.means.shape[1])
    centre = data.moments.mean.float()
    metrics = held_out_metrics(pipeline, data.held_out, centre, None if config.model == "pca" else rival, config.seed)
    others = {}
    if rival is not None and config.model != "pca":
        others["pca"] = rival_metrics(rival.float(), pipeline.scaling, data.held_out)
    recorder.done(metrics)
    return Candidate(config, pipeline, metrics, others, recorder)


def _finished(
    candidates: Sequence[Candidate], states: Sequence[Run | None], data: PreparedData, artifacts: Path, report: Reporter
) -> Path:
    """Publish the best candidate, write its report, and forget the state of the run."""
    chosen, comparison = compare(candidates, data, report)
    path, manifest = publish(chosen, comparison, data, artifacts, report)
    for candidate, state in zip(candidates, states, strict=True):
        if state is None:
            continue
        checkpoint.remove(state.folder)
        folder = (state.folder.parent if len(candidates) > 1 else state.folder) / path.parent.name
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
    shown = None if labels is None else labels[data.rows.held_out]
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
