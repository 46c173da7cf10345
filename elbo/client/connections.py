"""The clients' own transports, which keep connections open: sync over sockets, async over asyncio.

A call with a body of 100 KB takes 1.0 ms of processor time over httpx's sync transport, 0.4 ms over `SocketTransport`
and over `AsyncSocketTransport` (benchmarks/serving/results/client.md). These save the time of httpx's parser
(h11), pool and streams, because `exchange` supports only HTTP/1.1 over TCP or TLS, with whole request bodies and whole
response bodies. For proxies, and if the program passes `transport`, the clients use httpx's transports. The exceptions
are those of httpx.

In `exchange`, `seconds` limits the time from the request to the end of the response, not each read. The sync transport
gives each address of a host up to CONNECT_SECONDS to connect; the async transport gives them to all addresses together.
"""

import asyncio
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Awaitable
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar, cast

import httpx

from elbo.client.http1 import ResponseReader

T = TypeVar("T")

RECEIVE_BYTES = 2**16  # malloc would map and unmap a larger buffer for each response
IDLE_SECONDS = 60.0  # shorter than the server's ELBO_KEEP_ALIVE_SECONDS, 130 s by default
CONNECT_SECONDS = 5.0
MAX_CONNECTIONS = 100


class Origin(NamedTuple):
    """The server of a request."""

    host: str
    port: int
    is_tls: bool


def origin_of(url: httpx.URL) -> Origin:
    """Return the origin of `url`. Raises UnsupportedProtocol."""
    if url.scheme not in ("http", "https"):
        raise httpx.UnsupportedProtocol(f"expected an address with http:// or https://, got {url}")
    is_tls = url.scheme == "https"
    return Origin(url.host, url.port or (443 if is_tls else 80), is_tls)


def connect_seconds(seconds: float | None) -> float:
    """Return the seconds that a request which may take `seconds` may spend on opening a connection."""
    return CONNECT_SECONDS if seconds is None else min(CONNECT_SECONDS, seconds)


class Connection:
    """A connection over a socket."""

    def __init__(self, origin: Origin, ssl_context: ssl.SSLContext | None, seconds: float | None) -> None:
        end = None if seconds is None else time.monotonic() + seconds
        self.socket = socket.create_connection((origin.host, origin.port), timeout=seconds)
        self.idle_since = 0.0
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if origin.is_tls:
                if end is not None:
                    self.socket.settimeout(_left(end))  # for each read and write of the handshake
                context = ssl_context or ssl.create_default_context()
                self.socket = context.wrap_socket(self.socket, server_hostname=origin.host)
        except BaseException:
            self.socket.close()
            raise
        self._poll = select.poll() if hasattr(select, "poll") else None
        if self._poll:
            self._poll.register(self.socket, select.POLLIN)

    def is_usable(self) -> bool:
        """Return whether the server keeps the connection open, and no unexpected bytes have arrived."""
        if time.monotonic() - self.idle_since > IDLE_SECONDS:
            return False
        return not (self._poll.poll(0) if self._poll else select.select([self.socket], [], [], 0)[0])

    def wait(self, for_room: bool, seconds: float | None) -> bool:
        """Wait until bytes have arrived, or, with `for_room`, can be sent. Return False after `seconds`."""
        if self._poll is None:
            sockets = [self.socket]
            return any(select.select(sockets, sockets if for_room else [], [], seconds))
        events = select.POLLIN | select.POLLOUT if for_room else select.POLLIN
        self._poll.modify(self.socket, events)
        return bool(self._poll.poll(None if seconds is None else 1000 * seconds))

    def exchange(self, head: bytes, body: bytes, seconds: float | None) -> ResponseReader:
        """Send a request, and return its response, which arrives within `seconds`.

        Raises:
            httpx.WriteTimeout, httpx.ReadTimeout, httpx.ReadError, httpx.RemoteProtocolError: there is no response.
        """
        end = None if seconds is None else time.monotonic() + seconds
        failure: OSError | None = None
        reader = ResponseReader()
        self.socket.settimeout(seconds)
        try:
            self.socket.sendall(head + body)
        except TimeoutError as error:
            raise httpx.WriteTimeout("the request could not be sent in time") from error
        except OSError as error:
            failure = error  # the server may have refused the request before it read all of it
        try:
            while not reader.is_complete:
                if end is not None:
                    self.socket.settimeout(_left(end))
                reader.feed(self.socket.recv(RECEIVE_BYTES))
        except TimeoutError as error:
            raise httpx.ReadTimeout("the response did not arrive in time") from error
        except OSError as error:
            raise httpx.ReadError(f"the connection broke: {failure or error}") from error
        if failure:
            reader.keeps_alive = False
        return reader

    def close(self) -> None:
        """Close the connection."""
        with suppress(OSError):
            self.socket.close()


