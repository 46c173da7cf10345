"""The policy, compared with an exact solution of its optimisation problem, and in every kind of model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

from models import artifact
from models.pipeline import Pipeline
from models.policy import PolicyModule
from service.inference.backends import OnnxModule
from tests.models.builders import CORES, D, batch, manifest, pipeline
from training.publishing.onnx_export import export

INF = float("inf")
NOISE = 1e-3
ROWS = 200


def policy(
    below: Sequence[float] = (0.0,) * D,
    above: Sequence[float] = (0.0,) * D,
    low: Sequence[float] = (-INF,) * D,
    companion: int | None = None,
    seed: int = 0,
) -> PolicyModule:
    """Return a policy for D features that depend on each other at random."""
    factor = torch.from_numpy(np.random.RandomState(seed).standard_normal((D, D)))
    precision = factor @ factor.T + torch.eye(D).double()
    scale = precision.diagonal().rsqrt()
    module = PolicyModule(
        torch.zeros(D),
        torch.ones(D),
        precision * torch.outer(scale, scale),
        torch.tensor(below),
        torch.tensor(above),
        torch.tensor(low),
        torch.full((D,), INF),
        torch.arange(D) == (-1 if companion is None else companion),
    )
    return module.eval()


def correlated(width: int, factors: int, twins: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the correlation matrix [D, D] of features, of which some nearly repeat others, and rows [ROWS, D].

    Half of the rows are far below the mean in half of the features.
    """
    random = np.random.RandomState(width)
    loadings = random.standard_normal((width, factors))
    loadings[:twins] = loadings[twins : 2 * twins]
    covariance = loadings @ loadings.T + 0.05 * np.eye(width)
    deviation = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(deviation, deviation)
    rows = random.multivariate_normal(np.zeros(width), correlation, size=ROWS)
    rows[: ROWS // 2, : width // 2] -= 5.0
    return correlation, rows


@pytest.mark.parametrize(("width", "factors", "twins"), [(5, 2, 0), (20, 4, 0), (38, 6, 5)])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_one_sided_features_are_projected_as_by_an_exact_solver(
    width: int, factors: int, twins: int, share: float
) -> None:
    correlation, rows = correlated(width, factors, twins)
    precision = np.linalg.inv(correlation + NOISE * np.eye(width))
    residual = 1.0 / np.sqrt(np.diag(precision))
    is_high = np.arange(width) < share * width
    module = PolicyModule(
        mean=torch.zeros(width),
        residual=torch.from_numpy(residual),
        precision=torch.from_numpy(precision * np.outer(residual, residual)),
        below=torch.from_numpy(np.where(is_high, np.inf, 0.0)),
        above=torch.zeros(width),
        low=torch.full((width,), -INF),
        high=torch.full((width,), INF),
        companion=torch.zeros(width, dtype=torch.bool),
    )
    judged = module(torch.from_numpy(rows), torch.zeros(ROWS, width))[0].numpy()
    distance = np.einsum("bi,ij,bj->b", judged, precision, judged)
    root = np.linalg.cholesky(precision).T
    exact = np.array(
        [
            2.0
            * lsq_linear(
                root, np.zeros(width), (np.where(is_high, row, row - 1e-9), np.where(is_high, np.inf, row + 1e-9))
            ).cost
            for row in rows
        ]
    )
    untouched = np.einsum("bi,ij,bj->b", rows, precision, rows)
    error = (distance - exact) / (1.0 + exact)
    assert np.median(np.abs(error)) < 0.005
    assert np.quantile(np.abs(error), 0.9) < 0.1  # the active sets are chosen three times, so some rows are not done
    assert np.median(exact) < 0.9 * np.median(untouched)  # the projection does change the rows


def test_neutral_value_does_not_depend_on_how_far_it_is_in_the_ignored_direction() -> None:
    module = policy(below=(INF, 0.0, 0.0, 0.0, 0.0))
    u = torch.zeros(3, D)
    u[:, 0] = torch.tensor([-5.0, -1e6, -1e30])
    judged, neutral = module(u, torch.zeros(3, D))
    assert torch.equal(judged[0], judged[1])
    assert torch.equal(judged[1], judged[2])
    assert neutral[:, 0].tolist() == [1.0, 1.0, 1.0]
    assert neutral[:, 1:].sum() == 0


def test_deviation_matters_from_the_least_deviation_on() -> None:
    module = policy(below=(0.5, 0.0, 0.0, 0.0, 0.0), above=(0.5, 0.0, 0.0, 0.0, 0.0))
    u = torch.zeros(4, D)
    u[:, 0] = torch.tensor([0.49, -0.49, 0.51, -0.51])
    judged, neutral = module(u, torch.zeros(4, D))
    assert neutral[:, 0].tolist() == [1.0, 1.0, 0.0, 0.0]
    torch.testing.assert_close(judged[:, 0], torch.tensor([0.0, 0.0, 0.51, -0.51]))


def under_policy(kind: str) -> Pipeline:
    """Return a model under a policy that has every rule."""
    model = pipeline(kind)
    model.policy = policy((INF, 0.0, 0.5, 0.0, 0.0), low=(-INF, -INF, -INF, -0.5, -INF), companion=4)
    model.policy.usual.fill_(3.0)
    model.policy.ceiling.fill_(1000.0)
    return model.eval()


@pytest.mark.parametrize("kind", CORES)
def test_parts_add_up_to_the_score_and_a_value_outside_of_its_range_scores_the_ceiling(kind: str) -> None:
    x, _, _ = batch(40)
    model = under_policy(kind)
    score, parts, contribution, expected = model.score(x)
    torch.testing.assert_close(parts.sum(dim=1), score)
    is_outside = x[:, 3] < -0.5
    assert 0 < int(is_outside.sum()) < 40
    assert bool((score[is_outside] >= 1000.0).all())
    assert contribution[is_outside].argmax(dim=1).tolist() == [3] * int(is_outside.sum())
    assert bool((parts[~is_outside, -1] == 0.0).all())
    assert bool(expected.isfinite().all())


@pytest.mark.parametrize("kind", CORES)
def test_value_outside_of_its_range_scores_the_ceiling_even_if_the_model_overflows(kind: str) -> None:
    x, _, _ = batch(1)
    x[0, 3] = -3e38
    score, _, contribution, expected = under_policy(kind).score(x)
    assert float(score) == 1000.0
    assert int(contribution.argmax()) == 3
    assert bool(contribution.isfinite().all())
    assert bool(expected.isfinite().all())


@pytest.mark.parametrize("kind", ["pca", "ae", "ensemble", "vae-gaussian", "pca-imputing"])
@pytest.mark.slow
def test_published_model_under_a_policy_loads_and_its_twin_agrees(tmp_path: Path, kind: str) -> None:
    model, (x, noise, choice) = under_policy(kind), batch()
    module = artifact.script(model)
    description = manifest("m", artifact.weights_sha256(model), artifact.record_golden(module, x, noise, choice))
    path = artifact.publish(module, description, tmp_path, export(model, x, noise))
    loaded = artifact.load(path)
    assert loaded.twin is not None
    twin = OnnxModule(loaded.twin, loaded.module, 1)
    rows, noise, choice = batch(33)
    expected = artifact.compute_outputs(loaded.module, rows, noise, choice)
    for name, output in artifact.compute_outputs(twin, rows, noise, choice).items():
        scale = max(1.0, float(expected[name].nan_to_num().abs().max()))
        torch.testing.assert_close(output, expected[name], rtol=0, atol=3e-6 * scale, equal_nan=True, msg=name)


@pytest.mark.parametrize("kind", CORES)
def test_model_without_a_policy_scores_bit_for_bit_as_its_core_and_its_code_has_no_policy(kind: str) -> None:
    model, (x, _, _) = pipeline(kind), batch()
    score, parts, contribution, expected = model.score(x)
    u = model.scaling(x)
    core_score, core_parts, u_hat = model.core.score(u)
    core_contribution, core_expected = model.explanation(u, u_hat)
    assert torch.equal(score, core_score)
    assert torch.equal(parts, core_parts)
    assert torch.equal(contribution, core_contribution)
    assert torch.equal(expected, model.scaling.inverse(core_expected))
    assert "policy" not in str(artifact.script(model).score.code)
