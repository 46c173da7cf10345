"""A load generator for what wrk cannot: a constant arrival rate. One process, one request sent again and again.

`python -m benchmarks.serving.load_client` reads a plan in JSON from standard input and prints one line of JSON.
With a rate, requests are due at even intervals whatever the server does, and the time of an answer counts from the
moment at which its request was due, so that a server that stalls is charged with everybody whom it kept waiting.
When all its connections are taken, requests wait here, and their time runs.
Without a rate, each connection sends the next request when it has its answer, as wrk does.
"""

import asyncio
import json
import resource
import sys
from collections import Counter, deque
from time import perf_counter
from typing import Any, cast

import httptools
import numpy as np
import uvloop

TICK = 0.001  # seconds between two looks at what is due
PATIENCE = 30.0  # seconds that answers may take after the last request


class Tally:
    """What came of the requests."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.times: list[float] = []  # of answers with 200, seconds since they were due
        self.refusals: list[float] = []  # of other answers, seconds since they were sent
        self.without_retry_after = 0  # refusals
        self.wrong_size = 0  # answers with 200
        self.broken = 0  # connections lost with a request on them
        self.bytes = 0


class Connection(asyncio.Protocol):
    """One keep-alive connection, with one request at a time. httptools calls the methods named `on_`."""

    def __init__(self, client: "Client") -> None:
        self._client = client
        self._due: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is free."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it
        self._parser = httptools.HttpResponseParser(self)

    def send(self, due: float) -> None:
        """Send the request that was due at `due`."""
        self._due, self._sent = due, perf_counter()
        self._size, self._retry_after = 0, False
        self._transport.write(self._client.request)

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer."""
        self._client.tally.bytes += len(data)
        self._parser.feed_data(data)

    def on_header(self, name: bytes, _: bytes) -> None:
        """A header of the answer."""
        self._retry_after |= name.lower() == b"retry-after"

    def on_body(self, body: bytes) -> None:
        """A part of its body."""
        self._size += len(body)

    def on_message_complete(self) -> None:
        """The answer is whole: note it and take the next request."""
        now, tally, status = perf_counter(), self._client.tally, self._parser.get_status_code()
        assert self._due is not None
        tally.statuses[status] += 1
        if status != 200:
            tally.refusals.append(now - self._sent)
            tally.without_retry_after += not self._retry_after
        elif self._client.right_size(self._size):
            tally.times.append(now - self._due)
        else:
            tally.wrong_size += 1
        self._due = None
        if self._parser.should_keep_alive():
            self._client.free(self)
        else:
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        """The server, or a refusal of it to keep the connection, ended it."""
        self._client.tally.broken += self._due is not None
        self._client.lost(self)


class Client:
    """Sends what the plan says. `run` gives the outcome."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.request = plan["request"].encode("latin-1")
        self.tally = Tally()
        self._free: list[Connection] = []
        self._waiting: deque[float] = deque()  # due, and no connection is free
        self._open = 0
        self._opening: set[asyncio.Task[None]] = set()
        self._sent = 0
        self._lag = 0.0  # seconds, the longest that this process itself was late

    def right_size(self, size: int) -> bool:
        """Whether a body is as large as that of the right answer, or nearly: digits of numbers in JSON may differ."""
        return abs(size - int(self.plan["size"])) <= 0.05 * int(self.plan["size"])

    def free(self, connection: Connection) -> None:
        """It can take a request."""
        if self._waiting:
            connection.send(self._waiting.popleft())
        elif self.plan["rate"] is None and perf_counter() < self._end:
            self._sent += 1
            connection.send(perf_counter())
        else:
            self._free.append(connection)

    def lost(self, connection: Connection) -> None:
        """It is gone. Another takes its place where one is needed."""
        self._open -= 1
        if connection in self._free:
            self._free.remove(connection)
        if self._waiting or (self.plan["rate"] is None and perf_counter() < self._end):
            self._connect()

    async def run(self) -> dict[str, Any]:
        """Load the server for as long as the plan says, and wait for its last answers."""
        started = perf_counter()
        self._end = started + self.plan["seconds"]
        if self.plan["rate"] is None:
            for _ in range(self.plan["connections"]):
                self._connect()
            await asyncio.sleep(self.plan["seconds"])
        else:
            await self._arrivals(started)
        seconds = perf_counter() - started
        good = len(self.tally.times)
        while self._unanswered() > 0 and perf_counter() < self._end + PATIENCE:
            await asyncio.sleep(0.01)
        return self._outcome(seconds, good)

    async def _arrivals(self, started: float) -> None:
        interval = 1.0 / self.plan["rate"]
        while (now := perf_counter()) < self._end:
            while (due := started + self._sent * interval) <= now:
                self._lag = max(self._lag, now - due)
                self._sent += 1
                if self._free:
                    self._free.pop().send(due)
                else:
                    self._waiting.append(due)
                    self._connect()
            await asyncio.sleep(TICK)

    def _connect(self) -> None:
        if self._open < self.plan["connections"]:
            self._open += 1
            task = asyncio.get_running_loop().create_task(self._opened())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _opened(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: Connection(self), "127.0.0.1", self.plan["port"])
        except OSError:
            self._open -= 1
            if self._waiting:
                self._waiting.popleft()
                self.tally.broken += 1
        else:
            self.free(connection)

    def _unanswered(self) -> int:
        return self._sent - self.tally.statuses.total() - self.tally.broken

    def _outcome(self, seconds: float, good: int) -> dict[str, Any]:
        tally = self.tally
        p50, p99 = np.percentile(tally.times, (50, 99)).tolist() if tally.times else (float("nan"), float("nan"))
        return {
            "sent": self._sent, "answers": tally.statuses.total(), "statuses": dict(tally.statuses),
            "refused": tally.statuses.total() - tally.statuses[200] + tally.wrong_size,
            "broken": tally.broken, "unanswered": self._unanswered(), "wrong_size": tally.wrong_size,
            "without_retry_after": tally.without_retry_after, "longest_refusal": max(tally.refusals, default=0.0),
            "p99_refusal": float(np.percentile(tally.refusals, 99)) if tally.refusals else 0.0,
            "good": good, "seconds": seconds, "bytes": tally.bytes, "lag": self._lag, "p50": p50, "p99": p99,
        }  # fmt: skip


def main() -> None:
    """Carry out the plan."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    client = Client(json.load(sys.stdin))
    print(json.dumps(uvloop.run(client.run())))


if __name__ == "__main__":
    main()
