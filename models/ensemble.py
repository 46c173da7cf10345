"""An ensemble that adds the anomaly scores of an autoencoder and of a nearest-neighbour detector."""

import math

import torch
from torch import Tensor, nn

from models.autoencoder import Autoencoder
from models.core import Core
from models.whitening import Whitening


class Neighbours(nn.Module):
    """The distance from a row to its nearest reference row. The reference rows are a sample of the training rows.

    The distance is a squared Mahalanobis distance, which is large for deviations that break the correlations between
    features. The distance is divided by the scale of the reference row, so that a row near a dense cluster is more
    anomalous than a row at the same distance from a loose cluster.

    Args:
        whitening: whitens rows in model units.
        rows: reference rows, whitened, [R, D].
        scale: typical squared distance around each reference row, positive, [R].
    """

    slopes: Tensor
    offsets: Tensor

    def __init__(self, whitening: Whitening, rows: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.whitening = whitening
        inverse = 1.0 / scale  # [R]
        # For a reference row r of scale s, |x - r|^2 / s is linear in (x, |x|^2), so one product gives all distances.
        self.register_buffer("slopes", torch.cat((-2.0 * rows.T * inverse, inverse.unsqueeze(0))))  # [D + 1, R]
        self.register_buffer("offsets", rows.square().sum(dim=1) * inverse)  # [R]

    def forward(self, x: Tensor) -> Tensor:
        """Return, for x [B, D] in model units, the smallest scaled squared distance to a reference row, [B]."""
        white = self.whitening(x)  # [B, D]
        joined = torch.cat((white, white.square().sum(dim=1, keepdim=True)), dim=1)  # [B, D + 1]
        return torch.addmm(self.offsets, joined, self.slopes).amin(dim=1).clamp(min=0.0)  # [B]


class Ensemble(Core):
    """An autoencoder and a nearest-neighbour detector. Encoding, decoding and reconstruction use only the autoencoder.

    Each of the two detectors gives a squared distance. Let d be this squared distance divided by its mean over normal
    rows. The score is the sum of sqrt(1 + d) over the two detectors. The square root keeps a detector with very large d
    from dominating the score. The added 1 keeps the slope finite at d = 0, so that rounding errors of a small d hardly
    change the score.

    Args:
        network: the autoencoder.
        neighbours: the nearest-neighbour detector. Its reference rows are some of the rows on which the autoencoder was
            trained.
        weights: for each detector, 1 divided by the mean of its squared distances over rows on which the autoencoder
            was not trained, [2].
    """

    parts = ("network", "neighbours")
    weights: Tensor

    def __init__(self, network: Autoencoder, neighbours: Neighbours, weights: Tensor) -> None:
        super().__init__()
        self.network = network
        self.neighbours = neighbours
        self.register_buffer("weights", weights)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the autoencoder's latents [B, K] of x [B, D], and their standard deviations [B, K], which are zero."""
        return self.network.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """Return the autoencoder's x_hat [B, D] for latents z [B, K]."""
        return self.network.decode(z)

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three arrays for x [B, D]: the score [B], its parts [B, 2], and the reconstruction [B, D]."""
        distance, _, x_hat = self.network.score(x)
        distances = torch.stack((distance, self.neighbours(x)), dim=1)  # [B, 2]
        parts = (1.0 + self.weights * distances).sqrt()  # [B, 2]
        return parts.sum(dim=1), parts, x_hat

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002 - the signature of Core
        """Return NaN [B]: the ensemble has no density."""
        return torch.full_like(x[:, 0], math.nan)
