"""Transports of httpx that keep connections open: for sync clients over sockets, for async clients over asyncio.

httpx's own transport takes about 0.7 ms of processor time for a request of 100 KB, most of it in its parser (h11), its
pool and its streams. These transports take about 0.1 ms, because they support only what a client of Elbo needs:
HTTP/1.1 over TCP or TLS, whole request bodies, and whole response bodies. For proxies, HTTP/2 or trio, the clients take
httpx's transports instead.

A request may have the extension `deadline`, a time on the clock `time.monotonic`. Without it, the timeout `read` of
httpx limits the time from the request to the end of the response.
"""

import asyncio
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import httpx

from elbo.client.http1 import ResponseReader, request_head

RECEIVE_BYTES = 2**18
IDLE_SECONDS = 60.0  # shorter than the server's ELBO_KEEP_ALIVE_SECONDS, 130 s by default
MAX_CONNECTIONS = 100


class Origin(NamedTuple):
    """Where a request goes."""

    host: str
    port: int
    is_tls: bool


def origin_of(request: httpx.Request) -> Origin:
    """Return the origin of `request`. Raises UnsupportedProtocol."""
    url = request.url
    if url.scheme not in ("http", "https"):
        raise httpx.UnsupportedProtocol(f"expected an address with http:// or https://, got {url}", request=request)
    is_tls = url.scheme == "https"
    return Origin(url.host, url.port or (443 if is_tls else 80), is_tls)


def _end_of(request: httpx.Request, phase: str) -> float | None:
    """Return the time on the clock `time.monotonic` when `phase` times out; None for never."""
    deadline: float | None = request.extensions.get("deadline")
    seconds = (request.extensions.get("timeout") or {}).get(phase)
    if seconds is None:
        return deadline
    end = time.monotonic() + float(seconds)
    return end if deadline is None else min(end, deadline)


def _left(end: float | None, expired: httpx.TimeoutException) -> float | None:
    """Return the seconds until `end`; None for no limit. Raises `expired` if the time is over."""
    if end is None:
        return None
    seconds = end - time.monotonic()
    if seconds <= 0:
        raise expired
    return seconds


def response_of(reader: ResponseReader, request: httpx.Request) -> httpx.Response:
    """Return the response that `reader` has read."""
    extensions = {"http_version": b"HTTP/1.1", "reason_phrase": reader.reason}
    stream = httpx.ByteStream(reader.take())
    return httpx.Response(reader.status, headers=reader.headers, stream=stream, request=request, extensions=extensions)


class Connection:
    """A connection over a socket."""

    def __init__(self, origin: Origin, ssl_context: ssl.SSLContext | None, seconds: float | None) -> None:
        self.socket = socket.create_connection((origin.host, origin.port), timeout=seconds)
        self.idle_since = 0.0
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if origin.is_tls:
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

    def exchange(self, request: httpx.Request, head: bytes, body: bytes) -> ResponseReader:
        """Send a request, and return its response.

        Raises:
            httpx.WriteTimeout, httpx.ReadTimeout, httpx.ReadError, httpx.RemoteProtocolError: there is no response.
        """
        end = _end_of(request, "read")
        failure: OSError | None = None
        try:
            self.socket.settimeout(_left(end, httpx.WriteTimeout("the request could not be sent in time")))
            self.socket.sendall(head + body)
        except TimeoutError as error:
            raise httpx.WriteTimeout("the request could not be sent in time", request=request) from error
        except OSError as error:
            failure = error  # the server may have refused the request before it has read all of it
        reader = ResponseReader(request.method)
        expired = httpx.ReadTimeout("the response did not arrive in time", request=request)
        try:
            while not reader.is_complete:
                self.socket.settimeout(_left(end, expired))
                reader.feed(self.socket.recv(RECEIVE_BYTES))
        except TimeoutError as error:
            raise expired from error
        except OSError as error:
            raise httpx.ReadError(f"the connection broke: {failure or error}", request=request) from error
        reader.keeps_alive = reader.keeps_alive and failure is None
        return reader

    def close(self) -> None:
        """Close the connection."""
        with suppress(OSError):
            self.socket.close()


