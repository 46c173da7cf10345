"""Measure what tracing costs: servers that trace 1 % of their requests or none, and a server of an older commit.

    git worktree add ../before COMMIT
    python benchmarks/serving/tracing.py ../before

COMMIT has no tracing. The servers run with the same interpreter, models and requests, and send their spans to an OTLP
collector that discards them. On a shared machine, the rates of two equal servers differ by a fifth from second to
second. Therefore all servers run at the same time, and get small bursts of requests in turn, in random order: one
request on each of their connections. A turn takes some milliseconds, so that the speed of the machine hardly changes in
it. Two processes of the same program also differ a little for as long as they run, because of their addresses in
memory. So the servers are started anew several times (--starts).

The table shows ratios of the time and of the processor time of a response, `on` to `off`, and `off` to the older
commit: the geometric mean over the starts, and its 95 % confidence interval (Student's t of the logarithms, which
assumes that the starts are independent). `off too` is a second server without tracing: its ratio to `off` shows what
the method cannot resolve.

Options: --starts (default 8), --turns of each load and start (default 1000), --load TITLE (only the loads whose title
contains TITLE), --smoke (one start, few turns of two loads).
"""

import argparse
import os
import random
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import clock_gettime, perf_counter, process_time, sleep

import numpy as np
from scipy.stats import t

from benchmarks.data import ROOT
from benchmarks.serving.compare_checkouts import Load, Server, describe, loads, start, train_models
from benchmarks.serving.server_process import adopt_orphans
from service.monitoring.metrics import Metrics
from service.monitoring.request_record import RequestRecord
from service.shared_memory import SharedCounters

RATIO = "0.01"
OFF_TOO = "off too"
PAIRS = [("on", "off"), ("off", "before"), (OFF_TOO, "off")]


