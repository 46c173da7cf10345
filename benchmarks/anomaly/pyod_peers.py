"""PyOD's PCA, VAE and autoencoder, with its defaults and on one thread: run by the Python that has PyOD.

`python anomaly_pyod.py FOLDER` reads each <n>.npz (train, test) there and writes scores/<n>.npz: a score a test row by
the name of the detector, of which higher is stranger. `python anomaly_pyod.py FOLDER ROUNDS BATCH...` fits rows.npy and
prints, as a line of JSON, the microseconds that a row costs in each batch, and the CPU seconds of the fit.
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
WARM = 3


def fitted(name: str, rows: Any) -> Any:
    """The detector of that name, fitted to rows [N, D]."""
    torch.manual_seed(0)
    np.random.seed(0)
    return DETECTORS[name]().fit(rows)


def score(folder: Path) -> None:
    """Score every split."""
    (folder / "scores").mkdir(exist_ok=True)
    for path in sorted(folder.glob("*.npz")):
        file = np.load(path)
        found = {name: fitted(name, file["train"]).decision_function(file["test"]) for name in DETECTORS}
        np.savez(folder / "scores" / path.name, **found)
        print(path.stem, flush=True)


def time(folder: Path, rounds: int, batches: list[int]) -> None:
    """Print what they cost."""
    rows, costs = np.load(folder / "rows.npy"), {}
    for name in DETECTORS:
        started = process_time()
        detector = fitted(name, rows)
        seconds = process_time() - started
        costs[name] = [*(_best(detector, rows[:batch], rounds) for batch in batches), seconds]
    print(json.dumps(costs))


def _best(detector: Any, rows: Any, rounds: int) -> float:
    """The fewest microseconds a row."""
    taken = []
    for _ in range(WARM + rounds):
        started = perf_counter()
        detector.decision_function(rows)
        taken.append(1e6 * (perf_counter() - started) / len(rows))
    return min(taken[WARM:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        time(Path(sys.argv[1]), int(sys.argv[2]), [int(batch) for batch in sys.argv[3:]])
    else:
        score(Path(sys.argv[1]))
