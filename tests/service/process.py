"""Run `python -m service` as a child process."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from tests.data import ROOT
from tests.plain_http import NO_AUTHORITIES
from tests.preloaded import PreloadedProcess
from tests.service.scrape import scrape, total

LOG_SECONDS = (
    300 if "COVERAGE_PROCESS_CONFIG" in os.environ else 60
)  # `make coverage` measures the import of torch, too


class ServerProcess:
    """A server process that listens for requests. `lines` holds the log lines that have been read.

    Args:
        artifacts: the artifact folder.
        prefix: the command that starts the server's command, such as `setpriv` with options.
        command: the arguments of Python.
        environment: further environment variables.
        settings: values of environment variables; for example, PORT sets ELBO_PORT.
    """

    def __init__(
        self,
        artifacts: Path,
        *,
        prefix: Sequence[str] = (),
        command: Sequence[str] = ("-m", "service"),
        environment: Mapping[str, str] = MappingProxyType({}),
        **settings: Any,
    ) -> None:
        options = {"ARTIFACTS": artifacts, "PORT": 0, "POLL_SECONDS": 0.1, **settings}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("ELBO_")}
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self.popen: subprocess.Popen[str] = PreloadedProcess(
            [*prefix, sys.executable, *command],
            cwd=ROOT,
            env=inherited | {f"ELBO_{key}": str(value) for key, value in options.items()} | dict(environment),
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        self._unread_lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read_log, daemon=True).start()
        try:
            self.port = int(self.wait_for_log("listening on")["message"].rpartition(":")[2])
        except BaseException:
            self.close()
            raise

    def _read_log(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._unread_lines.put(json.loads(line))
        self._unread_lines.put(None)

    def wait_for_log(self, message: str, **fields: Any) -> dict[str, Any]:
        """Return the next log line whose message contains `message` and whose fields have the values in `fields`."""
        while True:
            line = self._unread_lines.get(timeout=LOG_SECONDS)
            assert line is not None, f"the server ended before it logged {message!r}"
            self.lines.append(line)
            if message in line["message"] and all(line.get(key) == value for key, value in fields.items()):
                return line

    def wait_for_worker(self) -> None:
        """Wait until another worker is ready. The constructor has already waited for the first worker."""
        self.wait_for_log("is ready")

    def client(self) -> httpx.Client:
        """Return an HTTP client of the server."""
        return httpx.Client(verify=NO_AUTHORITIES, base_url=f"http://127.0.0.1:{self.port}", timeout=20)

    def connect(self) -> socket.socket:
        """Return a TCP connection to the server."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def metric_total(self, name: str) -> float:
        """Return the sum of a metric over its label sets, as reported by one of the workers."""
        with self.client() as client:
            return total(scrape(client), name)

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.popen.send_signal(sig)
        return self.popen.wait(20)

    def stderr(self) -> str:
        """Return what the server wrote to standard error."""
        self._stderr.seek(0)
        return self._stderr.read()

    def close(self) -> None:
        """Kill the server and print the log except for the access log. If the test fails, pytest shows this output."""
        if "COVERAGE_PROCESS_CONFIG" in os.environ:  # `make coverage`: a killed process saves no measurement
            self.popen.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(10)
        self.popen.kill()
        self.popen.wait()
        with suppress(queue.Empty):
            while line := self._unread_lines.get(timeout=5):
                self.lines.append(line)
        print(*(line for line in self.lines if "status" not in line), self.stderr(), sep="\n")
        self._stderr.close()
        assert self.popen.stdout is not None
        self.popen.stdout.close()


@contextmanager
def server_starter() -> Iterator[Callable[..., ServerProcess]]:
    """Yield a function that starts servers, and close all of them at the end of the block."""
    processes: list[ServerProcess] = []

    def start(*arguments: Any, **settings: Any) -> ServerProcess:
        processes.append(ServerProcess(*arguments, **settings))
        return processes[-1]

    try:
        yield start
    finally:
        for process in processes:
            process.close()


@contextmanager
def background_threads(*functions: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run each function in a thread. At the end of the block, even after an exception, stop and join the threads."""
    stop = threading.Event()
    threads = [threading.Thread(target=function, args=(stop,)) for function in functions]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
