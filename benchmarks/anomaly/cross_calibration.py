"""Compare --calibration split and cross on small tables: rate of false alarms, and ranking of anomalies.

    python benchmarks/anomaly/cross_calibration.py                         # pca: 200 draws, 10 seeds
    python benchmarks/anomaly/cross_calibration.py --kinds ae --draws 20 --seeds 3
    python benchmarks/anomaly/cross_calibration.py --sizes --curve         # pca: what more fit rows would give
    python benchmarks/anomaly/cross_calibration.py --smoke                 # few draws, few epochs

The first table is about simulated tables. Each draw has new training rows, a new seed of the split, and 2,000 new rows
of the same distribution. A row has WIDTH features that depend on three causes, plus noise. The rate of false alarms is
the share of the new rows whose p-value is at most alpha. The columns "exact" show the rate to expect of a model that
has seen none of its n calibration rows: floor(alpha (n + 1)) / (n + 1).

The second table is about the data sets of ADBench with fewer than MAX_ROWS rows: AUROC and average precision of the
published model, and the rate of false alarms on the normal test rows. `datasets.py` describes the splits. Without
ADBench's files, the data sets are those of scikit-learn.

With --curve, the second table shows instead the AUROC of models that were fitted to a share of the training rows. A
split leaves 70 % of the rows to the fit, and no calibration leaves more than 100 %. The last column is the gain from
the first to the second, with its standard error.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks.anomaly.datasets import labelled_splits
from benchmarks.anomaly.one_class import KINDS
from benchmarks.data import describe_machine
from models.pipeline import Pipeline
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Table, split_rows
from training.fitting.cross_calibration import fit_and_calibrate
from training.fitting.pipeline import fit_pipeline
from training.fitting.prepared_data import prepare_data
from training.fitting.windows import prepare
from training.progress import SilentReporter

ALPHAS = (0.1, 0.05)
METHODS = ("split", "cross")
SIZES = (60, 100, 200, 500)  # training rows of the simulated tables
WIDTH, CAUSES, NOISE = 10, 3, 0.3
NEW_ROWS = 2_000
MAX_ROWS = 500  # training and test rows together
FIT_SHARE = 0.7  # share of the training rows that a split leaves to the fit
SHARES = (0.35, 0.5, FIT_SHARE, 0.9, 1.0)  # of the learning curve
MIN_FIT_ROWS = 8
TARGET = 0.01  # largest difference between the mean rate and alpha

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trial:
    """The results of one model.

    Args:
        rates: rate of false alarms at each of ALPHAS, [2].
        exact: the rates to expect if the model has seen none of its calibration rows, [2].
        auroc: AUROC in percent; NaN if the new rows have no anomalies.
        precision: average precision in percent; NaN if the new rows have no anomalies.
    """

    rates: Doubles
    exact: Doubles
    auroc: float = np.nan
    precision: float = np.nan


def _table(x: Floats) -> Table:
    width = x.shape[1]
    names, missing = [f"x{i}" for i in range(width)], np.zeros(width, np.int64)
    return Table(RowStore(x), (width,), names, [None] * width, None, None, "rows", missing=missing)


def train_model(kind: str, method: str, x: Floats, seed: int, smoke: bool) -> Pipeline:
    """Return the model that `elbo train --calibration <method>` publishes for rows x [N, D]."""
    table = _table(x)
    options = {"model": kind, "name": "bench", "seed": seed, "calibration": method}
    config = TrainConfig.model_validate(options | ({"epochs": 3} if smoke else {}))
    return fit_and_calibrate(config, prepare(config, table)[0], SilentReporter())


def measure(pipeline: Pipeline, x: Floats, labels: npt.NDArray[np.int64]) -> Trial:
    """Measure `pipeline` on rows x [M, D] that it has not seen. Labels [M] are 1 for anomalies."""
    with torch.no_grad():
        scores = pipeline.score(torch.from_numpy(x))[0]
        p_values = pipeline.p_value(scores).double().numpy()
    alphas, rows = np.array(ALPHAS), len(pipeline.calibration.scores)
    rates = (p_values[labels == 0, None] <= alphas + 1e-6).mean(axis=0)
    exact = np.floor(alphas * (rows + 1) + 1e-6) / (rows + 1)
    if not labels.any():
        return Trial(rates, exact)
    ranking = roc_auc_score(labels, scores), average_precision_score(labels, scores)
    return Trial(rates, exact, 100 * ranking[0], 100 * ranking[1])


def simulate(rows: int, draw: int) -> tuple[Floats, Floats]:
    """Return `rows` training rows and NEW_ROWS new rows of one random distribution."""
    random = np.random.default_rng([draw, rows])
    loadings = random.standard_normal((CAUSES, WIDTH))
    causes = random.standard_normal((rows + NEW_ROWS, CAUSES))
    x = causes @ loadings + NOISE * random.standard_normal((rows + NEW_ROWS, WIDTH))
    return x[:rows].astype(np.float32), x[rows:].astype(np.float32)


def simulated_row(kind: str, method: str, rows: int, draws: int, smoke: bool) -> str:
    """Return a line of the first table: the means over `draws` simulated tables with `rows` training rows each."""
    trials = []
    for draw in range(draws):
        x, new = simulate(rows, draw)
        pipeline = train_model(kind, method, x, draw, smoke)
        trials.append(measure(pipeline, new, np.zeros(len(new), np.int64)))
    rates = np.array([trial.rates for trial in trials])  # [draws, 2]
    errors = rates.std(axis=0, ddof=1) / len(rates) ** 0.5
    cells = []
    for alpha, exact, rate, error in zip(ALPHAS, trials[0].exact, rates.mean(axis=0), errors, strict=True):
        verdict = "" if abs(rate - alpha) <= TARGET else " (off)"
        cells.append(f"{exact:.3f} | {rate:.4f} ± {error:.4f}{verdict}")
    return f"| {kind} | {method} | {rows} | {' | '.join(cells)} |"


def data_set_rows(kind: str, seeds: int, smoke: bool) -> Iterator[str]:
    """Yield a line of the second table for each data set, and then a line with the means over all data sets."""
    trials: dict[str, dict[str, list[Trial]]] = {}
    for split in labelled_splits(range(seeds), bundled=smoke):
        if len(split.train) + len(split.test) >= MAX_ROWS:
            continue
        for method in METHODS:
            pipeline = train_model(kind, method, split.train.astype(np.float32), split.seed, smoke)
            found = measure(pipeline, split.test.astype(np.float32), split.labels)
            trials.setdefault(split.name, {}).setdefault(method, []).append(found)
    for name, by_method in trials.items():
        yield _ranking_row(f"{kind} | {name}", by_method)
    every = {method: [each for by in trials.values() for each in by[method]] for method in METHODS}
    yield _ranking_row(f"{kind} | mean", every)


def learning_curve(kind: str, seeds: int, smoke: bool) -> Iterator[str]:
    """Yield a line for each data set: the AUROC of models of `kind` that were fitted to SHARES of the training rows."""
    found: dict[str, list[list[float]]] = {}
    for split in labelled_splits(range(seeds), bundled=smoke):
        if len(split.train) + len(split.test) >= MAX_ROWS:
            continue
        x, test = split.train.astype(np.float32), torch.from_numpy(split.test.astype(np.float32))
        order = np.random.RandomState(split.seed).permutation(len(x))
        options = {"model": kind, "name": "bench", "seed": split.seed} | ({"epochs": 3} if smoke else {})
        config, table = TrainConfig.model_validate(options), _table(x)
        rows, areas = split_rows(len(x), split.seed, x.shape[1]), []
        for share in SHARES:
            chosen = replace(rows, fit=np.sort(order[: max(MIN_FIT_ROWS, round(share * len(x)))]))
            pipeline = fit_pipeline(config, prepare_data(table, chosen), SilentReporter(), for_scores=True)
            with torch.no_grad():
                areas.append(100 * roc_auc_score(split.labels, pipeline.score(test)[0]))
        found.setdefault(split.name, []).append(areas)
    for name, by_seed in found.items():
        means, gains = np.mean(by_seed, axis=0), [areas[-1] - areas[SHARES.index(FIT_SHARE)] for areas in by_seed]
        error = np.std(gains, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else np.nan
        cells = " | ".join(f"{mean:.1f}" for mean in means)
        yield f"| {kind} | {name} | {cells} | {np.mean(gains):+.1f} ± {error:.1f} |"


def _ranking_row(title: str, by_method: dict[str, list[Trial]]) -> str:
    cells = []
    for trials in by_method.values():
        auroc, precision = np.mean([(trial.auroc, trial.precision) for trial in trials], axis=0)
        rates = np.mean([trial.rates for trial in trials], axis=0)
        cells.append(f"{auroc:.1f} / {precision:.1f} | {', '.join(f'{rate:.3f}' for rate in rates)}")
    gains = [cross.auroc - split.auroc for split, cross in zip(by_method["split"], by_method["cross"], strict=True)]
    error = np.std(gains, ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else np.nan
    return f"| {title} | {' | '.join(cells)} | {np.mean(gains):+.1f} ± {error:.1f} |"


def main() -> None:
    """Train all models, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few draws, few epochs, few sizes")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["pca"], help="kinds of models (default pca)")
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES, help="rows of the simulated tables")
    parser.add_argument("--draws", type=int, default=200, help="simulated tables per size (default 200)")
    parser.add_argument("--seeds", type=int, default=10, help="splits of each data set (default 10; 0 for none)")
    parser.add_argument("--curve", action="store_true", help="show the AUROC by the share of the rows that fit")
    options = parser.parse_args()
    torch.set_num_threads(1)
    smoke, kinds = options.smoke, KINDS if options.smoke else options.kinds
    sizes, draws = (SIZES[:1], 2) if smoke else (options.sizes, options.draws)
    print(describe_machine("torch", "scikit-learn"), end="\n\n", flush=True)
    heads = " | ".join(f"exact at {alpha} | rate at {alpha}" for alpha in ALPHAS)
    print(f"Simulated tables of {WIDTH} features, {draws} draws:\n\n| kind | calibration | rows | {heads} |")
    print("|---|---|---|---|---|---|---|")
    for kind in kinds:
        for rows in sizes:
            for method in METHODS:
                print(simulated_row(kind, method, rows, draws, smoke), flush=True)
    seeds = 1 if smoke else options.seeds
    if not seeds:
        return
    if options.curve:
        heads = " | ".join(f"{100 * share:.0f} %" for share in SHARES)
        print(
            f"\nAUROC by the share of the training rows that fit, {seeds} seeds:\n\n"
            f"| kind | data set | {heads} | gain |"
        )
        print(f"|---|---|{'---|' * len(SHARES)}---|")
        for kind in kinds:
            for line in learning_curve(kind, seeds, smoke):
                print(line, flush=True)
        return
    heads = " | ".join(f"{method}: AUROC / AP | rate at {', '.join(map(str, ALPHAS))}" for method in METHODS)
    print(f"\nData sets with fewer than {MAX_ROWS} rows, {seeds} seeds:\n\n| kind | data set | {heads} | gain |")
    print("|---|---|---|---|---|---|---|")
    for kind in kinds:
        for line in data_set_rows(kind, seeds, smoke):
            print(line, flush=True)


if __name__ == "__main__":
    main()
