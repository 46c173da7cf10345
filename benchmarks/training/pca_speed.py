"""Compare the speed, accuracy and memory of Elbo's PCA with scikit-learn's, on one core.

    python benchmarks/training/pca_speed.py
    python benchmarks/training/pca_speed.py --large    # also fits a file of 4 GB, which needs as much disk space
    python benchmarks/training/pca_speed.py --smoke    # few rows

All implementations fit the same rows: MNIST, or scikit-learn's digits if MNIST is not available. In each round, each
implementation runs once, so that changes in the machine's speed affect all implementations alike. Times are CPU
seconds.

With --large the benchmark also writes a file of rows. `elbo train` and scikit-learn's IncrementalPCA fit this file,
each in its own process.

The benchmark prints Markdown tables.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.linalg  # noqa: F401  # loads scipy's BLAS, so that the thread limit applies to it
import torch
from sklearn.decomposition import PCA, IncrementalPCA
from threadpoolctl import threadpool_limits

from benchmarks.data import ROOT, describe_machine, load_images
from training.fitting.pca import fit_pca

LATENTS = 32
FEATURES = 784  # number of features in the large file
FACTORS = 200  # number of directions in which the rows of the large file vary, apart from noise
BLOCK_ROWS = 5 * FEATURES  # rows per block; equal to the default batch size of IncrementalPCA
TEST_ROWS = 10_000
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# A small program that starts the measured process. The benchmark does not start this process itself: the benchmark uses
# much memory, and the system never reports a lower peak memory for a process than for its parent.
LAUNCHER = """
import resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
"""

Rows = npt.NDArray[Any]
Fit = Callable[[Rows], tuple[Rows, Rows]]  # returns the mean [D] and the components [K, D] of rows [N, D]


def elbo_fit(x: Rows) -> tuple[Rows, Rows]:
    """Fit Elbo's PCA to the rows x [N, D]. Return the mean and the components."""
    pca = fit_pca(torch.from_numpy(x), LATENTS)
    return pca.mean.numpy(), pca.components.numpy()


def sklearn_fit(solver: str) -> Fit:
    """Return a function that fits scikit-learn's PCA with `solver`."""

    def fit(x: Rows) -> tuple[Rows, Rows]:
        pca = PCA(LATENTS, svd_solver=solver, random_state=0).fit(x)
        return pca.mean_, pca.components_

    return fit


def projection_error(mean: Rows, components: Rows, x: Rows) -> float:
    """Project rows x [N, D] onto the components. Return the mean squared error per feature, computed in float64."""
    centred = x.astype(np.float64) - mean
    return float(np.square(centred - centred @ components.T @ components).mean())


def compare_in_memory(rounds: int, max_rows: int) -> None:
    """Fit at most `max_rows` images with all implementations, and print the table."""
    data_set, train = load_images("train")
    test = load_images("test")[1].reshape(-1, train[0].size) / 255.0
    raw = train[:max_rows].reshape(-1, train[0].size)
    fits: dict[str, Fit] = {
        "Elbo": elbo_fit,
        "sklearn covariance_eigh": sklearn_fit("covariance_eigh"),
        "sklearn randomized": sklearn_fit("randomized"),
    }
    print(f"{data_set}, {len(raw):,} rows of {raw.shape[1]}, {LATENTS} components, {rounds} rounds, one core.\n")
    print("| rows | implementation | CPU s | CPU s / CPU s of Elbo (min, max) | test error | relative to Elbo's |")
    print("|---|---|---|---|---|---|")
    inputs: dict[str, tuple[Rows, float]] = {
        "0 to 255, as read from the file": (raw, 255.0),
        "0 to 255, float32": (raw.astype(np.float32), 255.0),
        "0 to 255, float64": (raw.astype(np.float64), 255.0),
        "0 to 1, float32": (raw.astype(np.float32) / np.float32(255.0), 1.0),
    }
    for label, (x, unit) in inputs.items():
        seconds: dict[str, list[float]] = {name: [] for name in fits}
        errors = {}
        for _ in range(rounds):
            for name, fit in fits.items():
                started = process_time()
                mean, components = fit(x)
                seconds[name].append(process_time() - started)
                errors[name] = projection_error(mean / unit, components, test)
        for name, durations in seconds.items():
            ratios = [other / elbo for other, elbo in zip(durations, seconds["Elbo"], strict=True)]
            ratio = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}, {max(ratios):.2f})"
            excess = errors[name] / errors["Elbo"] - 1.0
            print(
                f"| {label} | {name} | {statistics.median(durations):.2f} | {'' if name == 'Elbo' else ratio} | "
                f"{errors[name]:.7f} | {excess:+.1e} |",
                flush=True,
            )


