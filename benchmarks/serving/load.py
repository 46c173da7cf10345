"""Loads a server and says what came of it: a closed loop by wrk, an open loop by `benchmarks.serving.load_client`.

wrk is a C program that costs a fraction of what a client in Python would, which matters where client and server share
two cores; Debian has it (`apt-get install wrk`), and so has Homebrew. Of the generators with a constant arrival rate
none is packaged for Debian, PyPI or npm without a flaw: hey measures from the actual sending and autocannon is a closed
loop with an estimate on top, so both hide the queue that an open loop is there to show.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from benchmarks.data import ROOT

WRK = shutil.which("wrk")
TIMEOUT = 30  # seconds that wrk waits for an answer


@dataclass(frozen=True)
class Request:
    """A POST, complete but for the host."""

    path: str
    headers: dict[str, str]
    body: bytes

    def raw(self, port: int) -> bytes:
        """Its bytes on the wire."""
        headers = {"Host": f"127.0.0.1:{port}", **self.headers, "Content-Length": str(len(self.body))}
        lines = [f"POST {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


@dataclass(frozen=True)
class Sample:
    """What a closed loop measured in one go."""

    rate: float  # right answers a second
    p50: float  # seconds
    p99: float
    right: float  # share of the requests that were answered with 200 and the right size
    cost: float = math.nan  # seconds of the server's processor time for a right answer


def closed(port: int, request: Request, size: int, connections: int, seconds: float) -> Sample:
    """Each of `connections` sends `request` as soon as it has its answer, a body of about `size` bytes."""
    outcome = (
        _wrk(port, request, connections, seconds) if WRK else _client(port, request, size, seconds, None, connections)
    )
    tried = outcome["answers"] + outcome["broken"]
    if not outcome["answers"]:
        return Sample(0.0, math.nan, math.nan, 0.0)
    wrong = outcome["refused"]
    if WRK and outcome["bytes"] < 0.95 * size * (outcome["answers"] - wrong):
        wrong = outcome["answers"]  # wrk counts bytes, not bodies: on average they are too short to be right
    good = outcome["answers"] - wrong
    if good < tried:
        print(f"{request.path}, {connections} connections: {outcome}", file=sys.stderr)
    return Sample(good / outcome["seconds"], outcome["p50"], outcome["p99"], good / tried)


def arriving(
    port: int, request: Request, size: int, rate: float, seconds: float, connections: int
) -> "subprocess.Popen[str]":
    """`request` at `rate` a second for `seconds`, by at most `connections`: a running process, for `outcome_of`."""
    return _start(port, request, size, seconds, rate, connections)


def outcome_of(client: "subprocess.Popen[str]") -> dict[str, Any]:
    """What the client prints at its end, see `load_client.Client`. Raises RuntimeError when it fails."""
    assert client.stdout
    with client.stdout:
        said = client.stdout.read()
    if client.wait():
        raise RuntimeError(f"the load generator ended with {client.returncode}")
    outcome: dict[str, Any] = json.loads(said)
    return outcome


def capacity(port: int, request: Request, size: int, connections: int, seconds: float) -> float:
    """Right answers a second to a closed loop of the client that also makes the open loop, so that it costs as much.

    Raises RuntimeError when there is none.
    """
    outcome = _client(port, request, size, seconds, None, connections)
    if not outcome["good"]:
        raise RuntimeError(f"no right answer in {seconds:g} s to {connections} connections")
    return float(outcome["good"] / outcome["seconds"])


def _wrk(port: int, request: Request, connections: int, seconds: float) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile() as body:
        body.write(request.body)
        body.flush()
        headers = "\n".join(f"{name}: {value}" for name, value in request.headers.items())
        command = [
            str(WRK), "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", f"--timeout={TIMEOUT}s",
            f"--script={ROOT / 'benchmarks' / 'load.lua'}", f"http://127.0.0.1:{port}{request.path}",
        ]  # fmt: skip
        environment = {**os.environ, "LOAD_BODY": body.name, "LOAD_HEADERS": headers}
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    outcome: dict[str, Any] = json.loads(said.splitlines()[-1])
    return outcome


def _client(
    port: int, request: Request, size: int, seconds: float, rate: float | None, connections: int
) -> dict[str, Any]:
    return outcome_of(_start(port, request, size, seconds, rate, connections))


def _start(
    port: int, request: Request, size: int, seconds: float, rate: float | None, connections: int
) -> "subprocess.Popen[str]":
    plan = {
        "port": port, "request": request.raw(port).decode("latin-1"), "size": size, "seconds": seconds, "rate": rate,
        "connections": connections,
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.serving.load_client"]
    client = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdin
    with client.stdin:
        client.stdin.write(json.dumps(plan))
    return client
