"""Priors: the moments of their samples."""

import numpy as np
import pytest
import torch
from torch import Tensor

from models.prior import Prior, gaussian_prior

N = 200_000


def sample(prior: Prior, latents: int) -> Tensor:
    random = np.random.RandomState(0)
    noise = torch.from_numpy(random.standard_normal((N, latents)))
    samples: Tensor = prior(noise, torch.from_numpy(random.uniform(size=N)))
    return samples


def test_standard_normal_prior_returns_the_noise() -> None:
    noise = torch.randn(50, 3)
    assert torch.equal(gaussian_prior(torch.ones(3))(noise, torch.rand(50)), noise)


def test_gaussian_prior_multiplies_the_noise_by_the_standard_deviations() -> None:
    noise, std = torch.randn(50, 3), torch.tensor([0.5, 1.0, 4.0])
    assert torch.allclose(gaussian_prior(std)(noise, torch.rand(50)), noise * std)


def test_samples_have_the_weights_means_and_covariances_of_the_mixture() -> None:
    weights, means = (
        torch.tensor([0.2, 0.5, 0.3]).double(),
        torch.tensor([[-50.0, 0.0], [0.0, 0.0], [50.0, 9.0]]).double(),
    )
    factors = torch.tensor([[[1.0, 0.0], [0.5, 2.0]], [[0.1, 0.0], [0.0, 0.1]], [[3.0, 0.0], [-1.0, 0.5]]]).double()
    latents = sample(Prior(weights, means, factors), 2)
    nearest = (latents[:, :1] - means[:, 0]).abs().argmin(dim=1)
    for index in range(3):
        own = latents[nearest == index]
        assert len(own) / N == pytest.approx(float(weights[index]), abs=0.005)
        assert torch.allclose(own.mean(dim=0), means[index], atol=0.05)
        assert torch.allclose(own.T.cov(), factors[index] @ factors[index].T, atol=0.1)


def test_rows_of_a_large_draw_are_bit_identical_to_rows_drawn_alone() -> None:
    torch.manual_seed(0)
    count, latents = 3, 16
    prior = Prior(torch.full((count,), 1 / 3), torch.randn(count, latents), torch.randn(count, latents, latents).tril())
    noise, choice = torch.randn(150, latents), torch.rand(150)
    alone = torch.cat([prior(noise[row : row + 1], choice[row : row + 1]) for row in range(150)])
    assert torch.equal(prior(noise, choice), alone)
    by_product = torch.stack(
        [
            prior.factors[index].double() @ row.double() + prior.means[index].double()
            for index, row in zip((choice * count).long().tolist(), noise, strict=True)
        ]
    )
    assert torch.allclose(alone.double(), by_product, atol=1e-4)


def test_choice_near_0_selects_the_first_component_and_near_1_the_last() -> None:
    prior = Prior(torch.full((3,), 1 / 3), torch.arange(3.0).unsqueeze(1), torch.zeros(3, 1, 1))
    latents = prior(torch.zeros(3, 1), torch.tensor([0.0, 0.5, 0.99999994]))
    assert latents.squeeze(1).tolist() == [0.0, 1.0, 2.0]
