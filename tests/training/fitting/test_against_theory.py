"""Losses whose optimum is known in closed form. They are minimised numerically, and the result is compared with theory.

Most tests use float64 and the digits. If the networks are linear, the expectation of a loss over normal noise is
computed exactly: it is the mean over a few fixed points that have the mean and covariance of the normal distribution.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn.datasets import load_digits
from torch import Tensor, nn

from models.autoencoder import Autoencoder
from models.likelihood import GaussianLikelihood, OptimalGaussianLikelihood
from models.networks import mlp
from models.vae import VAE, gaussian_kl
from models.whitening import no_whitening
from training.fitting.losses import (
    corrupt,
    elbo_terms,
    importance_weighted_terms,
    squared_error_terms,
    weight_penalty,
)
from training.fitting.pca import fit_pca

pytestmark = pytest.mark.slow

DIGITS = torch.from_numpy(load_digits().data / 16.0)  # [1797, 64]
VALUES, VECTORS = torch.linalg.eigh(DIGITS.T.cov(correction=0))
EIGENVALUES, TOP = VALUES.flip(0).clamp(min=0.0), VECTORS.flip(1).T  # largest first; the rows of TOP are eigenvectors
# The optimum of a linear model depends only on the mean and the covariance of the rows. The 128 rows of X have the mean
# and the covariance of the digits. The 48 rows of LEADING have a diagonal covariance: the 24 largest eigenvalues of the
# covariance of the digits.
X = DIGITS.mean(dim=0) + math.sqrt(64) * torch.cat((TOP, -TOP)) * EIGENVALUES.sqrt().repeat(2).unsqueeze(1)
LEADING = math.sqrt(24) * torch.cat((torch.eye(24), -torch.eye(24))).double() * EIGENVALUES[:24].sqrt()


def minimise(model: nn.Module, loss: Callable[[], Tensor], steps: int = 1000) -> float:
    """Minimise `loss` with LBFGS until convergence, and return the minimum."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.LBFGS(
        parameters, max_iter=steps, tolerance_grad=1e-10, tolerance_change=1e-14, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    optimiser.step(closure)
    with torch.no_grad():
        return float(loss())


def linear_autoencoder(features: int, latents: int) -> Autoencoder:
    torch.manual_seed(0)
    whitening = no_whitening(latents + features)
    return Autoencoder(mlp([features, latents]), mlp([latents, features]), whitening, latents).double()


def linear_vae(latents: int, variance: float, learn: bool, features: int = 64) -> VAE:
    torch.manual_seed(0)
    likelihood = GaussianLikelihood(torch.tensor([variance]), learn)
    return VAE(mlp([features, 2 * latents]), mlp([latents, features]), likelihood).double()


def normal_points(size: int) -> Tensor:
    """Return twice `size` points. For a quadratic function, the mean over them is the expectation under N(0, I)."""
    return math.sqrt(size) * torch.cat((torch.eye(size), -torch.eye(size))).double()


def exact_elbo(vae: VAE, x: Tensor, latents: int, beta: float = 1.0) -> Tensor:
    """Return the loss of `elbo_terms` with the exact expectation over z, for a linear decoder."""
    points = normal_points(latents)  # [2 K, K]
    rows = x.repeat(len(points), 1)
    return elbo_terms(vae, rows, points.repeat_interleave(len(x), dim=0), beta)["loss"]


def layer(network: nn.Module) -> nn.Linear:
    """Return the only layer of `network`."""
    (only,) = network.children()
    assert isinstance(only, nn.Linear)
    return only


def weights(network: nn.Module) -> Tensor:
    return layer(network).weight.detach()


@pytest.mark.parametrize("latents", [2, 8])
def test_linear_autoencoder_has_the_error_and_the_subspace_of_pca(latents: int) -> None:
    model = linear_autoencoder(64, latents)
    loss = minimise(model, lambda: squared_error_terms(model, X)["loss"])
    assert loss == pytest.approx(float(EIGENVALUES[latents:].sum()), rel=1e-4)
    assert subspace_angles(weights(model.decoder).numpy(), TOP[:latents].numpy().T).max() < 1e-2


