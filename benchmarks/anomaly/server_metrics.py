"""Measure anomaly detection on the metrics of nine real servers: ranking, false alarms and explanations.

    python benchmarks/anomaly/server_metrics.py            # `make bench-anomaly` also installs PyOD
    python benchmarks/anomaly/server_metrics.py --smoke    # a synthetic server, few epochs

Each server has training rows and later test rows. The test rows have labelled incidents with known causes. The
detectors are:

- Elbo's models with the defaults of `elbo train`;
- Elbo's models with a window of WINDOW rows, which judge each row together with the rows before it. Their training rows
  are split by time. For "blocks", they are split with `--split blocks`;
- kNN: the distance to the fifth nearest training row;
- z²: the squared deviation from the training mean;
- PyOD's detectors with default options.

All detectors except Elbo's get standardised rows.

Ranking: AUROC and average precision (AP), for scores and for smoothed scores. A smoothed score is an exponentially
weighted mean with a half-life of HALF_LIFE rows. For Elbo's models the severity is ranked and smoothed instead of the
score, as in the service.

False alarms: the share of normal test rows with a severity above 1 at ALPHA. The share is measured for the models as
trained, and for the same models after recalibration on the first quarter of the normal test rows. Recalibration works
like `elbo calibrate`. After recalibration, only the last three quarters are counted.

Explanations: HitRate@100 %. For an incident with g true causes, the hit rate is the share of the true causes that are
among the g features with the largest contributions. Contributions are averaged over the rows of an incident. Hit rates
are averaged over the incidents. The measure is from Su et al., "Robust anomaly detection for multivariate time series
through stochastic recurrent neural network", KDD 2019. Averaging per incident follows Li et al., "Multivariate time
series anomaly detection and interpretation using hierarchical inter-metric and temporal embedding", KDD 2021.

Without the servers' files the benchmark uses a synthetic server. It prints Markdown tables.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors

from benchmarks.anomaly.one_class import (
    KINDS,
    OneClass,
    score_series,
    servers,
    standardise,
    train_model,
    train_windowed,
)
from benchmarks.data import ROOT, describe_machine
from models.calibration import Calibration
from models.pipeline import Pipeline
from models.windowed import Windowed
from service.anomaly.smoothing import exponential_mean
from training.data.time_split import SplitName

ALPHA = 0.05
NEIGHBOURS = 5
WINDOW = 30  # rows; what `elbo train --window auto` chooses for these servers
HALF_LIFE = 3.0  # half-life of a row's weight in the smoothed score, in rows
RECALIBRATION_SHARE = 0.25  # recalibration uses this share of the normal test rows, the earliest ones

Doubles = npt.NDArray[np.float64]
Measures = dict[str, float]


def ranking(labels: npt.NDArray[np.int64], score: Doubles) -> Measures:
    """Return AUROC and average precision of scores [M], before and after smoothing in time."""
    smooth = exponential_mean(score, HALF_LIFE)
    measures = {}
    for prefix, values in (("", score), ("smooth ", smooth)):
        measures[f"{prefix}auroc"] = float(roc_auc_score(labels, values))
        measures[f"{prefix}ap"] = float(average_precision_score(labels, values))
    return measures


def hit_rate(contribution: npt.NDArray[np.floating], data: OneClass) -> float:
    """Return HitRate@100 %, averaged over incidents, given the contributions [M, D] of the test rows."""
    incidents: dict[tuple[int, int], set[int]] = {}
    for first, last, feature in data.causes:
        incidents.setdefault((first, last), set()).add(feature)
    rates = []
    for (first, last), causes in incidents.items():
        mean = contribution[first : last + 1].mean(axis=0)
        largest = np.argsort(-mean, kind="stable")[: len(causes)]
        rates.append(len(causes & set(largest.tolist())) / len(causes))
    return float(np.mean(rates))


def measure_elbo(kind: str, data: OneClass, smoke: bool) -> Measures:
    """Train a model of `kind`, and measure its ranking, false alarms and explanations."""
    pipeline, _ = train_model(kind, data, seed=0, smoke=smoke)
    with torch.no_grad():
        score, _, contribution, _ = pipeline.score(torch.from_numpy(data.test))
    return _measures(data, pipeline, score, contribution.numpy())


def measure_windowed(kind: str, data: OneClass, smoke: bool, split: SplitName) -> Measures:
    """Train a model of `kind` with a window, and measure the same as `measure_elbo`."""
    model = train_windowed(kind, data, WINDOW, seed=0, smoke=smoke, split=split)
    return _measures(data, model, *score_series(model, data.test))


def _measures(
    data: OneClass, model: Pipeline | Windowed, score: torch.Tensor, contribution: npt.NDArray[np.floating]
) -> Measures:
    with torch.no_grad():
        severity = model.severity(score, ALPHA).double().numpy()
        normal = score[torch.from_numpy(data.labels == 0)]
        earlier = round(RECALIBRATION_SHARE * len(normal))
        recalibrated = Calibration(normal[:earlier]).severity(normal[earlier:], ALPHA)
    return ranking(data.labels, severity) | {
        "false": float((severity[data.labels == 0] > 1).mean()),
        "false later": float((severity[data.labels == 0][earlier:] > 1).mean()),
        "false recalibrated": float((recalibrated > 1).double().mean()),
        "hits": hit_rate(contribution, data),
    }


def measure_nearest_neighbours(data: OneClass) -> Measures:
    """Measure the ranking by the distance to the fifth nearest training row."""
    train, test = standardise(data)
    neighbours = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(train)
    distance = neighbours.kneighbors(test)[0][:, -1].astype(np.float64)
    return ranking(data.labels, distance)


def measure_squared_deviation(data: OneClass) -> Measures:
    """Measure the squared deviation from the training mean.

    The sum over the features is the score. The value for one feature is the contribution of that feature.
    """
    square = np.square(standardise(data)[1], dtype=np.float64)
    total = square.sum(axis=1)
    return ranking(data.labels, total) | {"hits": hit_rate(square, data)}


def measure_pyod(python: str, data: OneClass) -> Iterator[tuple[str, Measures]]:
    """Yield the measures of PyOD's detectors, or nothing if the interpreter `python` does not exist."""
    if not Path(python).exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        train, test = standardise(data)
        np.savez(Path(folder, "rows.npz"), train=train, test=test)
        script = Path(__file__).with_name("pyod_detectors.py")
        subprocess.run([python, str(script), folder], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with np.load(Path(folder, "scores", "rows.npz")) as scores:
            for name, score in scores.items():
                if np.isfinite(score).all():
                    yield name, ranking(data.labels, score.astype(np.float64))


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of the measure that it shows, and the title."""

    key: str
    title: str


RANKINGS = [
    Column("auroc", "AUROC"), Column("ap", "AP"), Column("smooth auroc", "AUROC, smoothed"),
    Column("smooth ap", "AP, smoothed"),
]  # fmt: skip
ALARMS = [
    Column("false", "as trained, all rows"), Column("false later", "as trained, last three quarters"),
    Column("false recalibrated", "recalibrated on the first quarter, last three quarters"),
]  # fmt: skip


def mean_table(results: Mapping[str, Mapping[str, Measures]], columns: list[Column]) -> Iterator[str]:
    """Yield the lines of a table that shows means over servers, with one row per detector.

    Args:
        results: measures by detector and server.
        columns: columns of the table. A detector that lacks the measure of a column is omitted.
    """
    yield f"| | {' | '.join(column.title for column in columns)} |"
    yield f"|---|{'---|' * len(columns)}"
    for name, by_server in results.items():
        if all(column.key in next(iter(by_server.values())) for column in columns):
            means = (np.mean([measures[column.key] for measures in by_server.values()]) for column in columns)
            is_complete = len(by_server) == max(map(len, results.values()))
            suffix = "" if is_complete else f" ({len(by_server)} servers)"
            yield f"| {name}{suffix} | {' | '.join(f'{mean:.3f}' for mean in means)} |"


def server_table(results: Mapping[str, Mapping[str, Measures]], keys: tuple[str, ...]) -> Iterator[str]:
    """Yield the lines of a table that shows the measures `keys` of each detector, with one row per server."""
    names = [name for name, by_server in results.items() if keys[0] in next(iter(by_server.values()))]
    yield f"| server | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    for server in next(iter(results.values())):
        cells = (
            " / ".join(f"{results[name][server][key]:.3f}" for key in keys) if server in results[name] else ""
            for name in names
        )
        yield f"| {server} | {' | '.join(cells)} |"


def main() -> None:
    """Measure all detectors on all servers, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a synthetic server, few epochs")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of Elbo's models, comma-separated")
    parser.add_argument("--windows", default=",".join(KINDS), help="kinds that are also trained with a window")
    parser.add_argument("--blocks", default="", help="kinds that are also trained with a window and --split blocks")
    parser.add_argument("--servers", default="", help="names of servers, comma-separated; default: all")
    parser.add_argument(
        "--peers",
        default=str(ROOT / ".venv-peers" / "bin" / "python"),
        metavar="PYTHON",
        help="interpreter with PyOD (default that of make bench-anomaly)",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[str, Measures]] = {}
    windowed: list[tuple[str, str, SplitName]] = [
        (options.windows, "", "newest"),
        (options.blocks, ", blocks", "blocks"),
    ]
    for data in servers(options.smoke):
        if options.servers and data.name not in options.servers.split(","):
            continue
        for kind in filter(None, options.kinds.split(",")):
            results.setdefault(f"Elbo {kind}", {})[data.name] = measure_elbo(kind, data, options.smoke)
        for kinds, suffix, split in windowed:
            for kind in filter(None, kinds.split(",")):
                measures = measure_windowed(kind, data, options.smoke, split)
                results.setdefault(f"Elbo {kind}, window{suffix}", {})[data.name] = measures
                print(data.name, kind, suffix, {k: round(v, 3) for k, v in measures.items()}, file=sys.stderr)
        results.setdefault("kNN", {})[data.name] = measure_nearest_neighbours(data)
        results.setdefault("z²", {})[data.name] = measure_squared_deviation(data)
        for name, measures in () if options.smoke else measure_pyod(options.peers, data):
            results.setdefault(name, {})[data.name] = measures
    print(describe_machine("torch"), end="\n\n")
    print("Ranking, means over servers:\n", *mean_table(results, RANKINGS), sep="\n")
    print(f"\nFalse-alarm rate on normal test rows at alpha {ALPHA}, means:\n", *mean_table(results, ALARMS), sep="\n")
    print("\nExplanations, means:\n", *mean_table(results, [Column("hits", "HitRate@100 %")]), sep="\n")
    print("\nAUROC / AP per server:\n", *server_table(results, ("auroc", "ap")), sep="\n")
    print("\nFalse-alarm rate per server: all rows / last three quarters / these, recalibrated:\n")
    print(*server_table(results, ("false", "false later", "false recalibrated")), sep="\n")
    print("\nHitRate@100 % per server:\n", *server_table(results, ("hits",)), sep="\n")


if __name__ == "__main__":
    main()
