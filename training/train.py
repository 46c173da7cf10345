"""One training run, from a table to a published artifact: fit, select, publish, report.

`fit_model` fits, evaluates and calibrates a model without publishing it. `train` also publishes it, and writes
checkpoints and reports.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from models import artifact
from models.errors import join_names
from models.keys import PrivateKey
from models.manifest import Manifest
from models.pipeline import Pipeline
from models.policy_rules import Policy
from models.windowed import Windowed
from training.config import AUTO_KINDS, TrainConfig, read_bounds
from training.data.readers import InMemory, format_option
from training.data.table import Table, read_table
from training.errors import FitError
from training.evaluation.metrics import held_out_metrics, pca_metrics
from training.evaluation.model_selection import Candidate, compare
from training.evaluation.samples import sample_metrics
from training.evaluation.worth import find_warnings
from training.fitting.baseline import refuse_short_history
from training.fitting.budget import allowed_alarms, step_of
from training.fitting.checkpoint import CheckpointStore, claim
from training.fitting.cross_calibration import fit_and_calibrate, with_calibration
from training.fitting.distributed import ProcessGroup
from training.fitting.prepared_data import PreparedData
from training.fitting.windows import prepare, with_window
from training.progress import Reporter, SilentReporter, is_warning
from training.publishing.compatibility import refuse_other_features
from training.publishing.publish import Parts, assemble, publish
from training.reports.describe import DEFAULT_ALPHA, few_calibration_rows
from training.reports.history import HistoryRecorder
from training.reports.run_report import PLOTTED_ROWS, write_run


def train(
    config: TrainConfig,
    table: Table,
    artifacts: Path,
    report: Reporter,
    *,
    runs: Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    tensorboard: bool = False,
    plots: bool = True,
    force: bool = True,
    replace_features: bool = False,
    processes: ProcessGroup = ProcessGroup(),  # noqa: B008  # frozen
    key: PrivateKey | None = None,
    policy: Policy | None = None,
) -> Path:
    """Fit, evaluate, calibrate and publish a model. Return the path of the new artifact.

    The run is deterministic: the same table, options and library versions give the same weights, even if the run was
    killed and resumed.

    Args:
        config: options of the run. If `config.model` is auto, several kinds are trained and the best is published.
        table: training data.
        artifacts: artifact folder.
        report: receives the progress and the notes.
        runs: folder for checkpoints (<name>/) and reports (<name>/<version>/); None to write neither.
        resume: continue from the checkpoint in `runs`.
        checkpoint_seconds: seconds between checkpoints.
        tensorboard: also write TensorBoard event files.
        plots: draw the plots of the report.
        force: publish even if the model is worse than predicting the mean. `elbo train` sets it to false.
        replace_features: allow features that differ from those of the newest version of `config.name`.
        processes: processes that train together; each of them calls this function with the same arguments.
        key: signs the artifact.
        policy: which deviations matter, when no row is anomalous, and how many alarms there may be; by default, every
            deviation matters.

    Raises:
        DataError: the table cannot be used, its features differ from those of the newest version, or the policy leaves
            no calibration row.
        FitError: the options do not fit the data, the fit failed, there is nothing to resume, or the model is worse
            than predicting the mean and `force` is false.
        ArtifactUnwritable: the model cannot be written to `artifacts`. This is checked before the training.
    """
    if not replace_features:
        refuse_other_features(table, artifacts, config.name)
    artifact.require_writable(artifacts, config.name)
    report = report if processes.is_first else SilentReporter()
    config = _check_options(config, table, policy)
    _report_notes(table, report)
    configs = _configs_per_kind(config)
    reserved = claim(runs / config.name) if runs is not None and processes.is_first else nullcontext(enter_result=True)
    with reserved as alone, _one_thread():
        stores = _checkpoint_stores(configs, table, runs, checkpoint_seconds, resume=resume, alone=alone)
        if resume:
            stores = _set_to_resume(stores)
        data = _prepare(config, table, report, policy)
        candidates = [
            _fit_candidate(each, data, report, checkpoints=store, tensorboard=tensorboard, processes=processes)
            for each, store in zip(configs, stores, strict=True)
        ]
        path = None
        if processes.is_first:
            path = _finish(candidates, stores, data, artifacts, report, runs, plots=plots, force=force, key=key)
        return processes.broadcast_path(path)


@dataclass(frozen=True, kw_only=True)
class FittedModel:
    """A model that is fitted, evaluated and calibrated, with everything that its publication needs.

    Args:
        chosen: the model, with its options, metrics and notes; of several kinds, the best.
        comparison: metrics of the models that it was compared with, by kind.
        data: the rows of the table and their split.
    """

    chosen: Candidate
    comparison: dict[str, dict[str, float]]
    data: PreparedData

    @property
    def config(self) -> TrainConfig:
        """The options of the model; `config.model` is the kind of the model, never auto."""
        return self.chosen.config

    @property
    def notes(self) -> list[str]:
        """What the user should know about the data and the training."""
        return [*self.data.notes, *self.chosen.recorder.notes, *self.chosen.warnings]

    @cached_property
    def model(self) -> Pipeline | Windowed:
        """The whole model in eager mode. It takes rows [B, D] in raw units, or windows [B, N, D].

        Its scores do not depend on the group or the time of a row: only a published model with times has a baseline.
        """
        return with_window(self.chosen.pipeline, self.data)

    def assemble(self, report: Reporter, *, twin: bool = True, exhibits: bool = True) -> Parts:
        """Return the parts of the artifact: module, manifest, ONNX twin and exhibits.

        Args:
            report: receives the progress and the notes.
            twin: export the ONNX twin, which takes seconds; without it, serving on a CPU is slower.
            exhibits: add held-out rows, calibration scores and the model card.
        """
        with _one_thread():
            return assemble(self.chosen, self.comparison, self.data, report, twin=twin, exhibits=exhibits)


def fit_model(
    config: TrainConfig,
    table: Table,
    report: Reporter,
    *,
    policy: Policy | None = None,
    split_seed: int | None = None,
) -> FittedModel:
    """Fit, evaluate and calibrate a model, and publish nothing.

    The result has the same weights as that of `train` for the same arguments.

    Args:
        config: options of the run. If `config.model` is auto, several kinds are fitted and the best is chosen.
        table: training data.
        report: receives the progress and the notes.
        policy: which deviations matter, when no row is anomalous, and how many alarms there may be; by default, every
            deviation matters.
        split_seed: the seed of the split of the rows; by default, `config.seed`.

    Raises:
        DataError: the table cannot be used, or the policy leaves no calibration row.
        FitError: the options do not fit the data, or the fit failed.
    """
    config = _check_options(config, table, policy)
    _report_notes(table, report)
    with _one_thread():
        seed = config.seed if split_seed is None else split_seed
        data = _prepare(config.model_copy(update={"seed": seed}), table, report, policy)
        candidates = [_fit_candidate(each, data, report) for each in _configs_per_kind(config)]
        chosen, comparison = compare(candidates, data, report)
        return FittedModel(chosen=chosen, comparison=comparison, data=data)


def read(source: str | InMemory, config: TrainConfig) -> Table:
    """Return the table in `source`, read as `config` says. Raise DataError if it cannot be used."""
    return read_table(
        source,
        config.drop,
        config.keep,
        config.size,
        escape=config.escape,
        layout=config.layout,
        label=config.label,
        time=config.time,
        group=config.group,
        condition=config.condition,
        category=config.category,
    )


def split_data(config: TrainConfig, table: Table, split_seed: int) -> PreparedData:
    """Return the rows of `table` and their split, as a model with the options `config` gets them.

    Raises:
        DataError: the table cannot be used.
        FitError: the options do not fit the data.
    """
    config = _check_options(config, table, None).model_copy(update={"seed": split_seed})
    return _prepare(config, table, SilentReporter(), None)


def _check_options(config: TrainConfig, table: Table, policy: Policy | None) -> TrainConfig:
    """Return `config` with the method of calibration that auto stands for. Raise FitError if it is not for `table`."""
    _refuse_other_columns(config, table)
    if config.condition and policy is not None:
        raise FitError("--policy is not for a model with --condition: leave one of them out")
    _refuse_categories(config, table)
    _refuse_bounds(config, table)
    return with_calibration(config, table)


def _refuse_categories(config: TrainConfig, table: Table) -> None:
    """Raise FitError if `table` has categories and an option does not allow them."""
    if not table.categories:
        return
    names = [category.name for category in table.categories]
    for option, value in (
        ("--condition", config.condition),
        ("--window", config.window),
        ("--scale-by-group", config.scale_by_group),
    ):
        if value:
            raise FitError(
                f"{option} is not for tables with columns of text ({join_names(names)}): add "
                f"{format_option('--drop', names)}, or leave {option} out"
            )


def _refuse_bounds(config: TrainConfig, table: Table) -> None:
    """Raise FitError if --bounds names a column that is not a feature with numbers, or if the model has no bounds."""
    if not config.bounds:
        return
    if config.window:
        raise FitError(
            "--bounds is not for a model with --window, which judges summaries of rows: leave one of them out"
        )
    if config.likelihood == "bernoulli":
        raise FitError(
            "--bounds is not for --likelihood bernoulli, which draws one of two values: leave one of them out"
        )
    levels = sum(len(category.levels) for category in table.categories)
    known = table.names[: len(table.names) - levels]
    for name, _, _ in map(read_bounds, config.bounds):
        if name not in known:
            raise FitError(
                f"--bounds names {name!r}, which is no feature with numbers: expected {join_names(known, 20)}"
            )


def _report_notes(table: Table, report: Reporter) -> None:
    for note in [*table.notes, *table.warnings]:
        report.note(note)


def _prepare(config: TrainConfig, table: Table, report: Reporter, policy: Policy | None) -> PreparedData:
    """Split and prepare the table, and refuse options that would fail after the fit."""
    data, window_notes = prepare(config, table, policy)
    refuse_short_history(config, data.rows)
    if policy is not None and policy.alarms.per_day is not None:
        allowed_alarms(policy.alarms, len(data.split.calibration), step_of(table.timeline))  # before the long fit
    for note in [*window_notes, *data.split_notes]:
        report.note(note)
    return data


def _refuse_other_columns(config: TrainConfig, table: Table) -> None:
    """Raise FitError if `table` and `config` have different columns of times or groups."""
    timeline = table.timeline
    read = (None, None) if timeline is None else (timeline.time_column, timeline.group_column)
    if (config.time, config.group) != read:
        raise FitError(
            f"the table was read with time={read[0]!r} and group={read[1]!r}, but the options are time={config.time!r} "
            f"and group={config.group!r}: give read_table and TrainConfig the same columns"
        )
    columns = tuple(column.name for column in table.conditions)
    if config.condition != columns:
        raise FitError(
            f"the table was read with condition={columns}, but the options are condition={config.condition}: give "
            "read_table and TrainConfig the same columns"
        )


def can_resume(config: TrainConfig, table: Table, runs: Path) -> bool:
    """Return whether `runs` has a checkpoint from which a run with these arguments can continue."""
    config = with_calibration(config, table)
    stores = _checkpoint_stores(_configs_per_kind(config), table, runs, interval_seconds=0.0, resume=True)
    return any(store is not None and store.belongs_to_run() for store in stores)


def _configs_per_kind(config: TrainConfig) -> list[TrainConfig]:
    """Return the options for each kind that is trained: several if `config.model` is auto."""
    kinds = AUTO_KINDS if config.model == "auto" else (config.model,)
    return [config.model_copy(update={"model": kind}) for kind in kinds]


def _checkpoint_stores(
    configs: Sequence[TrainConfig],
    table: Table,
    runs: Path | None,
    interval_seconds: float,
    *,
    resume: bool,
    alone: bool = True,
) -> list[CheckpointStore | None]:
    if runs is None:
        return [None for _ in configs]
    stores: list[CheckpointStore | None] = []
    for config in configs:
        identity = f"{config.model_dump_json()} {table.fingerprint} {torch.__version__}"
        folder = runs / config.name / config.model if len(configs) > 1 else runs / config.name
        store = CheckpointStore(
            folder, hashlib.sha256(identity.encode()).hexdigest(), interval_seconds=interval_seconds
        )
        stores.append(_in_own_folder(store, runs / config.name, resume=resume, alone=alone))
    return stores


def _in_own_folder(store: CheckpointStore, run_folder: Path, *, resume: bool, alone: bool) -> CheckpointStore:
    """Return `store`, in a folder of its own if its folder belongs to another run of the same name.

    The other run is still training (`alone` is false), or it was interrupted and left a checkpoint.

    Args:
        run_folder: runs/<name>/. The folder of its own is runs/<name>/run-<start of the identity>/.
    """
    own = replace(store, folder=run_folder / f"run-{store.identity[:8]}")
    if own.exists():
        return own
    belongs_to_another = not alone or (store.exists() and not store.belongs_to_run())
    return own if belongs_to_another and not resume else store


def _set_to_resume(stores: Sequence[CheckpointStore | None]) -> list[CheckpointStore | None]:
    """Return `stores`, each set to resume if it has a checkpoint. Raise FitError if no store has a checkpoint."""
    if not any(store and store.exists() for store in stores):
        path = next((store.path for store in stores if store), "a checkpoint")
        raise FitError(f"nothing to resume: {path} does not exist; train without --resume")
    return [store and replace(store, resume=store.exists()) for store in stores]


def _fit_candidate(
    config: TrainConfig,
    data: PreparedData,
    report: Reporter,
    *,
    checkpoints: CheckpointStore | None = None,
    tensorboard: bool = False,
    processes: ProcessGroup = ProcessGroup(),  # noqa: B008  # frozen
) -> Candidate:
    """Fit a model of one kind, and evaluate it on the held-out rows."""
    if checkpoints is not None and processes.is_first:
        recorder = HistoryRecorder(report, checkpoints.folder, resume=checkpoints.resume, tensorboard=tensorboard)
    else:
        recorder = HistoryRecorder(report, None)
    pipeline = fit_and_calibrate(config, data, recorder, checkpoints=checkpoints, processes=processes)
    recorder.stage("evaluating on the held-out rows")
    baseline_pca = None
    others = {}
    if config.model != "pca":
        baseline_pca = data.pca(pipeline.scaling, pipeline.prior.means.shape[1])
    row_scaling = None if data.windows is None else data.windows.scaling
    metrics = held_out_metrics(
        pipeline,
        data.held_out,
        inputs=data.held_out_inputs,
        centre=data.moments.mean.float(),
        baseline_pca=baseline_pca,
        seed=config.seed,
        row_scaling=row_scaling,
    )
    warnings, is_worse_than_mean = find_warnings(pipeline, baseline_pca, data)
    for warning in warnings:
        report.note(warning)  # not to the recorder, because the manifest keeps the warnings
    # This must come last: `float` converts the PCA in place, and `held_out_metrics` needs the PCA in float64.
    if baseline_pca is not None:
        others["pca"] = pca_metrics(baseline_pca.float(), pipeline.scaling, data.held_out, row_scaling)
    recorder.done(metrics)
    metrics |= sample_metrics(pipeline, data)
    return Candidate(config, pipeline, metrics, others, recorder, warnings, is_worse_than_mean)


def _finish(
    candidates: Sequence[Candidate],
    stores: Sequence[CheckpointStore | None],
    data: PreparedData,
    artifacts: Path,
    report: Reporter,
    runs: Path | None,
    *,
    plots: bool,
    force: bool,
    key: PrivateKey | None,
) -> Path:
    """Publish the best candidate, write its report, and remove the checkpoints.

    Raises:
        FitError: the best candidate is worse than predicting the mean, and `force` is false.
    """
    chosen, comparison = compare(candidates, data, report)
    if chosen.is_worse_than_mean and not force:
        raise FitError(
            f"{chosen.config.name} was not published: it reconstructs held-out rows worse than predicting the mean of "
            "every column; change the options, or repeat the command with --force to publish it anyway"
        )
    can_resume = _are_networks_saved(candidates, stores)
    path, manifest = publish(chosen, comparison, data, artifacts, report, can_resume=can_resume, key=key)
    for candidate, store in zip(candidates, stores, strict=True):
        if store is None or runs is None:
            continue
        folder = runs / candidate.config.name / path.parent.name
        candidate.recorder.move(folder if candidate is chosen else folder / candidate.config.model)
        store.remove()
        if candidate is chosen:
            _write_report(folder, manifest, candidate, data, report, plots)
    for note in data.notes:
        if is_warning(note):
            report.note(note)  # again, because the progress of a long run has hidden the first
    if not manifest.calibration.reaches(DEFAULT_ALPHA):
        report.note(few_calibration_rows(manifest.calibration))
    return path


def _are_networks_saved(candidates: Sequence[Candidate], stores: Sequence[CheckpointStore | None]) -> bool:
    """Return whether a resumed run would train no network again. PCA has no checkpoint, because its fit is fast."""
    pairs = zip(candidates, stores, strict=True)
    networks = [store for candidate, store in pairs if candidate.config.model != "pca"]
    return bool(networks) and all(store is not None and store.is_finished() for store in networks)


def _write_report(
    folder: Path, manifest: Manifest, candidate: Candidate, data: PreparedData, report: Reporter, plots: bool
) -> None:
    """Write the model card and, if `plots` is true, the plots into `folder`, whose name is the version."""
    labels, rows = data.table.labels, data.split.held_out[:PLOTTED_ROWS]
    held_out = data.source_rows.held_out_inputs
    if data.windows is not None:
        in_table = replace(data.windows.in_table, x=data.source_rows.table.x)
        held_out = torch.from_numpy(in_table.take(data.rows.split.held_out[:PLOTTED_ROWS]))
    write_run(
        folder,
        manifest,
        with_window(candidate.pipeline, data),
        version=int(folder.name),
        held_out=held_out,
        labels=None if labels is None else labels[rows],
        label_names=data.table.label_names,
        notes=[*data.notes, *candidate.recorder.notes],
        draw=plots,
        report=report,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread, so that results do not depend on the number of cores. Small networks lose no speed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
