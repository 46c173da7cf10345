"""Losses and their gradients, compared with plain formulas and with theory."""

import math

import pytest
import torch
from torch import Tensor

from models.likelihood import BernoulliLikelihood, GaussianLikelihood, Likelihood
from models.networks import mlp
from models.vae import VAE
from training.fitting.losses import (
    binarise,
    elbo_terms,
    importance_weighted_terms,
    log_likelihood,
    log_weights,
)

ROWS, LATENTS, FEATURES = 2, 2, 3


def vae_of(likelihood: Likelihood) -> VAE:
    torch.manual_seed(0)
    return VAE(mlp([FEATURES, 4, 2 * LATENTS]), mlp([LATENTS, 4, FEATURES]), likelihood).double()


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(vae: VAE, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `loss` for the encoder and for the decoder, each as one vector."""
    parts = [list(network.parameters()) for network in (vae.encoder, vae.decoder)]
    flat = torch.autograd.grad(loss, parts[0] + parts[1])
    size = len(parts[0])
    return torch.cat([g.flatten() for g in flat[:size]]), torch.cat([g.flatten() for g in flat[size:]])


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)])
def test_training_computes_the_same_bernoulli_log_likelihood_as_the_model(shape: tuple[int, ...]) -> None:
    x = 3.0 * torch.rand(shape[-2:], generator=random(0)).double() - 1.0  # some values outside [0, 1]
    logits = (30.0 * torch.randn(shape, generator=random(1)).double()).requires_grad_()
    plain = BernoulliLikelihood().log_prob(x.expand(shape).flatten(0, -2), logits.flatten(0, -2)).reshape(shape[:-1])
    training = log_likelihood(BernoulliLikelihood(), x, logits)
    assert torch.allclose(training, plain, rtol=0.0, atol=1e-10)
    weights = torch.randn(shape[:-1], generator=random(2)).double()
    (training_gradient,), (plain_gradient,) = (
        torch.autograd.grad((weights * each).sum(), logits) for each in (training, plain)
    )
    assert torch.allclose(training_gradient, plain_gradient, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("logit", [0.0, -0.0, 90.0, -90.0, 1e30, -1e30])
def test_bernoulli_log_likelihood_is_finite_for_any_logit(logit: float) -> None:
    logits = torch.full((1, 2), logit, requires_grad=True)
    x = torch.tensor([[0.0, 1.0]])
    value = log_likelihood(BernoulliLikelihood(), x, logits)
    value.backward()
    assert float(value.detach()) == pytest.approx(-abs(logit) if logit else -2 * math.log(2))
    assert logits.grad is not None
    assert torch.allclose(logits.grad, x - torch.sigmoid(logits.detach()))


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", [BernoulliLikelihood(), GaussianLikelihood(torch.tensor([0.3, 0.1, 0.2]))])
@pytest.mark.parametrize("draws", [1, 4])
def test_doubly_reparameterised_gradient_is_unbiased(likelihood: Likelihood, draws: int) -> None:
    """Tucker et al. 2019, eq. 8: the encoder's gradient equals the usual gradient only in expectation.

    The decoder's gradient equals the usual gradient exactly.
    """
    vae, batches = vae_of(likelihood), 60
    x = (torch.rand(ROWS, FEATURES, generator=random(3)) < 0.5).double().repeat(500, 1)
    differences = []
    for batch in range(batches):
        noise = torch.randn(draws, len(x), LATENTS, generator=random(batch)).double()
        bound = (log_weights(vae, x, noise).logsumexp(dim=0) - math.log(draws)).mean()
        terms = importance_weighted_terms(vae, x, noise)
        assert float(terms["bound"].detach()) == pytest.approx(float(bound.detach()))
        (plain, plain_decoder), (doubly, decoder) = gradients(vae, -bound), gradients(vae, terms["loss"])
        assert torch.allclose(plain_decoder, decoder, atol=1e-10)
        differences.append(doubly - plain)
    difference = torch.stack(differences)
    error = difference.std(dim=0) / math.sqrt(batches)
    # 4.5 is a safe bound on the largest of 36 t-statistics with 59 degrees of freedom
    assert float((difference.mean(dim=0).abs() / (error + 1e-12)).max()) < 4.5


@pytest.mark.parametrize("draws", [1, 5])
def test_importance_weighted_loss_has_no_encoder_gradient_if_the_posterior_is_exact(draws: int) -> None:
    """Roeder et al. 2017, section 3. The usual gradient of the ELBO is noisy even for an exact posterior."""
    variance, loading = 0.25, torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).double()  # orthogonal columns
    vae = VAE(
        mlp([FEATURES, 2 * LATENTS]), mlp([LATENTS, FEATURES]), GaussianLikelihood(torch.tensor([variance]).double())
    )
    vae = vae.double()
    posterior = variance / (loading.square().sum(dim=0) + variance)  # [K]
    (encoder,), (decoder,) = vae.encoder.children(), vae.decoder.children()
    assert isinstance(encoder, torch.nn.Linear)
    assert isinstance(decoder, torch.nn.Linear)
    with torch.no_grad():
        decoder.weight.copy_(loading)
        decoder.bias.zero_()
        gain = posterior.unsqueeze(1) * loading.T / variance  # [K, D]
        encoder.weight.copy_(torch.cat((gain, torch.zeros_like(gain))))
        encoder.bias.copy_(torch.cat((torch.zeros(LATENTS).double(), posterior.log())))
    x = torch.randn(ROWS, FEATURES, generator=random(4)).double()
    noise = torch.randn(draws, ROWS, LATENTS, generator=random(5)).double()
    assert float(gradients(vae, importance_weighted_terms(vae, x, noise)["loss"])[0].abs().max()) < 1e-12
    assert float(gradients(vae, elbo_terms(vae, x, noise[0])["loss"])[0].abs().max()) > 1e-3


def test_binarised_values_are_0_or_1_and_their_mean_is_the_input() -> None:
    x = torch.linspace(0.0, 1.0, 11).expand(20_000, 11)
    binary = binarise(x, random(0))
    assert set(binary.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(binary[:, [0, 10]], x[:, [0, 10]])
    assert torch.allclose(binary.mean(dim=0), x[0], atol=5 * 0.5 / math.sqrt(20_000))
    assert torch.equal(binary, binarise(x, random(0)))
    assert not torch.equal(binary, binarise(x, random(1)))
