"""From settings to a server: the address bound, then one process that serves, or several and one that watches them."""

import resource
import socket

from models.errors import ElboError
from service.monitoring import logs
from service.settings import Settings


class ServeError(ElboError):
    """The server cannot start."""

    code = "serve_error"


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises ElboError if the address or the device cannot be had."""
    logs.configure(settings.log_level, settings.log_format)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is an open file, and 1,024 are soon had
    with _bind(settings.host, settings.port) as listener:
        if settings.workers > 1:
            from service.server.supervisor import Supervisor

            Supervisor(settings, listener).run()
        else:
            from service.server.worker import work

            work(settings, listener=listener)


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: until the models are loaded, clients are refused and may try again."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
        listener.bind(address)
    except OSError as error:
        raise ServeError(
            f"cannot listen on {host} port {port} ({error.strerror}): stop what uses it, or choose another ELBO_PORT"
        ) from error
    return listener
