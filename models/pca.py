"""Principal component analysis as a probabilistic model (Tipping & Bishop 1999)."""

import math

import torch
from torch import Tensor

from models.core import Core
from models.whitening import Whitening


class PCA(Core):
    """K principal components of D features, and isotropic noise.

    The latents are the principal scores, z = V (x - mean). They are uncorrelated, they have the units of x, and their
    variances are `eigenvalues`. The probabilistic model is that of Tipping & Bishop, "Probabilistic principal component
    analysis", JRSS-B 1999. The covariance of x is C = V' (L - s2 I) V + s2 I. This is eq. 4 of that paper, with the
    maximum-likelihood solution of eq. 7 and 8.

    Args:
        mean: mean of the rows, [D].
        components: V, orthonormal rows in descending order of eigenvalue, [K, D].
        eigenvalues: the diagonal of L, each at least `noise_variance`, [K].
        noise_variance: s2 > 0, a scalar. It is the mean of the D - K discarded eigenvalues.
        shrinkage: rho in [0, 1], a scalar. The score uses the covariance (1 - rho) C + rho mean(diag C) I (Ledoit
            & Wolf 2004). If there are few rows, small eigenvalues are underestimated, and without shrinkage the score
            would be too high.
        whitening: whitens x, [D]. Its first K coordinates whiten the latents. If it is given, the score uses it instead
            of the shrunk covariance: for columns that nearly repeat each other, the noise outside the subspace is far
            from isotropic, and s2 would hide a break of one column.
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
        whitening: Whitening | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)
        self.register_buffer("eigenvalues", eigenvalues)
        self.register_buffer("noise_variance", noise_variance)
        self.register_buffer("shrinkage", torch.zeros_like(noise_variance) if shrinkage is None else shrinkage)
        self.whitening: Whitening | None = whitening  # a class annotation would not compile

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return two arrays for x [B, D]: the principal scores [B, K], and the posterior standard deviations [B, K].

        In the coordinates of the scores, the prior is N(0, L - s2) and the posterior variance is s2 (1 - s2 / L).
        """
        scores = (x - self.mean) @ self.components.T  # [B, K]
        variance = self.noise_variance * (1.0 - self.noise_variance / self.eigenvalues)  # [K]
        return scores, variance.clamp(min=0.0).sqrt().expand_as(scores)

    def decode(self, z: Tensor) -> Tensor:
        """Return the rows [B, D] that have the principal scores z [B, K]."""
        return z @ self.components + self.mean

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three arrays for x [B, D]: the score [B], its two parts [B, 2], and the projection of x [B, D].

        The score is a squared Mahalanobis distance, under the covariance of the whitening or under the shrunk
        covariance. T2 is the squared distance of the latents, and Q is the rest: by the chain rule for Gaussians, the
        squared distance of the residual from its conditional mean given the latents.
        """
        if self.whitening is not None:
            squares = self.whitening(x).square()  # [B, D]
            latents = self.eigenvalues.shape[0]
            t2, q = squares[:, :latents].sum(dim=1), squares[:, latents:].sum(dim=1)  # [B], [B]
            return t2 + q, torch.stack((t2, q), dim=1), self.decode(self.encode(x)[0])
        mean = self._mean_variance(x.shape[1])
        eigenvalues = self.eigenvalues + self.shrinkage * (mean - self.eigenvalues)  # [K]
        noise_variance = self.noise_variance + self.shrinkage * (mean - self.noise_variance)
        return self._distance(x, eigenvalues, noise_variance)

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002 - the posterior is exact
        """Return log p(x) [B] of x [B, D]. It does not depend on the noise: p(x, z) / q(z|x) = p(x) for all z."""
        return self.log_likelihood(x)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Return log N(x; mean, C) in nats, [B], of x [B, D] (Tipping & Bishop 1999, eq. 4)."""
        features, latents = x.shape[1], self.eigenvalues.shape[0]
        log_determinant = self.eigenvalues.log().sum() + (features - latents) * self.noise_variance.log()
        distance = self._distance(x, self.eigenvalues, self.noise_variance)[0]  # [B]
        return -0.5 * (features * math.log(2.0 * math.pi) + log_determinant + distance)

    @torch.jit.unused
    def score_form(self) -> tuple[Tensor, Tensor]:
        """Return the mean [D] and the precision matrix [D, D] of the Mahalanobis distance in `score`, float64."""
        if self.whitening is not None:
            factor = self.whitening.factor.double()
            precision = factor.T @ factor if factor.dim() == 2 else torch.diag(factor.square())
            return self.whitening.mean.double(), precision
        mean = self._mean_variance(len(self.mean))
        eigenvalues = (self.eigenvalues + self.shrinkage * (mean - self.eigenvalues)).double()
        noise_variance = (self.noise_variance + self.shrinkage * (mean - self.noise_variance)).double()
        components = self.components.double()
        along = components.T @ ((1.0 / eigenvalues - 1.0 / noise_variance).unsqueeze(1) * components)
        return self.mean.double(), torch.eye(len(self.mean), dtype=torch.float64) / noise_variance + along

    def _distance(self, x: Tensor, eigenvalues: Tensor, noise_variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.encode(x)[0]  # [B, K]
        x_hat = self.decode(scores)  # [B, D]
        t2 = (scores.square() / eigenvalues).sum(dim=1)  # [B]
        q = (x - x_hat).square().sum(dim=1) / noise_variance  # [B]
        return t2 + q, torch.stack((t2, q), dim=1), x_hat

    def _mean_variance(self, features: int) -> Tensor:
        """Return the mean of the diagonal of C, a scalar."""
        discarded = (features - self.eigenvalues.shape[0]) * self.noise_variance
        return (self.eigenvalues.sum() + discarded) / features
