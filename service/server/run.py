"""Bind the address and serve: in this process, or in several workers under a supervisor."""

import gc
import importlib
import ipaddress
import logging
import os
import resource
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import gettempdir

from models.errors import ElboError
from models.staging import staging_folder
from service.monitoring import logs
from service.monitoring.tracing import tracer_of
from service.platforms import PLATFORM_NAMES
from service.server import standard_streams, torch_start
from service.server.hangup import Hangup
from service.server.tls import Certificate
from service.settings import Settings

STATE_PREFIX = "elbo-state-"

log = logging.getLogger("elbo.service")


class ServeError(ElboError):
    """The server cannot start."""

    code = "serve_error"


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ElboError: the address or the device is not available, or the artifact folder is a file.
    """
    standard_streams.reserve()
    Hangup.handle(lambda: None)  # until the server can reload, SIGHUP does nothing
    logs.configure(settings.log_level, settings.log_format)
    logs.redirect_streams()
    for name, value in settings.ignored_variables().items():
        log.warning(
            "ignored %s=%s, which Kubernetes sets for a Service named elbo: the default is used; set "
            "enableServiceLinks: false in the pod, or give the variable a value in the container",
            name,
            value,
        )
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))  # every connection is an open file
    forbid_core_dumps(settings)
    if settings.tls_certificate:
        Certificate(settings.tls_certificate, settings.tls_key)  # reports an error before the models are loaded
    tracer_of(os.environ, lambda _outcome, _spans: None)  # reports an error before the models are loaded
    require_folder(settings.artifact_folder)
    with bind(settings.host, settings.port) as listener:
        require_keys_if_public(listener, settings)
        with without_collection():
            with torch_start.loading_libraries():
                importlib.import_module("fastapi")  # needs no torch
                torch_start.defer_modules()
            from service.server.trials import start_trials
        trials = start_trials(settings)  # before torch starts threads, here or in a worker
        with without_collection():
            from service.server.worker import run_worker  # the first trial runs meanwhile
        with temporary_folder(settings) as folder:
            if settings.workers > 1:
                from service.server.supervisor import Supervisor

                Supervisor(settings, listener, trials, folder).run()
            else:
                run_worker(settings, listener=listener, trials=trials, temporary_folder=folder)


def forbid_core_dumps(settings: Settings) -> None:
    """Let this process write no core dump if requests have API keys, because a dump would contain them."""
    if settings.api_keys_file:
        _, hard_limit = resource.getrlimit(resource.RLIMIT_CORE)
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard_limit))


@contextmanager
def without_collection() -> Iterator[None]:
    """Import modules in the block without garbage collection, which would take a tenth of the time of the start.

    The objects that exist at the end of the block are never visited by a collection: they stay until the process ends.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def temporary_folder(settings: Settings) -> Iterator[Path | None]:
    """Yield a folder that all workers share if ELBO_STATE is not set, and remove it at the end of the block.

    Before that, remove the folders that killed servers have left.

    Yield None if ELBO_STATE is set, or if no folder can be created: most models need none.
    """
    with ExitStack() as stack:
        folder = None
        if settings.state is None:
            with suppress(OSError):
                folder = stack.enter_context(staging_folder(Path(gettempdir()), STATE_PREFIX, mode=0o700))
        yield folder


def require_folder(path: Path) -> None:
    """Raise ServeError if `path` is a file or is below a file. It need not exist yet, because models may come later."""
    for part in (path, *path.parents):
        try:
            is_folder = stat.S_ISDIR(part.stat().st_mode)
        except OSError:  # absent, or not readable: the scans of the folder report it
            continue
        if not is_folder:
            hint = ", which contains NAME/VERSION/model.pt" if part.suffix == ".pt" else ""
            raise ServeError(
                f"{part} is not a folder: give the artifact folder{hint}, with --artifacts or ELBO_ARTIFACTS"
            )


def require_keys_if_public(listener: socket.socket, settings: Settings) -> None:
    """Raise ServeError if other machines can reach `listener`, and the server has neither keys nor ELBO_INSECURE."""
    if listener.family == socket.AF_UNIX or settings.api_keys_file:
        return
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])  # without the zone of an IPv6 address
    if (getattr(address, "ipv4_mapped", None) or address).is_loopback:
        return
    if not settings.insecure:
        raise ServeError(
            f"without API keys, the server does not listen on {address}, which other machines can reach: make a key "
            "with elbo key add NAME --scope infer and set ELBO_API_KEYS_FILE, or listen on 127.0.0.1 (ELBO_HOST), or, "
            "if everybody who can reach the address may use the server, add --insecure (ELBO_INSECURE=1)"
        )
    reason = "ELBO_INSECURE"
    if settings.platform in PLATFORM_NAMES and not os.environ.get("ELBO_INSECURE"):
        reason = (
            f"{PLATFORM_NAMES[settings.platform]} was recognised, and decides who can reach the server; to require "
            "keys, set ELBO_INSECURE=0 and ELBO_API_KEYS_FILE"
        )
    log.warning("everybody who can reach %s can use the server, because it has no API keys (%s)", address, reason)


def bind(host: str, port: int) -> socket.socket:
    """Return a bound TCP socket that does not listen yet.

    The socket listens once the models are loaded. Until then the kernel refuses connections, and clients retry.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted connections inherit this option
        listener.bind(address)
    except OSError as error:
        raise ServeError(
            f"cannot listen on {host} port {port} ({error.strerror}): stop the program that uses the port, or choose "
            "another address with ELBO_HOST and ELBO_PORT"
        ) from error
    return listener
