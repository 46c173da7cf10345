"""Scores of rows with missing values, compared with closed forms and simulations that NumPy computes."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from models import artifact
from models.completion import CompletingPCA
from models.gap_scores import GapScores
from models.whitening import Whitening
from tests.models.builders import CORES, D, batch, pipeline

Doubles = npt.NDArray[np.float64]
GAPS = ((0, 1), (1, 0), (1, 3), (2, 4), (3, 0), (3, 1), (3, 2), (3, 4))


def pca(whitened: bool) -> CompletingPCA:
    """Return a PCA that scores rows by a shrunk covariance, or by a whitening with another mean and covariance."""
    model = pipeline("pca")
    core = model.core
    if whitened:
        torch.manual_seed(3)
        core.whitening = Whitening(torch.randn(D), torch.randn(D, D) + 2.0 * torch.eye(D))
    else:
        core.shrinkage = torch.tensor(0.2)
    return CompletingPCA(model.scaling, core, model.prior, model.calibration, model.explanation).eval()


def covariance_of_score(model: CompletingPCA) -> tuple[Doubles, Doubles]:
    """Return the mean [D] and the covariance [D, D] in model units whose Mahalanobis distance is the score."""
    core = model.core
    if core.whitening is not None:
        factor = core.whitening.factor.double().numpy()
        return core.whitening.mean.double().numpy(), np.linalg.inv(factor.T @ factor)
    v, s2, rho = core.components.double().numpy(), float(core.noise_variance), float(core.shrinkage)
    c = v.T @ np.diag(core.eigenvalues.double().numpy() - s2) @ v + s2 * np.eye(D)
    return core.mean.double().numpy(), (1 - rho) * c + rho * np.trace(c) / D * np.eye(D)


@pytest.mark.parametrize("whitened", [False, True])
def test_expected_score_of_pca_for_rows_with_gaps_is_the_distance_of_the_known_values_plus_their_number(
    whitened: bool,
) -> None:
    model, (x, _, _) = pca(whitened), batch(gaps=GAPS)
    score, parts, contribution, expected = artifact.script(model).expected_score(x)
    mean, covariance = covariance_of_score(model)
    shift, scale = model.scaling.shift.double().numpy(), model.scaling.scale.double().numpy()
    for index, row in enumerate(x.double().numpy()):
        m, o = np.isnan(row), ~np.isnan(row)
        known = ((row - shift) / scale - mean)[o]
        solved = np.linalg.solve(covariance[np.ix_(o, o)], known)
        assert score[index] == pytest.approx(known @ solved + m.sum(), rel=1e-4)
        conditional = (mean[m] + covariance[np.ix_(m, o)] @ solved) * scale[m] + shift[m]
        np.testing.assert_allclose(expected[index][torch.from_numpy(m)], conditional, rtol=1e-4, atol=1e-4)
        assert not contribution[index][torch.from_numpy(m)].any()
    np.testing.assert_allclose(parts.sum(dim=1), score, rtol=1e-5)


def test_expected_score_of_pca_is_the_mean_score_of_completed_rows() -> None:
    model, row = pca(whitened=False), batch(1, [(0, 1), (0, 3)])[0]
    mean, covariance = covariance_of_score(model)
    u = model.scaling(row).double().numpy()[0]
    m, o = np.isnan(u), ~np.isnan(u)
    gain = covariance[np.ix_(m, o)] @ np.linalg.inv(covariance[np.ix_(o, o)])
    given = covariance[np.ix_(m, m)] - gain @ covariance[np.ix_(o, m)]
    rows = np.repeat(u[None], 50_000, axis=0)
    rows[:, m] = np.random.RandomState(0).multivariate_normal(mean[m] + gain @ (u[o] - mean[o]), given, len(rows))
    scores = model.score(model.scaling.inverse(torch.from_numpy(rows).float()))[0].double().numpy()
    error = scores.std() / np.sqrt(len(rows))
    assert float(model.expected_score(row)[0]) == pytest.approx(scores.mean(), abs=5 * error)


def test_pca_of_too_many_features_completes_rows_by_the_mean_of_probabilistic_pca(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("models.completion.MAX_EXACT_FEATURES", D - 1)
    model, (x, _, _) = pca(whitened=False), batch(gaps=GAPS)
    assert model.precision.shape == (1, 1)
    score = artifact.script(model).expected_score(x)[0]
    completed = model.impute(x)[0]
    assert torch.allclose(score, model.score(completed)[0] + x.isnan().sum(dim=1), rtol=1e-5)


@pytest.mark.parametrize("kind", CORES)
def test_score_of_a_complete_row_by_the_methods_for_gaps_is_its_score(kind: str) -> None:
    model, (x, _, _) = pipeline(kind), batch()
    for found, expected in zip(artifact.script(model).score_gaps(x), model.score(x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", CORES)
def test_score_of_rows_with_gaps_has_parts_that_sum_to_it_and_no_contribution_of_a_missing_value(kind: str) -> None:
    model, (x, _, _) = pipeline(kind), batch(gaps=GAPS)
    model.gap_scores = GapScores(torch.tensor([0.0, 0.4]), torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.7, 0.9]]))
    score, parts, contribution, expected = model.score_gaps(x)
    assert torch.allclose(parts.sum(dim=1), score, rtol=1e-4, atol=1e-4)
    assert not contribution[x.isnan()].any()
    assert torch.isfinite(expected).all()
    assert not torch.allclose(score, model.expected_score(x)[0])


def test_scores_of_rows_of_which_some_have_gaps_are_in_the_order_of_the_rows() -> None:
    model, (x, _, _) = pipeline("ae"), batch(gaps=GAPS[2:])
    found = artifact.score(model, x)
    has_gaps = x.isnan().any(dim=1)
    assert 0 < int(has_gaps.sum()) < len(x)
    for index in range(len(x)):
        row = x[index : index + 1]
        expected = model.score_gaps(row) if has_gaps[index] else model.score(row)
        for output, one in zip(found, expected, strict=True):
            assert torch.allclose(output[index], one[0], rtol=1e-4, atol=1e-4)


def levels() -> tuple[GapScores, Doubles]:
    """Return a map with the levels 0, 0.2 and 0.5, and its scores."""
    random = np.random.RandomState(0)
    scores = np.sort(random.gamma(np.array([[8.0], [6.0], [3.0]]), size=(3, 40)), axis=1)
    return GapScores(torch.tensor([0.0, 0.2, 0.5]), torch.from_numpy(scores).float()), scores


def test_map_at_a_level_sends_quantiles_to_the_quantiles_of_complete_rows() -> None:
    model, scores = levels()
    for level, share in enumerate((0.0, 0.2, 0.5)):
        inside = np.linspace(scores[level, 0], scores[level, -1], 101)
        found = torch.jit.script(model)(torch.from_numpy(inside).float(), torch.full((101,), share))
        np.testing.assert_allclose(found, np.interp(inside, scores[level], scores[0]), rtol=1e-4)


def test_map_between_levels_is_interpolated_and_beyond_the_last_level_is_constant() -> None:
    model, scores = levels()
    x = torch.linspace(0.1, 15.0, 50)
    at = [model(x, torch.full_like(x, share)) for share in (0.0, 0.2, 0.5)]
    assert torch.allclose(at[0], x, rtol=1e-6)
    assert torch.allclose(model(x, torch.full_like(x, 0.05)), 0.75 * at[0] + 0.25 * at[1], rtol=1e-5)
    assert torch.allclose(model(x, torch.full_like(x, 0.3)), at[1] * 2 / 3 + at[2] / 3, rtol=1e-5)
    assert torch.equal(model(x, torch.full_like(x, 0.9)), at[2])
    for mapped in at:
        assert (mapped.diff() > 0).all()
    assert scores[2, -1] < 15.0  # the map also rises above the largest score
