"""One process that serves: the application under uvicorn until it is told to stop, without losing a request."""

import asyncio
import gc
import logging
import signal
import socket
import sys
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from service.app import create_app
from service.endpoints.context import ServiceContext
from service.http.protocol import LAST, Protocol, close_slow
from service.server import fd_passing as channels
from service.settings import Settings
from service.shared_memory import SharedCounters, SharedNumber

log = logging.getLogger("elbo.service")
SWITCH_INTERVAL = 0.0005  # seconds; at Python's 5 ms the inference thread would wait for the event loop's bytecode
LINGER = 0.5  # seconds in which clients may send one more request on connections that are open when all ends


class Server(uvicorn.Server):
    """Serves what arrives at a listening socket, or by a channel from the supervisor.

    On SIGTERM or SIGINT, or at the supervisor's word: not ready at once, serving on for a while, then no new
    connections, then the end. A client that keeps its connection is told by the answer that it was the last.
    """

    def __init__(
        self, config: uvicorn.Config, service: ServiceContext, channel: socket.socket | None, closed: SharedNumber
    ) -> None:
        super().__init__(config)
        self.server_state.connections = _Connections(closed)
        self._service = service
        self._channel = channel
        self._stopping = False
        self._arriving: set[asyncio.Task[Any]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the models, then listen, then say so."""
        await super().startup(sockets)
        gc.freeze()  # what is there by now stays: to look through it again would stop every request for 0.1 s
        if self._channel:
            self._channel.setblocking(False)
            self._channel.send(channels.READY)
            asyncio.get_running_loop().add_reader(self._channel, self._hear, self._channel)
        for listener in sockets or []:
            log.info("listening on %s", channels.announce(listener))

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        end = await super().on_tick(counter)
        if self._service.draining:
            self._drain()
        close_slow(self.server_state.connections, self._service.settings.request_timeout)
        return end

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        """The signals' handler. The second signal ends the wait, the third SIGINT the requests too."""
        if self._channel:
            return
        drain = self._service.settings.drain_seconds
        if self._stopping or not self.started or not drain:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True
        else:
            asyncio.get_running_loop().call_later(drain, self._stop)
        self._stopping = True
        self._drain()
        log.info("stopping", extra={"fields": {"signal": signal.Signals(sig).name, "drain_seconds": drain}})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept what has come by now and nothing more; answer what is under way and what comes on open connections."""
        self._drain()
        for listener in sockets or []:
            listener.setblocking(False)
            for connection in channels.waiting(listener):
                self._adopt(connection)
        for server in self.servers:
            server.close()
        if self._arriving:
            await asyncio.wait(self._arriving)
        end = asyncio.get_running_loop().time() + LINGER
        while self.server_state.connections and not self.force_exit and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.01)
        await super().shutdown(sockets)

    def _drain(self) -> None:
        self._service.draining = True
        if LAST not in self.server_state.default_headers:
            self.server_state.default_headers = [*self.server_state.default_headers, LAST]

    def _stop(self) -> None:
        self.should_exit = True

    def _hear(self, channel: socket.socket) -> None:
        """What the supervisor sends: connections, and that the end begins. With the stream's end it is there."""
        heard = channels.received(channel)
        if heard is None:
            asyncio.get_running_loop().remove_reader(channel)
            self._stop()
            return
        letters, connections = heard
        for connection in connections:
            self._adopt(connection)
        if channels.DRAIN in letters:
            self._drain()

    def _adopt(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        task = loop.create_task(loop.connect_accepted_socket(self._protocol, connection))
        self._arriving.add(task)
        task.add_done_callback(self._arrived)

    def _arrived(self, task: "asyncio.Task[Any]") -> None:
        self._arriving.discard(task)
        if not task.cancelled() and task.exception():  # its client has left meanwhile
            self.server_state.connections.never_was()  # type: ignore[attr-defined] # ours, not uvicorn's

    def _protocol(self) -> asyncio.Protocol:
        kind: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = kind(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol


class _Connections(set[Any]):
    """uvicorn's open connections; counts those that are closed, so that the supervisor knows how many are left."""

    def __init__(self, closed: SharedNumber) -> None:
        super().__init__()
        self._closed = closed

    def discard(self, connection: Any) -> None:
        """It is closed."""
        if connection in self:
            self.never_was()
        super().discard(connection)

    def never_was(self) -> None:
        """It was closed before it began."""
        self._closed[0] += 1


def work(
    settings: Settings,
    listener: socket.socket | None = None,
    channel: socket.socket | None = None,
    counts: SharedCounters | None = None,
) -> None:
    """Serve what arrives at `listener` until a signal, or what comes by `channel` until its end.

    Raises ElboError if the device cannot be had.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    counts = counts or SharedCounters()
    app = create_app(settings, counts)
    entry_point: Any = app.middleware_stack  # FastAPI.__call__ itself costs 5 µs per request, for OpenTelemetry checks
    config = uvicorn.Config(
        entry_point,
        http=partial(Protocol, admission=app.state.service.admission),  # type: ignore[arg-type] # uvicorn calls it
        loop="uvloop",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    log.info("loading the models in %s", settings.artifacts)
    closed = counts.mine.numbers(channels.CLOSED, 1, passing=True)
    Server(config, app.state.service, channel, closed).run([listener] if listener else [])
