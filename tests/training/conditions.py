"""Rows whose distribution depends on two columns of conditions, and models that know these columns."""

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.table import read_table
from training.train import train

KINDS = ['a "quoted", kind', "b", "überschuss"]  # sorted
SHIFTS = ["no", "yes"]
MEANS = np.array([[0, 0, 0, 0], [8, 0, -6, 2], [-7, 6, 4, -2]])
FEATURES = ["v1", "v2", "v3", "v4"]
Rows = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]


def rows_with_conditions(count: int, seed: int) -> tuple[Rows, Codes, Codes]:
    """Return rows [count, 4], and the kind and the shift of each row as indices of KINDS and SHIFTS."""
    random = np.random.RandomState(seed)
    kind, shift = random.choice(3, count, p=(0.5, 0.3, 0.2)), random.randint(0, 2, count)
    spread = np.array([1.0, 0.5, 1.0, 0.3])
    x = MEANS[kind] + shift[:, None] * np.array([0, 0, 0, 6]) + random.standard_normal((count, 4)) * spread
    return np.asarray(x + 0.5 * x[:, :1].round() * 0.1), kind, shift


def write_table(path: Path, x: Rows, **columns: list[str]) -> str:
    """Write rows x [N, 4] and further columns as CSV. Return the path."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*FEATURES, *columns])
        writer.writerows([*row, *cells] for row, *cells in zip(x.tolist(), *columns.values(), strict=True))
    return str(path)


def train_conditional_models(root: Path) -> None:
    """Fill `root` as the fixture `conditional_models` says."""
    x, kind, shift = rows_with_conditions(1200, seed=0)
    source = write_table(root / "table.csv", x, kind=[KINDS[k] for k in kind], shift=[SHIFTS[s] for s in shift])
    table = read_table(source, condition=("kind", "shift"))
    config = TrainConfig(model="ae", name="kinds", condition=("kind", "shift"), epochs=25, hidden=(32,), latents=2)
    train(config, table, root / "artifacts", RecordingReporter(), force=True)
    digits = TrainConfig(model="vae", name="digits", condition=("label",), epochs=80, hidden=(128,))
    train(digits, read_table("digits", condition=("label",)), root / "artifacts", RecordingReporter())
    train(TrainConfig(model="pca", name="plain"), read_table("digits"), root / "artifacts", RecordingReporter())
