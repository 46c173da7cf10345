"""Measure one server: start it, check its responses, load it in closed and open loops, and stop it."""

import http.client
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from time import monotonic, sleep
from typing import Any

import numpy as np
import orjson

from benchmarks.serving import load_generators
from benchmarks.serving.load_generators import Request, Sample
from benchmarks.serving.server_process import ServerProcess, free_port
from benchmarks.serving.servers import JSON, ServerKind, environment
from benchmarks.serving.workload import Workload

START_SECONDS = 180.0  # maximum time from the start of a server to its first response
IDLE_SECONDS = 10.0  # maximum time to wait until a started server is idle; Ray never becomes idle
WARM_UP_SECONDS = 1.0  # duration of the warm-up before each measurement
SETTLE_SECONDS = 3.0  # time between the end of an open loop and the last measurement of memory
CAPACITY_SHARES = (0.7, 3.0)  # rates of the open loops, as shares of the server's capacity
TOLERANCE = 1e-4  # absolute tolerance between a response and the output of the module


@dataclass(frozen=True)
class Column:
    """A closed-loop load, which is a column of the tables.

    Args:
        connections: number of connections. Each connection sends the next request when the response arrives.
        rows: rows per request.
        binary: whether requests and responses are binary instead of JSON.
    """

    connections: int
    rows: int
    binary: bool = False

    @property
    def title(self) -> str:
        """The title of the column."""
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"c={self.connections}, {rows} {'binary' if self.binary else 'JSON'}"


COLUMNS = (Column(1, 1), Column(32, 1), Column(32, 32), Column(32, 32, binary=True), Column(8, 256, binary=True))
ANOMALY_CONNECTIONS = (1, 32)


@dataclass
class Results:
    """The results of all rounds.

    Args:
        samples: one sample per round, by server and column.
        anomaly_samples: one sample of Elbo's model with few features per round, by path and number of connections.
        lower_bounds: rows per second without a server, one figure per round, by part of the work and batch size.
        failures: reasons why servers were omitted, by server.
    """

    samples: dict[str, dict[Column, list[Sample]]] = field(default_factory=dict)
    anomaly_samples: dict[tuple[str, int], list[Sample]] = field(default_factory=dict)
    lower_bounds: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MeasuredServer:
    """A server to measure.

    Args:
        name: key of the server in `server_kinds`.
        kind: how the server is started, and which protocol it has.
        workload: the models and rows.
        elbo_settings: environment variables that are used only if the server is Elbo.
    """

    name: str
    kind: ServerKind
    workload: Workload
    elbo_settings: dict[str, str]

    def start(self, port: int) -> ServerProcess:
        """Start the process of the server."""
        kind = self.kind
        command = [kind.python(self.name), "-m", kind.module, *kind.arguments(self.workload.model, port)]
        variables = environment(self.name, self.workload.folder / "artifacts", port, self.elbo_settings)
        return ServerProcess(command, variables, self.workload.folder / f"{self.name}.log")


def measure_server(server: MeasuredServer, results: Results, seconds: float, thorough: bool) -> None:
    """Measure each column for `seconds`, and add the samples to `results`.

    If `thorough`, measure all columns, each after a warm-up. Otherwise measure every second column, without warm-ups.

    Raises:
        RuntimeError: the server does not start, exits, or gives a wrong response.
    """
    port = free_port()
    with server.start(port) as process:
        wait_until_ready(process, port, server)
        samples = results.samples.setdefault(server.name, {})
        for column in COLUMNS if thorough else COLUMNS[::2]:
            request = server.kind.protocol.create_request(server.workload.rows[column.rows], column.binary)
            if request is not None:
                size = check_response(port, request, server, column)
                sample = _measure(process, port, request, size, column.connections, seconds, thorough)
                samples.setdefault(column, []).append(sample)
        if server.name == "elbo":
            _measure_anomaly(process, port, server.workload, results, seconds, thorough)
        process.require_alive()


def wait_until_ready(process: ServerProcess, port: int, server: MeasuredServer) -> None:
    """Wait until the server responds and is idle.

    Raises:
        RuntimeError: the server has exited, or has not responded after START_SECONDS.
    """
    request = server.kind.protocol.create_request(server.workload.rows[1], binary=False)
    assert request is not None
    deadline, last_error = monotonic() + START_SECONDS, ""
    while monotonic() < deadline:
        process.require_alive()
        try:
            post(port, request)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            last_error = str(error)
            sleep(0.2)
        else:
            process.wait_until_idle(IDLE_SECONDS)
            return
    raise RuntimeError(f"no response {START_SECONDS:g} s after the start: {last_error}")


