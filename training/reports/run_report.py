"""What a finished run leaves for a person: the card and the pictures, in the folder of its version."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
from torch import Tensor

from models.manifest import Manifest
from models.pipeline import Pipeline
from training.progress import Reporter
from training.reports.model_card import card

FILE_NAME = "card.md"
LOOKED_AT = 5_000  # held-out rows that the pictures are made from: more change nothing that can be seen


def write_run(
    folder: Path,
    manifest: Manifest,
    version: int,
    pipeline: Pipeline,
    held_out: Tensor,
    labels: npt.NDArray[Any] | None,
    label_names: list[str] | None,
    notes: Sequence[str],
    report: Reporter,
) -> None:
    """Write card.md and the pictures of the model `manifest`@`version` into `folder`, which is made.

    What fails is noted to `report` and costs no more than itself: the model is published already.

    Args:
        held_out: rows [M, D], raw units, NaN where a value is missing.
        labels: of those rows [M], for the colours of the map.
        label_names: by label, where it has a name.
        notes: what the user was told of the data and of the training.
    """
    written: list[str] = []
    try:
        from training.reports.plots import Seen, drawn_pictures

        folder.mkdir(parents=True, exist_ok=True)
        rows, colours = held_out[:LOOKED_AT], None if labels is None else labels[:LOOKED_AT]
        _write(folder, drawn_pictures(Seen(manifest, pipeline, rows, colours, label_names)), written)
    except (ImportError, OSError, ValueError, RuntimeError) as error:  # ValueError: what figures without sense raise
        reason = " ".join(str(error).split())
        report.note(f"warning: not all pictures of the run could be drawn in {folder} ({reason})")
    for warning in write_card(folder, manifest, version, notes, written):
        report.note(warning)


def write_card(
    folder: Path, manifest: Manifest, version: int, notes: Sequence[str], pictures: Sequence[str]
) -> list[str]:
    """Write card.md of `manifest`@`version` into `folder`, which is made; a warning in place of an error.

    Args:
        pictures: names of those that lie there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).write_text(card(manifest, version, notes, pictures), encoding="utf-8")
    except OSError as error:
        return [f"warning: no card in {folder} ({error.strerror}): make room there, or set --runs"]
    return []


def _write(folder: Path, pictures: Iterable[tuple[str, bytes]], written: list[str]) -> None:
    for name, png in pictures:
        (folder / f"{name}.png").write_bytes(png)
        written.append(name)
