"""Choose between variants of the anomaly scores, and judge the choice by leaving sets out.

    python benchmarks/anomaly/score_variants.py            # the 19 data sets of ADBench, one seed
    python benchmarks/anomaly/score_variants.py --wide     # networks with twice as many latents as features
    python benchmarks/anomaly/score_variants.py --smoke    # small data sets, few epochs

Every variant is measured with the same networks, which are trained as `elbo train --calibration split` trains them. The
variants differ only in the statistics of the score:

- `pca`: the covariance of all fit rows (as now), of the three quarters that are most alike (as with --robust), with the
  weights of a multivariate t distribution of 3 degrees of freedom (Lange, Little & Taylor 1989), or the mean precision
  of 8 random subsets;
- `ae` and `ensemble`: the rows from which the covariance of latents and residuals is estimated, and the variance that
  is added to the latents. `both` adds the distances of the two estimates, each divided by its mean.

The mean over the data sets on which a variant was chosen is optimistic. The line "chosen on the other sets" shows, for
each data set, the variant with the highest mean of AUROC + AP over all other data sets.
"""

import argparse
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.anomaly.datasets import LabelledSplit, labelled_splits
from benchmarks.anomaly.score_ranking import Figures, measure, nearest_neighbours
from benchmarks.data import describe_machine
from models.autoencoder import Autoencoder
from models.whitening import Whitening
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Table, split_rows
from training.fitting.pipeline import fit_pipeline
from training.fitting.prepared_data import prepare_data
from training.fitting.score_statistics import fit_neighbours
from training.fitting.whitening import fit_whitening
from training.progress import SilentReporter

MAX_TRAIN, MAX_TEST = 1_000, 4_000  # rows; the others are left out
DEGREES, STEPS = 3.0, 8  # degrees of freedom of the t distribution, and steps of its fit
SUBSETS = 8
NOISES = (0.3, 1.0, 4.0)  # variance that is added to each latent, relative to its own; 1 is LATENT_NOISE
NOW = {"pca": "now", "ae": "held-out, 1", "ensemble": "held-out, 1"}

Doubles = npt.NDArray[np.float64]
Distance = Callable[[Tensor], Doubles]
ByVariant = dict[str, Figures]


def heavy_tailed(x: Tensor, usual: Tensor) -> Whitening:
    """Return the whitening of rows x [N, D] that are weighted as rows of a multivariate t distribution."""
    mean, weights = x.mean(dim=0), torch.ones(len(x), dtype=x.dtype)
    for _ in range(STEPS):
        whitening = fit_whitening(mean + (x - mean) * (weights / weights.mean()).sqrt().unsqueeze(1), usual)
        whitening = Whitening(mean, whitening.factor)
        weights = (DEGREES + x.shape[1]) / (DEGREES + whitening.distance(x))
        mean = (weights.unsqueeze(1) * x).sum(dim=0) / weights.sum()
    return whitening


def mean_of_subsets(x: Tensor, usual: Tensor, size: int) -> Distance:
    """Return the mean of the distances under the covariances of SUBSETS random subsets of `size` rows of x [N, D]."""
    random = np.random.RandomState(0)
    subsets = [x[torch.from_numpy(random.permutation(len(x))[:size])] for _ in range(SUBSETS)]
    whitenings = [fit_whitening(subset, usual) for subset in (subsets if len(x) > size else [x])]
    return lambda rows: np.mean([whitening.distance(rows).numpy() for whitening in whitenings], axis=0)


def pca_variants(fit: Tensor, test: Tensor, split: LabelledSplit) -> ByVariant:
    """Return the figures of each variant of the score of PCA, fitted to rows fit [N, D] in model units."""
    usual = torch.tensor(1.0, dtype=torch.float64)
    distances: dict[str, Distance] = {
        "now": lambda rows: fit_whitening(fit, usual).distance(rows).numpy(),
        "three quarters": lambda rows: fit_whitening(fit, usual, robust=True).distance(rows).numpy(),
        "t, 3 degrees": lambda rows: heavy_tailed(fit, usual).distance(rows).numpy(),
        "subsets of 64": mean_of_subsets(fit, usual, 64),
        "subsets of 256": mean_of_subsets(fit, usual, 256),
    }
    return {name: measure(split, distance(test)) for name, distance in distances.items()}


def network_variants(
    core: Autoencoder, fit: Tensor, held_out: Tensor, test: Tensor, split: LabelledSplit
) -> tuple[ByVariant, ByVariant]:
    """Return the figures of each variant of the scores of the autoencoder and of the ensemble."""
    neighbours = fit_neighbours(fit)
    far, usual_far = neighbours(test).double().numpy(), float(neighbours(held_out).mean())
    by_rows = {"held-out": held_out, "fit and held-out": torch.cat((fit, held_out))}
    networks, ensembles = {}, {}
    for noise in NOISES:
        scaled = []
        for name, rows in by_rows.items():
            whitening = joint_whitening(core, rows, noise)
            usual = float(whitening.distance(joint(core, held_out)).mean())
            scaled.append((f"{name}, {noise:g}", whitening.distance(joint(core, test)).numpy() / usual))
        scaled.append((f"both, {noise:g}", (scaled[0][1] + scaled[1][1]) / 2))
        for name, distance in scaled:
            networks[name] = measure(split, distance)
            ensembles[name] = measure(split, np.sqrt(1 + distance) + np.sqrt(1 + far / usual_far))
    return networks, ensembles


def joint(core: Autoencoder, rows: Tensor) -> Tensor:
    """Return the latents and the residuals of rows [N, D], [N, K + D]."""
    with torch.no_grad():
        code = core.encode(rows)[0]
        return torch.cat((code, rows - core.decode(code)), dim=1).double()


