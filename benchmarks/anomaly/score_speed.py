"""What a verdict costs in the process, and what a model costs to fit: every kind, beside PyOD on the same rows.

The model computes score, parts, p-value, severity, contributions and expected values; a verdict makes of these what
`/anomaly` answers, objects that name the three features that contribute most. Rounds go around all, so that the mood of
the machine hits each; the best of them counts, on one thread. A fit is all that `elbo train` does: reading, splitting,
training, calibration, publication; its CPU seconds are counted. Prints Markdown tables. `--smoke` makes few rows and
rounds; `--peers PYTHON` is the interpreter that has PyOD.
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.data import ROOT, describe_machine
from models.artifact import Artifact, load
from service.anomaly.inputs import InputRows
from service.anomaly.verdicts import Scores, decide, results_and_errors
from service.codec.row_schema import ParsedRows
from service.inference import operations
from service.inference.backend_selection import select_backend
from service.schemas import AnomalyBody
from training.config import TrainConfig
from training.data.table import read_table
from training.progress import SilentReporter
from training.train import train

KINDS = ("pca", "vae", "ae", "ensemble")
ROWS, FEATURES, FACTORS = 10_000, 20, 8
BATCHES = (1, 256)
TARGETS = {1: 100.0, 256: 2.0}  # us a row, of what the model computes
WARM = 5
ALPHA, EXPLAIN = 0.05, 3
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Rows = npt.NDArray[np.float32]
Judge = Callable[[Rows], object]


def rows_of(count: int) -> Rows:
    """Rows [count, FEATURES] on something curved, with noise."""
    random = np.random.RandomState(0)
    factors = random.standard_normal((count, FACTORS))
    curved = np.tanh(factors @ random.standard_normal((FACTORS, FEATURES)))
    return (curved + 0.1 * random.standard_normal(curved.shape)).astype(np.float32)


def judges_of(artifact: Artifact) -> tuple[str, Judge, Judge]:
    """The backend that `artifact` is served by, what computes on rows, and what makes verdicts of them."""
    backend, operation = select_backend(artifact).backend, operations.anomaly(ALPHA)
    names, body = [feature.name for feature in artifact.manifest.features], AnomalyBody(alpha=ALPHA, explain=EXPLAIN)

    def compute(x: Rows) -> object:
        return backend.run(operation, (x,))

    def judge(x: Rows) -> object:
        scores = Scores(*backend.run(operation, (x,)))
        parsed = ParsedRows(x, list(range(len(x))), [], None)
        verdicts = decide(InputRows(parsed, len(x)), scores, body)
        return results_and_errors(verdicts, EXPLAIN, names, artifact.manifest.parts)

    return backend.name, compute, judge


def best(judges: dict[str, Judge], x: Rows, rounds: int) -> dict[str, float]:
    """The fewest microseconds a row that each took for x."""
    taken = dict.fromkeys(judges, np.inf)
    for turn in range(WARM + rounds):
        for name, judge in judges.items():
            started = perf_counter()
            judge(x)
            if turn >= WARM:
                taken[name] = min(taken[name], 1e6 * (perf_counter() - started) / len(x))
    return taken


def pyod(x: Rows, rounds: int, python: str) -> dict[str, list[float]]:
    """For each of PyOD's detectors its microseconds a row in each of BATCHES, and the CPU seconds of its fit.

    Raises RuntimeError where it cannot be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "rows.npy", x)
        command = [python, str(ROOT / "benchmarks" / "anomaly_pyod.py"), folder, *map(str, (rounds, *BATCHES))]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | ONE_CORE)
        except FileNotFoundError as error:
            raise RuntimeError(f"no {python}: run make bench-anomaly") from error
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    times: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return times


def main() -> None:
    """Fit, judge and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="few rows and rounds, to see that it works")
    parser.add_argument("--peers", default=str(ROOT / ".venv-peers" / "bin" / "python"), metavar="PYTHON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, rounds = rows_of(500 if options.smoke else ROWS), 5 if options.smoke else 300
    fits, backends, judges = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "rows.npy", x)
        for kind in KINDS:
            started = process_time()
            table = read_table(str(Path(folder) / "rows.npy"))
            path = train(TrainConfig(model=kind, name=kind), table, Path(folder), SilentReporter())
            fits[kind] = process_time() - started
            backends[kind], judges[kind], judges[f"{kind}, verdict"] = judges_of(load(path))
    times = {batch: best(judges, x[:batch], rounds) for batch in BATCHES}
    print(describe_machine("torch", "onnxruntime"), end="\n\n")
    print(f"| detector | runs on | {' | '.join(f'us a row, {b} at a time' for b in BATCHES)} | fit of {len(x):,}, s |")
    print(f"|---|---|{'---|' * len(BATCHES)}---|")
    for name in judges:
        kind, _, whole = name.partition(", ")
        figures = " | ".join(f"{times[batch][name]:.3g}" for batch in BATCHES)
        print(f"| Elbo {name} | {backends[kind]} | {figures} | {'' if whole else f'{fits[kind]:.1f}'} |")
    print(f"| aimed at | | {' | '.join(f'≤ {TARGETS[batch]:g}' for batch in BATCHES)} | ≤ 5 |")
    try:
        for name, (*costs, fitted) in pyod(x, rounds, options.peers).items():
            print(f"| {name}, score alone | | {' | '.join(f'{cost:.3g}' for cost in costs)} | {fitted:.1f} |")
    except RuntimeError as error:
        print(f"| PyOD | does not run: {error} | {'| ' * len(BATCHES)}|")


if __name__ == "__main__":
    os.environ.update(ONE_CORE)
    main()
