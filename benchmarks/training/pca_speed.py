"""PCA against scikit-learn's: how long a fit takes, how exact it is, and how much memory a file of 4 GB needs.

Everything runs on one core. On MNIST (or, where there is none, the digits) the peers take turns in each round, so that
the mood of the machine hits all, and CPU seconds are counted; every one gets the same rows. `--large` writes a file of
rows by blocks, and lets `elbo train` and scikit-learn's IncrementalPCA each fit it in a process of its own.
Prints Markdown tables. `--smoke` makes everything small.
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
import scipy.linalg  # noqa: F401  # loads its BLAS, so that the limit of threads holds for it
import torch
from sklearn.decomposition import PCA, IncrementalPCA
from threadpoolctl import threadpool_limits

from benchmarks.data import ROOT, describe_machine, load_images
from training.fitting.pca import fit_pca

LATENTS = 32
FEATURES, FACTORS = 784, 200  # of the large file
BLOCK = 5 * FEATURES  # rows, as IncrementalPCA takes them by default
TEST_ROWS = 10_000
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# A process inherits the peak memory of the one that started it, so a small one starts what is measured.
LAUNCHER = """
import resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
"""

Rows = npt.NDArray[Any]
Fit = Callable[[Rows], tuple[Rows, Rows]]  # rows [N, D] to their mean [D] and components [K, D]


def elbo(x: Rows) -> tuple[Rows, Rows]:
    """Ours."""
    pca = fit_pca(torch.from_numpy(x), LATENTS)
    return pca.mean.numpy(), pca.components.numpy()


def sklearn(solver: str) -> Fit:
    """scikit-learn's with `solver`."""

    def fit(x: Rows) -> tuple[Rows, Rows]:
        pca = PCA(LATENTS, svd_solver=solver, random_state=0).fit(x)
        return pca.mean_, pca.components_

    return fit


def error(mean: Rows, components: Rows, x: Rows) -> float:
    """Mean squared error a feature of the projection of rows x [N, D], in float64."""
    centred = x.astype(np.float64) - mean
    return float(np.square(centred - centred @ components.T @ components).mean())


def in_memory(rounds: int, most: int) -> None:
    """The first table, of at most `most` rows."""
    name, train = load_images("train")
    test = load_images("test")[1].reshape(-1, train[0].size) / 255.0
    raw = train[:most].reshape(-1, train[0].size)
    fits: dict[str, Fit] = {"Elbo": elbo, "sklearn covariance_eigh": sklearn("covariance_eigh")}
    fits |= {"sklearn randomized": sklearn("randomized")}
    print(f"{name}, {len(raw):,} rows of {raw.shape[1]}, {LATENTS} components, {rounds} rounds, one core.\n")
    print("| rows | fit | CPU s | Elbo is faster by (rounds from, to) | test error | above the least |")
    print("|---|---|---|---|---|---|")
    inputs: dict[str, tuple[Rows, float]] = {
        "0 to 255, as read from the file": (raw, 255.0),
        "0 to 255, float32": (raw.astype(np.float32), 255.0),
        "0 to 255, float64": (raw.astype(np.float64), 255.0),
        "0 to 1, float32": (raw.astype(np.float32) / np.float32(255.0), 1.0),
    }
    for label, (x, unit) in inputs.items():
        seconds: dict[str, list[float]] = {peer: [] for peer in fits}
        errors = {}
        for _ in range(rounds):
            for peer, fit in fits.items():
                started = process_time()
                mean, components = fit(x)
                seconds[peer].append(process_time() - started)
                errors[peer] = error(mean / unit, components, test)
        for peer, taken in seconds.items():
            ratios = [theirs / ours for theirs, ours in zip(taken, seconds["Elbo"], strict=True)]
            faster = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}, {max(ratios):.2f})"
            excess = errors[peer] / errors["Elbo"] - 1.0
            print(
                f"| {label} | {peer} | {statistics.median(taken):.2f} | {'' if peer == 'Elbo' else faster} | "
                f"{errors[peer]:.7f} | {excess:+.1e} |",
                flush=True,
            )


