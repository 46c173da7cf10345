"""Preprocessing: the maps between raw units and model units."""

import torch
from torch import Tensor, nn


class Scaling(nn.Module):
    """The affine map u = (x - shift) / scale.

    Args:
        shift: offset per feature in raw units, [D].
        scale: positive scale per feature in raw units, [D].
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Convert x [B, D] from raw units to model units."""
        return (x - self.shift) / self.scale

    def inverse(self, u: Tensor) -> Tensor:
        """Convert u [B, D] from model units to raw units."""
        return u * self.scale + self.shift


class ImputingScaling(Scaling):
    """A scaling that replaces missing values (NaN) with `fill`.

    Args:
        scaling: the scaling of complete rows.
        fill: replacement per feature in raw units, for example the training median, [D].
    """

    fill: Tensor

    def __init__(self, scaling: Scaling, fill: Tensor) -> None:
        super().__init__(scaling.shift, scaling.scale)
        self.register_buffer("fill", fill)

    def forward(self, x: Tensor) -> Tensor:
        """Convert x [B, D] from raw units to model units. In x, a missing value is NaN."""
        return (torch.where(x.isnan(), self.fill, x) - self.shift) / self.scale


def standardise(x: Tensor) -> Scaling:
    """Return the scaling that gives each column of x [N, D] mean 0 and variance 1. Constant columns get scale 1."""
    deviation = x.std(dim=0, correction=0)
    constant = deviation <= 1e-7 * x.abs().amax(dim=0)  # constant up to float32 rounding
    return Scaling(x.mean(dim=0), torch.where(constant, torch.ones_like(deviation), deviation))
