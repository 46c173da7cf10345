"""Write a fitted pipeline, with its manifest, ONNX twin and exhibits, as an artifact."""

import math
import platform
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from shlex import quote
from typing import Literal

import numpy as np
import torch

from models import artifact
from models.baseline import Baseline, BaselineBuffers
from models.conditional import CONDITION_PART
from models.errors import ArtifactUnwritable
from models.keys import PrivateKey
from models.manifest import (
    FORMAT_VERSION,
    CalibrationSize,
    Data,
    Feature,
    Golden,
    Manifest,
    Season,
    Timeline,
    version_folder,
)
from models.pipeline import Pipeline
from models.policy_rules import RANGE_PART, AppliedPolicy
from models.versions import next_version
from models.windowed import Windowed
from training.config import TrainConfig
from training.data.cross_split import CrossSplit
from training.data.time_split import TimeSplit, summarise
from training.evaluation.metrics import density_scale
from training.evaluation.model_selection import Candidate
from training.fitting.baseline import describe_groups, fit_baseline
from training.fitting.budget import alpha_of_budget
from training.fitting.cross_calibration import count_folds
from training.fitting.latents import describe_latents
from training.fitting.policy import score_rows
from training.fitting.prepared_data import PreparedData
from training.fitting.windows import with_window
from training.progress import Reporter
from training.publishing.exhibits import make_exhibits
from training.publishing.onnx_export import export

GOLDEN_ROWS = 3


@dataclass(frozen=True)
class Parts:
    """The parts of an artifact that is not written yet. See `models.artifact.publish`."""

    module: torch.jit.ScriptModule
    manifest: Manifest
    twin: dict[str, artifact.Graph] | None
    exhibits: dict[str, bytes]

    def content(self) -> bytes:
        """Return the bytes of the artifact, sealed."""
        return artifact.archive(self.module, self.manifest, self.twin, self.exhibits)

    def publish(self, artifacts: Path, key: PrivateKey | None = None) -> Path:
        """Write the artifact as the next version of its name under `artifacts`, and return its path.

        Raises:
            ArtifactUnwritable: the disk is full, or this user may not write to the folder.
        """
        return artifact.publish(self.module, self.manifest, artifacts, self.twin, self.exhibits, key)


def assemble(
    chosen: Candidate,
    comparison: dict[str, dict[str, float]],
    data: PreparedData,
    report: Reporter,
    *,
    twin: bool = True,
    exhibits: bool = True,
) -> Parts:
    """Return the parts of the artifact of a fitted model.

    Args:
        twin: export the ONNX twin.
        exhibits: make the exhibits.
    """
    report.stage("fitting the baseline")
    baseline = _add_baseline(chosen, data)
    pipeline = with_window(chosen.pipeline, data)
    module = artifact.script(pipeline)
    rows = _golden_inputs(data)
    golden = _golden(module, rows, chosen.config.seed)
    manifest = _manifest(chosen, comparison, data, golden, artifact.weights_sha256(pipeline), baseline)
    graphs = None
    if twin:
        report.stage("exporting the ONNX twin")
        graphs = _twin(pipeline, rows, report)
    notes = [*data.notes, *chosen.recorder.notes]
    report.stage("writing the artifact")
    return Parts(module, manifest, graphs, make_exhibits(chosen.pipeline, manifest, data, notes) if exhibits else {})


def publish(
    chosen: Candidate,
    comparison: dict[str, dict[str, float]],
    data: PreparedData,
    artifacts: Path,
    report: Reporter,
    *,
    can_resume: bool = False,
    key: PrivateKey | None = None,
) -> tuple[Path, Manifest]:
    """Publish the model as the next version of its name under `artifacts`. Return the artifact's path and manifest.

    Args:
        can_resume: whether the trained networks are in a checkpoint. If they are not, and the model cannot be written
            to `artifacts`, the model is written to a new folder in TMPDIR.
        key: signs the version.

    Raises:
        ArtifactUnwritable: the disk is full, or this user may not write to the folder. The message says where the
            trained model is.
    """
    parts = assemble(chosen, comparison, data, report)
    manifest = parts.manifest
    try:
        return parts.publish(artifacts, key), manifest
    except ArtifactUnwritable as error:
        if can_resume:
            advice = "The trained networks are kept: repeat elbo train with --resume to publish them"
            raise ArtifactUnwritable(f"{error}. {advice}") from error
        try:
            kept = parts.publish(Path(tempfile.mkdtemp(prefix="elbo-")))
        except (ArtifactUnwritable, OSError):
            raise error from None
        folder = version_folder(artifacts, manifest.name, next_version(artifacts, manifest.name))
        sign = "" if key is None else ", and then sign it with elbo sign"
        commands = f"mkdir -p {quote(str(folder.parent))} && mv {quote(str(kept.parent))} {quote(str(folder))}"
        raise ArtifactUnwritable(f"{error}. The trained model is kept: publish it with {commands}{sign}") from error


