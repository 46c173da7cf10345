"""Explanation of an anomaly score: an expected value of each feature, and how far the row is from that value."""

import torch
from torch import Tensor, nn

NOISE = 1.0  # variance of the noise added to each feature, divided by the variance of the feature
TOLERANCE = 1e-2  # largest error of a correlation that is computed from the weights of an explanation in float32


class Explanation(nn.Module):
    """Explanation by the reconstruction, used for images and very wide rows."""

    def forward(self, u: Tensor, u_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Return contributions [B, D] and expected values [B, D] for rows u [B, D] and their reconstructions u_hat.

        All tensors are in model units. The expected value is u_hat, and the contribution is (u - u_hat)^2.
        """
        return (u - u_hat).square(), u_hat


class Expectations(Explanation):
    """Explanation by two means of each feature: the overall mean, and the mean given the other features.

    The contribution of a feature is the larger of its squared distances from these two means. The reconstruction is not
    used, because an anomalous feature distorts it: the residual of that feature is too small, and the residuals of
    normal features are too large.

    The second mean is the conditional mean of a Gaussian N(mean, C). With each feature in units of its standard
    deviation, it is E[x_i | other features] = x_i - (P (x - mean))_i / P_ii (Lauritzen, "Graphical models", 1996, eq.
    C.4), where P = (C + noise I)^-1. The noise is added to every feature. Without it, several features that are
    anomalous together would make each other look normal.

    Args:
        mean: mean of each feature in model units, [D].
        deviation: standard deviation of each feature about its mean, [D].
        weights: [D, D], zero on the diagonal; the conditional mean of feature i is mean_i + weights[i] (u - mean).
        residual: standard deviation of each feature about its conditional mean, [D].
    """

    mean: Tensor
    deviation: Tensor
    weights: Tensor
    residual: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, weights: Tensor, residual: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.register_buffer("weights", weights)
        self.register_buffer("residual", residual)

    def forward(self, u: Tensor, u_hat: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - the signature of Explanation
        """Return contributions [B, D] and expected values [B, D] for rows u [B, D] in model units.

        A contribution is a squared distance in standard deviations: about 1 for a normal row.
        """
        centred = u - self.mean  # [B, D]
        conditional = centred @ self.weights.T  # [B, D]
        from_mean = (centred / self.deviation).square()  # [B, D]
        from_conditional = ((centred - conditional) / self.residual).square()  # [B, D]
        expected = self.mean + torch.where(from_conditional > from_mean, conditional, 0.0)
        return torch.maximum(from_mean, from_conditional), expected


def correlation_of(weights: Tensor, deviation: Tensor) -> Tensor:
    """Return the correlation matrix [D, D] from which the weights of `Expectations` were computed, up to rounding.

    Let C be the correlation matrix with NOISE added to its diagonal, and P the inverse of C. In standard deviations,
    the weights are -P_ij / P_ii off the diagonal. The inverse of the matrix of P_ij / P_ii is therefore C with scaled
    columns. The diagonal of C is 1 + NOISE, which gives the factor of each column.

    Args:
        weights: the weights, float64 [D, D].
        deviation: the standard deviations of the features, float64 [D].

    Raises:
        ValueError: the weights were computed in another way, as by an earlier release.
    """
    ratios = -weights * torch.outer(1.0 / deviation, deviation)  # [D, D]
    ratios.fill_diagonal_(1.0)
    scaled, failure = torch.linalg.inv_ex(ratios)  # the inverse [D, D]; `failure` is 0 if it exists
    noisy = scaled * ((1.0 + NOISE) / scaled.diagonal())
    if int(failure) or not float((noisy - noisy.T).abs().max()) < TOLERANCE:  # `not <`, so that NaN is refused too
        raise ValueError("the weights are not those of a correlation matrix")
    correlation = (noisy + noisy.T) / 2.0 - NOISE * torch.eye(len(weights)).double()
    values, vectors = torch.linalg.eigh(correlation)
    positive: Tensor = vectors @ torch.diag(values.clamp(min=0.0)) @ vectors.T
    return positive
