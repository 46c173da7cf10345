"""Networks that were trained elsewhere, with the score of an autoencoder. `training.adoption` makes them.

The network is a compiled module. It takes rows in the units in which it was trained, which are the model units.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.core import Core
from models.whitening import Whitening


class Network(nn.Module):
    """A compiled network. `models.artifact.define_module` adds its weights and methods."""


class Adopted(Core):
    """A network with an encoder and a decoder. Its score is that of `models.autoencoder.Autoencoder`.

    Args:
        network: has the methods encode, which maps [B, D] to means [B, K] and standard deviations [B, K], and decode,
            which maps [B, K] to [B, D].
        whitening: whitens the joint vector of latents and residual, [K + D].
        latents: number of latents K.
    """

    parts = ("t2", "q")

    def __init__(self, network: nn.Module, whitening: Whitening, latents: int) -> None:
        super().__init__()
        self.network: Any = network
        self.whitening = whitening
        self.latents = latents

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean [B, K] of the latents of x [B, D], and their standard deviation [B, K], which may be zero."""
        mean, std = self.network.encode(x)
        return mean, std

    def decode(self, z: Tensor) -> Tensor:
        """Return x_hat [B, D] for latents z [B, K]."""
        x_hat: Tensor = self.network.decode(z)
        return x_hat

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three arrays for x [B, D]: the score [B], its parts T2 and Q [B, 2], and the reconstruction [B, D]."""
        code, _ = self.network.encode(x)  # [B, K]
        x_hat = self.network.decode(code)  # [B, D]
        squares = self.whitening(torch.cat((code, x - x_hat), dim=1)).square()  # [B, K + D]
        t2, q = squares[:, : self.latents].sum(dim=1), squares[:, self.latents :].sum(dim=1)  # [B], [B]
        return t2 + q, torch.stack((t2, q), dim=1), x_hat

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002 - the signature of Core
        """Return NaN [B]: the density of an adopted network is not known."""
        return torch.full_like(x[:, 0], math.nan)


class AdoptedReconstruction(Core):
    """A network that only reconstructs. In place of latents, `encode` returns the reconstruction.

    The service offers neither `encode` nor `decode` for such a model. The pipeline reconstructs with them.

    Args:
        network: has the method reconstruct, which maps [B, D] to [B, D].
        whitening: whitens the residual, [D].
    """

    parts: tuple[str, ...] = ("q",)

    def __init__(self, network: nn.Module, whitening: Whitening) -> None:
        super().__init__()
        self.network: Any = network
        self.whitening = whitening

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction [B, D] of x [B, D], and zeros [B, D]."""
        x_hat: Tensor = self.network.reconstruct(x)
        return x_hat, torch.zeros_like(x_hat)

    def decode(self, z: Tensor) -> Tensor:
        """Return z [B, D]: it is a reconstruction already."""
        return z

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three arrays for x [B, D]: the score [B], its only part Q [B, 1], and the reconstruction [B, D]."""
        x_hat = self.network.reconstruct(x)  # [B, D]
        q = self.whitening(x - x_hat).square().sum(dim=1)  # [B]
        return q, q.unsqueeze(1), x_hat

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002 - the signature of Core
        """Return NaN [B]: the density of an adopted network is not known."""
        return torch.full_like(x[:, 0], math.nan)


class AdoptedReconstructionWithCode(AdoptedReconstruction):
    """A network that reconstructs, and that also returns latents, which it cannot decode. The score uses both.

    Args:
        network: has the method reconstruct, which maps [B, D] to reconstructions [B, D] and latents [B, K].
        whitening: whitens the joint vector of latents and residual, [K + D].
        latents: number of latents K.
    """

    parts = ("t2", "q")

    def __init__(self, network: nn.Module, whitening: Whitening, latents: int) -> None:
        super().__init__(network, whitening)
        self.latents = latents

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reconstruction [B, D] of x [B, D], and zeros [B, D]."""
        x_hat, _ = self.network.reconstruct(x)
        return x_hat, torch.zeros_like(x_hat)

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three arrays for x [B, D]: the score [B], its parts T2 and Q [B, 2], and the reconstruction [B, D]."""
        x_hat, code = self.network.reconstruct(x)  # [B, D], [B, K]
        squares = self.whitening(torch.cat((code, x - x_hat), dim=1)).square()  # [B, K + D]
        t2, q = squares[:, : self.latents].sum(dim=1), squares[:, self.latents :].sum(dim=1)  # [B], [B]
        return t2 + q, torch.stack((t2, q), dim=1), x_hat
