"""Expected values of features, compared with regression, and explanations of known faults."""

import numpy as np
import pytest
import torch

from models.explanation import NOISE, Expectations, correlation_of
from models.scaling import standardise
from training.config import EVERY_KIND, TrainConfig
from training.data.moments import compute_moments
from training.data.row_store import RowStore
from training.data.table import Table, split_rows
from training.fitting.explanation import MAX_EXPLAINED_FEATURES, fit_explanation
from training.fitting.pipeline import fit_pipeline
from training.fitting.prepared_data import prepare_data
from training.progress import SilentReporter

UNITS = np.array([1.0, 50.0, 0.01, 3.0, 1.0])


def correlated(rows: int = 3_000, seed: int = 0) -> np.ndarray:
    """Return five features that depend on two latent loads, in units of different sizes."""
    random = np.random.RandomState(seed)
    mixing = np.array([[2, 0, 1, 3, 1], [0, 5, 1, -2, 0]])
    x = random.standard_normal((rows, 2)) @ mixing + 0.5 * random.standard_normal((rows, 5))
    return np.asarray((x + 10) * UNITS, np.float32)


def expectations(x: np.ndarray) -> Expectations:
    explanation = fit_explanation(compute_moments([x]), standardise(torch.from_numpy(x)), images=False)
    assert isinstance(explanation, Expectations)
    return explanation


def test_expected_value_is_the_conditional_mean_of_a_gaussian() -> None:
    x = correlated()
    u = standardise(torch.from_numpy(x))(torch.from_numpy(x)).double().numpy()
    noisy = np.corrcoef(u.T) + NOISE * np.eye(5)
    model = expectations(x)
    conditional = torch.from_numpy(u).float() @ model.weights.T
    for i in range(5):
        others = [j for j in range(5) if j != i]
        solved = np.linalg.solve(noisy[np.ix_(others, others)], noisy[others, i])  # regression on the other features
        np.testing.assert_allclose(conditional[:, i], u[:, others] @ solved, atol=1e-4)


def test_contribution_is_the_larger_of_two_squared_distances_each_scaled_to_a_mean_of_1() -> None:
    x = correlated()
    u = standardise(torch.from_numpy(x))(torch.from_numpy(x))
    model = expectations(x)
    contribution, expected = model(u, torch.zeros_like(u))
    conditional = u @ model.weights.T
    alone, given = u.square(), ((u - conditional) / model.residual).square()
    torch.testing.assert_close(alone.mean(dim=0), torch.ones(5), rtol=1e-3, atol=0)
    torch.testing.assert_close(given.mean(dim=0), torch.ones(5), rtol=1e-3, atol=0)
    torch.testing.assert_close(contribution, torch.maximum(alone, given), rtol=1e-3, atol=1e-4)
    deviation = torch.where(given > alone, model.residual.expand_as(u), torch.ones_like(u))
    clear = (given - alone).abs() > 1e-2  # where rounding cannot change which distance is larger
    torch.testing.assert_close(((u - expected) / deviation).square()[clear], contribution[clear], rtol=1e-2, atol=1e-3)


def weights_of(correlation: np.ndarray, deviation: np.ndarray) -> torch.Tensor:
    """Return the weights of `Expectations` by regression of each feature on the others, [D, D]."""
    covariance = np.outer(deviation, deviation) * (correlation + NOISE * np.eye(len(correlation)))
    weights = np.zeros_like(correlation)
    for i in range(len(correlation)):
        others = np.arange(len(correlation)) != i
        weights[i, others] = np.linalg.solve(covariance[np.ix_(others, others)], covariance[others, i])
    return torch.from_numpy(weights)


@pytest.mark.parametrize("width", [1, 2, 7])
def test_correlation_is_recovered_from_the_weights(width: int) -> None:
    random = np.random.RandomState(width)
    rows = random.standard_normal((width, 9)) + random.standard_normal(9)
    correlation = np.asarray(np.corrcoef(rows)).reshape(width, width)
    deviation = random.uniform(0.1, 9.0, width)
    found = correlation_of(weights_of(correlation, deviation), torch.from_numpy(deviation))
    np.testing.assert_allclose(found.numpy(), correlation, atol=1e-9)


