"""Whether alarms keep to alpha: false alarms on fresh normal rows, and the false discovery rate, by kind of model.

On the 19 sets of ADBench, one-class protocol: half of the normal rows train (`elbo train` deals them out into rows that
fit, that are held out and that calibrate), the other half are fresh. A row is flagged where its severity exceeds 1.
Beside it stands what theory expects of so many calibration rows, floor(alpha (n + 1)) / (n + 1), and the habit of other
libraries: a threshold at the 1 - alpha quantile of the scores of the very rows that were fitted. FDR: the mean share of
normal rows among those that Benjamini-Hochberg calls anomalous at q, over batches of test rows of which a tenth is
anomalous. Prints Markdown. Without ELBO_DATA it runs on bundled sets; `--smoke` is short.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.anomaly.one_class import KINDS, OneClass, adbench, fitted
from benchmarks.data import describe_machine
from service.anomaly.verdicts import benjamini_hochberg

ALPHAS = (0.10, 0.05, 0.01)
Q = 0.1
BATCHES, BATCH_ROWS, BATCH_ANOMALIES = 200, 100, 10

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rates:
    """Of one model on one set, one seed."""

    conformal: Doubles  # [3], share of fresh normal rows flagged at each of ALPHAS
    habit: Doubles  # [3], the same with a threshold from the scores of the fitted rows
    false_discovery: float  # mean over batches
    found: float  # share of the anomalies in those batches that were called so
    calibration: int  # rows


def measured(kind: str, data: OneClass, seed: int, few: bool) -> Rates:
    """Train, and count."""
    pipeline, rows = fitted(kind, data, seed, few)
    with torch.no_grad():
        score = pipeline.score(torch.from_numpy(data.test))[0]
        fit_score = pipeline.score(torch.from_numpy(data.train[rows.fit]))[0].numpy()
        p_value = pipeline.p_value(score).numpy()
        severity = np.array([pipeline.severity(score, alpha).numpy() for alpha in ALPHAS])
    normal = data.labels == 0
    habit = [(score.numpy()[normal] > np.quantile(fit_score, 1 - alpha)).mean() for alpha in ALPHAS]
    shares = np.array(list(_batches(p_value, normal, seed))).mean(axis=0)
    conformal = (severity[:, normal] > 1).mean(axis=1)
    return Rates(conformal, np.array(habit), shares[0], shares[1], len(rows.calibration))


def _batches(
    p_value: npt.NDArray[np.float32], normal: npt.NDArray[np.bool_], seed: int
) -> Iterator[tuple[float, float]]:
    """False discovery proportion and share of anomalies found, in batches drawn from the test rows."""
    random = np.random.RandomState(seed)
    for _ in range(BATCHES):
        good = random.choice(np.flatnonzero(normal), BATCH_ROWS - BATCH_ANOMALIES)
        bad = random.choice(np.flatnonzero(~normal), BATCH_ANOMALIES)
        called = benjamini_hochberg(p_value[np.concatenate((good, bad))], Q)
        wrong = called[: len(good)].sum()
        yield wrong / max(1, called.sum()), (called.sum() - wrong) / BATCH_ANOMALIES


def summary(kind: str, by_set: dict[str, list[Rates]]) -> Iterator[str]:
    """A line for each alpha: the mean over the sets, its standard error, and the worst of them (means over seeds)."""
    every = np.array([[r.conformal for r in rates] for rates in by_set.values()])  # [S, seeds, 3]
    conformal, by_seed = every.mean(axis=1), every.mean(axis=0)  # [S, 3], [seeds, 3]
    habit = np.array([np.mean([r.habit for r in rates], axis=0) for rates in by_set.values()])
    sizes = np.array([r.calibration + 1 for rates in by_set.values() for r in rates])
    for i, alpha in enumerate(ALPHAS):
        theory = f"{(np.floor(alpha * sizes + 1e-6) / sizes).mean():.4f}"
        error = f"{by_seed[:, i].std(ddof=1) / len(by_seed) ** 0.5:.4f}" if len(by_seed) > 1 else "one seed"
        means = f"{conformal[:, i].mean():.4f} | {error} | {conformal[:, i].max():.3f}"
        yield f"| {kind} | {alpha:.2f} | {theory} | {means} | {habit[:, i].mean():.3f} | {habit[:, i].max():.3f} |"


def discovery(kind: str, by_set: dict[str, list[Rates]]) -> str:
    """The line of the false discovery rate."""
    every = [r for rates in by_set.values() for r in rates]
    false, found = (np.mean([getattr(r, name) for r in every]) for name in ("false_discovery", "found"))
    return f"| {kind} | {Q} | {Q * (1 - BATCH_ANOMALIES / BATCH_ROWS):.3f} | {false:.4f} | {found:.3f} |"


def by_set_line(name: str, kinds: dict[str, dict[str, list[Rates]]]) -> str:
    """A set's false alarms at the middle alpha by kind, and the rows that calibrate."""
    figures = (f"{np.mean([r.conformal[1] for r in by_set[name]]):.3f}" for by_set in kinds.values())
    rows = next(iter(kinds.values()))[name][0].calibration
    return f"| {name} | {rows} | {1 / (rows + 1):.4f} | {' | '.join(figures)} |"


def main() -> None:
    """Train every kind on every set, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few sets, few epochs, one seed")
    parser.add_argument("--seeds", type=int, default=10, help="one alone scatters by half of what is aimed at")
    parser.add_argument("--kinds", default=",".join(KINDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds: dict[str, dict[str, list[Rates]]] = {kind: {} for kind in options.kinds.split(",")}
    for seed in range(1 if options.smoke else options.seeds):
        for data in adbench(seed, options.smoke):
            for kind, by_set in kinds.items():
                by_set.setdefault(data.name, []).append(measured(kind, data, seed, options.smoke))
    print(describe_machine("torch"), end="\n\n")
    print("False alarms on fresh normal rows; mean over the sets, its standard error over seeds, and the worst set:\n")
    print("| kind | alpha | theory | Elbo | ± | worst set | threshold from the fitted rows' scores | worst set |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, by_set in kinds.items():
        print("\n".join(summary(kind, by_set)))
    print("\nFalse discovery rate of `fdr`, and the share of the anomalies that it finds:\n")
    print("| kind | q | q × share of normal rows | FDR | found |")
    print("|---|---|---|---|---|")
    for kind, by_set in kinds.items():
        print(discovery(kind, by_set))
    print(f"\nEach set, false alarms at alpha {ALPHAS[1]}:\n")
    print(f"| set | calibration rows | floor | {' | '.join(kinds)} |")
    print(f"|---|---|---|{'---|' * len(kinds)}")
    for name in next(iter(kinds.values())):
        print(by_set_line(name, kinds))


if __name__ == "__main__":
    main()
