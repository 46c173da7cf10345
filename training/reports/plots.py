"""The pictures of a finished run. Each function draws one figure; a figure that would say nothing is None.

matplotlib without pyplot: no state, no display. Colours are Okabe & Ito's, which the colour-blind tell apart.
"""

import io
from collections.abc import Callable, Iterator
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

from models.likelihood import GaussianLikelihood
from models.manifest import Manifest
from models.pipeline import Pipeline
from models.vae import VAE
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
SEEN = 1_000  # held-out rows that are drawn
FEATURES = 12  # of a table that are drawn
PAIRS = 10  # images that are shown beside their reconstruction
CURVES = (BLUE, ORANGE, GREEN, GREY, "black")
GRID = 8  # images a side of the grid of draws
NAMES = {
    "reconstruction": "distortion: -E[log p(x|z)]",
    "kl": "rate: KL(q(z|x) || p(z))",
    "elbo": "-ELBO",
    "bound": "-bound",
    "squared_error": "squared error",
    "held_out_loss": "loss, held-out rows",
}
TIMES = ("epoch", "step", "seconds")
NEGATED = {"reconstruction", "elbo", "bound"}  # what rises while the loss falls
LOSSES = ("elbo", "bound", "squared_error", "held_out_loss", "loss")  # one axis: they are comparable

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """A finished model and what it makes of the rows that were held out."""

    manifest: Manifest
    pipeline: Pipeline
    x: Tensor  # [M, D], raw units, NaN where missing
    labels: npt.NDArray[Any] | None  # [M]
    label_names: list[str] | None = None

    @cached_property
    def code(self) -> Floats:
        """Posterior means [M, K]."""
        with torch.inference_mode():
            return self.pipeline.encode(self.x)[0].double().numpy()

    @cached_property
    def x_hat(self) -> Floats:
        """Reconstructions [M, D]."""
        with torch.inference_mode():
            x_hat: Floats = self.pipeline(self.x).double().numpy()
            return x_hat

    def drawn(self, count: int) -> Floats:
        """Rows [count, D] of the generative prior, the same every time."""
        random = random_stream(0, VALIDATION)
        with torch.inference_mode():
            noise, choice = (
                torch.randn(count, self.code.shape[1], generator=random),
                torch.rand(count, generator=random),
            )
            rows: Floats = self.pipeline.decode(self.pipeline.draw(noise, choice)).double().numpy()
            return rows


def _kept(manifest: Manifest) -> tuple[str, float]:
    """Which epoch is published, best or last, and its number."""
    if resolved_config(manifest).kept == "last":
        return "last", manifest.history[-1]["epoch"]
    return "best", min(manifest.history, key=lambda point: point.get("held_out_loss", np.inf))["epoch"]


def losses(seen: Seen) -> Figure | None:
    """Every term of the loss by epoch, with the epoch that was kept; those that are no loss by themselves apart."""
    history = seen.manifest.history
    if len(history) < 2:
        return None
    terms = list(dict.fromkeys(name for point in history for name in point if name not in TIMES))
    together, alone = [name for name in terms if name in LOSSES], [name for name in terms if name not in LOSSES]
    kept, epoch = _kept(seen.manifest)
    figure, axes = _figure(1, 1 + len(alone), 5.2, 3.8)
    for axis, names in zip(axes, [together, *([name] for name in alone)], strict=True):
        _curves(axis, history, names)
        axis.axvline(epoch, color=GREY, linestyle=":", linewidth=1.4, label=f"{kept} epoch, {epoch:g}")
        axis.set_title(NAMES.get(names[0], names[0]) if names != together else "loss")
        _count(axis, "epoch")
        axis.legend()
    axes[0].set_ylabel("nats a row" if seen.manifest.kind == "vae" else "model units², a row")
    return figure


def _curves(axis: Axes, history: list[dict[str, float]], names: list[str]) -> None:
    """One line a term, so cut that the first fifth of the epochs does not press the others flat."""
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