def generated(rows: int, seed: int) -> Iterator[npt.NDArray[np.float32]]:
    """Blocks of rows with a spectrum that falls slowly: FACTORS directions of variance 1, 1/2, 1/3 ..., and noise."""
    directions = np.random.RandomState(0).standard_normal((FACTORS, FEATURES)).astype(np.float32)
    directions /= np.sqrt(np.arange(1, FACTORS + 1, dtype=np.float32))[:, None]
    random = np.random.Generator(np.random.SFC64(seed))
    for start in range(0, rows, BLOCK):
        size = min(BLOCK, rows - start)
        factors = random.standard_normal((size, FACTORS), np.float32)
        yield 5.0 + factors @ directions + 0.1 * random.standard_normal((size, FEATURES), np.float32)


def write(path: Path, rows: int) -> None:
    """`rows` rows into an .npy file, block by block."""
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, FEATURES)}
        np.lib.format.write_array_header_1_0(file, header)
        for block in generated(rows, 1):
            block.tofile(file)


def incremental(path: str) -> None:
    """scikit-learn's IncrementalPCA of the rows in the file, in blocks; its result lies beside the file."""
    pca, rows = IncrementalPCA(LATENTS), np.load(path, mmap_mode="r").shape[0]
    with Path(path).open("rb") as file:
        file.seek(-4 * rows * FEATURES, os.SEEK_END)
        while rows:
            size = BLOCK if rows >= 2 * BLOCK else rows  # the last block must not be smaller than the components
            pca.partial_fit(np.fromfile(file, np.float32, size * FEATURES).reshape(size, FEATURES))
            rows -= size
    np.savez(Path(path).with_suffix(".npz"), mean=pca.mean_, components=pca.components_)


def measured(command: list[str], folder: Path) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak resident memory in GB of a command of Python's, which must succeed."""
    environment = {**os.environ, **ONE_CORE, "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-c", LAUNCHER, sys.executable, *command]
    answer = subprocess.run(launcher, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    wall, cpu, kilobytes = map(float, answer.stdout.split())
    return wall, cpu, kilobytes * 1024 / 1e9


def large(rows: int) -> None:
    """The second table."""
    from models.artifact import load
    from models.manifest import resolve

    test = np.concatenate(list(generated(TEST_ROWS, 2)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "rows.npy"
        write(path, rows)
        size = path.stat().st_size / 1e9
        print(f"\nA file of {rows:,} rows of {FEATURES} float32 values, {size:.2f} GB, one core, a process each.\n")
        print("| what | wall s | CPU s | peak memory, GB | error of fresh rows | above the least |")
        print("|---|---|---|---|---|---|")
        options = ["--model", "pca", "--name", "large", "--latents", str(LATENTS), "--scale", "none"]
        ours = measured(["-m", "elbo", "train", str(path), *options], folder)
        module = load(resolve(folder / "artifacts", "large")).module
        least = float((module(torch.from_numpy(test)) - torch.from_numpy(test)).double().square().mean())
        report("elbo train, from the file to a published artifact", ours, least, least)
        program = f"from benchmarks.training.pca_speed import incremental; incremental({str(path)!r})"
        theirs = measured(["-c", program], folder)
        found = np.load(path.with_suffix(".npz"))
        report("sklearn IncrementalPCA, the fit alone", theirs, error(found["mean"], found["components"], test), least)


def report(what: str, cost: tuple[float, float, float], mean_error: float, least: float) -> None:
    """One line of the second table."""
    wall, cpu, memory = cost
    print(f"| {what} | {wall:.0f} | {cpu:.0f} | {memory:.2f} | {mean_error:.6f} | {mean_error / least - 1.0:+.2%} |")


def main() -> None:
    """Measure, in one thread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small, to see that it works")
    parser.add_argument(
        "--large", action="store_true", help="also fit a file of 4 GB; needs that much room on the disk"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine("torch", "numpy", "scipy", "scikit-learn"), end="\n\n")
    with threadpool_limits(1):
        in_memory(*((2, 5_000) if options.smoke else (7, 1_000_000)))
        if options.large:
            large(20_000 if options.smoke else 1_300_000)


if __name__ == "__main__":
    main()
