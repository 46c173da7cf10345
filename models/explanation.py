"""Why a row is strange: what was expected of each feature, and how far it is from that."""

import torch
from torch import Tensor, nn


class Explanation(nn.Module):
    """By the reconstruction: what pictures and very wide rows have."""

    def forward(self, u: Tensor, u_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Rows u [B, D] and their reconstruction [B, D], model units, to contribution [B, D] and expected [B, D].

        The contribution is the squared residual.
        """
        return (u - u_hat).square(), u_hat


class Expectations(Explanation):
    """By two expectations of each feature: its mean, and what the other features say of it; the worse kept one counts.

    A reconstruction is no witness here: a code with room for a normal row has room for much of an outlier, so the
    reconstruction follows the feature at fault, and the residual shows up in innocent ones. What the others say is the
    conditional mean under N(mean, C) in units of each feature's deviation; with P = (C + noise I)^-1 it is
    E[x_i | the others] = x_i - (P (x - mean))_i / P_ii (Lauritzen, "Graphical models", 1996, eq. C.4). The noise keeps
    features that are at fault together from excusing each other.

    Args:
        mean: [D], model units.
        deviation: [D], of the feature about its mean.
        weights: [D, D], zero on the diagonal: expected of feature i is mean_i + weights[i] (u - mean).
        residual: [D], of the feature about that.
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

    def forward(self, u: Tensor, u_hat: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - see the class
        """Rows u [B, D] in model units to contribution [B, D] and expected [B, D].

        The contribution is the squared distance from what was expected, in deviations: about 1 for a normal row.
        """
        centred = u - self.mean  # [B, D]
        conditional = centred @ self.weights.T  # [B, D]
        alone = (centred / self.deviation).square()  # [B, D]
        given = ((centred - conditional) / self.residual).square()  # [B, D]
        expected = self.mean + torch.where(given > alone, conditional, 0.0)
        return torch.maximum(alone, given), expected