def test_weight_penalty_ties_and_shrinks_the_weights_of_a_linear_autoencoder() -> None:
    """Kunin et al. 2019, "Loss landscapes of regularized linear autoencoders", theorem 1."""
    latents, penalty = 4, 0.1
    model = linear_autoencoder(64, latents)
    minimise(model, lambda: squared_error_terms(model, X)["loss"] + penalty * weight_penalty(model))
    encoder, decoder = weights(model.encoder), weights(model.decoder)
    assert torch.allclose(encoder, decoder.T, atol=1e-4)
    singular = torch.linalg.svdvals(decoder).square()
    assert torch.allclose(singular, 1.0 - penalty / EIGENVALUES[:latents], atol=1e-4)


def test_linear_vae_reaches_the_likelihood_of_probabilistic_pca() -> None:
    """Lucas et al. 2019, "Don't blame the ELBO!", section 4. The learned variance is the noise variance of the PCA."""
    latents = 4
    vae = linear_vae(latents, variance=0.1, learn=True)
    loss = minimise(vae, lambda: exact_elbo(vae, X, latents))
    noise = EIGENVALUES[latents:].sum() / (64 - latents)
    spectrum = torch.cat((EIGENVALUES[:latents], noise.expand(64 - latents)))
    log_likelihood = -0.5 * float((spectrum.log() + math.log(2 * math.pi) + 1.0).sum())
    assert -loss == pytest.approx(log_likelihood, abs=1e-4)
    assert isinstance(vae.likelihood, GaussianLikelihood)
    assert float(vae.likelihood.log_variance.detach().exp()) == pytest.approx(float(noise), rel=1e-4)
    pca = fit_pca(X, latents)  # divides the covariance by N - 1, so the likelihood is a little lower
    assert float(pca.log_likelihood(X).mean()) <= log_likelihood + 1e-9


@pytest.mark.parametrize(("variance", "beta"), [(0.1, 1.0), (0.05, 4.0), (0.2, 1.0), (0.1, 6.0)])
def test_linear_vae_keeps_one_latent_per_eigenvalue_above_beta_times_the_variance(variance: float, beta: float) -> None:
    latents = 16
    expected = int((beta * variance < EIGENVALUES).sum())
    vae = linear_vae(latents, variance, learn=False, features=24)
    minimise(vae, lambda: exact_elbo(vae, LEADING, latents, beta), 500)
    with torch.no_grad():
        rotated = torch.linalg.eigvalsh(vae.posterior(LEADING)[0].T.cov())  # a rotation of the latents changes nothing
    assert int((rotated > 1e-3).sum()) == expected


def test_linear_denoising_autoencoder_is_pca_with_wiener_shrinkage() -> None:
    latents, level, x = 3, 0.5, X[:200, 18:26]
    model, points = linear_autoencoder(8, latents), level * normal_points(8)  # [16, 8]
    clean, noisy = x.repeat(len(points), 1), (x.unsqueeze(0) + points.unsqueeze(1)).flatten(0, 1)
    minimise(model, lambda: squared_error_terms(model, clean, noisy)["loss"])
    values, vectors = torch.linalg.eigh((x - x.mean(dim=0)).T.cov(correction=0))
    top = vectors.flip(1)[:, :latents]  # [8, K]
    gain = values.flip(0)[:latents] / (values.flip(0)[:latents] + level**2)
    assert torch.allclose(weights(model.decoder) @ weights(model.encoder), top * gain @ top.T, atol=1e-6)


