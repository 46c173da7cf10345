"""PCA, compared with scikit-learn, SciPy and a worked example."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.stats import multivariate_normal
from sklearn.covariance import ledoit_wolf
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA as Reference

from models.pca import PCA
from models.whitening import Whitening
from tests.data import mnist
from training.errors import FitError
from training.fitting.pca import fit_pca
from training.fitting.score_statistics import fit_shrinkage

Array = npt.NDArray[np.float64]


def digits() -> Array:
    return np.asarray(load_digits().data / 16.0)


def fitted(x: Array, latents: int) -> PCA:
    return fit_pca(torch.from_numpy(x), latents)


@pytest.mark.slow
@pytest.mark.parametrize("latents", [1, 2, 16, 40, 60])
def test_components_and_eigenvalues_agree_with_scikit_learn(latents: int) -> None:
    x = digits()
    pca, reference = fitted(x, latents), Reference(latents, svd_solver="full").fit(x)
    angles = subspace_angles(pca.components.numpy().T, reference.components_.T)
    assert angles.max() < 1e-6
    assert pca.eigenvalues.numpy() == pytest.approx(reference.explained_variance_, rel=1e-9)
    assert float(pca.noise_variance) == pytest.approx(reference.noise_variance_, rel=1e-9)


@pytest.mark.parametrize("latents", [1, 16, 40])
def test_log_likelihood_equals_the_gaussian_density(latents: int) -> None:
    x = digits()
    pca = fitted(x, latents)
    weights = pca.components.T * (pca.eigenvalues - pca.noise_variance).sqrt()  # [D, K]
    covariance = weights @ weights.T + pca.noise_variance * torch.eye(64, dtype=torch.float64)
    closed_form = multivariate_normal(pca.mean.numpy(), covariance.numpy()).logpdf(x[:200])
    log_likelihood = pca.log_likelihood(torch.from_numpy(x[:200])).numpy()
    assert np.abs(log_likelihood - closed_form).max() < 1e-6
    assert np.abs(log_likelihood - Reference(latents, svd_solver="full").fit(x).score_samples(x[:200])).max() < 1e-6


@pytest.mark.slow
def test_score_is_the_mahalanobis_distance_and_equals_the_sum_of_its_parts() -> None:
    x = digits()
    pca = fitted(x, 10)
    score, parts, x_hat = pca.score(torch.from_numpy(x))
    weights = pca.components.T * (pca.eigenvalues - pca.noise_variance).sqrt()
    precision = torch.linalg.inv(weights @ weights.T + pca.noise_variance * torch.eye(64, dtype=torch.float64))
    centred = torch.from_numpy(x) - pca.mean
    assert torch.allclose(score, ((centred @ precision) * centred).sum(dim=1), rtol=1e-9)
    assert torch.allclose(parts.sum(dim=1), score)
    reference = Reference(10, svd_solver="full").fit(x)
    assert np.allclose(x_hat.numpy(), reference.inverse_transform(reference.transform(x)))


def test_score_with_shrinkage_is_the_mahalanobis_distance_under_the_ledoit_wolf_covariance() -> None:
    """With D minus 1 latents, only one eigenvalue is discarded, so PCA's covariance equals the sample covariance."""
    x = np.random.RandomState(0).standard_normal((60, 8)) @ np.diag(np.arange(1.0, 9.0))
    pca, centred = fitted(x, 7), x - x.mean(axis=0)
    pca.shrinkage = fit_shrinkage(torch.from_numpy(x), pca.mean)
    plain, (shrunk, rho) = np.cov(x.T), ledoit_wolf(centred, assume_centered=True)
    assert float(pca.shrinkage) == pytest.approx(rho)
    assert rho > 0.01
    exact = (1 - rho) * plain + rho * np.trace(plain) / 8 * np.eye(8)
    distance = np.einsum("nd,de,ne->n", centred, np.linalg.inv(exact), centred)
    assert pca.score(torch.from_numpy(x))[0].numpy() == pytest.approx(distance, rel=1e-6)
    assert exact == pytest.approx(shrunk * 60 / 59, rel=1e-6)  # scikit-learn divides by N, not by N minus 1
    before = fitted(x, 7).log_likelihood(torch.from_numpy(x))
    assert torch.equal(pca.log_likelihood(torch.from_numpy(x)), before)


def test_posterior_std_equals_that_of_the_linear_gaussian_model() -> None:
    x = digits()
    pca = fitted(x, 5)
    loading = pca.components.T  # x = loading @ z + mean + noise, where z has the prior precision below
    prior_precision = torch.diag(1.0 / (pca.eigenvalues - pca.noise_variance))
    posterior = torch.linalg.inv(prior_precision + loading.T @ loading / pca.noise_variance)
    std = pca.encode(torch.from_numpy(x[:1]))[1]
    assert torch.allclose(std.squeeze(0), posterior.diagonal().sqrt(), rtol=1e-9)