def _golden_inputs(data: PreparedData) -> torch.Tensor:
    """Return held-out rows [GOLDEN_ROWS, D], or windows [GOLDEN_ROWS, N, D] of which the last one is short."""
    if data.windows is None:
        return data.with_conditions(data.fill_missing(data.held_out[:GOLDEN_ROWS]), data.split.held_out)
    windows = torch.from_numpy(data.windows.in_table.take(data.rows.split.held_out[:GOLDEN_ROWS]))
    windows[-1, : -data.windows.window.least_rows] = torch.nan
    return windows


def _add_baseline(chosen: Candidate, data: PreparedData) -> Baseline | None:
    """Add the baseline of the groups and the seasons to the pipeline, if the rows have times, and return it."""
    pipeline = chosen.pipeline
    baseline, timeline = fit_baseline(chosen.config, pipeline, data), data.rows.table.timeline
    if baseline is not None and timeline is not None:
        is_first = not hasattr(pipeline, "baseline")
        pipeline.add_module("baseline", BaselineBuffers(baseline.arrays))
        if not is_first:  # the notes are there since the first time
            return baseline
        if baseline.features is not None:
            chosen.recorder.note(
                f"rows of {len(baseline.groups):,} groups are converted into common units before the model sees them; "
                "rows without a group, or of another group, are not converted, and have a calibration of their own"
            )
        for note in describe_groups(baseline, timeline):
            chosen.recorder.note(note)
    return baseline


def _twin(pipeline: Pipeline | Windowed, rows: torch.Tensor, report: Reporter) -> dict[str, artifact.Graph] | None:
    try:
        return export(pipeline, rows, pipeline.encode(rows)[0])
    except Exception as error:  # noqa: BLE001 - the exporter raises many types, and the twin is optional
        reason = " ".join(str(error).split())[:200]
        report.note(
            f"note: the ONNX export failed ({reason}): the artifact has no ONNX twin, so serving on a CPU is slower"
        )
        return None


def _golden(module: torch.jit.ScriptModule, rows: torch.Tensor, seed: int) -> Golden:
    random = np.random.RandomState(seed)
    latents = module.encode(rows)[0].shape[1]
    noise = torch.from_numpy(random.standard_normal((len(rows), latents)).astype(np.float32))
    choice = torch.from_numpy(random.uniform(size=len(rows)).astype(np.float32))
    return artifact.record_golden(module, rows, noise, choice)


def describe_features(data: PreparedData) -> list[Feature]:
    """Return the features of the rows in `data`."""
    table, moments = data.table, data.moments
    columns = (
        table.names, table.units, data.medians, moments.low, moments.high, table.missing, moments.mean,
        _kinds_of_values(data),
    )  # fmt: skip
    return [
        Feature(
            name=name,
            unit=unit,
            median=float(median),
            minimum=float(low),
            maximum=float(high),
            missing=int(missing),
            mean=float(mean),
            values=values,
        )
        for name, unit, median, low, high, missing, mean, values in zip(*columns, strict=True)
    ]


def _kinds_of_values(data: PreparedData) -> list[Literal["whole", "boolean"] | None]:
    """Return for each feature whether all fit rows have whole numbers, or only 0 and 1. Pixels and levels have none.

    In tables without categories, only booleans are marked: nothing depends on other whole numbers there, and earlier
    releases refuse marked features.
    """
    if data.images or data.windows is not None:
        return [None] * data.table.x.width
    whole = ((data.sample == data.sample.round()) | data.sample.isnan()).all(dim=0)
    whole[data.table.x.width - sum(data.category_sizes) :] = False
    boolean = whole & (data.moments.low == 0.0) & (data.moments.high == 1.0)
    return [
        "boolean" if is_boolean else "whole" if is_whole and data.category_sizes else None
        for is_boolean, is_whole in zip(boolean.tolist(), whole.tolist(), strict=True)
    ]


