"""Streams of rows to /anomaly: verdicts arrive while rows are sent, over one connection, in NDJSON.

The memory of a stream is bounded by its credit: at most `ahead` rows are read from the source before the program takes
their verdicts from the stream. A stream is never repeated, because its rows may count towards alerts.
"""

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

import httpx

from elbo.client.calls import row_error, verdict
from elbo.client.connections import (
    RECEIVE_BYTES,
    AsyncSocketTransport,
    Connection,
    SocketTransport,
    StreamConnection,
)
from elbo.client.errors import ConnectionFailed, InvalidReply, TimedOut, from_problem
from elbo.client.formats import NDJSON, dump_json, load_json
from elbo.client.http1 import ResponseReader, request_head
from elbo.client.results import RowError, StreamSummary, Verdict
from elbo.client.retries import Attempts
from elbo.client.settings import Settings, refusal

BATCH_BYTES = 2**14  # rows are sent in chunks of about this size
BATCH_SECONDS = 0.01  # a chunk is sent after this time, even if it is smaller
MOST_READ_ROWS = 256  # rows that a thread reads at a time
LAST_CHUNK = b"0\r\n\r\n"


def chunk(lines: bytes) -> bytes:
    """Return `lines` as one chunk of a request body."""
    return b"%x\r\n%b\r\n" % (len(lines), lines)


def line(row: object) -> bytes:
    """Return a row as one line of NDJSON."""
    return dump_json(row) + b"\n"


class VerdictReader:
    """Parses the response of a stream. `verdicts` has the verdicts that the program has not taken yet.

    Args:
        address: the address of the server, for messages.
    """

    def __init__(self, address: str) -> None:
        self.verdicts: deque[Verdict | RowError] = deque()
        self.received = 0
        self.summary: StreamSummary | None = None
        self._address = address
        self._reader = ResponseReader()
        self._rest = b""
        self._refused: list[bytes] = []

    @property
    def is_complete(self) -> bool:
        """Whether the whole response has arrived."""
        return self._reader.is_complete

    def feed(self, data: bytes) -> None:
        """Read `data`; b"" is the end of the connection.

        Raises:
            ElboHTTPError: the server has refused the stream, or ended it with an error.
            ConnectionFailed: the response is cut off.
            InvalidReply: the response is not a stream of verdicts.
        """
        try:
            self._reader.feed(data)
        except httpx.RemoteProtocolError as error:
            self.fail(error)
        if not self._reader.status:
            return
        body = self._reader.take()
        if self._reader.status != 200:
            self._refused.append(body)
            if self._reader.is_complete:
                self._refuse()
            return
        *lines, self._rest = (self._rest + body).split(b"\n")
        for text in lines:
            self._read_line(text)
        if self._reader.is_complete and self.summary is None:
            self.fail(httpx.RemoteProtocolError("the stream ended without its last line"))

    def fail(self, error: Exception) -> NoReturn:
        """Raise ConnectionFailed for `error`."""
        raise ConnectionFailed(
            f"the stream from {self._address} broke after {self.received} verdicts: {error}; "
            "the server may have judged more rows than that",
            sent=True,
        ) from error

    def _refuse(self) -> NoReturn:
        raise refusal(self._reader.received()._replace(content=b"".join(self._refused)))

    def _read_line(self, text: bytes) -> None:
        content = load_json(text)
        try:
            if "score" in content:
                self.verdicts.append(verdict(content))
                self.received += 1
            elif "row" in content:
                self.verdicts.append(row_error(content))
                self.received += 1
            elif "code" in content:
                raise from_problem(content)
            else:
                names = ("model", "version", "rows", "anomalies", "failed", "unknown_fields")
                self.summary = StreamSummary(**{name: content[name] for name in names}, warning=content.get("warning"))
        except KeyError as error:
            raise InvalidReply(f"a line of the stream has no {error}: {text[:80]!r}") from error


