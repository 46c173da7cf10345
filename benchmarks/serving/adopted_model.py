"""Compare an adopted network behind Elbo with the same network behind plain FastAPI and behind LitServe.

    python benchmarks/serving/adopted_model.py            # after make .venv-peers-litserve/.ready
    python benchmarks/serving/adopted_model.py --smoke    # only checks that the benchmark works

The network is a trained autoencoder (64-64-32-8-32-64-64) with a StandardScaler. FastAPI and LitServe load what people
save: `model.pth`, the scaler, and a threshold. Elbo serves the artifact that `training.adoption.adopt` publishes. All
servers return the reconstruction of each row in raw units and its mean squared error; the programs in `peers/` also
compare the error with the threshold. Each server has two worker processes with one torch thread each.

Only one server runs at a time. In each round, every server is started anew and measured, so that changes in the
machine's speed affect all servers alike; the order of the servers alternates from round to round. Before each
measurement, a response is compared with the output of the network in this process. The table shows medians over the
rounds, and the ratios are medians of the ratios within a round.

The benchmark needs Linux. Install wrk if you want to quote the results.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

import joblib
import numpy as np
import torch
from sklearn.preprocessing import StandardScaler

from benchmarks.data import describe_machine
from benchmarks.serving.load_generators import WRK, Sample, run_closed_loop
from benchmarks.serving.measurement import Column, MeasuredServer, check_response, wait_until_ready
from benchmarks.serving.peers.adopted_network import FEATURES, Autoencoder
from benchmarks.serving.server_process import adopt_orphans, free_port
from benchmarks.serving.servers import ListProtocol, ServerKind, package_versions
from benchmarks.serving.workload import BATCH_SIZES, Workload
from models.artifact import load
from service.inference.backend_selection import select_backend
from training.adoption.adopt import adopt
from training.progress import SilentReporter

CORES = 2
NAME = "adopted"
COLUMNS = (Column(32, 1), Column(32, 32))
TARGETS = {COLUMNS[0]: 3.0, COLUMNS[1]: 5.0}  # the rate of Elbo divided by that of plain FastAPI
WARM_UP_SECONDS = 1.0
Rates = dict[str, dict[Column, list[Sample]]]


def correlated_rows(rows: int, seed: int) -> np.ndarray:
    """Return rows [N, FEATURES] that depend on 8 random factors, with different means and scales."""
    mixing = np.random.RandomState(0).standard_normal((8, FEATURES))
    random = np.random.RandomState(seed)
    x = random.standard_normal((rows, 8)) @ mixing + 0.3 * random.standard_normal((rows, FEATURES))
    return np.asarray(x * np.linspace(0.5, 20.0, FEATURES) + np.linspace(-50.0, 100.0, FEATURES))


def create_workload(folder: Path) -> Workload:
    """Train a network, save its weights, its scaler and its threshold in `folder`, and adopt it there."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    fit, calibration = correlated_rows(4000, seed=1), correlated_rows(2000, seed=2)
    scaler, network = StandardScaler().fit(fit), Autoencoder()
    units = torch.tensor(scaler.transform(fit)).float()
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(20):
        for part in units[torch.randperm(len(units))].split(128):
            loss = (network(part) - part).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    network.eval().requires_grad_(False)
    torch.save(network.state_dict(), folder / "model.pth")
    joblib.dump(scaler, folder / "scaler.joblib")
    parts = {"mean": scaler.mean_, "scale": scaler.scale_}
    torch.save({name: torch.tensor(part).float() for name, part in parts.items()}, folder / "scaler.pt")
    errors = ((_reconstruct(network, scaler, calibration) - calibration) ** 2).mean(axis=1)
    (folder / "threshold.txt").write_text(str(float(np.quantile(errors, 0.95))))
    path = adopt(
        network, calibration, name=NAME, artifacts=folder / "artifacts", fit_rows=fit, scaler=scaler,
        report=SilentReporter(),
    )  # fmt: skip
    artifact = load(path)
    rows = {count: correlated_rows(count, seed=3).astype(np.float32) for count in BATCH_SIZES}
    outputs = {count: _reconstruct(network, scaler, x).astype(np.float32) for count, x in rows.items()}
    return Workload(
        folder=folder,
        model=folder / "model.pth",
        module=artifact.module,
        twin=select_backend(artifact, requested="onnx").backend,
        rows=rows,
        outputs=outputs,
        few_features=rows[1],
    )