@contextmanager
def discarding_collector() -> Iterator[tuple[str, list[int]]]:
    """Yield the URL of a collector, and the sizes of the requests that it has received."""
    received: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(len(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Connections:
    """Connections to one server, on which the requests of a load are sent in bursts."""

    def __init__(self, server: Server, load: Load) -> None:
        self._server = server
        self._request = load.request.to_bytes(server.port)
        self._size = server.response_size(load.request)
        address = ("127.0.0.1", server.port)
        self._sockets = [socket.create_connection(address, timeout=30) for _ in range(load.connections)]
        self._clocks = [process_clock(pid) for pid in (server.process.pid, *server.process.descendants())]

    def burst(self) -> tuple[float, float]:
        """Send one request on each connection, and read the responses.

        Return the time until the last response, and the processor time of the server, both in seconds.

        Raises:
            RuntimeError: a response has another status than 200.
        """
        spent, started = self._processor_time(), perf_counter()
        for each in self._sockets:
            each.sendall(self._request)
        for each in self._sockets:
            self._read_response(each)
        return perf_counter() - started, self._processor_time() - spent

    def close(self) -> None:
        """Close the connections."""
        for each in self._sockets:
            each.close()

    def _read_response(self, connection: socket.socket) -> None:
        found = b""
        while (end := found.find(b"\r\n\r\n")) < 0 or len(found) < end + 4 + self._size:
            received = connection.recv(1 << 20)
            if not received:
                raise RuntimeError(f"the server closed a connection: see {self._server.process.log}")
            found += received
        if not found.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server answered {found[:200]!r}")

    def _processor_time(self) -> float:
        return sum(map(clock_gettime, self._clocks))


def process_clock(pid: int) -> int:
    """Return the Linux clock of the processor time that all threads of a process have used, in nanoseconds.

    See clock_getcpuclockid(3). Python has no function for the clock of another process.
    """
    return ~pid << 3 | 2


def measure(servers: dict[str, Server], load: Load, turns: int) -> dict[str, tuple[float, float]]:
    """Return the mean time of a burst on each server, and the mean processor time of the server, in seconds."""
    opened = {name: Connections(server, load) for name, server in servers.items()}
    try:
        names = list(opened)
        totals = {name: [0.0, 0.0] for name in names}
        for turn in range(-(turns // 10), turns):  # the first turns are the warm-up
            random.shuffle(names)
            for name in names:
                for place, seconds in enumerate(opened[name].burst()):
                    totals[name][place] += seconds if turn >= 0 else 0.0
    finally:
        for each in opened.values():
            each.close()
    return {name: (total / turns, spent / turns) for name, (total, spent) in totals.items()}


def describe_mean(ratios: list[float]) -> str:
    """Return the geometric mean of ratios, with its 95 % confidence interval in brackets if there are several."""
    logs = np.log(ratios)
    if len(logs) == 1:
        return f"{np.exp(logs[0]):.4f}"
    half = t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    low, middle, high = np.exp(logs.mean() + half * np.array([-1, 0, 1]))
    return f"{middle:.4f} ({low:.4f}-{high:.4f})"


def print_table(found: dict[str, list[dict[str, tuple[float, float]]]]) -> None:
    """Print the ratios of each load, from the measurements of its starts."""
    print("| load | servers | time | processor time |\n|---|---|---|---|")
    for title, starts in found.items():
        for one, other in PAIRS:
            if one in starts[0] and other in starts[0]:
                both = [[each[one][place] / each[other][place] for each in starts] for place in (0, 1)]
                print(f"| {title} | {one} to {other} | {describe_mean(both[0])} | {describe_mean(both[1])} |")


def added_microseconds(variables: dict[str, str], rounds: int = 5, requests: int = 50_000) -> list[float]:
    """Return by how much tracing raises the processor time of a request, in microseconds, in each round.

    In this process, requests that have ended are counted in the metrics, with and without tracing. The processor time
    includes that of the thread that sends the spans. It varies far less than the rate of a server on a busy machine.
    """
    counting, tracing = Metrics(SharedCounters()), Metrics(SharedCounters())
    with environment(variables):
        tracing.trace_requests(variables)

    def seconds(metrics: Metrics) -> float:
        started = process_time()
        for _ in range(requests):
            record = RequestRecord("0123456789abcdef", "POST", "/anomaly", "127.0.0.1", endpoint="/anomaly")
            record.model, record.version, record.rows, record.status = "hosts", 1, 1, 200
            record.parse = record.queue = record.compute = record.write = 1e-4
            record.total, record.read_at, record.computed_at = 1e-3, record.started + 1e-4, record.started + 9e-4
            metrics.count(record)
        if metrics.tracer:
            while metrics.tracer.queued_requests:
                sleep(0.001)
        return process_time() - started

    found = []
    for _ in range(rounds + 1):
        plain = seconds(counting)
        found.append(1e6 * (seconds(tracing) - plain) / requests)
    assert tracing.tracer
    tracing.tracer.close()
    return found[1:]  # the first one is the warm-up


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables in the block."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", nargs="?", type=Path, help="folder of a checkout without tracing")
    parser.add_argument("--starts", type=int, default=8, help="how often the servers are started (8)")
    parser.add_argument("--turns", type=int, default=1000, help="bursts on each server for each load and start (1000)")
    parser.add_argument("--load", default="", help="part of the titles of the loads to measure")
    parser.add_argument("--smoke", action="store_true", help="one start, few bursts of two loads")
    options = parser.parse_args()
    if options.smoke:
        options.starts, options.turns = 1, 20
    adopt_orphans()
    found: dict[str, list[dict[str, tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as collecting:
        workload = train_models((options.before or ROOT).resolve(), Path(folder))
        url, received = collecting.enter_context(discarding_collector())
        tracing = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": RATIO,
        }
        wanted = [load for load in loads(workload, smoke=options.smoke) if options.load in load.title]
        for turn in range(options.starts):
            with ExitStack() as stack:
                servers = {
                    "on": start(ROOT, workload, stack, "on", tracing),
                    "off": start(ROOT, workload, stack, "off"),
                    OFF_TOO: start(ROOT, workload, stack, OFF_TOO),
                }
                if options.before:
                    servers["before"] = start(options.before.resolve(), workload, stack, "before")
                for load in wanted:
                    found.setdefault(load.title, []).append(measure(servers, load, options.turns))
            print(f"{turn + 1} of {options.starts} starts", file=sys.stderr)
        print_table(found)
        often = {**tracing, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        added = added_microseconds(often, requests=2000 if options.smoke else 50_000)
        print(f"\nTracing {RATIO} of the requests adds {describe(added)} µs of processor time to a request.")
        print(f"\nThe collector received {len(received)} requests with {sum(received):,} bytes of spans.")


if __name__ == "__main__":
    main()
