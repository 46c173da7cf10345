"""The trial process: it tries artifacts out, one after another, before a worker loads them.

The trial process is forked from the server before torch has started threads, so that it can fork a child for each
artifact in milliseconds. The child loads the artifact and runs every operation, within limits (`models.trial`). If an
artifact reaches a limit, only the child ends.

All workers share the trial process. A worker sends the path and the digest of an artifact, and a pipe for the answer.
An artifact with a digest that has passed is not tried again until the trial process ends.

A process between the server and the trial process, the keeper, starts the trial process again if it is killed. The
server cannot fork it itself, because its threads could hold locks at the time of the fork. Requests that wait in the
socket are answered by the new trial process. The artifact that was being tried out is tried again at the next poll.

If both processes are killed, each worker that needs them starts a keeper of its own. It runs the program anew, which
takes seconds, but is safe for a process with threads.
"""

import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from time import monotonic, sleep
from typing import Any, NoReturn

from models.errors import ArtifactCorrupt, ArtifactError, ArtifactUnreadable
from models.manifest import read_digest, read_sealed
from models.trial import (
    MAX_VERDICT_BYTES,
    POLL_SECONDS,
    TrialLimits,
    TrialStopped,
    Verdict,
    close_files,
    fork,
    name_process,
    open_verdict,
    run_trial,
)

log = logging.getLogger("elbo.registry")
KEEPER_PROCESS_NAME = "elbo-trial"
TRIAL_PROCESS_NAME = "elbo-trial-run"
RESTART_SECONDS = (0.1, 10.0)  # pauses before the trial process is started again: the first, and the longest
START_SECONDS = 10.0  # shortest time between two starts of a new keeper by one worker
LATE_IMPORTS = (
    "encodings.cp437",
    "encodings.idna",
    "numpy.random",
    "onnxruntime",
    "PIL.PngImagePlugin",
)  # imported before the fork, because a trial cannot import
MAX_REQUEST_BYTES = 16_384
Work = Callable[[bytes, Path], Verdict]


class TrialClient:
    """Asks the trial process to try artifacts out. Several threads and processes may use it.

    Args:
        connection: the socket to the trial process.
        start_keeper: starts a new keeper and trial process, and returns the socket to them; None if that is impossible.
    """

    def __init__(self, connection: socket.socket, start_keeper: Callable[[], socket.socket] | None = None) -> None:
        self._connection = connection
        self._start_keeper = start_keeper
        self._next_start = 0.0  # on the `monotonic` clock
        self._lock = Lock()  # for the two attributes that change at a start
        self.is_stopped: Callable[[], bool] = lambda: False  # the server sets this, so that it can end during a trial

    def close(self) -> None:
        """Close this process's end of the connection. The trial process ends when no process has this end open."""
        self._connection.close()

    def try_out(self, path: Path, digest: str | None = None) -> Verdict:
        """Try the artifact at `path` out.

        Args:
            path: the artifact.
            digest: the digest that the file must have; by default, the one that it claims.

        Returns:
            A verdict with two entries: `digest` is the digest of the file that was tried out; `rows` is the size of the
            largest batch that fit in memory, or None if batches of all sizes did.

        Raises:
            ArtifactError: why the artifact was refused.
        """
        digest = digest or read_digest(path)
        reader, writer = os.pipe()
        try:
            try:
                self._send(_request(path, digest), writer)
            except OSError as error:
                raise ArtifactUnreadable(
                    f"{path} was not loaded: the process that tries artifacts out has ended and cannot be started "
                    f"again ({error.strerror}): it is started at a later poll"
                ) from error
            finally:
                os.close(writer)
            answer = self._wait(reader, path)
            if not answer:
                raise ArtifactUnreadable(
                    f"{path} was not loaded: the process that tries artifacts out was killed during the trial; the "
                    "artifact is tried again at the next poll"
                )
            return open_verdict(answer, path)
        finally:
            os.close(reader)

    def begin(self, path: Path, digest: str | None = None) -> None:
        """Let the trial process try out the artifact at `path` now, so that a later `try_out` gets the verdict at once.

        This method raises no errors, because `try_out` reports them all. See `try_out` for the arguments.
        """
        reader, writer = os.pipe()
        os.close(reader)  # the trial process keeps the verdict, so nobody has to read it here
        with suppress(OSError, ArtifactError):
            request = _request(path, digest or read_digest(path), is_early=True)
            socket.send_fds(self._connection, [request], [writer])
        os.close(writer)

    def _send(self, request: bytes, writer: int) -> None:
        """Send a request to the trial process. If this and the keeper have been killed, start new ones. Raises OSError.

        Args:
            request: the request, as JSON.
            writer: descriptor of the pipe for the answer.
        """
        with self._lock:
            try:
                socket.send_fds(self._connection, [request], [writer])
            except OSError:
                if self._start_keeper is None or monotonic() < self._next_start:
                    raise
                log.warning("the processes that try artifacts out have been killed: starting new ones")
                self._next_start = monotonic() + START_SECONDS
                connection = self._start_keeper()
                self._connection.close()
                self._connection = connection
                socket.send_fds(connection, [request], [writer])

    def _wait(self, reader: int, path: Path) -> bytes:
        answer = b""
        while True:
            if select.select([reader], [], [], POLL_SECONDS)[0]:
                part = os.read(reader, MAX_VERDICT_BYTES)
                if not part:
                    return answer
                answer += part
            elif self.is_stopped():
                raise TrialStopped(f"{path} was not loaded, because the server stops")


