"""How many rows a second a VAE trains on: Elbo, a bare PyTorch loop, pythae and Lightning, in turns.

Each is a process of its own (`contestants.py`) on one core, and is asked for one run at a time, in turns, so that the
mood of the machine hits all; CPU seconds are counted. A run is two epochs with a look at the held-out rows after each.
pythae and Lightning live in an environment of their own, which `make bench-train` makes. Prints a Markdown table.
`--smoke` makes two short rounds; `--peers PYTHON` is the peers' interpreter.
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
from benchmarks.training.contestants import BATCH, EPOCHS, HELD_OUT, HIDDEN, LATENTS

ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
NAMES = {"elbo": "Elbo", "bare": "bare PyTorch loop", "pythae": "pythae", "lightning": "Lightning"}


class Contestant:
    """One of them, in its process. Raises RuntimeError, with the last thing that it said, when it does not work."""

    def __init__(self, name: str, python: str, rows: Path) -> None:
        self._said = rows.with_name(f"{name}.log")
        command = [python, str(ROOT / "benchmarks" / "contestants.py"), name, str(rows)]
        environment = {**os.environ, **ONE_CORE, "PYTHONPATH": str(ROOT)}
        try:
            with self._said.open("w") as said:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=environment
                )
        except FileNotFoundError as error:
            raise RuntimeError(f"no {python}: run make bench-train") from error
        self._answer()

    def run(self) -> dict[str, float]:
        """One run: its CPU seconds and its held-out loss."""
        assert self._process.stdin
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """Let it end."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        raise RuntimeError(self._said.read_text().strip().splitlines()[-1])


def compete(contestants: dict[str, Contestant], rounds: int, rows: int) -> None:
    """The table, of rounds after a first that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    losses: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, contestant in contestants.items():
            answer = contestant.run()
            losses[name] = answer["loss"]
            if turn:
                seconds[name].append(answer["seconds"])
    print("| trainer | rows a second (from, to) | of the bare loop's speed (rounds from, to) | held-out loss, nats |")
    print("|---|---|---|---|")
    for name, taken in seconds.items():
        rates = [rows * EPOCHS / value for value in taken]
        ratios = [theirs / ours for theirs, ours in zip(seconds["bare"], taken, strict=True)]
        speed = f"{statistics.median(rates):,.0f} ({min(rates):,.0f}, {max(rates):,.0f})"
        share = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        print(f"| {NAMES[name]} | {speed} | {'' if name == 'bare' else share} | {losses[name]:.1f} |")


def main() -> None:
    """Start the contestants and let them compete."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two short rounds, to see that it works")
    parser.add_argument("--peers", default=str(ROOT / ".venv-peers" / "bin" / "python"), metavar="PYTHON")
    options = parser.parse_args()
    rounds, rows = (2, 1_280) if options.smoke else (11, 12_800)
    name, x = load_images("train")
    x = x[: rows + HELD_OUT].reshape(-1, x[0].size)
    rows = len(x) - HELD_OUT
    contestants, failures = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        np.save(path, x)
        for key in NAMES:
            try:
                python = sys.executable if key in ("elbo", "bare") else options.peers
                contestants[key] = Contestant(key, python, path)
            except RuntimeError as error:
                failures[key] = str(error)
        print(describe_machine("torch"), end="\n\n")
        layers = f"{x.shape[1]}-{HIDDEN}-{LATENTS}"
        print(
            f"VAE {layers}, Bernoulli, batches of {BATCH}, {rows:,} rows of {name} and {HELD_OUT:,} held out, one core,"
        )
        print(
            f"{rounds} rounds of {EPOCHS} epochs each. Elbo also clips gradients, schedules the rate, checks every loss"
        )
        print("and keeps the best epoch.\n")
        compete(contestants, rounds, rows)
    for key, failure in failures.items():
        print(f"| {NAMES[key]} | does not run: {failure} | | |")
    for contestant in contestants.values():
        contestant.stop()


if __name__ == "__main__":
    main()
