"""Streams of rows: bounded memory, clients that leave, servers that stop, and sources that fail."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from elbo.client import (
    AsyncClient,
    BadRequest,
    Client,
    ConnectionFailed,
    NotFound,
    RowError,
    TimedOut,
    Verdict,
)
from tests.elbo.client.scripted import respond_raw, scripted
from tests.service.hosts import host_rows
from tests.waiting import wait_until

pytestmark = pytest.mark.slow
WIDE_ROW = {f"feature {index}": 0.123456789 for index in range(300)}  # 8 KB of NDJSON


class Source:
    """An iterator over rows that counts how many were read."""

    def __init__(self, rows: list[Any]) -> None:
        self._rows = iter(rows)
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        row = next(self._rows)
        self.read += 1
        return row


async def paced(rows: list[Any], seconds: float = 0.0) -> AsyncIterator[Any]:
    """Yield rows, and wait `seconds` before each."""
    for row in rows:
        await asyncio.sleep(seconds)
        yield row


@pytest.mark.parametrize("ahead", [1, 7, 1000])
def test_source_is_never_read_more_than_ahead_rows_before_the_verdicts_taken(address: str, ahead: int) -> None:
    rows = host_rows(60)
    source = Source(rows)
    with Client(address, "hosts") as elbo:
        for taken, verdict in enumerate(elbo.anomaly_stream(source, ahead=ahead, observe=False)):
            assert isinstance(verdict, Verdict)
            assert verdict.row == taken
            assert taken < source.read <= taken + ahead
        assert source.read == 60


def test_async_source_is_never_read_more_than_ahead_rows_before_the_verdicts_taken(address: str) -> None:
    async def scenario() -> None:
        source = Source(host_rows(60))
        async with AsyncClient(address, "hosts") as elbo:
            taken = 0
            async for _ in elbo.anomaly_stream(source, ahead=7, observe=False):
                assert taken < source.read <= taken + 7
                taken += 1
            assert taken == source.read == 60

    asyncio.run(scenario())


def test_long_stream_gives_every_verdict_in_order(address: str) -> None:
    rows = host_rows(20_000)
    with Client(address, "hosts") as elbo, elbo.anomaly_stream(rows, observe=False, explain=0) as stream:
        assert [each.row for each in stream] == list(range(20_000))
        assert stream.summary is not None
        assert (stream.summary.rows, stream.summary.failed) == (20_000, 0)
        assert next(stream, None) is None


def test_verdict_on_a_live_row_arrives_before_the_next_row(address: str) -> None:
    async def scenario() -> None:
        rows = host_rows(4)
        asked: list[int] = []

        async def live() -> AsyncIterator[Any]:
            for number, row in enumerate(rows):
                asked.append(number)
                yield row
                await asyncio.wait_for(judged[number].wait(), 20)

        judged = [asyncio.Event() for _ in rows]
        async with AsyncClient(address, "hosts") as elbo:
            async for verdict in elbo.anomaly_stream(live(), observe=False):
                assert asked[-1] == verdict.row
                judged[verdict.row].set()
        assert asked == [0, 1, 2, 3]

    asyncio.run(scenario())


class DeafServer:
    """A server that accepts a connection, reads `size` bytes of the request, and then nothing more."""

    def __init__(self, size: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._size = size
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        self._connections.append(connection)
        while self._size > 0:
            self._size -= len(connection.recv(min(65536, self._size)))

    def close(self) -> None:
        """Close the listener and the connection."""
        for each in (self._listener, *self._connections):
            each.close()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_source_is_read_no_further_when_the_server_stops_reading(kind: str) -> None:
    """Without back-pressure, the client would read all 100,000 rows, 0.8 GB of NDJSON."""
    server = DeafServer(2**20)
    source = Source([WIDE_ROW] * 100_000)

    async def scenario() -> None:
        async with AsyncClient(server.address) as elbo:
            async for _ in elbo.anomaly_stream(source, ahead=100_000, timeout=1.0):
                pass

    def stream() -> None:
        with Client(server.address) as elbo:
            list(elbo.anomaly_stream(source, ahead=100_000, timeout=1.0))

    try:
        with pytest.raises(TimedOut):
            asyncio.run(scenario()) if kind == "async" else stream()
    finally:
        server.close()
    # The server read 1 MB. The rest is in the buffers of both sockets, a few MB each at most.
    assert 100 < source.read < 2500


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_client_that_leaves_early_ends_the_stream_at_the_server(address: str, plain: httpx.Client, kind: str) -> None:
    before = streams(plain)
    source = Source(host_rows(100_000))

    async def scenario() -> None:
        async with AsyncClient(address, "hosts") as elbo, elbo.anomaly_stream(source, observe=False) as stream:
            async for verdict in stream:
                if verdict.row == 10:
                    break

    if kind == "async":
        asyncio.run(scenario())
    else:
        with Client(address, "hosts") as elbo, elbo.anomaly_stream(source, observe=False) as stream:
            assert next(each for each in stream if each.row == 10).row == 10
            stream.close()
            assert list(stream)[1024:] == []  # only verdicts that had already arrived
    assert source.read <= 11 + 2 * 1024
    wait_until(lambda: streams(plain) == before + 1)


def streams(plain: httpx.Client) -> float:
    """Return how many streams have ended at the server."""
    lines = plain.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("elbo_requests_total{") and "/anomaly:stream" in line]
    return sum(float(line.rpartition(" ")[2]) for line in found)


@pytest.mark.parametrize("error", [KeyError, ConnectionResetError])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_error_of_the_source_is_raised_and_ends_the_stream(address: str, kind: str, error: type[Exception]) -> None:
    def failing() -> Iterator[Any]:
        yield from host_rows(5)
        raise error("no more data")

    async def scenario() -> None:
        async with AsyncClient(address, "hosts") as elbo:
            async for _ in elbo.anomaly_stream(failing(), observe=False, timeout=5):
                pass

    def stream() -> None:
        with Client(address, "hosts") as elbo:
            list(elbo.anomaly_stream(failing(), observe=False))

    with pytest.raises(error, match="no more data"):
        asyncio.run(scenario()) if kind == "async" else stream()


def test_task_that_is_cancelled_while_it_closes_a_stream_stays_cancelled(address: str) -> None:
    async def slow_to_end() -> AsyncIterator[Any]:
        try:
            yield host_rows(1)[0]
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.3)

    async def leave(elbo: AsyncClient) -> str:
        async with elbo.anomaly_stream(slow_to_end(), observe=False) as stream:
            await anext(stream)
        return "not cancelled"

    async def scenario() -> bool:
        async with AsyncClient(address, "hosts") as elbo:
            task = asyncio.create_task(leave(elbo))
            while not (producers := [each for each in asyncio.all_tasks() if each.cancelling()]):
                await asyncio.sleep(0.01)
            assert task not in producers
            task.cancel()
            await asyncio.wait([task])
            return task.cancelled()

    assert asyncio.run(scenario())


def test_stream_that_the_server_refuses_raises_its_error(address: str) -> None:
    with Client(address) as elbo:
        with pytest.raises(NotFound, match="model 'nope' is not served"):
            list(elbo.anomaly_stream(host_rows(3000), model="nope"))
        with pytest.raises(BadRequest, match="alpha"):
            list(elbo.anomaly_stream(host_rows(3), model="hosts", alpha=7.0))


def test_row_that_cannot_be_scored_is_an_error_of_its_row_only(address: str) -> None:
    async def scenario() -> list[Verdict | RowError]:
        async with AsyncClient(address, "hosts") as elbo:
            rows = [host_rows(1)[0], [1.0], host_rows(1)[0]]
            return [each async for each in elbo.anomaly_stream(paced(rows), observe=False)]

    assert [type(each) for each in asyncio.run(scenario())] == [Verdict, RowError, Verdict]


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n",
    ],
)
def test_stream_without_its_last_line_is_not_taken_for_a_complete_one(response: bytes) -> None:
    with scripted() as server:
        server._answers = [respond_raw(response)]
        with Client(server.address) as elbo, pytest.raises(ConnectionFailed, match="broke after 0 verdicts"):
            list(elbo.anomaly_stream([], observe=False))


def test_stream_of_no_rows_has_a_summary(address: str) -> None:
    with Client(address, "hosts") as elbo, elbo.anomaly_stream([]) as stream:
        assert list(stream) == []
        assert stream.summary is not None
        assert stream.summary.rows == 0


def test_slow_source_does_not_time_out(address: str) -> None:
    async def scenario() -> int:
        async with AsyncClient(address, "hosts") as elbo:
            stream = elbo.anomaly_stream(paced(host_rows(3), 0.6), observe=False, timeout=0.5)
            return len([each async for each in stream])

    assert asyncio.run(scenario()) == 3


def test_iterator_that_waits_does_not_block_the_event_loop(address: str) -> None:
    first_verdict = threading.Event()

    def waiting() -> Iterator[Any]:
        rows = host_rows(2)
        yield rows[0]
        assert first_verdict.wait(30), "the event loop did not run while the iterator waited"
        yield rows[1]

    async def scenario() -> list[int]:
        found = []
        async with AsyncClient(address, "hosts") as elbo:
            async for verdict in elbo.anomaly_stream(waiting(), observe=False):
                found.append(verdict.row)
                first_verdict.set()
        return found

    assert asyncio.run(scenario()) == [0, 1]


def test_stream_over_a_transport_that_cannot_read_while_it_writes_is_refused(address: str) -> None:
    with Client(address, transport=httpx.HTTPTransport()) as elbo, pytest.raises(TypeError, match="direct connection"):
        elbo.anomaly_stream([])


def test_ahead_below_one_is_refused(address: str) -> None:
    with Client(address) as elbo, pytest.raises(ValueError, match="ahead must be at least 1"):
        elbo.anomaly_stream([], ahead=0)
