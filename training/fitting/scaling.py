"""Fit the preprocessing: the map from raw units to model units."""

from typing import Literal

import torch
from torch import Tensor

from models.scaling import ImputingScaling, Scaling
from training.config import TrainConfig
from training.data.moments import Moments
from training.errors import FitError

CONSTANT_COLUMN_SCALE = 1e-3  # scale of a constant column in a table, relative to the column's value
NEGLIGIBLE_DEVIATION = 1e-7  # a column is constant if its deviation is at most this share of its largest value


def scaling_method(config: TrainConfig, images: bool) -> Literal["standardise", "range", "none"]:
    """Return the method of preprocessing: `config.scale`, or the method that auto stands for."""
    if config.scale != "auto":
        return config.scale
    bernoulli = config.model == "vae" and config.likelihood == "bernoulli"
    return "range" if images or bernoulli else "standardise"


def fit_scaling(
    moments: Moments,
    config: TrainConfig,
    pixel_range: tuple[float, float] | None,
    fill: Tensor | None = None,
    levels: int = 0,
) -> Scaling:
    """Return the preprocessing for rows with these moments.

    Args:
        pixel_range: raw values of black and white; None for tables.
        fill: the values that replace missing values, [D], in raw units; None if no value is missing.
        levels: the number of the last features that are levels of categories. A VAE takes them in raw units, because
            its likelihood does. Otherwise they are standardised as in the factor analysis of mixed data (Pages 2004):
            a level of a share p of the rows becomes (x - p) / sqrt(p), so that a category of L levels has the variance
            L - 1 in all.

    Raises:
        FitError: an option needs values in [0, 1], but `config.scale` does not produce them.
    """
    method = scaling_method(config, images=pixel_range is not None)
    if method != "range":
        advice = f"values in [0, 1], which --scale {method} does not give: use --scale range"
        if config.model == "vae" and config.likelihood == "bernoulli":
            raise FitError(f"--likelihood bernoulli needs {advice}")
        if config.output == "sigmoid":
            raise FitError(f"--output sigmoid needs {advice}")
    shift, scale = torch.zeros_like(moments.mean), torch.ones_like(moments.mean)  # [D], [D]
    if method == "standardise":
        shift, scale = moments.mean, _standard_deviation(moments, images=pixel_range is not None)
    elif method == "range":
        ends = pixel_range or (moments.low, moments.high)
        low, high = (torch.as_tensor(end, dtype=torch.float64).expand_as(shift) for end in ends)
        shift, scale = low, torch.where(high > low, high - low, 1.0)
    if levels:
        numbers = len(shift) - levels
        share = moments.mean[numbers:]
        shift, scale = shift.clone(), scale.clone()
        if config.model == "vae" or method != "standardise":
            shift[numbers:], scale[numbers:] = 0.0, 1.0
        else:  # a level without a fit row counts as half a row
            scale[numbers:] = share.clamp(min=0.5 / moments.rows).sqrt()
    scaling = Scaling(shift.float(), scale.float())
    return scaling if fill is None else ImputingScaling(scaling, fill)


def _standard_deviation(moments: Moments, images: bool) -> Tensor:
    """Return the standard deviation [D] of each column. A constant column gets a positive value instead."""
    deviation = (moments.variance * (moments.rows - 1) / moments.rows).sqrt()
    largest = torch.maximum(moments.low.abs(), moments.high.abs())
    if images:
        stand_in = torch.ones_like(deviation)
    else:  # small, so that the score rises when a column varies that was constant in training
        stand_in = CONSTANT_COLUMN_SCALE * torch.where(largest > 0.0, largest, 1.0)
    return torch.where(deviation <= NEGLIGIBLE_DEVIATION * largest, stand_in, deviation)
