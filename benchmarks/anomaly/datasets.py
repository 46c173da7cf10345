"""The data sets of the anomaly benchmarks, split by the one-class protocol.

A data set with more than 10,000 rows is reduced to 10,000 random rows. A random half of the normal rows are training
rows. The other normal rows and all anomalies are test rows. All rows are standardised with the mean and standard
deviation of the training rows.

If the folder ELBO_DATA (default ../shared/data) contains adbench/*.npz, the data sets are those of ADBench. Each file
holds the rows X and the labels y, which are 1 for an anomaly. Without such files, the data sets are those of
scikit-learn, with one class as the normal rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.data import DATA

MAX_ROWS = 10_000
ANOMALY_RATIO = 0.1  # number of anomalies / number of normal rows, in the data sets of scikit-learn

Rows = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelledSplit:
    """A data set that was split with one seed and standardised.

    Args:
        name: name of the data set.
        seed: seed of the split.
        train: training rows [N, D].
        test: test rows [M, D].
        labels: per test row, 1 for an anomaly and 0 for a normal row, [M].
    """

    name: str
    seed: int
    train: Rows
    test: Rows
    labels: Labels


def labelled_splits(seeds: range, bundled: bool = False, contaminated: bool = False) -> Iterator[LabelledSplit]:
    """Yield all data sets split with the first seed, then all data sets split with the second seed, and so on.

    Args:
        seeds: seeds of the splits.
        bundled: use the data sets of scikit-learn even if those of ADBench are available.
        contaminated: use all rows, including anomalies, both for training and for testing.
    """
    datasets = _bundled() if bundled else _datasets()
    for seed in seeds:
        for name, (x, labels) in datasets.items():
            yield _split(name, seed, x, labels, contaminated)


def _split(name: str, seed: int, x: Rows, labels: Labels, contaminated: bool) -> LabelledSplit:
    random = np.random.RandomState(seed)
    if len(x) > MAX_ROWS:
        chosen = random.permutation(len(x))[:MAX_ROWS]
        x, labels = x[chosen], labels[chosen]
    normal = random.permutation(np.flatnonzero(labels == 0))
    half = len(normal) // 2
    train = np.arange(len(x)) if contaminated else normal[:half]
    test = train if contaminated else np.concatenate((normal[half:], np.flatnonzero(labels == 1)))
    mean, deviation = x[train].mean(axis=0), x[train].std(axis=0)
    deviation = np.where(deviation > 1e-12 * np.maximum(np.abs(mean), 1.0), deviation, 1.0)
    return LabelledSplit(name, seed, (x[train] - mean) / deviation, (x[test] - mean) / deviation, labels[test])


def _datasets() -> dict[str, tuple[Rows, Labels]]:
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


def _one_class(dataset: Any, normal: int) -> tuple[Rows, Labels]:
    """Return rows and labels: all rows of the class `normal`, and a sample of the other rows as anomalies."""
    x, classes = dataset.data, dataset.target
    inside, outside = np.flatnonzero(classes == normal), np.flatnonzero(classes != normal)
    sample = outside[:: max(1, round(len(outside) / (ANOMALY_RATIO * len(inside))))]
    labels = np.repeat([0, 1], [len(inside), len(sample)])
    return np.asarray(x[np.concatenate((inside, sample))], np.float64), labels
