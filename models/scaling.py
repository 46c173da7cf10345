"""Preprocessing: raw units to the units in which a model works, and back."""

import torch
from torch import Tensor, nn


class Scaling(nn.Module):
    """The affine map `(x - shift) / scale`, a number a feature.

    Args:
        shift: [D], raw units.
        scale: [D], raw units, positive.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """Raw [B, D] to model units [B, D]."""
        return (x - self.shift) / self.scale

    def inverse(self, u: Tensor) -> Tensor:
        """Model units [B, D] to raw [B, D]."""
        return u * self.scale + self.shift


class ImputingScaling(Scaling):
    """A scaling of rows that may have gaps: what is missing (NaN) counts as its feature's `fill`.

    Args:
        scaling: of whole rows.
        fill: [D], raw units, such as the training median.
    """

    fill: Tensor

    def __init__(self, scaling: Scaling, fill: Tensor) -> None:
        super().__init__(scaling.shift, scaling.scale)
        self.register_buffer("fill", fill)

    def forward(self, x: Tensor) -> Tensor:
        """Raw [B, D], NaN where missing, to model units [B, D]."""
        return (torch.where(x.isnan(), self.fill, x) - self.shift) / self.scale


def standardise(x: Tensor) -> Scaling:
    """Each column of x [N, D] to mean 0 and variance 1; a constant column is only centred, its scale staying 1."""
    deviation = x.std(dim=0, correction=0)
    negligible = deviation <= 1e-7 * x.abs().amax(dim=0)  # a constant, up to float32's rounding of it
    return Scaling(x.mean(dim=0), torch.where(negligible, torch.ones_like(deviation), deviation))


def to_unit_range(low: Tensor, high: Tensor) -> Scaling:
    """[low, high] of each feature, [D] each, to [0, 1]; where they are equal, to 0 with scale 1."""
    span = high - low
    return Scaling(low, torch.where(span > 0, span, torch.ones_like(span)))
