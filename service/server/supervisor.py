"""Several processes that serve at one address: started, given their share of the connections, replaced, ended.

The supervisor alone accepts connections, and passes each to the worker that has the fewest. Workers that share a
listening socket, or have one each with SO_REUSEPORT, get what the kernel's wake-ups or its hash give them, which may be
all or nothing; and what waits in the queue of a worker that is killed is lost. A connection costs it once, its requests
nothing. It imports what its workers need, starts no thread, and forks them: a new one finds everything imported, which
is most of what its start would take, in memory that all share, and the numbers that it shares with the others.
"""

import gc
import logging
import os
import selectors
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic, sleep
from typing import NoReturn

from models.errors import ElboError
from service.server import fd_passing
from service.settings import Settings
from service.shared_memory import RESTARTS, Segment, SharedCounters

PATIENCE = (0.5, 30.0)  # seconds, at least and at most, before a worker that never became ready is tried again
TOO_FULL = 0.001  # seconds to wait where no worker takes connections

log = logging.getLogger("elbo.supervisor")


@dataclass(eq=False)
class Worker:
    """A process. `number` is its part of the counts."""

    number: int
    pid: int
    channel: socket.socket
    closed: "memoryview[float]"
    passed: int = 0
    ready: bool = False
    deaf: bool = False  # it has ended, and `_hear` will soon notice
    dismissed: bool = False  # killed at the end, while it loaded; that it is ready may have come too late

    @property
    def connections(self) -> int:
        """How many it has."""
        return self.passed - int(self.closed[0])


@dataclass
class Ending:
    """What is known of the end, once it has begun."""

    signals: int = 0
    at: float | None = None  # when no connection is accepted any more


