"""Moments of blocks of many sizes, compared with extended precision, integer arithmetic and numpy."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.linalg import subspace_angles

from training.data.moments import Moments, compute_moments
from training.data.table import read_table
from training.fitting.pca import fit_pca, pca_from_moments, spectrum, spectrum_from_moments

Floats = npt.NDArray[np.float32]
RANDOM = np.random.RandomState(0)
COUNTS = RANDOM.poisson(3.0, (3000, 20)).astype(np.float32)
BYTES = (RANDOM.uniform(size=(9000, 12)) ** 4 * RANDOM.randint(0, 255, (9000, 1))).astype(np.uint8).astype(np.float32)
SPARSE = np.where(RANDOM.uniform(size=(3000, 30)) < 0.001, RANDOM.standard_normal((3000, 30)), 0.0).astype(np.float32)
FAR = (1e6 + 1e-2 * RANDOM.standard_normal((4000, 6))).astype(np.float32)
TINY = (1e-3 + 1e-6 * RANDOM.standard_normal((4000, 6))).astype(np.float32)
TRUE = {"normal": RANDOM.standard_normal((3000, 8)).astype(np.float32), "counts": COUNTS, "bytes": BYTES}
TRUE |= {"sparse": SPARSE, "far": FAR, "tiny": TINY, "dark rows first": BYTES[np.argsort(BYTES.sum(axis=1))]}
TRUE |= {
    "bright rows first": TRUE["dark rows first"][::-1],
    "integers, then not": np.concatenate((COUNTS, COUNTS + 0.1)),
}
TRUE |= {"small, then large": np.concatenate((COUNTS, 1e7 * COUNTS)), "large": 1e30 * COUNTS, "single": COUNTS[:1]}


def moments_of(x: npt.NDArray[Any], block: int, with_covariance: bool = True) -> Moments:
    return compute_moments((x[start : start + block] for start in range(0, len(x), block)), with_covariance)


def extended(x: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the mean and the covariance, computed in two passes with extended precision."""
    wide = x.astype(np.longdouble)
    mean = wide.mean(axis=0)
    centred = wide - mean
    return mean, np.einsum("nd,ne->de", centred, centred) / max(len(x) - 1, 1)


@pytest.mark.parametrize("block", [100, 1777, 100_000])
@pytest.mark.parametrize("name", TRUE)
def test_moments_from_one_pass_agree_with_two_passes_in_extended_precision(name: str, block: int) -> None:
    x = TRUE[name]
    mean, covariance = extended(x)
    found = moments_of(x, block)
    assert found.covariance is not None
    scale = np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal())).astype(float)
    assert found.rows == len(x)
    assert found.mean.numpy() == pytest.approx(mean.astype(float), rel=1e-15, abs=1e-12 * float(scale.max()) ** 0.5)
    assert (np.abs(found.covariance.numpy() - covariance.astype(float)) <= 1e-12 * scale).all()
    assert torch.equal(found.covariance, found.covariance.T)
    assert torch.equal(found.variance, found.covariance.diagonal())
    assert np.array_equal(found.low.numpy(), x.min(axis=0))
    assert np.array_equal(found.high.numpy(), x.max(axis=0))