def joint_whitening(core: Autoencoder, rows: Tensor, noise: float) -> Whitening:
    """Return the whitening of latents and residuals of rows [N, D], with `noise` added to the latents."""
    vectors, latents = joint(core, rows), core.latents
    squares = vectors[:, latents:].square().sum(dim=1)
    vectors = vectors[squares <= 100 * squares.quantile(0.9)]  # as `_without_outliers` of the score statistics
    expected = torch.ones(vectors.shape[1], dtype=torch.float64)
    expected[:latents] = vectors[:, :latents].var(dim=0, correction=0).mean().clamp(min=1e-12)
    added = torch.zeros_like(expected)
    added[:latents] = noise
    return fit_whitening(vectors, expected, noise=added)


def measure_split(split: LabelledSplit, seed: int, *, wide: bool, smoke: bool) -> dict[str, ByVariant]:
    """Return the figures of each variant on one data set, by kind."""
    random = np.random.RandomState(seed)
    x = split.train[random.permutation(len(split.train))[:MAX_TRAIN]].astype(np.float32)
    kept = np.sort(random.permutation(len(split.test))[:MAX_TEST])
    split = LabelledSplit(split.name, seed, x.astype(np.float64), split.test[kept], split.labels[kept])
    names, missing = [f"x{i}" for i in range(x.shape[1])], np.zeros(x.shape[1], np.int64)
    table = Table(RowStore(x), (x.shape[1],), names, [None] * x.shape[1], None, None, "rows", missing=missing)
    options = {"latents": 2 * x.shape[1] if wide else None, "epochs": 3 if smoke else None}
    config = TrainConfig.model_validate({"model": "ae", "name": "ae", "seed": seed, "calibration": "split", **options})
    rows = split_rows(len(x), seed, x.shape[1])
    pipeline = fit_pipeline(config, prepare_data(table, rows), SilentReporter(), for_scores=True)
    core = pipeline.core
    assert isinstance(core, Autoencoder)
    u = pipeline.scaling(torch.from_numpy(x))
    test = pipeline.scaling(torch.from_numpy(split.test.astype(np.float32)))
    fit, held_out = u[torch.from_numpy(rows.fit)], u[torch.from_numpy(rows.held_out)]
    network, ensemble = network_variants(core, fit, held_out, test, split)
    baseline = {"kNN": measure(split, nearest_neighbours(split))}
    return {"pca": pca_variants(fit.double(), test.double(), split), "ae": network, "ensemble": ensemble} | {
        "kNN": baseline
    }


def leave_sets_out(figures: Doubles) -> npt.NDArray[np.int64]:
    """Return, for each data set, the variant with the highest mean of AUROC + AP over the other data sets.

    Args:
        figures: AUROC and AP, [data sets, variants, 2].
    """
    totals = figures.sum(axis=2)
    return np.asarray((totals.sum(axis=0) - totals).argmax(axis=1))


def print_kind(kind: str, results: dict[str, dict[str, ByVariant]]) -> None:
    """Print the means of each variant of `kind`, its worst change, and the figures of the leave-sets-out choice."""
    variants = list(next(iter(results.values()))[kind])
    figures = np.array([[by[kind][variant] for variant in variants] for by in results.values()])
    now = figures[:, variants.index(NOW[kind])]
    sets = list(results)
    print(
        f"\n{kind}:\n\n| variant | AUROC | AP | largest gain in AUROC | largest loss in AUROC |\n|---|---|---|---|---|"
    )
    for index, variant in enumerate(variants):
        change = figures[:, index, 0] - now[:, 0]
        auroc, precision = figures[:, index].mean(axis=0)
        best, worst = int(change.argmax()), int(change.argmin())
        cells = f"{change[best]:+.1f} ({sets[best]}) | {change[worst]:+.1f} ({sets[worst]})" if change.any() else " | "
        print(f"| {variant} | {auroc:.2f} | {precision:.2f} | {cells} |")
    chosen = leave_sets_out(figures)
    auroc, precision = figures[np.arange(len(sets)), chosen].mean(axis=0)
    print(f"| chosen on the other sets | {auroc:.2f} | {precision:.2f} | | |")
    counts = {variant: int((chosen == index).sum()) for index, variant in enumerate(variants)}
    print("\nChosen: " + ", ".join(f"{variant} ({count} sets)" for variant, count in counts.items() if count) + ".")


def main() -> None:
    """Measure all variants on all data sets, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small data sets, few epochs")
    parser.add_argument("--sets", help="names of data sets, separated by commas (default all)")
    parser.add_argument("--wide", action="store_true", help="twice as many latents as features")
    parser.add_argument("--seed", type=int, default=0, help="seed of the splits and of the networks (default 0)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine("torch", "scikit-learn"), end="\n\n", flush=True)
    results: dict[str, dict[str, ByVariant]] = {}
    print("| data set | pca | ae | ensemble | kNN |\n|---|---|---|---|---|")
    for split in labelled_splits(range(options.seed, options.seed + 1), bundled=options.smoke):
        if options.sets and split.name not in options.sets.split(","):
            continue
        found = results[split.name] = measure_split(split, options.seed, wide=options.wide, smoke=options.smoke)
        today = [found[kind][variant] for kind, variant in (*NOW.items(), ("kNN", "kNN"))]
        print(f"| {split.name} | {' | '.join('{:.1f} / {:.1f}'.format(*each) for each in today)} |", flush=True)
    for kind in NOW:
        print_kind(kind, results)


if __name__ == "__main__":
    main()
