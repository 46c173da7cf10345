"""Start, observe and stop server processes. This module needs Linux, because it reads /proc.

Ray and Triton start helper processes, which outlive the processes that started them. `adopt_orphans` makes this process
the parent of such orphans, so that stopping the server kills them too.
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

PR_SET_CHILD_SUBREAPER = 36  # the value of this constant in linux/prctl.h
STOP_SECONDS = 10.0  # seconds between SIGTERM and SIGKILL
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
IDLE_SHARE = 0.1  # a server is idle if it uses less processor time than this, in seconds per second
# KEEPER_PROCESS_NAME and TRIAL_PROCESS_NAME of `service.inference.trial`; this module imports nothing of the service
TRIAL_PROCESSES = ("elbo-trial", "elbo-trial-run")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def adopt_orphans() -> None:
    """Make this process the parent of orphaned descendants, and raise KeyboardInterrupt on SIGTERM."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed: this needs Linux")
    signal.signal(signal.SIGTERM, _raise_interrupt)


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def free_port() -> int:
    """Return a port of 127.0.0.1 that is currently unused."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


class ServerProcess:
    """A server process and its descendants. Leaving the context stops them all.

    Args:
        command: the command that starts the server.
        environment: environment variables, added to those of this process.
        log: file for the standard output and standard error of the server.
        folder: working directory of the server.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, folder: Path = ROOT) -> None:
        self.log = log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        _kill_descendants()
        self._process.wait()

    def require_alive(self) -> None:
        """Raise RuntimeError with the last line of the log if the server has exited."""
        if self._process.poll() is not None:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            last_line = lines[-1] if lines else "its log is empty"
            raise RuntimeError(f"the server exited with {self._process.returncode}: {last_line}")

    @property
    def pid(self) -> int:
        """Process ID of the server."""
        return self._process.pid

    def descendants(self) -> list[int]:
        """Return the process IDs of the server's children, grandchildren and further descendants."""
        return list(_descendants(self.pid))

    def wait(self, seconds: float) -> int:
        """Wait until the server exits, and return the exit code.

        Raises:
            subprocess.TimeoutExpired: the server has not exited after `seconds`.
        """
        return self._process.wait(seconds)

    def wait_until_idle(self, seconds: float) -> None:
        """Wait until the server is idle, but at most `seconds`.

        The first worker may respond while other workers are still starting.
        """
        end, before = monotonic() + seconds, self.processor_seconds()
        while monotonic() < end:
            sleep(1.0)
            now = self.processor_seconds()
            if now - before < IDLE_SHARE:
                return
            before = now

    def processor_seconds(self) -> float:
        """Return how many seconds of processor time the server and its descendants have used."""
        return sum(_ticks(pid) for pid in (self.pid, *_descendants(self.pid))) / TICKS_PER_SECOND

    def memory(self) -> int:
        """Return the resident bytes of the server and its descendants. A shared page counts once per process."""
        return sum(_resident(pid) for pid in (self._process.pid, *_descendants(self._process.pid)))

    def workers(self) -> list[int]:
        """Return the process IDs of Elbo's workers: the descendants except those that try artifacts out."""
        return [pid for pid in self.descendants() if process_name(pid) not in ("", *TRIAL_PROCESSES)]


def process_name(pid: int) -> str:
    """Return the name of a process, or "" if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def own_memory(pid: int) -> int:
    """Return the memory of a process in bytes, without the pages of files. 0 if the process has ended.

    A page that n processes share counts 1/n. The pages of files, which hold the code of libraries, are left out:
    their n changes as other programs on this machine start and end.
    """
    with suppress(OSError):
        fields = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
        return sum(int(field[1]) for field in fields if field[0] in ("Pss_Anon:", "Pss_Shmem:")) * 1024
    return 0


def open_files(pid: int) -> int:
    """Return the number of open file descriptors of a process. 0 if the process has ended."""
    with suppress(OSError):
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return 0


def _ticks(pid: int) -> int:
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    return 0


def _resident(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    return 0


def _descendants(ancestor: int) -> Iterator[int]:
    """Yield the process IDs of the children, grandchildren and further descendants of `ancestor`."""
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


def _kill_descendants() -> None:
    """Kill and reap all descendants of this process, whichever server started them."""
    deadline = monotonic() + STOP_SECONDS
    while (pids := list(_descendants(os.getpid()))) and monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        sleep(0.02)
