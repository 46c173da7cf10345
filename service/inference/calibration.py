"""p-values, severity and thresholds of anomaly scores.

`NumpyCalibration` implements `models.calibration` in NumPy, because for a small batch, a TorchScript call takes longer
than the arithmetic. `TorchScriptCalibration` calls the artifact's module. On a CPU, `load_calibration` selects
`NumpyCalibration` if its results agree with the results of the module. Otherwise `load_calibration` selects
`TorchScriptCalibration`.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.artifact import Artifact

Array = npt.NDArray[np.float32]
BUFFERS = ("scores", "surprisal", "tail", "knot", "height", "slope")
NO_SCORES: Array = np.empty(0, np.float32)
ONE = np.float32(1)
NEXT_AFTER_ONE = np.nextafter(ONE, np.float32(2))
MAX_CACHED_ALPHAS = 64  # maximum number of cached thresholds; needed because clients choose alpha
COMPARED_SCORES = 2000  # maximum number of calibration scores at which the two implementations are compared
# The last alpha is smaller than the smallest p-value that any calibration set can give.
COMPARED_ALPHAS = (0.5, 0.05, 0.001, 1e-9)
COMPARED_DISTANCES = 128  # distances from the outermost calibration scores: each is about twice the one before
TOLERANCE = 1e-6  # maximum relative error of severities: the exponentials of NumPy and torch differ in the last bit


class Calibration(Protocol):
    """The calibration methods of the artifact contract, on arrays.

    Attributes:
        floor: the smallest possible p-value.
        scores: the calibration scores, ascending; none if they are unknown.
    """

    floor: float
    scores: Array

    def p_value(self, score: Array, /) -> Array:
        """Return the conformal p-values [B] of scores [B]."""

    def severity(self, score: Array, alpha: float, /) -> Array:
        """Return the severities [B] of scores [B].

        A severity is above 1 if and only if the row is anomalous at alpha.
        """

    def threshold(self, alpha: float, /) -> np.float32:
        """Return the score above which a row is anomalous at alpha."""


class NumpyCalibration:
    """Calibration in NumPy. See `models.calibration` for the definitions.

    Args:
        buffers: the buffers of the module's calibration, by name.
        threshold: the module's `threshold` method, whose results are cached by alpha.
    """

    def __init__(self, buffers: Mapping[str, Array], threshold: Callable[[float], Tensor]) -> None:
        self.scores = buffers["scores"]
        self._surprisal = buffers["surprisal"]
        self._tail = buffers["tail"]
        self._knot = buffers["knot"]
        self._height = buffers["height"]
        self._slope = buffers["slope"]
        n = len(self.scores)
        self.floor = 1 / (n + 1)
        # Index i holds the p-value of a score that exceeds i calibration scores.
        self._p_values = np.arange(n + 1, 0, -1).astype(np.float32) / np.float32(n + 1)
        self._module_threshold = threshold
        # For each alpha: the threshold, and the surprisal of the threshold (see `_surprisal_at`).
        self._thresholds: dict[float, tuple[np.float32, np.float32]] = {}

    def p_value(self, score: Array) -> Array:
        """Return the conformal p-values [B] of scores [B]."""
        p_values: Array = self._p_values.take(self.scores.searchsorted(score))
        return p_values

    def severity(self, score: Array, alpha: float) -> Array:
        """Return the severities [B] of scores [B].

        A severity is above 1 if and only if the score is above the threshold.
        """
        threshold, threshold_surprisal = self._threshold_and_surprisal(alpha)
        with np.errstate(over="ignore", invalid="ignore"):  # overflow gives infinity, as in torch
            if len(score) == 1:  # NumPy scalars take a third of the time that arrays of one number take
                return self._severity_of_one(score[0], threshold, threshold_surprisal)
            ratio = self._surprisal_at(score) / threshold_surprisal
        severity: Array = np.where(score > threshold, np.maximum(ratio, NEXT_AFTER_ONE), np.minimum(ratio, ONE))
        return severity

    def _severity_of_one(self, score: np.float32, threshold: np.float32, threshold_surprisal: np.float32) -> Array:
        """Return the severity [1] of one score."""
        place = self.scores.searchsorted(score, "right")
        if place:
            ratio = (self._height[place] + self._slope[place] * (score - self._knot[place])) / threshold_surprisal
        else:
            ratio = self._surprisal_at(score.reshape(1))[0] / threshold_surprisal
        if score > threshold:
            ratio = NEXT_AFTER_ONE if ratio < NEXT_AFTER_ONE else ratio
        elif ratio > ONE:
            ratio = ONE
        return np.array([ratio], np.float32)

    def threshold(self, alpha: float) -> np.float32:
        """Return the score above which a row is anomalous at alpha."""
        return self._threshold_and_surprisal(alpha)[0]

    def _threshold_and_surprisal(self, alpha: float) -> tuple[np.float32, np.float32]:
        cached = self._thresholds.get(alpha)
        if cached is None:
            with torch.inference_mode():
                threshold = self._module_threshold(alpha).reshape(1).numpy()
            with np.errstate(over="ignore", invalid="ignore"):
                cached = threshold[0], self._surprisal_at(threshold)[0]
            if len(self._thresholds) >= MAX_CACHED_ALPHAS:
                self._thresholds.clear()
            self._thresholds[alpha] = cached
        return cached

    def _surprisal_at(self, score: Array) -> Array:
        """Return the surprisals [B] of scores [B]: minus the log of the probability that a normal row scores higher."""
        place = self.scores.searchsorted(score, "right")
        above = score - self._knot[place]
        surprisal = self._height[place] + self._slope[place] * above
        if place.all():
            return surprisal
        below = self._surprisal[0] * np.exp(np.minimum(above / self._tail, np.float32(0)))
        return np.where(place == 0, below, surprisal)


class TorchScriptCalibration:
    """Calibration by the methods of the artifact's module.

    Args:
        module: the module of the artifact.
        device: the device of `module`.
        floor: the smallest possible p-value.
        scores: the calibration scores, ascending; none if they are unknown.
    """

    def __init__(
        self, module: torch.jit.ScriptModule, device: torch.device, floor: float, scores: Array = NO_SCORES
    ) -> None:
        self.floor = floor
        self.scores = scores
        self._module = module
        self._device = device

    def p_value(self, score: Array) -> Array:
        """Return the conformal p-values [B] of scores [B]."""
        return self._call(self._module.p_value, score)

    def severity(self, score: Array, alpha: float) -> Array:
        """Return the severities [B] of scores [B]."""
        return self._call(self._module.severity, score, alpha)

    def threshold(self, alpha: float) -> np.float32:
        """Return the score above which a row is anomalous at alpha."""
        with torch.inference_mode():
            return np.float32(float(self._module.threshold(alpha)))

    def _call(self, method: Callable[..., Tensor], score: Array, *alpha: float) -> Array:
        with torch.inference_mode():
            output: Array = method(torch.from_numpy(score).to(self._device), *alpha).cpu().numpy()
        return output


def load_calibration(artifact: Artifact) -> Calibration:
    """Return the calibration of `artifact`.

    On a CPU, it is a `NumpyCalibration` if the results of that class agree with the results of the artifact's module.
    Otherwise it is a `TorchScriptCalibration`.
    """
    if artifact.device.type == "cpu" and artifact.calibration.keys() >= set(BUFFERS):
        buffers = {name: buffer.numpy() for name, buffer in artifact.calibration.items()}
        calibration = NumpyCalibration(buffers, artifact.module.threshold)
        if agrees_with_module(calibration, artifact.module, buffers["scores"]):
            return calibration
    scores = artifact.calibration["scores"].cpu().numpy() if "scores" in artifact.calibration else NO_SCORES
    return TorchScriptCalibration(artifact.module, artifact.device, artifact.manifest.calibration.floor, scores)


def agrees_with_module(calibration: Calibration, module: torch.jit.ScriptModule, known: Array) -> bool:
    """Return whether `calibration` gives the same p-values and verdicts as `module`, and severities within TOLERANCE.

    The compared scores are calibration scores, the float32 numbers next to these scores, the midpoints between
    these scores, and scores outside of all calibration scores. The distances of the latter rise from the spacing of
    float32 to the largest float32, so that some are of the scale of the tail, whatever this scale is.

    Args:
        calibration: the calibration to test.
        module: the module of the artifact, on the CPU.
        known: calibration scores, ascending.
    """
    at = known[np.linspace(0, len(known) - 1, min(len(known), COMPARED_SCORES)).astype(int)]
    far = np.array([-np.inf, -3e38, 0.0, 3e38, np.inf, np.nan], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        smallest = np.spacing(np.abs(at[[0, -1]])).max()
        distances = np.geomspace(smallest, 3e38, COMPARED_DISTANCES, dtype=np.float64).astype(np.float32)
        neighbours = [np.nextafter(at, np.float32(side)) for side in (-np.inf, np.inf)]
        between = (at[1:] + at[:-1]) / 2
        score = np.concatenate((far, at[-1] + distances, at[0] - distances, at, *neighbours, between))
        return all(_agree_at(calibration, module, score, alpha) for alpha in COMPARED_ALPHAS)


def _agree_at(calibration: Calibration, module: torch.jit.ScriptModule, score: Array, alpha: float) -> bool:
    with torch.inference_mode():
        tensor = torch.from_numpy(score)
        expected_p_value = module.p_value(tensor).numpy()
        expected_severity = module.severity(tensor, alpha).numpy()
    severity = calibration.severity(score, alpha)
    return (
        np.array_equal(calibration.p_value(score), expected_p_value)
        and np.array_equal(severity > 1, expected_severity > 1)
        and np.allclose(severity, expected_severity, rtol=TOLERANCE, atol=1e-30, equal_nan=True)
    )