def _reconstruct(network: Autoencoder, scaler: StandardScaler, x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        units = network(torch.tensor(scaler.transform(x.astype(np.float64))).float())
    return np.asarray(scaler.inverse_transform(units.numpy().astype(np.float64)))


def server_kinds() -> dict[str, ServerKind]:
    """Return the servers by name."""

    def arguments(model: Path, port: int) -> list[str]:
        return [str(model), str(port)]

    peers = "benchmarks.serving.peers"
    return {
        "elbo": ServerKind("Elbo", ListProtocol(f"/reconstruct?model={NAME}"), "service", lambda *_: []),
        "fastapi": ServerKind("plain FastAPI", ListProtocol("/reconstruct"), f"{peers}.adopted_fastapi", arguments),
        "litserve": ServerKind(
            "LitServe", ListProtocol("/predict"), f"{peers}.adopted_litserve", arguments, "litserve"
        ),
    }


def measure_round(servers: dict[str, ServerKind], workload: Workload, seconds: float, rates: Rates) -> None:
    """Start and measure each server once, and add the samples to `rates`.

    Raises:
        RuntimeError: a server does not start, exits, or gives a wrong response.
    """
    for name, kind in servers.items():
        server = MeasuredServer(name, kind, workload, {"ELBO_WORKERS": "2"})
        port = free_port()
        with server.start(port) as process:
            wait_until_ready(process, port, server)
            for column in COLUMNS:
                request = kind.protocol.create_request(workload.rows[column.rows], binary=False)
                assert request is not None
                size = check_response(port, request, server, column)
                run_closed_loop(port, request, size, column.connections, min(seconds, WARM_UP_SECONDS))
                before = process.processor_seconds()
                sample = run_closed_loop(port, request, size, column.connections, seconds)
                cost = (process.processor_seconds() - before) / max(sample.rate * seconds, 1.0)
                rates.setdefault(name, {}).setdefault(column, []).append(replace(sample, cost=cost))
            process.require_alive()


def print_tables(servers: dict[str, ServerKind], rates: Rates) -> bool:
    """Print the rates, the latencies and the ratios. Return whether the targets are met."""
    print("\nCorrect responses per second, median (min, max); processor time per response:\n")
    print(f"|  | {' | '.join(column.title for column in COLUMNS)} |")
    print(f"|---{'|---' * len(COLUMNS)}|")
    for name, kind in servers.items():
        cells = []
        for column in COLUMNS:
            samples = rates[name][column]
            found = [sample.rate for sample in samples]
            cost = 1e3 * median(sample.cost for sample in samples)
            cells.append(f"{median(found):,.0f} ({min(found):,.0f}, {max(found):,.0f}); {cost:.2f} ms")
        print(f"| {kind.title} | {' | '.join(cells)} |")
    print("\nThe rate of Elbo divided by that of the other server, median (min, max) of the rounds:\n")
    print(f"|  | {' | '.join(column.title for column in COLUMNS)} |")
    print(f"|---{'|---' * len(COLUMNS)}|")
    is_met = True
    for name, kind in servers.items():
        if name == "elbo":
            continue
        cells = []
        for column in COLUMNS:
            pairs = zip(rates["elbo"][column], rates[name][column], strict=True)
            ratios = [ours.rate / theirs.rate if theirs.rate else float("inf") for ours, theirs in pairs]
            target = f"; target {TARGETS[column]:g}" if name == "fastapi" else ""
            is_met = is_met and (name != "fastapi" or median(ratios) >= TARGETS[column])
            cells.append(f"{median(ratios):.1f} ({min(ratios):.1f}, {max(ratios):.1f}){target}")
        print(f"| {kind.title} | {' | '.join(cells)} |")
    return is_met


def main() -> None:
    """Run the benchmark. Exit with code 1 if a server fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one round of 0.1 s, without LitServe if it is missing")
    parser.add_argument("--rounds", type=int, default=5, help="measurements per server (default 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each measurement (default 5)")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.seconds = 1, 0.1
    adopt_orphans()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # servers and clients inherit these cores
    servers = {}
    for name, kind in server_kinds().items():
        if reason := kind.why_unavailable(name):
            print(f"{kind.title} is left out: {reason}", file=sys.stderr)
        else:
            servers[name] = kind
    parts = [describe_machine("torch", "uvicorn", "fastapi", "scikit-learn"), package_versions(servers)]
    print(", ".join(filter(None, parts)))
    client = "wrk" if WRK else "a Python client, because wrk is not installed"
    load_average = os.getloadavg()[0]
    print(
        f"\n`python benchmarks/serving/adopted_model.py --rounds {options.rounds} --seconds {options.seconds:g}`; "
        f"{client} generates the load; load average at the start: {load_average:.1f}"
    )
    rates: Rates = {}
    with tempfile.TemporaryDirectory(prefix="elbo-bench-") as folder:
        workload = create_workload(Path(folder))
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
            order = dict(servers if number % 2 == 0 else reversed(servers.items()))
            try:
                measure_round(order, workload, options.seconds, rates)
            except RuntimeError as error:
                sys.exit(f"error: {error}")
    is_met = print_tables(servers, rates)
    print(f"\nThe targets against plain FastAPI are {'met' if is_met else 'not met'}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; all servers have been stopped")
