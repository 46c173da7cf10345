"""Measure what tracing costs: servers that trace 1 % of their requests or none, and a server of an older commit.

    git worktree add ../before COMMIT
    python benchmarks/serving/tracing.py ../before

COMMIT has no tracing. The servers run with the same interpreter, models and requests, and send their spans to an OTLP
collector that discards them. For each kind of load, they are measured in turn, in an order that changes from round to
round. The ratios are those of rates and of processor times per response in the same round: `on` to `off`, and `off` to
the older commit. The table shows the median over the rounds, with the quartiles in brackets.

Options: --rounds (default 10), --seconds per measurement (default 2), --load TITLE (only the loads whose title contains
TITLE), --smoke (one short round of two loads).
"""

import argparse
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from time import process_time, sleep

from benchmarks.data import ROOT
from benchmarks.serving.compare_checkouts import Load, Measurement, Server, describe, loads, start, train_models
from benchmarks.serving.server_process import adopt_orphans
from service.monitoring.metrics import Metrics
from service.monitoring.request_record import RequestRecord
from service.shared_memory import SharedCounters

RATIO = "0.01"


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


def compare(servers: dict[str, Server], wanted: list[Load], rounds: int, seconds: float) -> None:
    """Measure the servers, and print a table."""
    pairs = [("on", "off"), ("off", "before")] if "before" in servers else [("on", "off")]
    print("| load |" + "".join(f" {name}, 1/s |" for name in servers), end="")
    print("".join(f" {one} to {other}: rate | processor time |" for one, other in pairs))
    print("|---" * (1 + len(servers) + 2 * len(pairs)) + "|")
    for load in wanted:
        found: dict[str, list[Measurement]] = {name: [] for name in servers}
        for server in servers.values():
            server.measure(load, min(1.0, seconds))  # warm-up
        for turn in range(rounds):
            names = list(servers)[turn % len(servers) :] + list(servers)[: turn % len(servers)]
            for name in reversed(names) if turn % 2 else names:
                found[name].append(servers[name].measure(load, seconds))
        cells = [f"{median(each.rate for each in found[name]):,.0f}" for name in servers]
        for one, other in pairs:
            both = list(zip(found[one], found[other], strict=True))
            cells.append(describe([mine.rate / theirs.rate for mine, theirs in both]))
            cells.append(describe([mine.cost / theirs.cost for mine, theirs in both]))
        print(f"| {load.title} | {' | '.join(cells)} |", flush=True)


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
    parser.add_argument("--rounds", type=int, default=10, help="rounds (10)")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per measurement (2)")
    parser.add_argument("--load", default="", help="part of the titles of the loads to measure")
    parser.add_argument("--smoke", action="store_true", help="one short round of two loads")
    options = parser.parse_args()
    if options.smoke:
        options.rounds, options.seconds = 1, 0.1
    adopt_orphans()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workload = train_models((options.before or ROOT).resolve(), Path(folder))
        url, received = stack.enter_context(discarding_collector())
        tracing = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": url,
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": RATIO,
        }
        servers = {
            "on": start(ROOT, workload, stack, "on", tracing),
            "off": start(ROOT, workload, stack, "off"),
        }
        if options.before:
            servers["before"] = start(options.before.resolve(), workload, stack, "before")
        wanted = [load for load in loads(workload, smoke=options.smoke) if options.load in load.title]
        compare(servers, wanted, options.rounds, options.seconds)
        often = {**tracing, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        added = added_microseconds(often, requests=2000 if options.smoke else 50_000)
        print(f"\nTracing {RATIO} of the requests adds {describe(added)} µs of processor time to a request.")
        print(f"\nThe collector received {len(received)} requests with {sum(received):,} bytes of spans.")


if __name__ == "__main__":
    main()
