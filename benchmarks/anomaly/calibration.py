"""Measure the false-alarm rate and the false discovery rate of Elbo's models on ADBench.

    python benchmarks/anomaly/calibration.py
    python benchmarks/anomaly/calibration.py --smoke    # few data sets, few epochs, one seed

Half of the normal rows of each data set are training rows. The training rows are split into fit, held-out and
calibration rows, as in `elbo train`. The other half of the normal rows are new normal rows. A row is flagged if its
severity exceeds 1.

The false-alarm rate is the share of new normal rows that are flagged at alpha. The tables compare this rate with two
other rates:

- the rate that n calibration rows give in theory: floor(alpha (n + 1)) / (n + 1);
- the rate of a method that is common in other libraries: a threshold at the quantile 1 minus alpha of the fit rows'
  scores.

The false discovery rate (FDR) is measured on batches of test rows. In each batch, 10 % of the rows are anomalies. The
Benjamini-Hochberg procedure at level q calls some rows of a batch anomalous. The FDR is the share of normal rows among
these rows, averaged over the batches.

Without ADBench's files the benchmark uses data sets of scikit-learn. It prints Markdown tables.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.anomaly.one_class import KINDS, OneClass, adbench, train_model
from benchmarks.data import describe_machine
from service.anomaly.verdicts import benjamini_hochberg

ALPHAS = (0.10, 0.05, 0.01)
Q = 0.1
BATCHES, BATCH_ROWS, BATCH_ANOMALIES = 200, 100, 10

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rates:
    """The rates of one model on one data set with one seed.

    Args:
        conformal: share of new normal rows that Elbo flags, per alpha in ALPHAS, [3].
        fit_quantile: share of new normal rows that score above the threshold from the fit rows, per alpha, [3].
        false_discovery: share of normal rows among the rows that are called anomalous, averaged over batches.
        found: share of the anomalies that are called anomalous, averaged over batches.
        calibration_rows: number of calibration rows.
    """

    conformal: Doubles
    fit_quantile: Doubles
    false_discovery: float
    found: float
    calibration_rows: int


def measure_rates(kind: str, data: OneClass, seed: int, smoke: bool) -> Rates:
    """Train a model of `kind` and measure its rates."""
    pipeline, rows = train_model(kind, data, seed, smoke)
    with torch.no_grad():
        score = pipeline.score(torch.from_numpy(data.test))[0]
        fit_score = pipeline.score(torch.from_numpy(data.train[rows.fit]))[0].numpy()
        p_value = pipeline.p_value(score).numpy()
        severity = np.array([pipeline.severity(score, alpha).numpy() for alpha in ALPHAS])
    normal = data.labels == 0
    fit_quantile = [(score.numpy()[normal] > np.quantile(fit_score, 1 - alpha)).mean() for alpha in ALPHAS]
    false_discovery, found = np.array(list(_discoveries(p_value, normal, seed))).mean(axis=0)
    return Rates(
        conformal=(severity[:, normal] > 1).mean(axis=1),
        fit_quantile=np.array(fit_quantile),
        false_discovery=false_discovery,
        found=found,
        calibration_rows=len(rows.calibration),
    )


def _discoveries(
    p_value: npt.NDArray[np.float32], normal: npt.NDArray[np.bool_], seed: int
) -> Iterator[tuple[float, float]]:
    """Draw random batches of test rows. Yield two shares per batch.

    The first is the share of normal rows among the discoveries. The second is the share of the anomalies that are
    found.
    """
    random = np.random.RandomState(seed)
    for _ in range(BATCHES):
        normal_rows = random.choice(np.flatnonzero(normal), BATCH_ROWS - BATCH_ANOMALIES)
        anomalies = random.choice(np.flatnonzero(~normal), BATCH_ANOMALIES)
        discovered = benjamini_hochberg(p_value[np.concatenate((normal_rows, anomalies))], Q)
        wrong = discovered[: len(normal_rows)].sum()
        yield wrong / max(1, discovered.sum()), (discovered.sum() - wrong) / BATCH_ANOMALIES


def false_alarm_rows(kind: str, by_set: dict[str, list[Rates]]) -> Iterator[str]:
    """Yield one table row per alpha. `by_set` maps each data set to its rates, one entry per seed."""
    rates_array = np.array([[r.conformal for r in rates] for rates in by_set.values()])  # [S, seeds, 3]
    conformal, by_seed = rates_array.mean(axis=1), rates_array.mean(axis=0)  # [S, 3], [seeds, 3]
    fit_quantile = np.array([np.mean([r.fit_quantile for r in rates], axis=0) for rates in by_set.values()])  # [S, 3]
    sizes = np.array([r.calibration_rows + 1 for rates in by_set.values() for r in rates])
    for i, alpha in enumerate(ALPHAS):
        theory = f"{(np.floor(alpha * sizes + 1e-6) / sizes).mean():.4f}"
        error = f"{by_seed[:, i].std(ddof=1) / len(by_seed) ** 0.5:.4f}" if len(by_seed) > 1 else "one seed"
        means = f"{conformal[:, i].mean():.4f} | {error} | {conformal[:, i].max():.3f}"
        other = f"{fit_quantile[:, i].mean():.3f} | {fit_quantile[:, i].max():.3f}"
        yield f"| {kind} | {alpha:.2f} | {theory} | {means} | {other} |"


def discovery_row(kind: str, by_set: dict[str, list[Rates]]) -> str:
    """Return the row of `kind` in the table of false discovery rates."""
    all_rates = [r for rates in by_set.values() for r in rates]
    false_discovery = np.mean([r.false_discovery for r in all_rates])
    found = np.mean([r.found for r in all_rates])
    bound = Q * (1 - BATCH_ANOMALIES / BATCH_ROWS)
    return f"| {kind} | {Q} | {bound:.3f} | {false_discovery:.4f} | {found:.3f} |"


def data_set_row(name: str, kinds: dict[str, dict[str, list[Rates]]]) -> str:
    """Return the table row of a data set.

    The row shows the number n of calibration rows, the smallest possible p-value, which is 1 / (n + 1), and the
    false-alarm rate of each kind at the second of ALPHAS.
    """
    figures = (f"{np.mean([r.conformal[1] for r in by_set[name]]):.3f}" for by_set in kinds.values())
    rows = next(iter(kinds.values()))[name][0].calibration_rows
    return f"| {name} | {rows} | {1 / (rows + 1):.4f} | {' | '.join(figures)} |"


def main() -> None:
    """Train all kinds on all data sets, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few data sets, few epochs, one seed")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (default 10)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of models, comma-separated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds: dict[str, dict[str, list[Rates]]] = {kind: {} for kind in options.kinds.split(",")}
    for seed in range(1 if options.smoke else options.seeds):
        for data in adbench(seed, options.smoke):
            for kind, by_set in kinds.items():
                by_set.setdefault(data.name, []).append(measure_rates(kind, data, seed, options.smoke))
    print(describe_machine("torch"), end="\n\n")
    print("False-alarm rate on new normal rows: mean over data sets, its standard error over seeds, and the largest:\n")
    print("| kind | alpha | expected | Elbo | ± | largest | threshold from scores of fit rows | largest |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, by_set in kinds.items():
        print("\n".join(false_alarm_rows(kind, by_set)))
    print("\nFalse discovery rate with the option `fdr`, and the share of anomalies found:\n")
    print("| kind | q | q × share of normal rows | FDR | found |")
    print("|---|---|---|---|---|")
    for kind, by_set in kinds.items():
        print(discovery_row(kind, by_set))
    print(f"\nFalse-alarm rate per data set at alpha {ALPHAS[1]}:\n")
    print(f"| data set | calibration rows | floor | {' | '.join(kinds)} |")
    print(f"|---|---|---|{'---|' * len(kinds)}")
    for name in next(iter(kinds.values())):
        print(data_set_row(name, kinds))


if __name__ == "__main__":
    main()
