"""Adopted models complete rows, and score rows with missing values, as models that Elbo has trained do."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.preprocessing import PowerTransformer
from torch import Tensor, nn

from models.artifact import Artifact, load, score
from tests.training.reporters import RecordingReporter
from training.adoption.adopt import adopt

pytestmark = pytest.mark.slow
Floats = npt.NDArray[np.float64]
MIXING = np.random.default_rng(0).normal(size=(2, 6))
NOISE = 0.2


def gaussian_rows(count: int, seed: int) -> Floats:
    """Return rows [count, 6] from N(0, MIXING' MIXING + NOISE² I)."""
    random = np.random.default_rng(seed)
    return random.normal(size=(count, 2)) @ MIXING + NOISE * random.normal(size=(count, 6))


def conditional_mean(row: Floats, missing: npt.NDArray[np.bool_]) -> Floats:
    """Return the expected values of the missing values of a row, given its known values."""
    covariance = MIXING.T @ MIXING + NOISE**2 * np.eye(6)
    known = covariance[np.ix_(~missing, ~missing)]
    return np.asarray(covariance[np.ix_(missing, ~missing)] @ np.linalg.solve(known, row[~missing]))


class Projection(nn.Module):
    """The projection of rows onto their plane. It is the best linear autoencoder with two latents."""

    def __init__(self) -> None:
        super().__init__()
        axes = torch.from_numpy(np.linalg.svd(MIXING)[2][:2].astype(np.float32))
        self.encoder, self.decoder = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        with torch.no_grad():
            self.encoder.weight.copy_(axes)
            self.decoder.weight.copy_(axes.T)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.decoder(self.encoder(x))
        return found


class Repeated(nn.Module):
    """A network that takes 30 million floating-point operations for a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 800), nn.Linear(800, 800, bias=False), nn.Linear(800, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        for _ in range(24):
            hidden = torch.tanh(self.inner(hidden))
        found: Tensor = self.last(hidden)
        return found


@pytest.fixture(scope="module", params=["encodes", "reconstructs", "curved scaler"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Artifact, Any]:
    """Return the name of the case, an adopted model, and the map of Gaussian rows into its raw units."""
    projection = Projection()
    module: nn.Module = projection
    scaler = None
    to_raw: Any = lambda rows: rows  # noqa: E731
    rows = gaussian_rows(1200, 1)
    if request.param == "reconstructs":
        module = nn.Sequential(projection.encoder, projection.decoder)
    if request.param == "curved scaler":  # its inverse transform of Gaussian rows gives the raw rows
        fit = np.exp(0.5 * rows)
        scaler = PowerTransformer(method="box-cox", standardize=False).fit(fit)
        scaler.lambdas_ = np.full(6, 0.0)
        to_raw = np.exp
    path = adopt(module, to_raw(rows), name="m", artifacts=tmp_path_factory.mktemp("a"), scaler=scaler)
    return request.param, load(path), to_raw


def with_gaps(count: int, seed: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return new Gaussian rows, and which of their values are missing: about a third, but never all."""
    rows, missing = gaussian_rows(count, seed), np.random.default_rng(seed).random((count, 6)) < 0.33
    missing[missing.all(axis=1), 0] = False
    return rows, missing


def test_intervals_contain_the_missing_values_of_new_rows_with_their_probability(model: Any) -> None:
    _, artifact, to_raw = model
    rows, missing = with_gaps(600, 2)
    raw = to_raw(rows)
    gaps = torch.from_numpy(np.where(missing, np.nan, raw).astype(np.float32))
    mean, deviation, low, high = (found.numpy() for found in artifact.module.impute(gaps))
    inside = ((low <= raw) & (raw <= high))[missing]
    assert 0.86 < inside.mean() < 0.94  # three standard errors of both 400 calibration rows and 600 new rows
    assert (mean[~missing] == raw.astype(np.float32)[~missing]).all()
    assert (deviation[missing] > 0).all()
    assert (deviation[~missing] == 0).all()


def test_estimates_are_near_the_conditional_means(model: Any) -> None:
    kind, artifact, to_raw = model
    rows, missing = with_gaps(300, 3)
    gaps = torch.from_numpy(np.where(missing, np.nan, to_raw(rows)).astype(np.float32))
    found = artifact.module.impute(gaps)[0].double().numpy()
    units = np.log(found) if kind == "curved scaler" else found
    errors = [units[row, gap] - conditional_mean(rows[row], gap) for row, gap in enumerate(missing) if gap.any()]
    spread = rows.std()
    assert np.median(np.abs(np.concatenate(errors))) < 0.15 * spread  # of medians: 0.67
    assert np.abs(np.concatenate(errors)).mean() < 0.35 * spread


def test_false_alarms_of_rows_with_missing_values_are_rare_and_anomalies_are_found(model: Any) -> None:
    _, artifact, to_raw = model
    rows, missing = with_gaps(600, 4)
    gaps = torch.from_numpy(np.where(missing, np.nan, to_raw(rows)).astype(np.float32))
    alarms = artifact.module.p_value(score(artifact.module, gaps)[0]) <= 0.1
    assert 0.06 < float(alarms.float().mean()) < 0.15
    moved = rows + 1.5 * np.linalg.svd(MIXING)[2][3]  # out of the plane
    gaps = torch.from_numpy(np.where(missing, np.nan, to_raw(moved)).astype(np.float32))
    assert float((artifact.module.p_value(score(artifact.module, gaps)[0]) <= 0.1).float().mean()) > 0.6


def test_network_that_is_too_slow_does_not_complete_rows_and_the_manifest_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reporter = RecordingReporter()
    path = adopt(Repeated(), gaussian_rows(120, 5), name="m", artifacts=tmp_path, report=reporter)
    artifact = load(path)
    assert not hasattr(artifact.module, "impute")
    assert artifact.manifest.adoption is not None
    reason = artifact.manifest.adoption.without_completion
    assert reason is not None
    assert reason.startswith("the network is too slow: 30,")  # 2 * 24 * 800 * 800 operations, and those of two layers
    assert any(reason in note for note in reporter.notes)
    assert reason.encode() in artifact.exhibits["card.md"]
