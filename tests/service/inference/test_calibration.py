"""The NumPy calibration, compared with the TorchScript methods of artifacts, and the fallback to those methods."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models import artifact
from models.calibration import Calibration as Reference
from service.inference import calibration, operations
from service.inference.backend_selection import select_backend
from tests.models.builders import CORES, batch, pipeline
from tests.models.publishing import publish_twin

ALPHAS = (0.9, 0.5, 0.29, 0.1, 0.05, 0.02, 1 / 51, 1e-3, 1e-6, 1e-30)
Scores = np.ndarray


def exponential(n: int) -> Scores:
    return np.random.RandomState(n).exponential(size=n).astype(np.float32)


SCORES: dict[str, Scores] = {
    **{f"{n}": exponential(n) for n in (1, 2, 3, 19, 50, 2000, 5000)},
    "ties": np.repeat(exponential(30), 5),
    "tied at the end": np.concatenate((exponential(40), np.full(20, 9, np.float32))),
    "constant": np.full(50, 2, np.float32),
    "zeros": np.zeros(7, np.float32),
    "negative": -1e4 * exponential(99),
    "tiny": 1e-30 * exponential(60),
    "huge": 1e36 * exponential(60),
    "far apart": np.array([-3e38, -1, 0, 1e-20, 1, 3e38], np.float32),
}


def probes(scores: Scores) -> Scores:
    """Return scores at, beside, between and beyond the calibration scores, plus extreme values, NaN and infinity."""
    random = np.random.RandomState(1)
    known = np.sort(scores)
    sides = [np.nextafter(known, np.float32(side)) for side in (-np.inf, np.inf)]
    span = known[-1].astype(float) - known[0] + abs(float(known[0])) + 1e-3
    spread = known[0] + span * random.uniform(-3, 8, 3000)
    extremes = [0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan, 1e10, -1e10]
    with np.errstate(over="ignore"):
        return np.concatenate(
            (known, *sides, random.permutation(spread).astype(np.float32), np.array(extremes, np.float32))
        )


def assert_agree(tested: calibration.Calibration, module: torch.jit.ScriptModule, score: Scores, alpha: float) -> None:
    """Assert that `tested` agrees with `module`, for a batch and for single scores.

    P-values, thresholds and verdicts must be equal, and severities must agree within 1e-6.
    """
    with torch.inference_mode():
        expected_p_value = module.p_value(torch.from_numpy(score)).numpy()
        expected_severity = module.severity(torch.from_numpy(score), alpha).numpy()
        threshold = module.threshold(alpha).numpy()
        severity = tested.severity(score, alpha)
        single = [tested.severity(score[i : i + 1], alpha)[0] for i in range(0, len(score), 7)]
    np.testing.assert_array_equal(tested.p_value(score), expected_p_value)
    assert tested.threshold(alpha) == threshold
    np.testing.assert_array_equal(severity > 1, expected_severity > 1)
    np.testing.assert_array_equal(severity > 1, score > threshold)
    np.testing.assert_allclose(severity, expected_severity, rtol=1e-6, atol=1e-37)
    np.testing.assert_array_equal(single, severity[::7])
    assert severity.dtype == tested.p_value(score).dtype == np.float32


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("case", SCORES)
def test_numpy_calibration_agrees_with_torchscript(case: str, alpha: float) -> None:
    model = pipeline("pca")
    model.calibration = Reference(torch.from_numpy(SCORES[case]))
    module = artifact.freeze(artifact.script(model))
    buffers = {name: buffer.numpy() for name, buffer in model.calibration.named_buffers()}
    numpy_calibration = calibration.NumpyCalibration(buffers, module.threshold)
    assert_agree(numpy_calibration, module, probes(buffers["scores"]), alpha)
    assert calibration.agrees_with_module(numpy_calibration, module, buffers["scores"])


@pytest.mark.parametrize("kind", CORES)
def test_numpy_calibration_agrees_with_the_artifact_for_every_model_kind(kind: str, tmp_path: Path) -> None:
    loaded = artifact.load(publish_twin(tmp_path, kind))
    numpy_calibration = calibration.load_calibration(loaded)
    assert isinstance(numpy_calibration, calibration.NumpyCalibration)
    x = torch.cat([size * batch(200)[0] for size in (0.1, 1.0, 10.0, 1e6)])
    with torch.inference_mode():
        score = loaded.module.score(x)[0].numpy()
    for alpha in ALPHAS:
        assert_agree(numpy_calibration, loaded.module, score, alpha)


@pytest.mark.parametrize("backend", ["torchscript", "onnx"])
@pytest.mark.parametrize("kind", CORES)
def test_backends_return_the_p_values_and_severities_of_the_artifact(kind: str, backend: str, tmp_path: Path) -> None:
    loaded = artifact.load(publish_twin(tmp_path, kind))
    chosen = select_backend(loaded, requested=backend).backend
    x = 3 * batch(50)[0]
    score, p_value, severity, *explained = chosen.run(operations.anomaly(0.05), (x.numpy(),))
    with torch.inference_mode():
        exact = torch.from_numpy(score)  # not `loaded`'s own score, which differs in its last bits
        np.testing.assert_array_equal(p_value, loaded.module.p_value(exact).numpy())
        np.testing.assert_allclose(severity, loaded.module.severity(exact, 0.05).numpy(), rtol=1e-6)
        assert chosen.calibration.threshold(0.05) == float(loaded.module.threshold(0.05))
        for part, expected in zip(explained, loaded.module.score(x)[1:], strict=True):
            np.testing.assert_allclose(part, expected.numpy(), rtol=1e-4, atol=1e-5)


def shifted(buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Change the last bit of one calibration score."""
    scores = buffers["scores"].clone()
    scores[7] = torch.nextafter(scores[7], scores[8])
    return buffers | {"scores": scores}


