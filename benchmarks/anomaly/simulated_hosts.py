"""Simulate a year of many hosts whose metrics have daily and weekly seasons, and measure each host's false-alarm rate.

    python benchmarks/anomaly/simulated_hosts.py                 # 1,000 hosts
    python benchmarks/anomaly/simulated_hosts.py --hosts 100
    python benchmarks/anomaly/simulated_hosts.py --smoke         # 3 hosts

A host has a row every 30 minutes with six metrics. Each metric has its own level and scale. The load has a daily shape,
lower weekends and, on half of the hosts, another time zone. Noise grows with the load, depends on the noise before it
and has heavy tails. Levels drift slowly. There are gaps, incidents of 3 to 300 rows, and on one host in five a change
that stays.

One model is trained on the first eight weeks of all hosts, as `elbo train --model pca --time time --group host --season
day,week` trains it. The rest of the year is judged at ALPHA, in four ways that use more and more of Elbo:

- the threshold of the model, the same for all hosts;
- the online calibration of each host, which compares scores;
- the start set of each host, which compares scores adjusted by the host and the season, and never changes;
- the online calibration of each host, which compares adjusted scores: what the service does.

It prints a Markdown table, the cost of one row, and the memory of the calibrations of all hosts.
"""

import argparse
import math
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from scipy.signal import lfilter

from benchmarks.data import describe_machine
from models.artifact import Artifact, load
from service.anomaly.online_calibration import MAX_BYTES, OnlineCalibration
from training.config import TrainConfig
from training.data.table import read_table
from training.progress import SilentReporter
from training.train import train

ALPHA = 0.05
MARGIN = 0.02  # the target: the rate of each host lies within ALPHA +- MARGIN
PER_DAY, DAYS, METRICS = 48, 365, 6
ROWS, JUDGED = PER_DAY * DAYS, 56 * PER_DAY  # rows in all, first judged row
FIRST, STEP = 1_704_067_200, 86_400 // PER_DAY  # Unix time of the first row (a Monday), and seconds between two rows

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

FIXED, ONLINE = "threshold of the model", "online, scores"
SEASON, SEASON_ONLINE = "host and season", "host and season, online"
WAYS = (FIXED, ONLINE, SEASON, SEASON_ONLINE)


@dataclass(frozen=True)
class Host:
    """The simulated year of one host."""

    x: Floats  # [ROWS, METRICS]
    is_incident: Flags
    is_missing: Flags


@dataclass
class Measures:
    """What one way of judging gave on one host. `by_hour`: alarms and normal rows, [2, 24]."""

    rate: float
    by_hour: Floats
    incidents: int
    found: int


@dataclass
class Result:
    """The measures of one host by way, and the seconds and rows of its online calibrations."""

    measures: dict[str, Measures] = field(default_factory=dict)
    seconds: float = 0.0
    rows: int = 0


