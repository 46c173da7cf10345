"""The score of the autoencoder and the whitening, compared with numpy and scikit-learn."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from models.autoencoder import Autoencoder
from models.networks import mlp
from models.whitening import no_whitening
from tests.models.covariances import regularised_covariance
from training.fitting.score_statistics import LATENT_NOISE, ORDINARY_PERCENT, fit_score_statistics
from training.fitting.whitening import PSEUDO_ROWS, fit_whitening

Doubles = npt.NDArray[np.float64]

D, K = 5, 2
UNIT = torch.tensor(1.0)
MIXING = torch.eye(D) + 0.5 * torch.ones(D, D).triu()


def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(mlp([D, 8, K]), mlp([K, 8, D]), no_whitening(K + D), K)
    return model.requires_grad_(False)


def test_encode_gives_the_latents_and_zero_standard_deviation() -> None:
    model, x = autoencoder(), torch.randn(7, D)
    latents, std = model.encode(x)
    assert torch.equal(latents, model.encoder(x))
    assert torch.equal(std, torch.zeros(7, K))


def vectors_of(model: Autoencoder, x: torch.Tensor) -> Doubles:
    """Return the joint vectors [N, K + D] of x [N, D]: the latents, then the residual."""
    latents = model.encode(x)[0]
    return torch.cat((latents, x - model.decode(latents)), dim=1).double().numpy()


def test_score_is_the_mahalanobis_distance_of_latents_and_residual() -> None:
    model, x = autoencoder(), torch.randn(500, D) @ MIXING
    fit_score_statistics(model, x, x)
    vectors = vectors_of(model, x)
    usual = np.repeat([vectors[:, :K].var(axis=0).mean(), x.double().numpy().var(axis=0).mean()], [K, D])
    noise = np.repeat([LATENT_NOISE, 0.0], [K, D])
    covariance, centred = regularised_covariance(vectors, usual, noise)[0], vectors - vectors.mean(axis=0)
    score, parts, x_hat = model.score(x)
    exact = np.einsum("nv,vw,nw->n", centred, np.linalg.inv(covariance), centred)
    assert score.numpy() == pytest.approx(exact, rel=1e-3)
    assert torch.equal(parts.sum(dim=1), score)
    assert torch.equal(x_hat, model.decode(model.encode(x)[0]))
    latents, residual = centred[:, :K], centred[:, K:]
    t2 = np.einsum("nv,vw,nw->n", latents, np.linalg.inv(covariance[:K, :K]), latents)
    gain = covariance[K:, :K] @ np.linalg.inv(covariance[:K, :K])  # E[residual | latents] = gain @ latents
    unexplained = residual - latents @ gain.T
    conditional_covariance = covariance[K:, K:] - gain @ covariance[:K, K:]
    q = np.einsum("nv,vw,nw->n", unexplained, np.linalg.inv(conditional_covariance), unexplained)
    assert parts.numpy() == pytest.approx(np.column_stack((t2, q)), rel=1e-3, abs=1e-5)


def test_few_rows_with_huge_residuals_do_not_change_the_scores_of_normal_rows() -> None:
    model, x = autoencoder(), torch.randn(100, D)
    fit_score_statistics(model, x, x)
    before = model.score(x)[0]
    outliers = 1e6 * torch.randn(100 * (100 - ORDINARY_PERCENT) // ORDINARY_PERCENT, D)
    fit_score_statistics(model, torch.cat((outliers, x)), x)
    assert torch.allclose(model.score(x)[0], before)
    assert bool((model.score(outliers)[0] > 1e6 * before.max()).all())


def test_cluster_of_many_distant_rows_counts_as_normal() -> None:
    model, x = autoencoder(), torch.randn(100, D)
    x[:15] *= 1e3  # distant, but too many to be outliers
    fit_score_statistics(model, x, x)
    assert float(model.score(x)[0].mean()) == pytest.approx(K / (1 + LATENT_NOISE) + D, rel=0.3)


@pytest.mark.parametrize(("rows", "noise", "expected"), [(8, 0.001, 0), (100, 0.001, 3), (100, 1.0, 0), (400, 0.01, 3)])
def test_whitening_distance_is_the_mahalanobis_distance_under_the_regularised_covariance(
    rows: int, noise: float, expected: int
) -> None:
    """The first four columns nearly repeat each other, unless the noise is large. In column 4, one row deviates."""
    random = np.random.RandomState(rows)
    vectors = random.standard_normal((rows, 1)) + noise * random.standard_normal((rows, D))
    vectors[:, 4] = 1e-3 * random.standard_normal(rows)
    vectors[3, 4] = 1.0
    exact, revealed = regularised_covariance(vectors, 1.0)
    centred = vectors - vectors.mean(axis=0)
    distance = np.einsum("nd,de,ne->n", centred, np.linalg.inv(exact), centred)
    found = fit_whitening(torch.from_numpy(vectors), UNIT).distance(torch.from_numpy(vectors)).numpy()
    assert found == pytest.approx(distance, rel=1e-4)
    assert revealed == expected


@pytest.mark.parametrize("rows", [30, 100, 1000])
def test_distance_of_a_broken_row_approaches_the_exact_distance_as_rows_are_added(rows: int) -> None:
    """Five columns repeat one load with noise of 0.001. In the broken row, column 2 deviates by 0.03."""
    random, noise = np.random.RandomState(0), 1e-3
    vectors = random.standard_normal((rows, 1)) + noise * random.standard_normal((rows, D))
    broken = torch.from_numpy(vectors.mean(axis=0, keepdims=True))
    broken[0, 2] += 30 * noise
    truth = np.ones((D, D)) + noise**2 * np.eye(D)
    exact = (30 * noise) ** 2 * np.linalg.inv(truth)[2, 2]
    found = float(fit_whitening(torch.from_numpy(vectors), UNIT).distance(broken))
    assert found == pytest.approx(exact, rel={30: 0.9, 100: 0.5, 1000: 0.15}[rows])


def test_whitened_vectors_have_zero_mean_and_unit_covariance() -> None:
    vectors = torch.randn(50_000, D) @ MIXING + torch.randn(D)
    white = fit_whitening(vectors, UNIT)(vectors)
    assert torch.allclose(white.mean(dim=0), torch.zeros(D), atol=1e-3)
    assert torch.allclose(white.T.cov(), torch.eye(D), atol=0.02)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_distance_is_large_but_finite_if_a_constant_column_changes(rows: int) -> None:
    vectors = torch.randn(rows, D)
    vectors[:, 3] = 0.0
    whitening = fit_whitening(vectors, UNIT)
    moved = vectors.mean(dim=0).repeat(2, 1)
    moved[1, 3] += 1.0
    normal, anomalous = whitening.distance(moved).tolist()
    assert normal == pytest.approx(0.0, abs=1e-5)
    assert anomalous == pytest.approx((rows + PSEUDO_ROWS) / PSEUDO_ROWS, rel=1e-3)


def test_robust_whitening_recovers_the_clean_covariance() -> None:
    torch.manual_seed(0)
    clean = torch.randn(4000, D) @ MIXING
    outliers = torch.tensor([10.0, -10.0, 10.0, -10.0, 10.0]) + torch.randn(800, D)  # a sixth of all rows
    contaminated, truth = torch.cat((clean, outliers)), MIXING.T @ MIXING

    def error(robust: bool) -> float:
        factor = fit_whitening(contaminated, UNIT, robust).factor
        covariance = torch.linalg.inv(factor.T @ factor)
        shape = covariance * (truth.trace() / covariance.trace())  # trimming reduces the covariance: undo that
        return float((shape - truth).norm() / truth.norm())

    assert error(robust=True) < 0.1
    assert error(robust=False) > 2 * error(robust=True)
