"""Whitening: the affine map that gives vectors mean 0 and unit covariance."""

import torch
from torch import Tensor, nn


class Whitening(nn.Module):
    """An affine map of vectors, such as residuals. Over normal rows, its output has mean 0 and unit covariance.

    Args:
        mean: mean of the vectors, [V].
        factor: inverse of the Cholesky factor of the covariance, lower triangular, [V, V]. If this matrix would be too
            large, `factor` contains the inverse standard deviations, [V], instead.
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("factor", factor)

    def forward(self, vector: Tensor) -> Tensor:
        """Whiten vector [B, V]."""
        centred = vector.to(self.factor.dtype) - self.mean  # [B, V]
        white = centred @ self.factor.T if self.factor.dim() == 2 else centred * self.factor
        return white.to(vector.dtype)

    def distance(self, vector: Tensor) -> Tensor:
        """Return the squared Mahalanobis distances [B] of vector [B, V] from the mean."""
        return self.forward(vector).square().sum(dim=1)


def no_whitening(width: int) -> Whitening:
    """Return the identity map on vectors of `width` numbers: a placeholder until the whitening is fitted."""
    return Whitening(torch.zeros(width), torch.ones(width))