class SocketTransport(httpx.BaseTransport):
    """A transport of httpx over sockets. Threads may share it.

    Args:
        ssl_context: how to verify the server; by default as Python does.
        max_connections: most connections at a time; further requests wait.
    """

    def __init__(self, ssl_context: ssl.SSLContext | None = None, max_connections: int = MAX_CONNECTIONS) -> None:
        self._ssl_context = ssl_context
        self._slots = threading.Semaphore(max_connections)
        self._idle: dict[Origin, deque[Connection]] = {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request` and return the response, whose body has been read."""
        origin, head, body = origin_of(request), request_head(request), request.read()
        with self._slot(request):
            connection = self._connection(origin, request)
            try:
                reader = connection.exchange(request, head, body)
            except BaseException:
                connection.close()
                raise
            if reader.keeps_alive:
                connection.idle_since = time.monotonic()
                self._idle.setdefault(origin, deque()).append(connection)
            else:
                connection.close()
        return response_of(reader, request)

    @contextmanager
    def _slot(self, request: httpx.Request) -> Iterator[None]:
        end = _end_of(request, "pool")
        expired = httpx.PoolTimeout("all connections of the client are in use", request=request)
        if not self._slots.acquire(timeout=_left(end, expired)):
            raise expired
        try:
            yield
        finally:
            self._slots.release()

    def _connection(self, origin: Origin, request: httpx.Request) -> Connection:
        """Return an idle connection that the server has not closed, or a new connection."""
        idle = self._idle.get(origin)
        while idle:
            try:
                connection = idle.pop()
            except IndexError:  # another thread has taken it
                break
            if connection.is_usable():
                return connection
            connection.close()
        return self.connect(origin, request)

    def connect(self, origin: Origin, request: httpx.Request) -> Connection:
        """Return a new connection, which the caller closes.

        Raises:
            httpx.ConnectError, httpx.ConnectTimeout: there is no connection.
        """
        expired = httpx.ConnectTimeout(f"{origin.host}:{origin.port} did not respond in time", request=request)
        seconds = _left(_end_of(request, "connect"), expired)
        try:
            return Connection(origin, self._ssl_context, seconds)
        except TimeoutError as error:
            raise expired from error
        except OSError as error:
            raise httpx.ConnectError(str(error), request=request) from error

    def close(self) -> None:
        """Close all idle connections."""
        for connections in self._idle.values():
            while connections:
                connections.pop().close()


class AsyncConnection:
    """A connection over asyncio's streams."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.idle_since = 0.0

    def is_usable(self) -> bool:
        """Return whether the server keeps the connection open."""
        is_fresh = time.monotonic() - self.idle_since <= IDLE_SECONDS
        return is_fresh and not self.reader.at_eof() and not self.writer.is_closing()

    async def exchange(self, request: httpx.Request, head: bytes, body: bytes) -> ResponseReader:
        """Send a request, and return its response. Raises the errors of `Connection.exchange`."""
        failure: OSError | None = None
        reader = ResponseReader(request.method)
        try:
            async with asyncio.timeout_at(_loop_time(_end_of(request, "read"))):
                try:
                    self.writer.write(head + body)
                    await self.writer.drain()
                except OSError as error:
                    failure = error
                while not reader.is_complete:
                    reader.feed(await self.reader.read(RECEIVE_BYTES))
        except TimeoutError as error:
            raise httpx.ReadTimeout("the response did not arrive in time", request=request) from error
        except OSError as error:
            raise httpx.ReadError(f"the connection broke: {failure or error}", request=request) from error
        reader.keeps_alive = reader.keeps_alive and failure is None
        return reader

    def close(self) -> None:
        """Close the connection without waiting."""
        if not self.writer.is_closing():
            self.writer.transport.abort()


def _loop_time(end: float | None) -> float | None:
    """Convert a time on the clock `time.monotonic` to the clock of the event loop."""
    return None if end is None else asyncio.get_running_loop().time() + end - time.monotonic()


class AsyncSocketTransport(httpx.AsyncBaseTransport):
    """A transport of httpx over asyncio's streams. Its arguments are those of `SocketTransport`."""

    def __init__(self, ssl_context: ssl.SSLContext | None = None, max_connections: int = MAX_CONNECTIONS) -> None:
        self._ssl_context = ssl_context
        self._slots = asyncio.Semaphore(max_connections)
        self._idle: dict[Origin, deque[AsyncConnection]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send `request` and return the response, whose body has been read."""
        origin, head, body = origin_of(request), request_head(request), await request.aread()
        try:
            async with asyncio.timeout_at(_loop_time(_end_of(request, "pool"))):
                await self._slots.acquire()
        except TimeoutError as error:
            raise httpx.PoolTimeout("all connections of the client are in use", request=request) from error
        try:
            connection = await self._connection(origin, request)
            try:
                reader = await connection.exchange(request, head, body)
            except BaseException:
                connection.close()
                raise
        finally:
            self._slots.release()
        if reader.keeps_alive:
            connection.idle_since = time.monotonic()
            self._idle.setdefault(origin, deque()).append(connection)
        else:
            connection.close()
        return response_of(reader, request)

    async def _connection(self, origin: Origin, request: httpx.Request) -> AsyncConnection:
        """Return an idle connection that the server has not closed, or a new connection."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if connection.is_usable():
                return connection
            connection.close()
        return await self.connect(origin, request)

    async def connect(self, origin: Origin, request: httpx.Request) -> AsyncConnection:
        """Return a new connection, which the caller closes. Raises the errors of `SocketTransport.connect`."""
        context: ssl.SSLContext | None = None
        if origin.is_tls:
            context = self._ssl_context or ssl.create_default_context()
        try:
            async with asyncio.timeout_at(_loop_time(_end_of(request, "connect"))):
                streams = await asyncio.open_connection(origin.host, origin.port, ssl=context, limit=RECEIVE_BYTES)
        except TimeoutError as error:
            message = f"{origin.host}:{origin.port} did not respond in time"
            raise httpx.ConnectTimeout(message, request=request) from error
        except OSError as error:
            raise httpx.ConnectError(str(error), request=request) from error
        return AsyncConnection(*streams)

    async def aclose(self) -> None:
        """Close all idle connections."""
        for connections in self._idle.values():
            while connections:
                connections.pop().close()
