"""Measure how Elbo's server behaves under load when clients disconnect, models change, and processes are killed.

    python benchmarks/serving/resilience.py                        # all scenarios
    python benchmarks/serving/resilience.py --only kill,sigterm    # two of the scenarios
    python benchmarks/serving/resilience.py --smoke                # a few seconds per scenario

The scenarios are:

- disconnects: clients disconnect at random times;
- swaps: model versions are published and removed;
- sigterm: the server receives SIGTERM;
- kill: a worker is killed.

Each response is compared with the output of the module. A request is lost if it was sent and got no response. If the
connection was refused, the request was not sent. The program exits with code 1 if a request is lost or a response is
wrong. There is one exception: a killed worker may lose the requests that it was processing.

The benchmark needs Linux. It prints a Markdown table.
"""

import argparse
import asyncio
import os
import re
import shutil
import signal
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from benchmarks.data import describe_machine
from benchmarks.serving.checking_client import Array, BackgroundLoad, Outcomes, RowPool, send_with_disconnects
from benchmarks.serving.server_process import ServerProcess, adopt_orphans, free_port
from benchmarks.serving.workload import FEATURES, FEW_FEATURES, Workload, create_workload
from models.artifact import load
from models.manifest import resolve

MIB = 2**20
CONNECTIONS = 16  # number of connections of the background load
SETTLE_SECONDS = 0.5  # seconds of background load before the signal, and again after the recovery


