"""Measure `elbo score NAME DATA OUTPUT`: rows per second, memory, and the gain from a second worker of Ray.

    python benchmarks/anomaly/batch_scoring.py                     # rows per second, compared with rows in memory
    python benchmarks/anomaly/batch_scoring.py --memory 1 8        # peak memory for inputs of 1 GB and 8 GB
    .venv-ray/bin/python benchmarks/anomaly/batch_scoring.py --ray # Ray with two workers against one
    python benchmarks/anomaly/batch_scoring.py --smoke             # 20,000 rows, and inputs of 2 MB and 4 MB

Rows have 20 features. The reference is the same artifact and the same rows in memory, without reading and writing: one
thread scores them in batches of 16,384 rows. (A second thread of torch makes networks of this size slower.) The command
reads a file, scores it in threads, one more than cores, finds the three largest contributions of each row, and writes a
new folder of Parquet files. So on several cores, it can be faster than the reference. The time is that of the whole
job, without the start of the process. For both, the best of three runs counts. The results are written to
results/batch_scoring.md.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import torch

from benchmarks.data import ROOT, describe_machine
from models.artifact import Artifact, load
from training.config import TrainConfig
from training.data.table import read_table
from training.evaluation.score import score_rows
from training.progress import SilentReporter
from training.scoring.run import Engine, make_job, run_job, score_locally
from training.train import train

FEATURES, FACTORS = 20, 4
BATCH = 16_384
NAMES = [f"metric{number}" for number in range(FEATURES)]
KINDS = ("pca", "ae", "vae")
FORMATS = ("npy", "parquet", "csv")
SHARE_TARGET, GAIN_TARGET, FLAT_TARGET = 0.70, 1.6, 1.1
RUNS = 3
RESULTS = Path(__file__).parent / "results"


def rows_of(count: int, seed: int) -> np.ndarray:
    """Return rows [count, FEATURES] that depend on FACTORS factors."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(1).standard_normal((FACTORS, FEATURES), np.float32)
    noise = 0.3 * random.standard_normal((count, FEATURES), np.float32)
    return 10 + random.standard_normal((count, FACTORS), np.float32) @ mixing + noise


def write_rows(path: Path, x: np.ndarray) -> None:
    """Write rows in the format of the suffix."""
    if path.suffix == ".npy":
        np.save(path, x)
        return
    frame = pl.DataFrame(x, schema=NAMES)
    frame.write_parquet(path) if path.suffix == ".parquet" else frame.write_csv(path)


def models_in(folder: Path, rows: int = 20_000) -> dict[str, Artifact]:
    """Train one model of each kind on `rows` rows."""
    write_rows(folder / "train.parquet", rows_of(rows, 0))
    table = read_table(str(folder / "train.parquet"))
    for kind in KINDS:
        config = TrainConfig(model=kind, name=kind, latents=FACTORS, epochs=3)
        train(config, table, folder, SilentReporter(), plots=False)
    return {kind: load(folder / kind / "1" / "model.pt") for kind in KINDS}


def best(work: Callable[[], None], runs: int = RUNS, output: Path | None = None) -> float:
    """Return the shortest time of `work`, in seconds. Each run begins without the folder `output`."""
    times = []
    for _ in range(runs):
        if output is not None:
            shutil.rmtree(output, ignore_errors=True)
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def score_in_memory(artifact: Artifact, x: np.ndarray) -> None:
    """Score rows in one thread, without reading or writing."""
    torch.set_num_threads(1)
    for start in range(0, len(x), BATCH):
        score_rows(artifact, x[start : start + BATCH], 0.05)


def score_file(artifact: Artifact, data: Path, folder: Path, engine: Engine, workers: int | None = None) -> None:
    """Score a file into a folder."""
    job = make_job(artifact, "parquet", 0.05, 3)
    run_job(job, artifact, str(data), folder, single=False, engine=engine, workers=workers)


def measure_speed(folder: Path, rows: int, smoke: bool = False) -> Iterator[str]:
    """Yield the lines of the table of rows per second. With `smoke`, train on few rows, and measure once."""
    runs, output = 1 if smoke else RUNS, folder / "out"
    x = rows_of(rows, 1)
    for suffix in FORMATS:
        write_rows(folder / f"rows.{suffix}", x)
    columns = " | ".join(f"{suffix}, rows/s" for suffix in FORMATS)
    yield f"| model | reference, rows/s | {columns} | share of the reference | target {SHARE_TARGET:.0%} |"
    yield "|" + "---|" * (4 + len(FORMATS))
    for kind, artifact in (models_in(folder, 1_000) if smoke else models_in(folder)).items():
        reference = rows / best(partial(score_in_memory, artifact, x), runs)
        engine = partial(score_locally, artifact)
        speeds = [
            rows / best(partial(score_file, artifact, folder / f"rows.{suffix}", output, engine), runs, output)
            for suffix in FORMATS
        ]
        shares = [speed / reference for speed in speeds]
        cells = " | ".join(f"{speed:,.0f}" for speed in speeds)
        listed = ", ".join(f"{suffix} {share:.0%}" for suffix, share in zip(FORMATS, shares, strict=True))
        missed = [suffix for suffix, share in zip(FORMATS, shares, strict=True) if share < SHARE_TARGET]
        verdict = f"MISSED for {', '.join(missed)}" if missed else "met"
        yield f"| {kind} | {reference:,.0f} | {cells} | {listed} | {verdict} |"


