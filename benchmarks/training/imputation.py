"""Measure how well models estimate missing values of tables, and how many of them their intervals contain.

    python benchmarks/training/imputation.py
    python benchmarks/training/imputation.py --smoke    # one small data set

Half of the normal rows of each data set train a model of each kind. From the other normal rows, values are taken out at
random. The error is the root mean squared error of the estimates, in standard deviations of each feature. An estimate
by the median of the feature has an error of about 1, or more for skewed features. `gaussian` is the conditional mean of
a Gaussian with the full covariance of the training rows. The intervals should contain 90 % of the values that were
taken out.

The benchmark prints Markdown tables.
"""

import argparse
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.anomaly.datasets import LabelledSplit, labelled_splits
from models import artifact
from training.config import EVERY_KIND, TrainConfig
from training.data.table import read_table
from training.progress import SilentReporter
from training.train import train

SHARES = (0.1, 0.3, 0.5)  # of the values that are taken out
MAX_TEST_ROWS = 1000
RIDGE = 1e-3  # added to the variances of the Gaussian, because some features repeat each other
NAMES = ("cardio", "pendigits", "satellite", "thyroid", "wine")

Doubles = npt.NDArray[np.float64]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one small data set, two kinds, few epochs")
    smoke = parser.parse_args().smoke
    splits = labelled_splits(range(1), bundled=smoke)
    chosen = list(islice(splits, 1)) if smoke else [split for split in splits if split.name.lower() in NAMES]
    kinds = ("pca", "vae") if smoke else EVERY_KIND
    print("| data set | missing | kind | error | within the 90 % interval |\n|---|---|---|---|---|")
    for split in chosen:
        measure(split, kinds, epochs=3 if smoke else None)


def measure(split: LabelledSplit, kinds: Sequence[str], epochs: int | None) -> None:
    """Print a line for each share of missing values and each kind of model."""
    test = split.test[split.labels == 0][:MAX_TEST_ROWS]
    deviation = split.train.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        np.save(rows := Path(folder, "rows.npy"), split.train.astype(np.float32))
        table = read_table(str(rows))
        options = {} if epochs is None else {"epochs": epochs}
        paths = [
            train(TrainConfig(model=kind, name=kind, **options), table, Path(folder, "artifacts"), SilentReporter())
            for kind in kinds
        ]
        modules = dict(zip(kinds, (artifact.load(path).module for path in paths), strict=True))
    for share in SHARES:
        taken = np.random.RandomState(0).uniform(size=test.shape) < share
        taken[taken.all(axis=1), 0] = False
        gaps = np.where(taken, np.nan, test)
        baselines = {"median": np.where(taken, np.median(split.train, axis=0), test), "gaussian": gaussian(split, gaps)}
        for name, estimate in baselines.items():
            report(split, share, name, ((estimate - test) / deviation)[taken], None)
        for kind, module in modules.items():
            parts = [module.impute(part) for part in torch.from_numpy(gaps).float().split(64)]
            mean, _, low, high = (torch.cat(outputs).double().numpy() for outputs in zip(*parts, strict=True))
            inside = ((low <= test) & (test <= high))[taken].mean()
            report(split, share, kind, ((mean - test) / deviation)[taken], inside)


def gaussian(split: LabelledSplit, gaps: Doubles) -> Doubles:
    """Return rows [N, D] with the conditional mean of a Gaussian in place of each NaN."""
    mean, covariance = split.train.mean(axis=0), np.cov(split.train.T) + RIDGE * np.eye(gaps.shape[1])
    filled = gaps.copy()
    for row in filled:
        missing = np.isnan(row)
        known = ~missing
        gain = np.linalg.solve(covariance[np.ix_(known, known)], covariance[np.ix_(known, missing)]).T
        row[missing] = mean[missing] + gain @ (row[known] - mean[known])
    return filled


def report(split: LabelledSplit, share: float, name: str, error: Doubles, inside: float | None) -> None:
    """Print a line of the table."""
    cover = "" if inside is None else f"{100 * inside:.1f} %"
    print(f"| {split.name} | {100 * share:.0f} % | {name} | {np.sqrt(np.mean(error**2)):.3f} | {cover} |", flush=True)


if __name__ == "__main__":
    main()
