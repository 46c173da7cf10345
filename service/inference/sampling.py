"""The arithmetic of latent vectors that needs no model: seeded noise, and ways from one point to another."""

import math
import secrets
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
SEEDS = 2**53  # JavaScript's integers are exact below it, so that a seed survives a browser
_PARALLEL = 1e-6  # sine of an angle below which the great circle is no longer determined


def fresh_seed() -> int:
    """A seed that nobody can foresee."""
    return secrets.randbelow(SEEDS)


class NoiseSource:
    """Seeded random numbers. One object may serve every thread; making one takes half a millisecond."""

    def __init__(self) -> None:
        self._random = np.random.RandomState(0)
        self._turn = threading.Lock()

    def draw(self, seed: int, rows: int, latents: int) -> tuple[Array, Array]:
        """Standard normal noise [rows, latents] and uniform choices [rows] in [0, 1).

        The same seed gives the same numbers for ever: NumPy's policy (NEP 19) freezes RandomState's streams. Fewer
        rows are the first of more, since the two come from streams of their own.
        """
        low, high = seed & 0xFFFFFFFF, seed >> 32
        with self._turn:
            self._random.seed([low, high])
            normal = self._random.standard_normal((rows, latents))
            self._random.seed([low, high, 1])
            uniform = self._random.random_sample(rows)
        below_one = np.nextafter(np.float32(1), np.float32(0))  # rounding to float32 may give 1 itself
        return normal.astype(np.float32), np.minimum(uniform.astype(np.float32), below_one)


def interpolate(start: Array, end: Array, steps: int, method: str) -> Array:
    """`steps` points [steps, K] from `start` [K] to `end` [K], both of them exactly included.

    "linear" is the straight line. "slerp" goes along the great circle through the two directions while the length
    follows (White, "Sampling generative networks", 2016, section 2.1); between parallel, opposite or zero vectors no
    great circle is determined, and it goes straight.
    """
    t = np.linspace(0.0, 1.0, steps)[:, None]  # [steps, 1]
    a, b = start.astype(np.float64), end.astype(np.float64)
    path = _slerp(a, b, t) if method == "slerp" else None
    if path is None:
        path = (1.0 - t) * a + t * b
    points = path.astype(np.float32)
    points[0], points[-1] = start, end
    return points


def _slerp(a: npt.NDArray[Any], b: npt.NDArray[Any], t: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    if lengths == 0:
        return None
    angle = math.acos(np.clip(a @ b / lengths, -1.0, 1.0))
    sine = math.sin(angle)
    if sine < _PARALLEL:
        return None
    return np.asarray((np.sin((1.0 - t) * angle) * a + np.sin(t * angle) * b) / sine)
