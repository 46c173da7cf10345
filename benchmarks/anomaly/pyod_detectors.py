"""Run PyOD's PCA, VAE and autoencoder with default options, on one thread. PyOD must be installed.

`python pyod_detectors.py FOLDER` reads the training and test rows in each file FOLDER/<n>.npz, and writes
FOLDER/scores/<n>.npz. The written file holds one array per detector, the scores of the test rows. Higher scores are
more anomalous.

`python pyod_detectors.py FOLDER ROUNDS BATCH...` fits the detectors to the rows in FOLDER/rows.npy, and prints one line
of JSON. This line maps each detector to a list: microseconds per row for each batch size, then CPU seconds of the fit.
"""

import json
import sys
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from pyod.models.auto_encoder import AutoEncoder
from pyod.models.pca import PCA
from pyod.models.vae import VAE

DETECTORS = {"PyOD PCA": PCA, "PyOD VAE": VAE, "PyOD AE": AutoEncoder}
WARM_UP_ROUNDS = 3


def fit(name: str, rows: Any) -> Any:
    """Return the detector `name`, fitted to rows [N, D]."""
    torch.manual_seed(0)
    np.random.seed(0)
    return DETECTORS[name]().fit(rows)


def score(folder: Path) -> None:
    """Score the test rows of all files in `folder`."""
    (folder / "scores").mkdir(exist_ok=True)
    for path in sorted(folder.glob("*.npz")):
        file = np.load(path)
        scores = {name: fit(name, file["train"]).decision_function(file["test"]) for name in DETECTORS}
        np.savez(folder / "scores" / path.name, **scores)
        print(path.stem, flush=True)


def measure_time(folder: Path, rounds: int, batches: list[int]) -> None:
    """Print, per detector, the time per row for each batch size, and the CPU time of the fit."""
    rows, costs = np.load(folder / "rows.npy"), {}
    for name in DETECTORS:
        started = process_time()
        detector = fit(name, rows)
        seconds = process_time() - started
        costs[name] = [*(_best_microseconds(detector, rows[:batch], rounds) for batch in batches), seconds]
    print(json.dumps(costs))


def _best_microseconds(detector: Any, rows: Any, rounds: int) -> float:
    """Return the shortest measured time per row, in microseconds."""
    durations = []
    for _ in range(WARM_UP_ROUNDS + rounds):
        started = perf_counter()
        detector.decision_function(rows)
        durations.append(1e6 * (perf_counter() - started) / len(rows))
    return min(durations[WARM_UP_ROUNDS:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        measure_time(Path(sys.argv[1]), int(sys.argv[2]), [int(batch) for batch in sys.argv[3:]])
    else:
        score(Path(sys.argv[1]))