def test_correlation_from_rounded_weights_has_no_negative_eigenvalue() -> None:
    correlation = np.ones((4, 4))
    found = correlation_of(weights_of(correlation, np.ones(4)).float().double(), torch.ones(4).double()).numpy()
    np.testing.assert_allclose(found, correlation, atol=1e-5)
    assert np.linalg.eigvalsh(found).min() > -1e-12


@pytest.mark.parametrize("fault", ["not symmetric", "singular", "nan"])
def test_weights_of_no_correlation_matrix_are_refused(fault: str) -> None:
    random = np.random.RandomState(0)
    weights = weights_of(np.asarray(np.corrcoef(random.standard_normal((3, 20)))), np.ones(3))
    if fault == "not symmetric":
        weights[0, 1] += 0.05
    elif fault == "singular":
        weights = torch.ones(3, 3).double().fill_diagonal_(0.0) * -1.0
    else:
        weights[0, 1] = torch.nan
    with pytest.raises(ValueError, match="not those of a correlation matrix"):
        correlation_of(weights, torch.ones(3).double())


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_faulty_feature_has_the_largest_contribution(kind: str) -> None:
    """With three latents for five features, the reconstruction follows the fault. The explanation must not do so."""
    x = correlated()
    names = [f"x{i}" for i in range(5)]
    table = Table(RowStore(x), (5,), names, [None] * 5, None, None, "generated", missing=np.zeros(5, np.int64))
    options = {} if kind == "pca" else {"epochs": 3}
    config = TrainConfig.model_validate({"model": kind, "name": "a", "latents": 3, **options})
    pipeline = fit_pipeline(config, prepare_data(table, split_rows(len(x), 0)), SilentReporter())
    fresh = correlated(200, seed=1)
    for i in range(5):
        broken = fresh.copy()
        broken[:, i] += 8 * x[:, i].std()
        with torch.no_grad():
            _, _, contribution, expected = pipeline.score(torch.from_numpy(broken))
        assert (contribution.argmax(dim=1) == i).float().mean() > 0.98
        error = np.abs(expected[:, i].numpy() - fresh[:, i]) / x[:, i].std()
        assert np.median(error) < 1.0  # the expected value is near the value before the fault


def test_contributions_do_not_depend_on_the_scaling() -> None:
    x = correlated()
    plain = expectations(x)
    identity = standardise(torch.zeros(2, 5))
    raw = fit_explanation(compute_moments([x]), identity, images=False)
    u = standardise(torch.from_numpy(x))(torch.from_numpy(x))
    torch.testing.assert_close(raw(torch.from_numpy(x), u)[0], plain(u, u)[0], rtol=1e-2, atol=1e-3)


def test_constant_and_equal_columns_give_finite_contributions() -> None:
    x = correlated()
    x = np.column_stack((x, np.full(len(x), 7.0), x[:, 0])).astype(np.float32)
    u = standardise(torch.from_numpy(x))(torch.from_numpy(x))[:50]
    model = expectations(x)
    unchanged = model(u, u)[0]
    assert bool(unchanged.isfinite().all())
    assert float(unchanged[:, 5].max()) < 1e-6
    u[:, 5] += 3.0
    contribution, expected = model(u, u)
    assert (contribution[:, 5] / 9.0).numpy() == pytest.approx(1.0, rel=1e-3)
    assert expected[:, 5].numpy() == pytest.approx(0.0, abs=1e-4)


def test_images_and_very_wide_rows_are_explained_by_their_reconstruction() -> None:
    u, u_hat = torch.ones(2, 5), torch.full((2, 5), 3.0)
    x = correlated(100)
    wide = np.random.RandomState(0).standard_normal((20, MAX_EXPLAINED_FEATURES + 1)).astype(np.float32)
    for rows, images in ((x, True), (wide, False)):
        explanation = fit_explanation(compute_moments([rows]), standardise(torch.from_numpy(rows)), images)
        contribution, expected = explanation(u, u_hat)
        assert torch.equal(contribution, torch.full((2, 5), 4.0))
        assert torch.equal(expected, u_hat)
