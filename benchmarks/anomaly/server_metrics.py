"""Alarms on servers' metrics: do the scores rank incidents, do alarms keep to alpha, do explanations name the cause?

Nine real servers, each with a stretch of training rows and a later one with labelled incidents and their causes. All
score the same rows: Elbo's kinds with the defaults of `elbo train`; the distance to the fifth nearest neighbour; and
PyOD's detectors with theirs, where `make bench-anomaly` has set up the peers' environment. All but Elbo's get
standardised rows. Smoothed is an exponentially weighted mean with a half-life of HALF_LIFE rows: of Elbo's severity, as
the service smooths; of the others' score. False alarms are the share of the normal test rows with a severity above 1 at
ALPHA: as trained, and after `elbo calibrate` on the first quarter of these rows, counted on the rest.

HitRate@100 %: of an incident with g true causes, the share of them among the g features of the largest contribution;
contributions are averaged over the incident's rows, hit rates over incidents. Su et al., "Robust anomaly detection for
multivariate time series through stochastic recurrent neural network" (OmniAnomaly), KDD 2019; by incident as Li et al.,
"Multivariate time series anomaly detection and interpretation using hierarchical inter-metric and temporal embedding"
(InterFusion), KDD 2021. Beside it the plain squared deviation from the training mean, z².

Prints Markdown. Without ELBO_DATA, or with `--smoke`, it runs on a made server. `--peers PYTHON` is the interpreter of
the peers.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors

from benchmarks.anomaly.one_class import KINDS, OneClass, fitted, servers, standardised
from benchmarks.data import ROOT, describe_machine
from models.calibration import Calibration
from service.anomaly.smoothing import exponential_mean

ALPHA, NEIGHBOURS, HALF_LIFE = 0.05, 5, 3.0
RECENT = 0.25  # of the normal test rows, which calibrate anew

Doubles = npt.NDArray[np.float64]
Measures = dict[str, float]


def ranking(labels: npt.NDArray[np.int64], score: Doubles) -> Measures:
    """AUROC and average precision of a score [M], of each row alone and smoothed in time."""
    smooth = exponential_mean(score, HALF_LIFE)
    found = {}
    for name, values in (("", score), ("smooth ", smooth)):
        found[f"{name}auroc"] = float(roc_auc_score(labels, values))
        found[f"{name}ap"] = float(average_precision_score(labels, values))
    return found


def hit_rate(contribution: npt.NDArray[np.floating], data: OneClass) -> float:
    """HitRate@100 %, the mean over incidents: contribution [M, D] of the test rows."""
    incidents: dict[tuple[int, int], set[int]] = {}
    for first, last, feature in data.causes:
        incidents.setdefault((first, last), set()).add(feature)
    rates = []
    for (first, last), true in incidents.items():
        mean = contribution[first : last + 1].mean(axis=0)
        top = np.argsort(-mean, kind="stable")[: len(true)]
        rates.append(len(true & set(top.tolist())) / len(true))
    return float(np.mean(rates))


def elbo(kind: str, data: OneClass, few: bool) -> Measures:
    """What a model of `kind` reaches."""
    pipeline, _ = fitted(kind, data, 0, few)
    with torch.no_grad():
        score, _, contribution, _ = pipeline.score(torch.from_numpy(data.test))
        severity = pipeline.severity(score, ALPHA).double().numpy()
        normal = score[torch.from_numpy(data.labels == 0)]
        recent = round(RECENT * len(normal))
        afresh = Calibration(normal[:recent]).severity(normal[recent:], ALPHA)
    return ranking(data.labels, severity) | {
        "false": float((severity[data.labels == 0] > 1).mean()),
        "false later": float((severity[data.labels == 0][recent:] > 1).mean()),
        "false afresh": float((afresh > 1).double().mean()),
        "hits": hit_rate(contribution.numpy(), data),
    }


def neighbours(data: OneClass) -> Measures:
    """The distance to the fifth nearest training row."""
    train, test = standardised(data)
    near = NearestNeighbors(n_neighbors=NEIGHBOURS, algorithm="brute").fit(train)
    distance = near.kneighbors(test)[0][:, -1].astype(np.float64)
    return ranking(data.labels, distance)


def deviation(data: OneClass) -> Measures:
    """The squared deviation from the training mean: summed as a score, by feature as an explanation."""
    square = np.square(standardised(data)[1], dtype=np.float64)
    total = square.sum(axis=1)
    return ranking(data.labels, total) | {"hits": hit_rate(square, data)}


def pyod(python: str, data: OneClass) -> Iterator[tuple[str, Measures]]:
    """What PyOD's detectors reach; nothing where they are not."""
    if not Path(python).exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        train, test = standardised(data)
        np.savez(Path(folder, "rows.npz"), train=train, test=test)
        script = ROOT / "benchmarks" / "anomaly_pyod.py"
        subprocess.run([python, str(script), folder], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with np.load(Path(folder, "scores", "rows.npz")) as found:
            for name, score in found.items():
                if np.isfinite(score).all():
                    yield name, ranking(data.labels, score.astype(np.float64))


@dataclass(frozen=True)
class Column:
    """Of a table: the key of a measure, and how it is headed."""

    key: str
    title: str


RANKINGS = [
    Column("auroc", "AUROC"), Column("ap", "AP"), Column("smooth auroc", "AUROC, smoothed"),
    Column("smooth ap", "AP, smoothed"),
]  # fmt: skip
ALARMS = [
    Column("false", "false alarms, as trained"), Column("false later", "of the later rows"),
    Column("false afresh", "of the later rows, calibrated on the earlier"),
]  # fmt: skip


def table(found: Mapping[str, Mapping[str, Measures]], columns: list[Column]) -> Iterator[str]:
    """A line a contestant: the means over the servers. `found` is by contestant, by server."""
    yield f"| | {' | '.join(column.title for column in columns)} |"
    yield f"|---|{'---|' * len(columns)}"
    for name, by_server in found.items():
        if all(column.key in next(iter(by_server.values())) for column in columns):
            means = (np.mean([measures[column.key] for measures in by_server.values()]) for column in columns)
            less = "" if len(by_server) == max(map(len, found.values())) else f" ({len(by_server)} servers)"
            yield f"| {name}{less} | {' | '.join(f'{mean:.3f}' for mean in means)} |"


def each(found: Mapping[str, Mapping[str, Measures]], keys: tuple[str, ...]) -> Iterator[str]:
    """A line a server: the measures `keys` of every contestant that has them."""
    those = [name for name, by_server in found.items() if keys[0] in next(iter(by_server.values()))]
    yield f"| server | {' | '.join(those)} |"
    yield f"|---|{'---|' * len(those)}"
    for server in next(iter(found.values())):
        cells = (
            " / ".join(f"{found[name][server][key]:.3f}" for key in keys) if server in found[name] else ""
            for name in those
        )
        yield f"| {server} | {' | '.join(cells)} |"


def main() -> None:
    """Let all score every server, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a made server, few epochs")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--peers", default=str(ROOT / ".venv-peers" / "bin" / "python"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, Measures]] = {}
    for data in servers(options.smoke):
        for kind in options.kinds.split(","):
            found.setdefault(f"Elbo {kind}", {})[data.name] = elbo(kind, data, options.smoke)
        found.setdefault("kNN", {})[data.name] = neighbours(data)
        found.setdefault("z²", {})[data.name] = deviation(data)
        for name, measures in () if options.smoke else pyod(options.peers, data):
            found.setdefault(name, {})[data.name] = measures
    print(describe_machine("torch"), end="\n\n")
    print("Means over the servers:\n", *table(found, RANKINGS), sep="\n")
    print(f"\nFalse alarms on normal rows at alpha {ALPHA}:\n", *table(found, ALARMS), sep="\n")
    print("\nCauses named:\n", *table(found, [Column("hits", "HitRate@100 %")]), sep="\n")
    print("\nEach server, AUROC / AP:\n", *each(found, ("auroc", "ap")), sep="\n")
    print("\nEach server, false alarms as trained / later / later and calibrated anew:\n", sep="\n")
    print(*each(found, ("false", "false later", "false afresh")), sep="\n")
    print("\nEach server, HitRate@100 %:\n", *each(found, ("hits",)), sep="\n")


if __name__ == "__main__":
    main()
