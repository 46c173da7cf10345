"""`elbo calibrate`: publish a model again with a new calibration set and the same networks.

After training, the score is a fixed function. It can therefore be calibrated on any rows that were not used to train
the model. The p-values are valid for rows that are exchangeable with the calibration rows.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models import artifact
from models.artifact import Artifact
from models.baseline import BaselineBuffers
from models.calibration import Calibration
from models.completion import COMPLETING
from models.errors import join_names
from models.keys import PrivateKey
from models.levels import sizes_of
from models.manifest import (
    VERSION,
    CalibrationSize,
    Golden,
    Manifest,
    Recalibration,
    Timeline,
    calibration_rows_needed,
    version_folder,
)
from models.onnx_check import check_twin
from models.pipeline import Pipeline
from models.policy_rules import AppliedPolicy, FeatureRule, Policy
from models.windowed import Windowed
from training.data.policy_file import Kept, keep_calibration_rows
from training.data.row_fingerprints import KnownRows, find_known_rows
from training.data.row_store import Floats
from training.data.row_stream import BATCH_ROWS
from training.data.table import MAX_HELD_OUT_ROWS, Table
from training.data.time_split import period_of
from training.data.windows import TableWindows, refuse_short_windows, windows_for_model
from training.errors import DataError, FitError
from training.evaluation.alarm_rates import alarm_rate
from training.evaluation.score import flagged_at, refuse_overflow
from training.evaluation.worth import ABOUT_THRESHOLD, threshold_warning
from training.fitting.baseline import describe_groups, fit_start_sets
from training.fitting.budget import alpha_of_budget
from training.fitting.feature_baseline import scale_for_baseline
from training.fitting.policy import SCALING_REFUSAL, ceiling, fit_policy, fit_usual_score, set_calibration, valid_range
from training.progress import SlowProgress
from training.publishing.exhibits import calibration_json
from training.publishing.gap_recalibration import refit_gap_scores, split_for_gaps
from training.publishing.onnx_export import export
from training.publishing.publish import software_versions
from training.reports.model_card import card
from training.reports.run_report import write_card


@dataclass(frozen=True)
class Recalibrated:
    """The result of `recalibrate`."""

    path: Path
    manifest: Manifest
    notes: list[str]  # messages for the user


def recalibrate(
    parent: Artifact,
    table: Table,
    root: Path,
    alpha: float,
    runs: Path | None = None,
    *,
    force: bool = False,
    key: PrivateKey | None = None,
    policy: Policy | None = None,
    incident_rows: int | None = None,
) -> Recalibrated:
    """Publish `parent` under `root` as the next version of its name, calibrated on the normal rows of `table`.

    Networks and weights do not change, and scores only with a new policy. Calibration, golden answers and manifest are
    replaced. A row is normal if its label means normal. Without labels, or if it is unknown which labels mean normal,
    all rows count as normal. Of copies of a row without a time, one is used. If the model has a window, rows with too
    few rows before them are left out. At most MAX_HELD_OUT_ROWS normal rows, chosen at random, are used.

    Args:
        table: the result of `read_for_model` for the manifest of `parent`.
        force: calibrate even if the old calibration flags all rows.
        alpha: the smallest alpha that you will use; it determines how many rows are needed.
        key: signs the new version. The signature of `parent` is not valid for it.
        policy: the new policy, which replaces that of `parent`; without rules, the new version has no policy. None: the
            policy stays.
        incident_rows: after how many rows an incident counts as a change; None: as before.
        runs: folder in which the card of the new version is written to <name>/<version>/card.md; None to write no card.

    Raises:
        DataError: the model was trained on some of these rows or flags all of them, too few rows are normal, it is
            unknown which of two labels means normal, or the pixels of images are in another range.
        FitError: the artifact comes from a version of Elbo that calibrates differently, or the new policy has rules for
            features, but the model is scaled by group.
        ArtifactUnwritable: the new version cannot be written to `root`.
    """
    artifact.require_writable(root, model_name(parent))
    _refuse_pixels(table)
    _refuse_options(parent, policy, incident_rows)
    normal, notes = _normal_rows(table)
    kept = _keep(policy or _policy_of(parent), table, normal)
    if kept is not None:
        normal, notes = kept.rows, [*notes, *kept.notes(table)]
    normal, of_levels = _without_unknown_levels(table, normal)
    notes += of_levels
    known_rows = artifact.read_trained_rows(parent)
    notes += _refuse_training_rows(parent, table, normal, known_rows)
    windows = windows_for_model(table.x, table.timeline, parent.manifest, table.source)
    normal = _judged_once(table, windows, normal)
    chosen = np.sort(np.random.RandomState(0).permutation(normal)[:MAX_HELD_OUT_ROWS])
    gaps = split_for_gaps(parent.module, table, chosen, alpha)
    chosen, notes = gaps.calibration, [*notes, *gaps.notes]
    _refuse_few(table, len(chosen), alpha)
    scores = _scores(parent.module, parent.device, table, windows, chosen)
    notes = [*table.notes, *table.warnings, *notes, *_compare_with_old(parent, table, scores, alpha)]
    if not force:
        _refuse_if_all_flagged(parent, table, scores, alpha)
    module = artifact.thaw(parent)
    twin = None if parent.twin is None else parent.twin.graphs
    model = None
    rescore = partial(_scores, parent.module, parent.device)
    if kept is not None and kept.policy.features != _features_of(parent):
        model = _with_policy(module, parent, kept.policy)
        module = artifact.script(model)  # before any call: torch cannot compile a model that has run its chains
    if refit_gap_scores(module, table, gaps) or model is not None:
        rescore = partial(_scores, module, torch.device("cpu"))
        scores = rescore(table, windows, chosen)
    _replace(module, parent, torch.from_numpy(scores))
    if model is not None:  # otherwise complete rows keep their scores, and the twin stays valid
        set_calibration(model.pipeline if isinstance(model, Windowed) else model, torch.from_numpy(scores))
        twin = twin and _new_twin(model, parent, notes)
    notes += _replace_start_sets(module, parent, table, windows, normal, rescore)
    warning = threshold_warning(Calibration(torch.from_numpy(scores)), alpha)
    applied = _apply(kept, scores, parent, table, chosen)
    manifest = _manifest(parent, module, table, model_name(parent), chosen, warning, applied)
    if incident_rows is not None:
        manifest = manifest.model_copy(update={"incident_rows": incident_rows})
    kept_exhibits = (artifact.HELD_OUT, artifact.DIRECTIONS)  # they are about latents, which stay
    exhibits = {name: content for name, content in parent.exhibits.items() if name in kept_exhibits}
    if known_rows is not None:
        exhibits[artifact.TRAINED_ROWS] = known_rows
    exhibits[artifact.CALIBRATION] = calibration_json(_calibration_of(module, parent).scores)
    exhibits[artifact.CARD] = card(manifest, None, notes, ()).encode()
    path = artifact.publish(module, manifest, root, twin, exhibits, key)
    if runs is not None:
        folder = version_folder(runs, manifest.name, int(path.parent.name))
        notes += write_card(folder, manifest, int(path.parent.name), notes, [])
    if warning is not None:
        notes.append(warning)
    return Recalibrated(path, manifest, notes)


def _refuse_pixels(table: Table) -> None:
    """Raise DataError if the pixels of `table` are in another range than those of the training."""
    if table.pixel_warning:
        raise DataError(
            f"{table.source}: {table.pixel_warning}; calibrated on these rows, the model would flag nothing"
        )


def _refuse_options(parent: Artifact, policy: Policy | None, incident_rows: int | None) -> None:
    """Raise DataError or FitError if the model cannot have the new policy, or has no incidents."""
    if incident_rows is not None and parent.manifest.timeline is None:
        raise DataError(
            f"{reference(parent)} was trained without --time: expected a model with times, because only their rows "
            "have incidents; leave out --incident-rows, or train with --time"
        )
    if policy is not None and policy.changes_scores and parent.manifest.training.get("scale_by_group"):
        raise FitError(SCALING_REFUSAL)
    if policy is not None and parent.manifest.conditions is not None:
        raise DataError(
            f"{reference(parent)} was trained with --condition: expected a model without conditions, because only "
            "such a model can have a policy; leave out --policy"
        )


def _judged_once(table: Table, windows: TableWindows | None, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return `rows` without those that the model does not judge, and without further copies of rows without a time."""
    if windows is not None:
        if not windows.judged.any():
            refuse_short_windows(windows, table.source)
        rows = rows[windows.judged[rows]]
    if table.timeline is None:  # if the rows have times, each copy counts, as in training
        rows = rows[np.sort(np.unique(table.copies.groups[rows], return_index=True)[1])]  # copies count once
    return rows


