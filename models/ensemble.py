"""Two judges of one row that fail in different ways, whose distances are added up."""

import math

import torch
from torch import Tensor, nn

from models.autoencoder import Autoencoder, Whitening
from models.core import Core


class Neighbours(nn.Module):
    """Some of the rows that fit the network, by the distance to which a row is judged.

    Distances are Mahalanobis distances: a step that the correlations of the features do not know is a long one. A
    squared distance counts in units of the scale of the row that it is to: what lies beside a dense group is stranger
    than what lies as far from a loose one.

    Args:
        whitening: of rows in model units.
        rows: [R, D], whitened.
        scale: [R], positive: a squared distance that is usual about each.
    """

    slopes: Tensor
    offsets: Tensor

    def __init__(self, whitening: Whitening, rows: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.whitening = whitening
        inverse = 1.0 / scale  # [R]
        # |x - r|^2 / s is linear in (x, |x|^2), so that one product makes all distances
        self.register_buffer("slopes", torch.cat((-2.0 * rows.T * inverse, inverse.unsqueeze(0))))  # [D + 1, R]
        self.register_buffer("offsets", rows.square().sum(dim=1) * inverse)  # [R]

    def forward(self, x: Tensor) -> Tensor:
        """The smallest of the scaled squared distances from x [B, D], model units, to the rows, [B]."""
        white = self.whitening(x)  # [B, D]
        joined = torch.cat((white, white.square().sum(dim=1, keepdim=True)), dim=1)  # [B, D + 1]
        return torch.addmm(self.offsets, joined, self.slopes).amin(dim=1).clamp(min=0.0)  # [B]


class Ensemble(Core):
    """An autoencoder, which encodes, decodes and reconstructs, and the nearest neighbours.

    Either judge gives a squared distance d. In units of its mean over normal rows it counts as sqrt(1 + d), and the sum
    is the score: far off that grows as the distance, so that neither judge drowns the other, and near by as its square,
    so that the rounding of a distance of nearly 0 does not show.

    Args:
        network: the autoencoder.
        neighbours: rows that it was fitted on.
        weights: [2], one over the mean of each squared distance over rows that the network did not see.
    """

    parts = ("network", "neighbours")
    weights: Tensor

    def __init__(self, network: Autoencoder, neighbours: Neighbours, weights: Tensor) -> None:
        super().__init__()
        self.network = network
        self.neighbours = neighbours
        self.register_buffer("weights", weights)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's code of x [B, D] and zeros, [B, K] each."""
        return self.network.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """The autoencoder's, [B, K] to [B, D]."""
        return self.network.decode(z)

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum [B] for x [B, D], its parts [B, 2], and the autoencoder's reconstruction [B, D]."""
        unusual, _, x_hat = self.network.score(x)
        distances = torch.stack((unusual, self.neighbours(x)), dim=1)  # [B, 2]
        parts = (1.0 + self.weights * distances).sqrt()  # [B, 2]
        return parts.sum(dim=1), parts, x_hat

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002 - every core has these two
        """NaN [B]: it has no density."""
        return torch.full_like(x[:, 0], math.nan)
