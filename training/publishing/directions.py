"""`elbo directions`: publish a model again with the mean latents of labels, towards which POST /edit can move rows.

The direction of a label is the difference between the mean latents of the rows with the label and of the other rows
(Larsen et al., "Autoencoding beyond pixels using a learned similarity metric", 2016, section 4.2). Networks, scores
and calibration stay as they are.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import torch
from sklearn.metrics import roc_auc_score

from models import artifact
from models.artifact import Artifact
from models.keys import PrivateKey
from models.manifest import Manifest
from training.data.row_store import Floats
from training.data.row_stream import BATCH_ROWS
from training.data.table import Table
from training.data.windows import windows_for_model
from training.errors import DataError
from training.progress import SlowProgress
from training.publishing.recalibrate import model_name, reference

MAX_LABELS = 1000
MIN_ROWS = 10  # rows that a label needs; the mean latents of fewer rows are mostly noise
MAX_LISTED = 5  # labels that a message lists
MAX_ROWS = 100_000  # rows that are encoded, chosen at random: more do not change the means


@dataclass(frozen=True)
class Direction:
    """One direction, for the report.

    Args:
        label: the name of the label.
        rows: how many rows have the label.
        separation: AUROC of the position along the direction as a test for the label, on the same rows: 1 if the
            direction separates the rows with the label from the others, 0.5 if it says nothing about the label.
    """

    label: str
    rows: int
    separation: float


@dataclass(frozen=True)
class Published:
    """The result of `publish_directions`."""

    path: Path
    directions: list[Direction]
    notes: list[str]  # messages for the user


def publish_directions(parent: Artifact, table: Table, root: Path, key: PrivateKey | None = None) -> Published:
    """Publish `parent` under `root` as the next version of its name, with the mean latents of the labels of `table`.

    Labels that an earlier call has added stay, unless `table` has them too. Labels with fewer than MIN_ROWS rows get no
    direction of their own; their rows count among the others.

    Args:
        parent: the model.
        table: labelled rows, the result of `read_for_model` for the manifest of `parent`.
        root: the artifact folder.
        key: signs the new version. The signature of `parent` is not valid for it.

    Raises:
        DataError: the model has no latents, or the rows have no labels, only one label, too many labels, or no label
            with MIN_ROWS rows; or features are scaled by group, so that latents of different groups cannot be compared.
        ArtifactUnwritable: the new version cannot be written to `root`.
    """
    artifact.require_writable(root, model_name(parent))
    if parent.manifest.only_reconstructs:
        raise DataError(
            f"{reference(parent)} was adopted without an encoder and a decoder: expected a model with latents; adopt "
            "the module again with encode= and decode="
        )
    if parent.baseline is not None and parent.baseline.features is not None:
        raise DataError(
            f"{reference(parent)} was trained with --scale-by-group: expected a model whose latents can be compared "
            "between groups; train it without --scale-by-group"
        )
    rows, labels = _labelled_rows(table)
    windows = windows_for_model(table.x, table.timeline, parent.manifest, table.source)
    if windows is not None:
        is_judged = windows.judged[rows]
        rows, labels = rows[is_judged], labels[is_judged]
    chosen = np.sort(np.random.RandomState(0).permutation(len(rows))[:MAX_ROWS])
    rows, labels = rows[chosen], labels[chosen]
    latents = _encode(parent, table.inputs if windows is None else windows, rows, table.source)
    names, counts = np.unique(labels, return_counts=True)
    kept = names[counts >= MIN_ROWS]
    if len(names) < 2 or not len(kept):
        raise DataError(
            f"{table.source} has {len(names)} labels, of which {len(kept)} have at least {MIN_ROWS} rows: expected at "
            f"least two labels, and {MIN_ROWS} rows for one of them; add rows, or name another column with --label"
        )
    exhibits = {name: content for name, content in parent.exhibits.items() if name != artifact.DIRECTIONS}
    sketch = artifact.read_trained_rows(parent)
    if sketch is not None:
        exhibits[artifact.TRAINED_ROWS] = sketch
    new = [_entry(latents, labels, name) for name in kept]
    exhibits[artifact.DIRECTIONS] = orjson.dumps([*new, *_entries_of(parent, excluded=set(kept.tolist()))])
    manifest = _manifest(parent)
    twin = None if parent.twin is None else parent.twin.graphs
    path = artifact.publish(artifact.thaw(parent), manifest, root, twin, exhibits, key)
    # The notes on normal and anomalous labels do not matter here.
    notes = [note for note in (*table.notes, *table.warnings) if "--normal" not in note]
    rare = [repr(str(name)) for name in names[counts < MIN_ROWS]]
    if rare:
        more = f" and {len(rare) - MAX_LISTED} more" if len(rare) > MAX_LISTED else ""
        notes.append(f"labels with fewer than {MIN_ROWS} rows get no direction: {', '.join(rare[:MAX_LISTED])}{more}")
    return Published(path, _directions(latents, labels, new), notes)


def _labelled_rows(table: Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.str_]]:
    """Return the indices of the rows [N], and the name of the label of each, [N]. Raise DataError if there are none."""
    if table.labels is None:
        raise DataError(
            f"{table.source} has no labels: expected a column of labels, such as label or species (name it with "
            "--label), an array y or labels in an .npz file, or a folder with one subfolder of images per label"
        )
    names = table.label_names
    values, inverse = np.unique(table.labels, return_inverse=True)
    if len(values) > MAX_LABELS:
        raise DataError(
            f"{table.source} has {len(values):,} different labels: expected at most {MAX_LABELS:,}; name a column of "
            "labels with --label"
        )
    texts = np.array([str(value) if names is None else names[value] for value in values.tolist()])
    return np.arange(len(table.labels)), texts[inverse]


def _encode(parent: Artifact, source: Any, rows: npt.NDArray[np.int64], name: str) -> Floats:
    """Return the mean latents [N, K] of the rows at `rows` of `source`, which are rows or windows."""
    count = parent.manifest.latents  # without a condition
    latents = np.empty((len(rows), count), np.float32)
    progress = SlowProgress(f"encoding {name}", len(rows))
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH_ROWS):
            some = rows[start : start + BATCH_ROWS]
            x = torch.from_numpy(source.take(some)).to(parent.device)
            latents[start : start + len(some)] = parent.module.encode(x)[0][:, :count].cpu().numpy()
            progress.advance(len(some))
    if not np.isfinite(latents).all():
        raise DataError(f"{name} has rows whose latents are not finite: check their scale and units")
    return latents


def _entry(latents: Floats, labels: npt.NDArray[np.str_], name: str) -> dict[str, Any]:
    """Return the entry of one label in the exhibit DIRECTIONS, from latents [N, K] of rows with `labels` [N]."""
    has_label = labels == name
    mean, others = (latents[rows].mean(axis=0, dtype=np.float64).tolist() for rows in (has_label, ~has_label))
    return {"label": str(name), "rows": int(has_label.sum()), "mean": mean, "others": others}


def _entries_of(parent: Artifact, excluded: set[str]) -> list[dict[str, Any]]:
    """Return the entries in the exhibit DIRECTIONS of `parent`, without those of the labels in `excluded`."""
    entries = orjson.loads(parent.exhibits.get(artifact.DIRECTIONS, b"[]"))
    return [entry for entry in entries if entry["label"] not in excluded]


def _directions(latents: Floats, labels: npt.NDArray[np.str_], entries: list[dict[str, Any]]) -> list[Direction]:
    """Return the report on the labels in `entries`. See `Direction`."""
    found = []
    for entry in entries:
        along = latents @ np.subtract(entry["mean"], entry["others"])
        separation = float(roc_auc_score(labels == entry["label"], along))
        found.append(Direction(entry["label"], entry["rows"], separation))
    return found


def _manifest(parent: Artifact) -> Manifest:
    """Return the manifest of the new version, which differs in its name and time only."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return parent.manifest.model_copy(update={"name": model_name(parent), "created": created})