@pytest.mark.parametrize("name", ["bytes", "counts", "dark rows first", "bright rows first"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
def test_integers_are_summed_without_rounding(name: str, dtype: type) -> None:
    x: npt.NDArray[Any] = TRUE[name].astype(dtype)
    integers = x.astype(np.int64)
    rows, totals = len(x), integers.sum(axis=0)
    numerator = rows * (integers.T @ integers) - np.outer(totals, totals)  # the covariance times rows * (rows - 1)
    found = moments_of(x, 5000).covariance
    assert found is not None
    exact = numerator / (rows * (rows - 1))
    # Only the last subtraction and the division round.
    assert np.abs(found.numpy() - exact).max() <= 4 * np.spacing(exact.max())


def test_blocks_may_have_any_size_and_may_be_empty() -> None:
    x = TRUE["normal"]
    whole, parts = moments_of(x, len(x)), compute_moments([x[:0], x[:1], x[1:5], x[5:5], x[5:]])
    assert whole.covariance is not None
    assert parts.covariance is not None
    assert torch.allclose(whole.mean, parts.mean, rtol=0, atol=1e-14)
    assert torch.allclose(whole.covariance, parts.covariance, rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match="at least one row"):
        compute_moments([x[:0]])


@pytest.mark.parametrize("name", TRUE)
def test_moments_are_the_same_with_and_without_the_covariance(name: str) -> None:
    full, without = moments_of(TRUE[name], 1000), moments_of(TRUE[name], 1000, with_covariance=False)
    assert without.covariance is None
    assert torch.allclose(without.variance, full.variance, rtol=1e-12, atol=0)
    for field in ("mean", "low", "high"):
        assert torch.equal(getattr(without, field), getattr(full, field)) or field == "mean"
    assert torch.allclose(without.mean, full.mean, rtol=1e-14, atol=0)


def test_moments_of_the_largest_float32_values_are_finite() -> None:
    end = float(np.finfo(np.float32).max)
    found = moments_of(np.array([[end, -end], [-end, -end], [end, end]], np.float32), 2)
    assert float(found.mean[0]) == pytest.approx(end / 3)
    assert found.covariance is not None
    assert float(found.variance[0]) == pytest.approx(4 / 3 * end**2)
    assert float(found.covariance[0, 1]) == pytest.approx(2 / 3 * end**2)
    later = compute_moments([COUNTS, COUNTS * np.float32(end / COUNTS.max())])
    assert bool(later.variance.isfinite().all())


def test_scaled_moments_equal_the_moments_of_scaled_rows() -> None:
    x = TRUE["normal"].astype(np.float64)
    shift, scale = RANDOM.standard_normal(8), RANDOM.uniform(0.1, 9.0, 8)
    ours = moments_of(x, 700).scaled(torch.from_numpy(shift), torch.from_numpy(scale))
    direct = moments_of((x - shift) / scale, 700)
    assert ours.covariance is not None
    assert direct.covariance is not None
    assert torch.allclose(ours.covariance, direct.covariance, atol=1e-13)
    for field in ("mean", "variance", "low", "high"):
        assert torch.allclose(getattr(ours, field), getattr(direct, field), atol=1e-13)


def test_pca_from_blocks_on_disk_equals_pca_from_rows_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, TRUE["normal"])
    rows = read_table(str(path), limit=0).x
    assert rows.on_disk
    from_disk = pca_from_moments(compute_moments(block for _, block in rows.blocks()), 3)
    in_memory = fit_pca(torch.from_numpy(TRUE["normal"]), 3)
    for ours, theirs in zip(from_disk.buffers(), in_memory.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize("shape", [(300, 40), (30, 40), (40, 40)])
def test_spectrum_equals_the_eigenvalues_of_the_covariance(shape: tuple[int, int]) -> None:
    x = RANDOM.standard_normal(shape) * np.linspace(0.1, 3.0, shape[1])
    expected = np.linalg.eigvalsh(np.cov(x.T))[::-1]
    assert spectrum(torch.from_numpy(x)).numpy() == pytest.approx(expected[: min(shape)], abs=1e-12)
    assert spectrum_from_moments(moments_of(x, 100)).numpy() == pytest.approx(expected, abs=1e-12)


def test_pca_from_moments_equals_pca_from_rows_if_there_are_fewer_rows_than_features() -> None:
    x = RANDOM.standard_normal((20, 50))
    by_rows, by_moments = fit_pca(torch.from_numpy(x), 5), pca_from_moments(moments_of(x, 7), 5)
    assert subspace_angles(by_rows.components.numpy().T, by_moments.components.numpy().T).max() < 1e-6
    assert torch.allclose(by_rows.eigenvalues, by_moments.eigenvalues)
    assert torch.allclose(by_rows.noise_variance, by_moments.noise_variance)


@pytest.mark.slow
def test_pca_is_bit_identical_for_any_number_of_threads() -> None:
    program = """
import hashlib, numpy as np, torch
from training.fitting.pca import fit_pca
random = np.random.RandomState(0)
for x in (random.standard_normal((3000, 300)), random.randint(0, 256, (3000, 300))):
    pca = fit_pca(torch.from_numpy(x.astype(np.float32)), 20)
    print(hashlib.sha256(b"".join(value.numpy().tobytes() for value in pca.buffers())).hexdigest())
"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[3],
            env={"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "4")
    ]
    assert outputs[0].count("\n") == 2
    assert outputs[0] == outputs[1]
