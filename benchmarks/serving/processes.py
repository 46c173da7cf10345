"""Servers as processes: started, watched and, whatever happens, ended. Linux only: it reads /proc.

This process adopts whatever its children leave behind (Ray's and Triton's helpers outlive their parents), so that all
of them are found again as its descendants when a server is to end.
"""

import ctypes
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep

from benchmarks.data import ROOT

PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
GRACE = 10.0  # seconds between SIGTERM and SIGKILL
TICKS = os.sysconf("SC_CLK_TCK")  # in a second
AT_REST = 0.1  # seconds of processor time in a second
PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes


def adopt_orphans() -> None:
    """From now on orphaned descendants become children of this process; and SIGTERM ends it as Ctrl-C does."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed: this needs Linux")
    signal.signal(signal.SIGTERM, _interrupted)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


class Server:
    """A server process with its children; a context manager that ends them all."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as said:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=said,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        _end_descendants()
        self._process.wait()

    def require_alive(self) -> None:
        """Raises RuntimeError with the last line that it wrote, if it has ended."""
        if self._process.poll() is not None:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"ended with {self._process.returncode}: {lines[-1] if lines else 'it said nothing'}")

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    def children(self) -> list[int]:
        """The processes that it has, and theirs."""
        return list(_descendants(self.pid))

    def ended(self, seconds: float) -> int:
        """Its exit code, once it has ended. Raises subprocess.TimeoutExpired."""
        return self._process.wait(seconds)

    def wait_until_at_rest(self, longest: float) -> None:
        """Until it and its descendants hardly compute: workers may still start when the first of them answers."""
        end, before = monotonic() + longest, self.computed()
        while monotonic() < end:
            sleep(1.0)
            now = self.computed()
            if now - before < AT_REST:
                return
            before = now

    def computed(self) -> float:
        """Seconds of processor time that it and its descendants have taken."""
        return sum(_ticks(pid) for pid in (self.pid, *_descendants(self.pid))) / TICKS

    def memory(self) -> int:
        """Bytes of resident memory of it and its descendants, what they share counted for each."""
        return sum(_resident(pid) for pid in (self._process.pid, *_descendants(self._process.pid)))


def _ticks(pid: int) -> int:
    """Ticks of processor time."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0


def _resident(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    return 0


def _descendants(ancestor: int) -> Iterator[int]:
    """Children first, then theirs."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]  # after the name: state, parent
                children.setdefault(int(parent), []).append(int(entry.name))
    found = [ancestor]
    for pid in found:
        found += children.get(pid, [])
    yield from found[1:]


def _end_descendants() -> None:
    """Kill and reap every descendant of this process. One server runs at a time, and nothing else."""
    deadline = monotonic() + GRACE
    while (pids := list(_descendants(os.getpid()))) and monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        sleep(0.02)
