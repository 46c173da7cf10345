"""Generate load: closed loops with wrk, and open loops with `benchmarks.serving.load_client`.

Client and server share two cores, so the client must use little processor time. wrk, a C program, uses a fraction of
the processor time of a Python client. Without wrk (`apt-get install wrk`), `load_client` also runs the closed loops.

No load generator in Debian, PyPI or npm is suitable for an open loop. Two candidates were hey and autocannon. hey
measures latency from the time when a request is sent. autocannon runs a closed loop and corrects the latencies by an
estimate. Therefore neither measures how long a request waits to be sent because the server is slow.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.data import ROOT

WRK = shutil.which("wrk")
WRK_TIMEOUT = 30  # maximum time in seconds that wrk waits for a response


@dataclass(frozen=True)
class Request:
    """A POST request."""

    path: str
    headers: dict[str, str]
    body: bytes

    def to_bytes(self, port: int) -> bytes:
        """Return the bytes of the request to `port` on this machine."""
        headers = {"Host": f"127.0.0.1:{port}", **self.headers, "Content-Length": str(len(self.body))}
        lines = [f"POST {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


@dataclass(frozen=True)
class Sample:
    """One measurement of a closed loop.

    Args:
        rate: correct responses per second.
        p50: median latency in seconds.
        p99: 99th percentile of the latency in seconds.
        correct_share: share of the requests whose response has status 200 and a body of the expected size.
        cost: the server's processor time per correct response, in seconds.
    """

    rate: float
    p50: float
    p99: float
    correct_share: float
    cost: float = math.nan


def run_closed_loop(port: int, request: Request, size: int, connections: int, seconds: float) -> Sample:
    """Measure a closed loop: each connection sends `request` again as soon as the response arrives.

    Args:
        port: port of the server.
        request: the request.
        size: size in bytes of the expected response body.
        connections: number of connections.
        seconds: duration of the load.
    """
    if WRK:
        outcome = _run_wrk(port, request, connections, seconds)
    else:
        outcome = read_outcome(_start_client(port, request, size, None, seconds, connections))
    attempts = outcome["answers"] + outcome["broken"]
    if not outcome["answers"]:
        return Sample(rate=0.0, p50=math.nan, p99=math.nan, correct_share=0.0)
    wrong = outcome["refused"]
    if WRK and outcome["bytes"] < 0.95 * size * (outcome["answers"] - wrong):
        wrong = outcome["answers"]  # wrk reports only the total size, so all responses count as wrong
    correct = outcome["answers"] - wrong
    if correct < attempts:
        print(f"{request.path}, {connections} connections: {outcome}", file=sys.stderr)
    return Sample(
        rate=correct / outcome["seconds"],
        p50=outcome["p50"],
        p99=outcome["p99"],
        correct_share=correct / attempts,
    )


def start_open_loop(
    port: int, request: Request, size: int, *, rate: float, seconds: float, connections: int
) -> "subprocess.Popen[str]":
    """Start a client that sends `request` at a constant rate. Return its process, from which `read_outcome` reads.

    Args:
        port: port of the server.
        request: the request.
        size: size in bytes of the expected response body.
        rate: requests per second.
        seconds: duration of the load.
        connections: maximum number of connections.
    """
    return _start_client(port, request, size, rate, seconds, connections)


def read_outcome(client: "subprocess.Popen[str]") -> dict[str, Any]:
    """Wait until `client` ends, and return the outcome that it prints (see `load_client.Client.run`).

    Raises:
        RuntimeError: the client failed.
    """
    assert client.stdout
    with client.stdout:
        output = client.stdout.read()
    if client.wait():
        raise RuntimeError(f"the load generator exited with {client.returncode}")
    outcome: dict[str, Any] = json.loads(output)
    return outcome


def measure_capacity(port: int, request: Request, size: int, connections: int, seconds: float) -> float:
    """Return the number of correct responses per second in a closed loop.

    The closed loop uses the client of the open loop. The server thus shares its cores with the same client in both
    loops.

    Raises:
        RuntimeError: there was no correct response.
    """
    outcome = read_outcome(_start_client(port, request, size, None, seconds, connections))
    if not outcome["good"]:
        raise RuntimeError(f"no correct response in {seconds:g} s with {connections} connections")
    return float(outcome["good"] / outcome["seconds"])


def _run_wrk(port: int, request: Request, connections: int, seconds: float) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile() as body:
        body.write(request.body)
        body.flush()
        headers = "\n".join(f"{name}: {value}" for name, value in request.headers.items())
        command = [
            str(WRK), "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", f"--timeout={WRK_TIMEOUT}s",
            f"--script={Path(__file__).with_name('wrk.lua')}", f"http://127.0.0.1:{port}{request.path}",
        ]  # fmt: skip
        environment = {**os.environ, "LOAD_BODY": body.name, "LOAD_HEADERS": headers}
        output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    outcome: dict[str, Any] = json.loads(output.splitlines()[-1])
    return outcome


def _start_client(
    port: int, request: Request, size: int, rate: float | None, seconds: float, connections: int
) -> "subprocess.Popen[str]":
    plan = {
        "port": port,
        "request": request.to_bytes(port).decode("latin-1"),
        "size": size,
        "rate": rate,
        "seconds": seconds,
        "connections": connections,
    }
    command = [sys.executable, "-m", "benchmarks.serving.load_client"]
    client = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdin
    with client.stdin:
        client.stdin.write(json.dumps(plan))
    return client
