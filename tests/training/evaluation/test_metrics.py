"""Metrics of a model, compared with closed forms, scipy and scikit-learn."""

import math
import re

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA as Reference
from torch import Tensor, nn

from models.calibration import Calibration
from models.core import Core
from models.likelihood import BernoulliLikelihood, GaussianLikelihood
from models.pipeline import Pipeline
from models.prior import gaussian_prior
from models.scaling import ImputingScaling, Scaling, standardise
from models.vae import VAE
from tests.data import ROOT
from training.evaluation.metrics import (
    bits_per_dimension,
    count_latents,
    density_scale,
    held_out_metrics,
    importance_weighted,
    pca_metrics,
)
from training.fitting.latents import describe_latents
from training.fitting.losses import log_weights
from training.fitting.pca import fit_pca
from training.reports.model_card import MEASURES

D, K, VARIANCE = 6, 2, 0.3
WEIGHTS = np.linalg.qr(np.random.RandomState(0).standard_normal((D, K)))[0] * [2.0, 0.7]  # orthogonal columns


def linear_vae(widening: float) -> VAE:
    """Return a VAE with p(x) = N(0, W W' + s2 I), where W is WEIGHTS and s2 is VARIANCE.

    The encoder returns the exact posterior, but with `widening` times the exact standard deviation.
    """
    squares = np.square(WEIGHTS).sum(axis=0)  # [K]
    encoder, decoder = nn.Linear(D, 2 * K), nn.Linear(K, D)
    with torch.no_grad():
        encoder.weight.zero_()
        encoder.weight[:K] = torch.tensor((WEIGHTS / (squares + VARIANCE)).T)
        encoder.bias.zero_()
        encoder.bias[K:] = torch.tensor(np.log(VARIANCE / (squares + VARIANCE)) + 2 * math.log(widening))
        decoder.weight.copy_(torch.tensor(WEIGHTS))
        decoder.bias.zero_()
    return VAE(encoder, decoder, GaussianLikelihood(torch.tensor([VARIANCE]), learn=False)).eval()


def sample_rows(count: int) -> tuple[Tensor, npt.NDArray[np.float64]]:
    """Sample rows from p(x) of `linear_vae`. Return the rows [count, D], and log p(x) of every row [count]."""
    density = multivariate_normal(np.zeros(D), WEIGHTS @ WEIGHTS.T + VARIANCE * np.eye(D))
    x = density.rvs(count, random_state=np.random.RandomState(1))
    return torch.from_numpy(x).float(), density.logpdf(x)


def pipeline(core: Core, scaling: Scaling) -> Pipeline:
    return Pipeline(scaling, core, gaussian_prior(torch.ones(K)), Calibration(torch.arange(20.0))).eval()


@pytest.mark.parametrize(("widening", "tolerance"), [(1.0, 1e-5), (1.4, 0.02)])
def test_importance_weighted_bound_of_a_linear_vae_matches_the_exact_log_likelihood(
    widening: float, tolerance: float
) -> None:
    vae, (x, log_p) = linear_vae(widening), sample_rows(600)
    bound = importance_weighted(lambda x, noise: log_weights(vae, x, noise[None])[0], x, K, samples=100)
    assert bound.mean == pytest.approx(log_p.mean(), abs=tolerance)
    assert bound.standard_error == pytest.approx(log_p.std(ddof=1) / math.sqrt(600), rel=0.02)
    gap = K * (0.5 * (widening**2 - 1) - math.log(widening))  # KL of the widened posterior from the exact posterior
    assert bound.elbo == pytest.approx(log_p.mean() - gap, abs=0.02)


def test_importance_weighted_bound_summed_in_batches_equals_the_formula_of_burda_et_al() -> None:
    vae, (x, _) = linear_vae(2.0), sample_rows(300)
    log_weights_seen: list[Tensor] = []

    def log_weight(x: Tensor, noise: Tensor) -> Tensor:
        log_weights_seen.append(log_weights(vae, x, noise[None])[0])
        return log_weights_seen[-1]

    bound = importance_weighted(log_weight, x, K, samples=7)
    first_batch, second_batch = torch.stack(log_weights_seen[:7]), torch.stack(log_weights_seen[7:])
    weights = torch.cat([first_batch, second_batch], dim=1).double()  # [7, 300]
    assert bound.mean == pytest.approx(float((weights.logsumexp(0) - math.log(7)).mean()), abs=1e-9)
    again = importance_weighted(log_weight, x, K, samples=7)
    assert torch.equal(again.by_row, bound.by_row), "the same seed gives the same samples"


def test_bits_per_dimension_of_pca_agree_with_the_gaussian_density_in_raw_units() -> None:
    x = torch.from_numpy(np.random.RandomState(2).standard_normal((500, D)) * [1, 5, 20, 3, 0.1, 7] + 4).float()
    scaling = standardise(x.double())
    scaling = Scaling(scaling.shift.float(), scaling.scale.float())
    pca = fit_pca(scaling(x).double(), K).float()
    spread = np.diag(scaling.scale.double().numpy())
    V, L, s2 = (t.double().numpy() for t in (pca.components, pca.eigenvalues, pca.noise_variance))
    covariance = spread @ (V.T @ np.diag(L - s2) @ V + s2 * np.eye(D)) @ spread
    mean = scaling.inverse(pca.mean.unsqueeze(0))[0].double().numpy()
    log_p = multivariate_normal(mean, covariance).logpdf(x.double().numpy())
    metrics = held_out_metrics(pipeline(pca, scaling), x, x.mean(dim=0), None, seed=0)
    assert metrics["bits_per_dimension"] == pytest.approx(-log_p.mean() / (D * math.log(2)), rel=1e-4)