def test_optimal_variance_is_the_mean_squared_error() -> None:
    """A learned variance converges to the optimal variance."""
    torch.manual_seed(0)
    output, likelihood = X + 0.3 * torch.randn_like(X), OptimalGaussianLikelihood(torch.ones(1)).double()
    learned = GaussianLikelihood(torch.ones(1)).double()
    best = minimise(learned, lambda: -learned.log_prob(X, output).mean())
    assert -float(likelihood.train().log_prob(X, output).mean()) == pytest.approx(best, abs=1e-6)
    likelihood.set_variance((X - output).square().mean())
    assert torch.allclose(likelihood.log_variance.exp(), learned.log_variance.detach().exp(), atol=1e-6)
    assert -float(likelihood.eval().log_prob(X, output).mean()) == pytest.approx(best, abs=1e-6)


def test_importance_weighted_bound_approaches_the_likelihood_with_more_samples() -> None:
    """The VAE is a probabilistic PCA, so the likelihood is known. The encoder's variance is 1.5 times too large."""
    latents, pca = 4, fit_pca(X, 4)
    vae = linear_vae(latents, float(pca.noise_variance), learn=False)
    scale = (pca.eigenvalues - pca.noise_variance).sqrt()  # [K]: x = mean + components' (scale z) + noise
    with torch.no_grad():
        gain = (scale / pca.eigenvalues).unsqueeze(1) * pca.components  # [K, D]
        variance = 1.5 * pca.noise_variance / pca.eigenvalues  # [K]
        decoder, encoder = layer(vae.decoder), layer(vae.encoder)
        decoder.weight.copy_(pca.components.T * scale)
        decoder.bias.copy_(pca.mean)
        encoder.weight.copy_(torch.cat((gain, torch.zeros_like(gain))))
        encoder.bias.copy_(torch.cat((-gain @ pca.mean, variance.log())))
        exact = float(pca.log_likelihood(X).mean())
        random = torch.Generator().manual_seed(0)
        gaps = {}
        for samples in (1, 5, 50, 500):
            noise = torch.randn(samples, len(X), latents, generator=random, dtype=torch.float64)
            gaps[samples] = exact - float(importance_weighted_terms(vae, X, noise)["bound"])
    # The gap between the log-likelihood and the ELBO is the KL of the encoder's posterior from the exact posterior.
    kl = 0.5 * latents * (1.5 - 1.0 - math.log(1.5))
    assert gaps[1] == pytest.approx(kl, abs=0.05)
    assert gaps[1] > gaps[5] > gaps[50] > abs(gaps[500])
    assert abs(gaps[500]) < 0.01


def test_loss_charges_each_latent_at_least_the_free_bits() -> None:
    vae, noise = linear_vae(3, 0.1, learn=False), torch.zeros(len(X), 3).double()
    with torch.no_grad():
        kl = gaussian_kl(*vae.posterior(X)).mean(dim=0)
        terms = elbo_terms(vae, X, noise, free_bits=float(kl.median()))
    charged = kl.clamp(min=float(kl.median())).sum()
    assert float(terms["loss"]) == pytest.approx(float(charged - terms["reconstruction"]))
    assert float(terms["kl"]) == pytest.approx(float(kl.sum()))


def test_corruption_adds_noise_of_the_given_levels_and_masks_the_given_share_of_values() -> None:
    random, ones = torch.Generator().manual_seed(0), torch.ones(4000, 400)
    noise = corrupt(ones, (0.05, 1.0), 0.0, random) - ones
    level = noise.std(dim=1).log().numpy()
    assert np.exp([level.min(), level.max()]) == pytest.approx([0.05, 1.0], rel=0.15)
    assert level.mean() == pytest.approx(math.log(0.05) / 2, abs=0.05)  # the levels are log-uniform
    assert level.std() == pytest.approx(-math.log(0.05) / math.sqrt(12), rel=0.05)
    assert float((corrupt(ones, (0.0, 0.0), 0.3, random) == 0).double().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(corrupt(ones, (0.0, 0.0), 0.0, random), ones)
