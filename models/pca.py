"""Principal component analysis, read as the probabilistic model that it is the maximum-likelihood fit of."""

import math

import torch
from torch import Tensor

from models.core import Core


class PCA(Core):
    """K principal components of D features, and the noise that is left.

    A latent is a principal score, z = V (x - mean): in the units of x, variance `eigenvalues`, uncorrelated.
    The probabilistic model is Tipping & Bishop, "Probabilistic principal component analysis", JRSS-B 1999, with
    covariance C = V' (L - s2 I) V + s2 I (their eq. 4 at the maximum-likelihood point, eq. 7 and 8).

    Args:
        mean: [D].
        components: V, [K, D], orthonormal rows, largest eigenvalue first.
        eigenvalues: the diagonal of L, [K], each at least `noise_variance`.
        noise_variance: s2, a scalar > 0: the mean of the D - K discarded eigenvalues.
        shrinkage: rho in [0, 1], a scalar; the score's covariance is (1 - rho) C + rho mean(diag C) I. Of few rows the
            small eigenvalues are too small, and what lies along them would seem too strange (Ledoit & Wolf 2004).
    """

    parts = ("t2", "q")
    mean: Tensor
    components: Tensor
    eigenvalues: Tensor
    noise_variance: Tensor
    shrinkage: Tensor

    def __init__(
        self,
        mean: Tensor,
        components: Tensor,
        eigenvalues: Tensor,
        noise_variance: Tensor,
        shrinkage: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)
        self.register_buffer("eigenvalues", eigenvalues)
        self.register_buffer("noise_variance", noise_variance)
        self.register_buffer("shrinkage", torch.zeros_like(noise_variance) if shrinkage is None else shrinkage)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Principal scores [B, K] of x [B, D], and the posterior standard deviation of the latent there, [B, K].

        In score coordinates the prior is N(0, L - s2) and the posterior variance s2 (1 - s2 / L).
        """
        scores = (x - self.mean) @ self.components.T  # [B, K]
        variance = self.noise_variance * (1.0 - self.noise_variance / self.eigenvalues)  # [K]
        return scores, variance.clamp(min=0.0).sqrt().expand_as(scores)

    def decode(self, z: Tensor) -> Tensor:
        """Scores [B, K] back to [B, D]."""
        return z @ self.components + self.mean

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How strange x [B, D] is: T2 + Q / s2 [B], those two parts [B, 2], and the projection of x [B, D].

        The sum is the squared Mahalanobis distance under the shrunk covariance.
        """
        mean = self._mean_variance(x.shape[1])
        eigenvalues = self.eigenvalues + self.shrinkage * (mean - self.eigenvalues)  # [K]
        noise_variance = self.noise_variance + self.shrinkage * (mean - self.noise_variance)
        return self._distance(x, eigenvalues, noise_variance)

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002 - its posterior is exact
        """log p(x) of x [B, D], [B], whatever the noise: p(x, z) / q(z|x) is p(x) for every z."""
        return self.log_likelihood(x)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """log N(x; mean, C) in nats, [B, D] to [B]. Tipping & Bishop 1999, eq. 4."""
        features, latents = x.shape[1], self.eigenvalues.shape[0]
        log_determinant = self.eigenvalues.log().sum() + (features - latents) * self.noise_variance.log()
        distance = self._distance(x, self.eigenvalues, self.noise_variance)[0]  # [B]
        return -0.5 * (features * math.log(2.0 * math.pi) + log_determinant + distance)

    def _distance(self, x: Tensor, eigenvalues: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.encode(x)[0]  # [B, K]
        x_hat = self.decode(scores)  # [B, D]
        t2 = (scores.square() / eigenvalues).sum(dim=1)  # [B]
        q = (x - x_hat).square().sum(dim=1) / noise_variance  # [B]
        return t2 + q, torch.stack((t2, q), dim=1), x_hat

    def _mean_variance(self, features: int) -> Tensor:
        """The mean of the diagonal of C, a scalar."""
        left = (features - self.eigenvalues.shape[0]) * self.noise_variance
        return (self.eigenvalues.sum() + left) / features
