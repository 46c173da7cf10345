"""The sets that anomaly scores are compared on, split as the one-class protocol says.

`RandomState(seed)` cuts a set to 10,000 rows, deals half of the normal rows out to train, and leaves the rest and every
anomaly to test; all is standardised on the training half. ADBench's sets where ELBO_DATA (or ../shared/data) has
adbench/*.npz (X, y: 1 is an anomaly); else scikit-learn's, of which one class is normal.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.data import DATA

MOST_ROWS = 10_000
ANOMALIES = 0.1  # share of the normal rows, in scikit-learn's sets

Rows = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Contest:
    """Rows to learn from [N, D], rows to judge [M, D], and which of these are anomalies, 1, or normal, 0: [M]."""

    name: str
    seed: int
    train: Rows
    test: Rows
    labels: Labels


def contests(seeds: range, bundled: bool = False, contaminated: bool = False) -> Iterator[Contest]:
    """Every set with the first seed, then with the next.

    Args:
        bundled: scikit-learn's sets, whatever else there is.
        contaminated: all rows, anomalies included, are learnt from, and all are judged.
    """
    sets = _bundled() if bundled else _sets()
    for seed in seeds:
        for name, (x, labels) in sets.items():
            yield _contest(name, seed, x, labels, contaminated)


def _contest(name: str, seed: int, x: Rows, labels: Labels, contaminated: bool) -> Contest:
    random = np.random.RandomState(seed)
    if len(x) > MOST_ROWS:
        chosen = random.permutation(len(x))[:MOST_ROWS]
        x, labels = x[chosen], labels[chosen]
    normal = random.permutation(np.flatnonzero(labels == 0))
    half = len(normal) // 2
    train = np.arange(len(x)) if contaminated else normal[:half]
    test = train if contaminated else np.concatenate((normal[half:], np.flatnonzero(labels == 1)))
    mean, deviation = x[train].mean(axis=0), x[train].std(axis=0)
    deviation = np.where(deviation > 1e-12 * np.maximum(np.abs(mean), 1.0), deviation, 1.0)
    return Contest(name, seed, (x[train] - mean) / deviation, (x[test] - mean) / deviation, labels[test])


def _sets() -> dict[str, tuple[Rows, Labels]]:
    paths = sorted((DATA / "adbench").glob("*.npz"), key=lambda path: int(path.stem.partition("_")[0]))
    if not paths:
        return _bundled()
    loaded = {path.stem.partition("_")[2]: np.load(path) for path in paths}
    return {name: (np.asarray(file["X"], np.float64), np.asarray(file["y"], np.int64)) for name, file in loaded.items()}


def _bundled() -> dict[str, tuple[Rows, Labels]]:
    from sklearn.datasets import load_breast_cancer, load_digits, load_wine

    return {
        "breast cancer": _one_class(load_breast_cancer(), normal=1),
        "wine": _one_class(load_wine(), normal=1),
        "digits": _one_class(load_digits(), normal=3),
    }


def _one_class(loaded: Any, normal: int) -> tuple[Rows, Labels]:
    """The rows of one class, and a few of the others as anomalies."""
    x, classes = loaded.data, loaded.target
    inside, outside = np.flatnonzero(classes == normal), np.flatnonzero(classes != normal)
    few = outside[:: max(1, round(len(outside) / (ANOMALIES * len(inside))))]
    labels = np.repeat([0, 1], [len(inside), len(few)])
    return np.asarray(x[np.concatenate((inside, few))], np.float64), labels
