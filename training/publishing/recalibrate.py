"""A published model calibrated anew: the same networks, what is normal for them today, as the next version.

Its score is a fixed function, so any rows that did not train it calibrate it as validly as those that were kept aside
for that: the p-values of rows exchangeable with them are exact again.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models import artifact
from models.artifact import Artifact
from models.calibration import Calibration
from models.manifest import VERSION, CalibrationSize, Golden, Manifest, Recalibration
from training.data.row_store import Floats
from training.data.table import MAX_HELD_OUT_ROWS, Table
from training.errors import DataError, FitError
from training.evaluation.score import batches, refuse_overflow
from training.progress import SlowProgress
from training.publishing import exhibits
from training.publishing.publish import software
from training.reports.model_card import card
from training.reports.run_report import write_card

SURPRISING = 1e-3  # probability of as many alarms, if the rows were like those of the calibration so far


@dataclass(frozen=True)
class Refreshed:
    """What `recalibrate` did."""

    path: Path
    manifest: Manifest
    notes: list[str]  # what the user must know


def recalibrate(parent: Artifact, table: Table, root: Path, alpha: float, runs: Path | None = None) -> Refreshed:
    """Publish `parent` under `root` as the next version of its name, calibrated on the normal rows of `table`.

    Networks, weights and scores stay what they are; calibration, golden answers and manifest are new. Where the labels
    are 0 and 1, the rows labelled 0 are the normal ones; without labels, all are. Of more than MOST_ROWS as many
    are drawn.

    Args:
        table: read like `parent`'s own rows.
        alpha: the smallest that alarms will be asked at: it decides how few rows are too few.
        runs: where the new version's card is written, in <name>/<version>/, if anywhere.

    Raises DataError, and FitError where the artifact is too old.
    """
    _refuse_training_rows(parent, table)
    normal, notes = _normal(table)
    chosen = np.sort(np.random.RandomState(0).permutation(normal)[:MAX_HELD_OUT_ROWS])
    _refuse_few(table, len(chosen), alpha)
    scores = _scores(parent, table)[chosen]
    notes = [*table.notes, *notes, *_compared(parent, table, scores, alpha)]
    module = artifact.thaw(parent)
    _replace(module, parent, torch.from_numpy(scores))
    manifest = _manifest(parent, module, table, _name(parent), len(chosen))
    twin = None if parent.twin is None else parent.twin.graphs  # they compute codes and scores, which have not changed
    shown = {name: content for name, content in parent.exhibits.items() if name == artifact.HELD_OUT}
    shown[artifact.CALIBRATION] = exhibits.calibration(module.calibration.scores)
    shown[artifact.CARD] = card(manifest, None, notes, ()).encode()
    path = artifact.publish(module, manifest, root, twin, shown)
    if runs is not None:
        folder = runs / manifest.name / path.parent.name
        notes += write_card(folder, manifest, int(path.parent.name), notes, [])
    return Refreshed(path, manifest, notes)


def _refuse_training_rows(parent: Artifact, table: Table) -> None:
    if table.fingerprint == parent.manifest.data.fingerprint:
        raise DataError(
            f"{table.source} holds the rows that {_reference(parent)} was trained on, on which its scores are too low: "
            "expected rows that it has not seen, such as those of the last days"
        )


def _normal(table: Table) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], list[str]]:
    """The numbers of the rows that count as normal, and a note on the others."""
    labels = table.labels
    if labels is None or not set(np.unique(labels)) <= {0, 1}:
        return np.arange(len(table.x)), []
    anomalous = int(labels.sum())
    return np.flatnonzero(labels == 0), [f"{anomalous:,} rows labelled 1 are left out"] if anomalous else []


def _refuse_few(table: Table, rows: int, alpha: float) -> None:
    needed = math.ceil(1.0 / alpha - 1e-9) - 1  # the smallest n with 1 / (n + 1) <= alpha
    if rows < max(needed, 1):
        allowed = f", which allow an alpha from {1 / (rows + 1):.3g} on" if rows else ""
        raise DataError(
            f"{table.source} has {rows} normal rows{allowed}: expected at least {needed} for alpha {alpha:g}; "
            "add rows, or say with --alpha the smallest that you will ask for"
        )


def _scores(parent: Artifact, table: Table) -> Floats:
    """The score [N] of every row."""
    scores = np.empty(len(table.x), np.float32)
    progress = SlowProgress(f"scoring {table.source}", len(table.x))
    with torch.inference_mode():
        for first, rows in batches(table):
            found = parent.module.score(torch.from_numpy(rows).to(parent.device))[0].cpu().numpy()
            refuse_overflow(found, first, table.source)
            scores[first : first + len(rows)] = found
            progress.advance(len(rows))
    return scores


def _compared(parent: Artifact, table: Table, scores: Floats, alpha: float) -> Iterator[str]:
    """How the rows of scores [n] look to the calibration so far; a warning where they are not like its own."""
    from scipy.stats import betabinom

    with torch.inference_mode():
        severity = parent.module.severity(torch.from_numpy(scores).to(parent.device), alpha).cpu().numpy()
    flagged, before = int((severity > 1).sum()), parent.manifest.calibration.rows
    share = 100 * flagged / len(scores)
    yield f"{_reference(parent)} calls {share:.3g} % of the rows of {table.source} anomalous at alpha {alpha:g}"
    may = math.floor(alpha * (before + 1) + 1e-6)
    if may and betabinom(len(scores), may, before + 1 - may).sf(flagged - 1) < SURPRISING:
        yield (
            "warning: that is more than chance explains. Either what is normal has moved, or there are anomalies among "
            f"the rows, which count as normal from now on: look at them with elbo score {_reference(parent)} "
            f"{table.source}"
        )


def _replace(module: torch.jit.ScriptModule, parent: Artifact, scores: Tensor) -> None:
    """Put the calibration on `scores` [n] in the place of the one in `module`. Raises FitError if it does not fit."""
    fresh = Calibration(scores)
    new, old = dict(fresh.named_buffers()), dict(module.calibration.named_buffers())
    same = new.keys() == old.keys()
    for key in new if same else ():
        setattr(module.calibration, key, new[key])
    alpha = artifact.GOLDEN_ALPHA
    if not (
        same
        and torch.equal(module.p_value(scores), fresh.p_value(scores))
        and torch.equal(module.severity(scores, alpha), fresh.severity(scores, alpha))
    ):
        raise FitError(f"{_reference(parent)} calibrates in another way than this Elbo: train it again")


def _manifest(parent: Artifact, module: torch.jit.ScriptModule, table: Table, name: str, rows: int) -> Manifest:
    old = parent.manifest
    origin = Recalibration(
        parent=_reference(parent),
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
            "versions": software(),
            "weights_sha256": artifact.weights_sha256(module),
        }
    )


def _golden(module: torch.jit.ScriptModule, old: Golden) -> Golden:
    """What `module` answers now to the questions of the version before."""
    inputs = (torch.from_numpy(np.array(old.inputs[key], np.float32)) for key in ("x", "noise", "choice"))
    return artifact.record_golden(module, *inputs)


def _name(parent: Artifact) -> str:
    """What `parent` is served as: the name of its folder, where it lies in one of versions."""
    path = parent.path.resolve()
    return path.parents[1].name if VERSION.fullmatch(path.parent.name) else parent.manifest.name


def _reference(parent: Artifact) -> str:
    return f"{_name(parent)}@{parent.path.resolve().parent.name}"
