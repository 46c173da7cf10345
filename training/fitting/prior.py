"""Fit the prior: the distribution from which the latents of new rows are sampled."""

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.conditional import ConditionalPrior
from models.core import Core
from models.manifest import Conditions
from models.prior import Prior
from training.data.conditions import one_hot
from training.random_streams import PRIOR, random_stream

MAX_COMPONENTS = 64
ROWS_PER_COMPONENT = 30  # the mixture has at most one component per this many rows, so that none is a copy of a row
MIXTURE_ROWS = 10_000  # the mixture is fitted to the latents of at most this many rows
SHRINKAGE = 0.5  # each component borrows this many rows per latent from all components together
CONDITION_ROWS = 4_000  # the mixture of a condition is fitted to the latents of at most this many rows
MIN_CONDITION_ROWS = 2  # a condition with fewer fit rows has no mixture of its own
MIN_HELD_OUT_ROWS = 5  # with fewer held-out rows, the mixture of a condition is one Gaussian
MAX_ITERATIONS = 100
TOLERANCE = 0.01  # a fit ends when an iteration gains less than this, in nats per row; 0.001 takes three times as long
BATCH = 4096  # rows per forward pass; limits the memory
Array = npt.NDArray[np.float64]


class Mixture(NamedTuple):
    """A mixture of M Gaussians over K latents: weights [M], means [M, K], lower Cholesky factors [M, K, K]."""

    weights: Array
    means: Array
    factors: Array

    def log_density(self, z: Array) -> Array:
        """Return the log-density in nats, [N], at z [N, K]."""
        from scipy.linalg import solve_triangular
        from scipy.special import logsumexp

        terms = [
            math.log(weight)
            - 0.5 * np.square(solve_triangular(factor, (z - mean).T, lower=True)).sum(axis=0)
            - np.log(np.diag(factor)).sum()
            for weight, mean, factor in zip(self.weights, self.means, self.factors, strict=True)
        ]
        density: Array = logsumexp(terms, axis=0) - 0.5 * z.shape[1] * math.log(2.0 * math.pi)
        return density


def fit_prior(core: Core, u: Tensor, held_out: Tensor, seed: int, *, with_spread: bool) -> Prior:
    """Return the prior. Its samples decode to rows that resemble the fit rows u [N, D].

    It is a mixture of Gaussians that is fitted to the latents of u after training (Ghosh et al. 2020, "From variational
    to deterministic autoencoders", section 4). The likelihood of the held-out rows determines the number of
    components. A VAE has the prior N(0, I) too, but its latents do not fill it.

    Args:
        core: the fitted model.
        u: fit rows in model units.
        held_out: rows [M, D] to which neither the model nor the mixture is fitted.
        seed: seed of the posterior samples and of the start of the fit.
        with_spread: whether the latents are samples from the posterior instead of its mean. Rows that get observation
            noise need it: without it, they would vary less than the fit rows. Without observation noise, as for images,
            the spread blurs the samples.
    """
    fit, validation = (
        _encode(core, rows[:MIXTURE_ROWS], seed, index, with_spread) for index, rows in enumerate((u, held_out))
    )
    weights, means, factors = (torch.from_numpy(part).float() for part in fit_mixture(fit, validation, seed))
    return Prior(weights, means, factors)


def fit_conditional_prior(
    core: Core, u: Tensor, held_out: Tensor, seed: int, known: Conditions, *, with_spread: bool
) -> ConditionalPrior:
    """Return a prior with a mixture for each condition that enough fit rows have, and one for all other conditions.

    The mixtures are those of `fit_prior`. The latents of an autoencoder depend on the condition. Those of a VAE
    would not if its networks made full use of the condition, but in practice they do.

    Args:
        core: the fitted model.
        u: fit rows in model units, with their conditions, [N, D + C].
        held_out: rows to which neither the model nor the mixtures are fitted, [M, D + C].
        seed: as for `fit_prior`.
        known: the conditions that the model knows.
        with_spread: as for `fit_prior`.
    """
    z, validation = (_encode(core, each, seed, index, with_spread) for index, each in enumerate((u, held_out)))
    every = fit_mixture(z[:MIXTURE_ROWS], validation[:MIXTURE_ROWS], seed)
    mixtures, conditions = [every], [torch.zeros(known.width)]
    pooled = _covariance_within(z, u[:, -known.width :].numpy())
    for condition in torch.from_numpy(one_hot(known, np.array(known.combinations))):
        of_fit, of_held_out = (
            codes[(each[:, -known.width :] == condition).all(dim=1).numpy()][:CONDITION_ROWS]
            for codes, each in ((z, u), (validation, held_out))
        )
        if len(of_fit) < MIN_CONDITION_ROWS:
            continue
        mixtures.append(_fit_condition(of_fit, of_held_out, pooled, seed))
        conditions.append(condition)
    weights, means, factors = (torch.from_numpy(np.concatenate(parts)).float() for parts in zip(*mixtures, strict=True))
    return ConditionalPrior(weights, means, factors, torch.stack(conditions))


