"""A client that sends random requests and compares each response with the output of the module.

The load generators, in contrast, send one request repeatedly and check only the size of the responses.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt
import orjson

Array = npt.NDArray[np.float32]
TOLERANCE = 1e-4  # absolute tolerance between a response and the output of the module
MAX_PATIENCE = 0.03  # maximum time in seconds that a client waits before it disconnects on purpose


class NotConnected(ConnectionError):
    """The connection was refused, so nothing was sent."""


def request_bytes(path: str, body: bytes, content_type: str = "application/json", host: str = "elbo") -> bytes:
    """Return the bytes of a POST request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def rows_request(path: str, x: Array) -> bytes:
    """Return the bytes of a POST request with the rows x [B, D] as JSON."""
    return request_bytes(path, orjson.dumps({"inputs": x}, option=orjson.OPT_SERIALIZE_NUMPY))


def is_near(outputs: object, expected: Array) -> bool:
    """Return whether `outputs`, parsed JSON, is the array `expected`, apart from TOLERANCE."""
    found = np.asarray(outputs, np.float32)
    return found.shape == expected.shape and np.allclose(found, expected, atol=TOLERANCE)


@dataclass
class RowPool:
    """The rows from which requests are made, and the expected outputs.

    Args:
        x: rows [N, D].
        outputs: reconstructions of x by the module, [N, D].
    """

    x: Array
    outputs: Array

    def create_request(self, model: str, rows: Sequence[int]) -> bytes:
        """Return the bytes of a request for the reconstruction of the rows with indices `rows`."""
        return rows_request(f"/reconstruct?model={model}", self.x[rows])

    def is_correct(self, body: bytes, rows: Sequence[int]) -> bool:
        """Return whether a response body holds the reconstructions of the rows with indices `rows`."""
        return is_near(orjson.loads(body)["outputs"], self.outputs[rows])


@dataclass
class Outcomes:
    """Counts of the outcomes of requests.

    Args:
        correct: number of responses with status 200 that equal the output of the module.
        wrong: number of responses with status 200 that differ from the output of the module.
        lost: number of requests that were sent but got no response.
        disconnected: number of requests during which the client disconnected on purpose.
        statuses: number of responses by status, for statuses other than 200.
        correct_times: arrival times of the correct responses, by `perf_counter`.
        lost_times: times at which requests were lost, by `perf_counter`.
    """

    correct: int = 0
    wrong: int = 0
    lost: int = 0
    disconnected: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    correct_times: list[float] = field(default_factory=list)
    lost_times: list[float] = field(default_factory=list)

    def count_response(self, status: int, is_correct: bool) -> None:
        """Count a response."""
        if status != 200:
            self.statuses[status] += 1
        elif is_correct:
            self.correct += 1
            self.correct_times.append(perf_counter())
        else:
            self.wrong += 1


class Connection:
    """A keep-alive connection, opened by the first request."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, request: bytes) -> tuple[int, bytes]:
        """Send `request` and return the status and the body of the response.

        Raises:
            NotConnected: the connection was refused.
            ConnectionError: the connection ended before the response.
        """
        if self._streams is None:
            try:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=2**22)
            except OSError as error:
                raise NotConnected from error
        reader, writer = self._streams
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
            body = await reader.readexactly(length)
        except (asyncio.IncompleteReadError, OSError) as error:
            self.close()
            raise ConnectionError("the connection ended before the response") from error
        if b"connection: close" in head:
            self.close()
        return int(head.split()[1]), body

    def close(self) -> None:
        """Close the connection at once, even during a request."""
        if self._streams:
            self._streams[1].transport.abort()
        self._streams = None


class BackgroundLoad:
    """Connections that send random requests until `stop` is called.

    Args:
        port: port of the server.
        pool: the rows from which requests are made.
        model: name of the model.
        connections: number of connections.
    """

    def __init__(self, port: int, pool: RowPool, model: str, connections: int) -> None:
        self.outcomes = Outcomes()
        self._port = port
        self._pool = pool
        self._model = model
        self._stopped = asyncio.Event()
        self._tasks = [asyncio.create_task(self._send_requests(seed)) for seed in range(connections)]

    async def stop(self) -> Outcomes:
        """Stop sending, wait for the outstanding responses, and return the outcomes."""
        self._stopped.set()
        await asyncio.gather(*self._tasks)
        return self.outcomes

    async def _send_requests(self, seed: int) -> None:
        generator, connection = np.random.default_rng(seed), Connection(self._port)
        while not self._stopped.is_set():
            rows = _random_rows(generator, self._pool)
            try:
                status, body = await connection.send(self._pool.create_request(self._model, rows))
            except NotConnected:
                await asyncio.sleep(0.01)
            except ConnectionError:
                self.outcomes.lost += 1
                self.outcomes.lost_times.append(perf_counter())
            else:
                self.outcomes.count_response(status, status == 200 and self._pool.is_correct(body, rows))
        connection.close()


async def send_with_disconnects(
    port: int, pool: RowPool, model: str, *, requests: int, concurrency: int, seed: int
) -> Outcomes:
    """Send random requests. During half of them, disconnect at a random time.

    Args:
        port: port of the server.
        pool: the rows from which requests are made.
        model: name of the model.
        requests: number of requests.
        concurrency: maximum number of requests at a time.
        seed: seed of the random numbers.
    """
    generator, outcomes = np.random.default_rng(seed), Outcomes()
    semaphore = asyncio.Semaphore(concurrency)

    async def send(rows: list[int], patience: float | None) -> None:
        async with semaphore:
            connection = Connection(port)
            try:
                async with asyncio.timeout(patience):
                    status, body = await connection.send(pool.create_request(model, rows))
                outcomes.count_response(status, status == 200 and pool.is_correct(body, rows))
            except TimeoutError:
                outcomes.disconnected += 1
            except ConnectionError:
                outcomes.lost += 1
            finally:
                connection.close()

    disconnects = generator.permutation(requests) < requests // 2
    rows_of_requests = [_random_rows(generator, pool) for _ in range(requests)]
    patience = [float(generator.uniform(0, MAX_PATIENCE)) if disconnect else None for disconnect in disconnects]
    await asyncio.gather(*map(send, rows_of_requests, patience))
    return outcomes


def _random_rows(generator: np.random.Generator, pool: RowPool) -> list[int]:
    indices: list[int] = generator.integers(0, len(pool.x), generator.integers(1, 9)).tolist()
    return indices


async def wait_until_listening(port: int, seconds: float) -> None:
    """Wait until a server accepts connections at `port`. Raises TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.1)
            else:
                writer.close()
                return
