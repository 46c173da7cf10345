"""The autoencoder's score: Mahalanobis distances of the code and of the residual, weighed and added up."""

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf

from models.autoencoder import Autoencoder, no_whitening
from models.networks import mlp
from training.statistics import CODE_WEIGHT, PSEUDO_ROWS, judge, whitening_of

D, K = 5, 2
UNIT = torch.tensor(1.0)
MIXING = torch.eye(D) + 0.5 * torch.ones(D, D).triu()


def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    model = Autoencoder(mlp([D, 8, K]), mlp([K, 8, D]), no_whitening(K), no_whitening(D), torch.ones(2))
    return model.requires_grad_(False)


def test_a_code_is_a_point() -> None:
    model, x = autoencoder(), torch.randn(7, D)
    code, std = model.encode(x)
    assert torch.equal(code, model.encoder(x))
    assert torch.equal(std, torch.zeros(7, K))


def test_the_score_is_the_weighted_sum_of_both_distances() -> None:
    model, x = autoencoder(), torch.randn(500, D)
    judge(model, x, x)
    code, x_hat = model.encoder(x), model.decode(model.encoder(x))
    t2, q = model.code.distance(code), model.residual.distance(x - x_hat)
    score, parts, reconstruction = model.score(x)
    exact = CODE_WEIGHT * t2 / t2.mean() + q / q.mean()
    assert torch.allclose(score, exact, rtol=1e-4)
    assert torch.allclose(parts.sum(dim=1), score)
    assert torch.equal(reconstruction, x_hat)


def test_whitening_is_the_mahalanobis_distance_of_the_shrunk_covariance() -> None:
    vectors = torch.randn(400, D) @ torch.randn(D, D)
    centred = (vectors - vectors.mean(dim=0)).double().numpy()
    variance = (400 * centred.var(axis=0) + PSEUDO_ROWS) / (400 + PSEUDO_ROWS)
    standard = centred / np.sqrt(variance)
    correlation = LedoitWolf(assume_centered=True).fit(standard).covariance_
    np.fill_diagonal(correlation, np.maximum(correlation.diagonal(), 1.0))
    exact = np.einsum("nd,de,ne->n", standard, np.linalg.inv(correlation), standard)
    assert whitening_of(vectors, UNIT).distance(vectors).numpy() == pytest.approx(exact, rel=1e-3)


def test_whitened_vectors_of_many_rows_have_unit_covariance() -> None:
    vectors = torch.randn(50_000, D) @ MIXING + torch.randn(D)
    white = whitening_of(vectors, UNIT)(vectors)
    assert torch.allclose(white.mean(dim=0), torch.zeros(D), atol=1e-3)
    assert torch.allclose(white.T.cov(), torch.eye(D), atol=0.02)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_a_column_at_rest_that_moves_is_strange_and_finite(rows: int) -> None:
    vectors = torch.randn(rows, D)
    vectors[:, 3] = 0.0
    whitening = whitening_of(vectors, UNIT)
    moved = vectors.mean(dim=0).repeat(2, 1)
    moved[1, 3] += 1.0
    usual, strange = whitening.distance(moved).tolist()
    assert usual == pytest.approx(0.0, abs=1e-5)
    assert strange == pytest.approx((rows + PSEUDO_ROWS) / PSEUDO_ROWS, rel=1e-3)


def test_robust_whitening_recovers_the_clean_covariance() -> None:
    torch.manual_seed(0)
    clean = torch.randn(4000, D) @ MIXING
    clump = torch.tensor([10.0, -10.0, 10.0, -10.0, 10.0]) + torch.randn(800, D)  # a sixth of all
    dirty, truth = torch.cat((clean, clump)), MIXING.T @ MIXING

    def error(robust: bool) -> float:
        factor = whitening_of(dirty, UNIT, robust).factor
        covariance = torch.linalg.inv(factor.T @ factor)
        shape = covariance * (truth.trace() / covariance.trace())  # of trimmed rows the size is too small
        return float((shape - truth).norm() / truth.norm())

    assert error(robust=True) < 0.1
    assert error(robust=False) > 2 * error(robust=True)
