"""Write the report of a finished run, the model card and the plots, into the folder of its version."""

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
PLOTTED_ROWS = 5_000  # held-out rows that are plotted: more make no visible difference


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
    """Write card.md and the plots of `version` of the model into `folder`, which is created.

    The model is already published, so a failure becomes a note to `report` and the rest is still written.

    Args:
        held_out: rows [M, D], raw units, NaN where a value is missing.
        labels: labels [M] of those rows, for the colours of the map.
        label_names: name of each label, if labels have names.
        notes: messages that the user saw about the data and the training.
    """
    written: list[str] = []
    try:
        from training.reports.plots import FittedModel, render_plots

        folder.mkdir(parents=True, exist_ok=True)
        rows, colours = held_out[:PLOTTED_ROWS], None if labels is None else labels[:PLOTTED_ROWS]
        _write(folder, render_plots(FittedModel(manifest, pipeline, rows, colours, label_names)), written)
    except (
        ImportError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # matplotlib raises ValueError for degenerate data
        reason = " ".join(str(error).split())
        report.note(f"warning: failed to draw some plots in {folder} ({reason})")
    for warning in write_card(folder, manifest, version, notes, written):
        report.note(warning)


def write_card(folder: Path, manifest: Manifest, version: int, notes: Sequence[str], plots: Sequence[str]) -> list[str]:
    """Write card.md into `folder`, which is created. Return a warning, as a list, if that fails.

    Args:
        plots: names of the plots in `folder`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).write_text(card(manifest, version, notes, plots), encoding="utf-8")
    except OSError as error:
        return [
            f"warning: failed to write the model card in {folder} ({error.strerror}): free space there, or set --runs"
        ]
    return []


def _write(folder: Path, plots: Iterable[tuple[str, bytes]], written: list[str]) -> None:
    for name, png in plots:
        (folder / f"{name}.png").write_bytes(png)
        written.append(name)
