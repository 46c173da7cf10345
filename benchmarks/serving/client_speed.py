"""Measure the rate of `elbo.client` against wrk: 32 rows to /encode, on one connection.

    python benchmarks/serving/client_speed.py
    python benchmarks/serving/client_speed.py --smoke    # one short round

wrk sends the bytes that the client sends, again and again, and discards the responses. In each round, the ways to call
the server from Python take turns on one server, and wrk runs for half as long before and after each of them, so that
changes in the machine's speed affect both alike. Client and server share two cores. The benchmark prints a Markdown
table: the median rate, the median of the ratios to the mean of the two rates of wrk around it, and the processor time
of the client per request.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic, perf_counter, process_time, sleep
from typing import NamedTuple

import httpx
import numpy as np
import numpy.typing as npt

from benchmarks.serving.load_generators import WRK, Request, run_closed_loop
from benchmarks.serving.server_process import ServerProcess, free_port
from benchmarks.serving.workload import create_workload
from elbo.client import AsyncClient, Client
from elbo.client.formats import NPY, SAFETENSORS, dump_npy

ROWS = 32
START_SECONDS = 60.0
Array = npt.NDArray[np.float32]
Measure = Callable[[float], tuple[float, float]]  # from seconds to the rate and the processor seconds per request


class Sample(NamedTuple):
    """The rate of a way and of wrk around it, in requests per second, and processor seconds per request."""

    rate: float
    wrk: float
    cost: float


def measure(send: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Call `send` for `seconds`. Return the calls per second, and the processor time of this process per call."""
    send()
    count, started, used = 0, perf_counter(), process_time()
    while perf_counter() - started < seconds:
        send()
        count += 1
    return count / (perf_counter() - started), (process_time() - used) / count


def measure_async(address: str, rows: Array, seconds: float) -> tuple[float, float]:
    """Return what `measure` returns, for the async client."""

    async def run() -> tuple[float, float]:
        async with AsyncClient(address, "vae") as client:
            await client.encode(rows)
            count, started, used = 0, perf_counter(), process_time()
            while perf_counter() - started < seconds:
                await client.encode(rows)
                count += 1
            return count / (perf_counter() - started), (process_time() - used) / count

    return asyncio.run(run())


def wait_until_ready(address: str, server: ServerProcess) -> None:
    """Wait until the server serves a model. Raises TimeoutError and RuntimeError."""
    end = monotonic() + START_SECONDS
    with httpx.Client(base_url=address) as plain:
        while monotonic() < end:
            server.require_alive()
            try:
                if plain.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            sleep(0.1)
    raise TimeoutError(f"the server was not ready after {START_SECONDS:g} s: {server.log.read_text()[-500:]}")


def compare(port: int, rows: Array, rounds: int, seconds: float) -> dict[str, list[Sample]]:
    """Return the samples of each way, by round."""
    address, body = f"http://127.0.0.1:{port}", dump_npy(rows)
    headers = {"Accept": SAFETENSORS, "Content-Type": NPY, "X-Request-Timeout": "30.000"}
    request = Request("/encode?model=vae", headers, body)
    with (
        Client(address, "vae") as client,
        Client(address, "vae", transport=httpx.HTTPTransport()) as over_httpx,
        httpx.Client(base_url=address) as plain,
    ):
        expected = plain.post(request.path, headers=headers, content=body)
        assert np.array_equal(client.encode(rows).latents, over_httpx.encode(rows).latents)
        ways: dict[str, Measure] = {
            "elbo.client": lambda seconds: measure(lambda: client.encode(rows), seconds),
            "elbo.client, async": lambda seconds: measure_async(address, rows, seconds),
            "elbo.client over httpx's transport": lambda seconds: measure(lambda: over_httpx.encode(rows), seconds),
            "httpx alone, which reads no arrays": lambda seconds: measure(
                lambda: plain.post(request.path, headers=headers, content=body), seconds
            ),
        }
        found: dict[str, list[Sample]] = {name: [] for name in ways}
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            for name, run in ways.items():
                before = run_closed_loop(port, request, len(expected.content), 1, seconds / 2).rate
                rate, cost = run(seconds)
                after = run_closed_loop(port, request, len(expected.content), 1, seconds / 2).rate
                found[name].append(Sample(rate, (before + after) / 2, cost))
    return found


def print_table(found: dict[str, list[Sample]]) -> None:
    """Print the medians over the rounds."""
    print("| client | requests/s | share of wrk's rate | processor time per request, ms |\n|---|---|---|---|")
    wrk = statistics.median(sample.wrk for samples in found.values() for sample in samples)
    print(f"| wrk | {wrk:,.0f} | 100% | – |")
    for name, samples in found.items():
        rate = statistics.median(sample.rate for sample in samples)
        share = statistics.median(sample.rate / sample.wrk for sample in samples)
        cost = statistics.median(sample.cost for sample in samples)
        print(f"| {name} | {rate:,.0f} | {share:.0%} | {1e3 * cost:.2f} |")


def main() -> None:
    """Train a model, start a server, and compare the clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one short round, to check that the benchmark works")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of one second per client (default 15)")
    options = parser.parse_args()
    rounds = 1 if options.smoke else options.rounds
    if not WRK:
        print(
            "wrk is missing (apt-get install wrk): the Python client of the open loops takes its place", file=sys.stderr
        )
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        workload = create_workload(folder)
        environment = {"ELBO_ARTIFACTS": str(folder / "artifacts"), "ELBO_PORT": str(port), "ELBO_LOG_LEVEL": "error"}
        command = [sys.executable, "-m", "service"]
        with ServerProcess(command, environment, folder / "server.log") as server:
            wait_until_ready(f"http://127.0.0.1:{port}", server)
            print_table(compare(port, workload.rows[ROWS], rounds, 0.3 if options.smoke else 1.0))


if __name__ == "__main__":
    main()
