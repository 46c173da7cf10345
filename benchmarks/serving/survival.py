"""What Elbo's server survives, in figures: clients that leave, models that change, signals, a worker that is killed.

Every answer is compared with the module's. A request that was sent and got no answer is lost; one whose connection was
refused was never sent. `--smoke` does a little of each.
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
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from benchmarks.data import where
from benchmarks.serving.client import Array, Load, Pool, Seen, storm
from benchmarks.serving.processes import Server, adopt_orphans, free_port
from benchmarks.serving.stage import FEATURES, FEW, Stage, stage_in
from models.artifact import load
from models.manifest import resolve

MIB = 2**20
CLIENTS = 16
SETTLE = 0.5  # seconds of load before and after what is done to the server


class Elbo:
    """The server in some folder, with two workers unless told otherwise."""

    def __init__(self, stage: Stage, artifacts: Path, workers: int, **settings: str) -> None:
        self.port = free_port()
        own = {f"ELBO_{name.upper()}": value for name, value in settings.items()}
        fixed = {"ELBO_PORT": str(self.port), "ELBO_ARTIFACTS": str(artifacts), "ELBO_WORKERS": str(workers)}
        self.workers = workers
        self.server = Server(
            [sys.executable, "-m", "service"], {"OMP_NUM_THREADS": "1", **fixed, **own}, stage.folder / "elbo.log"
        )

    async def ready(self, times: int) -> None:
        """Until a worker has become ready `times` times since the start."""
        said = "is ready" if self.workers > 1 else "listening on"
        while self.server.log.read_text().count(said) < times:
            self.server.require_alive()
            await asyncio.sleep(0.02)

    def get(self, path: str) -> str:
        """The answer to a GET."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20) as answer:
            text: str = answer.read().decode()
        return text

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        return sum(map(float, re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", self.get("/metrics"), re.MULTILINE)))


def report(title: str, target: str, seen: Seen | None, **figures: str) -> None:
    """A row of the table."""
    told = dict(figures)
    if seen:
        statuses = {str(status): f"{count:,}" for status, count in seen.statuses.items()}
        told = {"right": f"{seen.right:,}", "wrong": f"{seen.wrong:,}", "lost": f"{seen.lost:,}", **statuses, **told}
    print(f"| {title} | {target} | {', '.join(f'{name} {value}' for name, value in told.items())} |", flush=True)


def pool(artifacts: Path, name: str, features: int) -> Pool:
    """Rows and answers of a model."""
    x: Array = np.random.RandomState(3).uniform(size=(256, features)).astype(np.float32)
    with torch.inference_mode():
        return Pool(x, load(resolve(artifacts, name)).module(torch.from_numpy(x)).numpy())


async def storms(stage: Stage, options: argparse.Namespace) -> None:
    """Clients that leave at random moments: twice, for the first takes memory that stays."""
    elbo, rows = (
        Elbo(stage, stage.folder / "artifacts", options.workers),
        pool(stage.folder / "artifacts", "vae", FEATURES),
    )
    with elbo.server:
        await elbo.ready(options.workers)
        await storm(elbo.port, rows, "vae", options.requests, 64, seed=0)
        await asyncio.sleep(1)
        before = elbo.server.memory()
        seen = await storm(elbo.port, rows, "vae", options.requests, 64, seed=1)
        await asyncio.sleep(1)
        report(
            f"a storm: {options.requests:,} requests, half of them cancelled at random moments",
            "every surviving answer right, queue and memory back to where they were", seen, left=f"{seen.left:,}",
            pending_rows=f"{elbo.metric('elbo_pending_rows'):g}",
            pending_bytes=f"{elbo.metric('elbo_pending_bytes'):g}",
            memory_MiB=f"{before / MIB:.0f} → {elbo.server.memory() / MIB:.0f}",
        )  # fmt: skip
        require(not (seen.wrong or seen.lost or seen.statuses or elbo.metric("elbo_pending_rows")), "the storm")


async def swaps(stage: Stage, options: argparse.Namespace) -> None:
    """Versions that come and go under load."""
    artifacts = stage.folder / "swaps"
    shutil.copytree(stage.folder / "artifacts" / "hosts", artifacts / "hosts")
    elbo, rows = Elbo(stage, artifacts, options.workers, poll_seconds="0.05"), pool(artifacts, "hosts", FEW)
    early = max(1, options.swaps // 10)
    with elbo.server:
        await elbo.ready(options.workers)
        running, memory = Load(elbo.port, rows, "hosts", 4), 0
        for version in range(2, options.swaps + 2):
            shutil.copytree(artifacts / "hosts" / str(version - 1), artifacts / "hosts" / f".{version}")
            (artifacts / "hosts" / f".{version}").rename(artifacts / "hosts" / str(version))
            await logged(elbo, f"serving hosts@{version} ", options.workers)
            shutil.rmtree(artifacts / "hosts" / str(version - 1))
            await logged(elbo, f"no longer serving hosts@{version - 1}", options.workers)
            if version - 1 == early:
                memory = elbo.server.memory()
        after = elbo.server.memory()
        seen = await running.stop()
        report(
            f"{options.swaps} hot swaps under load", "no failed request, memory growth < 5 %", seen,
            memory_MiB=f"{memory / MIB:.0f} after {early} → {after / MIB:.0f} ({after / memory - 1:+.1%})",
        )  # fmt: skip
        require(not (seen.wrong or seen.lost or seen.statuses), "the swaps")


async def logged(elbo: Elbo, text: str, times: int) -> None:
    """Until every worker has said it."""
    while elbo.server.log.read_text().count(text) < times:
        elbo.server.require_alive()
        await asyncio.sleep(0.02)


async def sigterm(stage: Stage, options: argparse.Namespace) -> None:
    """Told to stop in the middle of the load, twice: at once, and after a second of drain."""
    rows = pool(stage.folder / "artifacts", "vae", FEATURES)
    for delay in ("0", "1"):
        elbo = Elbo(stage, stage.folder / "artifacts", options.workers, drain_seconds=delay)
        with elbo.server:
            await elbo.ready(options.workers)
            running = Load(elbo.port, rows, "vae", CLIENTS)
            await asyncio.sleep(SETTLE)
            started = perf_counter()
            os.kill(elbo.server.pid, signal.SIGTERM)
            code = await asyncio.to_thread(elbo.server.ended, 30)
            seconds = perf_counter() - started
            seen = await running.stop()
            report(
                f"SIGTERM under load, drain {delay} s", "no request lost, exit 0", seen, exit=str(code),
                seconds=f"{seconds:.1f}",
            )  # fmt: skip
            require(not (seen.wrong or seen.lost or seen.statuses or code), "SIGTERM")


async def kill(stage: Stage, options: argparse.Namespace) -> None:
    """A worker killed in the middle of the load: how long nobody has a right answer, and when all serve again."""
    elbo, rows = (
        Elbo(stage, stage.folder / "artifacts", options.workers),
        pool(stage.folder / "artifacts", "vae", FEATURES),
    )
    with elbo.server:
        await elbo.ready(options.workers)
        running = Load(elbo.port, rows, "vae", CLIENTS)
        await asyncio.sleep(SETTLE)
        before = elbo.metric("elbo_requests_total")
        started = perf_counter()
        os.kill(elbo.server.children()[0], signal.SIGKILL)
        await elbo.ready(options.workers + 1)
        back = perf_counter() - started
        await asyncio.sleep(SETTLE)
        after = elbo.metric("elbo_requests_total")
        seen = await running.stop()
        heard = max((moment - started for moment in seen.errors), default=0.0)
        rights = [started, *(moment for moment in seen.rights if moment > started)]
        pause = max(late - early for early, late in pairwise(rights))
        report(
            "kill -9 of a worker under load", "in-flight ones hear of it in < 1 s, service back in < 5 s", seen,
            in_flight_told_after_ms=f"{1e3 * heard:.0f}",
            first_right_answer_after_ms=f"{1e3 * (rights[1] - started):.0f}",
            longest_without_one_ms=f"{1e3 * pause:.0f}", all_workers_again_after_s=f"{back:.1f}",
            requests_counted=f"{before:,.0f} → {after:,.0f}",
        )  # fmt: skip
        require(not (seen.wrong or seen.statuses) and seen.lost <= CLIENTS and after > before, "the kill")


def require(condition: bool, what: str) -> None:
    """End with 1 if it has failed: a figure may be slow, but not wrong."""
    if not condition:
        sys.exit(f"{what}: see the row above")


TRIALS: dict[str, Callable[[Stage, argparse.Namespace], Awaitable[None]]] = {
    "storm": storms, "swaps": swaps, "sigterm": sigterm, "kill": kill,
}  # fmt: skip


def main() -> None:
    """Run the trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few seconds of each")
    parser.add_argument("--only", default=",".join(TRIALS), help=f"of {','.join(TRIALS)}")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--requests", type=int, help="of the storm (10,000)")
    parser.add_argument("--swaps", type=int, help="of versions (200)")
    options = parser.parse_args()
    options.requests = options.requests or (300 if options.smoke else 10_000)
    options.swaps = options.swaps or (3 if options.smoke else 200)
    adopt_orphans()
    print(f"{where('torch', 'uvicorn')}; {options.workers} workers\n\n| | target | |\n|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="elbo-survival-") as folder:
        stage = stage_in(Path(folder))
        for name in options.only.split(","):
            asyncio.run(TRIALS[name](stage, options))  # type: ignore[arg-type] # they are coroutines


if __name__ == "__main__":
    main()
