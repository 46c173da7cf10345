"""Measure the scoring time per row and the fit time of Elbo's models and PyOD's detectors, on one thread.

    python benchmarks/anomaly/score_speed.py            # `make bench-anomaly` also installs PyOD
    python benchmarks/anomaly/score_speed.py --smoke    # few rows and rounds

The time of an Elbo model includes scores, the parts of scores, p-values, severities, contributions and expected values.
The time with the verdict also includes the response objects of `/anomaly`, which list the three features with the
largest contributions. PyOD's detectors compute only scores.

In each round all detectors are measured once, so that changes in the machine's speed affect all detectors alike. The
table shows the shortest time of all rounds.

The fit time of an Elbo model is the CPU time of `elbo train`: reading, splitting, training, calibration and publishing.
The fit time of a PyOD detector is the CPU time of its `fit` method.

The benchmark prints a Markdown table.
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
TARGETS = {1: 100.0, 256: 2.0}  # maximum time per row in us, without the verdict, by batch size
WARM_UP_ROUNDS = 5
ALPHA, EXPLAIN = 0.05, 3
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

Rows = npt.NDArray[np.float32]
Detector = Callable[[Rows], object]


def create_rows(count: int) -> Rows:
    """Return rows [count, FEATURES] on a curved manifold, with noise."""
    random = np.random.RandomState(0)
    factors = random.standard_normal((count, FACTORS))
    curved = np.tanh(factors @ random.standard_normal((FACTORS, FEATURES)))
    return (curved + 0.1 * random.standard_normal(curved.shape)).astype(np.float32)


def create_detectors(artifact: Artifact) -> tuple[str, Detector, Detector]:
    """Return the name of the selected backend, a function that scores rows, and one that also makes verdicts."""
    backend, operation = select_backend(artifact).backend, operations.anomaly(ALPHA)
    names, body = [feature.name for feature in artifact.manifest.features], AnomalyBody(alpha=ALPHA, explain=EXPLAIN)

    def score(x: Rows) -> object:
        return backend.run(operation, (x,))

    def score_and_decide(x: Rows) -> object:
        scores = Scores(*backend.run(operation, (x,)))
        parsed = ParsedRows(x, list(range(len(x))), [], None)
        verdicts = decide(InputRows(parsed, len(x)), scores, body)
        return results_and_errors(verdicts, EXPLAIN, names, artifact.manifest.parts)

    return backend.name, score, score_and_decide


def best_microseconds(detectors: dict[str, Detector], x: Rows, rounds: int) -> dict[str, float]:
    """Score x [B, D] with each detector. Return the shortest time per row of each, in microseconds."""
    best = dict.fromkeys(detectors, np.inf)
    for round_ in range(WARM_UP_ROUNDS + rounds):
        for name, detector in detectors.items():
            started = perf_counter()
            detector(x)
            if round_ >= WARM_UP_ROUNDS:
                best[name] = min(best[name], 1e6 * (perf_counter() - started) / len(x))
    return best


def measure_pyod(x: Rows, rounds: int, python: str) -> dict[str, list[float]]:
    """Return a list per PyOD detector: the microseconds per row for each of BATCHES, then the CPU seconds of the fit.

    Raises:
        RuntimeError: PyOD is missing or failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "rows.npy", x)
        script = Path(__file__).with_name("pyod_detectors.py")
        command = [python, str(script), folder, *map(str, (rounds, *BATCHES))]
        try:
            process = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | ONE_CORE)
        except FileNotFoundError as error:
            raise RuntimeError(f"{python} does not exist: run make bench-anomaly") from error
    if process.returncode:
        raise RuntimeError(process.stderr.strip().splitlines()[-1])
    times: dict[str, list[float]] = json.loads(process.stdout.splitlines()[-1])
    return times


def main() -> None:
    """Fit and measure all detectors, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="few rows and rounds, to check that the benchmark works")
    parser.add_argument(
        "--peers",
        default=str(ROOT / ".venv-peers" / "bin" / "python"),
        metavar="PYTHON",
        help="interpreter with PyOD (default that of make bench-anomaly)",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = create_rows(500 if options.smoke else ROWS)
    rounds = 5 if options.smoke else 300
    fit_seconds, backends, detectors = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "rows.npy", x)
        for kind in KINDS:
            started = process_time()
            table = read_table(str(Path(folder) / "rows.npy"))
            few = {"epochs": 3} if options.smoke and kind != "pca" else {}
            config = TrainConfig.model_validate({"model": kind, "name": kind} | few)
            path = train(config, table, Path(folder), SilentReporter())
            fit_seconds[kind] = process_time() - started
            backends[kind], detectors[kind], detectors[f"{kind}, verdict"] = create_detectors(load(path))
    times = {batch: best_microseconds(detectors, x[:batch], rounds) for batch in BATCHES}
    print(describe_machine("torch", "onnxruntime"), end="\n\n")
    titles = " | ".join(f"us per row, batch of {batch}" for batch in BATCHES)
    print(f"| detector | backend | {titles} | fit of {len(x):,} rows, s |")
    print(f"|---|---|{'---|' * len(BATCHES)}---|")
    for name in detectors:
        kind, _, with_verdict = name.partition(", ")
        figures = " | ".join(f"{times[batch][name]:.3g}" for batch in BATCHES)
        print(f"| Elbo {name} | {backends[kind]} | {figures} | {'' if with_verdict else f'{fit_seconds[kind]:.1f}'} |")
    print(f"| target | | {' | '.join(f'≤ {TARGETS[batch]:g}' for batch in BATCHES)} | ≤ 5 |")
    try:
        for name, (*costs, pyod_fit_seconds) in measure_pyod(x, rounds, options.peers).items():
            print(f"| {name}, score only | | {' | '.join(f'{cost:.3g}' for cost in costs)} | {pyod_fit_seconds:.1f} |")
    except RuntimeError as error:
        print(f"| PyOD | missing: {error} | {'| ' * len(BATCHES)}|")


if __name__ == "__main__":
    os.environ.update(ONE_CORE)
    main()