def check_response(port: int, request: Request, server: MeasuredServer, column: Column) -> int:
    """Compare the response to `request` with the output of the module. Return the size of the response in bytes.

    Raises:
        RuntimeError: the response differs from the output of the module.
    """
    protocol, workload = server.kind.protocol, server.workload
    expected = (workload.rows if protocol.echoes else workload.outputs)[column.rows]
    body = post(port, request)
    outputs = protocol.parse_response(body, column.binary)
    if outputs.size != expected.size or not np.allclose(outputs.reshape(expected.shape), expected, atol=TOLERANCE):
        raise RuntimeError(f"{column.title}: the response differs from the output of the module: {body[:80]!r}...")
    return len(body)


def post(port: int, request: Request) -> bytes:
    """Send `request` and return the response body.

    Raises:
        RuntimeError: the status is not 200.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", request.path, request.body, request.headers)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {body[:200].decode(errors='replace')}")
    return body


def measure_open_loop(server: MeasuredServer, *, rows: int, seconds: float, connections: int) -> list[dict[str, Any]]:
    """Measure one open loop per share in CAPACITY_SHARES, for `seconds` each.

    Returns:
        Per share, the outcome of the client (`load_client.Client.run`) with additional keys: `share`; `capacity`, in
        responses per second; the server's memory in bytes, `before` the load, at its `peak`, and `after` the load;
        `server_seconds`, its processor time during the load; and `server_refusal`, see `_refusal_seconds`.

    Raises:
        RuntimeError: the server does not start, exits, or gives a wrong response.
    """
    port, outcomes = free_port(), []
    with server.start(port) as process:
        wait_until_ready(process, port, server)
        column = Column(32, rows)
        request = server.kind.protocol.create_request(server.workload.rows[rows], binary=False)
        assert request is not None
        size = check_response(port, request, server, column)
        load_generators.measure_capacity(port, request, size, column.connections, min(seconds, 2.0))  # warm-up
        capacity = load_generators.measure_capacity(port, request, size, column.connections, min(seconds, 5.0))
        for share in CAPACITY_SHARES:
            before, peak = process.memory(), 0
            spent_before, server_seconds = process.processor_seconds(), 0.0
            counts_before = _refusal_counts(port) if server.name == "elbo" else {}
            started = monotonic()
            client = load_generators.start_open_loop(
                port, request, size, rate=share * capacity, seconds=seconds, connections=connections
            )
            while client.poll() is None:
                peak = max(peak, process.memory())
                if monotonic() - started < seconds:
                    server_seconds = process.processor_seconds() - spent_before
                sleep(0.25)
            outcome = load_generators.read_outcome(client)
            sleep(min(seconds, SETTLE_SECONDS))
            memory = {"before": before, "peak": peak, "after": process.memory()}
            counts = _refusal_counts(port) if server.name == "elbo" else {}
            own = {"server_seconds": server_seconds, "server_refusal": _refusal_seconds(counts_before, counts)}
            outcomes.append({**outcome, **memory, **own, "share": share, "capacity": capacity})
            process.require_alive()
    return outcomes


def _refusal_counts(port: int) -> dict[float, float]:
    """Return how many requests Elbo has refused within a number of seconds, by this number."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    counts: dict[float, float] = {}
    for labels, count in re.findall(r"^elbo_request_seconds_bucket{([^}]*)} (\S+)$", text, re.MULTILINE):
        values = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if values["outcome"] == "shed":
            bound = float(values["le"])
            counts[bound] = counts.get(bound, 0.0) + float(count)
    return counts


def _refusal_seconds(before: Mapping[float, float], after: Mapping[float, float]) -> float:
    """Return the bound of the bucket with the 99th percentile of Elbo's refusals, from the head to the response.

    The intended delay of repeated refusals comes on top, at most 64 ms. NaN if nothing was refused.
    """
    counts = {bound: count - before.get(bound, 0.0) for bound, count in after.items()}
    total = counts.get(math.inf, 0.0)
    return min((bound for bound, count in counts.items() if total and count >= 0.99 * total), default=math.nan)


def _measure(
    process: ServerProcess, port: int, request: Request, size: int, connections: int, seconds: float, warm_up: bool
) -> Sample:
    if warm_up:
        load_generators.run_closed_loop(port, request, size, connections, WARM_UP_SECONDS)
    before = process.processor_seconds()
    sample = load_generators.run_closed_loop(port, request, size, connections, seconds)
    responses = sample.rate * seconds
    if not responses:
        return sample
    return replace(sample, cost=(process.processor_seconds() - before) / responses)


def _measure_anomaly(
    process: ServerProcess, port: int, workload: Workload, results: Results, seconds: float, thorough: bool
) -> None:
    """Measure /reconstruct and /anomaly with one row of few features. /anomaly returns five contributions."""
    body = orjson.dumps({"inputs": workload.few_features}, option=orjson.OPT_SERIALIZE_NUMPY)
    for path in ("/reconstruct?model=hosts", "/anomaly?model=hosts&explain=5"):
        request = Request(path, JSON, body)
        size = len(post(port, request))
        for connections in ANOMALY_CONNECTIONS:
            sample = _measure(process, port, request, size, connections, seconds, thorough)
            results.anomaly_samples.setdefault((path, connections), []).append(sample)
