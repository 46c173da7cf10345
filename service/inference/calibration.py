"""What a model's scores mean, in NumPy: what its module's own methods say, sooner than TorchScript begins.

The module stays the reference. These take its place on a CPU only where they repeat its answers when it is loaded.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.artifact import Artifact

Array = npt.NDArray[np.float32]
BUFFERS = ("scores", "surprisal", "tail", "knot", "height", "slope")
UP = np.nextafter(np.float32(1), np.float32(2))
ONE = np.float32(1)
MOST_ALPHAS = 64  # whose thresholds are kept: senders choose them
PROBED = 2000  # calibration scores around which answers are compared
PROBED_ALPHAS = (0.5, 0.05, 0.001, 1e-9)  # the last below every floor
TOLERANCE = 1e-6  # relative, of severity: exponentials differ in their last bit


class Calibration:
    """`p_value`, `severity` and `threshold` of the artifact contract, on arrays: see `models.calibration`.

    Args:
        buffers: those of the module's calibration, by name.
        threshold: the module's method, asked once for each alpha.
    """

    def __init__(self, buffers: Mapping[str, Array], threshold: Callable[[float], Tensor]) -> None:
        ordered = (buffers[name] for name in BUFFERS)
        self._scores, self._surprisal, self._tail, self._knot, self._height, self._slope = ordered
        n = len(self._scores)
        self._p_values = np.arange(n + 1, 0, -1).astype(np.float32) / np.float32(n + 1)  # by scores that are smaller
        self._threshold = threshold
        self._borders: dict[float, tuple[np.float32, np.float32]] = {}

    def p_value(self, score: Array) -> Array:
        """Scores [B] to conformal p-values [B]."""
        p_values: Array = self._p_values.take(self._scores.searchsorted(score))
        return p_values

    def severity(self, score: Array, alpha: float) -> Array:
        """Scores [B] to severity [B], > 1 exactly where score > threshold."""
        threshold, surprisal = self._border(alpha)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is infinite, as in torch
            if len(score) == 1:  # a scalar costs a third of an array of one
                return self._severity_of_one(score[0], threshold, surprisal)
            ratio = self._surprisal_at(score) / surprisal
        severity: Array = np.where(score > threshold, np.maximum(ratio, UP), np.minimum(ratio, ONE))
        return severity

    def _severity_of_one(self, score: np.float32, threshold: np.float32, surprisal: np.float32) -> Array:
        """The same, [1]."""
        place = self._scores.searchsorted(score, "right")
        if place:
            ratio = (self._height[place] + self._slope[place] * (score - self._knot[place])) / surprisal
        else:
            ratio = self._surprisal_at(score.reshape(1))[0] / surprisal
        if score > threshold:
            ratio = UP if ratio < UP else ratio
        elif ratio > ONE:
            ratio = ONE
        return np.array([ratio], np.float32)

    def threshold(self, alpha: float) -> np.float32:
        """The score above which a row is anomalous at alpha."""
        return self._border(alpha)[0]

    def _border(self, alpha: float) -> tuple[np.float32, np.float32]:
        """The threshold at alpha and its surprisal."""
        border = self._borders.get(alpha)
        if border is None:
            with torch.inference_mode():
                threshold = self._threshold(alpha).reshape(1).numpy()
            with np.errstate(over="ignore", invalid="ignore"):
                border = threshold[0], self._surprisal_at(threshold)[0]
            if len(self._borders) >= MOST_ALPHAS:
                self._borders.clear()
            self._borders[alpha] = border
        return border

    def _surprisal_at(self, score: Array) -> Array:
        """-log P(a normal row scores higher), [B] to [B]."""
        place = self._scores.searchsorted(score, "right")
        above = score - self._knot[place]
        surprisal = self._height[place] + self._slope[place] * above
        if place.all():
            return surprisal
        below = self._surprisal[0] * np.exp(np.minimum(above / self._tail, np.float32(0)))
        return np.where(place == 0, below, surprisal)


class ByModule:
    """The same by the module's own methods, for whatever NumPy may not stand in for.

    Args:
        module: of the artifact.
        device: where it is.
    """

    def __init__(self, module: torch.jit.ScriptModule, device: torch.device) -> None:
        self._module = module
        self._device = device

    def p_value(self, score: Array) -> Array:
        """Scores [B] to conformal p-values [B]."""
        return self._asked(self._module.p_value, score)

    def severity(self, score: Array, alpha: float) -> Array:
        """Scores [B] to severity [B]."""
        return self._asked(self._module.severity, score, alpha)

    def threshold(self, alpha: float) -> np.float32:
        """The score above which a row is anomalous at alpha."""
        with torch.inference_mode():
            return np.float32(float(self._module.threshold(alpha)))

    def _asked(self, method: Callable[..., Tensor], score: Array, *alpha: float) -> Array:
        with torch.inference_mode():
            answer: Array = method(torch.from_numpy(score).to(self._device), *alpha).cpu().numpy()
        return answer


def calibration_of(artifact: Artifact) -> Calibration | None:
    """That of `artifact`; None where it is not on the CPU, or would not say what the module itself says."""
    if artifact.device.type != "cpu":
        return None
    buffers = {name: buffer.numpy() for name, buffer in artifact.calibration.items()}
    if not buffers.keys() >= set(BUFFERS):
        return None
    found = Calibration(buffers, artifact.module.threshold)
    return found if agrees(found, artifact.module, buffers["scores"]) else None


def agrees(calibration: Calibration, module: torch.jit.ScriptModule, known: Array) -> bool:
    """Whether both say the same of scores at the `known` ones, ascending, next to them, between them and far away.

    p-values and verdicts to the bit, severity to TOLERANCE.
    """
    at = known[np.linspace(0, len(known) - 1, min(len(known), PROBED)).astype(int)]
    far = np.array([-np.inf, -3e38, 0.0, 3e38, np.inf, np.nan], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        reach = at[-1:] + (at[-1] - at[0]) * np.array([0.1, 1.0, 10.0], np.float32)
        sides = [np.nextafter(at, np.float32(side)) for side in (-np.inf, np.inf)]
        score = np.concatenate((far, reach, 2 * at[:1] - reach, at, *sides, (at[1:] + at[:-1]) / 2))
        return all(_agree_at(calibration, module, score, alpha) for alpha in PROBED_ALPHAS)


def _agree_at(calibration: Calibration, module: torch.jit.ScriptModule, score: Array, alpha: float) -> bool:
    with torch.inference_mode():
        asked = torch.from_numpy(score)
        p_value, severity = module.p_value(asked).numpy(), module.severity(asked, alpha).numpy()
    found = calibration.severity(score, alpha)
    return (
        np.array_equal(calibration.p_value(score), p_value)
        and np.array_equal(found > 1, severity > 1)
        and np.allclose(found, severity, rtol=TOLERANCE, atol=1e-30, equal_nan=True)
    )
