"""Measure how hostile requests affect Elbo's server and its other clients.

    python benchmarks/serving/hostile_requests.py                     # all attacks
    python benchmarks/serving/hostile_requests.py --only empty-lists  # one attack
    python benchmarks/serving/hostile_requests.py --smoke             # small bodies, short pauses

One process sends honest requests all the time: a row to score, 40 times per second, and `GET /livez`, 100 times per
second. Another process sends the attacks at the lowest priority, because attackers are on other machines: they must not
take the processor from the server or from the honest clients. It repeats an attack until ATTACK_SECONDS have passed,
and a client that is refused with 429 tries once more. For each attack, the table shows:

- the responses to the attack, and after how many seconds the slowest one arrived;
- how much the memory of the server rose meanwhile, in MiB and as a multiple of ELBO_MAX_BODY_BYTES. The column
  "sent" has the size of one attack;
- the slowest answer of /livez, before and during the attack;
- the 99th percentile of the latency of the honest requests, before and during the attack.

The program exits with code 1 if an attack gets an unexpected response or, within RESPONSE_SECONDS, neither a response
nor the end of its connection, or if an honest request fails. The benchmark needs Linux. To add an attack, write a
function that makes its body, and add it to ATTACKS.
"""

import argparse
import asyncio
import gzip
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, sleep

import cramjam
import numpy as np

from benchmarks.data import ROOT, describe_machine
from benchmarks.serving.checking_client import Connection
from benchmarks.serving.server_process import ServerProcess, adopt_orphans, free_port
from benchmarks.serving.workload import FEW_FEATURES, create_workload

MIB = 2**20
MAX_BODY = 64 * MIB  # the default of ELBO_MAX_BODY_BYTES
RESPONSE_SECONDS = 120.0  # how long to wait for the response to an attack
ATTACK_SECONDS = 8.0  # an attack is repeated until this time has passed
RETRY_SECONDS = 1.0  # a client tries a refused request once more after this time, as Retry-After asks it to
BEFORE_SECONDS = 5.0  # time before the attack in which the honest latencies are measured for comparison
ATTACKERS_NICE = 19  # the lowest priority
LIVEZ_SECONDS = 0.01  # interval between two requests for /livez
HONEST_SECONDS = 0.025  # interval between two honest requests
REFUSED = 429
JSON, CSV, NDJSON = "application/json", "text/csv", "application/x-ndjson"
PROTOBUF, WRITE = "application/x-protobuf", "/api/v1/write"
RECORD = json.dumps({f"x{index}": 0.5 for index in range(FEW_FEATURES)}).encode()
HONEST_BODY = b'{"records":[%b]}' % RECORD


@dataclass(frozen=True)
class Attack:
    """A request, or several at once.

    Args:
        expected: the statuses with which the server may respond.
        body: returns the body for a size in bytes, before compression.
        content_type: the Content-Type.
        gzipped: whether the body is sent compressed.
        snappy: whether the body is sent as a snappy block, as remote write needs it.
        streams: whether the response is a stream of verdicts.
        path: the path.
        size: the size in bytes, before compression.
        connections: how many connections send the request at once.
        start: bytes that are sent in place of the head of the request; if they are given, the body has no end.
        unread_seconds: how long to wait before the response is read.
        model: the model that the request is for.
    """

    expected: tuple[int, ...]
    body: Callable[[int], bytes]
    content_type: str = JSON
    gzipped: bool = False
    snappy: bool = False
    streams: bool = False
    path: str = "/anomaly"
    size: int = 4 * MIB
    connections: int = 1
    start: bytes = b""
    unread_seconds: float = 0.0
    model: str = "hosts"

    def request(self, share: float) -> bytes:
        """Return the bytes of the request. Its body has `share` times `size` bytes; smoke tests use a small share."""
        body = self.body(int(self.size * share))
        if self.start:
            return self.start + body
        head = [f"POST {self.path}?model={self.model} HTTP/1.1", "Host: elbo", f"Content-Type: {self.content_type}"]
        if self.gzipped:
            body = gzip.compress(body, 6)
        if self.snappy:
            body = bytes(cramjam.snappy.compress_raw(body))
            head.append("Content-Encoding: snappy")
        elif self.gzipped or body.startswith(b"\x1f\x8b"):
            head.append("Content-Encoding: gzip")
        if self.streams:
            head.append(f"Accept: {NDJSON}")
        return "\r\n".join([*head, f"Content-Length: {len(body)}", "Connection: close", "", ""]).encode() + body


