"""One process that serves the application with uvicorn, and stops without losing a request."""

import asyncio
import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from models.errors import ElboError
from service.app import create_app
from service.endpoints.context import ServiceContext
from service.freed_memory import unmap_large_blocks
from service.http.protocol import CONNECTION_CLOSE, close_slow
from service.http.turns import Turns
from service.inference.trial import TrialClient
from service.monitoring import logs
from service.server import fd_passing
from service.server.connections import ConnectionLimit, OpeningConnections, connection_limit
from service.server.hangup import Hangup
from service.server.tls import Certificate
from service.settings import Settings
from service.shared_memory import SharedCounters, SharedNumber

log = logging.getLogger("elbo.service")
SWITCH_INTERVAL = 0.0005  # in seconds; Python's default, 0.005, lets the event loop delay the inference thread
CERTIFICATE_TICKS = 20  # number of ticks between two checks for a renewed certificate
TLS_CLOSE_SECONDS = 1.0  # time limit for the client to confirm the end of a TLS connection; few clients do
TICK_SECONDS = 0.1  # interval between two checks for slow clients
MODELS = ("models_served",)  # key under which a worker counts the models that it serves; no metric may have this name
PAUSE_SECONDS = 0.02  # pause if no file is left for another connection
MAX_CHECKED = 1000  # connections at which one tick looks for slow clients
MAX_ACCEPTED = 64  # connections that one pass of the event loop accepts
LINGER_SECONDS = 0.5  # when the server stops, open connections stay open for this time for one more request


class NoModels(ElboError):
    """A worker that replaces another one has found no model."""

    code = "no_models"


