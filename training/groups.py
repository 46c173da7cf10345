"""`elbo train --per-group`: train a model for each group of a table, and publish each as soon as it is trained.

A group whose served version was trained from the same rows and with the same options is left as it is. Otherwise, the
new model of the group is published if it is better than the served version.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from models.artifact import load_content, publish_content, require_writable
from models.errors import ArtifactError, ElboError, printable
from models.keys import PrivateKey
from models.manifest import FILE_NAME, NAME, Manifest, read_manifest, read_sealed, version_folder, versions
from training.config import AUTO_KINDS, TrainConfig
from training.data.table import Table, rows_of_group
from training.errors import DataError, FitError
from training.evaluation.model_selection import MEANING, measure
from training.fitting.cross_calibration import with_calibration
from training.progress import SilentReporter, is_warning
from training.publishing.compatibility import refuse_other_features
from training.reports.describe import DEFAULT_ALPHA, few_calibration_rows
from training.results_table import align, cells_of, results_page
from training.served_version import (
    NOT_COMPARABLE,
    held_out_rows,
    is_comparable,
    means_of,
    measure_artifact,
    why_not_better,
)
from training.train import FittedModel, fit_model

PUBLISHED, KEPT, UNCHANGED, FAILED = "published", "kept", "unchanged", "failed"  # what happened to a group


@dataclass(frozen=True)
class GroupJob:
    """A group to train. With the rows and the served version, any machine can train it without shared folders."""

    group: str
    config: TrainConfig  # `name` is that of the model of the group
    table: Table  # the rows of the group
    served: bytes | None  # the newest version of the model, sealed; None if there is none that can be read


@dataclass(frozen=True)
class TrainedGroup:
    """The model of a group, or the error that ended its training."""

    group: str
    name: str
    rows: int
    seconds: float = 0.0
    means: dict[str, float] = field(default_factory=dict)  # of each measure on the held-out rows of the group
    content: bytes | None = None  # the artifact; None if the training failed
    is_compared: bool = False  # whether the model was compared with the served version
    refusal: str | None = None  # why the model should not be published
    warnings: tuple[str, ...] = ()  # of the training and the calibration
    error: str | None = None


@dataclass(frozen=True)
class GroupResult:
    """What happened to a group: PUBLISHED, KEPT (the new model is not published), UNCHANGED (not trained) or FAILED."""

    trained: TrainedGroup
    state: str
    reason: str
    version: int | None = None  # the version that is now the newest; None if there is none

    def describe(self) -> str:
        """Return what happened, on one line."""
        if self.state == FAILED:
            return f"not trained: {self.reason}"
        published = f"published as {self.trained.name}@{self.version}" if self.state == PUBLISHED else "not published"
        return "; ".join((f"{published}: {self.reason}", *self.trained.warnings))


Show = Callable[[GroupResult], None]
Engine = Callable[[Iterator[GroupJob]], Iterable[TrainedGroup]]  # yields models in the order in which they are trained


def run_groups(
    config: TrainConfig,
    table: Table,
    artifacts: Path,
    engine: Engine,
    *,
    force: bool = False,
    replace_features: bool = False,
    key: PrivateKey | None = None,
    show: Show = lambda result: None,  # noqa: ARG005
) -> list[GroupResult]:
    """Train a model for each group of `table`. Publish each if it is better than the served version of its name.

    The model of a group has the name NAME-GROUP. In the group, characters that a name cannot have become hyphens. A
    group that cannot be trained, for example because it has too few rows, does not stop the others.

    The model is compared with the served version on the held-out rows of the group, as in a sweep: on a tie, the served
    version stays. It is not compared, and published, if the served version cannot be loaded, has other features, or if
    one of the two has an option in NOT_COMPARABLE.

    Args:
        config: the options of all models; `config.name` is the first part of their names.
        table: the rows of all groups. The engine gets the rows of one group after another, in memory.
        artifacts: artifact folder.
        engine: trains the models.
        force: train all groups, and publish each model even if it is no better than the served version, or worse than
            predicting the mean.
        replace_features: allow features that differ from those of the newest versions.
        key: signs the versions.
        show: called with the result of each group.

    Returns:
        The results, in the order of the groups.

    Raises:
        DataError: the features of the table differ from those of a newest version.
        FitError: the rows have no groups, a group gives no name or the name of another, or no model could be trained.
        ArtifactUnwritable: a model cannot be written to `artifacts`. This is checked before the training.
    """
    timeline = table.timeline
    if timeline is None or config.group is None:
        raise FitError("--per-group trains a model for each value of a column: add --group COLUMN and --time COLUMN")
    names = name_models(config.name, timeline.groups)
    for name in names:
        if not replace_features:
            refuse_other_features(table, artifacts, name)
        require_writable(artifacts, name)
    results: dict[str, GroupResult] = {}

    def finish(result: GroupResult) -> None:
        # Without the artifacts, which together may not fit into memory.
        results[result.trained.group] = replace(result, trained=replace(result.trained, content=None))
        show(result)

    for trained in engine(_jobs(config, table, names, artifacts, finish, force=force)):
        finish(_failed(trained) if trained.content is None else _publish(trained, artifacts, force, key))
    failed = [result for result in results.values() if result.state == FAILED]
    if len(failed) == len(names):
        raise FitError(f"no model of a group could be trained; the first failed with: {failed[0].reason}")
    return [results[group] for group in timeline.groups]


def _jobs(
    config: TrainConfig, table: Table, names: Sequence[str], artifacts: Path, finish: Show, *, force: bool
) -> Iterator[GroupJob]:
    """Yield the groups to train. Call `finish` for each group that cannot be trained, or need not be."""
    assert table.timeline is not None
    for index, (group, name) in enumerate(zip(table.timeline.groups, names, strict=True)):
        rows = int(table.timeline.starts[index + 1] - table.timeline.starts[index])
        try:
            own = rows_of_group(table, index)
        except DataError as error:
            finish(_failed(TrainedGroup(group, name, rows, error=str(error))))
            continue
        of_group = config.model_copy(update={"name": name})
        present = versions(artifacts, name)
        path = version_folder(artifacts, name, present[-1]) / FILE_NAME if present else None
        if path is not None and not force and _is_up_to_date(path, of_group, own):
            reason = f"{name}@{present[-1]} was trained from the same rows with the same options"
            finish(GroupResult(TrainedGroup(group, name, rows), UNCHANGED, reason, present[-1]))
            continue
        yield GroupJob(group, of_group, own, None if path is None else _read(path))


def name_models(name: str, groups: Sequence[str]) -> list[str]:
    """Return the name of the model of each group.

    Raises:
        FitError: a group gives no valid name, or two groups give the same name.
    """
    found: dict[str, str] = {}
    for group in groups:
        own = f"{name}-{re.sub(r'[^A-Za-z0-9._-]+', '-', group).strip('-')}"
        shown = printable(group[:100])
        if own == f"{name}-" or not NAME.fullmatch(own):
            raise FitError(
                f"--per-group: the group {shown!r} gives the name {own[:100]!r}, which is no name of a model: expected "
                "1 to 64 letters, digits, '.', '_' and '-'; rename the group, or choose a shorter --name"
            )
        if own in found:
            raise FitError(
                f"--per-group: the groups {printable(found[own][:100])!r} and {shown!r} both give the name {own!r}: "
                "rename one of them"
            )
        found[own] = group
    return list(found)


def train_group(job: GroupJob) -> TrainedGroup:
    """Train the model of a group, and compare it with the served version. An error becomes part of the result."""
    began = time.monotonic()
    trained = TrainedGroup(job.group, job.config.name, len(job.table.x))
    try:
        fitted = fit_model(job.config, job.table, SilentReporter())
        parts = fitted.assemble(SilentReporter())
        means, is_compared, refusal = _compare(job, fitted)
        trained = replace(
            trained,
            means=means,
            content=parts.content(),
            is_compared=is_compared,
            refusal=refusal,
            warnings=_warnings(fitted, parts.manifest),
        )
    except ElboError as error:
        trained = replace(trained, error=str(error))
    except Exception as error:  # noqa: BLE001 - libraries raise many types, and the other groups are still to be trained
        trained = replace(trained, error=f"{type(error).__name__}: {error}")
    return replace(trained, seconds=time.monotonic() - began)


def _warnings(fitted: FittedModel, manifest: Manifest) -> tuple[str, ...]:
    """Return the warnings that `elbo train` gives for a single model."""
    found = [note for note in fitted.notes if is_warning(note)]
    if not manifest.calibration.reaches(DEFAULT_ALPHA):
        found.append(few_calibration_rows(manifest.calibration))
    return tuple(found)


def train_here(jobs: Iterator[GroupJob]) -> Iterator[TrainedGroup]:
    """Train the models one after another in this process."""
    return map(train_group, jobs)


def _compare(job: GroupJob, fitted: FittedModel) -> tuple[dict[str, float], bool, str | None]:
    """Return the means of the measures, whether the served version was compared, and why it should stay, or None."""
    worse = fitted.chosen.is_worse_than_mean
    if any(getattr(job.config, option) for option in NOT_COMPARABLE):
        return {}, False, why_not_better({}, None, is_worse_than_mean=worse)
    rows, scale = held_out_rows(fitted.data)
    measures = measure(fitted.chosen.pipeline, rows, scale, job.config.seed)
    served = None
    if job.served is not None:
        try:
            artifact = load_content(job.served, Path(job.config.name) / FILE_NAME)
        except ArtifactError:
            artifact = None
        if artifact is not None and is_comparable(artifact, job.table.names) and len(scale) == artifact.manifest.width:
            served = measure_artifact(artifact, rows, scale, job.config.seed)
    return means_of(measures), served is not None, why_not_better(measures, served, is_worse_than_mean=worse)


def _is_up_to_date(path: Path, config: TrainConfig, table: Table) -> bool:
    """Return whether the artifact at `path` was trained from the rows of `table` with the options `config`."""
    try:
        manifest = read_manifest(path)
    except ArtifactError:
        return False
    return _has_options(manifest, config, table) and manifest.data.fingerprint == table.fingerprint


def _has_options(manifest: Manifest, config: TrainConfig, table: Table) -> bool:
    if manifest.recalibration is not None or manifest.policy is not None:
        return False
    options = with_calibration(config, table).model_dump(mode="json")
    if config.model == "auto":  # the manifest has the kind that was chosen
        options["model"] = manifest.kind
        if not set(AUTO_KINDS) <= manifest.comparison.keys():
            return False
    return manifest.training == options


def _read(path: Path) -> bytes | None:
    try:
        return read_sealed(path)
    except ArtifactError:
        return None


def _failed(trained: TrainedGroup) -> GroupResult:
    return GroupResult(trained, FAILED, trained.error or "")


def _publish(trained: TrainedGroup, artifacts: Path, force: bool, key: PrivateKey | None) -> GroupResult:
    """Publish the model of a group unless the served version should stay."""
    present = versions(artifacts, trained.name)
    if trained.refusal is not None and not force:
        return GroupResult(trained, KEPT, trained.refusal, present[-1] if present else None)
    if trained.refusal is not None:
        reason = f"--force was given, although {trained.refusal}"
    elif trained.is_compared:
        reason = "it beats the served version"
    elif present:
        reason = (
            "it was not compared with the served version: that cannot be loaded, or one of the two takes more than "
            "rows of the same features"
        )
    else:
        reason = "there is no served version"
    assert trained.content is not None
    path = publish_content(trained.content, trained.name, artifacts, key)
    return GroupResult(trained, PUBLISHED, reason, int(path.parent.name))


def groups_table(results: Sequence[GroupResult]) -> list[list[str]]:
    """Return the cells of a table of all groups: a header, and a line per group."""
    lines = [["group", "rows", *MEANING, "seconds", ""]]
    for result in results:
        each = result.trained
        seconds = "-" if result.state == UNCHANGED else f"{each.seconds:.1f}"
        lines.append([printable(each.group), f"{each.rows}", *cells_of(each.means), seconds, result.describe()])
    return lines


def format_groups(results: Sequence[GroupResult]) -> str:
    """Return the table as text, its columns aligned."""
    return align(groups_table(results))


def groups_page(results: Sequence[GroupResult], name: str) -> str:
    """Return the table as one HTML page without scripts."""
    explanation = (
        "Each model is measured on the held-out rows of its own group. In the reconstruction error, the model unit of "
        "a column is its standard deviation in these rows."
    )
    return results_page(f"Groups of {name}", count_states(results), groups_table(results), explanation)


def count_states(results: Sequence[GroupResult]) -> str:
    """Return one sentence: how many models were published, kept, unchanged, and not trained."""
    states = [result.state for result in results]
    words = {PUBLISHED: "published", KEPT: "not published", UNCHANGED: "unchanged", FAILED: "not trained"}
    parts = [f"{states.count(state)} {word}" for state, word in words.items() if state in states]
    return f"{len(results)} groups: {', '.join(parts)}"