def steeper(buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Change the slope of the tail."""
    slope = buffers["slope"].clone()
    slope[-1] *= 1.0001
    return buffers | {"slope": slope}


def incomplete(buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove a buffer, as in an artifact with another kind of calibration."""
    return {name: buffer for name, buffer in buffers.items() if name != "knot"}


@pytest.mark.parametrize("case", SCORES)
def test_a_difference_above_the_largest_calibration_score_is_found_at_every_scale_of_the_scores(case: str) -> None:
    model = pipeline("pca")
    model.calibration = Reference(torch.from_numpy(SCORES[case]))
    module = artifact.freeze(artifact.script(model))
    buffers = {name: buffer.numpy() for name, buffer in steeper(dict(model.calibration.named_buffers())).items()}
    other = calibration.NumpyCalibration(buffers, module.threshold)
    assert not calibration.agrees_with_module(other, module, buffers["scores"])


def test_a_difference_between_two_neighbouring_calibration_scores_is_found() -> None:
    model = pipeline("pca")
    model.calibration = Reference(torch.from_numpy(SCORES["19"]))
    module = artifact.freeze(artifact.script(model))
    buffers = {name: buffer.numpy() for name, buffer in model.calibration.named_buffers()}
    for place in range(1, 19):
        slope = buffers["slope"].copy()
        slope[place] *= 1.5
        other = calibration.NumpyCalibration(buffers | {"slope": slope}, module.threshold)
        assert not calibration.agrees_with_module(other, module, buffers["scores"]), place


@pytest.mark.parametrize("backend", ["torchscript", "onnx"])
@pytest.mark.parametrize("change", [shifted, steeper, incomplete])
def test_torchscript_calibration_is_used_if_the_buffers_disagree_with_the_module(
    backend: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    loaded = artifact.load(publish_twin(tmp_path, "pca"))
    loaded = replace(loaded, calibration=change(dict(loaded.calibration)))
    assert isinstance(calibration.load_calibration(loaded), calibration.TorchScriptCalibration)
    chosen = select_backend(loaded, requested=backend).backend
    assert isinstance(chosen.calibration, calibration.TorchScriptCalibration)
    np.testing.assert_array_equal(chosen.calibration.scores, loaded.calibration["scores"].numpy())
    x = 3 * batch(50)[0]
    _, p_value, severity, *_ = chosen.run(operations.anomaly(0.05), (x.numpy(),))
    with torch.inference_mode():
        score = torch.from_numpy(chosen.run(operations.anomaly(0.05), (x.numpy(),))[0])
        np.testing.assert_array_equal(p_value, loaded.module.p_value(score).numpy())
        np.testing.assert_array_equal(severity, loaded.module.severity(score, 0.05).numpy())
        assert chosen.calibration.threshold(0.05) == float(loaded.module.threshold(0.05))


def test_cache_of_thresholds_is_bounded(tmp_path: Path) -> None:
    numpy_calibration = calibration.load_calibration(artifact.load(publish_twin(tmp_path, "pca")))
    assert isinstance(numpy_calibration, calibration.NumpyCalibration)
    for alpha in np.random.RandomState(0).uniform(0.01, 0.99, 1000).tolist():
        numpy_calibration.threshold(alpha)
    assert len(numpy_calibration._thresholds) <= calibration.MAX_CACHED_ALPHAS