def simulate(seed: int, number: int) -> Host:
    """Return the year of one host."""
    random = np.random.default_rng([seed, number])
    row = np.arange(ROWS)
    angle = 2 * np.pi * row / PER_DAY
    zone = random.uniform(0, 2 * np.pi) if random.random() < 0.5 else 0.0
    is_weekend = (row // PER_DAY) % 7 >= 5
    day = np.maximum(np.cos(angle + zone) + 0.4 * np.cos(2 * angle + zone), -0.6)
    slow = lfilter([0.5 * math.sqrt(1 - 0.95**2)], [1, -0.95], random.standard_normal(ROWS))
    load = random.uniform(0.5, 3) * day * (1 - random.uniform(0.2, 0.8) * is_weekend) + slow
    busy = 1 + random.uniform(0, 0.8) * np.clip(day, 0, None)  # noise is louder when the host is busy
    noise = np.column_stack([_noise(random, memory) for memory in random.uniform(0.2, 0.9, METRICS)])
    scale = np.exp(random.normal(0, 0.7, METRICS))
    x = random.normal(0, 5, METRICS) + scale * (
        load[:, None] * random.uniform(0.3, 1.5, METRICS) + busy[:, None] * noise
    )
    deviation = x.std(axis=0)
    x += np.cumsum(random.standard_normal((DAYS, METRICS)) * 0.03, axis=0)[row // PER_DAY] * deviation * 0.5
    if random.random() < 0.2:
        changed = int(random.integers(JUDGED + 30 * PER_DAY, ROWS - 30 * PER_DAY))
        metrics = random.choice(METRICS, 2, replace=False)
        x[changed:, metrics] += 1.5 * deviation[metrics] * random.choice([-1, 1], 2)
    is_incident = np.zeros(ROWS, bool)
    for _ in range(random.poisson(6)):
        first = int(random.integers(JUDGED + PER_DAY, ROWS - 400))
        last = first + int(np.exp(random.uniform(np.log(3), np.log(300))))
        metrics = random.choice(METRICS, random.integers(1, 4), replace=False)
        size = random.uniform(0.7, 2.5, len(metrics)) * random.choice([-1, 1], len(metrics))
        x[first:last, metrics] += deviation[metrics] * size
        is_incident[first:last] = True
    is_missing = np.zeros(ROWS, bool)
    for _ in range(random.poisson(40)):
        first = int(random.integers(0, ROWS))
        is_missing[first : first + int(random.geometric(1 / 30))] = True
    return Host(x, is_incident, is_missing)


def _noise(random: np.random.Generator, memory: float) -> Floats:
    """Return first-order autoregressive noise with unit variance and heavy tails, [ROWS]."""
    steps = random.standard_t(5, ROWS) * math.sqrt(3 / 5)
    noise: Floats = lfilter([math.sqrt(1 - memory**2)], [1, -memory], steps).astype(np.float64)
    return noise


def train_model(hosts: int, seed: int, folder: Path, processes: ProcessPoolExecutor) -> Path:
    """Return the artifact of a model that is trained on the first weeks of all hosts."""
    tasks = [(seed, number) for number in range(hosts)]
    history = folder / "history.parquet"
    pl.concat(list(processes.map(history_of, tasks, chunksize=20))).write_parquet(history)
    config = TrainConfig(model="pca", name="hosts", time="time", group="host", season=("day", "week"))
    return train(config, read_table(str(history), time="time", group="host"), folder, SilentReporter())


def history_of(task: tuple[int, int]) -> pl.DataFrame:
    """Return the rows of one host before the judged rows."""
    seed, number = task
    host = simulate(seed, number)
    rows = np.flatnonzero(~host.is_missing[:JUDGED])
    columns = {f"metric {metric}": host.x[rows, metric].astype(np.float32) for metric in range(METRICS)}
    return pl.DataFrame({"time": FIRST + STEP * rows, "host": np.full(len(rows), name_of(number)), **columns})


def name_of(number: int) -> str:
    """Return the name of a host."""
    return f"host-{number:04}"


@cache
def load_once(path: Path) -> Artifact:
    """Return the artifact at `path`."""
    torch.set_num_threads(1)
    return load(path)


def judge_host(task: tuple[int, int, Path]) -> Result:
    """Judge the year of one host in all ways."""
    seed, number, path = task
    artifact, host = load_once(path), simulate(seed, number)
    baseline = artifact.baseline
    assert baseline is not None
    judged = np.flatnonzero(~host.is_missing)
    judged = judged[judged >= JUDGED]
    with torch.inference_mode():
        scores = artifact.module.score(torch.from_numpy(host.x[judged].astype(np.float32)))[0].numpy()
        fixed = artifact.module.severity(torch.from_numpy(scores), ALPHA).numpy() > 1
    calibration = artifact.calibration["scores"].numpy()
    group = baseline.find(name_of(number))
    adjusted = baseline.adjust(scores, np.full(len(judged), group), FIRST + STEP * judged.astype(np.float64))
    start = baseline.start_set(group)[0]
    result = Result()
    alarms = {
        FIXED: fixed,
        ONLINE: judge_online(np.quantile(calibration, np.linspace(0, 1, len(start))), scores, result),
        SEASON: adjusted > start[-int(ALPHA * (len(start) + 1))],
        SEASON_ONLINE: judge_online(start, adjusted, result),
    }
    for way, found in alarms.items():
        result.measures[way] = measure(host, judged, found)
    return result


def judge_online(start_set: npt.NDArray[np.floating], scores: npt.NDArray[np.float32], result: Result) -> Flags:
    """Return which scores raise an alarm, and note how long it took."""
    start = time.process_time()
    online = OnlineCalibration(np.random.default_rng(0).permutation(start_set).tolist())
    alarms = []
    for score in scores.tolist():
        before = online.alarms
        online.step(score)
        alarms.append(online.alarms > before)
    result.seconds += time.process_time() - start
    result.rows += len(scores)
    return np.array(alarms)


def measure(host: Host, judged: npt.NDArray[np.intp], alarms: Flags) -> Measures:
    """Measure the alarms of the judged rows of one host."""
    is_normal = ~host.is_incident[judged]
    hour = (judged % PER_DAY) * 24 // PER_DAY
    counts = np.bincount(hour[is_normal], minlength=24).astype(float)
    by_hour = np.array([np.bincount(hour[is_normal], alarms[is_normal], 24), counts])
    is_alarm = np.zeros(ROWS, bool)
    is_alarm[judged] = alarms
    edges = np.flatnonzero(np.diff(host.is_incident.astype(np.int8), prepend=0, append=0))
    seen = [slice(*edge) for edge in edges.reshape(-1, 2) if not host.is_missing[slice(*edge)].all()]
    found = sum(bool(is_alarm[rows].any()) for rows in seen)
    return Measures(float(alarms[is_normal].mean()), by_hour, len(seen), found)


def print_table(results: list[Result]) -> None:
    """Print the table, the cost of a row and the memory of the calibrations."""
    print("| calibration | mean rate | 1 % | 99 % | farthest from 5 % | hosts within 2 points | rate by hour | found |")
    print("|---|---|---|---|---|---|---|---|")
    for way in WAYS:
        measures = [result.measures[way] for result in results]
        rates = np.array([one.rate for one in measures])
        low, high = np.quantile(rates, (0.01, 0.99))
        alarms, rows = np.sum([one.by_hour for one in measures], axis=0)
        hours = alarms / rows
        found = sum(one.found for one in measures) / max(1, sum(one.incidents for one in measures))
        within = np.mean(np.abs(rates - ALPHA) <= MARGIN)
        print(
            f"| {way} | {rates.mean():.3f} | {low:.3f} | {high:.3f} | {rates[np.abs(rates - ALPHA).argmax()]:.3f} | "
            f"{within:.1%} | {hours.min():.3f} to {hours.max():.3f} | {found:.3f} |"
        )
    seconds, rows = sum(result.seconds for result in results), sum(result.rows for result in results)
    print(f"\nOne row costs {seconds / rows * 1e6:.1f} us of a core in the online calibration.")
    print(f"The online calibrations of {len(results):,} hosts are at most {len(results) * MAX_BYTES / 1e6:.1f} MB.")


def main() -> None:
    """Simulate all hosts, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=1000, help="number of hosts (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the simulation (default 0)")
    parser.add_argument("--processes", type=int, default=2, help="number of processes (default 2)")
    parser.add_argument("--smoke", action="store_true", help="3 hosts")
    options = parser.parse_args()
    hosts = 3 if options.smoke else options.hosts
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(options.processes) as pool:
        path = train_model(hosts, options.seed, Path(folder), pool)
        tasks = [(options.seed, number, path) for number in range(hosts)]
        results = list(pool.map(judge_host, tasks, chunksize=max(1, min(20, hosts // options.processes))))
    print(describe_machine("numpy", "scipy", "torch"), end="\n\n")
    print_table(results)


if __name__ == "__main__":
    main()