def repeated(piece: bytes, before: bytes = b"", after: bytes = b"") -> Callable[[int], bytes]:
    """Return a function that makes a body: `before`, then `piece` up to the size, then `after`."""
    return lambda size: before + piece * max(1, (size - len(before) - len(after)) // len(piece)) + after


def field(number: int, value: bytes) -> bytes:
    """Return a field of a protobuf message, for a value of less than 2 MiB."""
    length = len(value)
    return bytes([number << 3 | 2, length & 127 | 128, length >> 7 & 127 | 128, length >> 14]) + value


def label(name: bytes, text: bytes) -> bytes:
    """Return a label of a series of remote write."""
    return field(1, field(1, name) + field(2, text))


def series_of_500_kb(size: int) -> bytes:
    """Return series with different label sets of 500 KB, each with one sample."""
    return b"".join(field(1, label(b"a", b"%0500000d" % index) + field(2, b"")) for index in range(size // 500_000))


def series_with_different_times(size: int) -> bytes:
    """Return samples of one feature, each at another time: each becomes a row that lacks all other features."""
    name = label(b"__name__", b"x0")
    series = (
        field(1, name + field(2, b"\x10" + bytes([i & 127 | 128, i >> 7 & 127 | 128, i >> 14])))
        for i in range(size // 36)
    )
    return b"".join(series)


def write_request(body: Callable[[int], bytes], *expected: int, size: int = 60 * MIB) -> Attack:
    """Return an attack by remote write."""
    return Attack(expected, body, PROTOBUF, snappy=True, path=WRITE, size=size)


def record_of_a_long_host(size: int) -> bytes:
    """Return an abnormal record whose host has a name of `size` bytes."""
    return b'{"records":[{"host":"' + b"h" * size + b'",' + RECORD.replace(b"0.5", b"1e9")[1:] + b"]}"


def many_rows(size: int) -> bytes:
    """Return rows of numbers that a model accepts: 10,000 rows in 1.2 MB."""
    row = b"[" + b",".join([b"0.123"] * FEW_FEATURES) + b"]"
    return b'{"inputs":[' + b",".join([row] * min(10_000, size // len(row))) + b"]}"


def many_groups(size: int) -> bytes:
    """Return abnormal records, each of another group: 10,000 records in 2.5 MB."""
    record = RECORD.replace(b"0.5", b"1e6")
    records = [b'{"host":"h%d",' % index + record[1:] for index in range(min(10_000, size // (len(record) + 16)))]
    return b'{"records":[' + b",".join(records) + b"]}"


CSV_HEADER = ",".join(f"x{index}" for index in range(FEW_FEATURES)).encode() + b"\n"
CHUNKED = b"POST /anomaly HTTP/1.1\r\nHost: elbo\r\nContent-Type: text/csv\r\nTransfer-Encoding: chunked\r\n\r\n"
EMPTY_MEMBER = gzip.compress(b"")
ATTACKS: dict[str, Attack] = {
    "csv-short-lines": Attack((413,), repeated(b"x\n", CSV_HEADER), CSV),
    "csv-blank-lines": Attack((413, 422), repeated(b"\n", CSV_HEADER), CSV, size=MAX_BODY),
    "csv-one-line": Attack((413, 422), repeated(b"1,", CSV_HEADER), CSV, size=MAX_BODY),
    "csv-not-utf-8": Attack((413, 422), repeated(b"\xff", CSV_HEADER), CSV, size=16 * MIB),
    "csv-quotations": Attack((413, 422), repeated(b'"a\n', CSV_HEADER), CSV),
    "ndjson-short-lines": Attack((413,), repeated(b"x\n"), NDJSON),
    "ndjson-blank-lines": Attack((413, 422), repeated(b"\n"), NDJSON, size=MAX_BODY),
    "ndjson-stream": Attack((200,), repeated(b"x\n"), NDJSON, streams=True),
    "ndjson-gzip-3-gb": Attack((413,), repeated(b"x\n"), NDJSON, gzipped=True, size=MAX_BODY - 1024),
    "empty-lists": Attack((413, 422), repeated(b"[],", b'{"inputs":[', b"[]]}")),
    "empty-lists-gzip": Attack((413, 422), repeated(b"[],", b'{"inputs":[', b"[]]}"), gzipped=True, size=60 * MIB),
    "empty-objects": Attack((413, 422), repeated(b"{},", b'{"records":[', b"{}]}"), size=MAX_BODY),
    "lists-in-a-row": Attack((413, 422), repeated(b"[],", b'{"inputs":[[', b"[]]]}"), size=MAX_BODY),
    "lists-in-a-field": Attack((413, 422), repeated(b"[],", b'{"x":[', b"[]]}"), size=MAX_BODY),
    "one-row-of-numbers": Attack((413, 422), repeated(b"1,", b'{"inputs":[', b"1]}"), size=MAX_BODY),
    "keys": Attack(
        (413, 422), lambda size: b"{" + b",".join(b'"k%d":1' % i for i in range(size // 11)) + b"}", size=16 * MIB
    ),
    "keys-of-a-record": Attack(
        (413, 422),
        lambda size: b'{"records":[{' + b",".join(b'"k%d":1' % i for i in range(size // 11)) + b"}]}",
        size=16 * MIB,
    ),
    "duplicate-keys": Attack((413, 422), repeated(b'{"a":1,"a":1},', b'{"records":[', b"{}]}"), size=16 * MIB),
    "long-string": Attack((413, 422), repeated(b"x", b'{"records":[{"a":"', b'"}]}'), size=MAX_BODY),
    "escapes": Attack((413, 422), repeated(rb"\"", b'{"records":[{"a":"', b'"}]}'), size=16 * MIB),
    "strings": Attack((413, 422), repeated(b'"ab",', b'{"inputs":[', b'"ab"]}'), size=MAX_BODY),
    "not-finite": Attack((413, 422), repeated(b"[NaN],", b'{"inputs":[', b"[NaN]]}"), size=16 * MIB),
    "interpolate": Attack(
        (413, 422), repeated(b"[],", b'{"start":{"input":[', b"[]]}}"), size=16 * MIB, path="/interpolate"
    ),
    "rows-of-numbers": Attack(
        (413,), repeated(b"[" + b",".join([b"0.5"] * FEW_FEATURES) + b"],", b'{"inputs":[', b"[1]]}"), size=MAX_BODY
    ),
    "telegraf": Attack((413, 422), repeated(b"[],", b'{"metrics":[', b"[]]}"), size=16 * MIB),
    "gzip-empty-members": Attack((413, 422), repeated(EMPTY_MEMBER), size=8 * MIB),
    "gzip-empty-members-stream": Attack(
        (200, 422), repeated(EMPTY_MEMBER), NDJSON, streams=True, size=266 * 1024
    ),
    "gzip-small-members": Attack((413, 422), repeated(gzip.compress(b"\n")), NDJSON, size=8 * MIB),
    "remote-write-empty-series": write_request(repeated(field(1, b"")), 413),
    "remote-write-empty-samples": write_request(repeated(field(1, b"\x12\x00")), 413),
    "remote-write-empty-labels": write_request(
        lambda size: field(1, b"\x0a\x00" * (size // 2) + b"\x12\x00"), 413, size=2 * MIB - 16
    ),
    "remote-write-labels-of-500-kb": write_request(series_of_500_kb, 413),
    "remote-write-rows": write_request(series_with_different_times, 413, size=4 * MIB),
    "host-of-1.5-mb": Attack((200, 413, 422), record_of_a_long_host, size=1_500_000, connections=16),
    # The server may close the connection before it has received everything: then the client gets no response (0).
    "trailer": Attack((0, 400), repeated(b"y"), start=CHUNKED + b"1\r\n{\r\n0\r\nx: ", size=256 * MIB),
    "trailer-lines": Attack((0, 400), repeated(b"x: y\r\n"), start=CHUNKED + b"1\r\n{\r\n0\r\n", size=256 * MIB),
    "chunk-extension": Attack((0, 400), repeated(b"x"), start=CHUNKED + b"1;", size=256 * MIB),
    "chunks-of-one-byte": Attack((0, 400), repeated(b"1\r\n \r\n"), start=CHUNKED, size=64 * MIB),
    "empty-lines": Attack((0, 400), repeated(b"\r\n"), start=b"\r\n", size=64 * MIB),
    "unread-responses": Attack(
        (0, 200, 429), lambda _: b'{"n":10000}', path="/sample", connections=60, unread_seconds=5.0
    ),
    "samples-of-a-wide-model": Attack(
        (200, 429), lambda _: b'{"n":10000}', path="/sample", connections=60, model="vae"
    ),
    "reconstructions": Attack((200, 429), many_rows, path="/reconstruct", size=1_400_000, connections=60),
    "verdicts": Attack((200, 429), many_rows, size=1_400_000, connections=60),
    "verdicts-of-one-client": Attack((200,), many_rows, size=1_400_000),
    "verdicts-of-many-groups": Attack((200, 429), many_groups, size=4_000_000, connections=20),
    "empty-lists-16-at-once": Attack(
        (413, 422, 429), repeated(b"[],", b'{"inputs":[', b"[]]}"), gzipped=True, size=60 * MIB, connections=16
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Latencies:
    """Latencies in seconds by time of arrival: pairs of the `perf_counter` time and the latency."""

    livez: list[tuple[float, float]]
    honest: list[tuple[float, float]]
    failed: list[tuple[float, int]]


class HonestClients:
    """A process that sends honest requests until `stop` is called."""

    def __init__(self, port: int) -> None:
        command = [sys.executable, "-m", "benchmarks.serving.hostile_requests", "--observe", str(port)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        assert self._process.stdout
        self._process.stdout.readline()  # the process has begun to send

    def stop(self) -> Latencies:
        """Stop the requests and return their latencies."""
        output, _ = self._process.communicate()
        return Latencies(**json.loads(output))


async def send_honest_requests(port: int) -> Latencies:
    """Send honest requests until standard input ends."""
    stopped = asyncio.Event()
    found = Latencies([], [], [])
    head = f"POST /anomaly?model=hosts HTTP/1.1\r\nHost: elbo\r\nContent-Type: {JSON}\r\n"
    honest = f"{head}Content-Length: {len(HONEST_BODY)}\r\n\r\n".encode() + HONEST_BODY

    async def repeat(request: bytes, interval: float, latencies: list[tuple[float, float]]) -> None:
        connection = Connection(port)
        while not stopped.is_set():
            started = perf_counter()
            status, _ = await connection.send(request)
            latencies.append((perf_counter(), perf_counter() - started))
            if status != 200:
                found.failed.append((perf_counter(), status))
            await asyncio.sleep(max(0.0, started + interval - perf_counter()))
        connection.close()

    def wait_for_end() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(stopped.set)

    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    threading.Thread(target=wait_for_end, daemon=True).start()
    await asyncio.gather(
        repeat(b"GET /livez HTTP/1.1\r\nHost: elbo\r\n\r\n", LIVEZ_SECONDS, found.livez),
        repeat(honest, HONEST_SECONDS, found.honest),
    )
    return found


class Attackers:
    """A process of the lowest priority that sends an attack."""

    def __init__(self, name: str, port: int, smoke: bool) -> None:
        command = [sys.executable, "-m", "benchmarks.serving.hostile_requests", "--only", name, "--attack", str(port)]
        self._process = subprocess.Popen(
            [*command, *(["--smoke"] if smoke else [])],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout
        self.sent_bytes = int(self._process.stdout.readline())  # the process has made its request

    def attack(self) -> "Outcome":
        """Send the attack, and return how it ended. Raise RuntimeError if the process fails."""
        output, _ = self._process.communicate("go\n")
        if self._process.returncode:
            raise RuntimeError(f"the process of the attackers ended with exit code {self._process.returncode}")
        return Outcome(**json.loads(output))


@dataclass(frozen=True)
class Outcome:
    """How the requests of an attack ended.

    Args:
        statuses: the different statuses of the responses; 0 if the server ended the connection without a response.
        unanswered: why requests got neither a response nor the end of the connection.
        slowest: after how many seconds the slowest request ended.
    """

    statuses: list[int]
    unanswered: list[str]
    slowest: float


def send_attack(attack: Attack, port: int, smoke: bool) -> None:
    """Prepare `attack`, print its size, wait for a line of standard input, attack, and print what happened."""
    os.nice(ATTACKERS_NICE)
    request = attack.request(1 / 16 if smoke else 1.0)
    print(len(request) * attack.connections, flush=True)
    sys.stdin.readline()
    end = perf_counter() + (0.0 if smoke else ATTACK_SECONDS)
    statuses: list[int] = []
    unanswered: list[str] = []
    seconds: list[float] = []

    def attempt() -> int | None:
        started = perf_counter()
        try:
            status = send(port, request, attack.unread_seconds)
        except OSError as error:
            unanswered.append(str(error))
            return None
        finally:
            seconds.append(perf_counter() - started)
        statuses.append(status)
        return status

    def client(_: int) -> None:
        if attempt() == REFUSED:
            sleep(RETRY_SECONDS)
            attempt()

    with ThreadPoolExecutor(attack.connections) as clients:
        while not seconds or perf_counter() < end:
            list(clients.map(client, range(attack.connections)))  # raises what a client raises
    print(json.dumps(asdict(Outcome(sorted(set(statuses)), unanswered, max(seconds)))))


def send(port: int, request: bytes, unread_seconds: float) -> int:
    """Send `request`, and wait for `unread_seconds`. Return the status of the response.

    The status is 0 if the server has ended the connection without a response.

    Raises:
        OSError: the server accepts no connection.
        TimeoutError: the server takes or sends no bytes for RESPONSE_SECONDS.
    """
    response = b""
    with socket.create_connection(("127.0.0.1", port), RESPONSE_SECONDS) as connection:
        # The server may refuse the request, and close the connection before the end of the body.
        with suppress(ConnectionError):
            connection.sendall(request)
        sleep(unread_seconds)
        with suppress(ConnectionError):
            while piece := connection.recv(2**20):
                response = response or piece
    return int(response.split()[1]) if response else 0


def reset_peak(pid: int) -> None:
    """Let `peak` of a process count from now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak(pid: int) -> int:
    """Return the largest resident memory of a process since `reset_peak`, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def run(name: str, attack: Attack, port: int, pid: int, smoke: bool) -> bool:
    """Run an attack, print its line of the table, and return whether the server behaved as expected."""
    attackers = Attackers(name, port, smoke)
    clients = HonestClients(port)
    sleep(1.5 if smoke else BEFORE_SECONDS + 2.0)
    reset_peak(pid)
    memory = peak(pid)
    started = perf_counter()
    outcome = attackers.attack()
    sleep(0.2)
    rise = peak(pid) - memory
    latencies = clients.stop()
    livez = [max((seconds for at, seconds in latencies.livez if test(at)), default=0.0) for test in periods(started)]
    honest = [percentile([s for at, s in latencies.honest if test(at)]) for test in periods(started)]
    cells = [
        name,
        f"{attackers.sent_bytes / MIB:.2f}",
        "/".join(map(str, outcome.statuses)),
        f"{outcome.slowest:.2f}",
        f"{rise / MIB:.0f} ({rise / MAX_BODY:.2f})",
        f"{1e3 * livez[0]:.0f} / {1e3 * livez[1]:.0f}",
        f"{1e3 * honest[0]:.1f} / {1e3 * honest[1]:.1f}",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)
    if latencies.failed:
        print(f"honest requests failed: {latencies.failed[:3]}")
    if outcome.unanswered:
        print(f"{len(outcome.unanswered)} requests of the attack got no response: {outcome.unanswered[:3]}")
    unexpected = set(outcome.statuses) - set(attack.expected)
    return not unexpected and not outcome.unanswered and not latencies.failed


def periods(started: float) -> list[Callable[[float], bool]]:
    """Return two tests for the time of a response: is it in the seconds before the attack, or is it later?"""
    return [lambda at: started - BEFORE_SECONDS < at < started, lambda at: at >= started]


def percentile(latencies: list[float]) -> float:
    """Return the 99th percentile of the latencies; 0 if the list is empty."""
    return float(np.percentile(latencies, 99)) if latencies else 0.0


def main() -> None:
    """Start a server, and run the attacks one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="bodies of a sixteenth of the size, and short pauses")
    parser.add_argument("--only", default=",".join(ATTACKS), help="comma-separated names of attacks")
    parser.add_argument("--artifacts", type=Path, help="artifact folder with a model `hosts`; by default it is trained")
    parser.add_argument("--observe", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--attack", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.observe:
        found = asyncio.run(send_honest_requests(options.observe))
        print(json.dumps({"livez": found.livez, "honest": found.honest, "failed": found.failed}))
        return
    if options.attack:
        send_attack(ATTACKS[options.only], options.attack, options.smoke)
        return
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="elbo-hostile-") as name:
        folder = Path(name)
        artifacts = options.artifacts
        if not artifacts:
            artifacts = create_workload(folder).folder / "artifacts"
        port = free_port()
        environment = {"OMP_NUM_THREADS": "1", "ELBO_PORT": str(port), "ELBO_ARTIFACTS": str(artifacts)}
        with ServerProcess([sys.executable, "-m", "service"], environment, folder / "elbo.log") as server:
            while "listening on" not in server.log.read_text():
                server.require_alive()
                sleep(0.1)
            print(f"{describe_machine('torch', 'uvicorn')}; 1 worker; the body limit is {MAX_BODY // MIB} MiB\n")
            print(
                "| attack | sent, MiB | status | seconds | memory, MiB (of the body limit) "
                "| slowest /livez before / during, ms | honest p99 before / during, ms |\n|---|---|---|---|---|---|---|"
            )
            names = options.only.split(",")
            if options.smoke and len(names) == len(ATTACKS):
                names = names[:4]  # the tests run all attacks
            results = [run(name, ATTACKS[name], port, server.pid, options.smoke) for name in names]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
