"""Run several worker processes at one address: start them, pass connections to them, and replace those that die.

Only the supervisor accepts connections. It passes each connection to the worker with the fewest open connections. If
the workers accepted connections themselves, the kernel would spread connections unevenly. If they did so with one
SO_REUSEPORT socket each, the connections in the queue of a killed worker would also be lost. Passing a connection takes
time once per connection, not once per request.

This module imports the code that the workers need, and the supervisor forks. A new worker therefore starts fast, shares
the memory of the imported code, and inherits the shared counters. Only the thread that writes the log runs beside the
supervisor's own thread.
"""

import gc
import logging
import os
import selectors
import signal
import socket
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from time import monotonic, sleep
from typing import NoReturn

from models.errors import ElboError, printable
from service.inference.trial import TrialClient
from service.monitoring import logs
from service.server import fd_passing
from service.server.connections import connection_limit
from service.server.hangup import Hangup
from service.server.worker import run_worker
from service.settings import Settings
from service.shared_memory import LOST_LOG_LINES, RESTARTS, Segment, SharedCounters

MIN_RETRY_SECONDS = 0.5  # first pause before replacing a worker that never became ready; each failure doubles the pause
MAX_RETRY_SECONDS = 30.0
SPARE_CONNECTIONS = 32  # connections above its limit that a worker may get while it closes others
NO_WORKER_SECONDS = 0.001  # pause if connections wait and no worker can take one
SHORTAGE_SECONDS = 0.05  # pause if no file is left for a connection that waits

log = logging.getLogger("elbo.supervisor")


class State(Enum):
    """State of the supervisor.

    STARTING -> SERVING    the first worker is ready
    STARTING -> STOPPING   the first worker has ended: it could not start, and the other workers would fail too
    STARTING -> DRAINING   first signal
    SERVING -> DRAINING    first signal
    DRAINING -> STOPPING   ELBO_DRAIN_SECONDS have passed, or second signal

    `run` returns when no worker is left: at the end of STOPPING, or during DRAINING if all workers die.
    """

    STARTING = auto()  # the first worker loads the models; the address is bound, but clients are refused
    SERVING = auto()  # connections are accepted; a worker that ends is replaced
    DRAINING = auto()  # requests are still served, but /readyz responds with 503, and no worker is replaced
    STOPPING = auto()  # no connection is accepted; the workers finish their requests and end


class WorkerState(Enum):
    """State of a worker. A worker that has ended is removed from the supervisor's table.

    LOADING -> READY       the worker reports that it is ready
    READY -> UNREACHABLE   the supervisor has failed to send a connection to the worker
    LOADING -> KILLED      the server stops before the worker is ready
    """

    LOADING = auto()
    READY = auto()
    UNREACHABLE = auto()  # the worker has ended; the supervisor will soon read the end of the worker's stream
    KILLED = auto()  # a READY message that the worker had sent may still arrive


@dataclass(eq=False)
class Worker:
    """A worker process. `index` is the number of the worker and of its segment in the shared memory."""

    index: int
    pid: int
    control: socket.socket
    closed_connections: "memoryview[float]"
    state: WorkerState = WorkerState.LOADING
    sent_connections: int = 0

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return self.sent_connections - int(self.closed_connections[0])


