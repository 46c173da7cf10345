"""What the benchmarks of calibration and of servers share: normal rows to train on, labelled rows to test on, a model.

The servers lie where ELBO_DATA or ../shared/data has server-metrics/*.npz. Elsewhere a made one shows that a benchmark
works.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.anomaly.datasets import contests
from benchmarks.data import DATA
from models.pipeline import Pipeline
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Split, Table, split_rows
from training.fitting.pipeline import fit_pipeline
from training.fitting.prepared_data import prepare_data
from training.progress import SilentReporter

KINDS = ("pca", "ae", "vae", "ensemble")

Floats = npt.NDArray[np.float32]
Cause = tuple[int, int, int]  # first row, last row, feature


@dataclass(frozen=True)
class OneClass:
    """Normal rows to train on, rows to test on, and which of these are anomalous."""

    name: str
    train: Floats  # [N, D]
    test: Floats  # [M, D]
    labels: npt.NDArray[np.int64]  # [M], 1 for an anomaly
    causes: tuple[Cause, ...] = ()  # of the anomalies, where they are known


def adbench(seed: int, few: bool = False) -> Iterator[OneClass]:
    """The 19 sets under the one-class protocol: a random half of the normal rows trains, all others test.

    `few`, and where they are not: scikit-learn's.
    """
    for contest in contests(range(seed, seed + 1), bundled=few):
        rows = contest.train.astype(np.float32), contest.test.astype(np.float32)
        yield OneClass(contest.name, *rows, contest.labels)


def servers(few: bool = False) -> Iterator[OneClass]:
    """Nine servers' metrics in the order of time; where they are not, or for few rows, one that is made."""
    paths = sorted((DATA / "server-metrics").glob("*.npz"))
    for path in () if few else paths:
        data = np.load(path)
        causes = tuple((int(first), int(last), int(feature)) for first, last, feature in data["causes"])
        yield OneClass(path.stem, data["train"], data["test"], data["label"].astype(np.int64), causes)
    if few or not paths:
        yield _made_server()


def _made_server(rows: int = 1_200, features: int = 8) -> OneClass:
    """Metrics that two slow loads drive; in the second half two features break away, twice."""
    random = np.random.RandomState(0)
    time = np.arange(2 * rows)
    loads = np.column_stack((np.sin(time / 90), np.sin(time / 37 + 1)))
    x = loads @ random.standard_normal((2, features)) + 0.2 * random.standard_normal((2 * rows, features))
    train, test, labels = x[:rows], x[rows:].copy(), np.zeros(rows, np.int64)
    causes: list[Cause] = []
    for first, broken in ((300, (1, 4)), (800, (6, 2))):
        labels[first : first + 40] = 1
        for feature in broken:
            test[first : first + 40, feature] += 2.0
            causes.append((first, first + 39, feature))
    return OneClass("made", train.astype(np.float32), test.astype(np.float32), labels, tuple(causes))


def standardised(data: OneClass) -> tuple[Floats, Floats]:
    """Train and test rows in deviations of the training rows; what never varies there is only centred."""
    mean, deviation = data.train.mean(axis=0), data.train.std(axis=0)
    deviation = np.where(deviation <= 1e-7 * np.abs(data.train).max(axis=0), 1.0, deviation)
    return (data.train - mean) / deviation, (data.test - mean) / deviation


def fitted(kind: str, data: OneClass, seed: int, few: bool = False) -> tuple[Pipeline, Split]:
    """A model of `kind` with the defaults of `elbo train`, and how it dealt the training rows out."""
    width = data.train.shape[1]
    names = [f"x{i}" for i in range(width)]
    missing = np.zeros(width, np.int64)
    table = Table(RowStore(data.train), (width,), names, [None] * width, None, None, data.name, missing=missing)
    rows = split_rows(len(data.train), seed, width)
    config = TrainConfig.model_validate(
        {"model": kind, "name": "bench", "seed": seed} | ({"epochs": 3} if few and kind != "pca" else {})
    )
    return fit_pipeline(config, prepare_data(table, rows), SilentReporter()), rows