def _covariance_within(z: Array, condition: npt.NDArray[np.float32]) -> Array:
    """Return the covariance [K, K] of latents z [N, K] within conditions [N, C].

    From the latents of each row, the mean latents of the rows with the same condition are subtracted.
    """
    _, number, counts = np.unique(condition, axis=0, return_inverse=True, return_counts=True)
    means = np.zeros((len(counts), z.shape[1]))
    np.add.at(means, number, z)
    centred = z - (means / counts[:, None])[number]
    return centred.T @ centred / max(1, len(z) - len(counts))


def _fit_condition(z: Array, held_out: Array, pooled: Array, seed: int) -> Mixture:
    """Return the mixture of the latents z [N, K] of the rows of one condition.

    With few rows, it is one Gaussian. Its covariance is shrunk towards `pooled` [K, K], which has the weight of
    SHRINKAGE rows per latent.
    """
    rows, latents = z.shape
    if rows >= 2 * ROWS_PER_COMPONENT and rows >= 2 * latents and len(held_out) >= MIN_HELD_OUT_ROWS:
        return fit_mixture(z, held_out, seed, errors=0.0)
    borrowed = SHRINKAGE * latents
    centred = z - z.mean(axis=0)
    covariance = (centred.T @ centred + borrowed * pooled) / (rows + borrowed)
    covariance += 1e-6 * max(float(np.trace(covariance)) / latents, 1e-6) * np.eye(latents)
    return Mixture(np.ones(1), z.mean(axis=0)[None], np.linalg.cholesky(covariance)[None])


def fit_mixture(z: Array, held_out: Array, seed: int, errors: float = 1.0) -> Mixture:
    """Return a mixture that is fitted to latents z [N, K], and under which `held_out` [M, K] are likely.

    The number of components doubles until two doublings in a row give no higher likelihood. The result is the simplest
    mixture that is worse than the best one by at most `errors` standard errors.
    """
    from threadpoolctl import threadpool_limits

    mixtures, densities = [], []
    with threadpool_limits(1):  # the matrices are small: several threads would take ten times as long on a busy machine
        for count in _counts(len(z)):
            mixtures.append(_fit_components(z, count, seed))
            densities.append(mixtures[-1].log_density(held_out))  # [M]
            means = [float(density.mean()) for density in densities]
            if len(means) > 2 and not max(means[-2:]) > max(means[:-2]):
                break
    best = max(densities, key=lambda density: float(density.mean()))  # [M]
    losses = [best - density for density in densities]  # each [M]
    limits = [errors * float(loss.std()) / math.sqrt(len(loss)) for loss in losses]
    return next(m for m, loss, limit in zip(mixtures, losses, limits, strict=True) if not loss.mean() > limit)


def covariance_of(prior: Prior) -> Tensor:
    """Return the covariance [K, K] of the latents that `prior` draws, float64."""
    weights = prior.cumulative.double().diff(prepend=prior.cumulative.new_zeros(1).double())  # [M]
    means, factors = prior.means.double(), prior.factors.double()
    deviations = means - weights @ means  # [M, K]
    within = torch.einsum("m,mij,mkj->ik", weights, factors, factors)
    return within + torch.einsum("m,mi,mk->ik", weights, deviations, deviations)


def _encode(core: Core, u: Tensor, seed: int, index: int, with_spread: bool) -> Array:
    """Return the latents [N, K] of rows u [N, D]: the posterior means, or samples from the posterior."""
    random = random_stream(seed, PRIOR, index)
    latents = []
    with torch.no_grad():
        for rows in u.split(BATCH):
            mean, std = core.encode(rows)  # [B, K], [B, K]
            if with_spread:
                mean = mean + std * torch.randn(mean.shape, generator=random)
            latents.append(mean.double())
    array: Array = torch.cat(latents).numpy()
    return array


def _counts(rows: int) -> Iterator[int]:
    count = 1
    while count == 1 or (count <= MAX_COMPONENTS and count * ROWS_PER_COMPONENT <= rows):
        yield count
        count *= 2


def _fit_components(z: Array, count: int, seed: int) -> Mixture:
    """Return a mixture of `count` components that is fitted to latents z [N, K].

    The covariance of each component is shrunk towards the mean covariance of all components: a component of few rows
    underestimates its small eigenvalues, and would not cover other rows of its kind.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    centre = z.mean(axis=0)
    scale = math.sqrt(float(z.var(axis=0).mean())) or 1e-6
    rows, latents = z.shape
    mixture = GaussianMixture(count, random_state=seed, reg_covar=1e-6, tol=TOLERANCE, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        # The held-out likelihood judges a fit that has not converged, or that has fewer clusters than components.
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit((z - centre) / scale)
    weights, covariances = mixture.weights_, mixture.covariances_
    pooled = np.einsum("m,mij->ij", weights, covariances)
    own, borrowed = (rows * weights)[:, None, None], SHRINKAGE * latents
    shrunk = (own * covariances + borrowed * pooled) / (own + borrowed)
    return Mixture(weights, centre + scale * mixture.means_, scale * np.linalg.cholesky(shrunk))