class Supervisor:
    """Runs the workers.

    Args:
        settings: the settings of the server.
        listener: a bound socket.
        trials: tries artifacts out in another process before a worker loads them.
        temporary_folder: see `create_app`; the workers share it.
    """

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        trials: TrialClient | None = None,
        temporary_folder: Path | None = None,
    ) -> None:
        self._settings = settings
        self._trials = trials
        self._temporary_folder = temporary_folder
        self._max_connections = connection_limit(settings.max_connections) + SPARE_CONNECTIONS  # per worker
        self._is_short_of_files = False  # whether the last `accept` failed because no file is left
        self._listener = listener
        self._state = State.STARTING
        self._workers: dict[int, Worker] = {}  # by index
        self._start_times: dict[int, float] = {}  # when to start a worker, by its index, on the `monotonic` clock
        self._retry_seconds = MIN_RETRY_SECONDS
        self._signals_received = 0
        self._hangup = Hangup()
        self._drain_deadline: float | None = None  # on the `monotonic` clock; None unless DRAINING
        self._exit_code = 0
        self._segments = [Segment() for _ in range(settings.workers + 1)]  # the last is the supervisor's
        self._restarts = self._segments[-1].array((RESTARTS,), length=1)
        logs.count_lost_lines(self._segments[-1].array((LOST_LOG_LINES,), length=1))
        self._selector = selectors.DefaultSelector()
        self._signal_reader, self._signal_writer = socket.socketpair()

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        If the first worker cannot start, exit with its exit code. If a worker dies while the server stops, exit with 1.
        """
        self._watch_signals()
        gc.freeze()  # without this, a garbage collection in a worker would write to the shared pages and so copy them
        source = self._settings.repository or self._settings.artifacts
        log.info("starting %d workers for the models in %s", self._settings.workers, source)
        # The other workers start when the first is ready: workers that load at the same time slow each other down.
        self._start_times = {0: monotonic()}
        while self._workers or self._start_times:
            self._start_due_workers()
            self._handle_events()
        if self._exit_code:
            sys.exit(self._exit_code)

    # Events. These methods make the transitions of `State` and `WorkerState`.

    def _handle_events(self) -> None:
        """Wait for the next events and handle them."""
        for key, _ in self._selector.select(self._seconds_to_next_deadline()):
            if key.fileobj is self._signal_reader:
                for number in self._signal_reader.recv(64):
                    self._on_signal(signal.Signals(number))
            elif key.fileobj is self._listener:
                self._pass_connections()
            else:
                self._on_worker_message(key.data)
        if self._drain_deadline is not None and monotonic() >= self._drain_deadline:
            self._enter_stopping()

    def _on_signal(self, received: signal.Signals) -> None:
        """Begin to drain at the first signal. Stop draining at the second.

        If the third or a later signal is SIGINT, kill the workers.
        """
        if received == signal.SIGHUP and not self._hangup.terminal_has_closed():
            self._reload()
            return
        self._signals_received += 1
        if self._state in (State.STARTING, State.SERVING):
            self._enter_draining(received)
        elif self._state is State.DRAINING:
            self._drain_deadline = monotonic()
        if self._signals_received > 2 and received == signal.SIGINT:
            for worker in self._workers.values():
                os.kill(worker.pid, signal.SIGKILL)

    def _on_worker_message(self, worker: Worker) -> None:
        """Handle a READY message or the end of the worker's stream. Workers send no other message."""
        try:
            message = worker.control.recv(64)
        except OSError:
            message = b""
        if message:
            self._on_worker_ready(worker)
        else:
            self._on_worker_end(worker)

    def _on_worker_ready(self, worker: Worker) -> None:
        log.info("worker %d is ready", worker.index, extra={"fields": {"pid": worker.pid}})
        if worker.state is WorkerState.LOADING:
            worker.state = WorkerState.READY
        self._retry_seconds = MIN_RETRY_SECONDS
        if self._state is State.STARTING:
            self._enter_serving()
        elif self._state is State.SERVING:
            self._share_connections()

    def _on_worker_end(self, worker: Worker) -> None:
        self._selector.unregister(worker.control)
        worker.control.close()
        del self._workers[worker.index]
        code = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
        lost_connections = worker.connections
        self._segments[worker.index].reset_transient()
        was_ready = worker.state in (WorkerState.READY, WorkerState.UNREACHABLE)
        if self._state is State.STARTING:
            log.error("worker %d failed to start: %s; the server stops", worker.index, _describe_exit(code))
            self._exit_code = code if code > 0 else 1
            self._enter_stopping()
        elif self._state is State.SERVING:
            self._schedule_replacement(worker, code, was_ready, lost_connections)
        elif code and was_ready:
            log.error("worker %d ended before it had finished its requests: %s", worker.index, _describe_exit(code))
            self._exit_code = self._exit_code or 1

    def _enter_serving(self) -> None:
        """Listen, and start the other workers."""
        self._state = State.SERVING
        self._listener.listen(fd_passing.BACKLOG)
        self._selector.register(self._listener, selectors.EVENT_READ)
        log.info("listening on %s", fd_passing.url_of(self._listener, self._settings.tls_certificate is not None))
        self._start_times = dict.fromkeys(range(1, self._settings.workers), monotonic())

    def _enter_draining(self, received: signal.Signals) -> None:
        """Send DRAIN to the workers. They then report that they are not ready, but still serve requests."""
        self._state = State.DRAINING
        drain_seconds = self._settings.drain_seconds
        log.info("stopping", extra={"fields": {"signal": received.name, "drain_seconds": drain_seconds}})
        self._start_times.clear()
        self._drain_deadline = monotonic() + drain_seconds
        for worker in self._workers.values():
            with suppress(OSError):  # the worker has ended
                worker.control.send(fd_passing.DRAIN)

    def _enter_stopping(self) -> None:
        """Accept the connections that have arrived, then stop accepting. The workers finish their requests and end."""
        self._state = State.STOPPING
        self._drain_deadline = None
        if self._listener in self._selector.get_map():
            self._selector.unregister(self._listener)
            fd_passing.stop_new_connections(self._listener)
            deadline = monotonic() + fd_passing.HANDSHAKE_SECONDS
            while monotonic() < deadline:
                self._pass_connections()
                sleep(0.01)
            self._pass_connections()
        self._listener.close()
        for worker in self._workers.values():
            if worker.state is WorkerState.LOADING:
                worker.state = WorkerState.KILLED
                os.kill(worker.pid, signal.SIGKILL)
            else:
                with suppress(OSError):  # the worker has ended
                    worker.control.shutdown(socket.SHUT_WR)

    def _reload(self) -> None:
        """Send RELOAD to the workers that serve. A worker that is starting needs none: it reads all files anyway."""
        log.info("reloading", extra={"fields": {"signal": signal.SIGHUP.name}})
        for worker in self._workers.values():
            if worker.state is WorkerState.READY:
                with suppress(OSError):  # the worker has ended, or reads nothing
                    worker.control.send(fd_passing.RELOAD, socket.MSG_DONTWAIT)

    # Signals and time

    def _watch_signals(self) -> None:
        """Make SIGTERM, SIGINT and SIGHUP readable from a socket, so that the selector reports them."""
        for end in (self._signal_reader, self._signal_writer, self._listener):
            end.setblocking(False)
        signal.set_wakeup_fd(self._signal_writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # Python writes to the wakeup fd only for signals with a handler
        self._hangup.handle(lambda: None)
        self._selector.register(self._signal_reader, selectors.EVENT_READ)

    def _seconds_to_next_deadline(self) -> float | None:
        deadlines = list(self._start_times.values())
        if self._drain_deadline is not None:
            deadlines.append(self._drain_deadline)
        return max(0.0, min(deadlines) - monotonic()) if deadlines else None

    # Processes

    def _start_due_workers(self) -> None:
        now = monotonic()
        for index in [index for index, start_time in self._start_times.items() if start_time <= now]:
            del self._start_times[index]
            self._start_worker(index)

    def _start_worker(self, index: int) -> None:
        segment = self._segments[index]
        segment.reset_transient()
        # This array must exist before the worker runs, because from then on only the worker may add arrays.
        closed_connections = segment.array(fd_passing.CLOSED_CONNECTIONS, length=1, transient=True)
        control, control_of_worker = socket.socketpair()
        with warnings.catch_warnings():
            # The only other thread writes the log; `logs.restart_after_fork` replaces the locks that it may hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            control.close()
            self._run_worker_and_exit(index, control_of_worker)
        control_of_worker.close()
        worker = self._workers[index] = Worker(index, pid, control, closed_connections)
        self._selector.register(control, selectors.EVENT_READ, worker)

    def _run_worker_and_exit(self, index: int, control: socket.socket) -> NoReturn:
        """Run a worker in the process that has just been forked, then exit."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            # Ctrl-C in a terminal signals all server processes, but workers stop only when the supervisor requests it.
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            self._close_inherited_sockets()
            counters = SharedCounters(self._segments, index)
            run_worker(
                self._settings,
                control=control,
                counters=counters,
                trials=self._trials,
                temporary_folder=self._temporary_folder,
            )
            code = 0
        except ElboError as error:
            print(f"elbo: {printable(str(error))}", file=sys.stderr)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            log.exception("a worker failed with an unexpected error")
        finally:
            logs.flush()
            os._exit(code)

    def _close_inherited_sockets(self) -> None:
        """Close the copies of the supervisor's sockets that a worker has inherited.

        While a copy is open, the other end does not notice that the supervisor has closed the socket.
        """
        self._selector.close()
        controls = [worker.control for worker in self._workers.values()]
        for end in (self._listener, self._signal_reader, self._signal_writer, *controls):
            end.close()

    def _schedule_replacement(self, worker: Worker, code: int, was_ready: bool, lost_connections: int) -> None:
        """Replace a worker: at once if the worker had been ready, else after a pause that doubles with each failure."""
        self._restarts[0] += 1
        pause = 0.0
        if not was_ready:
            pause = self._retry_seconds
            self._retry_seconds = min(2 * self._retry_seconds, MAX_RETRY_SECONDS)
        self._start_times[worker.index] = monotonic() + pause
        fields = {"pid": worker.pid, "lost_connections": lost_connections, "restart_in_seconds": pause}
        log.error("worker %d ended: %s; it is replaced", worker.index, _describe_exit(code), extra={"fields": fields})

    # Connections

    def _pass_connections(self) -> None:
        """Pass pending connections to workers. If no worker can take one, they stay in the kernel's backlog."""
        connection: socket.socket | None = None
        while worker := self._least_busy_worker():
            connection = connection or self._accept()
            if connection is None:
                return
            try:
                fd_passing.send_connection(worker.control, connection)
            except OSError:
                worker.state = WorkerState.UNREACHABLE
            else:
                worker.sent_connections += 1
                connection = None
        if connection:
            connection.close()
        sleep(NO_WORKER_SECONDS)

    def _accept(self) -> socket.socket | None:
        """Return a connection that waits, or None. If no file is left for it, log this once, and pause."""
        try:
            connection = fd_passing.accept(self._listener)
        except OSError as error:
            if not self._is_short_of_files:
                log.error("cannot accept connections: %s; raise the limit on open files (ulimit -n)", error.strerror)
            self._is_short_of_files = True
            sleep(SHORTAGE_SECONDS)
            return None
        if connection:
            self._is_short_of_files = False
        return connection

    def _share_connections(self) -> None:
        """Let clients of workers with more connections than their share reconnect, to the worker with the fewest.

        A worker that has just become ready has no connection, and clients keep the ones that they have.
        """
        ready = [worker for worker in self._workers.values() if worker.state is WorkerState.READY]
        share = sum(worker.connections for worker in ready) / len(ready)
        for worker in ready:
            excess = int(worker.connections - share)
            if excess > 0 and fd_passing.can_send(worker.control):
                with suppress(OSError):  # the worker has ended, or its socket is full
                    worker.control.send(fd_passing.SHED * excess, socket.MSG_DONTWAIT)

    def _least_busy_worker(self) -> Worker | None:
        ready = [worker for worker in self._workers.values() if worker.state is WorkerState.READY]
        ready = [worker for worker in ready if worker.connections < self._max_connections]
        able = [worker for worker in ready if fd_passing.can_send(worker.control)]
        return min(able, key=lambda worker: worker.connections, default=None)


def _describe_exit(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