def _refuse_training_rows(
    parent: Artifact, table: Table, normal: npt.NDArray[np.int64], sketch: bytes | None
) -> Iterator[str]:
    """Yield a note if a few of the `normal` rows trained the model. Raise DataError if many did."""
    known = KnownRows(0.0, 0.0, significant=False) if sketch is None else find_known_rows(sketch, table.x, normal)
    same_file = table.fingerprint == parent.manifest.data.fingerprint
    if same_file or known.significant:
        which = "the rows" if same_file else f"rows of which about {100 * known.share:.2g} % are among those"
        raise DataError(
            f"{table.source} holds {which} that {reference(parent)} was trained on, and scores of training rows "
            "are too low: expected rows that the model has not seen, such as those of the last days"
        )
    if known.share > known.usual:
        yield f"about {100 * known.share:.2g} % of the rows of {table.source} equal rows that trained the model"


def _refuse_if_all_flagged(parent: Artifact, table: Table, scores: Floats, alpha: float) -> None:
    if flagged_at(parent, scores, alpha).all():
        raise DataError(
            f"{reference(parent)} flags all rows of {table.source} at alpha {alpha:g}: calibrated on rows that are "
            "nothing like the training rows, it would flag nothing; check the columns, their units and their scale, or "
            "train a new model. If you know that the rows are normal, add --force"
        )


