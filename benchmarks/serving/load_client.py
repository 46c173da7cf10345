"""A load generator that sends one request repeatedly. Unlike wrk, it supports a constant arrival rate.

`python -m benchmarks.serving.load_client` reads a plan in JSON from standard input and prints the outcome as one line
of JSON. The plan contains the port of the server, the request, the size of the expected response body, the duration in
seconds, the maximum number of connections, and the rate in requests per second.

If the rate is a number, the client runs an open loop: requests are due at equal intervals, independently of the
responses. The latency of a request counts from the time when the request was due. If all connections are busy because
the server is slow, the request waits in the client. The latency includes this wait.

If the rate is null, the client runs a closed loop: each connection sends the next request when a response arrives.
"""

import asyncio
import json
import resource
import sys
from collections import Counter, deque
from time import perf_counter, process_time
from typing import Any, cast

import httptools
import numpy as np
import uvloop

TICK = 0.001  # seconds between two checks for due requests
DRAIN_SECONDS = 30.0  # maximum time in seconds to wait for outstanding responses after the load


class Tally:
    """Counts of the outcomes of requests."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.latencies: list[float] = []  # latencies of correct responses, in seconds from the due time
        self.refusals: list[float] = []  # latencies of refusals (status other than 200), in seconds from sending
        self.without_retry_after = 0  # number of refusals without a Retry-After header
        self.wrong_size = 0  # number of responses with status 200 and a body of unexpected size
        self.broken = 0  # number of connections that ended before the response
        self.bytes = 0


class Connection(asyncio.Protocol):
    """A keep-alive connection that carries one request at a time. httptools calls the methods named `on_*`."""

    def __init__(self, client: "Client") -> None:
        self._client = client
        self._due: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Create the parser. `Client` sends the first request."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transport does not inherit from this class
        self._parser = httptools.HttpResponseParser(self)

    def send(self, due: float) -> None:
        """Send the request that was due at time `due`."""
        self._due, self._sent = due, perf_counter()
        self._size, self._retry_after = 0, False
        self._transport.write(self._client.request)

    def data_received(self, data: bytes) -> None:
        """Parse bytes of the response."""
        self._client.tally.bytes += len(data)
        self._parser.feed_data(data)

    def on_header(self, name: bytes, _: bytes) -> None:
        """Note a Retry-After header."""
        self._retry_after |= name.lower() == b"retry-after"

    def on_body(self, body: bytes) -> None:
        """Add up the size of the body."""
        self._size += len(body)

    def on_message_complete(self) -> None:
        """Count the response, and give the connection back to the client."""
        now, tally, status = perf_counter(), self._client.tally, self._parser.get_status_code()
        assert self._due is not None
        tally.statuses[status] += 1
        if status != 200:
            tally.refusals.append(now - self._sent)
            tally.without_retry_after += not self._retry_after
        elif self._client.is_expected_size(self._size):
            tally.latencies.append(now - self._due)
        else:
            tally.wrong_size += 1
        self._due = None
        if self._parser.should_keep_alive():
            self._client.release(self)
        else:
            self._transport.close()

    def connection_lost(self, _: Exception | None) -> None:
        """Count the current request as broken if its response has not arrived."""
        self._client.tally.broken += self._due is not None
        self._client.replace(self)


class Client:
    """A client that carries out a plan."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.request = plan["request"].encode("latin-1")
        self.tally = Tally()
        self._free: list[Connection] = []
        self._waiting: deque[float] = deque()  # due times of the requests that wait for a free connection
        self._open = 0
        self._opening: set[asyncio.Task[None]] = set()
        self._sent = 0
        self._lag = 0.0  # largest delay that this process itself caused, in seconds

    def is_expected_size(self, size: int) -> bool:
        """Return whether a body has the expected size. The number of digits in JSON varies, so ±5 % is tolerated."""
        return abs(size - int(self.plan["size"])) <= 0.05 * int(self.plan["size"])

    def release(self, connection: Connection) -> None:
        """Send the next request on `connection`. If no request is due, keep the connection for later."""
        if self._waiting:
            connection.send(self._waiting.popleft())
        elif self.plan["rate"] is None and perf_counter() < self._end:
            self._sent += 1
            connection.send(perf_counter())
        else:
            self._free.append(connection)

    def replace(self, connection: Connection) -> None:
        """Remove a closed connection. Open another connection if there are more requests to send."""
        self._open -= 1
        if connection in self._free:
            self._free.remove(connection)
        if self._waiting or (self.plan["rate"] is None and perf_counter() < self._end):
            self._connect()

    async def run(self) -> dict[str, Any]:
        """Load the server, wait for the last responses, and return the outcome.

        Returns:
            sent: number of requests, including requests that never got a connection.
            answers: number of responses.
            statuses: number of responses by status.
            refused: number of responses with a status other than 200 or with a body of unexpected size.
            broken: number of connections that ended before the response.
            unanswered: number of requests without a response, apart from those that `broken` counts.
            wrong_size: number of responses with status 200 and a body of unexpected size.
            without_retry_after: number of refusals without a Retry-After header.
            longest_refusal, p99_refusal: maximum and 99th percentile of the latency of refusals, in seconds.
            good: number of correct responses during the load.
            seconds: duration of the load.
            client_seconds: processor time of the client during the load.
            bytes: number of bytes received.
            lag: largest delay that the client itself caused, in seconds.
            p50, p99: median and 99th percentile of the latency of correct responses, in seconds.
        """
        started, spent_before = perf_counter(), process_time()
        self._end = started + self.plan["seconds"]
        if self.plan["rate"] is None:
            for _ in range(self.plan["connections"]):
                self._connect()
            await asyncio.sleep(self.plan["seconds"])
        else:
            await self._send_at_rate(started)
        seconds = perf_counter() - started
        good = len(self.tally.latencies)
        client_seconds = process_time() - spent_before
        while self._unanswered() > 0 and perf_counter() < self._end + DRAIN_SECONDS:
            await asyncio.sleep(0.01)
        return self._outcome(seconds, good) | {"client_seconds": client_seconds}

    async def _send_at_rate(self, started: float) -> None:
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
            task = asyncio.get_running_loop().create_task(self._open_connection())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open_connection(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: Connection(self), "127.0.0.1", self.plan["port"])
        except OSError:
            self._open -= 1
            if self._waiting:
                self._waiting.popleft()
                self.tally.broken += 1
        else:
            self.release(connection)

    def _unanswered(self) -> int:
        return self._sent - self.tally.statuses.total() - self.tally.broken

    def _outcome(self, seconds: float, good: int) -> dict[str, Any]:
        tally = self.tally
        p50, p99 = (
            np.percentile(tally.latencies, (50, 99)).tolist() if tally.latencies else (float("nan"), float("nan"))
        )
        return {
            "sent": self._sent, "answers": tally.statuses.total(), "statuses": dict(tally.statuses),
            "refused": tally.statuses.total() - tally.statuses[200] + tally.wrong_size,
            "broken": tally.broken, "unanswered": self._unanswered(), "wrong_size": tally.wrong_size,
            "without_retry_after": tally.without_retry_after, "longest_refusal": max(tally.refusals, default=0.0),
            "p99_refusal": float(np.percentile(tally.refusals, 99)) if tally.refusals else 0.0,
            "good": good, "seconds": seconds, "bytes": tally.bytes, "lag": self._lag, "p50": p50, "p99": p99,
        }  # fmt: skip


def main() -> None:
    """Carry out the plan from standard input."""
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    client = Client(json.load(sys.stdin))
    print(json.dumps(uvloop.run(client.run())))


if __name__ == "__main__":
    main()
