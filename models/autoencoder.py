"""The autoencoder: compress, reconstruct, and judge a row by both its code and what the code cannot explain."""

import math

import torch
from torch import Tensor, nn

from models.core import Core


class Whitening(nn.Module):
    """The linear map after which a joint vector (code, residual) of a normal row has zero mean and unit covariance.

    Args:
        mean: [K + D], code first.
        factor: inverse of the Cholesky factor of the covariance, [K + D, K + D] lower triangular; or [K + D], the
            inverse standard deviations, where the full matrix would be too large.
    """

    mean: Tensor
    factor: Tensor

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("factor", factor)

    def forward(self, joint: Tensor) -> Tensor:
        """[B, K + D] to [B, K + D], whitened."""
        centred = joint - self.mean
        return centred @ self.factor.T if self.factor.dim() == 2 else centred * self.factor


class Autoencoder(Core):
    """z = encoder(x), x_hat = decoder(z).

    Its score is the squared Mahalanobis distance of (code, residual). The Cholesky factor is triangular with the code
    first, so the distance is a sum of two: T2, that of the code alone, and Q, that of the residual given the code.

    Args:
        encoder: [B, D] to [B, K].
        decoder: [B, K] to [B, D].
        whitening: of the joint vector, K + D wide, fitted on rows that the networks did not see.
    """

    parts = ("t2", "q")

    def __init__(self, encoder: nn.Module, decoder: nn.Module, whitening: Whitening) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.whitening = whitening

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
        white = self.whitening(torch.cat((code, x - x_hat), dim=1)).square()  # [B, K + D]
        t2 = white[:, : code.shape[1]].sum(dim=1)  # [B]
        q = white[:, code.shape[1] :].sum(dim=1)  # [B]
        return t2 + q, torch.stack((t2, q), dim=1), x_hat

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002 - every core has these two
        """NaN [B]: it has no density."""
        return torch.full_like(x[:, 0], math.nan)
