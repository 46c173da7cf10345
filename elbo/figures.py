"""The figures of `elbo.Model`, drawn by matplotlib without pyplot, which would have global state and need a display."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elbo.errors import NotSupportedError
from elbo.sources import Labels
from elbo.verdicts import Verdict
from models.artifact import CALIBRATION, HELD_OUT, Artifact
from models.manifest import Manifest
from training.errors import DataError
from training.reports import plots
from training.reports.plots import BLUE, GREY, ORANGE, PlottedModel

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
MAX_ROWS = 5_000  # rows in a figure; more make no visible difference
BINS = 40
WIDE = 30  # if the largest score is more than this many times the median, the axes of scores are logarithmic


def samples(plotted: PlottedModel, seed: int) -> Figure:
    """Return a figure with samples from the prior beside rows."""
    return _draw(plots.samples, replace(plotted, seed=seed))


def reconstructions(plotted: PlottedModel) -> Figure:
    """Return a figure with rows and their reconstructions."""
    return _draw(plots.reconstructions, plotted)


def latents(plotted: PlottedModel) -> Figure:
    """Return a map of the latents of rows."""
    return _draw(plots.latent_map, plotted)


def history(manifest: Manifest) -> Figure:
    """Return a figure with the terms of the loss by epoch. Raises NotSupportedError without 2 epochs."""
    if len(manifest.history) < 2:
        raise NotSupportedError(
            f"{manifest.name} has no history: expected a model that was trained for at least 2 epochs"
        )
    with plots.in_style():
        return plots.draw_history(manifest)


def scores(loaded: Artifact, found: Array, threshold: float | None, alpha: float) -> Figure:
    """Return a figure with the scores of rows, [B], in their order, beside the scores of the calibration set."""
    scores = found[np.isfinite(found)].astype(np.float64)
    if not len(scores):
        raise DataError("the scores of all rows overflow float32: expected rows nearer to the training data")
    exhibit = loaded.exhibits.get(CALIBRATION)
    usual = np.array(json.loads(exhibit)["scores"]) if exhibit else np.zeros(0)
    with plots.in_style():
        figure, (left, right) = plots.new_figure(1, 2, 5.2, 3.8)
        anomalous = np.zeros(len(scores), bool) if threshold is None else scores > threshold
        numbers = np.arange(len(scores))
        for chosen, colour, label in ((~anomalous, BLUE, "normal"), (anomalous, ORANGE, "anomalous")):
            left.plot(numbers[chosen], scores[chosen], ".", color=colour, markersize=4, label=label)
        left.set_xlabel("row")
        left.set_ylabel("score, higher is more anomalous")
        left.set_title(f"{int(anomalous.sum()):,} of {len(scores):,} rows anomalous")
        is_logarithmic = scores.min() > 0 and scores.max() > WIDE * np.median(scores)
        _histograms(right, scores, usual, logarithmic=is_logarithmic)
        right.set_xlabel("score")
        right.set_ylabel("share of the rows")
        right.set_title("distribution of the scores")
        if threshold is not None:
            left.axhline(threshold, color=GREY, linestyle="--", linewidth=1.4, label=f"threshold at alpha {alpha:g}")
            right.axvline(threshold, color=GREY, linestyle="--", linewidth=1.4)
        if is_logarithmic:
            left.set_yscale("log")
            right.set_xscale("log")
        figure.legend(loc="outside lower center", ncols=5)
    return figure


def _histograms(axis: Axes, found: Floats, usual: Floats, *, logarithmic: bool) -> None:
    """Draw the distributions of the scores of rows and of calibration rows."""
    both = np.concatenate((found, usual))
    both = both[both > 0] if logarithmic else both
    spaced = np.geomspace if logarithmic else np.linspace
    bins = spaced(both.min(), max(both.max(), both.min() + 1e-9), BINS + 1).tolist()
    if len(usual):
        axis.hist(usual, bins, weights=np.full(len(usual), 1 / len(usual)), color="#BBBBBB", label="calibration rows")
    weights = np.full(len(found), 1 / len(found))
    axis.hist(found, bins, weights=weights, histtype="step", color="black", linewidth=1.4, label="these rows")


def explanation(manifest: Manifest, verdict: Verdict) -> Figure:
    """Return a figure that explains the verdict on one row. For an image, `verdict` has all features."""
    with plots.in_style():
        figure = _image_explanation(manifest, verdict) if manifest.is_image else _bars(manifest, verdict)
        figure.suptitle(f"score {verdict.score:.4g}, p-value {verdict.p_value:.3g}")
    return figure


def _bars(manifest: Manifest, verdict: Verdict) -> Figure:
    units = {feature.name: feature.unit for feature in manifest.features}
    found = verdict.features
    figure, (axis,) = plots.new_figure(1, 1, 7.2, 1.3 + 0.36 * len(found))
    axis.barh(range(len(found)), [each.contribution for each in found], color=BLUE, height=0.7)
    axis.set_yticks(range(len(found)), [each.name for each in found])
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("contribution [squared standard deviations of normal rows]")
    axis.set_xlim(0, 1.45 * max(each.contribution for each in found) + 1e-9)
    for index, each in enumerate(found):
        unit = units.get(each.name)  # a column of text is no feature: each of its levels is one
        text = f"  {_shown(each.value, unit)}, expected {_shown(each.expected, unit)}"
        axis.text(each.contribution, index, text, va="center", fontsize=9)
    return figure


def _shown(value: float | str | None, unit: str | None) -> str:
    """Return the value of a feature with its unit, or the level of a column of text; "?" for an unknown level."""
    if isinstance(value, str | None):
        return value or "?"
    return f"{value:.4g} {unit}" if unit else f"{value:.4g}"


def _image_explanation(manifest: Manifest, verdict: Verdict) -> Figure:
    by_name = {each.name: each for each in verdict.features}
    ordered = [by_name[name] for name in (feature.name for feature in manifest.features)]
    value, expected, contribution = (
        np.array([getattr(each, name) for each in ordered]) for name in ("value", "expected", "contribution")
    )
    figure, axes = plots.new_figure(1, 3, 2.6, 3.2, show_axes=False)
    for axis, image, title in zip(axes, (value, expected), ("row", "expected"), strict=False):
        plots.draw_image(axis, image, manifest)
        axis.set_title(title)
    picture = plots.picture(contribution, manifest.shape)
    axes[2].imshow(picture if picture.ndim == 2 else picture.mean(axis=2), cmap="magma")
    axes[2].set_title("contribution")
    return figure


def _draw(draw: Callable[[PlottedModel], Figure], plotted: PlottedModel) -> Figure:
    with plots.in_style():
        return draw(plotted)


def plotted_model(
    loaded: Artifact, inputs: Array, labels: npt.NDArray[Any] | None, label_names: list[str] | None, title: str
) -> PlottedModel:
    """Return the model and the rows for the plots of `training.reports.plots`.

    Args:
        loaded: the artifact.
        inputs: the inputs of its module for the rows, as `Model.inputs` returns them.
        labels: numbers of the labels of the rows, [B].
        label_names: the names of labels 0, 1, ..., if known.
        title: what the plots call the rows.
    """
    return PlottedModel(
        manifest=loaded.manifest,
        pipeline=loaded.module,
        inputs=torch.from_numpy(inputs),
        labels=labels,
        label_names=label_names,
        title=title,
    )


def codes_of(labels: Labels | None, rows: int) -> tuple[npt.NDArray[Any] | None, list[str] | None]:
    """Return labels as numbers, [B], with the name of each number. Raises DataError unless there is one per row."""
    if labels is None:
        return None, None
    values = np.array(labels.tolist() if hasattr(labels, "tolist") else list(labels))
    if len(values) != rows and not len(values) > rows == MAX_ROWS:
        raise DataError(f"labels has {len(values)} entries for {rows} rows: expected one per row")
    distinct, codes = np.unique(values.astype(np.str_) if values.dtype.kind == "O" else values, return_inverse=True)
    return codes[:rows], [str(value) for value in distinct.tolist()]


class HeldOut(NamedTuple):
    """The held-out rows in an artifact, [M, D], with their labels, [M]."""

    rows: Array
    labels: npt.NDArray[Any] | None
    label_names: list[str] | None


def read_held_out(loaded: Artifact) -> HeldOut:
    """Return the held-out rows in the artifact.

    Raises:
        NotSupportedError: the artifact has none.
    """
    manifest, exhibit = loaded.manifest, loaded.exhibits.get(HELD_OUT)
    if exhibit is None or manifest.window is not None:
        raise NotSupportedError(f"{manifest.name} has no held-out rows in its artifact: pass rows to this method")
    held_out = json.loads(exhibit)
    rows = np.array(held_out["inputs"], np.float32).reshape(-1, manifest.width)[:MAX_ROWS]
    labels = held_out["labels"]
    return HeldOut(rows, None if labels is None else np.array(labels)[: len(rows)], held_out["label_names"])
