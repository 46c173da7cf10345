"""The autoencoder's score: a Mahalanobis distance that splits into the code's part and the residual's."""

import torch
from sklearn.covariance import LedoitWolf

from models.autoencoder import Autoencoder, Whitening
from models.networks import mlp
from training.statistics import whitening_of

D, K = 5, 2


def autoencoder() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(mlp([D, 8, K]), mlp([K, 8, D]), Whitening(torch.zeros(K + D), torch.ones(K + D))).requires_grad_(
        False
    )


def joint(model: Autoencoder, x: torch.Tensor) -> torch.Tensor:
    code = model.encode(x)[0]
    return torch.cat((code, x - model.decode(code)), dim=1)


def test_a_code_is_a_point() -> None:
    model, x = autoencoder(), torch.randn(7, D)
    code, std = model.encode(x)
    assert torch.equal(code, model.encoder(x))
    assert torch.equal(std, torch.zeros(7, K))


def test_score_is_the_mahalanobis_distance_of_code_and_residual() -> None:
    model, x = autoencoder(), torch.randn(500, D)
    model.whitening = whitening_of(model, x)
    vectors = joint(model, x).double()
    centred, deviation = vectors - vectors.mean(dim=0), vectors.std(dim=0, correction=0)
    shrunk = LedoitWolf(assume_centered=True).fit((centred / deviation).numpy()).precision_
    whitened = centred / deviation
    exact = ((whitened @ torch.from_numpy(shrunk)) * whitened).sum(dim=1)
    score, parts, _ = model.score(x)
    assert torch.allclose(score.double(), exact, rtol=1e-4)
    assert torch.allclose(parts.sum(dim=1), score)


def test_t2_is_the_distance_of_the_code_alone() -> None:
    model, x = autoencoder(), torch.randn(5000, D)
    model.whitening = whitening_of(model, x)
    code = joint(model, x)[:, :K].double()
    centred = code - code.mean(dim=0)
    exact = ((centred @ torch.linalg.inv(code.T.cov(correction=0))) * centred).sum(dim=1)
    assert torch.allclose(model.score(x)[1][:, 0].double(), exact, rtol=0.05, atol=0.1)


def test_whitening_survives_a_constant_column() -> None:
    model, x = autoencoder(), torch.randn(100, D)
    x[:, 3] = 0.0
    model.whitening = whitening_of(model, x)
    assert bool(model.score(torch.randn(10, D))[0].isfinite().all())


def test_whitening_survives_fewer_rows_than_dimensions() -> None:
    model, x = autoencoder(), torch.randn(3, D)
    model.whitening = whitening_of(model, x)
    assert bool(model.score(torch.randn(10, D))[0].isfinite().all())