def latents(seen: Seen) -> Figure | None:
    """What each latent carries, sorted: KL for a VAE, else the variance of the code."""
    report = seen.manifest.latent_report
    if not report:
        return None
    by_kl = report[0].kl is not None
    values = np.array([latent.kl if latent.kl is not None else latent.variance for latent in report])
    order = np.argsort(-values, kind="stable")
    figure, (axis,) = _figure(1, 1, max(5.2, min(12.0, 0.35 * len(report) + 1.5)), 3.8)
    colours = [BLUE if report[index].active else "#CCCCCC" for index in order]
    axis.bar(range(len(order)), values[order], color=colours, width=0.8)
    axis.grid(visible=False, axis="x")
    if len(order) <= 40:
        axis.set_xticks(range(len(order)), [str(index) for index in order])
    else:
        axis.set_xticks([])
    axis.set_xlabel("latent, sorted")
    axis.set_ylabel("KL [nats a row]" if by_kl else "variance of the code")
    active = sum(latent.active for latent in report)
    rest = "" if active == len(report) else " (grey: carry nothing)"
    axis.set_title(f"{active} of {len(report)} latents active{rest}")
    return figure


def scree(seen: Seen) -> Figure | None:
    """The spectrum that a linear model sees: what each component explains, and what as many latents keep of it."""
    manifest = seen.manifest
    values = np.array(manifest.spectrum)
    if len(values) == 0 or values[0] <= 0:
        return None
    total = max(manifest.total_variance, values.sum())
    index = np.arange(1, len(values) + 1)
    figure, (left, right) = _figure(1, 2, 5.2, 3.8)
    left.plot(index, np.maximum(values, values[0] * 1e-8), color=BLUE, marker=".", linewidth=1.2)
    left.set_yscale("log")
    left.minorticks_off()
    left.set_title("eigenvalues of the fitted rows")
    left.set_ylabel("variance [model units²]")
    right.plot(index, np.cumsum(values) / total, color=BLUE, marker=".", linewidth=1.2)
    right.set_ylim(0, 1.03)
    right.set_title("share of the variance explained by PCA")
    if (line := _water_line(seen)) is not None:
        left.axhline(line, color=ORANGE, linestyle="--", label=f"β σ² = {line:.3g}: above it a linear latent lives")
    share = float(np.cumsum(values)[min(manifest.latents, len(values)) - 1] / total)
    labels = f"{manifest.latents} latents", f"{manifest.latents} latents: {share:.1%}"
    for axis, label in zip((left, right), labels, strict=True):
        axis.axvline(manifest.latents, color=GREY, linestyle=":", linewidth=1.6, label=label)
        _count(axis, "component")
        axis.legend(loc="upper right" if axis is left else "lower right")
    return figure


def _water_line(seen: Seen) -> float | None:
    """beta times the variance of a Gaussian likelihood, model units."""
    core = seen.pipeline.core
    if not isinstance(core, VAE) or not isinstance(core.likelihood, GaussianLikelihood):
        return None
    return float(seen.manifest.training.get("beta", 1.0)) * float(core.likelihood.log_variance.detach().exp().mean())


def code_map(seen: Seen) -> Figure | None:
    """Codes of held-out rows in two dimensions, coloured by label, else by score."""
    code, axes_names = _plane(seen)
    figure, (axis,) = _figure(1, 1, 7.2, 5.6)
    axis.set_xlabel(axes_names[0])
    if code.shape[1] == 1:
        axis.hist(code[:, 0], bins=40, color=BLUE)
        axis.set_ylabel("rows")
        axis.set_title("codes of held-out rows")
        return figure
    axis.set_ylabel(axes_names[1])
    classes = [] if seen.labels is None else np.unique(seen.labels).tolist()
    if seen.labels is not None and 2 <= len(classes) <= len(CLASSES):
        for value, colour in zip(classes, CLASSES, strict=False):
            rows = code[seen.labels == value]
            name = seen.label_names[int(value)] if seen.label_names else str(value)
            axis.scatter(rows[:, 0], rows[:, 1], s=22, color=colour, alpha=0.75, linewidths=0, label=name)
            axis.annotate(
                name, np.median(rows, axis=0), ha="center", va="center", fontweight="bold", path_effects=_halo()
            )
        figure.legend(loc="outside right center", title="label")
        axis.set_title("codes of held-out rows, by label")
        return figure
    with torch.inference_mode():
        score = seen.pipeline.score(seen.x)[0].numpy()
    dots = axis.scatter(
        code[:, 0], code[:, 1], s=22, c=score, cmap="viridis", linewidths=0, vmax=np.quantile(score, 0.98)
    )
    figure.colorbar(dots, label="score, higher is stranger", extend="max")
    axis.set_title("codes of held-out rows, by score")
    return figure