class Server(uvicorn.Server):
    """Serves the connections of a listening socket, or those that the supervisor sends.

    The server stops in three steps. First it drains: it still serves requests, but /readyz responds with 503, and every
    response has the header `Connection: close`. Then the server accepts no new connections. Finally it ends, when no
    request is in progress.

    Without a supervisor, SIGTERM or SIGINT starts draining. With a supervisor, signals are ignored. The DRAIN message
    from the supervisor starts draining, and the end of the supervisor's stream stops the server.

    Args:
        config: the configuration of uvicorn.
        service: the service, whose `draining` is set when the server begins to drain.
        control: the socket to the supervisor; None without a supervisor.
        counters: the counters of all workers.
        closed_connections: the shared number of closed connections, which the supervisor reads.
        certificate: the certificate of an HTTPS server; None for HTTP.
        turns: in these turns, the server accepts connections during a long pass of the event loop.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: ServiceContext,
        control: socket.socket | None,
        counters: SharedCounters,
        closed_connections: SharedNumber,
        certificate: Certificate | None,
        turns: Turns,
    ) -> None:
        super().__init__(config)
        self.server_state.connections = _Connections(closed_connections, service.metrics.open_connections)
        self._limit = ConnectionLimit(connection_limit(service.settings.max_connections), self.server_state.connections)
        self._closing_excess: asyncio.TimerHandle | None = None  # the next time at which connections are closed
        self._resuming: asyncio.TimerHandle | None = None  # the end of a pause in which no connection is accepted
        self._turns = turns
        self._unchecked: list[Any] = []  # connections at which `_close_slow` has yet to look
        self._service = service
        self._control = control
        self._certificate = certificate
        self._counters = counters
        self._models = counters.local.array(MODELS, length=1, transient=True)
        self._hangup = Hangup()
        self._reloading: asyncio.Task[None] | None = None  # the event loop keeps no reference to a task
        self._signalled = False
        tls_options = _tls_options(certificate, service.settings.request_timeout) if certificate else {}
        self._callbacks: list[Callable[[], object]] = []  # that take turns with the reads of a long pass
        self._opening = OpeningConnections(self._create_protocol, self._count_failed, tls_options)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the models. Then listen, or, under a supervisor, report that this worker is ready.

        This class accepts connections itself: without a free file, uvloop would reset them, or stop listening for ever.
        """
        await super().startup([])
        loop = asyncio.get_running_loop()
        # Exclude the objects that exist now from garbage collection: visiting them would pause all requests for 0.1 s.
        gc.freeze()
        if self._control:
            self._require_models()
            self._control.setblocking(False)
            self._control.send(fd_passing.READY)
            loop.add_reader(self._control, self._receive, self._control)
            self._take_turns(partial(self._receive, self._control))
        elif threading.current_thread() is threading.main_thread():
            self._hangup.handle(lambda: loop.call_soon_threadsafe(self._on_hangup))
        for listener in sockets or []:
            listener.setblocking(False)
            listener.listen(fd_passing.BACKLOG)
            loop.add_reader(listener, self._accept, listener)
            self._take_turns(partial(self._accept_in_turn, listener))
            log.info("listening on %s", fd_passing.url_of(listener, self._certificate is not None))

    def _take_turns(self, callback: Callable[[], object]) -> None:
        self._callbacks.append(callback)
        self._turns.work.append(callback)

    async def on_tick(self, counter: int) -> bool:
        """Do the work that uvicorn repeats ten times per second."""
        should_exit = await super().on_tick(counter)
        if self._certificate and counter % CERTIFICATE_TICKS == 0:
            self._certificate.refresh()
        if self._service.draining:
            self._drain()
        self._close_slow()
        self._models[0] = float(len(self._service.registry.catalogue.models))
        return should_exit

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        """Begin to drain at the first signal. Stop draining at the second.

        If the third or a later signal is SIGINT, drop the requests that are in progress.
        """
        if self._control:
            return
        drain_seconds = self._service.settings.drain_seconds
        if self._signalled or not self.started or not drain_seconds:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True
        else:
            loop = asyncio.get_running_loop()
            loop.call_later(drain_seconds, self._exit)
            loop.call_soon_threadsafe(self._drain)  # not at once: a signal may interrupt any code
        self._signalled = True
        self._service.draining = True
        fields = {"signal": signal.Signals(sig).name, "drain_seconds": drain_seconds}
        log.info("stopping", extra={"fields": fields})

    def _require_models(self) -> None:
        """Raise NoModels if this worker has loaded no model and other workers serve models.

        The artifact folder has then been removed since they started, or cannot be read. The supervisor starts this
        worker again later, and until then the other workers serve all requests.
        """
        models = len(self._service.registry.catalogue.models)
        others = sum(array[0] for arrays in self._counters.arrays(MODELS[0]).values() for array in arrays)
        self._models[0] = float(models)
        if others and not models:
            failures = "; ".join(map(str, self._service.registry.catalogue.failures)) or "it has no models"
            folder = self._service.settings.artifact_folder
            raise NoModels(
                f"the other workers serve models, but this worker found none in {folder}: "
                f"{failures}; restore the artifact folder"
            )

    def _on_hangup(self) -> None:
        """Reload, or begin to stop if the terminal has closed."""
        if self._hangup.terminal_has_closed():
            self.handle_exit(signal.SIGHUP, None)
            return
        log.info("reloading", extra={"fields": {"signal": signal.SIGHUP.name}})
        self._reload()

    def _reload(self) -> None:
        if self._certificate:
            self._certificate.refresh()
        self._reloading = asyncio.get_running_loop().create_task(self._service.reload())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept the connections that have arrived, close the listener, and serve requests on open connections."""
        self._drain()
        self._turns.stop(*self._callbacks)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + LINGER_SECONDS
        closing = loop.create_task(self._keep_closing(deadline))  # uvicorn no longer calls `on_tick`
        for listener in sockets or []:
            fd_passing.stop_new_connections(listener)
        if sockets:
            await asyncio.sleep(fd_passing.HANDSHAKE_SECONDS)
        for listener in sockets or []:
            if self._resuming:
                self._resuming.cancel()
            loop.remove_reader(listener)
            for connection in fd_passing.accept_pending(listener):
                self._opening.open(connection)
        await self._opening.wait()
        while self.server_state.connections and not self.force_exit and loop.time() < deadline:
            await asyncio.sleep(0.01)
        try:
            await super().shutdown(sockets)
        finally:
            closing.cancel()

    def _drain(self) -> None:
        """Announce on every connection that it closes after its response."""
        self._service.draining = True
        if CONNECTION_CLOSE not in self.server_state.default_headers:
            self.server_state.default_headers = [*self.server_state.default_headers, CONNECTION_CLOSE]
        connections: list[Any] = list(self.server_state.connections)
        for connection in connections:
            connection.announce_close()

    def _close_slow(self) -> None:
        """Look at the next MAX_CHECKED connections. With 6,000 of them, looking at all took an eighth of a core."""
        open_connections = self.server_state.connections
        if not self._unchecked:
            self._unchecked = list(open_connections)
        checked, self._unchecked = self._unchecked[:MAX_CHECKED], self._unchecked[MAX_CHECKED:]
        checked = [connection for connection in checked if connection in open_connections]
        close_slow(checked, self._service.settings.request_timeout)

    async def _keep_closing(self, deadline: float) -> None:
        """Close slow connections, and after `deadline`, on the clock of the event loop, idle connections too."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._close_slow()
            if asyncio.get_running_loop().time() > deadline:
                for connection in list(self.server_state.connections):
                    connection.shutdown()

    def _exit(self) -> None:
        self.should_exit = True

    def _receive(self, control: socket.socket) -> None:
        """Handle what the supervisor has sent."""
        received = fd_passing.receive(control)
        if received is None:
            asyncio.get_running_loop().remove_reader(control)
            self._exit()
            return
        for connection in received.connections:
            self._opening.open(connection)
        self._close_excess()
        if received.lost:
            self._limit.report("connections were lost because the worker has too many open files")
            self.server_state.connections.count_closed(received.lost)  # type: ignore[attr-defined] # `_Connections`
        if shed := received.messages.count(fd_passing.SHED):
            open_connections: list[Any] = list(self.server_state.connections)
            for protocol in open_connections[:shed]:
                protocol.close_after_response()
        if fd_passing.DRAIN in received.messages:
            self._drain()
        if fd_passing.RELOAD in received.messages:
            self._reload()

    def _close_excess(self) -> None:
        """Close connections above the limit, now or as soon as they wait for their clients.

        The supervisor passes a few connections above the limit: it cannot know which others can be closed.
        """
        if self._closing_excess:
            self._closing_excess.cancel()
            self._closing_excess = None
        if not self._limit.has_room(len(self._opening)):
            self._close_waiting()
            self._closing_excess = asyncio.get_running_loop().call_later(PAUSE_SECONDS, self._close_excess)

    def _close_waiting(self) -> bool:
        """Close connections that wait for their clients. If there are none, cancel the oldest slow TLS handshake.

        Return whether a connection was closed.
        """
        return bool(self._limit.close_waiting()) or self._opening.cancel_slow()

    def _accept(self, listener: socket.socket) -> None:
        """Accept connections. To make room for them, close connections that wait for their clients."""
        for _ in range(MAX_ACCEPTED):
            if not self._limit.has_room(len(self._opening)) and not self._close_waiting():
                self._pause(listener)
                return
            try:
                connection = fd_passing.accept(listener)
            except OSError as error:
                self._limit.report(f"the server cannot accept connections ({error.strerror})")
                self._close_waiting()
                self._pause(listener)
                return
            if connection is None:
                return
            self._opening.open(connection)

    def _pause(self, listener: socket.socket) -> None:
        """Leave connections in the backlog for a moment."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(listener)
        if self._resuming:
            self._resuming.cancel()
        self._resuming = loop.call_later(PAUSE_SECONDS, self._resume, listener)

    def _resume(self, listener: socket.socket) -> None:
        self._resuming = None
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _accept_in_turn(self, listener: socket.socket) -> None:
        """Accept connections during a long pass of the event loop, so that the kernel's queue of them does not fill up.

        If it is full, the kernel drops packets, and the client sends them again only after 1, 3 and 7 s.
        """
        # `_accept` may close connections to make room, so some connection must wait for the room.
        if not self._resuming and fd_passing.has_pending(listener):
            self._accept(listener)

    def _count_failed(self) -> None:
        self.server_state.connections.count_closed()  # type: ignore[attr-defined] # `_Connections`, set in __init__

    def _create_protocol(self) -> asyncio.Protocol:
        protocol_class: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = protocol_class(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol


def _tls_options(certificate: Certificate, seconds: float) -> dict[str, Any]:
    """Return the arguments with which the event loop opens a TLS connection.

    Args:
        certificate: the certificate of the server.
        seconds: time limit for the handshake.
    """
    return {
        "ssl": certificate.context,
        "ssl_handshake_timeout": seconds,
        "ssl_shutdown_timeout": min(seconds, TLS_CLOSE_SECONDS),
    }


class _Connections(set[Any]):
    """uvicorn's set of open connections. It also counts closed connections, so that the supervisor knows the load.

    Args:
        closed: the shared number of closed connections.
        exported: array for the metrics; its element 0 holds the number of open connections.
    """

    def __init__(self, closed: SharedNumber, exported: SharedNumber) -> None:
        super().__init__()
        self._closed = closed
        self._exported = exported

    def add(self, connection: Any) -> None:
        """Add a connection that is open."""
        super().add(connection)
        self._exported[0] = len(self)

    def discard(self, connection: Any) -> None:
        """Remove a connection that is closed."""
        if connection in self:
            self.count_closed()
        super().discard(connection)
        self._exported[0] = len(self)

    def count_closed(self, number: int = 1) -> None:
        """Count closed connections. Call it directly only for connections that uvicorn never added to the set."""
        self._closed[0] += number


def run_worker(
    settings: Settings,
    listener: socket.socket | None = None,
    control: socket.socket | None = None,
    counters: SharedCounters | None = None,
    trials: TrialClient | None = None,
    temporary_folder: Path | None = None,
) -> None:
    """Serve until the server is stopped. Raises ElboError if the device is not available.

    Args:
        settings: the settings of the server.
        listener: the bound socket of a server with one process. The server stops on SIGTERM or SIGINT.
        control: the socket to the supervisor; None without one. The worker stops when the supervisor ends the stream.
        counters: the counters of all workers; by default, the counters of this process alone.
        trials: tries artifacts out in another process before this one loads them.
        temporary_folder: see `create_app`.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    unmap_large_blocks()
    counters = counters or SharedCounters()
    app = create_app(settings, counters, trials, temporary_folder)
    service: ServiceContext = app.state.service
    logs.count_lost_lines(service.metrics.lost_log_lines)
    entry_point: Any = app.middleware_stack  # `app` itself would look for OpenTelemetry on every request
    certificate = Certificate(settings.tls_certificate, settings.tls_key) if settings.tls_certificate else None
    config = uvicorn.Config(
        entry_point,
        loop="uvloop",
        log_config=None,
        access_log=False,
        server_header=False,
        http=app.state.protocol,
        timeout_keep_alive=settings.keep_alive_seconds,  # type: ignore[arg-type] # uvicorn passes it to `call_later`
    )
    log.info("loading the models in %s", settings.repository or settings.artifacts)
    closed_connections = counters.local.array(fd_passing.CLOSED_CONNECTIONS, length=1, transient=True)
    Server(config, service, control, counters, closed_connections, certificate, app.state.turns).run(
        [listener] if listener else []
    )
