"""Measure how long `elbo backtest` takes for a million rows of 20 features.

    python benchmarks/anomaly/backtest_speed.py                  # a model that judges each row alone
    python benchmarks/anomaly/backtest_speed.py --window 30
    python benchmarks/anomaly/backtest_speed.py --smoke          # 5,000 rows

It writes a CSV file of ten hosts with a daily season, trains PCA on two days of other rows, and runs the command in a
new process, with a page. The time includes the start of the process, reading the file, the replay and the page.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.data import ROOT, describe_machine
from training.config import TrainConfig
from training.data.table import read_table
from training.progress import SilentReporter
from training.train import train

HOSTS, FEATURES, STEP = 10, 20, 60
TARGET = 60.0  # seconds for a million rows
START = 1_767_225_600


def write_history(path: Path, rows: int, start: int, seed: int) -> str:
    """Write the rows of all hosts in order of time, and return the path."""
    random = np.random.default_rng(seed)
    moments = np.repeat(start + STEP * np.arange(rows // HOSTS), HOSTS)
    host = np.tile(np.arange(HOSTS), rows // HOSTS)
    load = np.sin(2 * np.pi * moments / 86_400 + host) + 0.3 * random.standard_normal(len(host))
    x = load[:, None] * np.linspace(0.2, 1, FEATURES) + 0.5 * random.standard_normal((len(host), FEATURES))
    columns = {"ts": moments, "host": np.char.add("host-", host.astype(str))}
    columns |= {f"metric{number}": x[:, number].round(4) for number in range(FEATURES)}
    pl.DataFrame(columns).write_csv(path)
    return str(path)


def main() -> None:
    """Measure the command, and print the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of rows (default 1000000)")
    parser.add_argument("--window", type=int, default=None, help="rows in the model's window (default: none)")
    parser.add_argument("--smoke", action="store_true", help="5,000 rows")
    options = parser.parse_args()
    rows = 5_000 if options.smoke else options.rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = read_table(write_history(folder / "train.csv", 20_000, START - 10**7, 0), time="ts", group="host")
        config = TrainConfig(model="pca", name="hosts", time="ts", group="host", window=options.window)
        train(config, table, folder, SilentReporter())
        history = write_history(folder / "history.csv", rows, START, 1)
        command = ["-m", "elbo", "backtest", "hosts", history, "--artifacts", name, "--html", str(folder / "page.html")]
        before, started = os.times(), time.perf_counter()
        result = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True)
        seconds, after = time.perf_counter() - started, os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        size = (folder / "page.html").stat().st_size
    print(result.stdout.partition("\n\ngroups")[0])
    window = "each row alone" if options.window is None else f"windows of {options.window} rows"
    verdict = "" if rows < 1_000_000 else f" (target {TARGET:.0f} s: {'met' if seconds <= TARGET else 'MISSED'})"
    print(f"\n{describe_machine('torch', 'numpy')}")
    print(
        f"{rows:,} rows of {FEATURES} features, {window}: {seconds:.1f} s{verdict}, of which {cpu:.1f} s of processor"
    )
    print(f"page: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
