"""Measure what tracing costs: a server that traces 1 % of its requests, and the same server without tracing.

    python benchmarks/serving/tracing.py

The rates of two servers on a shared machine differ by a fifth from second to second, and two processes of the same
program differ by several percent as long as they run. So one process is measured, whose tracing a signal switches on
and off (`switched_tracing.py`). The states alternate in blocks of a few bursts, in the order on, off, off, on. A burst
is one request on each connection. The server sends its spans to an OTLP collector that discards them.

The table shows the ratios of the time and of the processor time of a block with tracing to one without: the geometric
mean over the pairs of blocks without the highest and lowest tenth, and its 95 % confidence interval (Tukey and
McLaughlin 1963), which assumes that the pairs are independent. The thread that sends spans works at any time, so its
cost falls on blocks of both states. The line below the table includes it: by how much tracing raises the processor time
of a request, counted in this process. The line after it has the time that a server without tracing spends on tracing.

Options: --pairs of blocks for each load (default 300), --load TITLE (only the loads whose title contains TITLE),
--smoke (few pairs, two loads).
"""

import argparse
import os
import signal
import socket
import tempfile
import threading
import timeit
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from time import clock_gettime, perf_counter, process_time, sleep

import numpy as np
from scipy.stats import trim_mean
from scipy.stats.mstats import trimmed_mean_ci

from benchmarks.data import ROOT
from benchmarks.serving.compare_checkouts import Load, Server, describe, loads, start, train_models
from benchmarks.serving.server_process import adopt_orphans
from service.monitoring.metrics import Metrics
from service.monitoring.request_record import RequestRecord
from service.shared_memory import SharedCounters

RATIO = "0.01"
REQUESTS = 160  # of a block
TRIMMED = 0.1  # the share of the pairs at each end that does not count: mostly pairs that another program interrupted


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
        self._log = server.process.log
        self._request = load.request.to_bytes(server.port)
        self._size = server.response_size(load.request)
        address = ("127.0.0.1", server.port)
        self._sockets = [socket.create_connection(address, timeout=30) for _ in range(load.connections)]

    def burst(self) -> None:
        """Send one request on each connection, and read the responses.

        Raises:
            RuntimeError: a response has another status than 200, or the server has closed a connection.
        """
        for each in self._sockets:
            each.sendall(self._request)
        for each in self._sockets:
            self._read_response(each)

    def close(self) -> None:
        """Close the connections."""
        for each in self._sockets:
            each.close()

    def _read_response(self, connection: socket.socket) -> None:
        found = b""
        while (end := found.find(b"\r\n\r\n")) < 0 or len(found) < end + 4 + self._size:
            received = connection.recv(1 << 20)
            if not received:
                raise RuntimeError(f"the server closed a connection: see {self._log}")
            found += received
        if not found.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server answered {found[:200]!r}")


def process_clock(pid: int) -> int:
    """Return the Linux clock of the processor time that all threads of a process have used, in nanoseconds.

    See clock_getcpuclockid(3). Python has no function for the clock of another process.
    """
    return ~pid << 3 | 2


def measure(server: Server, load: Load, pairs: int) -> tuple[list[float], list[float], float]:
    """Compare blocks with tracing to blocks without.

    Return the ratios of their time and of their processor time, and the median processor time of a request without
    tracing in seconds.
    """
    bursts = max(1, REQUESTS // load.connections)
    clock = process_clock(server.process.pid)
    pairs += pairs % 2  # so that tracing is on again at the end
    connections = Connections(server, load)

    def block() -> tuple[float, float]:
        for _ in range(1 + bursts // 4):  # the state has changed, and the caches of the processor are warm again
            connections.burst()
        started, spent = perf_counter(), clock_gettime(clock)
        for _ in range(bursts):
            connections.burst()
        return perf_counter() - started, clock_gettime(clock) - spent

    times, costs, plain = [], [], []
    try:
        block()
        for turn in range(pairs):
            first, second = block(), switched(server, block)
            on, off = (first, second) if turn % 2 == 0 else (second, first)
            times.append(on[0] / off[0])
            costs.append(on[1] / off[1])
            plain.append(off[1] / (bursts * load.connections))
    finally:
        connections.close()
    return times, costs, median(plain)


def switched(server: Server, block: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """Switch the tracing of the server, and return what `block` returns."""
    os.kill(server.process.pid, signal.SIGUSR2)
    return block()


def describe_mean(ratios: list[float]) -> str:
    """Return the trimmed geometric mean of ratios, with its 95 % confidence interval in brackets."""
    logs = np.log(ratios)
    low, high = np.exp(trimmed_mean_ci(logs, (TRIMMED, TRIMMED)))
    return f"{np.exp(trim_mean(logs, TRIMMED)):.4f} ({low:.4f}-{high:.4f})"


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


def untraced_microseconds() -> float:
    """Return the processor time of what a server without tracing does for tracing in each request, in microseconds.

    It keeps the header `traceparent` in the record of the request, and finds that there is no tracer.
    """
    metrics, record = Metrics(SharedCounters()), RequestRecord("0123456789abcdef", "POST", "/anomaly", "127.0.0.1")
    headers = {b"host": b"127.0.0.1", b"content-type": b"application/json", b"content-length": b"100"}
    work = """
record.traceparent = headers.get(b"traceparent", b"")
if metrics.tracer and metrics.tracer.finish(record):
    pass
if record.trace_id:
    pass
"""
    names = {"metrics": metrics, "record": record, "headers": headers}
    return min(timeit.repeat(work, globals=names, timer=process_time, number=1_000_000))


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
    parser.add_argument("--pairs", type=int, default=300, help="pairs of blocks for each load (300)")
    parser.add_argument("--load", default="", help="part of the titles of the loads to measure")
    parser.add_argument("--smoke", action="store_true", help="few pairs of blocks, two loads")
    options = parser.parse_args()
    if options.smoke:
        options.pairs = 6
    adopt_orphans()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workload = train_models(ROOT, Path(folder))
        url, received = stack.enter_context(discarding_collector())
        tracing = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": RATIO,
        }
        server = start(ROOT, workload, stack, "server", tracing, module="benchmarks.serving.switched_tracing")
        print("| load | time | processor time | without tracing, µs of a core per request |\n|---|---|---|---|")
        for load in loads(workload, smoke=options.smoke):
            if options.load in load.title:
                times, costs, plain = measure(server, load, options.pairs)
                print(
                    f"| {load.title} | {describe_mean(times)} | {describe_mean(costs)} | {1e6 * plain:.0f} |",
                    flush=True,
                )
        often = {**tracing, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        added = added_microseconds(often, requests=2000 if options.smoke else 50_000)
        print(f"\nTracing {RATIO} of the requests adds {describe(added)} µs of processor time to a request.")
        print(f"\nA server without tracing spends {untraced_microseconds():.2f} µs of a request on it.")
        print(f"\nThe collector received {len(received)} requests with {sum(received):,} bytes of spans.")


if __name__ == "__main__":
    main()