def test_pca_gives_the_eigenvalues_and_scores_of_the_worked_example() -> None:
    """The example is three points in the plane, with values computed by hand."""
    x = np.array([[1.0, 2.0], [2.0, 3.0], [3.0, 5.0]])
    pca = fitted(x, 1)
    assert pca.mean.tolist() == pytest.approx([2.0, 10.0 / 3.0])
    assert float(pca.eigenvalues[0]) == pytest.approx(3.3081, abs=5e-5)
    assert float(pca.noise_variance) == pytest.approx(0.0252, abs=5e-5)  # the only discarded eigenvalue
    # The product of all eigenvalues is the determinant of the covariance.
    assert float(pca.eigenvalues[0] * pca.noise_variance) == pytest.approx(1.0 * 7.0 / 3.0 - 1.5**2)
    sign = np.sign(float(pca.components[0, 0]))
    assert sign * pca.components[0].numpy() == pytest.approx([0.5449, 0.8385], abs=5e-5)
    scores = -sign * pca.encode(torch.from_numpy(x))[0].squeeze(1).numpy()
    assert scores == pytest.approx([1.6629, 0.2795, -1.9424], abs=5e-5)


def test_pca_with_more_features_than_rows_agrees_with_scikit_learn() -> None:
    x = np.random.RandomState(0).standard_normal((20, 50))
    pca, reference = fitted(x, 5), Reference(5, svd_solver="full").fit(x)
    assert subspace_angles(pca.components.numpy().T, reference.components_.T).max() < 1e-6
    assert pca.eigenvalues.numpy() == pytest.approx(reference.explained_variance_)


@pytest.mark.slow
def test_mnist_reconstruction_error_with_32_components_equals_the_documented_value() -> None:
    train, test = mnist("train"), mnist("test")
    pca = fitted(train, 32)
    x = torch.from_numpy(test)
    error = float((x - pca.decode(pca.encode(x)[0])).square().mean())
    assert error == pytest.approx(0.016828, abs=1e-6)
    reference = Reference(32, svd_solver="covariance_eigh").fit(train)
    assert subspace_angles(pca.components.numpy().T, reference.components_.T).max() < 1e-6


@pytest.mark.parametrize("latents", [1, 2, 3])
def test_scores_of_data_without_noise_are_finite(latents: int) -> None:
    flat = np.random.RandomState(0).standard_normal((30, 1)) * np.ones((30, 3))  # three equal columns
    pca = fitted(flat, latents)
    score, parts, _ = pca.score(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64))
    assert bool(parts.isfinite().all())
    assert score[1] > 100 * score[0]


def test_fit_raises_only_if_all_columns_are_constant() -> None:
    x = np.random.RandomState(0).standard_normal((30, 3))
    x[:, 1] = 7.0
    assert bool(fitted(x, 2).components.isfinite().all())
    with pytest.raises(FitError, match="all 3 columns are constant"):
        fitted(np.ones((30, 3)), 2)


@pytest.mark.parametrize(("shape", "latents"), [((30, 3), 4), ((4, 9), 4)])
def test_fit_with_too_many_latents_raises_an_error_that_names_the_largest_number(
    shape: tuple[int, int], latents: int
) -> None:
    with pytest.raises(FitError, match="lower --latents to 3"):
        fitted(np.random.RandomState(0).standard_normal(shape), latents)


def test_score_under_a_whitening_is_the_mahalanobis_distance_of_its_covariance_and_t2_that_of_the_latents() -> None:
    random = np.random.RandomState(0)
    features, latents = 6, 2
    x, factors = random.normal(size=(50, features)), random.normal(size=(features, features))
    basis = np.linalg.qr(random.normal(size=(features, features)))[0].T  # rows; the first are the components
    mean, covariance = random.normal(size=features), factors @ factors.T + np.eye(features)
    rotated = basis @ covariance @ basis.T
    factor = np.linalg.inv(np.linalg.cholesky(rotated)) @ basis
    components, eigenvalues = torch.from_numpy(basis[:latents]), torch.tensor([2.0, 1.0], dtype=torch.float64)
    whitening = Whitening(torch.from_numpy(mean), torch.from_numpy(factor))
    pca = PCA(torch.from_numpy(mean), components, eigenvalues, torch.tensor(0.5).double(), whitening=whitening)
    score, parts, x_hat = (tensor.numpy() for tensor in pca.score(torch.from_numpy(x)))

    def distances(rows: Array, matrix: Array) -> Array:
        return np.asarray(np.einsum("bi,ij,bj->b", rows, np.linalg.inv(matrix), rows))

    scores = (x - mean) @ basis[:latents].T  # [B, K]
    assert score == pytest.approx(distances(x - mean, covariance))
    assert parts[:, 0] == pytest.approx(distances(scores, rotated[:latents, :latents]))
    assert parts.sum(axis=1) == pytest.approx(score)
    assert x_hat == pytest.approx(scores @ basis[:latents] + mean)