def _normal_rows(table: Table) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], list[str]]:
    """Return the indices of the normal rows, and notes on the rows that are left out.

    Raises:
        DataError: the rows have two labels, and it is unknown which of them means normal.
    """
    if table.normal is None:
        if len(table.present_labels) == 2:
            raise DataError(
                f"{table.source} has the labels {' and '.join(sorted(table.present_labels))}, and it is unknown which "
                "of them means normal: name it with --normal, because anomalous rows would spoil the calibration"
            )
        notes = ["all rows count as normal, whatever their labels"] if table.present_labels else []
        return np.arange(len(table.x)), notes
    left_out = len(table.x) - int(table.normal.sum())
    which = "without a normal label"
    if table.labels is not None:
        names = table.label_names
        values = np.unique(table.labels[~table.normal]).tolist()
        which = "labelled " + join_names([names[value] if names else str(value) for value in values])
    return np.flatnonzero(table.normal), [f"left out {left_out:,} rows {which}"] if left_out else []


def _refuse_few(table: Table, rows: int, alpha: float) -> None:
    needed = calibration_rows_needed(alpha)
    if rows < max(needed, 1):
        allowed = f", enough for alpha {1 / (rows + 1):.3g} or more" if rows else ""
        raise DataError(
            f"{table.source} has {rows} distinct normal rows{allowed}: expected at least {needed} for alpha {alpha:g}; "
            "add rows, or set --alpha to the smallest alpha that you will use"
        )


