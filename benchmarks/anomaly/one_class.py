"""Load data sets with normal training rows and labelled test rows, and train models on the training rows.

The metrics of servers are read from server-metrics/*.npz in the folder ELBO_DATA (default ../shared/data). Without such
files, the metrics of a synthetic server are used. They only show that the benchmark works.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.anomaly.datasets import labelled_splits
from benchmarks.data import DATA
from models.pipeline import Pipeline
from models.windowed import Windowed
from models.windows import summarise
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Split, Table, split_rows
from training.data.time_split import SplitName, split_table
from training.data.timeline import SECOND, Timeline
from training.fitting.pipeline import fit_pipeline
from training.fitting.prepared_data import prepare_data
from training.fitting.windows import choose_window, prepare_windows, with_window
from training.progress import SilentReporter

KINDS = ("pca", "ae", "vae", "ensemble")

Floats = npt.NDArray[np.float32]
Cause = tuple[int, int, int]  # first and last row of an incident, and a feature that caused it


@dataclass(frozen=True)
class OneClass:
    """A data set for one-class learning.

    Args:
        name: name of the data set.
        train: normal training rows [N, D].
        test: test rows [M, D].
        labels: per test row, 1 for an anomaly and 0 for a normal row, [M].
        causes: one entry per incident and feature that caused it; empty if the causes are unknown.
    """

    name: str
    train: Floats
    test: Floats
    labels: npt.NDArray[np.int64]
    causes: tuple[Cause, ...] = ()


def adbench(seed: int, smoke: bool = False) -> Iterator[OneClass]:
    """Yield the 19 data sets of ADBench, split with `seed`. For a smoke test, yield those of scikit-learn."""
    for split in labelled_splits(range(seed, seed + 1), bundled=smoke):
        yield OneClass(split.name, split.train.astype(np.float32), split.test.astype(np.float32), split.labels)


def servers(smoke: bool = False) -> Iterator[OneClass]:
    """Yield the metrics of nine servers, one data set per server. Rows are in order of time.

    If the files are missing, or for a smoke test, yield only the metrics of a synthetic server.
    """
    paths = sorted((DATA / "server-metrics").glob("*.npz"))
    for path in () if smoke else paths:
        data = np.load(path)
        causes = tuple((int(first), int(last), int(feature)) for first, last, feature in data["causes"])
        yield OneClass(path.stem, data["train"], data["test"], data["label"].astype(np.int64), causes)
    if smoke or not paths:
        yield _synthetic_server()


def _synthetic_server(rows: int = 1_200, features: int = 8) -> OneClass:
    """Return a synthetic server with two incidents in its test rows.

    Each metric is a weighted sum of two slowly varying loads, plus noise. During an incident, two metrics are raised.
    """
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
    return OneClass("synthetic", train.astype(np.float32), test.astype(np.float32), labels, tuple(causes))


def standardise(data: OneClass) -> tuple[Floats, Floats]:
    """Standardise training and test rows with the mean and standard deviation of the training rows.

    Features that are constant in the training rows are only centred.
    """
    mean, deviation = data.train.mean(axis=0), data.train.std(axis=0)
    deviation = np.where(deviation <= 1e-7 * np.abs(data.train).max(axis=0), 1.0, deviation)
    return (data.train - mean) / deviation, (data.test - mean) / deviation


def train_model(kind: str, data: OneClass, seed: int, smoke: bool = False) -> tuple[Pipeline, Split]:
    """Train a model of `kind` with the defaults of `elbo train`.

    Return the model, and the split of the training rows.
    """
    rows = split_rows(len(data.train), seed, data.train.shape[1])
    config = _config(kind, seed, smoke)
    return fit_pipeline(config, prepare_data(_table(data), rows), SilentReporter()), rows


def train_windowed(kind: str, data: OneClass, rows: int, seed: int, smoke: bool, split: SplitName) -> Windowed:
    """Train a model of `kind` with a window of `rows` rows, as `elbo train --time --window` does.

    Args:
        split: as for `elbo train --split`.
    """
    count = len(data.train)
    timeline = Timeline(
        time=np.arange(count) * 60 * SECOND,
        group=np.zeros(count, np.int32),
        groups=("",),
        time_column="time",
        group_column=None,
        source_rows=np.arange(count),
    )
    table = replace(_table(data), timeline=timeline)
    config = _config(kind, seed, smoke, time="time", window=rows, split=split)
    window, _ = choose_window(config, table)
    assert window is not None
    prepared = prepare_windows(config, table, window, split_table(table, seed, rows, split))
    model = with_window(fit_pipeline(config, prepared, SilentReporter()), prepared)
    assert isinstance(model, Windowed)
    return model


def score_series(model: Windowed, x: Floats) -> tuple[torch.Tensor, Floats]:
    """Return the scores [M] and the contributions [M, D] of rows x [M, D], each judged with the rows before it."""
    scales = model.summaries.averages.sum(dim=1).long().tolist()
    with torch.no_grad():
        u = model.scaling(torch.from_numpy(x)).numpy()
        z = torch.from_numpy(summarise(u, np.arange(len(x)), scales))
        scored = [model.score_summaries(part) for part in z.split(4096)]
    return torch.cat([part[0] for part in scored]), torch.cat([part[2] for part in scored]).numpy()


def _table(data: OneClass) -> Table:
    width = data.train.shape[1]
    names = [f"x{i}" for i in range(width)]
    missing = np.zeros(width, np.int64)
    return Table(RowStore(data.train), (width,), names, [None] * width, None, None, data.name, missing=missing)


def _config(kind: str, seed: int, smoke: bool, **options: Any) -> TrainConfig:
    if smoke and kind != "pca":
        options["epochs"] = 3
    return TrainConfig.model_validate({"model": kind, "name": "bench", "seed": seed, **options})
