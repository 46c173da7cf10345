"""Recognise models that are of no use: worse than predicting the mean, worse than PCA, or with an absurd threshold."""

import math

import torch
from torch import Tensor

from models.calibration import Calibration
from models.core import Core
from models.pca import PCA
from models.pipeline import Pipeline
from training.fitting.prepared_data import PreparedData
from training.reports.describe import DEFAULT_ALPHA

TRIMMED_SHARE = 0.1  # share of the values that a trimmed mean ignores at each end
STANDARD_ERRORS = 2.0  # a difference counts if it exceeds this many standard errors
MIN_ROWS = 10  # with fewer held-out rows, nothing is said about reconstructions
MAX_THRESHOLD = 100.0  # in distances from the lower quartile to the median of the scores; see `threshold_warning`
ABOUT_THRESHOLD = "WARNING: the threshold at alpha"  # how the text of `threshold_warning` starts
BATCH = 4096  # rows per forward pass; limits the memory


def trimmed_mean(values: Tensor) -> tuple[float, float]:
    """Return the trimmed mean of values [N] and its standard error, from the winsorised variance.

    Single extreme rows do not change either (Tukey & McLaughlin 1963, "Less vulnerable confidence and significance
    procedures for location based on a single sample"). The error of a single value is infinite.
    """
    ordered, count = values.double().sort().values, len(values)
    cut = int(TRIMMED_SHARE * count)
    if count < 2:
        return float(ordered.mean()), math.inf
    winsorised = ordered.clamp(ordered[cut], ordered[count - 1 - cut])
    kept = (count - 2 * cut) / count
    return float(ordered[cut : count - cut].mean()), float(winsorised.std()) / (kept * math.sqrt(count))


def is_worse(errors: Tensor, baseline: Tensor) -> bool:
    """Return whether `errors` [N] are higher than `baseline` [N], for the same rows, beyond the standard error."""
    difference, error = trimmed_mean(errors - baseline)
    return difference > STANDARD_ERRORS * error


def find_warnings(pipeline: Pipeline, baseline_pca: PCA | None, data: PreparedData) -> tuple[list[str], bool]:
    """Return warnings about a fitted model, and whether it reconstructs held-out rows worse than the mean does.

    Errors are compared row by row in model units, in which no column outweighs the others.

    Args:
        pipeline: the model.
        baseline_pca: PCA with as many latents, in model units, or None.
        data: the data that the model was fitted to.
    """
    found = []
    worse_than_mean = False
    if len(data.held_out) >= MIN_ROWS:
        scaling, rows = pipeline.scaling, data.fill_missing(data.held_out)
        with torch.inference_mode():
            u = scaling(rows)
            inputs = data.with_conditions(u, data.split.held_out)
            expected = torch.cat([_reconstruct(pipeline.core, part, u.shape[1]) for part in inputs.split(BATCH)])
            errors = (u - expected).double().square().mean(dim=1)  # [M]
            mean = scaling(data.moments.mean.float().unsqueeze(0))
            of_mean = (u - mean).double().square().mean(dim=1)  # [M]
        worse_than_mean = is_worse(errors, of_mean)
        if worse_than_mean:
            found.append(
                "WARNING: the model reconstructs held-out rows worse than predicting the mean of every column: error "
                f"{trimmed_mean(errors)[0]:.4g} against {trimmed_mean(of_mean)[0]:.4g} (10 % trimmed means, model "
                "units); train longer, lower --learning-rate, or use --model pca"
            )
        elif baseline_pca is not None:
            with torch.inference_mode():
                by_pca = torch.cat(
                    [baseline_pca.decode(baseline_pca.encode(part)[0]) for part in u.to(baseline_pca.mean).split(BATCH)]
                )
                of_pca = (u - by_pca).double().square().mean(dim=1)  # [M]
            if is_worse(errors, of_pca):
                found.append(
                    "warning: the model reconstructs held-out rows worse than PCA with as many latents: error "
                    f"{trimmed_mean(errors)[0]:.4g} against {trimmed_mean(of_pca)[0]:.4g} (10 % trimmed means, model "
                    "units). For a model that was trained to remove noise (--noise), this is expected; if "
                    "reconstructions matter, use --model pca"
                )
    if text := threshold_warning(pipeline.calibration):
        found.append(text)
    return found, worse_than_mean


def _reconstruct(core: Core, inputs: Tensor, width: int) -> Tensor:
    """Return the reconstruction [B, D] of `inputs` [B, D + C] in model units, where D is `width` and C may be 0."""
    latents = core.encode(inputs)[0]  # [B, L]
    return core.decode(torch.cat((latents, inputs[:, width:]), dim=1))


def threshold_warning(calibration: Calibration, alpha: float = DEFAULT_ALPHA) -> str | None:
    """Return a warning if the threshold at `alpha` is far above ordinary scores: the model then flags almost nothing.

    The scores of normal rows spread evenly: for a squared distance with one degree of freedom, the least even case,
    the threshold is 10 times as far above the median as the median is above the lower quartile.
    """
    scores = calibration.scores.double()
    threshold = float(calibration.threshold(alpha))
    quartile, median = scores.quantile(torch.tensor([0.25, 0.5], dtype=torch.float64)).tolist()
    spread = max(median - quartile, 1e-6 * max(1.0, abs(median)))
    if len(scores) * alpha < 1 or threshold - median <= MAX_THRESHOLD * spread:
        return None
    return (
        f"{ABOUT_THRESHOLD} {alpha:g} is {threshold:.3g}, but half of the calibration rows score below "
        f"{median:.3g}: about {100 * alpha:g} % of the calibration rows or more are extreme, so the model "
        "flags almost nothing; calibrate it on normal rows with `elbo calibrate`"
    )
