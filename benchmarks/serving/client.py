"""A client that checks every answer: for what a load generator, which sends one request again and again, cannot see."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import numpy.typing as npt
import orjson

Array = npt.NDArray[np.float32]
TOLERANCE = 1e-4  # of an answer against the module's


class Refused(ConnectionError):
    """Nothing was sent: nobody listens."""


@dataclass
class Pool:
    """Rows x [N, D] and what the module makes of them."""

    x: Array
    answers: Array

    def request(self, model: str, rows: Sequence[int]) -> bytes:
        """The bytes of a request for the reconstruction of `rows`."""
        body = orjson.dumps({"inputs": self.x[rows]}, option=orjson.OPT_SERIALIZE_NUMPY)
        head = f"POST /reconstruct?model={model} HTTP/1.1\r\nHost: elbo\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def is_right(self, body: bytes, rows: Sequence[int]) -> bool:
        """Whether `body` is the answer to `rows`."""
        found = np.asarray(orjson.loads(body)["outputs"], np.float32)
        return found.shape == (len(rows), self.x.shape[1]) and np.allclose(found, self.answers[rows], atol=TOLERANCE)


@dataclass
class Seen:
    """What came of requests."""

    right: int = 0
    wrong: int = 0
    lost: int = 0  # sent, and not answered
    left: int = 0  # by the client
    statuses: Counter[int] = field(default_factory=Counter)  # other than 200
    rights: list[float] = field(default_factory=list)  # when a right answer came, by perf_counter
    errors: list[float] = field(default_factory=list)  # when a connection broke


class Connection:
    """One keep-alive connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """The status and the body of the answer. Raises Refused, or another ConnectionError if it was lost."""
        if self._streams is None:
            try:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=2**22)
            except OSError as error:
                raise Refused from error
        reader, writer = self._streams
        try:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
            body = await reader.readexactly(length)
        except (asyncio.IncompleteReadError, OSError) as error:
            self.leave()
            raise ConnectionError("lost") from error
        if b"connection: close" in head:
            self.leave()
        return int(head.split()[1]), body

    def leave(self) -> None:
        """Close it, whatever is under way."""
        if self._streams:
            self._streams[1].transport.abort()
        self._streams = None


class Load:
    """Connections that ask for random rows until they are stopped."""

    def __init__(self, port: int, pool: Pool, model: str, connections: int) -> None:
        self.seen = Seen()
        self._stop = asyncio.Event()
        self._place = port, pool, model
        self._tasks = [asyncio.create_task(self._ask(seed)) for seed in range(connections)]

    async def stop(self) -> Seen:
        """Let all have their last answer."""
        self._stop.set()
        await asyncio.gather(*self._tasks)
        return self.seen

    async def _ask(self, seed: int) -> None:
        port, pool, model = self._place
        rng, connection = np.random.default_rng(seed), Connection(port)
        while not self._stop.is_set():
            rows = rng.integers(0, len(pool.x), rng.integers(1, 9)).tolist()
            try:
                status, body = await connection.ask(pool.request(model, rows))
            except Refused:
                await asyncio.sleep(0.01)
            except ConnectionError:
                self.seen.lost += 1
                self.seen.errors.append(perf_counter())
            else:
                note(self.seen, pool, status, body, rows)
        connection.leave()


def note(seen: Seen, pool: Pool, status: int, body: bytes, rows: Sequence[int]) -> None:
    """Count an answer."""
    if status != 200:
        seen.statuses[status] += 1
    elif pool.is_right(body, rows):
        seen.right += 1
        seen.rights.append(perf_counter())
    else:
        seen.wrong += 1


async def storm(port: int, pool: Pool, model: str, requests: int, together: int, seed: int) -> Seen:
    """`requests`, up to `together` at a time, half of which leave at a random moment."""
    rng, seen = np.random.default_rng(seed), Seen()
    turns = asyncio.Semaphore(together)

    async def one(rows: list[int], patience: float | None) -> None:
        async with turns:
            connection = Connection(port)
            try:
                async with asyncio.timeout(patience):
                    status, body = await connection.ask(pool.request(model, rows))
                note(seen, pool, status, body, rows)
            except TimeoutError:
                seen.left += 1
            except ConnectionError:
                seen.lost += 1
            finally:
                connection.leave()

    leaves = rng.permutation(requests) < requests // 2
    asked = [rng.integers(0, len(pool.x), rng.integers(1, 9)).tolist() for _ in range(requests)]
    patience = [float(rng.uniform(0, 0.03)) if leave else None for leave in leaves]
    await asyncio.gather(*[one(*each) for each in zip(asked, patience, strict=True)])
    return seen
