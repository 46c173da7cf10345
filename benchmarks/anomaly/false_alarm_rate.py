"""Measure the false-alarm rate on the metrics of nine real servers, with the fixed and with the online calibration.

    python benchmarks/anomaly/false_alarm_rate.py                  # pca, each row judged alone
    python benchmarks/anomaly/false_alarm_rate.py --window 30
    python benchmarks/anomaly/false_alarm_rate.py --kind ensemble
    python benchmarks/anomaly/false_alarm_rate.py --smoke          # a synthetic server

Each server has training rows and later test rows with labelled incidents. The training rows are split by time, as
`elbo train --time` does. The fixed calibration is that of the trained model. The online calibration starts from the
scores of the calibration rows, and then sees the test rows in order. It never sees a label.

The false-alarm rate is the share of the test rows without a label that have a severity above 1 at ALPHA. An incident is
found if one of its rows has. Its delay is the number of its rows before that row. Fewer alarms find fewer incidents, so
one column moves the fixed threshold, with the help of the labels, to the false-alarm rate of the online calibration.

It prints Markdown tables, and whether the targets are met.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from benchmarks.anomaly.one_class import KINDS, OneClass, servers
from benchmarks.data import describe_machine
from models.calibration import Calibration
from models.windows import summarise
from service.anomaly.online_calibration import OnlineCalibration
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Table
from training.data.timeline import Timeline
from training.fitting.pipeline import fit_pipeline
from training.fitting.windows import prepare
from training.progress import SilentReporter

ALPHA = 0.05
MEAN_TARGET = (0.04, 0.06)  # the mean rate of the servers
WORST_TARGET = 0.08  # the largest rate of a server
CHANGED_SERVER, CHANGE = "machine-1-6", 3180  # from this test row on, all scores of this server are much larger
RECOVERY_TARGET = 500  # rows after the change within which RECOVERED_ROWS rows begin that have few alarms
RECOVERED_ROWS, RECOVERED_RATE = 200, 0.1

Scores = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Verdicts:
    """The severities of the test rows by one calibration, [M]."""

    severity: npt.NDArray[np.float64]
    labels: Flags

    @property
    def alarms(self) -> Flags:
        """Which rows are anomalous, [M]."""
        return np.asarray(self.severity > 1)

    def rate(self, first: float = 0.0, last: float = 1.0) -> float:
        """Return the false-alarm rate within a part of the normal rows, given as shares of these rows."""
        normal = self.alarms[~self.labels]
        return float(normal[round(first * len(normal)) : round(last * len(normal))].mean())

    def delays(self) -> list[int | None]:
        """Return for each incident the number of its rows before the first alarm; None if it was not found."""
        return [
            int(self.alarms[start:end].argmax()) if self.alarms[start:end].any() else None
            for start, end in incidents(self.labels)
        ]

    def found(self) -> int:
        """Return how many incidents were found."""
        return sum(delay is not None for delay in self.delays())

    def mean_delay(self) -> float:
        """Return the mean delay of the found incidents."""
        return float(np.mean([float(delay) for delay in self.delays() if delay is not None] or [np.nan]))

    def ranking(self) -> str:
        """Return AUROC and average precision."""
        auroc = roc_auc_score(self.labels, self.severity)
        return f"{auroc:.3f} / {average_precision_score(self.labels, self.severity):.3f}"


@dataclass(frozen=True)
class Server:
    """The results for one server."""

    name: str
    fixed: Verdicts
    online: Verdicts
    moved: Verdicts  # the fixed calibration, with its threshold moved to the rate of the online one
    calibration: OnlineCalibration


def incidents(labels: Flags) -> list[tuple[int, int]]:
    """Return the first row of each incident, and the row after its last."""
    edges = np.flatnonzero(np.diff(labels.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def score_server(kind: str, window: int, data: OneClass, smoke: bool) -> tuple[Scores, Scores]:
    """Train a model of `kind`, and return the scores of its calibration rows, oldest first, and of the test rows."""
    rows, width = data.train.shape
    timeline = Timeline(
        time=np.arange(rows) * 60 * 10**9,
        group=np.zeros(rows, np.int32),
        groups=("",),
        time_column="time",
        group_column=None,
        source_rows=np.arange(rows),
    )
    table = Table(
        RowStore(data.train), (width,), [f"x{i}" for i in range(width)], [None] * width, None, None, data.name,
        missing=np.zeros(width, np.int64), timeline=timeline,
    )  # fmt: skip
    options: dict[str, object] = {"model": kind, "name": "bench", "seed": 0, "time": "time"}
    if window > 1:
        options["window"] = window
    if smoke and kind != "pca":
        options["epochs"] = 3
    config = TrainConfig.model_validate(options)
    prepared, _ = prepare(config, table)
    pipeline = fit_pipeline(config, prepared, SilentReporter())
    calibration = prepared.table.x.take(np.sort(prepared.split.calibration))
    with torch.no_grad():
        test = torch.from_numpy(data.test)
        if prepared.windows is not None:  # the first test rows have training rows before them
            all_rows = prepared.windows.scaling(torch.from_numpy(np.concatenate((data.train, data.test)))).numpy()
            summaries = summarise(all_rows, np.arange(len(all_rows)), prepared.windows.window.scales)
            test = torch.from_numpy(summaries[rows:])
        return tuple(  # type: ignore[return-value] # mypy does not count the elements
            torch.cat([pipeline.score(part)[0] for part in x.split(4096)]).numpy()
            for x in (torch.from_numpy(calibration), test)
        )


def judge(kind: str, window: int, data: OneClass, smoke: bool) -> Server:
    """Judge the test rows of a server with the fixed and the online calibration."""
    calibration_scores, scores = score_server(kind, window, data, smoke)
    labels = data.labels == 1
    online = OnlineCalibration(calibration_scores, window)
    fixed_severity = Calibration(torch.from_numpy(calibration_scores)).severity(torch.from_numpy(scores), ALPHA)
    online_severity = np.empty(len(scores))
    for row, score in enumerate(scores.tolist()):
        online_severity[row] = online.judge(score, ALPHA)[1]
        online.step(score)
    judged = Verdicts(online_severity, labels)
    threshold = np.quantile(scores[~labels], 1 - judged.rate())
    moved = Verdicts(np.where(scores > threshold, 2.0, 0.5), labels)
    return Server(data.name, Verdicts(fixed_severity.double().numpy(), labels), judged, moved, online)


def recovery(server: Server) -> int | None:
    """Return after how many rows after its change the alarms of CHANGED_SERVER are few again; None if never."""
    after = np.flatnonzero(~server.online.labels)
    after = after[after >= CHANGE]
    rates = np.convolve(server.online.alarms[after], np.full(RECOVERED_ROWS, 1 / RECOVERED_ROWS), "valid")
    low = np.flatnonzero(rates <= RECOVERED_RATE)
    return int(after[low[0]] - CHANGE) if len(low) else None


def table(results: list[Server]) -> Iterator[str]:
    """Yield the lines of the table of servers, and their means."""
    yield (
        "| server | rate, fixed: all, last half | rate, online: all, first quarter, last half | "
        "incidents found: fixed, online, fixed at the online rate | mean delay, rows: fixed, online | "
        "AUROC / AP of severities: fixed | online | incidents begun, changes, returns |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for server in results:
        fixed, online, state = server.fixed, server.online, server.calibration
        yield (
            f"| {server.name} | {fixed.rate():.3f}, {fixed.rate(0.5):.3f} | **{online.rate():.3f}**, "
            f"{online.rate(0, 0.25):.3f}, {online.rate(0.5):.3f} | {fixed.found()}, {online.found()}, "
            f"{server.moved.found()} of {len(online.delays())} | {fixed.mean_delay():.1f}, {online.mean_delay():.1f} | "
            f"{fixed.ranking()} | {online.ranking()} | {state.incidents}, {state.changes}, {state.returns} |"
        )

    def mean(values: Iterable[float]) -> str:
        return f"{np.mean(list(values)):.3f}"

    fixed_rates = [server.fixed.rate() for server in results]
    rates = [server.online.rate() for server in results]
    found = [(server.fixed.found(), server.online.found(), server.moved.found()) for server in results]
    delays = [(server.fixed.mean_delay(), server.online.mean_delay()) for server in results]
    yield (
        f"| mean (worst) | {mean(fixed_rates)} ({max(fixed_rates):.3f}), "
        f"{mean(server.fixed.rate(0.5) for server in results)} | **{mean(rates)} ({max(rates):.3f})**, "
        f"{mean(server.online.rate(0, 0.25) for server in results)}, "
        f"{mean(server.online.rate(0.5) for server in results)} | "
        f"{', '.join(map(str, np.sum(found, axis=0)))} of {sum(len(server.online.delays()) for server in results)} | "
        f"{', '.join(f'{delay:.1f}' for delay in np.mean(delays, axis=0))} | | | |"
    )


def targets(results: list[Server]) -> Iterator[str]:
    """Yield one line per target: what was measured, and whether it meets the target."""

    def verdict(met: bool) -> str:
        return "met" if met else "MISSED"

    rates = [server.online.rate() for server in results]
    low, high = MEAN_TARGET
    yield f"- mean rate {np.mean(rates):.3f}, target {low} to {high}: {verdict(bool(low <= np.mean(rates) <= high))}"
    yield f"- largest rate {max(rates):.3f}, target at most {WORST_TARGET}: {verdict(max(rates) <= WORST_TARGET)}"
    for server in results:
        if server.name == CHANGED_SERVER:
            rows = recovery(server)
            yield (
                f"- {CHANGED_SERVER}: {RECOVERED_ROWS} rows with at most {RECOVERED_RATE:.0%} alarms begin {rows} rows "
                f"after the change, target at most {RECOVERY_TARGET}: "
                f"{verdict(rows is not None and rows <= RECOVERY_TARGET)}"
            )


def main() -> None:
    """Measure all servers, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a synthetic server, few epochs")
    parser.add_argument("--kind", default="pca", choices=KINDS, help="kind of model (default pca)")
    parser.add_argument("--window", type=int, default=1, help="rows in the model's window (default 1: none)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = [judge(options.kind, options.window, data, options.smoke) for data in servers(options.smoke)]
    print(describe_machine("torch"), end="\n\n")
    print(*table(results), "", *targets(results), sep="\n")


if __name__ == "__main__":
    main()
