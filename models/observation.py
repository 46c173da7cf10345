"""Observation noise: the distribution of a row around the decoder's output. All values are in raw units."""

import torch
from torch import Tensor, nn


class Observation(nn.Module):
    """Gaussian noise. The noisy values are clamped to the bounds of the features, and whole numbers are rounded.

    Args:
        factor: factor F of the noise covariance F F', [D, D]; or standard deviations, [D].
        low: smallest value of each feature, [D].
        high: largest value of each feature, [D].
        whole: whether the feature has only whole numbers, [D], bool.
    """

    factor: Tensor
    low: Tensor
    high: Tensor
    whole: Tensor

    def __init__(self, factor: Tensor, low: Tensor, high: Tensor, whole: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("whole", whole)

    def forward(self, x_hat: Tensor, noise: Tensor) -> Tensor:
        """Return noisy rows [B, D] for decoded rows x_hat [B, D] and standard normal noise [B, D]."""
        return self.add_noise(x_hat, noise)

    def constrain(self, x: Tensor) -> Tensor:
        """Return rows x [B, D] within the bounds of the features, with whole numbers rounded."""
        within = x.clamp(self.low, self.high)
        return torch.where(self.whole, within.round(), within)

    def add_noise(self, x_hat: Tensor, noise: Tensor) -> Tensor:
        """Return what `forward` returns. A class with another `forward` can call it: TorchScript has no `super`."""
        deviation = noise @ self.factor.T if self.factor.dim() == 2 else noise * self.factor
        x = (x_hat + deviation).clamp(self.low, self.high)
        return torch.where(self.whole, x.round(), x)


class BernoulliObservation(Observation):
    """A Bernoulli draw: `high` with the probability (x_hat - low) / (high - low), else `low`.

    Args:
        low: the decoded value at probability 0, [D].
        high: the decoded value at probability 1, [D].
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__(torch.zeros_like(low), low, high, torch.zeros_like(low, dtype=torch.bool))

    def forward(self, x_hat: Tensor, noise: Tensor) -> Tensor:
        """Return binary rows [B, D] for decoded rows x_hat [B, D] and standard normal noise [B, D]."""
        probability = (x_hat - self.low) / (self.high - self.low)
        return torch.where(torch.special.ndtr(noise) < probability, self.high, self.low)


def no_observation_noise(width: int) -> Observation:
    """Return an observation that adds no noise to rows of `width` features."""
    infinite = torch.full((width,), torch.inf)
    return Observation(torch.zeros(width), -infinite, infinite, torch.zeros(width, dtype=torch.bool))
