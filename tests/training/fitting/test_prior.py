"""The fitted prior: a mixture of Gaussians on the latents of rows, with as many components as held-out rows support."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from models.core import Core
from training.fitting.prior import ROWS_PER_COMPONENT, covariance_of, fit_mixture, fit_prior

K = 3


class Posterior(Core):
    """A core whose posterior is N(x, spread^2) for rows x of K features."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.spread = spread

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.full_like(x, self.spread)


def clusters(count: int, rows: int, seed: int) -> np.ndarray:
    """Return rows [rows, K] around `count` centres that are 20 standard deviations apart."""
    random = np.random.RandomState(seed)
    centres = 20.0 * np.arange(count)[:, None] * np.array([1.0, -0.5, 0.25])
    return np.asarray(centres[random.randint(count, size=rows)] + random.standard_normal((rows, K)))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_mixture_of_well_separated_clusters_gets_one_component_per_cluster(count: int) -> None:
    mixture = fit_mixture(clusters(count, 1200, seed=0), clusters(count, 300, seed=1), seed=0)
    assert len(mixture.weights) == count
    assert mixture.weights == pytest.approx([1 / count] * count, abs=0.05)


def test_density_of_a_mixture_is_that_of_scipy() -> None:
    z = clusters(4, 600, seed=0)
    mixture = fit_mixture(z, clusters(4, 150, seed=1), seed=0)
    expected = sum(
        weight * multivariate_normal(mean, factor @ factor.T).pdf(z)
        for weight, mean, factor in zip(*mixture, strict=True)
    )
    assert np.exp(mixture.log_density(z)) == pytest.approx(expected, rel=1e-9)


def test_no_component_copies_a_row_even_if_the_held_out_rows_are_the_fit_rows() -> None:
    z = np.repeat(np.random.RandomState(0).standard_normal((60, K)), 2, axis=0)
    mixture = fit_mixture(z, z, seed=0)
    assert len(mixture.weights) <= len(z) // ROWS_PER_COMPONENT
    deviations = np.sqrt(np.einsum("mij,mij->mi", mixture.factors, mixture.factors))
    assert deviations.min() > 0.1  # it is 1 for the rows, and would be about 0.001 for a component that copies a row


def test_mixture_is_one_gaussian_with_the_moments_of_the_rows_if_there_are_too_few_rows_for_two() -> None:
    z = clusters(2, 2 * ROWS_PER_COMPONENT - 1, seed=0)
    mixture = fit_mixture(z, z, seed=0)
    assert mixture.means[0] == pytest.approx(z.mean(axis=0))
    assert mixture.factors[0] @ mixture.factors[0].T == pytest.approx(np.cov(z.T, ddof=0), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("value", [0.0, 7.0, 1e12])
def test_mixture_is_a_point_if_the_latents_have_no_variance(value: float) -> None:
    z = np.full((200, K), value)
    mixture = fit_mixture(z, z, seed=0)
    assert len(mixture.weights) == 1
    assert mixture.means == pytest.approx(z[:1])
    assert mixture.factors.max() < 1e-6


def test_prior_has_the_covariance_of_posterior_samples_with_spread_and_of_posterior_means_without() -> None:
    x = torch.from_numpy(clusters(4, 2000, seed=0)).float()
    held_out = torch.from_numpy(clusters(4, 400, seed=1)).float()
    of_means = torch.from_numpy(np.cov(x.T.double().numpy(), ddof=0))
    for with_spread, variance in ((False, 0.0), (True, 4.0)):
        prior = fit_prior(Posterior(2.0), x, held_out, 0, with_spread=with_spread)
        expected = of_means + variance * torch.eye(K)
        assert torch.allclose(covariance_of(prior), expected, rtol=0.03, atol=0.4)
        random = torch.Generator().manual_seed(0)
        drawn = prior(torch.randn(50_000, K, generator=random), torch.rand(50_000, generator=random))
        assert torch.allclose(drawn.T.double().cov(), covariance_of(prior), rtol=0.03, atol=0.4)


def test_equal_seeds_give_equal_priors() -> None:
    x = torch.from_numpy(clusters(4, 600, seed=0)).float()
    one, other = (fit_prior(Posterior(0.5), x, x[:100], 5, with_spread=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))
