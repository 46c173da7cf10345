"""Send requests with random changes to a running server, and measure how it responds.

    python benchmarks/serving/structured_fuzz.py                    # 100,000 requests
    python benchmarks/serving/structured_fuzz.py --requests 20000 --seed 7
    python benchmarks/serving/structured_fuzz.py --smoke            # 600 requests

Each request begins as a valid one: a path, a query, headers, and a body in one of the formats that the server reads.
`tests/fuzz/mutations.py` then changes most requests, with changes for each format. Client processes send the requests
over keep-alive connections, one request at a time per connection. The same seed gives the same requests.

Meanwhile another process, the observer, asks the server for /livez up to 50 times per second. As often, it sends a
request to a control process, which does nothing but respond. On a busy machine both respond late, because processes
wait for a processor. The kernel counts this time for each thread (/proc/PID/schedstat). From each response time, the
observer subtracts the time for which its own thread or the thread of the event loop waited for a processor. The rest is
due to the server, or to another thread of the server that holds Python's interpreter lock while it waits for a
processor.

The server has low limits, MAX_ROWS and MAX_BODY_BYTES, so that small requests reach them. `hostile_requests.py` has the
requests at the limits of the default settings.

The report has these parts:

- the number of responses by status;
- how long the responses of /livez and of the control process took;
- the memory of all processes of the server, without the pages of files, after each tenth of the requests and at the
  end.

The program exits with code 1 if a response has status 500, if a request gets no complete response within 60 s, if the
server logs a traceback, or if /livez fails. Unless --smoke is given, it also exits with 1 if memory grows by MAX_GROWTH
or more after the first fifth of the requests. A request that failed is written to build/fuzz/. The benchmark needs
Linux.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from random import Random
from time import perf_counter, sleep
from urllib.parse import quote

import httptools
import numpy as np

from benchmarks.data import ROOT, describe_machine
from benchmarks.serving.checking_client import wait_until_listening
from benchmarks.serving.server_process import ServerProcess, adopt_orphans, free_port, own_memory
from service.codec import ndjson, npy, safetensors
from tests.fuzz import mutations
from tests.fuzz.oracle import MAX_BODY_BYTES, MAX_ROWS
from tests.fuzz.targets import TARGETS
from tests.service.hosts import host_table
from training.config import TrainConfig
from training.data.table import read_table
from training.progress import SilentReporter
from training.train import train

MIB = 2**20
PROCESSES = 2  # number of client processes
CONNECTIONS = 4  # connections per process
VALID_SHARE = 0.2  # share of the requests that stay valid
LARGE_SHARE = 0.05  # share of the requests that begin with a large body, if the format has one
LARGE_BYTES = 8 * 1024
RESPONSE_SECONDS = 60.0  # a request without a response after this time has failed
POLL_SECONDS = 0.02  # interval between two requests for /livez
STALL_SECONDS = 0.05
MAX_GROWTH = 0.05
FOLDER = ROOT / "build" / "fuzz"
JSON, CSV, NDJSON = "application/json", "text/csv", ndjson.MEDIA_TYPES[0]
ACCEPTED = (JSON, NDJSON, npy.MEDIA_TYPE, safetensors.MEDIA_TYPE, "image/png", "*/*", "text/html", "x", "a/b;q=2")
OPTIONS = {  # the query options of each path, with a valid text
    "/anomaly": ("alpha=.05", "explain=1", "half_life_rows=30", "fdr=.1", "detail=none", "impute=true"),
    "/encode": ("sample=true", "seed=3"),
    "/reconstruct": (),
    "/decode": (),
    "/sample": ("n=2", "seed=1", "temperature=.5"),
    "/interpolate": ("steps=3", "method=slerp"),
    "/api/v1/write": (),
}
OBJECTS: dict[str, tuple[object, ...]] = {  # valid JSON bodies for the endpoints whose JSON no fuzz target reads
    "/reconstruct": ({"inputs": [[1.0, 2.0, 3.0, 4.0]]},),
    "/decode": ({"latents": [[0.5, -0.5]]}, {"latents": [[0.0, 0.0]] * 3, "observe": True, "seed": 4}),
    "/sample": ({"n": 3, "seed": 1, "temperature": 1.0}, {}),
    "/interpolate": ({"start": {"latent": [0, 1]}, "end": {"input": [1, 2, 3, 4]}, "steps": 5, "method": "slerp"},),
}
READS = ("/", "/models", "/models/hosts", "/metrics", "/livez", "/readyz", "/docs", "/openapi.json", "/no-such-path")
READ_SHARE = 0.1  # share of GET requests


@dataclass(frozen=True)
class Format:
    """A kind of request body.

    Args:
        path: the path that reads it.
        headers: the headers that describe it.
        seeds: returns valid bodies.
        mutate: changes a body.
        model: the model that it is for.
    """

    path: str
    headers: tuple[str, ...]
    seeds: Callable[[], list[bytes]]
    mutate: mutations.Mutate
    model: str = "hosts"


def _of_target(name: str, path: str, *headers: str, model: str = "hosts") -> list[Format]:
    """Return the formats of a fuzz target: uncompressed, and compressed with gzip if there is a target for that too."""
    plain = TARGETS[name]
    formats = [Format(path, headers, cache(plain.seeds), plain.mutate, model)]
    if gzipped := TARGETS.get(f"{name}-gzip"):
        formats.append(Format(path, (*headers, "Content-Encoding: gzip"), cache(gzipped.seeds), gzipped.mutate, model))
    return formats


def _of_objects(path: str) -> Format:
    seeds = [json.dumps(one).encode() for one in OBJECTS[path]]
    return Format(path, (f"Content-Type: {JSON}",), lambda: seeds, mutations.mutate_json)


FORMATS = [
    *_of_target("json", "/anomaly", f"Content-Type: {JSON}"),
    *_of_target("json-encode", "/encode", f"Content-Type: {JSON}"),
    *_of_target("records", "/anomaly", f"Content-Type: {JSON}"),
    *_of_target("telegraf", "/anomaly", "Content-Type: text/plain"),
    *_of_target("ndjson", "/anomaly", f"Content-Type: {NDJSON}"),
    *_of_target("csv", "/anomaly", f"Content-Type: {CSV}"),
    *_of_target("npy", "/anomaly", f"Content-Type: {npy.MEDIA_TYPE}"),
    *_of_target("npy", "/reconstruct", f"Content-Type: {npy.MEDIA_TYPE}"),
    *_of_target("safetensors", "/encode", f"Content-Type: {safetensors.MEDIA_TYPE}"),
    *_of_target("png", "/anomaly", "Content-Type: image/png", model="digits"),
    *_of_target("jpeg", "/reconstruct", "Content-Type: image/jpeg", model="digits"),
    *_of_target("ndjson-stream", "/anomaly", f"Content-Type: {NDJSON}", f"Accept: {NDJSON}"),
    *_of_target("remote-write", "/api/v1/write", "Content-Type: application/x-protobuf", "Content-Encoding: snappy"),
    *(_of_objects(path) for path in OBJECTS),
]


def make_request(random: Random) -> bytes:
    """Return the bytes of a random request."""
    if random.random() < READ_SHARE:
        return _make_read(random)
    form = random.choice(FORMATS)
    is_large = random.random() < LARGE_SHARE
    seeds = [seed for seed in form.seeds() if (len(seed) > LARGE_BYTES) == is_large]
    body = random.choice(seeds or form.seeds())
    options = random.sample(OPTIONS[form.path], random.randint(0, min(2, len(OPTIONS[form.path]))))
    query = "&".join([f"model={form.model}", *options])
    headers = list(form.headers)
    if random.random() >= VALID_SHARE:
        for _ in range(random.randint(1, 3)):
            body = form.mutate(body, random)
        if random.random() < 0.1:
            query = quote(mutations.mutate_query(query.encode(), random)[:2000], safe="=&%")
        if random.random() < 0.1:
            headers[0] = random.choice(FORMATS).headers[0]
        if random.random() < 0.1:
            headers.append(f"X-Request-Timeout: {random.choice(('0', '-1', 'x', '1e999', '.01', '5'))}")
    if random.random() < 0.2 and "Accept:" not in "".join(headers):
        headers.append(f"Accept: {random.choice(ACCEPTED)}")
    head = [f"POST {form.path}?{query} HTTP/1.1", "Host: elbo", *headers]
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body


def _make_read(random: Random) -> bytes:
    path = random.choice(READS)
    if random.random() < 0.3:
        path += quote(random.choice(mutations.EXTREME_TEXTS).encode("utf-8", "replace")[:200])
    if random.random() < 0.3:
        path += "?" + quote(mutations.mutate_query(b"model=hosts&reference=hosts@1", random)[:2000], safe="=&%")
    method = random.choice(("GET", "GET", "GET", "OPTIONS", "DELETE", "POST"))
    length = "Content-Length: 0\r\n" if method == "POST" else ""
    return f"{method} {path} HTTP/1.1\r\nHost: elbo\r\nAccept: {random.choice(ACCEPTED)}\r\n{length}\r\n".encode()


class Client(asyncio.Protocol):
    """A connection that sends one request at a time."""

    def __init__(self) -> None:
        self.status = 0
        self.is_open = False
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to receive."""
        self._transport = transport
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        """Parse a part of the response."""
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """Note the status: the response is complete."""
        self.status = self._parser.get_status_code()
        if not self._parser.should_keep_alive():
            self._transport.close()
            self.is_open = False
        self._finish()

    def connection_lost(self, _: Exception | None) -> None:
        """End the request. Its status is 0 if the response is incomplete."""
        self.is_open = False
        self._finish()

    def _finish(self) -> None:
        if self._done and not self._done.done():
            self._done.set_result(None)

    async def send(self, request: bytes) -> int:
        """Send a request and return the status of the response; 0 if there was none."""
        self.status = 0
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)  # type: ignore[attr-defined] # a transport of a socket
        try:
            async with asyncio.timeout(RESPONSE_SECONDS):
                await self._done
        except TimeoutError:
            self._transport.abort()  # type: ignore[attr-defined]
            self.is_open = False
        return self.status


