"""The generative prior over latents: a mixture of Gaussians. The prior N(0, I) is the case of one Gaussian."""

import torch
from torch import Tensor, nn


class Prior(nn.Module):
    """A mixture of M Gaussians over K latents.

    Args:
        weights: mixture weights, positive, with sum 1, [M].
        means: means of the Gaussians, [M, K].
        factors: lower Cholesky factors of the covariances of the Gaussians, [M, K, K].
    """

    cumulative: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, weights: Tensor, means: Tensor, factors: Tensor) -> None:
        super().__init__()
        self.register_buffer("cumulative", weights.cumsum(dim=0))
        self.register_buffer("means", means)
        self.register_buffer("factors", factors)

    def forward(self, noise: Tensor, choice: Tensor) -> Tensor:
        """Draw latents [B, K]. The draw needs memory for B x K x K numbers.

        Args:
            noise: standard normal numbers, [B, K].
            choice: uniform numbers in [0, 1), which select the Gaussian of each row, [B].
        """
        component = torch.searchsorted(self.cumulative[:-1].contiguous(), choice, right=True)  # [B]
        factors = self.factors[component]  # [B, K, K]
        # A sum, unlike a matrix product, has the same bits for any number of rows.
        return (factors * noise.unsqueeze(1)).sum(dim=2) + self.means[component]


def gaussian_prior(std: Tensor) -> Prior:
    """Return the prior N(0, diag(std^2)) for std [K]."""
    return Prior(std.new_ones(1), torch.zeros_like(std).unsqueeze(0), torch.diag(std).unsqueeze(0))