def _left(end: float) -> float:
    """Return the seconds until `end`. Raises TimeoutError if the time is over."""
    seconds = end - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


class SocketTransport:
    """A transport over sockets. Threads may share it: each request has a connection of its own.

    Args:
        ssl_context: how to verify the server; by default as Python does.
    """

    def __init__(self, ssl_context: ssl.SSLContext | None = None) -> None:
        self._ssl_context = ssl_context
        self._idle: IdleConnections[Connection] = IdleConnections()

    def exchange(self, origin: Origin, head: bytes, body: bytes, seconds: float | None) -> ResponseReader:
        """Send a request, and return its response. Raises the errors of `connect` and `Connection.exchange`."""
        started = time.monotonic()
        connection = self._idle.take(origin)
        if connection is None:
            connection = self.connect(origin, seconds)
            seconds = None if seconds is None else max(0.001, seconds - (time.monotonic() - started))
        try:
            reader = connection.exchange(head, body, seconds)
        except BaseException:
            connection.close()
            raise
        if reader.keeps_alive:
            self._idle.keep(origin, connection)
        else:
            connection.close()
        return reader

    def connect(self, origin: Origin, seconds: float | None) -> Connection:
        """Return a new connection, which the caller closes.

        Raises:
            httpx.ConnectError, httpx.ConnectTimeout: there is no connection.
        """
        try:
            return Connection(origin, self._ssl_context, connect_seconds(seconds))
        except TimeoutError as error:
            raise httpx.ConnectTimeout(f"{origin.host}:{origin.port} did not respond in time") from error
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error

    def close(self) -> None:
        """Close all idle connections."""
        self._idle.close()


class AsyncConnection(asyncio.BufferedProtocol):
    """A connection of asyncio that parses each response as it arrives.

    asyncio's streams copy a response into a buffer, and wake the task for each part of it. Here the task is woken once,
    by the end of the response. asyncio receives into a buffer of this class, because it would otherwise create one of
    256 KiB for each part: mapping and unmapping it takes 0.1 ms.
    """

    def __init__(self) -> None:
        self.idle_since = 0.0
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader: ResponseReader | None = None  # of the response that is awaited
        self._complete: asyncio.Future[None] | None = None  # the end of this response
        # Over TLS, asyncio receives each record into a slice of it. A slice of a bytearray would be a copy.
        self._received = memoryview(bytearray(RECEIVE_BYTES))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - as in `BufferedProtocol`
        """Return the buffer into which the next bytes are received."""
        return self._received

    def buffer_updated(self, nbytes: int) -> None:
        """Parse a part of the response. Close the connection if no request has asked for it."""
        if self._reader is None:
            self.close()
        else:
            self._feed(self._reader, bytes(self._received[:nbytes]))

    def _feed(self, reader: ResponseReader, data: bytes) -> None:
        try:
            reader.feed(data)
        except httpx.RemoteProtocolError as error:
            self._fail(error)
            return
        if reader.is_complete:
            self._finish()

    def eof_received(self) -> None:
        """End the response with the connection; asyncio then closes the transport."""
        if self._reader is not None:
            self._feed(self._reader, b"")

    def connection_lost(self, error: Exception | None) -> None:
        """Fail the request that waits for a response."""
        self._transport = None
        self._fail(httpx.ReadError(f"the connection broke: {error or 'it was closed'}"))

    def is_usable(self) -> bool:
        """Return whether the server keeps the connection open, and the running event loop receives its bytes."""
        if self._transport is None or self._transport.is_closing() or self._loop is not asyncio.get_running_loop():
            return False
        return time.monotonic() - self.idle_since <= IDLE_SECONDS

    async def exchange(self, head: bytes, body: bytes, seconds: float | None) -> ResponseReader:
        """Send a request, and return its response, which arrives within `seconds`.

        Raises:
            httpx.ConnectError: the connection was closed before the request was sent.
            httpx.ReadTimeout, httpx.ReadError, httpx.RemoteProtocolError: there is no response.
        """
        if self._transport is None:
            raise httpx.ConnectError("the connection was closed before the request was sent")
        self._reader = reader = ResponseReader()
        self._complete = complete = self._loop.create_future()
        timer = None
        if seconds is not None:
            timer = self._loop.call_later(seconds, self._fail, httpx.ReadTimeout("the response did not arrive in time"))
        try:
            self._transport.write(head + body)
            await complete
        finally:
            if timer is not None:
                timer.cancel()
            self._reader = self._complete = None
        return reader

    def _finish(self) -> None:
        if self._complete is not None and not self._complete.done():
            self._complete.set_result(None)

    def _fail(self, error: httpx.TransportError) -> None:
        if self._complete is not None and not self._complete.done():
            self._complete.set_exception(error)

    def close(self) -> None:
        """Close the connection without waiting."""
        transport, self._transport = self._transport, None
        if transport is not None and not self._loop.is_closed():  # otherwise, garbage collection closes the socket
            transport.abort()


