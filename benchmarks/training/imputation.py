"""Measure how well models estimate missing values of tables, and how many of them their intervals contain.

    python benchmarks/training/imputation.py
    python benchmarks/training/imputation.py --sets wine --seeds 6 --kinds pca
    python benchmarks/training/imputation.py --smoke    # one small data set

Half of the normal rows of each data set train a model of each kind. From the other normal rows, values are taken out at
random. The error is the root mean squared error of the estimates, in standard deviations of each feature. An estimate
by the median of the feature has an error of about 1, or more for skewed features. `gaussian` is the conditional mean of
a Gaussian with the full covariance of the training rows. The intervals should contain 90 % of the values that were
taken out.

A second table is about PCA of few rows of simulated tables. Their rows are normally distributed: with three strong
latents and equal noise, as probabilistic PCA assumes, with eight, or with a covariance that no PCA has. `narrow` is the
share of the values within 1.645 standard deviations, which takes the fitted parameters for the true ones.

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
from models.calibration import Calibration
from models.completion import CompletingPCA
from models.observation import no_observation_noise
from models.prior import gaussian_prior
from models.scaling import standardise
from training.config import EVERY_KIND, TrainConfig
from training.data.table import read_table
from training.fitting.completion import NORMAL_END
from training.fitting.defaults import default_table_latents
from training.fitting.pca import fit_pca, spectrum
from training.progress import SilentReporter
from training.train import train

SHARES = (0.1, 0.3, 0.5)  # of the values that are taken out
MAX_TEST_ROWS = 1000
RIDGE = 1e-3  # added to the variances of the Gaussian, because some features repeat each other
NAMES = ("cardio", "pendigits", "satellite", "thyroid", "wine")

SIMULATED_ROWS = (40, 100, 1000)  # fit rows of the simulated tables
SIMULATED_WIDTH, NEW_ROWS = 13, 400
STRONG_LATENTS = {"3 latents": 3, "8 latents": 8, "no PCA": None}  # of the simulated tables

Doubles = npt.NDArray[np.float64]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one small data set, two kinds, few epochs")
    parser.add_argument(
        "--sets", type=lambda text: text.lower().split(","), default=NAMES, help="some of the data sets"
    )
    parser.add_argument("--seeds", type=int, default=1, help="splits of each data set (default 1)")
    parser.add_argument("--kinds", nargs="+", choices=EVERY_KIND, default=EVERY_KIND, help="kinds of models")
    parser.add_argument("--draws", type=int, default=40, help="simulated tables of each kind (default 40; 0 for none)")
    options = parser.parse_args()
    smoke = options.smoke
    torch.set_num_threads(1)
    splits = labelled_splits(range(options.seeds), bundled=smoke)
    chosen = list(islice(splits, 1)) if smoke else [split for split in splits if split.name.lower() in options.sets]
    kinds = ("pca", "vae") if smoke else options.kinds
    print("| data set | missing | kind | error | within the 90 % interval |\n|---|---|---|---|---|")
    for split in chosen:
        measure(split, kinds, epochs=3 if smoke else None)
    if draws := 2 if smoke else options.draws:
        print("\n| simulated tables | fit rows | missing | within the 90 % interval | narrow |\n|---|---|---|---|---|")
        for name, latents in STRONG_LATENTS.items():
            for rows in SIMULATED_ROWS:
                for share in SHARES:
                    inside, narrow = np.mean([simulate(draw, rows, latents, share) for draw in range(draws)], axis=0)
                    cells = f"{100 * share:.0f} % | {100 * inside:.1f} % | {100 * narrow:.1f} %"
                    print(f"| {name} | {rows} | {cells} |", flush=True)


def simulate(draw: int, rows: int, latents: int | None, share: float) -> tuple[float, float]:
    """Return the shares of the values of new rows within the intervals, and within 1.645 standard deviations.

    Args:
        draw: the number of the simulated table.
        rows: the number of fit rows.
        latents: the number of strong latents; None for a covariance without them. PCA has as many latents, or the
            default of `elbo train`.
        share: the share of the values that are taken out.
    """
    random = np.random.default_rng([draw, rows])
    causes = SIMULATED_WIDTH if latents is None else latents
    strengths = np.linspace(1.0, 0.15, causes) if latents is None else np.ones(causes)
    x = random.standard_normal((rows + NEW_ROWS, causes)) @ (
        strengths[:, None] * random.standard_normal((causes, SIMULATED_WIDTH))
    )
    x += (0.0 if latents is None else 0.3) * random.standard_normal(x.shape)
    fit, test = torch.from_numpy(x[:rows]).float(), torch.from_numpy(x[rows:]).float()
    scaling = standardise(fit)
    u = scaling(fit)
    shares = (spectrum(u) / spectrum(u).sum()).tolist()
    core = fit_pca(u, latents or default_table_latents("pca", shares, rows, SIMULATED_WIDTH))
    prior, calibration = gaussian_prior(torch.ones(len(core.eigenvalues))), Calibration(torch.zeros(1))
    observation = no_observation_noise(SIMULATED_WIDTH)
    model = CompletingPCA(scaling, core.float(), prior, calibration, None, observation, fit_rows=rows)
    taken = torch.from_numpy(random.uniform(size=test.shape) < share)
    taken[taken.all(dim=1), 0] = False
    mean, deviation, low, high = model.impute(torch.where(taken, torch.nan, test))
    inside = ((low <= test) & (test <= high))[taken].double().mean()
    narrow = ((test - mean).abs() <= NORMAL_END * deviation)[taken].double().mean()
    return float(inside), float(narrow)


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