def describe_data(data: PreparedData) -> Data:
    """Return the source of the rows in `data`, and the number of rows for each use."""
    return Data(
        source=data.table.source,
        rows=len(data.table.x),
        fingerprint=data.table.fingerprint,
        fit=len(data.split.fit),
        held_out=len(data.split.held_out),
        calibration=len(data.split.calibration),
        distinct=data.table.copies.distinct,
        neighbour_correlation=data.table.series_correlation,
    )


def _calibration(config: TrainConfig, data: PreparedData) -> CalibrationSize:
    rows, split = len(data.split.calibration), data.split
    folds = count_folds(config.model, len(split.order)) if isinstance(split, CrossSplit) else None
    return CalibrationSize(rows=rows, floor=1.0 / (rows + 1), method="cross" if folds else None, folds=folds)


def _timeline(data: PreparedData) -> Timeline | None:
    if data.table.timeline is None or not isinstance(data.split, TimeSplit):
        return None
    return summarise(data.table.timeline, data.split)


def _season(config: TrainConfig) -> Season | None:
    return Season(periods=list(config.season), time_zone=config.time_zone) if config.season else None


def _policy(pipeline: Pipeline, data: PreparedData) -> AppliedPolicy | None:
    """Return the policy, with the alpha that keeps its budget of alarms."""
    if data.policy is None:
        return None
    rule, alpha = data.policy.rules.alarms, None
    if rule.per_day is not None:
        scores = score_rows(pipeline, data.calibration).numpy()
        alpha = alpha_of_budget(rule, scores, data.rows.table.timeline, data.rows.split.calibration)
    return data.policy.model_copy(update={"alpha": alpha})


def software_versions() -> dict[str, str]:
    """Return the versions of the software that writes the artifact."""
    return {
        "elbo": version("elbo"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _parts(pipeline: Pipeline, data: PreparedData) -> list[str]:
    """Return the names of the parts of the score."""
    parts = pipeline.core.parts
    if data.conditions is not None:
        parts = (*parts, CONDITION_PART)
    if data.table.categories:
        return [*parts, RANGE_PART]
    return list(parts) if data.policy is None else data.policy.rules.parts(parts)


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics that are finite: a manifest holds no others. One extreme cell makes a likelihood infinite."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _manifest(
    chosen: Candidate,
    comparison: dict[str, dict[str, float]],
    data: PreparedData,
    golden: Golden,
    weights_sha256: str,
    baseline: Baseline | None,
) -> Manifest:
    table, pipeline = data.rows.table, chosen.pipeline
    scaled = data.moments.scaled(pipeline.scaling.shift, pipeline.scaling.scale)
    return Manifest(
        format_version=FORMAT_VERSION,
        name=chosen.config.name,
        kind=chosen.config.model,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        shape=list(table.shape),
        features=describe_features(data.source_rows),
        latents=pipeline.prior.means.shape[1],
        parts=_parts(pipeline, data),
        pixel_range=table.pixel_range,
        training=chosen.config.model_dump(),
        data=describe_data(data.source_rows),
        metrics=_finite(chosen.metrics),
        comparison={kind: _finite(metrics) for kind, metrics in comparison.items()},
        calibration=_calibration(chosen.config, data),
        golden=golden,
        versions=software_versions(),
        weights_sha256=weights_sha256,
        history=chosen.recorder.history,
        latent_report=describe_latents(pipeline.core, pipeline.core_inputs(data.held_out_inputs)),
        spectrum=data.spectrum(pipeline.scaling).tolist(),
        total_variance=float(scaled.variance.sum()),
        log_scale=0.0 if data.windows else density_scale(pipeline.core, pipeline.scaling),
        warnings=chosen.warnings,
        timeline=_timeline(data.rows),
        window=data.windows and data.windows.window,
        groups=[] if baseline is None else list(baseline.groups),
        season=_season(chosen.config),
        incident_rows=chosen.config.incident_rows,
        policy=_policy(pipeline, data),
        conditions=None if data.conditions is None else data.conditions.known,
        categories=list(table.categories),
    )
