"""Fit the explanation: the expected value of each feature, given the other features of the row."""

import torch

from models.explanation import NOISE, Expectations, Explanation
from models.scaling import Scaling
from training.data.moments import Moments
from training.fitting.scaling import NEGLIGIBLE_DEVIATION

MAX_EXPLAINED_FEATURES = 512  # wider rows are explained by their reconstruction, because the weights are a D x D matrix


def fit_explanation(moments: Moments, scaling: Scaling, images: bool) -> Explanation:
    """Return the explanation of scores, from the moments of the fit rows in raw units. See `models.explanation`."""
    if images or moments.covariance is None or len(moments.mean) > MAX_EXPLAINED_FEATURES:
        return Explanation()
    moments = moments.scaled(scaling.shift, scaling.scale)
    assert moments.covariance is not None
    deviation = moments.variance.sqrt()  # [D]
    constant = deviation <= NEGLIGIBLE_DEVIATION * torch.maximum(moments.low.abs(), moments.high.abs())
    deviation = torch.where(constant, 1.0, deviation)
    correlation = moments.covariance / torch.outer(deviation, deviation)  # [D, D]
    correlation[constant, :] = correlation[:, constant] = 0.0
    precision = torch.linalg.inv(correlation + NOISE * torch.eye(len(deviation)).double())
    residual_map = precision / precision.diagonal().unsqueeze(1)  # [D, D], maps x - mean to x - E[x | others]
    residual_variance = torch.einsum("ij,jk,ik->i", residual_map, correlation, residual_map)  # [D]
    residual = torch.where(constant, 1.0, residual_variance.sqrt())
    weights = -residual_map * torch.outer(deviation, 1.0 / deviation)
    weights.fill_diagonal_(0.0)
    return Expectations(
        mean=moments.mean.float(),
        deviation=deviation.float(),
        weights=weights.float(),
        residual=(residual * deviation).float(),
    )
