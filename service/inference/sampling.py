"""Seeded noise, and interpolation between latent vectors."""

import math
import secrets
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
SEEDS = 2**53  # limit of seeds: JavaScript represents integers below 2**53 exactly, so a browser can send a seed back
MIN_SINE = 1e-6  # if the sine of the angle between two vectors is smaller, they determine no great circle


def fresh_seed() -> int:
    """Return an unpredictable seed."""
    return secrets.randbelow(SEEDS)


class NoiseSource(threading.local):
    """A source of seeded random numbers.

    Each thread that uses the source has its own generator, so that the event loop never waits while another thread
    draws. Creating a generator takes half a millisecond.
    """

    def __init__(self) -> None:
        self._random = np.random.RandomState(0)

    def draw(self, seed: int, rows: int, latents: int) -> tuple[Array, Array]:
        """Return two arrays for `seed`: standard normal noise [rows, latents], and choices [rows].

        A choice is uniformly distributed between 0 and 1, and is never 1.

        The same seed gives the same numbers in every release: NumPy's policy (NEP 19) freezes the streams of
        RandomState. Noise and choices have separate streams, so that the numbers of the first rows are the same
        for any number of rows.
        """
        self._start_stream(seed)
        normal = self._random.standard_normal((rows, latents))
        self._start_stream(seed, 1)
        uniform = self._random.random_sample(rows)
        return normal.astype(np.float32), _below_one(uniform)

    def draw_rows(self, seed: int, rows: int, width: int) -> Array:
        """Return standard normal noise [rows, width] for `seed`, from a third stream. See `draw`."""
        self._start_stream(seed, 2)
        normal = self._random.standard_normal((rows, width))
        return normal.astype(np.float32)

    def draw_levels(self, seed: int, rows: int) -> Array:
        """Return choices [rows] for `seed`, from a fourth stream. They select the conditions of rows. See `draw`."""
        self._start_stream(seed, 3)
        return _below_one(self._random.random_sample(rows))

    def _start_stream(self, seed: int, *stream: int) -> None:
        self._random.seed([seed & 0xFFFFFFFF, seed >> 32, *stream])


def _below_one(uniform: npt.NDArray[np.float64]) -> Array:
    """Return `uniform` as float32. Rounding to float32 can give 1; such values are lowered below 1."""
    return np.minimum(uniform.astype(np.float32), np.nextafter(np.float32(1), np.float32(0)))


def interpolate(start: Array, end: Array, steps: int, method: str) -> Array:
    """Return points on a path from `start` to `end`, as an array [steps, K].

    The first point equals `start` exactly, and the last point equals `end` exactly.

    Args:
        start: the first point, [K].
        end: the last point, [K].
        steps: the number of points, at least 2.
        method: "linear" for the straight line, or "slerp" for spherical interpolation (White, "Sampling generative
            networks", 2016, section 2.1). If the vectors are parallel or opposite, or if one is zero, they determine
            no great circle, and "slerp" gives the straight line.
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
    if sine < MIN_SINE:
        return None
    return np.asarray((np.sin((1.0 - t) * angle) * a + np.sin(t * angle) * b) / sine)
