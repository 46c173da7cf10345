"""The autoencoder: compress, reconstruct, and judge a row by its code and what the code cannot explain, together."""

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

    Its score is the squared Mahalanobis distance of code and residual x - x_hat together from those of normal rows. By
    the chain rule of a Gaussian it is T2 + Q: the distance of the code, and that of the residual from what is usual
    for such a code.

    Args:
        encoder: [B, D] to [B, K].
        decoder: [B, K] to [B, D].
        whitening: of code and residual joined, [K + D], the code first, fitted on rows that the networks did not see.
        latents: K.
    """

    parts = ("t2", "q")

    def __init__(self, encoder: nn.Module, decoder: nn.Module, whitening: Whitening, latents: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.whitening = whitening
        self.latents = latents

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The code [B, K] of x [B, D]; it is a point, so its standard deviation [B, K] is zero."""
        code: Tensor = self.encoder(x)  # [B, K]
        return code, torch.zeros_like(code)

    def decode(self, z: Tensor) -> Tensor:
        """[B, K] to [B, D]."""
        x_hat: Tensor = self.decoder(z)  # [B, D]
        return x_hat

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """T2 + Q [B] of x [B, D], those two parts [B, 2], and the reconstruction [B, D]."""
        code: Tensor = self.encoder(x)  # [B, K]
        x_hat: Tensor = self.decoder(code)  # [B, D]
        squares = self.whitening(torch.cat((code, x - x_hat), dim=1)).square()  # [B, K + D]
        t2, q = squares[:, : self.latents].sum(dim=1), squares[:, self.latents :].sum(dim=1)  # [B], [B]
        return t2 + q, torch.stack((t2, q), dim=1), x_hat

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002 - every core has these two
        """NaN [B]: it has no density."""
        return torch.full_like(x[:, 0], math.nan)
