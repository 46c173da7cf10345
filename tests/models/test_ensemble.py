"""The ensemble's score is the sum that it is said to be, and each of its judges measures what it says."""

import numpy as np
import torch

from models.ensemble import Ensemble, Neighbours
from tests.models.builders import D, batch, core, pipeline
from training.statistics import NEIGHBOURS, judge


def ensemble() -> Ensemble:
    torch.manual_seed(0)
    made = core("ensemble")
    assert isinstance(made, Ensemble)
    return made.eval().requires_grad_(False)


def test_the_distance_is_that_to_the_nearest_row() -> None:
    rows, x = torch.randn(50, D), torch.randn(20, D)
    exact = torch.cdist(x.double(), rows.double()).amin(dim=1).square()
    assert torch.allclose(Neighbours(rows)(x).double(), exact, atol=1e-5)
    assert torch.allclose(Neighbours(rows)(rows), torch.zeros(50), atol=1e-5)


def test_the_score_is_the_sum_of_the_judges_in_units_of_their_means() -> None:
    model, fitted, x = ensemble(), torch.randn(300, D), torch.randn(400, D)
    judge(model, x, fitted)
    score, parts, x_hat = model.score(x)
    alone = [judge_.double() for judge_ in (model.narrow.score(x)[0], model.wide(x), model.near(x))]
    exact = torch.stack([values / values.mean() for values in alone]).sum(dim=0)
    assert torch.allclose(score.double(), exact, rtol=1e-4)
    assert torch.allclose(parts.mean(dim=0), torch.ones(len(model.parts)), rtol=1e-4)
    assert torch.allclose(parts.sum(dim=1), score)
    assert torch.equal(x_hat, model.narrow.decode(model.narrow.encode(x)[0]))


def test_it_keeps_no_more_neighbours_than_it_may() -> None:
    model = ensemble()
    judge(model, torch.randn(50, D), torch.randn(2 * NEIGHBOURS, D))
    assert len(model.near.rows) == NEIGHBOURS


def test_two_calls_give_the_same_bits_and_rows_far_away_stay_numbers() -> None:
    model, (x, _, _) = pipeline("ensemble"), batch()
    first, second = model.score(x), model.score(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    far = model.score(1e9 * x)[0]
    assert bool(far.isfinite().all())
    assert np.all(far.numpy() > first[0].numpy())
