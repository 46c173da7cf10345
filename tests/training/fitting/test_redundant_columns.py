"""Tables whose columns nearly repeat each other: a break of one column is found, though it is small beside the spread.

A break is judged by its size beside the noise between the columns. Under the true covariance, the Mahalanobis distance
finds every break of these tests.
"""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.commands import in_process, write

pytestmark = pytest.mark.slow

Doubles = npt.NDArray[np.float64]
ROWS = 1000
EPOCHS = "80"  # a third of the default, which finds the same breaks
# number of loads, of sensors per load, of independent columns, and the noise of a sensor beside its load
TABLES = {
    "one load": (1, 8, 0, 0.003),
    "three loads": (3, 4, 0, 0.01),
    "one load and an independent column": (1, 10, 1, 0.01),
    "one load and a rare column": (1, 8, 0, 0.003),
}


def rows_of(table: str, count: int, seed: int) -> Doubles:
    loads, sensors, independent, noise = TABLES[table]
    random = np.random.RandomState(seed)
    x = np.repeat(random.standard_normal((count, loads)), sensors, axis=1)
    x += noise * random.standard_normal(x.shape)
    x = np.hstack([x, random.standard_normal((count, independent))])
    return np.hstack([x, random.uniform(size=(count, 1)) < 0.02]) if "rare" in table else x


def flagged(
    capsys: pytest.CaptureFixture[str], folder: Path, kind: str, x: Doubles, fresh: Doubles
) -> npt.NDArray[np.bool_]:
    """Train a model of `kind` on x [N, D] with `elbo train`, and return which rows of `fresh` `elbo score` flags."""
    header = ",".join(f"sensor{index}" for index in range(x.shape[1]))
    artifacts = ("--artifacts", str(folder / "artifacts"))
    paths = [write(folder / f"{name}.csv", rows, header) for name, rows in (("train", x), ("fresh", fresh))]
    epochs = () if kind == "pca" else ("--epochs", EPOCHS)
    options = ("--model", kind, "--name", "m", "--runs", str(folder / "runs"), *epochs, *artifacts)
    assert in_process(capsys, "train", paths[0], *options)[0] == 0
    status, printed, _ = in_process(capsys, "score", "m", paths[1], *artifacts)
    assert status == 0
    return np.array([json.loads(line)["is_anomaly"] for line in printed.splitlines()])


@pytest.mark.parametrize("kind", ["pca", "ae", "ensemble"])
@pytest.mark.parametrize("table", TABLES)
def test_break_of_thirty_to_a_hundred_times_the_noise_in_redundant_columns_is_found(
    table: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loads, sensors, _, noise = TABLES[table]
    random, normal = np.random.RandomState(3), rows_of(table, 200, 1)
    broken = {size: rows_of(table, 200, 2) for size in (30, 100)}
    for size, rows in broken.items():
        columns, signs = random.randint(0, loads * sensors, 200), random.choice([-1, 1], 200)
        rows[np.arange(200), columns] += size * noise * signs
    found = flagged(capsys, tmp_path, kind, rows_of(table, ROWS, 0), np.vstack([normal, *broken.values()]))
    assert found[:200].mean() < 0.15
    assert found[200:400].mean() > 0.9
    assert found[400:].mean() > 0.99