def _request(path: Path, digest: str, is_early: bool = False) -> bytes:
    return json.dumps({"path": str(path), "digest": digest, "is_early": is_early}).encode()


def start_trial_process(work: Work, limits: TrialLimits, start_keeper: Callable[[], socket.socket]) -> TrialClient:
    """Fork the keeper, which starts the trial process. Call this before torch has started threads.

    Args:
        work: tries an artifact out, given its bytes and its path.
        limits: the limits of each trial.
        start_keeper: see `TrialClient`.
    """
    import_early()
    client, server = connected_sockets()
    if fork() == 0:
        client.close()
        keep_and_exit(server, work, limits)
    server.close()
    return TrialClient(client, start_keeper)


def import_early() -> None:
    """Import what a trial needs and cannot import."""
    for module in LATE_IMPORTS:
        importlib.import_module(module)


def connected_sockets() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a new connection: the end of the server, and the end of the trial process."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def keep_and_exit(server: socket.socket, work: Work, limits: TrialLimits) -> NoReturn:
    """Run the trial process, and start it again if it is killed.

    Stop when no process of the server has its end of the connection open. `server` is the end of the trial process.
    """
    try:
        logging.disable(logging.CRITICAL)  # the thread that writes the log does not run in this process
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # the server decides when to end
        close_files(server.fileno())
        name_process(KEEPER_PROCESS_NAME)
        gc.freeze()  # a garbage collection in a child would copy the memory that it shares
        first_pause, longest_pause = RESTART_SECONDS
        pause = first_pause
        while not _is_closed(server):
            started = monotonic()
            pid = fork()
            if pid == 0:
                _serve_and_exit(server, work, limits)
            os.waitpid(pid, 0)
            pause = first_pause if monotonic() - started > longest_pause else min(2 * pause, longest_pause)
            if not _is_closed(server):
                sleep(pause)
    finally:
        os._exit(0)


def _serve_and_exit(server: socket.socket, work: Work, limits: TrialLimits) -> NoReturn:
    """Try artifacts out until no process of the server has its end of the connection open."""
    try:
        name_process(TRIAL_PROCESS_NAME)
        verdicts: dict[str, Verdict] = {}
        while True:
            request, descriptors, _, _ = socket.recv_fds(server, MAX_REQUEST_BYTES, 1)
            if not request:
                break
            for descriptor in descriptors:
                _answer(json.loads(request), descriptor, server, work, limits, verdicts)
    finally:
        os._exit(0)


def _answer(
    request: dict[str, Any], descriptor: int, server: socket.socket, work: Work, limits: TrialLimits,
    verdicts: dict[str, Verdict],
) -> None:  # fmt: skip
    """Try one artifact out, and write the verdict to `descriptor`.

    Args:
        request: the path and digest of the artifact, and whether another request for the verdict follows.
        descriptor: the pipe for the answer.
        server: the socket to the server.
        work: see `start_trial_process`.
        limits: the limits of the trial.
        verdicts: the verdicts that are known: by digest if the artifact passed, and by path and digest if it was
            refused. A refusal is kept only after an early request, until the request that follows it.
    """
    path, digest = Path(request["path"]), request["digest"]
    refused = f"{path} {digest}"
    verdict = verdicts.get(digest) or verdicts.pop(refused, None)
    if verdict is None:
        try:
            found = run_trial(
                path,
                lambda: _read(path, digest),
                lambda content: work(content, path),
                limits,
                lambda: _is_closed(server),
            )
            verdict = verdicts[digest] = {**found, "digest": digest}
        except ArtifactError as error:
            verdict = {"code": error.code, "detail": str(error)}
            if request["is_early"]:
                verdicts[refused] = verdict
        except OSError as error:  # such as no memory for a child: the next trial may succeed
            detail = f"{path} cannot be tried out ({error.strerror}): it is tried again at the next poll"
            verdict = {"code": ArtifactUnreadable.code, "detail": detail}
    # A worker that has been killed does not read its answer. The process goes on, because the other workers need it.
    with suppress(BrokenPipeError), os.fdopen(descriptor, "wb", buffering=0) as pipe:
        pipe.write(json.dumps(verdict).encode())


def _read(path: Path, digest: str) -> bytes:
    content = read_sealed(path)
    if not content.endswith(digest.encode()):
        raise ArtifactCorrupt(f"{path} was changed while it was loaded: it is loaded again at the next poll")
    return content


def _is_closed(server: socket.socket) -> bool:
    poll = select.poll()
    poll.register(server, 0)
    return bool(poll.poll(0))
