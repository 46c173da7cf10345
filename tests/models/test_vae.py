"""The terms of the VAE, compared with torch.distributions, and the ELBO, compared with an exact likelihood."""

import math

import pytest
import torch
from torch import Tensor, distributions
from torch.nn import Linear

from models.likelihood import BernoulliLikelihood, GaussianLikelihood
from models.networks import mlp
from models.vae import LOG_VARIANCE_RANGE, VAE, gaussian_kl
from training.fitting.losses import elbo_terms

B, D, K = 40, 6, 3


def test_kl_agrees_with_torch_distributions() -> None:
    torch.manual_seed(0)
    mean, log_variance = 3 * torch.randn(B, K, dtype=torch.float64), 2 * torch.randn(B, K, dtype=torch.float64)
    posterior = distributions.Normal(mean, (0.5 * log_variance).exp())
    exact = distributions.kl_divergence(posterior, distributions.Normal(torch.zeros(()), torch.ones(())))
    assert torch.allclose(gaussian_kl(mean, log_variance), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize("variances", [1, D])
def test_gaussian_likelihood_agrees_with_torch_distributions(variances: int) -> None:
    torch.manual_seed(0)
    x, output = torch.randn(B, D, dtype=torch.float64), torch.randn(B, D, dtype=torch.float64)
    variance = torch.rand(variances, dtype=torch.float64) + 0.1
    exact = distributions.Normal(output, variance.sqrt()).log_prob(x).sum(dim=1)
    assert torch.allclose(GaussianLikelihood(variance).log_prob(x, output), exact, atol=1e-6, rtol=0)


def test_bernoulli_likelihood_agrees_with_torch_distributions() -> None:
    torch.manual_seed(0)
    x, logits = torch.rand(B, D, dtype=torch.float64).round(), torch.randn(B, D, dtype=torch.float64)
    exact = distributions.Bernoulli(logits=logits).log_prob(x).sum(dim=1)
    assert torch.allclose(BernoulliLikelihood().log_prob(x, logits), exact, atol=1e-6, rtol=0)
    assert torch.allclose(BernoulliLikelihood().mean(logits), distributions.Bernoulli(logits=logits).mean)


def test_bernoulli_likelihood_falls_quadratically_outside_the_range_from_0_to_1() -> None:
    output = torch.full((1, 1), 5.0)
    inside, outside = (BernoulliLikelihood().log_prob(torch.tensor([[value]]), output) for value in (1.0, 4.0))
    assert float(inside - outside) == pytest.approx(0.5 * 3.0**2)


def test_encode_returns_mean_and_standard_deviation_of_the_posterior() -> None:
    vae, x = VAE(mlp([D, 2 * K]), mlp([K, D]), GaussianLikelihood(torch.ones(1))), torch.randn(B, D)
    raw = vae.encoder(x)
    mean, std = vae.encode(x)
    assert torch.equal(mean, raw[:, :K])
    assert torch.allclose(std, (0.5 * raw[:, K:]).exp())


def test_decode_and_score_return_the_mean_of_the_likelihood() -> None:
    vae, x, z = VAE(mlp([D, 2 * K]), mlp([K, D]), BernoulliLikelihood()), torch.randn(B, D), torch.randn(B, K)
    assert torch.equal(vae.decode(z), torch.sigmoid(vae.decoder(z)))
    assert torch.equal(vae.score(x)[2], torch.sigmoid(vae.decoder(vae.encode(x)[0])))


def test_posterior_variance_stays_within_its_bounds() -> None:
    encoder = Linear(1, 2, bias=False)
    vae = VAE(encoder, mlp([1, D]), GaussianLikelihood(torch.ones(1)))
    with torch.no_grad():
        encoder.weight.fill_(1.0)
        std = vae.encode(torch.tensor([[-1e3], [-2.0], [1e3]]))[1]
    low, high = LOG_VARIANCE_RANGE
    assert std[:, 0].tolist() == pytest.approx([math.exp(0.5 * low), math.exp(-1.0), math.exp(0.5 * high)])


def linear_vae(posterior_scale: float) -> tuple[VAE, Tensor, distributions.MultivariateNormal]:
    """Return three values: a linear VAE, rows [B, D], and the exact density of these rows.

    The VAE's encoder gives the exact posterior mean, and the exact posterior variance times `posterior_scale`.
    """
    torch.manual_seed(1)
    weights, offset, noise = torch.randn(D, K).double(), torch.randn(D).double(), 0.3
    precision = torch.eye(K).double() + weights.T @ weights / noise
    weights = weights @ torch.linalg.eigh(precision).eigenvectors  # make the posterior covariance diagonal
    covariance = torch.linalg.inv(torch.eye(K).double() + weights.T @ weights / noise)
    encoder, decoder = Linear(D, 2 * K).double(), Linear(K, D).double()
    vae = VAE(encoder, decoder, GaussianLikelihood(torch.tensor([noise]).double()))
    with torch.no_grad():
        decoder.weight.copy_(weights)
        decoder.bias.copy_(offset)
        gain = covariance @ weights.T / noise  # [K, D]
        encoder.weight.copy_(torch.cat((gain, torch.zeros(K, D).double())))
        encoder.bias.copy_(torch.cat((-gain @ offset, (posterior_scale * covariance.diagonal()).log())))
    marginal = distributions.MultivariateNormal(offset, weights @ weights.T + noise * torch.eye(D).double())
    return vae, marginal.sample(torch.Size([B])), marginal


def expected_elbo(vae: VAE, x: Tensor) -> float:
    """Return the exact expectation of the ELBO of a linear VAE over standard normal noise.

    The mean over the noise vectors +-sqrt(K) e_i is exact, because their first two moments are those of N(0, I).
    """
    points = math.sqrt(K) * torch.cat((torch.eye(K), -torch.eye(K))).double()
    return sum(float(elbo_terms(vae, x, point.expand(B, K))["elbo"].detach()) for point in points) / (2 * K)


@pytest.mark.slow
def test_elbo_of_the_exact_posterior_is_the_log_likelihood() -> None:
    vae, x, marginal = linear_vae(posterior_scale=1.0)
    assert expected_elbo(vae, x) == pytest.approx(float(marginal.log_prob(x).mean()), abs=1e-6)


@pytest.mark.parametrize("posterior_scale", [0.2, 0.7, 1.5, 4.0])
def test_elbo_is_lower_by_the_kl_divergence_if_the_posterior_is_inexact(
    posterior_scale: float,
) -> None:
    vae, x, marginal = linear_vae(posterior_scale)
    gap = 0.5 * K * (posterior_scale - 1.0 - math.log(posterior_scale))
    assert expected_elbo(vae, x) == pytest.approx(float(marginal.log_prob(x).mean()) - gap, abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_beta_scales_the_kl_term_of_the_loss_but_not_of_the_reported_elbo(beta: float) -> None:
    vae, x, _ = linear_vae(posterior_scale=1.0)
    with torch.no_grad():
        terms = elbo_terms(vae, x, torch.zeros(B, K).double(), beta)
    assert float(terms["loss"]) == pytest.approx(float(beta * terms["kl"] - terms["reconstruction"]))
    assert float(terms["elbo"]) == pytest.approx(float(terms["reconstruction"] - terms["kl"]))


def test_score_is_the_negative_elbo_at_the_posterior_mean() -> None:
    vae, x, _ = linear_vae(posterior_scale=1.0)
    with torch.no_grad():
        score, parts, _ = vae.score(x)
        terms = elbo_terms(vae, x, torch.zeros(B, K).double())
    assert float(score.mean()) == pytest.approx(-float(terms["elbo"]))
    assert float(parts[:, 0].mean()) == pytest.approx(float(terms["kl"]))
    assert torch.allclose(parts.sum(dim=1), score)
