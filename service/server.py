"""Runs the application under uvicorn until it is told to stop, and loses no request when it stops."""

import asyncio
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn

from models.errors import ElboError
from service import logs
from service.api import Service
from service.app import create_app
from service.settings import Settings

log = logging.getLogger("elbo.service")
SWITCH_INTERVAL = 0.0005  # seconds; at Python's 5 ms the inference thread would wait for the event loop's bytecode


class ServeError(ElboError):
    """The server cannot start."""

    code = "serve_error"


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT: not ready at once, serving on for a while, then no new connections, then exit 0."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._stopping = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the models, then listen, then say so."""
        await super().startup(sockets)
        for listener in (sockets or []) if self.started else []:
            host, port = listener.getsockname()[:2]
            log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        """The signals' handler. The second signal ends the wait, the third SIGINT the requests too."""
        drain = self._service.settings.drain_seconds
        if self._stopping or not self.started or not drain:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True
        else:
            asyncio.get_running_loop().call_later(drain, self._stop)
        self._stopping = True
        self._service.draining = True
        log.info("stopping", extra={"fields": {"signal": signal.Signals(sig).name, "drain_seconds": drain}})

    def _stop(self) -> None:
        self.should_exit = True


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises ElboError if the address or the device cannot be had."""
    logs.configure(settings.log_level, settings.log_format)
    sys.setswitchinterval(SWITCH_INTERVAL)
    app = create_app(settings)
    config = uvicorn.Config(
        app, loop="uvloop", http="httptools", log_config=None, access_log=False, server_header=False
    )
    listener = _bind(settings.host, settings.port)
    with listener:
        log.info("loading the models in %s", settings.artifacts)
        Server(config, app.state.service).run([listener])


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: until the models are loaded, clients are refused and may try again."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ServeError(
            f"cannot listen on {host} port {port} ({error.strerror}): stop what uses it, or choose another ELBO_PORT"
        ) from error
    return listener
