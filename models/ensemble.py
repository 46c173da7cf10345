"""Several judges of one row that fail in different ways, whose scores are added up."""

import math

import torch
from torch import Tensor, nn

from models.autoencoder import Autoencoder, Whitening
from models.core import Core


class Denoiser(nn.Module):
    """A network as wide as it likes that takes noise from rows, so that it cannot learn to copy them.

    Where it moves a row to, there the rows are denser: the residual estimates the gradient of their smoothed log
    density (Alain & Bengio 2014, "What regularized auto-encoders learn from the data-generating distribution", thm. 1).

    Args:
        network: [B, D] to [B, D].
        residual: whitening of x - network(x), fitted on rows that the network did not see.
    """

    def __init__(self, network: nn.Module, residual: Whitening) -> None:
        super().__init__()
        self.network = network
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """The squared Mahalanobis distance of the residual of x [B, D], [B]."""
        return self.residual.distance(x - self.network(x))


class Neighbours(nn.Module):
    """Some of the rows that fit the networks, by their distance to which a row is judged.

    Args:
        rows: [R, D], in model units.
    """

    rows: Tensor
    squares: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("squares", rows.square().sum(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """The squared distance of x [B, D] to the nearest of the rows, [B]."""
        nearest = (self.squares - 2.0 * (x @ self.rows.T)).amin(dim=1)  # [B], less what is the same for every row
        return (nearest + x.square().sum(dim=1)).clamp(min=0.0)


class Ensemble(Core):
    """An autoencoder, which encodes, decodes and explains, and beside it a denoiser and the nearest neighbours.

    Its score is the sum of the three scores, each in units of its mean over normal rows.

    Args:
        narrow: the autoencoder.
        wide: the denoiser.
        near: the neighbours.
        weights: [3], one over the mean of each score over rows that the networks did not see.
    """

    parts = ("narrow", "wide", "near")
    weights: Tensor

    def __init__(self, narrow: Autoencoder, wide: Denoiser, near: Neighbours, weights: Tensor) -> None:
        super().__init__()
        self.narrow = narrow
        self.wide = wide
        self.near = near
        self.register_buffer("weights", weights)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's code of x [B, D] and zeros, [B, K] each."""
        return self.narrow.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """The autoencoder's, [B, K] to [B, D]."""
        return self.narrow.decode(z)

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sum [B] for x [B, D], its parts [B, 3], and the autoencoder's reconstruction [B, D]."""
        narrow, _, x_hat = self.narrow.score(x)
        parts = torch.stack((narrow, self.wide(x), self.near(x)), dim=1) * self.weights  # [B, 3]
        return parts.sum(dim=1), parts, x_hat

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002 - every core has these two
        """NaN [B]: it has no density."""
        return torch.full_like(x[:, 0], math.nan)