def test_bits_per_dimension_are_8_for_a_uniform_density_and_1_for_a_coin() -> None:
    """A uniform density over 256 raw units takes 8 bits. A fair coin takes one bit at any scale."""
    assert bits_per_dimension(-3 * math.log(256 / 50), 3 * math.log(50), 3) == pytest.approx(8)
    coin = VAE(nn.Linear(D, 2 * K), nn.Linear(K, D), BernoulliLikelihood())
    scaling = Scaling(torch.zeros(D), torch.full((D,), 255.0))
    assert density_scale(coin, scaling) == 0
    assert bits_per_dimension(-D * math.log(2), density_scale(coin, scaling), D) == pytest.approx(1)


def test_pca_metrics_equal_the_metrics_of_scikit_learn() -> None:
    random = np.random.RandomState(3)
    x = torch.from_numpy(random.standard_normal((400, K)) @ WEIGHTS.T * 3 + random.standard_normal((400, D))).float()
    scaling = standardise(x)
    pca = fit_pca(scaling(x[:300]).double(), K).float()
    u = scaling(x).double().numpy()
    reference = Reference(K).fit(u[:300])
    u_hat = reference.inverse_transform(reference.transform(u[300:]))
    raw = u_hat * scaling.scale.double().numpy() + scaling.shift.double().numpy()
    error = np.square(x[300:].double().numpy() - raw).mean()
    figures = pca_metrics(pca, scaling, x[300:])
    assert figures["reconstruction_error"] == pytest.approx(error, rel=1e-5)
    assert figures["log_likelihood"] == pytest.approx(reference.score(u[300:]), rel=1e-5)
    metrics = held_out_metrics(pipeline(linear_vae(1.0), scaling), x[300:], x[:300].mean(dim=0), pca, seed=0)
    assert metrics["pca_error"] == pytest.approx(error, rel=1e-5)


def test_errors_are_means_over_the_present_values_if_values_are_missing() -> None:
    x, _ = sample_rows(200)
    centre = x.mean(dim=0)
    gaps = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    imputed, incomplete = torch.where(gaps, centre, x), x.masked_fill(gaps, math.nan)
    model = pipeline(linear_vae(1.0), ImputingScaling(Scaling(torch.zeros(D), torch.ones(D)), centre))
    metrics = held_out_metrics(model, incomplete, centre, None, seed=0)
    residual = (imputed - model(imputed).detach()).double()[~gaps]
    assert metrics["reconstruction_error"] == pytest.approx(float(residual.square().mean()), rel=1e-6)
    assert metrics["baseline_error"] == pytest.approx(float((x - centre).double()[~gaps].square().mean()), rel=1e-6)
    assert all(math.isfinite(value) for value in metrics.values())


def test_latent_report_of_a_linear_vae_matches_theory() -> None:
    """Let w_k be the length of column k of WEIGHTS, and s2 be VARIANCE.

    The KL of latent k is 0.5 ln(1 + w_k^2 / s2). The variance of the mean of latent k is w_k^2 / (w_k^2 + s2).
    """
    vae, (x, _) = linear_vae(1.0), sample_rows(20_000)
    squares = np.square(WEIGHTS).sum(axis=0)
    report = describe_latents(vae, x)
    assert [latent.kl for latent in report] == pytest.approx(0.5 * np.log1p(squares / VARIANCE), rel=0.02)
    assert [latent.variance for latent in report] == pytest.approx(squares / (squares + VARIANCE), rel=0.02)
    assert [latent.active for latent in report] == [True, True]
    assert count_latents(vae, x) == K


def test_latent_report_of_pca_has_variances_but_no_kl() -> None:
    x, _ = sample_rows(500)
    report = describe_latents(fit_pca(x.double(), K).float(), x)
    assert [latent.kl for latent in report] == [None, None]
    eigenvalues = np.linalg.eigvalsh(np.cov(x.double().numpy().T, ddof=0))[::-1][:K]
    assert [latent.variance for latent in report] == pytest.approx(eigenvalues, rel=1e-4)


def test_every_measure_is_documented_and_has_a_title_in_the_model_card() -> None:
    x, _ = sample_rows(50)
    scaling = Scaling(torch.zeros(D), torch.ones(D))
    pca = fit_pca(x.double(), K).float()
    measured = {
        name
        for core in (pca, linear_vae(1.0))
        for name in held_out_metrics(pipeline(core, scaling), x, x.mean(dim=0), pca, seed=0)
    }
    page, _ = (ROOT / "docs" / "reference" / "measures.md").read_text().split("## Measures of samples")
    documented = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    of_samples = {
        "sample_density",
        "sample_coverage",
        "expected_coverage",
        "copy_p_value",
    }  # see test_sample_metrics.py
    assert measured | of_samples | {"detection"} == documented == set(MEASURES)  # `detection`: from model selection