class AnomalyStream(Iterator[Verdict | RowError]):
    """An iterator over verdicts, which sends rows while it receives verdicts. `Client.anomaly_stream` returns it.

    The connection is opened with the first verdict, and closed with the last. A program that stops earlier calls
    `close`, or uses the stream in a `with` block.
    """

    def __init__(
        self,
        settings: Settings,
        transport: SocketTransport,
        path: str,
        rows: Iterable[object],
        ahead: int,
        seconds: float | None,
    ) -> None:
        _check_ahead(ahead)
        self._settings = settings
        self._transport = transport
        self._request = settings.stream_request(path, NDJSON, seconds)
        self._reader = VerdictReader(settings.base_url)
        self._rows = iter(rows)
        self._credit = ahead
        self._seconds = seconds
        self._connection: Connection | None = None
        self._pending = b""
        self._has_rows = True
        self._is_ended = False  # whether `_pending` has got the last chunk of the body
        self._is_closed = False

    @property
    def summary(self) -> StreamSummary | None:
        """The counts of the stream; None until it has ended."""
        return self._reader.summary

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. The server then stops judging rows."""
        self._is_closed = True
        if self._connection:
            self._connection.close()

    def __next__(self) -> Verdict | RowError:
        try:
            while not self._reader.verdicts:
                if self._is_closed or self._reader.is_complete:
                    self.close()
                    raise StopIteration
                self._advance(self._connection or self._connect())
        except BaseException:
            self.close()
            raise
        self._credit += 1
        return self._reader.verdicts.popleft()

    def _connect(self) -> Connection:
        attempts = Attempts(self._settings.retries, False, self._seconds, self._settings.base_url)
        while self._connection is None:
            try:
                self._connection = self._transport.connect(self._settings.origin, self._seconds)
            except httpx.TransportError as error:
                time.sleep(attempts.wait_after_failure(error))
        self._connection.socket.setblocking(False)
        self._pending = request_head(self._request)
        return self._connection

    def _advance(self, connection: Connection) -> None:
        """Read rows, then send and receive without blocking. If the network is not ready for either, wait for it."""
        if len(self._pending) < BATCH_BYTES:
            self._take_rows()
        has_sent, has_received = self._try_send(connection), self._try_receive(connection)
        if has_sent or has_received:
            return
        if not connection.wait(bool(self._pending), self._seconds):
            raise TimedOut(
                f"no progress of the stream to {self._settings.base_url} within {self._seconds:g} s: "
                "the server takes no rows and sends no verdicts; raise timeout="
            )

    def _take_rows(self) -> None:
        """Read rows from the source, until the chunk is full, its time is over, or the credit is used up."""
        lines, size, end = [], 0, time.monotonic() + BATCH_SECONDS
        while self._has_rows and self._credit and size < BATCH_BYTES:
            try:
                text = line(next(self._rows))
            except StopIteration:
                self._has_rows = False
                break
            self._credit -= 1
            lines.append(text)
            size += len(text)
            if time.monotonic() > end:
                break
        if lines:
            self._pending += chunk(b"".join(lines))
        if not self._has_rows and not self._is_ended:
            self._pending += LAST_CHUNK
            self._is_ended = True

    def _try_send(self, connection: Connection) -> bool:
        if not self._pending:
            return False
        try:
            count = connection.socket.send(self._pending)
        except OSError as error:
            if _wants_more(error):
                return False
            # Send nothing more, but read the response: it may say why the server closed the connection.
            self._pending, self._has_rows, self._is_ended = b"", False, True
            return False
        self._pending = self._pending[count:]
        return True

    def _try_receive(self, connection: Connection) -> bool:
        try:
            data = connection.socket.recv(RECEIVE_BYTES)
        except OSError as error:
            if _wants_more(error):
                return False
            self._reader.fail(error)
        self._reader.feed(data)
        return True


def _read_rows(rows: Iterator[Any], count: int, arrived: deque[Any]) -> bool:
    """Append the next rows to `arrived`, at most `count`, for about BATCH_SECONDS. Return whether there may be more."""
    end = time.monotonic() + BATCH_SECONDS
    for _ in range(count):
        try:
            arrived.append(next(rows))
        except StopIteration:
            return False
        if time.monotonic() > end:
            break
    return True


def _wants_more(error: OSError) -> bool:
    """Return whether `error` of a non-blocking socket only means that the network is not ready."""
    return isinstance(error, BlockingIOError | ssl.SSLWantReadError | ssl.SSLWantWriteError)


def _check_ahead(ahead: int) -> None:
    if ahead < 1:
        raise ValueError(f"ahead must be at least 1 row, got {ahead}")


class AsyncAnomalyStream(AsyncIterator[Verdict | RowError]):
    """An iterator over verdicts, which sends rows while it receives verdicts. `AsyncClient.anomaly_stream` returns it.

    The connection is opened with the first verdict, and closed with the last. A program that stops earlier awaits
    `aclose`, or uses the stream in an `async with` block.
    """

    def __init__(
        self,
        settings: Settings,
        transport: AsyncSocketTransport,
        path: str,
        rows: Iterable[object] | AsyncIterable[object],
        ahead: int,
        seconds: float | None,
    ) -> None:
        _check_ahead(ahead)
        self._settings = settings
        self._transport = transport
        self._request = settings.stream_request(path, NDJSON, seconds)
        self._reader = VerdictReader(settings.base_url)
        self._rows = rows
        self._credit = asyncio.Semaphore(ahead)
        self._seconds = seconds
        self._connection: StreamConnection | None = None
        self._producer: asyncio.Task[None] | None = None
        self._lines: list[bytes] = []
        self._size = 0
        self._sent = 0
        self._is_closed = False

    @property
    def summary(self) -> StreamSummary | None:
        """The counts of the stream; None until it has ended."""
        return self._reader.summary

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection, and stop reading the rows. The server then stops judging rows."""
        self._is_closed = True
        if self._connection:
            self._connection.close()
        if self._producer:
            self._producer.cancel()
            await asyncio.gather(self._producer, return_exceptions=True)

    async def __anext__(self) -> Verdict | RowError:
        try:
            while not self._reader.verdicts:
                if self._is_closed or self._reader.is_complete:
                    await self.aclose()
                    raise StopAsyncIteration
                await self._receive(self._connection or await self._connect())
        except BaseException:
            await self.aclose()
            raise
        self._credit.release()
        return self._reader.verdicts.popleft()

    async def _connect(self) -> StreamConnection:
        attempts = Attempts(self._settings.retries, False, self._seconds, self._settings.base_url)
        while self._connection is None:
            try:
                self._connection = await self._transport.open_stream(self._settings.origin, self._seconds)
            except httpx.TransportError as error:
                await asyncio.sleep(attempts.wait_after_failure(error))
        self._connection.writer.write(request_head(self._request))
        self._producer = asyncio.create_task(self._produce(self._connection))
        return self._connection

    async def _receive(self, connection: StreamConnection) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                data = await connection.reader.read(RECEIVE_BYTES)
        except TimeoutError as error:
            if self._producer and not self._producer.done() and self._sent == self._reader.received:
                return  # the verdicts on all rows that were sent have arrived: the stream waits for its source
            raise TimedOut(
                f"no verdict from {self._settings.base_url} within {self._seconds:g} s; raise timeout="
            ) from error
        except OSError as error:
            self._raise_failure_of_source()
            self._reader.fail(error)
        if not data:
            self._raise_failure_of_source()
        self._reader.feed(data)

    def _raise_failure_of_source(self) -> None:
        """Raise the exception of the source of the rows, if it raised one, which ended the connection."""
        producer = self._producer
        if producer and producer.done() and not producer.cancelled() and (error := producer.exception()):
            raise error

    async def _produce(self, connection: StreamConnection) -> None:
        """Send the rows. If the source fails, abort the connection: its end would say that these were all rows."""
        try:
            async for row in self._with_credit():
                text = line(row)
                self._sent += 1
                self._lines.append(text)
                self._size += len(text)
                if len(self._lines) == 1:  # flush when the event loop runs next: when the source waits
                    asyncio.get_running_loop().call_soon(self._flush, connection)
                if self._size >= BATCH_BYTES:
                    self._flush(connection)
                    try:
                        await connection.writer.drain()
                    except OSError:
                        return  # the response may say why the server closed the connection: `_receive` reads it
            self._flush(connection)
            connection.writer.write(LAST_CHUNK)
        except Exception:
            connection.close()
            raise

    def _flush(self, connection: StreamConnection) -> None:
        if self._lines and not connection.writer.is_closing():
            connection.writer.write(chunk(b"".join(self._lines)))
        self._lines.clear()
        self._size = 0

    async def _with_credit(self) -> AsyncIterator[Any]:
        """Yield the rows. Read each of them only after a credit was acquired for it."""
        if isinstance(self._rows, AsyncIterable):
            source = aiter(self._rows)
            while True:
                await self._credit.acquire()
                try:
                    yield await anext(source)
                except StopAsyncIteration:
                    return
        elif isinstance(self._rows, Sequence):
            for row in self._rows:
                await self._credit.acquire()
                yield row
        else:
            async for row in self._rows_read_in_a_thread(iter(self._rows)):
                yield row

    async def _rows_read_in_a_thread(self, rows: Iterator[Any]) -> AsyncIterator[Any]:
        """Yield the rows of an iterator that may wait for each row, without blocking the event loop."""
        arrived: deque[Any] = deque()
        has_rows = True
        while has_rows:
            await self._credit.acquire()
            credit = 1
            while credit < MOST_READ_ROWS and not self._credit.locked():
                await self._credit.acquire()
                credit += 1
            reading = asyncio.ensure_future(asyncio.to_thread(_read_rows, rows, credit, arrived))
            while not reading.done():
                await asyncio.wait([reading], timeout=BATCH_SECONDS)
                while arrived:
                    credit -= 1
                    yield arrived.popleft()
            has_rows = reading.result()
            while arrived:
                credit -= 1
                yield arrived.popleft()
            for _ in range(credit):
                self._credit.release()