def generate_blocks(rows: int, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield blocks of random rows.

    The rows vary in FACTORS directions, with variance 1 / i in direction i. Every value also contains noise.
    """
    directions = np.random.RandomState(0).standard_normal((FACTORS, FEATURES)).astype(np.float32)
    directions /= np.sqrt(np.arange(1, FACTORS + 1, dtype=np.float32))[:, None]
    random = np.random.Generator(np.random.SFC64(seed))
    for start in range(0, rows, BLOCK_ROWS):
        size = min(BLOCK_ROWS, rows - start)
        factors = random.standard_normal((size, FACTORS), np.float32)
        yield 5.0 + factors @ directions + 0.1 * random.standard_normal((size, FEATURES), np.float32)


def write_rows(path: Path, rows: int) -> None:
    """Write `rows` random rows to an npy file."""
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, FEATURES)}
        np.lib.format.write_array_header_1_0(file, header)
        for block in generate_blocks(rows, 1):
            block.tofile(file)


def fit_incremental(path: str) -> None:
    """Fit scikit-learn's IncrementalPCA to an npy file. Write the result to an npz file of the same name."""
    pca, rows = IncrementalPCA(LATENTS), np.load(path, mmap_mode="r").shape[0]
    with Path(path).open("rb") as file:
        file.seek(-4 * rows * FEATURES, os.SEEK_END)
        while rows:
            size = BLOCK_ROWS if rows >= 2 * BLOCK_ROWS else rows  # the last block needs at least LATENTS rows
            pca.partial_fit(np.fromfile(file, np.float32, size * FEATURES).reshape(size, FEATURES))
            rows -= size
    np.savez(Path(path).with_suffix(".npz"), mean=pca.mean_, components=pca.components_)


def measure_process(arguments: list[str], folder: Path) -> tuple[float, float, float]:
    """Run Python with `arguments`. Return wall seconds, CPU seconds, and peak resident memory in GB."""
    environment = {**os.environ, **ONE_CORE, "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-c", LAUNCHER, sys.executable, *arguments]
    process = subprocess.run(launcher, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    wall, cpu, kilobytes = map(float, process.stdout.split())
    return wall, cpu, kilobytes * 1024 / 1e9


def compare_on_large_file(rows: int) -> None:
    """Write a file of `rows` rows, fit it with `elbo train` and with IncrementalPCA, and print the table."""
    from models.artifact import load
    from models.manifest import resolve

    test = np.concatenate(list(generate_blocks(TEST_ROWS, 2)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "rows.npy"
        write_rows(path, rows)
        size = path.stat().st_size / 1e9
        print(f"\nA file of {rows:,} rows of {FEATURES} float32 values, {size:.2f} GB, one core, one process each.\n")
        print("| program | wall s | CPU s | peak memory, GB | error of new rows | relative to Elbo's |")
        print("|---|---|---|---|---|---|")
        options = ["--model", "pca", "--name", "large", "--latents", str(LATENTS), "--scale", "none"]
        elbo_cost = measure_process(["-m", "elbo", "train", str(path), *options], folder)
        module = load(resolve(folder / "artifacts", "large")).module
        elbo_error = float((module(torch.from_numpy(test)) - torch.from_numpy(test)).double().square().mean())
        print_large_row("elbo train, from the file to a published artifact", elbo_cost, elbo_error, elbo_error)
        program = f"from benchmarks.training.pca_speed import fit_incremental; fit_incremental({str(path)!r})"
        sklearn_cost = measure_process(["-c", program], folder)
        fitted = np.load(path.with_suffix(".npz"))
        sklearn_error = projection_error(fitted["mean"], fitted["components"], test)
        print_large_row("sklearn IncrementalPCA, only the fit", sklearn_cost, sklearn_error, elbo_error)


def print_large_row(title: str, cost: tuple[float, float, float], error: float, elbo_error: float) -> None:
    """Print a row of the table for the large file."""
    wall, cpu, memory = cost
    print(f"| {title} | {wall:.0f} | {cpu:.0f} | {memory:.2f} | {error:.6f} | {error / elbo_error - 1.0:+.2%} |")


def main() -> None:
    """Measure in one thread, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rows, to check that the benchmark works")
    parser.add_argument("--large", action="store_true", help="also fit a file of 4 GB; needs that much disk space")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine("torch", "numpy", "scipy", "scikit-learn"), end="\n\n")
    with threadpool_limits(1):
        rounds, max_rows = (2, 5_000) if options.smoke else (7, 1_000_000)
        compare_in_memory(rounds, max_rows)
        if options.large:
            compare_on_large_file(20_000 if options.smoke else 1_300_000)


if __name__ == "__main__":
    main()