def _scores(
    model: Any, device: torch.device, table: Table, windows: TableWindows | None, rows: npt.NDArray[np.int64]
) -> Floats:
    """Return the scores of the rows at `rows` [n], in that order, by `model`, a pipeline on `device`."""
    scores = np.empty(len(rows), np.float32)
    progress = SlowProgress(f"scoring {table.source}", len(rows))
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH_ROWS):
            some = rows[start : start + BATCH_ROWS]
            x = torch.from_numpy((table.inputs if windows is None else windows).take(some)).to(device)
            scores[start : start + len(some)] = artifact.score(model, x)[0].cpu().numpy()
            progress.advance(len(some))
    refuse_overflow(scores, rows, table.source)
    return scores


def _without_unknown_levels(table: Table, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return `rows` without those that have a level that the model does not know, and notes for the user.

    Such rows are always anomalous, so they must not calibrate.
    """
    is_known = np.ones(len(rows), bool)
    for category in table.categories:
        for start in range(0, len(rows), table.x.block_rows):
            part = table.x.take(rows[start : start + table.x.block_rows])[:, category.features]
            is_known[start : start + len(part)] &= part.sum(axis=1) != 0  # true for NaN: the level is missing
    dropped = int((~is_known).sum())
    note = f"rows with a level that the model does not know calibrate nothing: {dropped:,}"
    return rows[is_known], [note] if dropped else []


def _with_policy(module: torch.jit.ScriptModule, parent: Artifact, rules: Policy) -> Pipeline | Windowed:
    """Return a model with a new policy and the other parts of `module`, the module of `parent`. Raise FitError."""
    if not hasattr(module, "observation"):
        raise FitError(f"{reference(parent)} comes from a release of Elbo without policies: train it again")
    names = [feature.name for feature in parent.manifest.features]
    window = parent.manifest.window
    of_rows = module if window is None else module.pipeline
    row_scaling, sizes = None if window is None else module.scaling, sizes_of(of_rows)
    policy = fit_policy(rules, names, of_rows.scaling, of_rows.explanation, row_scaling, sizes)
    class_ = COMPLETING.get(of_rows.original_name, Pipeline)
    further = {name: getattr(of_rows, name) for name in ("chains", "gap_scores") if hasattr(of_rows, name)}
    if hasattr(of_rows, "precision"):
        further["score_form"] = of_rows.centre, of_rows.precision
    if uncertainty := float(getattr(of_rows, "uncertainty", 0.0)):
        further["fit_rows"] = 1 + round(1.0 / uncertainty)
    pipeline = class_(
        of_rows.scaling,
        of_rows.core,
        of_rows.prior,
        of_rows.calibration,
        of_rows.explanation,
        of_rows.observation,
        policy,
        **further,
    ).eval()
    if hasattr(of_rows, "baseline"):
        pipeline.add_module("baseline", of_rows.baseline)
    model: Pipeline | Windowed = pipeline
    if window is not None:
        ranges = valid_range(rules, names)
        model = Windowed(module.scaling, module.summaries, pipeline, module.observation, ranges).eval()
    if policy is not None and policy.has_companions:
        held_out = parent.exhibits.get(artifact.HELD_OUT)
        if held_out is None or window is not None:
            kind = "rows" if window is None else "windows"
            raise FitError(
                f"{reference(parent)} has no held-out {kind} in its artifact, and alone=false of the policy needs "
                f"them: train it again with --policy{'' if window else ' and without --private'}"
            )
        rows = np.array(json.loads(held_out)["inputs"], np.float32).reshape(-1, parent.manifest.width)
        fit_usual_score(pipeline, torch.from_numpy(rows))
    return model


def _new_twin(model: Pipeline | Windowed, parent: Artifact, notes: list[str]) -> dict[str, artifact.Graph] | None:
    """Return the ONNX twin of `model`, which has another policy than `parent`. If there is none, add a note."""
    rows = torch.from_numpy(np.array(parent.manifest.golden.inputs["x"], np.float32))
    try:
        twin = export(model, rows, model.encode(rows)[0])
        for method, graph in twin.items():  # the compiled code of a VAE divides sizes, which no twin may
            check_twin(graph.onnx, json.dumps(graph.weights).encode(), method, parent.path)
        return twin
    except Exception as error:  # noqa: BLE001 - the exporter raises many types, and the twin is optional
        reason = " ".join(str(error).split())[:200]
        notes.append(f"note: the ONNX export failed ({reason}): the artifact has no ONNX twin, so serving is slower")
        return None


def _policy_of(parent: Artifact) -> Policy | None:
    return None if parent.manifest.policy is None else parent.manifest.policy.rules


def _features_of(parent: Artifact) -> dict[str, FeatureRule]:
    policy = _policy_of(parent)
    return {} if policy is None else policy.features


def _keep(policy: Policy | None, table: Table, normal: npt.NDArray[np.int64]) -> Kept | None:
    return None if policy is None else keep_calibration_rows(policy, table, normal)


def _apply(
    kept: Kept | None, scores: Floats, parent: Artifact, table: Table, rows: npt.NDArray[np.int64]
) -> AppliedPolicy | None:
    """Return the policy for the manifest, with the alpha that keeps its budget; None if there are no rules.

    Raises:
        FitError: no alpha keeps the budget.
    """
    if kept is None or kept.policy == Policy():
        return None
    alpha, rule, timeline = None, kept.policy.alarms, parent.manifest.timeline
    if rule.per_day is not None:
        step = None if timeline is None else timeline.usual_step_seconds
        alpha = alpha_of_budget(rule, scores, table.timeline, rows, step)
    return AppliedPolicy(rules=kept.policy, alpha=alpha, outside=kept.outside, silenced=kept.silenced)


def _compare_with_old(parent: Artifact, table: Table, scores: Floats, alpha: float) -> Iterator[str]:
    """Yield what share of the scores the old calibration flags, and a warning if chance cannot explain that share."""
    flagged = int(flagged_at(parent, scores, alpha).sum())
    share = 100 * flagged / len(scores)
    yield f"{reference(parent)} flags {share:.3g} % of the rows of {table.source} at alpha {alpha:g}"
    if alarm_rate(flagged, len(scores), parent.manifest.calibration.rows, alpha).is_too_high:
        yield (
            "warning: chance does not explain so many alarms. Either normal behaviour has changed, or the rows contain "
            "anomalies, which the new version treats as normal: check them with "
            f"elbo score {reference(parent)} {table.source}"
        )


def _calibration_of(module: torch.jit.ScriptModule, parent: Artifact) -> torch.jit.ScriptModule:
    """Return the part of `module`, the module of `parent`, that holds the calibration."""
    found: torch.jit.ScriptModule = (module if parent.manifest.window is None else module.pipeline).calibration
    return found


def _replace(module: torch.jit.ScriptModule, parent: Artifact, scores: Tensor) -> None:
    """Replace the calibration of `module` by one computed from `scores` [n]. Raise FitError if that is impossible."""
    fresh = Calibration(scores)
    calibration = _calibration_of(module, parent)
    new, old = dict(fresh.named_buffers()), dict(calibration.named_buffers())
    same = new.keys() == old.keys()
    for key in new if same else ():
        setattr(calibration, key, new[key])
    of_rows = module if parent.manifest.window is None else module.pipeline
    if same and getattr(of_rows, "policy", None) is not None:
        of_rows.policy.ceiling = ceiling(fresh)
    alpha = artifact.GOLDEN_ALPHA
    if not (
        same
        and torch.equal(module.p_value(scores), fresh.p_value(scores))
        and torch.equal(module.severity(scores, alpha), fresh.severity(scores, alpha))
    ):
        raise FitError(f"{reference(parent)} comes from a version of Elbo that calibrates differently: train it again")


def _replace_start_sets(
    module: torch.jit.ScriptModule,
    parent: Artifact,
    table: Table,
    windows: TableWindows | None,
    normal: npt.NDArray[np.int64],
    rescore: Callable[[Table, TableWindows | None, npt.NDArray[np.int64]], Floats],
) -> list[str]:
    """Replace the start sets of the groups by those of the `normal` rows of `table`. Return notes for the user.

    Args:
        windows: the windows of the rows; None if the model judges each row alone.
        rescore: returns the scores of rows of a table by the new version.
    """
    if parent.baseline is None:
        return []
    if table.timeline is None:
        return ["the start sets of the groups stay as they were, because the rows have no times"]
    score_as_pool = score = partial(rescore, table, windows)
    if parent.baseline.features is not None:
        scaled = scale_for_baseline(table, parent.baseline)
        score = partial(rescore, scaled, windows and replace(windows, x=scaled.x))
    baseline = fit_start_sets(parent.baseline, table.timeline, normal, score, score_as_pool)
    buffers = (module if parent.manifest.window is None else module.pipeline).baseline
    for name, buffer in BaselineBuffers(baseline.arrays).named_buffers():
        setattr(buffers, name, buffer)
    return list(describe_groups(baseline, table.timeline))


def _manifest(
    parent: Artifact,
    module: torch.jit.ScriptModule,
    table: Table,
    name: str,
    chosen: npt.NDArray[np.int64],
    warning: str | None,
    policy: AppliedPolicy | None,
) -> Manifest:
    """Return the manifest of the new version.

    Args:
        chosen: the calibration rows, as row numbers of `table`.
        warning: a warning about the threshold; None if the threshold is fine.
        policy: the policy of the new version; None if it has none.
    """
    old, rows = parent.manifest, len(chosen)
    kept = [text for text in old.warnings if not text.startswith(ABOUT_THRESHOLD)]
    origin = Recalibration(
        parent=reference(parent),
        parent_weights_sha256=old.weights_sha256,
        trained=old.recalibration.trained if old.recalibration else old.created,
        source=table.source,
        rows=len(table.x),
        fingerprint=table.fingerprint,
    )
    return old.model_copy(
        update={
            "name": name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "calibration": CalibrationSize(rows=rows, floor=1.0 / (rows + 1)),
            "recalibration": origin,
            "golden": _golden(module, old.golden),
            "versions": software_versions(),
            "weights_sha256": artifact.weights_sha256(module),
            "timeline": old.timeline and _timeline(old.timeline, table, chosen),
            "parts": old.parts if old.categories else (policy.rules if policy else Policy()).parts(old.parts),
            "policy": policy,
            "warnings": kept if warning is None else [*kept, warning],
        }
    )


def _timeline(old: Timeline, table: Table, rows: npt.NDArray[np.int64]) -> Timeline:
    """Return `old` with the period of the new calibration rows, which have the indices `rows` in `table`."""
    period = None if table.timeline is None else period_of(table.timeline, rows)
    blocks = [block.model_copy(update={"calibration": None}) for block in old.blocks]
    return old.model_copy(update={"calibration": period, "blocks": blocks})


def _golden(module: torch.jit.ScriptModule, old: Golden) -> Golden:
    """Return the golden answers of `module`, for the same inputs as `old`, the golden answers of the parent."""
    inputs = (torch.from_numpy(np.array(old.inputs[key], np.float32)) for key in ("x", "noise", "choice"))
    return artifact.record_golden(module, *inputs)


def model_name(parent: Artifact) -> str:
    """Return the name under which `parent` is served.

    This is the name of the model folder that contains the artifact, or the manifest's name if there is no such folder.
    """
    path = parent.path.resolve()
    return path.parents[1].name if VERSION.fullmatch(path.parent.name) else parent.manifest.name


def reference(parent: Artifact) -> str:
    """Return the name and the version of `parent` as one text, `name@version`."""
    return f"{model_name(parent)}@{parent.path.resolve().parent.name}"