def measure_memory(folder: Path, sizes: list[float]) -> Iterator[str]:
    """Yield the lines of the table of peak memory, for inputs of `sizes` in GB."""
    if not (folder / "pca").exists():
        models_in(folder)
    output = folder / "memory"
    yield "| format | input | rows | time | peak memory |"
    yield "|---|---|---|---|---|"
    for suffix in ("npy", "csv"):
        peaks = []
        for size in sizes:
            data = folder / f"large.{suffix}"
            rows = write_large(data, int(size * 1e9))
            command = [sys.executable, __file__, "--score", str(folder), str(data), str(output)]
            result = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
                                    capture_output=True, text=True)  # fmt: skip
            seconds, peak = map(float, result.stdout.split()[-2:])
            peaks.append(peak)
            yield f"| {suffix} | {data.stat().st_size / 1e9:.2f} GB | {rows:,} | {seconds:.1f} s | {peak:.0f} MB |"
            data.unlink()
            shutil.rmtree(output)
        growth = peaks[-1] / peaks[0]
        verdict = "met" if growth <= FLAT_TARGET else "MISSED"
        yield f"| {suffix} | | | | × {growth:.2f} (target ≤ {FLAT_TARGET}: {verdict}) |"


def write_large(path: Path, size: int) -> int:
    """Write rows until the file has about `size` bytes, in constant memory. Return the number of rows."""
    x = rows_of(min(200_000, size // (4 * FEATURES)), 2)
    if path.suffix == ".csv":
        content = pl.DataFrame(x, schema=NAMES).write_csv(include_header=False).encode()
        copies = max(1, size // len(content))
        with path.open("wb") as file:
            file.write(f"{','.join(NAMES)}\n".encode())
            for _ in range(copies):
                file.write(content)
        return copies * len(x)
    copies = max(1, size // x.nbytes)
    shape = (copies * len(x), FEATURES)
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for _ in range(copies):
            file.write(x.tobytes())
    return shape[0]


def score_and_report(folder: Path, data: Path, output: Path) -> None:
    """Score a file in this process, and print the seconds and the peak memory in MB."""
    artifact = load(folder / "pca" / "1" / "model.pt")
    began = time.perf_counter()
    score_file(artifact, data, output, partial(score_locally, artifact))
    seconds = time.perf_counter() - began
    # `ru_maxrss` of getrusage would be at least the memory of the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(seconds, int(status.partition("VmHWM:")[2].split()[0]) / 1e3)


def measure_ray(folder: Path, rows: int) -> Iterator[str]:
    """Yield the lines of the table of one and two workers of Ray, each a node with one core."""
    from tests.ray_programs.cluster import two_nodes
    from training.ray_tasks import score_on_ray

    artifact = models_in(folder)["vae"]
    write_rows(folder / "rows.npy", rows_of(rows, 1))
    yield "| workers | rows/s | gain |"
    yield "|---|---|---|"
    with two_nodes():
        output = folder / "out"
        score_file(artifact, folder / "rows.npy", output, score_on_ray, workers=4)  # starts the processes
        speeds = {}
        for workers in (1, 2):
            work = partial(score_file, artifact, folder / "rows.npy", output, score_on_ray, workers)
            speeds[workers] = rows / best(work, output=output)
            gain = speeds[workers] / speeds[1]
            verdict = "" if workers == 1 else f" (target {GAIN_TARGET}: {'met' if gain >= GAIN_TARGET else 'MISSED'})"
            yield f"| {workers} | {speeds[workers]:,.0f} | × {gain:.2f}{verdict} |"


def main() -> None:
    """Measure, print the tables, and write each into its section of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of rows (default 1000000)")
    parser.add_argument(
        "--memory",
        type=float,
        nargs="+",
        metavar="GB",
        help="measure peak memory for inputs of these sizes, ascending",
    )
    parser.add_argument("--ray", action="store_true", help="measure one and two workers of Ray")
    parser.add_argument("--score", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument(
        "--smoke", action="store_true", help="20,000 rows, measured once, and inputs of 2 MB and 4 MB; no results file"
    )
    options = parser.parse_args()
    if options.score:
        score_and_report(*map(Path, options.score))
        return
    rows = 20_000 if options.smoke else options.rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.ray:
            section, lines = "ray", measure_ray(folder, rows)
        elif options.memory:
            section, lines = "memory", measure_memory(folder, options.memory)
        else:
            section, lines = "speed", measure_speed(folder, rows, options.smoke)
        text = [print_line(line) for line in lines]
        if options.smoke:
            for line in measure_memory(folder, [0.002, 0.004]):
                print_line(line)
            return
    machine = describe_machine("torch", "numpy", "polars")
    command = f"python benchmarks/anomaly/batch_scoring.py {' '.join(sys.argv[1:])}".strip()
    save(
        section,
        [f"`{command}`, {rows:,} rows, {machine}." if section != "memory" else f"`{command}`, {machine}.", "", *text],
    )


def print_line(line: str) -> str:
    """Print a line at once, and return it."""
    print(line, flush=True)
    return line


def save(section: str, lines: list[str]) -> None:
    """Replace one section of the results, and keep the others."""
    path = RESULTS / "batch_scoring.md"
    titles = {
        "speed": "Rows per second on one machine",
        "memory": "Peak memory of one process",
        "ray": "Ray: two workers against one, on two cores",
    }
    old = path.read_text().split("\n## ")[1:] if path.exists() else []
    sections = {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in old}
    sections[titles[section]] = "\n".join(lines)
    parts = [f"## {title}\n\n{sections[title]}" for title in titles.values() if title in sections]
    head = (
        "# `elbo score NAME DATA OUTPUT`\n\nThe docstring of `batch_scoring.py` says what is measured. PCA misses its "
        "target: it scores a row in less\nthan a microsecond, so reading the rows, and finding and writing their "
        "largest contributions, take most of the time."
    )
    path.write_text("\n\n".join([head, *parts]) + "\n")


if __name__ == "__main__":
    main()