def _plane(seen: Seen) -> tuple[Floats, list[str]]:
    """Codes [M, 1 or 2] and the names of the axes: the latents of most KL, or the principal directions of the codes."""
    report = seen.manifest.latent_report
    if report and report[0].kl is not None:
        order = sorted(range(len(report)), key=lambda index: -(report[index].kl or 0.0))[:2]
        return seen.code[:, order], [f"latent {index} (KL {report[index].kl:.2g} nats)" for index in order]
    if seen.manifest.kind == "pca" or seen.code.shape[1] == 1:
        return seen.code[:, :2], ["latent 0", "latent 1"]
    centred = seen.code - seen.code.mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    shares = np.square(singular) / np.square(singular).sum()
    return centred @ directions[:2].T, [f"principal direction {i + 1} of the codes ({shares[i]:.0%})" for i in range(2)]


def reconstructions(seen: Seen) -> Figure:
    """Held-out rows beside what the model makes of them: images in pairs, features as seen against expected."""
    return _image_pairs(seen) if seen.manifest.is_image else _seen_against_expected(seen)


def _image_pairs(seen: Seen) -> Figure:
    count = min(PAIRS, len(seen.x))
    rows, x_hat = seen.x[:count].double().numpy(), seen.x_hat[:count]
    figure, axes = _figure(3, count, 1.15, 1.3, axis="off")
    residual = rows - x_hat
    limit = float(np.nanmax(np.abs(residual))) or 1.0
    for column in range(count):
        _image(axes[column], rows[column], seen.manifest)
        _image(axes[count + column], x_hat[column], seen.manifest)
        picture = residual[column].reshape(seen.manifest.shape)
        picture = picture.mean(axis=2) if picture.ndim == 3 else picture
        axes[2 * count + column].imshow(picture, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes[2 * count + column].set_title(f"{np.nanmean(np.square(residual[column])):.2g}", fontsize=10, y=-0.28)
    for line, name in enumerate(("row", "rebuilt", "difference")):
        axes[line * count].text(-0.12, 0.5, name, transform=axes[line * count].transAxes, ha="right", va="center")
    figure.suptitle(f"held-out rows; below, the mean squared error (red: too dark, blue: too light, to ±{limit:.2g})")
    return figure


def _image(axis: Axes, row: Floats, manifest: Manifest) -> None:
    black, white = manifest.pixel_range or (0.0, 1.0)
    picture = np.clip((row.reshape(manifest.shape) - black) / (white - black), 0.0, 1.0)
    axis.imshow(picture, cmap="gray", vmin=0.0, vmax=1.0)


def _seen_against_expected(seen: Seen) -> Figure:
    """One panel a feature, those first that the model explains worst."""
    x, x_hat = seen.x.double().numpy(), seen.x_hat
    with np.errstate(invalid="ignore", divide="ignore"):
        explained = 1.0 - np.nanmean(np.square(x - x_hat), axis=0) / np.nanvar(x, axis=0)
    chosen = [int(index) for index in np.argsort(explained) if np.isfinite(explained[index])][:FEATURES]
    figure, axes = _panels(len(chosen))
    for axis, index in zip(axes, chosen, strict=False):
        low, high = np.nanmin(x[:, index]), np.nanmax(x[:, index])
        axis.plot([low, high], [low, high], color=GREY, linewidth=1.2)
        axis.plot(x[:SEEN, index], x_hat[:SEEN, index], ".", color=BLUE, markersize=3.5, alpha=0.5)
        axis.set_title(f"{seen.manifest.features[index].name}: R² {explained[index]:.3f}", fontsize=11)
        axis.set_xlabel(_unit(seen.manifest, index, "seen"), fontsize=10)
        axis.set_ylabel("expected", fontsize=10)
    more = "" if len(chosen) == seen.manifest.width else ", those that the model explains worst"
    figure.suptitle(f"held-out rows: what was seen, and what the model expected of it{more}")
    return figure


def samples(seen: Seen) -> Figure:
    """Draws from the generative prior beside held-out rows: pictures, or histograms by feature."""
    return _image_draws(seen) if seen.manifest.is_image else _histograms(seen)


def _image_draws(seen: Seen) -> Figure:
    figure, axes = _figure(1, 2, 5.2, 5.4, axis="off")
    drawn, rows = seen.drawn(GRID * GRID), seen.x[: GRID * GRID].double().numpy()
    for axis, pictures, title in zip(axes, (drawn, rows), ("drawn from the prior", "held-out rows"), strict=True):
        _image_grid(axis, pictures, seen.manifest)
        axis.set_title(title)
    return figure


def _image_grid(axis: Axes, rows: Floats, manifest: Manifest) -> None:
    black, white = manifest.pixel_range or (0.0, 1.0)
    height, width, *channels = manifest.shape
    canvas = np.full((GRID * (height + 1) - 1, GRID * (width + 1) - 1, *channels), 0.6)
    for place, row in enumerate(rows):
        top, left = (place // GRID) * (height + 1), (place % GRID) * (width + 1)
        picture = np.nan_to_num((row.reshape(manifest.shape) - black) / (white - black))
        canvas[top : top + height, left : left + width] = np.clip(picture, 0.0, 1.0)
    axis.imshow(canvas, cmap="gray", vmin=0.0, vmax=1.0)


def _histograms(seen: Seen) -> Figure:
    x, drawn = seen.x.double().numpy(), seen.drawn(max(len(seen.x), SEEN))
    figure, axes = _panels(min(FEATURES, seen.manifest.width))
    for index, axis in enumerate(axes):
        there = x[~np.isnan(x[:, index]), index]
        low, high = np.quantile(np.concatenate((there, drawn[:, index])), [0.002, 0.998])
        bins = np.linspace(low, high + 1e-9 * (1.0 + abs(high)), 31).tolist()
        axis.hist(there, bins, density=True, color="#BBBBBB", label="held-out rows")
        axis.hist(drawn[:, index], bins, density=True, histtype="step", color=ORANGE, linewidth=1.8, label="drawn")
        axis.set_title(seen.manifest.features[index].name, fontsize=11)
        axis.set_xlabel(_unit(seen.manifest, index, "value"), fontsize=10)
        axis.set_yticks([])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("drawn from the prior, without the noise of single observations, and held-out rows")
    return figure


def _count(axis: Axes, label: str) -> None:
    axis.set_xlabel(label)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _unit(manifest: Manifest, index: int, word: str) -> str:
    unit = manifest.features[index].unit
    return f"{word} [{unit}]" if unit else word


def _halo() -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3, foreground="white")]


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(4, max(1, count))
    figure, axes = _figure(-(-max(1, count) // columns), columns, 2.9, 2.7)
    for axis in axes[:count]:
        axis.locator_params(nbins=4)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _figure(rows: int, columns: int, width: float, height: float, axis: str = "on") -> tuple[Figure, list[Axes]]:
    """A figure of panels, each of `width` by `height` inches."""
    figure = Figure(
        figsize=(columns * width, rows * height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    )
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for each in axes:
        if axis == "off":
            each.set_axis_off()
    return figure, axes


PICTURES: dict[str, Callable[[Seen], Figure | None]] = {
    "losses": losses,
    "reconstructions": reconstructions,
    "samples": samples,
    "latents": latents,
    "map": code_map,
    "scree": scree,
}


def drawn_pictures(seen: Seen) -> Iterator[tuple[str, bytes]]:
    """The name of each picture and its PNG."""
    for name, draw in PICTURES.items():
        with rc_context(STYLE):  # type: ignore[arg-type]  # its keys are a Literal of them all
            figure = draw(seen)
            if figure is not None:
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", facecolor="white")
                yield name, buffer.getvalue()
