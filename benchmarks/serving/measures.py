"""One server's turn: started, checked, loaded in a closed and in an open loop, and ended."""

import http.client
from dataclasses import dataclass, field, replace
from time import monotonic, sleep
from typing import Any

import numpy as np
import orjson

from benchmarks.serving import load
from benchmarks.serving.contestants import JSON, Contestant, environment
from benchmarks.serving.load import Request, Sample
from benchmarks.serving.processes import Server, free_port
from benchmarks.serving.stage import Stage

START = 180.0  # seconds that a server may take until its first answer
REST = 10.0  # seconds that it may go on computing after that, Ray for ever
WARM = 1.0  # second of every load before it is measured
SETTLE = 3.0  # seconds after an open loop, before memory is looked at again
SHARES = (0.7, 3.0)  # of its capacity
TOLERANCE = 1e-4  # of an answer against the module's


@dataclass(frozen=True)
class Column:
    """One load of the closed loop."""

    connections: int
    rows: int
    binary: bool = False

    @property
    def title(self) -> str:
        """As the tables have it."""
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"c={self.connections}, {rows} {'binary' if self.binary else 'JSON'}"


COLUMNS = (Column(1, 1), Column(32, 1), Column(32, 32), Column(32, 32, binary=True), Column(8, 256, binary=True))
FEW_COLUMNS = (1, 32)  # connections, for /anomaly against /reconstruct


@dataclass
class Results:
    """Samples of every round, by contestant and column; and of /anomaly and /reconstruct with few features."""

    samples: dict[str, dict[Column, list[Sample]]] = field(default_factory=dict)
    few: dict[tuple[str, int], list[Sample]] = field(default_factory=dict)  # by path and connections
    limits: dict[tuple[str, int], list[float]] = field(default_factory=dict)  # rows a second, by work and batch
    failures: dict[str, str] = field(default_factory=dict)  # by contestant


@dataclass(frozen=True)
class Turn:
    """Whose turn it is, and on what."""

    name: str
    contestant: Contestant
    stage: Stage
    elbo: dict[str, str]  # settings of Elbo's

    def start(self, port: int) -> Server:
        """Its server, starting."""
        who = self.contestant
        command = [who.python(self.name), "-m", who.module, *who.arguments(self.stage.model, port)]
        variables = environment(self.name, self.stage.folder / "artifacts", port, self.elbo)
        return Server(command, variables, self.stage.folder / f"{self.name}.log")


def turn(who: Turn, results: Results, seconds: float, thorough: bool) -> None:
    """Every column once; `thorough` warms up first, and leaves none out. Raises RuntimeError if it does not work."""
    port = free_port()
    with who.start(port) as server:
        wait_until_ready(server, port, who)
        samples = results.samples.setdefault(who.name, {})
        for column in COLUMNS if thorough else COLUMNS[::2]:
            request = who.contestant.protocol.ask(who.stage.rows[column.rows], column.binary)
            if request is not None:
                size = checked_size(port, request, who, column)
                sample = _measured(server, port, request, size, column.connections, seconds, thorough)
                samples.setdefault(column, []).append(sample)
        if who.name == "elbo":
            _few(server, port, who.stage, results, seconds, thorough)
        server.require_alive()


def wait_until_ready(server: Server, port: int, who: Turn) -> None:
    """Until it answers a row and is at rest. Raises RuntimeError when it has ended, or after START seconds."""
    request = who.contestant.protocol.ask(who.stage.rows[1], binary=False)
    assert request is not None
    deadline, said = monotonic() + START, ""
    while monotonic() < deadline:
        server.require_alive()
        try:
            ask(port, request)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            said = str(error)
            sleep(0.2)
        else:
            server.wait_until_at_rest(REST)
            return
    raise RuntimeError(f"no answer {START:g} s after its start: {said}")


def checked_size(port: int, request: Request, who: Turn, column: Column) -> int:
    """The size in bytes of the answer, which is right. Raises RuntimeError if it is not."""
    protocol, stage = who.contestant.protocol, who.stage
    expected = (stage.rows if protocol.echoes else stage.answers)[column.rows]
    answer = ask(port, request)
    found = protocol.read(answer, column.binary)
    if found.size != expected.size or not np.allclose(found.reshape(expected.shape), expected, atol=TOLERANCE):
        raise RuntimeError(f"{column.title}: its answer is not that of the module, {answer[:80]!r}...")
    return len(answer)


def ask(port: int, request: Request) -> bytes:
    """The body of the answer. Raises RuntimeError if its status is not 200."""
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


def open_loop(who: Turn, rows: int, seconds: float, connections: int) -> list[dict[str, Any]]:
    """What came of SHARES of its capacity, each for `seconds`, with memory in bytes added. Raises RuntimeError."""
    port, outcomes = free_port(), []
    with who.start(port) as server:
        wait_until_ready(server, port, who)
        column = Column(32, rows)
        request = who.contestant.protocol.ask(who.stage.rows[rows], binary=False)
        assert request is not None
        size = checked_size(port, request, who, column)
        load.capacity(port, request, size, column.connections, min(seconds, 2.0))  # warms up
        capacity = load.capacity(port, request, size, column.connections, min(seconds, 5.0))
        for share in SHARES:
            before, peak = server.memory(), 0
            client = load.arriving(port, request, size, share * capacity, seconds, connections)
            while client.poll() is None:
                peak = max(peak, server.memory())
                sleep(0.25)
            outcome = load.outcome_of(client)
            sleep(min(seconds, SETTLE))
            memory = {"before": before, "peak": peak, "after": server.memory()}
            outcomes.append({**outcome, **memory, "share": share, "capacity": capacity})
            server.require_alive()
    return outcomes


def _measured(
    server: Server, port: int, request: Request, size: int, connections: int, seconds: float, warm: bool
) -> Sample:
    if warm:
        load.closed(port, request, size, connections, WARM)
    before = server.computed()
    sample = load.closed(port, request, size, connections, seconds)
    answers = sample.rate * seconds
    return replace(sample, cost=(server.computed() - before) / answers) if answers else sample


def _few(server: Server, port: int, stage: Stage, results: Results, seconds: float, thorough: bool) -> None:
    """/anomaly with p-value and five contributions against /reconstruct, a row of few features."""
    body = orjson.dumps({"inputs": stage.few}, option=orjson.OPT_SERIALIZE_NUMPY)
    for path in ("/reconstruct?model=hosts", "/anomaly?model=hosts&explain=5"):
        request = Request(path, JSON, body)
        size = len(ask(port, request))
        for connections in FEW_COLUMNS:
            sample = _measured(server, port, request, size, connections, seconds, thorough)
            results.few.setdefault((path, connections), []).append(sample)
