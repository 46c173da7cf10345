"""Measure how long the server takes to start, and how much memory a worker takes.

    python benchmarks/serving/start_time.py                     # this checkout
    python benchmarks/serving/start_time.py --other ../before   # and another checkout, in turn
    python benchmarks/serving/start_time.py --smoke             # one start

The server serves four small models: 20 features, hidden layers of 64 and 32 units. It is ready when GET /readyz
responds with 200. The seconds count from the start of its process. The processor seconds are those of the server and of
all its descendants until then. On a busy machine, they vary less than the elapsed seconds.

The memory is measured SETTLE_SECONDS after all workers are ready, for each worker. PSS divides a page that n processes
share by n; RSS counts it fully in each process. A worker shares the code of libraries with every process on the machine
that uses them, so PSS depends on what else runs.

The benchmark needs Linux. It prints a Markdown table of medians.
"""

import argparse
import http.client
import sys
import tempfile
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from time import perf_counter, sleep

import torch

from benchmarks.data import ROOT, describe_machine
from benchmarks.serving.server_process import ServerProcess, adopt_orphans, free_port
from benchmarks.serving.workload import FEW_FEATURES, train_vae

MODELS = 4
START_SECONDS = 120.0
SETTLE_SECONDS = 1.0
MIB = 2**20


@dataclass(frozen=True)
class Start:
    """One start: elapsed and processor seconds until the server was ready, and the mean PSS and RSS of a worker."""

    seconds: float
    processor_seconds: float
    pss: float
    rss: float


def create_models(artifacts: Path) -> None:
    """Train MODELS small models, and publish them in `artifacts`."""
    torch.set_num_threads(1)
    for number in range(MODELS):
        train_vae(artifacts, f"small{number}", FEW_FEATURES, hidden=(64, 32), latents=4, seed=number)


def is_ready(port: int) -> bool:
    """Return whether GET /readyz responds with 200."""
    with suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    return False


def memory_of(pid: int) -> tuple[int, int]:
    """Return the PSS and the RSS of a process in bytes."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    kib = {fields[0]: int(fields[1]) for fields in lines if fields[0] in ("Pss:", "Rss:")}
    return kib["Pss:"] * 1024, kib["Rss:"] * 1024


def measure_start(checkout: Path, artifacts: Path, workers: int, log: Path) -> Start:
    """Start the server of `checkout`, wait until it is ready, measure it, and stop it.

    Raises:
        RuntimeError: the server has ended, or was not ready after START_SECONDS.
    """
    port = free_port()
    environment = {
        "ELBO_PORT": str(port), "ELBO_ARTIFACTS": str(artifacts), "OMP_NUM_THREADS": "1",
        "ELBO_WORKERS": str(workers), "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(checkout),
    }  # fmt: skip
    began = perf_counter()
    with ServerProcess([sys.executable, "-m", "service"], environment, log, folder=checkout) as server:
        while not is_ready(port):
            server.require_alive()
            if perf_counter() - began > START_SECONDS:
                raise RuntimeError(f"the server was not ready after {START_SECONDS:g} s: see {log}")
            sleep(0.005)
        seconds, processor_seconds = perf_counter() - began, server.processor_seconds()
        server.wait_until_idle(30)
        sleep(SETTLE_SECONDS)
        found = [memory_of(pid) for pid in (server.workers() if workers > 1 else [server.pid])]
    return Start(seconds, processor_seconds, mean(pss for pss, _ in found), mean(rss for _, rss in found))


def main() -> None:
    """Start the servers in turn, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--other", type=Path, help="folder of another checkout, which is measured in turn with this one"
    )
    parser.add_argument("--rounds", type=int, default=5, help="starts of each kind (5)")
    parser.add_argument("--workers", default="1,2", help="numbers of workers, separated by commas (1,2)")
    parser.add_argument("--smoke", action="store_true", help="one start with one worker")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.workers = 1, "1"
    adopt_orphans()
    checkouts = {"this checkout": ROOT} | ({"the other": options.other.resolve()} if options.other else {})
    print(f"{describe_machine('torch', 'onnxruntime')}; {MODELS} models; {options.rounds} starts of each kind\n")
    found: dict[tuple[str, int], list[Start]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="elbo-start-") as name:
        folder = Path(name)
        create_models(folder / "artifacts")
        for turn in range(options.rounds):
            for workers in map(int, options.workers.split(",")):
                for title in checkouts if turn % 2 else reversed(checkouts):
                    start = measure_start(checkouts[title], folder / "artifacts", workers, folder / "server.log")
                    found[title, workers].append(start)
    print("| | workers | ready after, s | at best | processor s until then | PSS a worker, MiB | RSS a worker, MiB |")
    print("|---|---|---|---|---|---|---|")
    for (title, workers), starts in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        seconds = [start.seconds for start in starts]
        spent = median(start.processor_seconds for start in starts)
        memory = " | ".join(
            f"{median(values) / MIB:.0f}" for values in ([s.pss for s in starts], [s.rss for s in starts])
        )
        print(f"| {title} | {workers} | {median(seconds):.2f} | {min(seconds):.2f} | {spent:.2f} | {memory} |")


if __name__ == "__main__":
    main()
