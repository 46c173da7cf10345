"""Plots of a finished run. Each function draws one figure, or returns None if there is nothing to show.

matplotlib is used without pyplot, so there is no global state and no display. The colours are Okabe & Ito's palette,
which colour-blind people can tell apart.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from models import artifact
from models.core import Core
from models.likelihood import GaussianLikelihood
from models.manifest import Manifest
from models.pipeline import Pipeline
from models.vae import VAE
from models.windowed import Windowed
from training.data.conditions import draw_conditions
from training.fitting.defaults import resolved_config
from training.random_streams import VALIDATION, random_stream

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
CLASSES = (BLUE, "#E69F00", GREEN, "#CC79A7", "#56B4E9", ORANGE, "#A89A00", "#000000", GREY, "#7F3C8D")
STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
}
DPI = 110
PLOTTED = 1_000  # number of held-out rows per scatter plot
FEATURES = 12  # maximum number of features of a table that are plotted
PAIRS = 10  # maximum number of images shown with their reconstructions
CURVES = (BLUE, ORANGE, GREEN, GREY, "black")
DRAWN_CHANNELS = (1, 3, 4)  # numbers of channels that matplotlib draws: grey, RGB, RGBA
TITLE_WIDTH = 4.6  # inches: width of half the title of the figure of reconstructions
GRID = 8  # number of images per side of the grid of samples
NAMES = {
    "reconstruction": "distortion: -E[log p(x|z)]",
    "kl": "rate: KL(q(z|x) || p(z))",
    "elbo": "-ELBO",
    "bound": "-bound",
    "squared_error": "squared error",
    "held_out_loss": "loss, held-out rows",
}
TIMES = ("epoch", "step", "seconds")
NEGATED = {"reconstruction", "elbo", "bound"}  # terms that rise as the loss falls; the plot shows minus the term
LOSSES = ("elbo", "bound", "squared_error", "held_out_loss", "loss")  # comparable terms, plotted on one axis

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PlottedModel:
    """A model with the rows that are plotted, usually held-out rows, and their latents and reconstructions."""

    manifest: Manifest
    pipeline: Pipeline | Windowed | torch.jit.ScriptModule
    # Held-out rows [M, D], raw units, NaN where a value is missing; or windows [M, N, D]; or rows with their
    # conditions, [M, D + C].
    inputs: Tensor
    labels: npt.NDArray[Any] | None  # [M]
    label_names: list[str] | None = None
    title: str = "held-out rows"  # what the titles of the plots call the rows
    seed: int = 0  # seed of the samples

    @property
    def core(self) -> Core:
        """Return the core of the pipeline, which may not be a frozen module."""
        core: Core = self.pipeline.pipeline.core if isinstance(self.pipeline, Windowed) else self.pipeline.core
        return core

    @property
    def x(self) -> Tensor:
        """Return the held-out rows [M, D]: the newest row of each window."""
        return self.inputs[:, : self.manifest.width] if self.inputs.ndim == 2 else self.inputs[:, -1]

    @cached_property
    def latents(self) -> Floats:
        """Return posterior means [M, K]."""
        with torch.inference_mode():
            return self.pipeline.encode(self.inputs)[0][:, : self.manifest.latents].double().numpy()

    @cached_property
    def x_hat(self) -> Floats:
        """Return reconstructions [M, D]."""
        with torch.inference_mode():
            x_hat: Floats = self.pipeline(self.inputs).double().numpy()
            return x_hat

    def sample(self, count: int) -> Floats:
        """Return rows [count, D] sampled from the generative prior with the seed of the model."""
        random = random_stream(self.seed, VALIDATION)
        with torch.inference_mode():
            noise = torch.randn(count, self.latents.shape[1], generator=random)
            choice = torch.rand(count, generator=random)
            if self.manifest.conditions is not None:
                noise = torch.cat((noise, draw_conditions(self.manifest.conditions, count, random)), dim=1)
            x = self.pipeline.decode(self.pipeline.draw(noise, choice))
            if not self.manifest.is_image:
                x = self.pipeline.observe(x, torch.randn(x.shape, generator=random))
            rows: Floats = x.double().numpy()
            return rows


def _published_epoch(manifest: Manifest) -> tuple[str, float]:
    """Return which epoch was published, "best" or "last", and its number."""
    if resolved_config(manifest).kept == "last":
        return "last", manifest.history[-1]["epoch"]
    return "best", min(manifest.history, key=lambda point: point.get("held_out_loss", np.inf))["epoch"]


def losses(model: PlottedModel) -> Figure | None:
    """Plot every term of the loss by epoch; None if there are fewer than two epochs."""
    return draw_history(model.manifest) if len(model.manifest.history) > 1 else None


def draw_history(manifest: Manifest) -> Figure:
    """Plot every term of the loss by epoch: comparable terms in one panel, each other term in a panel of its own."""
    history = manifest.history
    terms = list(dict.fromkeys(name for point in history for name in point if name not in TIMES))
    together = [name for name in terms if name in LOSSES]
    alone = [name for name in terms if name not in LOSSES]
    published, epoch = _published_epoch(manifest)
    figure, axes = new_figure(1, 1 + len(alone), 5.2, 3.8)
    for axis, names in zip(axes, [together, *([name] for name in alone)], strict=True):
        _curves(axis, history, names)
        axis.axvline(epoch, color=GREY, linestyle=":", linewidth=1.4, label=f"{published} epoch, {epoch:g}")
        axis.set_title(NAMES.get(names[0], names[0]) if names != together else "loss")
        _label_integer_axis(axis, "epoch")
        axis.legend()
    axes[0].set_ylabel("nats per row" if manifest.kind == "vae" else "model units² per row")
    return figure


def _curves(axis: Axes, history: list[dict[str, float]], names: list[str]) -> None:
    """Plot one line per term. The y axis ends at the highest value that occurs after the first fifth of the epochs."""
    lows, highs = [], []
    for name, colour in zip(names, CURVES, strict=False):
        points = [
            (point["epoch"], -point[name] if name in NEGATED else point[name]) for point in history if name in point
        ]
        epochs, values = np.array(points).T
        label = NAMES.get(name, name.replace("_", " ")) if len(names) > 1 else ""
        axis.plot(epochs, values, color=colour, label=label, linewidth=1.6, marker="." if len(points) < 15 else "")
        lows.append(values.min())
        highs.append(values[len(values) // 5 :].max())
    margin = 0.06 * (max(highs) - min(lows)) + 1e-12
    axis.set_ylim(min(lows) - margin, max(highs) + margin)


def latents(model: PlottedModel) -> Figure | None:
    """Plot how much information each latent carries, in descending order: the KL for a VAE, else the variance."""
    report = model.manifest.latent_report
    if not report:
        return None
    by_kl = report[0].kl is not None
    values = np.array([latent.kl if latent.kl is not None else latent.variance for latent in report])
    order = np.argsort(-values, kind="stable")
    figure, (axis,) = new_figure(1, 1, max(5.2, min(12.0, 0.35 * len(report) + 1.5)), 3.8)
    colours = [BLUE if report[index].active else "#CCCCCC" for index in order]
    axis.bar(range(len(order)), values[order], color=colours, width=0.8)
    axis.grid(visible=False, axis="x")
    if len(order) <= 40:
        axis.set_xticks(range(len(order)), [str(index) for index in order])
    else:
        axis.set_xticks([])
    axis.set_xlabel("latent, sorted")
    axis.set_ylabel("KL [nats per row]" if by_kl else "variance of the latent")
    active = sum(latent.active for latent in report)
    rest = "" if active == len(report) else " (grey: inactive)"
    axis.set_title(f"{active} of {len(report)} latents active{rest}")
    return figure


def scree(model: PlottedModel) -> Figure | None:
    """Plot the PCA spectrum: the variance of each component, and the share that the first components explain."""
    manifest = model.manifest
    values = np.array(manifest.spectrum)
    if len(values) == 0 or values[0] <= 0:
        return None
    total = max(manifest.total_variance, values.sum())
    index = np.arange(1, len(values) + 1)
    figure, (left, right) = new_figure(1, 2, 5.2, 3.8)
    left.plot(index, np.maximum(values, values[0] * 1e-8), color=BLUE, marker=".", linewidth=1.2)
    left.set_yscale("log")
    left.minorticks_off()
    left.set_title("eigenvalues of the fit rows")
    left.set_ylabel("variance [model units²]")
    right.plot(index, np.cumsum(values) / total, color=BLUE, marker=".", linewidth=1.2)
    right.set_ylim(0, 1.03)
    right.set_title("share of the variance explained by PCA")
    if (line := _activity_threshold(model)) is not None:
        left.axhline(line, color=ORANGE, linestyle="--", label=f"β σ² = {line:.3g}: a linear latent above it is active")
    share = float(np.cumsum(values)[min(manifest.latents, len(values)) - 1] / total)
    labels = f"{manifest.latents} latents", f"{manifest.latents} latents: {share:.1%}"
    for axis, label in zip((left, right), labels, strict=True):
        axis.axvline(manifest.latents, color=GREY, linestyle=":", linewidth=1.6, label=label)
        _label_integer_axis(axis, "component")
        axis.legend(loc="upper right" if axis is left else "lower right")
    return figure


def _activity_threshold(model: PlottedModel) -> float | None:
    """Return beta times the variance of the Gaussian likelihood of a VAE, in model units; None for other models."""
    core = model.core
    if not isinstance(core, VAE) or not isinstance(core.likelihood, GaussianLikelihood):
        return None
    return float(model.manifest.training.get("beta", 1.0)) * float(core.likelihood.log_variance.detach().exp().mean())


def latent_map(model: PlottedModel) -> Figure:
    """Plot the latents of held-out rows in two dimensions, coloured by label, or by score if there are no labels."""
    latents, axes_names = _two_dimensions(model)
    figure, (axis,) = new_figure(1, 1, 7.2, 5.6)
    axis.set_xlabel(axes_names[0])
    if latents.shape[1] == 1:
        axis.hist(latents[:, 0], bins=40, color=BLUE)
        axis.set_ylabel("rows")
        axis.set_title(f"latents of {model.title}")
        return figure
    axis.set_ylabel(axes_names[1])
    classes = [] if model.labels is None else np.unique(model.labels).tolist()
    if model.labels is not None and 2 <= len(classes) <= len(CLASSES):
        for value, colour in zip(classes, CLASSES, strict=False):
            rows = latents[model.labels == value]
            name = model.label_names[int(value)] if model.label_names else str(value)
            axis.scatter(rows[:, 0], rows[:, 1], s=22, color=colour, alpha=0.75, linewidths=0, label=name)
            axis.annotate(
                name, np.median(rows, axis=0), ha="center", va="center", fontweight="bold", path_effects=_halo()
            )
        figure.legend(loc="outside right center", title="label")
        axis.set_title(f"latents of {model.title}, by label")
        return figure
    with torch.inference_mode():
        score = artifact.score(model.pipeline, model.inputs)[0].numpy()
    finite = score.astype(np.float64).clip(max=np.finfo(np.float32).max)
    dots = axis.scatter(
        latents[:, 0], latents[:, 1], s=22, c=score, cmap="viridis", linewidths=0, vmax=np.quantile(finite, 0.98)
    )
    figure.colorbar(dots, label="score, higher is more anomalous", extend="max")
    axis.set_title(f"latents of {model.title}, by score")
    return figure


def _two_dimensions(model: PlottedModel) -> tuple[Floats, list[str]]:
    """Return the one or two coordinates to plot, [M, 1 or 2], and their names: latents or principal directions."""
    report = model.manifest.latent_report
    if report and report[0].kl is not None:
        order = sorted(range(len(report)), key=lambda index: -(report[index].kl or 0.0))[:2]
        return model.latents[:, order], [f"latent {index} (KL {report[index].kl:.2g} nats)" for index in order]
    if model.manifest.kind == "pca" or model.latents.shape[1] == 1:
        return model.latents[:, :2], ["latent 0", "latent 1"]
    centred = model.latents - model.latents.mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    variances = np.square(singular)
    shares = variances / max(variances.sum(), np.finfo(np.float64).tiny)  # not 0, even if all latents are constant
    return centred @ directions[:2].T, [
        f"principal direction {i + 1} of the latents ({shares[i]:.0%})" for i in range(2)
    ]


def reconstructions(model: PlottedModel) -> Figure:
    """Plot held-out rows and their reconstructions, as pairs of images or as one scatter plot per feature."""
    return _image_pairs(model) if model.manifest.is_image else _observed_against_expected(model)


def _image_pairs(model: PlottedModel) -> Figure:
    count = min(PAIRS, len(model.x))
    rows, x_hat = model.x[:count].double().numpy(), model.x_hat[:count]
    figure, axes = new_figure(3, count, max(1.15, TITLE_WIDTH / count), 1.3, show_axes=False)
    residual = rows - x_hat
    limit = float(np.nanmax(np.abs(residual))) or 1.0
    for column in range(count):
        draw_image(axes[column], rows[column], model.manifest)
        draw_image(axes[count + column], x_hat[column], model.manifest)
        image = picture(residual[column], model.manifest.shape)
        image = image.mean(axis=2) if image.ndim == 3 else image
        axes[2 * count + column].imshow(image, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes[2 * count + column].set_title(f"{np.nanmean(np.square(residual[column])):.2g}", fontsize=10, y=-0.28)
    for axis, name in zip(axes[::count], ("row", "reconstruction", "difference"), strict=True):
        axis.text(-0.12, 0.5, name, transform=axis.transAxes, ha="right", va="center")
    gap = "\n" if count * 1.15 < 2 * TITLE_WIDTH else " "
    figure.suptitle(f"{model.title} with mean squared errors{gap}(red: too dark, blue: too light, range ±{limit:.2g})")
    return figure


def draw_image(axis: Axes, row: Floats, manifest: Manifest) -> None:
    """Draw `row` [D] as an image of the shape in `manifest`."""
    black, white = manifest.pixel_range or (0.0, 1.0)
    scaled = np.clip((picture(row, manifest.shape) - black) / (white - black), 0.0, 1.0)
    axis.imshow(scaled, cmap="gray", vmin=0.0, vmax=1.0)


def picture(row: Floats, shape: Sequence[int]) -> Floats:
    """Return `row` as an image that matplotlib draws: [H, W], or [H, W, C] with 1, 3 or 4 channels.

    Other numbers of channels are averaged. The frames of a film, [T, H, W, C], are put below each other.
    """
    image = row.reshape(-1, *shape[-2:]) if len(shape) > 3 else row.reshape(tuple(shape))
    return image if image.ndim == 2 or image.shape[2] in DRAWN_CHANNELS else image.mean(axis=2)


def _observed_against_expected(model: PlottedModel) -> Figure:
    """Plot one panel per feature, starting with the feature that the model explains worst."""
    x, x_hat = model.x.double().numpy(), model.x_hat
    varying = np.flatnonzero(np.nan_to_num(np.fmax.reduce(x, axis=0) - np.fmin.reduce(x, axis=0)) > 0)
    explained = np.full(x.shape[1], np.nan)
    explained[varying] = 1.0 - np.nanmean(np.square(x - x_hat)[:, varying], axis=0) / np.nanvar(x[:, varying], axis=0)
    chosen = [int(index) for index in np.argsort(explained) if np.isfinite(explained[index])][:FEATURES]
    figure, axes = _panels(len(chosen))
    for axis, index in zip(axes, chosen, strict=False):
        low, high = np.nanmin(x[:, index]), np.nanmax(x[:, index])
        axis.plot([low, high], [low, high], color=GREY, linewidth=1.2)
        axis.plot(x[:PLOTTED, index], x_hat[:PLOTTED, index], ".", color=BLUE, markersize=3.5, alpha=0.5)
        axis.set_title(f"{model.manifest.features[index].name}: R² {explained[index]:.3f}", fontsize=11)
        axis.set_xlabel(_with_unit(model.manifest, index, "observed"), fontsize=10)
        axis.set_ylabel("expected", fontsize=10)
    more = "" if len(chosen) == model.manifest.width else ", the worst explained features"
    figure.suptitle(f"{model.title}: observed and expected values{more}")
    return figure


def samples(model: PlottedModel) -> Figure:
    """Plot samples from the generative prior beside held-out rows, as images or as one histogram per feature."""
    return _image_samples(model) if model.manifest.is_image else _histograms(model)


def _image_samples(model: PlottedModel) -> Figure:
    figure, axes = new_figure(1, 2, 5.2, 5.4, show_axes=False)
    sampled, rows = model.sample(GRID * GRID), model.x[: GRID * GRID].double().numpy()
    for axis, images, title in zip(axes, (sampled, rows), ("samples from the prior", model.title), strict=True):
        _image_grid(axis, images, model.manifest)
        axis.set_title(title)
    return figure


def _image_grid(axis: Axes, rows: Floats, manifest: Manifest) -> None:
    black, white = manifest.pixel_range or (0.0, 1.0)
    height, width, *channels = picture(rows[0], manifest.shape).shape
    canvas = np.full((GRID * (height + 1) - 1, GRID * (width + 1) - 1, *channels), 0.6)
    for index, row in enumerate(rows):
        top, left = (index // GRID) * (height + 1), (index % GRID) * (width + 1)
        image = np.nan_to_num((picture(row, manifest.shape) - black) / (white - black))
        canvas[top : top + height, left : left + width] = np.clip(image, 0.0, 1.0)
    axis.imshow(canvas, cmap="gray", vmin=0.0, vmax=1.0)


def _histograms(model: PlottedModel) -> Figure:
    x, sampled = model.x.double().numpy(), model.sample(max(len(model.x), PLOTTED))
    figure, axes = _panels(min(FEATURES, model.manifest.width))
    for index, axis in enumerate(axes):
        present = x[~np.isnan(x[:, index]), index]
        low, high = np.quantile(np.concatenate((present, sampled[:, index])), [0.002, 0.998])
        bins = np.linspace(low, high + 1e-9 * (1.0 + abs(high)), 31).tolist()
        if len(present := present[(present >= bins[0]) & (present <= bins[-1])]):  # a nearly empty column may have none
            axis.hist(present, bins, density=True, color="#BBBBBB", label=model.title)
        axis.hist(sampled[:, index], bins, density=True, histtype="step", color=ORANGE, linewidth=1.8, label="samples")
        axis.set_title(model.manifest.features[index].name, fontsize=11)
        axis.set_xlabel(_with_unit(model.manifest, index, "value"), fontsize=10)
        axis.set_yticks([])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle(f"samples from the prior, with observation noise, and {model.title}")
    return figure


def _label_integer_axis(axis: Axes, label: str) -> None:
    axis.set_xlabel(label)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _with_unit(manifest: Manifest, index: int, word: str) -> str:
    unit = manifest.features[index].unit
    return f"{word} [{unit}]" if unit else word


def _halo() -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3, foreground="white")]


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(4, max(1, count))
    figure, axes = new_figure(-(-max(1, count) // columns), columns, 2.9, 2.7)
    for axis in axes[:count]:
        axis.locator_params(nbins=4)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def new_figure(
    rows: int, columns: int, width: float, height: float, show_axes: bool = True
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels in `rows` rows and `columns` columns, each `width` by `height` inches."""
    figure = NotebookFigure(
        figsize=(columns * width, rows * height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    if not show_axes:
        for axis in axes:
            axis.set_axis_off()
    return figure, axes


PLOTS: dict[str, Callable[[PlottedModel], Figure | None]] = {
    "losses": losses,
    "reconstructions": reconstructions,
    "samples": samples,
    "latents": latents,
    "map": latent_map,
    "scree": scree,
}


@contextmanager
def in_style() -> Iterator[None]:
    """Let the figures that are drawn in this context have the style of Elbo's plots."""
    with rc_context(STYLE):  # type: ignore[arg-type]  # the stub allows only literal keys
        yield


def render_plots(model: PlottedModel) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the PNG of each plot that has something to show."""
    for name, draw in PLOTS.items():
        with in_style():
            figure = draw(model)
            if figure is not None:
                yield name, to_png(figure)


def to_png(figure: Figure) -> bytes:
    """Return `figure` as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


class NotebookFigure(Figure):
    """A figure that a notebook shows although pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        with in_style():
            return to_png(self)
