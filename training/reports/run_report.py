"""Write the report of a finished run: the model card and the plots."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt
from torch import Tensor

from models.manifest import Manifest
from models.pipeline import Pipeline
from models.windowed import Windowed
from training.progress import Reporter
from training.reports.model_card import card

FILE_NAME = "card.md"
PLOTTED_ROWS = 5_000  # maximum number of held-out rows to plot; more rows make no visible difference


def write_run(
    folder: Path,
    manifest: Manifest,
    pipeline: Pipeline | Windowed,
    *,
    version: int,
    held_out: Tensor,
    labels: npt.NDArray[Any] | None,
    label_names: list[str] | None,
    notes: Sequence[str],
    draw: bool,
    report: Reporter,
) -> None:
    """Write card.md and, if `draw` is true, the plots into `folder`, which is created if needed.

    The model is already published. A failure is therefore reported as a warning, and the other files are still written.

    Args:
        version: the published version of the model.
        held_out: rows [M, D], raw units, NaN where a value is missing; or windows [M, N, D].
        labels: labels [M] of the held-out rows; they set the colours in the map of latents.
        label_names: the names of labels 0, 1, ..., if known.
        notes: messages about the data and the training, repeated in the card.
    """
    plots: list[str] = []
    if draw:
        some_labels = None if labels is None else labels[:PLOTTED_ROWS]
        plots = _draw_plots(folder, manifest, pipeline, held_out[:PLOTTED_ROWS], some_labels, label_names, report)
    for warning in write_card(folder, manifest, version, notes, plots):
        report.note(warning)


def _draw_plots(
    folder: Path,
    manifest: Manifest,
    pipeline: Pipeline | Windowed,
    held_out: Tensor,
    labels: npt.NDArray[Any] | None,
    label_names: list[str] | None,
    report: Reporter,
) -> list[str]:
    """Write the plots into `folder`. Return their names. A failure is reported as a warning."""
    drawn: list[str] = []
    report.stage("drawing the plots")
    try:
        with _temporary_matplotlib_folder():
            from training.reports.plots import PlottedModel, render_plots

        folder.mkdir(parents=True, exist_ok=True)
        model = PlottedModel(
            manifest=manifest,
            pipeline=pipeline,
            inputs=held_out,
            labels=labels,
            label_names=label_names,
        )
        for name, png in render_plots(model):
            (folder / f"{name}.png").write_bytes(png)
            drawn.append(name)
    # matplotlib may be missing (ImportError), and raises ValueError for degenerate data.
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        report.note(f"warning: failed to draw some plots in {folder} ({reason})")
    return drawn


@contextmanager
def _temporary_matplotlib_folder() -> Iterator[None]:
    """Let matplotlib write its list of fonts into a temporary folder when it is imported, not into the home folder.

    If MPLCONFIGDIR is set, matplotlib uses that folder.
    """
    if "MPLCONFIGDIR" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MPLCONFIGDIR"] = folder
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]


def write_card(folder: Path, manifest: Manifest, version: int, notes: Sequence[str], plots: Sequence[str]) -> list[str]:
    """Write card.md into `folder`, which is created if needed. Return a list with a warning if that fails, else [].

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
