"""Simulate a year of many hosts whose metrics have daily and weekly seasons, and measure each host's false-alarm rate.

    python benchmarks/anomaly/simulated_hosts.py                 # 1,000 hosts
    python benchmarks/anomaly/simulated_hosts.py --hosts 100
    python benchmarks/anomaly/simulated_hosts.py --smoke         # 3 hosts

A host has a row every 30 minutes with six metrics. Each metric has its own level and scale. The load has a daily shape,
lower weekends and, on half of the hosts, another time zone. Noise grows with the load, depends on the noise before it
and has heavy tails. Levels drift slowly. There are gaps, incidents of 3 to 300 rows, and on one host in five a change
that stays. Six weeks fit the model, two weeks calibrate it, and the rest of the year is judged at ALPHA.

The score is the squared Mahalanobis distance. Four ways to compare it:

- one model for all hosts, one fixed threshold;
- a model per host, a fixed threshold per host;
- one model for all hosts, an online calibration per host;
- a model per host, the location and scale of log scores by season, an online calibration per host.

It prints a Markdown table, the cost of one row, and the memory of the calibrations of all hosts.
"""

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.signal import lfilter

from benchmarks.data import describe_machine
from service.anomaly.online_calibration import MAX_BYTES, OnlineCalibration

ALPHA = 0.05
MARGIN = 0.02  # the target: the rate of each host lies within ALPHA +- MARGIN
PER_DAY, DAYS, METRICS = 48, 365, 6
ROWS, FIT, JUDGED = PER_DAY * DAYS, 42 * PER_DAY, 56 * PER_DAY  # rows in all, rows that fit, first judged row
OTHER_HOSTS = 30  # the model for all hosts is fitted to these many other hosts

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

FIXED_POOL, FIXED_HOST = "one model and threshold", "fixed, per host"
ONLINE_POOL, ONLINE_SEASON = "one model, online per host", "per host, season, online"
WAYS = (FIXED_POOL, FIXED_HOST, ONLINE_POOL, ONLINE_SEASON)


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


def encode_season() -> Floats:
    """Return a constant, three harmonics of day and week, and products of both, [ROWS, 21]."""
    day = 2 * np.pi * np.arange(ROWS) / PER_DAY
    columns = [np.ones(ROWS)]
    for turn in (day, day / 7):
        columns += [function(harmonic * turn) for harmonic in (1, 2, 3) for function in (np.cos, np.sin)]
    columns += [columns[1 + i] * columns[7 + j] for i in range(2) for j in range(4)]
    return np.column_stack(columns)


SEASON = encode_season()


@dataclass(frozen=True)
class Mahalanobis:
    """Squared Mahalanobis distance from the mean of fit rows."""

    mean: Floats
    scale: Floats
    whitening: Floats

    @classmethod
    def fit(cls, x: Floats) -> "Mahalanobis":
        """Fit the distance to rows x."""
        mean, scale = x.mean(axis=0), x.std(axis=0)
        covariance = np.cov(((x - mean) / scale).T) + 1e-6 * np.eye(x.shape[1])
        return cls(mean, scale, np.linalg.cholesky(np.linalg.inv(covariance)))

    def score(self, x: Floats) -> Floats:
        """Return the scores of rows x."""
        scores: Floats = ((((x - self.mean) / self.scale) @ self.whitening) ** 2).sum(axis=1)
        return scores


def remove_season(score: Floats, fit: npt.NDArray[np.intp]) -> Floats:
    """Return (log score - location) / scale, which ridge regressions on the season predict."""
    log_score = np.log(score + 1e-6)
    residual = log_score - SEASON @ _ridge(SEASON[fit], log_score[fit], 30.0)
    scale = SEASON @ _ridge(SEASON[fit], np.abs(residual[fit]), 300.0)
    adjusted: Floats = np.asarray(residual / np.maximum(scale, 0.2), np.float64)
    return adjusted


def _ridge(encodings: Floats, values: Floats, penalty: float) -> Floats:
    penalties = penalty * np.diag([0.0] + [1.0] * (encodings.shape[1] - 1))
    solution: Floats = np.asarray(np.linalg.solve(encodings.T @ encodings + penalties, encodings.T @ values), float)
    return solution


def fit_for_all(seed: int) -> tuple[Mahalanobis, Floats]:
    """Return the model for all hosts, and its scores of calibration rows. Both come from other hosts."""
    others = [simulate(seed, 10**6 + number).x[:JUDGED] for number in range(OTHER_HOSTS)]
    model = Mahalanobis.fit(np.vstack([x[:FIT] for x in others]))
    return model, np.concatenate([model.score(x[FIT:]) for x in others])


def judge_host(task: tuple[int, int, Mahalanobis, Floats]) -> Result:
    """Judge the year of one host in all ways."""
    seed, number, for_all, scores_for_all = task
    host = simulate(seed, number)
    present = np.flatnonzero(~host.is_missing)
    fit, calibration = present[present < FIT], present[(present >= FIT) & (present < JUDGED)]
    judged = present[present >= JUDGED]
    pooled = for_all.score(host.x)
    own = Mahalanobis.fit(host.x[fit]).score(host.x)
    seasonless = remove_season(own, fit)
    result = Result()
    alarms = {
        FIXED_POOL: pooled[judged] > np.quantile(scores_for_all, 1 - ALPHA),
        FIXED_HOST: own[judged] > np.quantile(own[calibration], 1 - ALPHA),
        ONLINE_POOL: judge_online(pooled[calibration], pooled[judged], result),
        ONLINE_SEASON: judge_online(seasonless[calibration], seasonless[judged], result),
    }
    for way, found in alarms.items():
        result.measures[way] = measure(host, judged, found)
    return result


def judge_online(calibration: Floats, scores: Floats, result: Result) -> Flags:
    """Return which scores raise an alarm, and note how long it took."""
    start = time.process_time()
    online = OnlineCalibration(calibration)
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
    for_all, scores = fit_for_all(options.seed)
    tasks = [(options.seed, number, for_all, scores) for number in range(hosts)]
    with ProcessPoolExecutor(options.processes) as pool:
        results = list(pool.map(judge_host, tasks, chunksize=max(1, min(20, hosts // options.processes))))
    print(describe_machine("numpy", "scipy"), end="\n\n")
    print_table(results)


if __name__ == "__main__":
    main()
