"""Noise, compared with its distribution and with NumPy's stream; interpolation, compared with its formulas."""

import math
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter, sleep

import numpy as np
import pytest
from scipy import stats

from service.inference.sampling import SEEDS, NoiseSource, fresh_seed, interpolate

NOISE = NoiseSource()


def test_noise_is_standard_normal_and_choice_is_uniform() -> None:
    normal, uniform = NOISE.draw(11, 500, 20)
    assert stats.kstest(normal.ravel(), "norm").pvalue > 0.001
    assert stats.kstest(uniform, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(normal[:, 0], uniform)[0, 1]) < 0.15


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32, 2**53 - 1])
def test_noise_of_a_seed_equals_the_stream_of_numpy_random_state(seed: int) -> None:
    low, high = seed % 2**32, seed // 2**32
    normal, uniform = NOISE.draw(seed, 4, 3)
    expected = np.random.RandomState([low, high]).standard_normal((4, 3)).astype(np.float32)
    np.testing.assert_array_equal(normal, expected)
    expected = np.random.RandomState([low, high, 1]).random_sample(4).astype(np.float32)
    np.testing.assert_array_equal(uniform, expected)


def test_first_rows_of_noise_do_not_depend_on_the_number_of_rows() -> None:
    for few, many in zip(NOISE.draw(7, 2, 5), NOISE.draw(7, 9, 5), strict=True):
        np.testing.assert_array_equal(few, many[:2])


def test_seeds_give_different_noise_even_if_only_their_upper_bits_differ() -> None:
    assert not np.array_equal(NOISE.draw(5, 1, 8)[0], NOISE.draw(5 + 2**32, 1, 8)[0])


def test_fresh_seeds_are_distinct_and_exact_in_javascript() -> None:
    seeds = {fresh_seed() for _ in range(50)}
    assert len(seeds) == 50
    assert all(0 <= seed < SEEDS for seed in seeds)


A, B = np.array([3, 0, 0], np.float32), np.array([0, 0.5, 0], np.float32)


def test_draw_does_not_wait_while_another_thread_draws() -> None:
    with ThreadPoolExecutor(1) as executor:
        started = perf_counter()
        other = executor.submit(NOISE.draw, 1, 10_000, 2000)
        sleep(0.05)
        drawn = NOISE.draw(2, 1, 4)[0]
        waited = perf_counter() - started
        noise = other.result()[0]
    assert waited < (perf_counter() - started) / 2
    np.testing.assert_array_equal(drawn, NOISE.draw(2, 1, 4)[0])
    np.testing.assert_array_equal(noise[:3], NOISE.draw(1, 3, 2000)[0])


@pytest.mark.parametrize("method", ["linear", "slerp"])
@pytest.mark.parametrize("steps", [2, 3, 10])
def test_interpolation_includes_both_ends_exactly(method: str, steps: int) -> None:
    start, end = NOISE.draw(3, 2, 6)[0]
    points = interpolate(start, end, steps, method)
    assert points.shape == (steps, 6)
    np.testing.assert_array_equal(points[0], start)
    np.testing.assert_array_equal(points[-1], end)


def test_linear_interpolation_has_equal_steps() -> None:
    np.testing.assert_allclose(np.diff(interpolate(A, B, 5, "linear"), axis=0), np.tile((B - A) / 4, (4, 1)), rtol=1e-6)


def test_slerp_between_points_of_a_circle_follows_the_circle_in_equal_angles() -> None:
    start, end = np.array([2, 0], np.float32), np.array([0, 2], np.float32)
    angles = np.linspace(0, math.pi / 2, 7)
    expected = 2 * np.column_stack((np.cos(angles), np.sin(angles)))
    np.testing.assert_allclose(interpolate(start, end, 7, "slerp"), expected, atol=1e-6)


def test_slerp_follows_the_formula_of_white_if_the_vectors_differ_in_length() -> None:
    middle = interpolate(A, B, 3, "slerp")[1]
    np.testing.assert_allclose(middle, math.sqrt(0.5) * (A + B), rtol=1e-6)


@pytest.mark.parametrize("end", [2 * A, -A, 0 * A, A])
def test_slerp_is_linear_if_the_vectors_are_parallel_opposite_or_zero(end: np.ndarray) -> None:
    np.testing.assert_array_equal(interpolate(A, end, 6, "slerp"), interpolate(A, end, 6, "linear"))
