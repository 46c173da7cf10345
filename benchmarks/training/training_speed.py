"""Compare how fast Elbo, a bare PyTorch loop, pythae and Lightning train the same VAE, in rows per CPU second.

    python benchmarks/training/training_speed.py            # `make bench-train` also installs pythae and Lightning
    python benchmarks/training/training_speed.py --smoke    # two short rounds

Each trainer runs in its own process (`trainers.py`) on one core. The trainers run one at a time. In each round, every
trainer trains one model for two epochs, so that changes in the machine's speed affect all trainers alike. Times are CPU
seconds.

pythae and Lightning run in a separate Python environment. The benchmark prints a Markdown table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import ROOT, describe_machine, load_images
from benchmarks.training.trainers import BATCH_SIZE, EPOCHS, HELD_OUT_ROWS, HIDDEN, LATENTS

ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TITLES = {"elbo": "Elbo", "bare": "bare PyTorch loop", "pythae": "pythae", "lightning": "Lightning"}


class TrainerProcess:
    """A process of `trainers.py`.

    Args:
        name: a key of `trainers.TRAINERS`.
        python: path of the Python interpreter.
        rows: npy file with the images.

    Raises:
        RuntimeError: the process does not start. The message gives the reason.
    """

    def __init__(self, name: str, python: str, rows: Path) -> None:
        self._log = rows.with_name(f"{name}.log")
        command = [python, str(Path(__file__).with_name("trainers.py")), name, str(rows)]
        environment = {**os.environ, **ONE_CORE, "PYTHONPATH": str(ROOT)}
        try:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
                )
        except FileNotFoundError as error:
            raise RuntimeError(f"{python} does not exist: run make bench-train") from error
        self._read_line()

    def train(self) -> dict[str, float]:
        """Train a new model. Return the CPU seconds of the training ("seconds") and the held-out loss ("loss")."""
        assert self._process.stdin
        self._process.stdin.write("train\n")
        self._process.stdin.flush()
        return self._read_line()

    def stop(self) -> None:
        """Stop the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _read_line(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            result: dict[str, Any] = json.loads(line)
            return result
        self._process.wait()
        raise RuntimeError(self._log.read_text().strip().splitlines()[-1])


def print_table(trainers: dict[str, TrainerProcess], rounds: int, rows: int) -> None:
    """Measure all trainers and print the table. The first round is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    losses: dict[str, float] = {}
    for round_ in range(rounds + 1):
        for name, trainer in trainers.items():
            result = trainer.train()
            losses[name] = result["loss"]
            if round_:
                seconds[name].append(result["seconds"])
    print("| trainer | rows/s, median (min, max) | speed / speed of the bare loop (min, max) | held-out loss, nats |")
    print("|---|---|---|---|")
    for name, durations in seconds.items():
        rates = [rows * EPOCHS / duration for duration in durations]
        ratios = [bare / duration for bare, duration in zip(seconds["bare"], durations, strict=True)]
        speed = f"{statistics.median(rates):,.0f} ({min(rates):,.0f}, {max(rates):,.0f})"
        share = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        print(f"| {TITLES[name]} | {speed} | {'' if name == 'bare' else share} | {losses[name]:.1f} |")


def main() -> None:
    """Start all trainers, measure them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two short rounds, to check that the benchmark works")
    parser.add_argument(
        "--peers",
        default=str(ROOT / ".venv-peers" / "bin" / "python"),
        metavar="PYTHON",
        help="interpreter with pythae and Lightning (default that of make bench-train)",
    )
    options = parser.parse_args()
    rounds, rows = (2, 1_280) if options.smoke else (11, 12_800)
    name, x = load_images("train")
    x = x[: rows + HELD_OUT_ROWS].reshape(-1, x[0].size)
    rows = len(x) - HELD_OUT_ROWS
    trainers, failures = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        np.save(path, x)
        for key in TITLES:
            try:
                python = sys.executable if key in ("elbo", "bare") else options.peers
                trainers[key] = TrainerProcess(key, python, path)
            except RuntimeError as error:
                failures[key] = str(error)
        print(describe_machine("torch"), end="\n\n")
        layers = f"{x.shape[1]}-{HIDDEN}-{LATENTS}"
        print(
            f"VAE {layers}, Bernoulli, batches of {BATCH_SIZE}, {rows:,} rows of {name} and {HELD_OUT_ROWS:,} held-out "
            f"rows, one core, {rounds} rounds of {EPOCHS} epochs."
        )
        print(
            "Elbo also clips gradients, schedules the learning rate, checks that each loss is finite, and keeps the "
            "best epoch.\n"
        )
        print_table(trainers, rounds, rows)
    for key, failure in failures.items():
        print(f"| {TITLES[key]} | missing: {failure} | | |")
    for trainer in trainers.values():
        trainer.stop()


if __name__ == "__main__":
    main()
