"""`log_weight`, compared with the training objective, SciPy's density, the ELBO and the importance-weighted bound."""

import math

import pytest
import torch
from scipy.stats import multivariate_normal

from models.pca import PCA
from models.vae import VAE
from tests.models.builders import B, D, K, batch, core, pipeline
from training.fitting.losses import elbo_terms, importance_weighted_terms, log_weights

VAES = ("vae-gaussian", "vae-per-feature", "vae-bernoulli")


def vae(kind: str) -> VAE:
    torch.manual_seed(3)
    model = core(kind)
    assert isinstance(model, VAE)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", VAES)
def test_log_weight_of_a_vae_equals_the_log_weight_in_the_training_objective(kind: str) -> None:
    model, (x, noise, _) = vae(kind), batch()
    assert torch.allclose(model.log_weight(x, noise), log_weights(model, x, noise.unsqueeze(0))[0], atol=1e-5)


def test_log_weight_of_pca_is_the_log_density_for_any_noise() -> None:
    model = core("pca")
    assert isinstance(model, PCA)
    x, noise, _ = batch()
    weights = model.components.T * (model.eigenvalues - model.noise_variance).sqrt()  # [D, K]
    covariance = weights @ weights.T + model.noise_variance * torch.eye(D)
    exact = multivariate_normal(model.mean.numpy(), covariance.double().numpy()).logpdf(x.numpy())
    for any_noise in (noise, torch.zeros_like(noise), 5 * noise):
        assert model.log_weight(x, any_noise).numpy() == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("kind", ["ae", "ae-diagonal"])
def test_log_weight_of_an_autoencoder_is_nan(kind: str) -> None:
    x, noise, _ = batch()
    log_weight = pipeline(kind).log_weight(x, noise)
    assert log_weight.shape == (B,)
    assert bool(log_weight.isnan().all())


@pytest.mark.parametrize("kind", VAES)
def test_log_weights_have_the_elbo_as_mean_and_the_importance_weighted_bound_as_log_mean_exp(kind: str) -> None:
    samples, model, x = 20_000, vae(kind), batch()[0]
    noise = torch.randn(samples, B, K, generator=torch.Generator().manual_seed(0))
    weights = torch.stack([model.log_weight(x, one) for one in noise[:500]])  # [S, B]
    bound = importance_weighted_terms(model, x, noise[:500])["bound"]
    assert float((weights.logsumexp(dim=0) - math.log(500)).mean()) == pytest.approx(float(bound), abs=1e-4)
    repeated, flat = x.repeat(samples, 1), noise.flatten(0, 1)
    many = model.log_weight(repeated, flat).double().reshape(samples, B).mean(dim=1)  # [S]
    elbo = float(elbo_terms(model, repeated, flat)["elbo"])  # computed with the closed form of the KL term
    assert float(many.mean()) == pytest.approx(elbo, abs=5 * float(many.std()) / math.sqrt(samples))


def test_pipeline_gives_the_log_weight_of_its_core_for_the_scaled_rows() -> None:
    model, (x, noise, _) = pipeline("vae-gaussian"), batch()
    assert torch.equal(model.log_weight(x, noise), model.core.log_weight(model.scaling(x), noise))
