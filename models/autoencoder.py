"""The autoencoder. Its anomaly score combines the latents and the reconstruction residual."""

import math

import torch
from torch import Tensor, nn

from models.core import Core
from models.whitening import Whitening


class Autoencoder(Core):
    """z = encoder(x), x_hat = decoder(z).

    The residual is x - x_hat. The score is the squared Mahalanobis distance of the joint vector (z, residual) from the
    mean of such vectors over normal rows. By the chain rule for Gaussians the score is T2 + Q. T2 is the squared
    distance of the latents z from their mean, and Q is the squared distance of the residual from its conditional mean
    given the latents.

    Args:
        encoder: maps [B, D] to [B, K].
        decoder: maps [B, K] to [B, D].
        whitening: whitens the joint vector [K + D], in which the latents come first. The whitening is fitted to rows on
            which the networks were not trained.
        latents: number of latents K.
    """

    parts = ("t2", "q")

    def __init__(self, encoder: nn.Module, decoder: nn.Module, whitening: Whitening, latents: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.whitening = whitening
        self.latents = latents

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents [B, K] of x [B, D] and their standard deviations [B, K], which are zero."""
        code: Tensor = self.encoder(x)  # [B, K]
        return code, torch.zeros_like(code)

    def decode(self, z: Tensor) -> Tensor:
        """Return x_hat [B, D] for latents z [B, K]."""
        x_hat: Tensor = self.decoder(z)  # [B, D]
        return x_hat

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three arrays for x [B, D]: the score [B], its parts T2 and Q [B, 2], and the reconstruction [B, D]."""
        code: Tensor = self.encoder(x)  # [B, K]
        x_hat: Tensor = self.decoder(code)  # [B, D]
        squares = self.whitening(torch.cat((code, x - x_hat), dim=1)).square()  # [B, K + D]
        t2, q = squares[:, : self.latents].sum(dim=1), squares[:, self.latents :].sum(dim=1)  # [B], [B]
        return t2 + q, torch.stack((t2, q), dim=1), x_hat

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002 - the signature of Core
        """Return NaN [B]: an autoencoder has no density."""
        return torch.full_like(x[:, 0], math.nan)