@dataclass
class Outcomes:
    """The number of responses by status, and the requests that failed, with their status."""

    statuses: Counter[int] = field(default_factory=Counter)
    failed: list[tuple[int, bytes]] = field(default_factory=list)


def send_requests(
    port: int, seed: str, count: int, seconds: float, progress: "Synchronized[int]", results: Connection
) -> None:
    """Send `count` requests over CONNECTIONS connections, but stop after `seconds`.

    Then send the outcomes through `results`.
    """
    outcomes = Outcomes()
    end = perf_counter() + seconds

    async def send(name: str, count: int) -> None:
        client = Client()
        for number in range(count):
            if perf_counter() > end:
                break
            request = make_request(Random(f"{name}/{number}"))
            if not client.is_open:
                _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
            was_used = client.status > 0
            status = await client.send(request)
            if status == 0 and was_used:  # the server may close an idle connection just as the request is sent
                _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
                status = await client.send(request)
            outcomes.statuses[status] += 1
            if status in (0, 500):
                outcomes.failed.append((status, request))
            with progress.get_lock():
                progress.value += 1

    async def send_all() -> None:
        shares = [count // CONNECTIONS + (index < count % CONNECTIONS) for index in range(CONNECTIONS)]
        await asyncio.gather(*(send(f"{seed}/{index}", share) for index, share in enumerate(shares)))

    asyncio.run(send_all())
    results.send(outcomes)


def serve_control(port: int) -> None:
    """Respond to every request at once, as /livez does, and do nothing else."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async def serve() -> None:
        async with await asyncio.start_server(respond, "127.0.0.1", port) as server:
            await server.serve_forever()

    asyncio.run(serve())


@dataclass
class Waits:
    """How long the responses of a process took, in seconds.

    Args:
        total: from the request to the response.
        own: the same without the time for which the observer and the process waited for a processor.
        failures: number of responses by status, for statuses other than 200.
    """

    total: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    failures: Counter[int] = field(default_factory=Counter)


def seconds_without_processor(pid: int) -> float:
    """Return for how long the first thread of a process has been ready to run, but had no processor."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9


def observe(processes: tuple[tuple[int, int], ...], stop: Connection) -> None:
    """Ask each process for /livez until `stop` has a message. Then send the `Waits` of each through `stop`.

    Args:
        processes: port and process ID of each.
        stop: a pipe.
    """
    request = b"GET /livez HTTP/1.1\r\nHost: elbo\r\n\r\n"

    async def ask(port: int, pid: int) -> Waits:
        waits, client = Waits(), Client()
        while not stop.poll():
            if not client.is_open:
                _, client = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
            without = seconds_without_processor(pid) + seconds_without_processor(os.getpid())
            started = perf_counter()
            status = await client.send(request)
            waits.total.append(perf_counter() - started)
            without = seconds_without_processor(pid) + seconds_without_processor(os.getpid()) - without
            waits.own.append(max(0.0, waits.total[-1] - without))
            if status != 200:
                waits.failures[status] += 1
            await asyncio.sleep(POLL_SECONDS)
        return waits

    async def ask_all() -> list[Waits]:
        return await asyncio.gather(*(ask(*process) for process in processes))

    stop.send(asyncio.run(ask_all()))


def memory_of(server: ServerProcess) -> float:
    """Return the memory of all processes of the server, in MiB."""
    return sum(map(own_memory, (server.pid, *server.descendants()))) / MIB


@dataclass(frozen=True)
class Run:
    """What a run has shown.

    Args:
        outcomes: the responses.
        seconds: the duration.
        memory: the memory of the server after each tenth of the requests and at the end, in MiB.
        waits: how long the responses of /livez took, and those of the control process.
    """

    outcomes: Outcomes
    seconds: float
    memory: list[float]
    waits: list[Waits]


def run(server: ServerProcess, port: int, requests: int, minutes: float, seed: int) -> Run:
    """Send the requests, and return what the run has shown."""
    context = multiprocessing.get_context("spawn")
    control_port = free_port()
    control = context.Process(target=serve_control, args=(control_port,), daemon=True)
    control.start()
    asyncio.run(wait_until_listening(control_port, 120))
    assert control.pid
    processes = ((port, server.pid), (control_port, control.pid))
    ours, theirs = context.Pipe()
    observer = context.Process(target=observe, args=(processes, theirs), daemon=True)
    observer.start()
    progress = context.Value("i", 0)
    pipes, clients = [], []
    for index in range(PROCESSES):
        receiver, sender = context.Pipe(duplex=False)
        share = requests // PROCESSES + (index < requests % PROCESSES)
        clients.append(
            context.Process(target=send_requests, args=(port, f"{seed}/{index}", share, 60 * minutes, progress, sender))
        )
        pipes.append(receiver)
    for client in clients:
        client.start()
    memory: list[float] = []
    started = 0.0
    while not all(pipe.poll() for pipe in pipes):
        sleep(0.1)
        server.require_alive()
        if progress.value and not started:
            started = perf_counter()
        if not all(client.is_alive() or pipe.poll() for client, pipe in zip(clients, pipes, strict=True)):
            raise RuntimeError("a process of clients has ended early")
        if progress.value >= requests * (len(memory) + 1) / 10:
            memory.append(memory_of(server))
            print(f"{progress.value} requests, {memory[-1]:.0f} MiB", file=sys.stderr, flush=True)
    seconds = perf_counter() - started
    memory.append(memory_of(server))
    outcomes = Outcomes()
    for pipe in pipes:
        part = pipe.recv()
        outcomes.statuses += part.statuses
        outcomes.failed += part.failed
    ours.send("stop")
    waits = ours.recv()
    control.terminate()
    return Run(outcomes, seconds, memory, waits)


def report(found: Run) -> bool:
    """Print the report. Return False if a request failed, or if /livez failed."""
    print(f"{found.outcomes.statuses.total()} requests in {found.seconds:.0f} s\n\n| status | responses |\n|---|---|")
    for status, count in sorted(found.outcomes.statuses.items()):
        print(f"| {status or 'none'} | {count} |")
    print("\n| waits, ms | number | p50 | p99.9 | longest | over 50 ms |\n|---|---|---|---|---|---|")
    for name, waits in zip(("/livez", "control process"), found.waits, strict=True):
        for kind, seconds in (("", waits.total), (", without the waits for a processor", waits.own)):
            median, high = np.percentile(seconds, (50, 99.9)) * 1e3
            over = sum(wait > STALL_SECONDS for wait in seconds)
            print(f"| {name}{kind} | {len(seconds)} | {median:.1f} | {high:.1f} | {1e3 * max(seconds):.0f} | {over} |")
    memory = ", ".join(f"{each:.0f}" for each in found.memory)
    print(f"\nmemory after each tenth of the requests and at the end, MiB: {memory}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, (status, request) in enumerate(found.outcomes.failed):
        path = FOLDER / f"structured-{status}-{number}.http"
        path.write_bytes(request)
        print(f"response {status or 'none'} to {path.relative_to(ROOT)}: {request[:100]!r}")
    if found.waits[0].failures:
        print(f"/livez failed: {found.waits[0].failures}")
    return not found.outcomes.failed and not found.waits[0].failures


def main() -> None:
    """Train the models, start a server, send the requests, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="600 requests")
    options = parser.parse_args()
    requests = 600 if options.smoke else options.requests
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="elbo-fuzz-") as name:
        folder = Path(name)
        artifacts = folder / "artifacts"
        train(TrainConfig(model="pca", name="hosts", latents=2), host_table(), artifacts, SilentReporter())
        train(TrainConfig(model="pca", name="digits", latents=8), read_table("digits"), artifacts, SilentReporter())
        port = free_port()
        environment = {
            "OMP_NUM_THREADS": "1", "ELBO_PORT": str(port), "ELBO_ARTIFACTS": str(artifacts),
            "ELBO_DEFAULT_MODEL": "hosts", "ELBO_MAX_ROWS": str(MAX_ROWS), "ELBO_MAX_BODY_BYTES": str(MAX_BODY_BYTES),
        }  # fmt: skip
        with ServerProcess([sys.executable, "-m", "service"], environment, folder / "elbo.log") as server:
            while "listening on" not in server.log.read_text():
                server.require_alive()
                sleep(0.1)
            print(f"{describe_machine('torch', 'uvicorn')}; 1 worker; seed {options.seed}\n")
            found = run(server, port, requests, options.minutes, options.seed)
            errors = [line for line in server.log.read_text().splitlines() if "Traceback" in line]
        passed = report(found)
    if errors:
        print(f"the server logged {len(errors)} tracebacks")
    growth = found.memory[-1] / found.memory[min(1, len(found.memory) - 1)] - 1
    print(f"memory grew by {growth:.1%} after the first fifth")
    sys.exit(0 if passed and not errors and (options.smoke or growth < MAX_GROWTH) else 1)


if __name__ == "__main__":
    main()
