"""The autoencoder: compress, reconstruct, and judge a row by both its code and what the code cannot explain."""

import math

import torch
from torch import Tensor, nn

from models.core import Core


class Whitening(nn.Module):
    """The linear map after which the vector of a normal row, such as its residual, has zero mean and unit covariance.

    Args:
        mean: [V].
        factor: inverse of the Cholesky factor of the covariance, [V, V] lower triangular; or [V], the inverse standard
            deviations, where the full matrix would be too large.
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("factor", factor)

    def forward(self, vector: Tensor) -> Tensor:
        """[B, V] to [B, V], whitened."""
        centred = vector - self.mean
        return centred @ self.factor.T if self.factor.dim() == 2 else centred * self.factor

    def distance(self, vector: Tensor) -> Tensor:
        """The squared Mahalanobis distance of vector [B, V] from the mean, [B]."""
        return self.forward(vector).square().sum(dim=1)


def no_whitening(width: int) -> Whitening:
    """The identity on vectors of `width` numbers: what stands in until the real one is fitted."""
    return Whitening(torch.zeros(width), torch.ones(width))


class Autoencoder(Core):
    """z = encoder(x), x_hat = decoder(z).

    Its score is a weighted sum of two squared Mahalanobis distances: T2, that of the code from the codes of normal
    rows, and Q, that of the residual x - x_hat from theirs.

    Args:
        encoder: [B, D] to [B, K].
        decoder: [B, K] to [B, D].
        code: whitening of codes, fitted on rows that the networks did not see.
        residual: whitening of residuals, likewise.
        weights: [2], of T2 and of Q.
    """

    parts = ("t2", "q")
    weights: Tensor

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, code: Whitening, residual: Whitening, weights: Tensor
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.code = code
        self.residual = residual
        self.register_buffer("weights", weights)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The code [B, K] of x [B, D]; it is a point, so its standard deviation [B, K] is zero."""
        code: Tensor = self.encoder(x)  # [B, K]
        return code, torch.zeros_like(code)

    def decode(self, z: Tensor) -> Tensor:
        """[B, K] to [B, D]."""
        x_hat: Tensor = self.decoder(z)  # [B, D]
        return x_hat

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """T2 + Q [B] of x [B, D], each with its weight, those two parts [B, 2], and the reconstruction [B, D]."""
        code: Tensor = self.encoder(x)  # [B, K]
        x_hat: Tensor = self.decoder(code)  # [B, D]
        distances = torch.stack((self.code.distance(code), self.residual.distance(x - x_hat)), dim=1)  # [B, 2]
        parts = distances * self.weights  # [B, 2]
        return parts.sum(dim=1), parts, x_hat

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002 - every core has these two
        """NaN [B]: it has no density."""
        return torch.full_like(x[:, 0], math.nan)
