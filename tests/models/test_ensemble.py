"""The ensemble's score is the sum that it is said to be, and each of its judges measures what it says."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from models.ensemble import Ensemble, Neighbours
from tests.models.builders import D, batch, core, pipeline
from training.statistics import MOST_NEIGHBOURS, NEIGHBOUR, judge, neighbours_of


def ensemble() -> Ensemble:
    torch.manual_seed(0)
    made = core("ensemble")
    assert isinstance(made, Ensemble)
    return made.eval().requires_grad_(False)


def test_the_distance_is_that_to_the_nearest_row_in_units_of_its_scale() -> None:
    rows, scale, x = torch.randn(50, D), torch.rand(50) + 0.1, torch.randn(20, D)
    exact = (torch.cdist(x.double(), rows.double()).square() / scale).amin(dim=1)
    assert torch.allclose(Neighbours(rows, scale)(x).double(), exact, atol=1e-4)
    assert torch.allclose(Neighbours(rows, scale)(rows), torch.zeros(50), atol=1e-4)


def test_the_scale_is_the_distance_to_a_neighbour_halfway_to_the_mean_of_all() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, D)
    found = NearestNeighbors(n_neighbors=NEIGHBOUR + 1).fit(x.numpy()).kneighbors(x.numpy())[0][:, -1] ** 2
    inverse = neighbours_of(x).slopes[-1]
    assert 1.0 / inverse.numpy() == pytest.approx(found + found.mean(), rel=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_few_rows_or_equal_ones_will_do(rows: int) -> None:
    near = neighbours_of(torch.ones(rows, D))
    distances = near(torch.stack((torch.ones(D), torch.zeros(D))))
    assert bool(distances.isfinite().all())
    assert distances[1] > distances[0]


def test_the_score_is_the_sum_of_the_judges_in_units_of_their_means() -> None:
    model, fitted, x = ensemble(), torch.randn(300, D), torch.randn(400, D)
    judge(model, x, fitted)
    score, parts, x_hat = model.score(x)
    alone = [model.network.score(x)[0].double(), model.neighbours(x).double()]
    exact = torch.stack([values / values.mean() for values in alone]).sum(dim=0)
    assert torch.allclose(score.double(), exact, rtol=1e-4)
    assert torch.allclose(parts.mean(dim=0), torch.ones(len(model.parts)), rtol=1e-4)
    assert torch.allclose(parts.sum(dim=1), score)
    assert torch.equal(x_hat, model.network.decode(model.network.encode(x)[0]))


def test_it_keeps_no_more_rows_than_it_may() -> None:
    assert len(neighbours_of(torch.randn(2 * MOST_NEIGHBOURS, D)).offsets) == MOST_NEIGHBOURS


def test_two_calls_give_the_same_bits_and_rows_far_away_stay_numbers() -> None:
    model, (x, _, _) = pipeline("ensemble"), batch()
    first, second = model.score(x), model.score(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    far = model.score(1e9 * x)[0]
    assert bool(far.isfinite().all())
    assert np.all(far.numpy() > first[0].numpy())
