"""Explanation of an anomaly score: an expected value of each feature, and how far the row is from that value."""

import torch
from torch import Tensor, nn


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