C = TypeVar("C", Connection, AsyncConnection)


class IdleConnections(Generic[C]):
    """Connections that wait for their next request. Threads may share it, because each call of a deque is atomic."""

    def __init__(self) -> None:
        self._by_origin: dict[Origin, deque[C]] = {}  # the newest last

    def keep(self, origin: Origin, connection: C) -> None:
        """Keep `connection` for the next request to `origin`. Close the connections that have been idle too long."""
        connection.idle_since = time.monotonic()
        idle = self._by_origin.setdefault(origin, deque())
        idle.append(connection)
        with suppress(IndexError):  # another thread has taken the last one
            while connection.idle_since - idle[0].idle_since > IDLE_SECONDS:
                idle.popleft().close()

    def take(self, origin: Origin) -> C | None:
        """Return the newest usable connection to `origin`; None if there is none. Close those that are unusable."""
        idle = self._by_origin.get(origin)
        with suppress(IndexError):  # another thread has taken the last one
            while idle:
                connection = idle.pop()
                if connection.is_usable():
                    return connection
                connection.close()
        return None

    def close(self) -> None:
        """Close all connections."""
        for idle in list(self._by_origin.values()):
            with suppress(IndexError):
                while True:
                    idle.pop().close()


class StreamConnection(NamedTuple):
    """A connection over asyncio's streams, for a stream of rows."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def close(self) -> None:
        """Close the connection without waiting."""
        if not self.writer.is_closing():
            self.writer.transport.abort()


class AsyncSocketTransport:
    """A transport over asyncio.

    Args:
        ssl_context: how to verify the server; by default as Python does.
        max_connections: most requests at a time; further requests wait. Streams do not count.
    """

    def __init__(self, ssl_context: ssl.SSLContext | None = None, max_connections: int = MAX_CONNECTIONS) -> None:
        self._ssl_context = ssl_context
        self._slots = asyncio.Semaphore(max_connections)
        self._idle: IdleConnections[AsyncConnection] = IdleConnections()

    async def exchange(self, origin: Origin, head: bytes, body: bytes, seconds: float | None) -> ResponseReader:
        """Send a request, and return its response. Raises the errors of `SocketTransport.exchange` and PoolTimeout."""
        end = None if seconds is None else time.monotonic() + seconds
        await self._take_slot(seconds)
        try:
            connection = self._idle.take(origin)
            if connection is None:
                connection = await self._connect(origin, None if end is None else end - time.monotonic())
            try:
                reader = await connection.exchange(head, body, None if end is None else end - time.monotonic())
            except BaseException:
                connection.close()
                raise
        finally:
            self._slots.release()
        if reader.keeps_alive:
            self._idle.keep(origin, connection)
        else:
            connection.close()
        return reader

    async def _take_slot(self, seconds: float | None) -> None:
        if not self._slots.locked():
            await self._slots.acquire()  # at once: a timer would cost as much as the rest
            return
        try:
            async with asyncio.timeout(seconds):
                await self._slots.acquire()
        except TimeoutError as error:
            raise httpx.PoolTimeout("all connections of the client are in use") from error

    async def _connect(self, origin: Origin, seconds: float | None) -> AsyncConnection:
        async def connect() -> AsyncConnection:
            loop, context = asyncio.get_running_loop(), self._context(origin)
            _, connection = await loop.create_connection(AsyncConnection, origin.host, origin.port, ssl=context)
            return connection

        return await _connected(connect(), origin, seconds)

    async def open_stream(self, origin: Origin, seconds: float | None) -> StreamConnection:
        """Return a new connection, which the caller closes. Raises the errors of `SocketTransport.connect`."""

        async def connect() -> StreamConnection:
            context = self._context(origin)
            streams = await asyncio.open_connection(origin.host, origin.port, ssl=context, limit=RECEIVE_BYTES)
            return StreamConnection(*streams)

        return await _connected(connect(), origin, seconds)

    def _context(self, origin: Origin) -> ssl.SSLContext | None:
        if not origin.is_tls:
            return None
        return self._ssl_context or ssl.create_default_context()

    async def aclose(self) -> None:
        """Close all idle connections."""
        self._idle.close()


async def _connected(connect: Awaitable[T], origin: Origin, seconds: float | None) -> T:
    """Return the connection that `connect` opens. Raises httpx.ConnectError and httpx.ConnectTimeout."""
    try:
        async with asyncio.timeout(connect_seconds(seconds)):
            return await connect
    except TimeoutError as error:
        raise httpx.ConnectTimeout(f"{origin.host}:{origin.port} did not respond in time") from error
    except OSError as error:
        raise httpx.ConnectError(str(error)) from error