class Elbo:
    """A running server of Elbo.

    Args:
        workload: the server writes its log to the folder of this workload.
        artifacts: the artifact folder.
        workers: number of workers.
        settings: additional settings. Their names are in lower case and without the prefix ELBO_.
    """

    def __init__(self, workload: Workload, artifacts: Path, workers: int, **settings: str) -> None:
        self.port = free_port()
        self.workers = workers
        environment = {
            "OMP_NUM_THREADS": "1",
            "ELBO_PORT": str(self.port),
            "ELBO_ARTIFACTS": str(artifacts),
            "ELBO_WORKERS": str(workers),
            **{f"ELBO_{name.upper()}": value for name, value in settings.items()},
        }
        self.process = ServerProcess([sys.executable, "-m", "service"], environment, workload.folder / "elbo.log")

    async def wait_for_log(self, text: str, count: int) -> None:
        """Wait until the log contains `text` at least `count` times."""
        while self.process.log.read_text().count(text) < count:
            self.process.require_alive()
            await asyncio.sleep(0.02)

    async def wait_for_ready_workers(self, count: int) -> None:
        """Wait until `count` workers have become ready since the start, including workers that have ended."""
        await self.wait_for_log("is ready" if self.workers > 1 else "listening on", count)

    def metric(self, name: str) -> float:
        """Return the sum of a metric over all label values."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=20) as response:
            text: str = response.read().decode()
        return sum(map(float, re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)))


@asynccontextmanager
async def running_elbo(workload: Workload, artifacts: Path, workers: int, **settings: str) -> AsyncIterator[Elbo]:
    """Run Elbo; all workers are ready when the context is entered."""
    elbo = Elbo(workload, artifacts, workers, **settings)
    with elbo.process:
        await elbo.wait_for_ready_workers(workers)
        yield elbo


def create_pool(artifacts: Path, name: str, features: int) -> RowPool:
    """Return random rows, and their reconstructions by the model `name`."""
    x: Array = np.random.RandomState(3).uniform(size=(256, features)).astype(np.float32)
    with torch.inference_mode():
        return RowPool(x, load(resolve(artifacts, name)).module(torch.from_numpy(x)).numpy())


def print_row(title: str, target: str, outcomes: Outcomes, **figures: str) -> None:
    """Print a row of the table."""
    cells = {"correct": f"{outcomes.correct:,}", "wrong": f"{outcomes.wrong:,}", "lost": f"{outcomes.lost:,}"}
    cells |= {f"status {status}": f"{count:,}" for status, count in outcomes.statuses.items()}
    cells |= {name.replace("_", " "): figure for name, figure in figures.items()}
    print(f"| {title} | {target} | {', '.join(f'{name} {value}' for name, value in cells.items())} |", flush=True)


def require(condition: bool, scenario: str) -> None:
    """Exit with 1 if `condition` is false."""
    if not condition:
        sys.exit(f"{scenario} failed: see the last row of the table")


async def run_disconnects(workload: Workload, options: argparse.Namespace) -> None:
    """Send requests and disconnect during half of them. The first of two runs is a warm-up."""
    artifacts = workload.folder / "artifacts"
    pool = create_pool(artifacts, "vae", FEATURES)
    async with running_elbo(workload, artifacts, options.workers) as elbo:

        async def send(seed: int) -> Outcomes:
            outcomes = await send_with_disconnects(
                elbo.port, pool, "vae", requests=options.requests, concurrency=64, seed=seed
            )
            await asyncio.sleep(1)
            return outcomes

        await send(seed=0)
        before = elbo.process.memory()
        outcomes = await send(seed=1)
        pending_rows = elbo.metric("elbo_pending_rows")
        print_row(
            f"{options.requests:,} requests, clients disconnect during half of them at random times",
            "all remaining responses correct; queue and memory as before",
            outcomes,
            disconnected=f"{outcomes.disconnected:,}",
            pending_rows=f"{pending_rows:g}",
            pending_bytes=f"{elbo.metric('elbo_pending_bytes'):g}",
            memory_MiB=f"{before / MIB:.0f} → {elbo.process.memory() / MIB:.0f}",
        )
        require(not (outcomes.wrong or outcomes.lost or outcomes.statuses or pending_rows), "disconnects")


async def run_swaps(workload: Workload, options: argparse.Namespace) -> None:
    """Under load, publish new versions of a model and remove the old versions."""
    artifacts = workload.folder / "swaps"
    folder = artifacts / "hosts"
    shutil.copytree(workload.folder / "artifacts" / "hosts", folder)
    pool = create_pool(artifacts, "hosts", FEW_FEATURES)
    first = max(1, options.swaps // 10)  # the final memory is compared with the memory after this number of swaps
    async with running_elbo(workload, artifacts, options.workers, poll_seconds="0.05") as elbo:
        background, before = BackgroundLoad(elbo.port, pool, "hosts", connections=4), 0
        for version in range(2, options.swaps + 2):
            shutil.copytree(folder / str(version - 1), folder / f".{version}")
            (folder / f".{version}").rename(folder / str(version))
            await elbo.wait_for_log(f"serving hosts@{version} ", options.workers)
            shutil.rmtree(folder / str(version - 1))
            await elbo.wait_for_log(f"no longer serving hosts@{version - 1}", options.workers)
            if version - 1 == first:
                before = elbo.process.memory()
        after = elbo.process.memory()
        outcomes = await background.stop()
        print_row(
            f"{options.swaps} new versions under load",
            "no failed request; memory growth < 5 %",
            outcomes,
            memory_MiB=f"{before / MIB:.0f} after {first} → {after / MIB:.0f} ({after / before - 1:+.1%})",
        )
        require(not (outcomes.wrong or outcomes.lost or outcomes.statuses), "swaps")


async def run_sigterm(workload: Workload, options: argparse.Namespace) -> None:
    """Stop the server under load, first without a drain delay, then with a drain delay of 1 s."""
    artifacts = workload.folder / "artifacts"
    pool = create_pool(artifacts, "vae", FEATURES)
    for drain_seconds in ("0", "1"):
        async with running_elbo(workload, artifacts, options.workers, drain_seconds=drain_seconds) as elbo:
            background = BackgroundLoad(elbo.port, pool, "vae", CONNECTIONS)
            await asyncio.sleep(SETTLE_SECONDS)
            started = perf_counter()
            os.kill(elbo.process.pid, signal.SIGTERM)
            exit_code = await asyncio.to_thread(elbo.process.wait, 30)
            seconds = perf_counter() - started
            outcomes = await background.stop()
            print_row(
                f"SIGTERM under load, ELBO_DRAIN_SECONDS={drain_seconds}",
                "no lost request; exit code 0",
                outcomes,
                exit_code=str(exit_code),
                seconds=f"{seconds:.1f}",
            )
            require(not (outcomes.wrong or outcomes.lost or outcomes.statuses or exit_code), "sigterm")


async def run_kill(workload: Workload, options: argparse.Namespace) -> None:
    """Kill a worker under load. Measure the longest time without a correct response, and the time to recovery."""
    artifacts = workload.folder / "artifacts"
    pool = create_pool(artifacts, "vae", FEATURES)
    async with running_elbo(workload, artifacts, options.workers) as elbo:
        background = BackgroundLoad(elbo.port, pool, "vae", CONNECTIONS)
        await asyncio.sleep(SETTLE_SECONDS)
        counted_before = elbo.metric("elbo_requests_total")
        killed = perf_counter()
        os.kill(elbo.process.workers()[0], signal.SIGKILL)
        await elbo.wait_for_ready_workers(options.workers + 1)
        recovery = perf_counter() - killed
        await asyncio.sleep(SETTLE_SECONDS)
        counted_after = elbo.metric("elbo_requests_total")
        outcomes = await background.stop()
        last_loss = max((moment - killed for moment in outcomes.lost_times), default=0.0)
        responses = [killed, *(moment for moment in outcomes.correct_times if moment > killed)]
        pause = max(late - early for early, late in pairwise(responses))
        print_row(
            "kill -9 of a worker under load",
            "connections of its clients end in < 1 s; all workers ready in < 5 s",
            outcomes,
            last_connection_ended_after_ms=f"{1e3 * last_loss:.0f}",
            first_correct_response_after_ms=f"{1e3 * (responses[1] - killed):.0f}",
            longest_pause_ms=f"{1e3 * pause:.0f}",
            all_workers_ready_after_s=f"{recovery:.1f}",
            requests_counted=f"{counted_before:,.0f} → {counted_after:,.0f}",
        )
        is_correct = not (outcomes.wrong or outcomes.statuses)
        require(is_correct and outcomes.lost <= CONNECTIONS and counted_after > counted_before, "kill")


SCENARIOS: dict[str, Callable[[Workload, argparse.Namespace], Awaitable[None]]] = {
    "disconnects": run_disconnects,
    "swaps": run_swaps,
    "sigterm": run_sigterm,
    "kill": run_kill,
}


def main() -> None:
    """Run the scenarios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few seconds of each scenario")
    parser.add_argument("--only", default=",".join(SCENARIOS), help=f"comma-separated, of {','.join(SCENARIOS)}")
    parser.add_argument("--workers", type=int, default=2, help="workers of the server (default 2)")
    parser.add_argument("--requests", type=int, help="requests of the scenario disconnects (default 10,000)")
    parser.add_argument("--swaps", type=int, help="versions published in the scenario swaps (default 200)")
    options = parser.parse_args()
    options.requests = options.requests or (300 if options.smoke else 10_000)
    options.swaps = options.swaps or (3 if options.smoke else 200)
    adopt_orphans()
    print(f"{describe_machine('torch', 'uvicorn')}; {options.workers} workers\n\n| | target | |\n|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="elbo-resilience-") as folder:
        workload = create_workload(Path(folder))
        for name in options.only.split(","):
            asyncio.run(SCENARIOS[name](workload, options))  # type: ignore[arg-type] # coroutines, typed as awaitables


if __name__ == "__main__":
    main()