@dataclass
class Supervisor:
    """Runs the workers of `settings` behind `listener`, which is bound."""

    settings: Settings
    listener: socket.socket
    _workers: dict[int, Worker] = field(default_factory=dict)  # by number
    _due: dict[int, float] = field(default_factory=dict)  # when a number is started
    _patience: float = PATIENCE[0]
    _listening: bool = False
    _exit: int = 0
    _ending: Ending = field(default_factory=Ending)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT. Exits with the code of a worker that could not start."""
        # The last part is the supervisor's own.
        self._parts = [Segment() for _ in range(self.settings.workers + 1)]
        self._restarts = self._parts[-1].numbers((RESTARTS,), 1)
        self._selector = selectors.DefaultSelector()
        self._signals, self._waker = socket.socketpair()
        for end in (self._signals, self._waker, self.listener):
            end.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # it is read from the socket
        self._selector.register(self._signals, selectors.EVENT_READ)
        import service.server.worker  # noqa: F401 - for those to come; here nothing of it runs

        gc.freeze()  # or a worker's collector would copy what is shared by looking at it
        self._due = {0: monotonic()}  # the others once it is ready: all would only be in each other's way
        log.info("starting %d workers for the models in %s", self.settings.workers, self.settings.artifacts)
        while self._workers or self._due:
            self._start_those_due()
            self._turn()
        if self._exit:
            sys.exit(self._exit)

    def _turn(self) -> None:
        """Wait for something to happen, and do what it asks for."""
        for key, _ in self._selector.select(self._seconds()):
            if key.fileobj is self._signals:
                for number in self._signals.recv(64):
                    self._stop(signal.Signals(number))
            elif key.fileobj is self.listener:
                self._accept()
            else:
                self._hear(key.data)
        if self._ending.at is not None and monotonic() >= self._ending.at:
            self._let_go()

    def _seconds(self) -> float | None:
        moments = [*self._due.values(), *([self._ending.at] if self._ending.at is not None else [])]
        return max(0.0, min(moments) - monotonic()) if moments else None

    # Workers

    def _start_those_due(self) -> None:
        for number in [number for number, moment in self._due.items() if moment <= monotonic()]:
            del self._due[number]
            self._start(number)

    def _start(self, number: int) -> None:
        part = self._parts[number]
        part.forget_passing()
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            ours.close()
            self._become(number, theirs)
        theirs.close()
        closed = part.numbers(fd_passing.CLOSED, 1, passing=True)
        worker = self._workers[number] = Worker(number, pid, ours, closed)
        self._selector.register(ours, selectors.EVENT_READ, worker)

    def _become(self, number: int, theirs: socket.socket) -> NoReturn:
        """Be worker `number`, in the process that has just been made for it."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for sig in (signal.SIGTERM, signal.SIGINT):  # sent to all of a group: the supervisor's word counts
                signal.signal(sig, signal.SIG_IGN)
            self._selector.close()
            for end in (
                self.listener,
                self._signals,
                self._waker,
                *(worker.channel for worker in self._workers.values()),
            ):
                end.close()  # or nobody would notice that its other end has gone
            from service.server.worker import work

            work(self.settings, channel=theirs, counts=SharedCounters(self._parts, number))
            code = 0
        except ElboError as error:
            print(f"elbo: {error}", file=sys.stderr)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            log.exception("a worker failed")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _hear(self, worker: Worker) -> None:
        """What a worker has said: that it is ready, or, by the end of the stream, that it has ended."""
        try:
            said = worker.channel.recv(64)
        except OSError:
            said = b""
        if said:
            worker.ready = True
            self._patience = PATIENCE[0]
            log.info("worker %d is ready", worker.number, extra={"fields": {"pid": worker.pid}})
            if self._ending.signals:
                self._tell_to_drain(worker)
            if not self._listening and not self._ending.signals:
                self._listen()
                self._due = dict.fromkeys(range(1, self.settings.workers), monotonic())
            return
        self._selector.unregister(worker.channel)
        worker.channel.close()
        del self._workers[worker.number]
        code = os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])
        lost = worker.connections
        self._parts[worker.number].forget_passing()
        if not self._ending.signals:
            self._replace(worker, code, lost)
        elif code and worker.ready and not worker.dismissed:
            log.error("worker %d ended with %d while it finished its requests", worker.number, code)
            self._exit = self._exit or 1

    def _replace(self, worker: Worker, code: int, lost: int) -> None:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if not self._listening:  # the first ones: others would fare no better
            log.error("worker %d could not start: %s", worker.number, how)
            self._exit = code if code > 0 else 1
            self._ending.signals = 1
            self._let_go()
            return
        self._restarts[0] += 1
        wait = 0.0 if worker.ready else self._patience
        self._patience = self._patience if worker.ready else min(2 * self._patience, PATIENCE[1])
        self._due[worker.number] = monotonic() + wait
        fields = {"pid": worker.pid, "connections": lost, "seconds": wait}
        log.error("worker %d ended: %s; it is replaced", worker.number, how, extra={"fields": fields})

    # Connections

    def _listen(self) -> None:
        self._listening = True
        self.listener.listen(fd_passing.BACKLOG)
        self._selector.register(self.listener, selectors.EVENT_READ)
        log.info("listening on %s", fd_passing.announce(self.listener))

    def _accept(self) -> None:
        """Pass on what waits; while no worker can take any, it waits in the kernel."""
        connection: socket.socket | None = None
        while worker := self._least_busy():
            connection = connection or next(fd_passing.waiting(self.listener), None)
            if connection is None:
                return
            try:
                fd_passing.pass_on(worker.channel, connection)
            except OSError:
                worker.deaf = True
            else:
                worker.passed += 1
                connection = None
        if connection:
            connection.close()
        sleep(TOO_FULL)

    def _least_busy(self) -> Worker | None:
        ready = [worker for worker in self._workers.values() if worker.ready and not worker.deaf]
        able = [worker for worker in ready if fd_passing.has_room(worker.channel)]
        return min(able, key=lambda worker: worker.connections, default=None)

    # The end

    def _stop(self, sig: signal.Signals) -> None:
        """The first signal begins the end, the second cuts its delay short, the third SIGINT the requests too."""
        ending, drain = self._ending, self.settings.drain_seconds
        ending.signals += 1
        if ending.signals > 2 and sig == signal.SIGINT:
            for worker in self._workers.values():
                os.kill(worker.pid, signal.SIGKILL)
        if ending.signals > 1:
            ending.at = monotonic() if ending.at is not None else None
            return
        log.info("stopping", extra={"fields": {"signal": sig.name, "drain_seconds": drain}})
        self._due.clear()
        ending.at = monotonic() + drain
        for worker in self._workers.values():
            self._tell_to_drain(worker)

    def _tell_to_drain(self, worker: Worker) -> None:
        with suppress(OSError):  # deaf
            worker.channel.send(fd_passing.DRAIN)

    def _let_go(self) -> None:
        """Accept what has come by now, then nothing more; the workers finish what they have and end."""
        self._ending.at = None
        if self._listening:
            self._accept()
            self._selector.unregister(self.listener)
        self.listener.close()
        for worker in self._workers.values():
            if worker.ready:
                with suppress(OSError):  # deaf
                    worker.channel.shutdown(socket.SHUT_WR)
            else:
                worker.dismissed = True
                os.kill(worker.pid, signal.SIGKILL)  # it still loads its models
