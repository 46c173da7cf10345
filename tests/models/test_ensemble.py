"""The ensemble's score, and the ensemble's nearest-neighbour detector, compared with scikit-learn."""

import copy

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from models.ensemble import Ensemble, Neighbours
from models.whitening import no_whitening
from tests.models.builders import D, batch, core, pipeline
from tests.models.covariances import regularised_covariance
from training.fitting.score_statistics import (
    MAX_NEIGHBOURS,
    NEIGHBOUR_NOISE,
    NEIGHBOUR_RANK,
    fit_neighbours,
    fit_score_statistics,
)


def ensemble() -> Ensemble:
    torch.manual_seed(0)
    model = core("ensemble")
    assert isinstance(model, Ensemble)
    return model.eval().requires_grad_(False)


def test_neighbours_give_the_smallest_scaled_squared_distance_to_a_reference_row() -> None:
    rows, scale, x = torch.randn(50, D), torch.rand(50) + 0.1, torch.randn(20, D)
    exact = (torch.cdist(x.double(), rows.double()).square() / scale).amin(dim=1)
    near = Neighbours(no_whitening(D), rows, scale)
    assert torch.allclose(near(x).double(), exact, atol=1e-4)
    assert torch.allclose(near(rows), torch.zeros(50), atol=1e-4)


def test_fitted_neighbours_give_scaled_mahalanobis_distances() -> None:
    """Each distance is divided by the scale of the reference row.

    Let d be the squared distance of a reference row to its neighbour of rank NEIGHBOUR_RANK. The scale of the row is d
    plus the mean of d over all reference rows.
    """
    torch.manual_seed(0)
    mixing = torch.randn(D, D)
    x, new_rows = torch.randn(200, D) @ mixing, torch.randn(50, D) @ mixing
    centred = x.double().numpy() - x.double().numpy().mean(axis=0)
    precision = np.linalg.inv(
        regularised_covariance(x.double().numpy(), centred.var(axis=0).mean(), NEIGHBOUR_NOISE)[0]
    )
    nearest = NearestNeighbors(metric="mahalanobis", metric_params={"VI": precision}, algorithm="brute").fit(x.numpy())
    own = nearest.kneighbors(x.numpy(), NEIGHBOUR_RANK + 1)[0][:, -1] ** 2
    distances, places = nearest.kneighbors(new_rows.numpy(), 200)
    exact = (distances**2 / (own + own.mean())[places]).min(axis=1)
    assert fit_neighbours(x)(new_rows).numpy() == pytest.approx(exact, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_distances_are_finite_if_the_reference_rows_are_few_or_equal(rows: int) -> None:
    near = fit_neighbours(torch.ones(rows, D))
    distances = near(torch.stack((torch.ones(D), torch.zeros(D))))
    assert bool(distances.isfinite().all())
    assert distances[1] > distances[0]


def test_score_adds_the_distances_of_both_detectors_after_scaling_each_by_its_mean() -> None:
    model, fitted, x = ensemble(), torch.randn(300, D), torch.randn(400, D)
    fit_score_statistics(model, x, fitted)
    score, parts, x_hat = model.score(x)
    distances = [model.network.score(x)[0].double(), model.neighbours(x).double()]
    exact = torch.stack([(1.0 + values / values.mean()).sqrt() for values in distances], dim=1)
    assert torch.allclose(parts.double(), exact, rtol=1e-4)
    assert torch.allclose(parts.sum(dim=1), score)
    assert torch.equal(x_hat, model.network.decode(model.network.encode(x)[0]))


def test_encoding_and_decoding_are_those_of_the_autoencoder_and_there_is_no_density() -> None:
    model, (x, noise, _) = ensemble(), batch()
    latents, std = model.encode(x)
    assert torch.equal(latents, model.network.encoder(x))
    assert torch.equal(std, torch.zeros_like(latents))
    assert torch.equal(model.decode(latents), model.network.decoder(latents))
    log_weight = model.log_weight(x, noise)
    assert log_weight.shape == (len(x),)
    assert bool(log_weight.isnan().all())


def test_few_rows_with_huge_distances_do_not_change_the_scores_of_normal_rows() -> None:
    model, fitted, x = ensemble(), torch.randn(300, D), torch.randn(400, D)
    fit_score_statistics(model, x, fitted)
    before = model.score(x)[0]
    fit_score_statistics(model, torch.cat((x, 1e6 * torch.randn(5, D))), fitted)
    assert torch.allclose(model.score(x)[0], before)


def test_score_of_a_reference_row_is_exact_up_to_rounding() -> None:
    """The distance of a reference row to itself is computed as a difference of large squares.

    A square root would amplify the rounding error of that difference.
    """
    torch.manual_seed(0)
    model, fitted = ensemble(), torch.randn(300, D)
    fit_score_statistics(model, torch.randn(400, D), fitted)
    score, exact = model.score(fitted)[0], copy.deepcopy(model).double().score(fitted.double())[0]
    assert score.double().numpy() == pytest.approx(exact.numpy(), rel=1e-5)


def test_number_of_reference_rows_is_limited() -> None:
    assert len(fit_neighbours(torch.randn(2 * MAX_NEIGHBOURS, D)).offsets) == MAX_NEIGHBOURS


def test_score_is_deterministic_and_finite_for_distant_rows() -> None:
    model, (x, _, _) = pipeline("ensemble"), batch()
    first, second = model.score(x), model.score(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    far = model.score(1e9 * x)[0]
    assert bool(far.isfinite().all())
    assert np.all(far.numpy() > first[0].numpy())
