"""`python -m service` as a process."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]


class Process:
    """A server process; every line of its log is kept."""

    def __init__(self, artifacts: Path, **settings: Any) -> None:
        options = {"ARTIFACTS": artifacts, "PORT": 0, "POLL_SECONDS": 0.1, **settings}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("ELBO_")}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "service"],
            cwd=ROOT,
            env=inherited | {f"ELBO_{key}": str(value) for key, value in options.items()},
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []
        self._fresh: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.port = int(self.wait_for("listening on")["message"].rpartition(":")[2])
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._fresh.put(json.loads(line))
        self._fresh.put(None)

    def wait_for(self, message: str, **fields: Any) -> dict[str, Any]:
        """The next log line with `message` in it and these fields."""
        while True:
            line = self._fresh.get(timeout=20)
            assert line is not None, f"it ended before it said {message}"
            self.lines.append(line)
            if message in line["message"] and all(line.get(key) == value for key, value in fields.items()):
                return line

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def end(self, sig: int = signal.SIGTERM) -> int:
        """Send `sig` and give the exit code."""
        self.popen.send_signal(sig)
        return self.popen.wait(20)

    def errors(self) -> str:
        """What it has said on standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def close(self) -> None:
        """Kill it, and print what it said beside its requests: pytest shows it where a test fails."""
        self.popen.kill()
        self.popen.wait()
        with suppress(queue.Empty):
            while line := self._fresh.get(timeout=1):
                self.lines.append(line)
        print(*(line for line in self.lines if "status" not in line), self.errors(), sep="\n")
        self._errors.close()
        assert self.popen.stdout is not None
        self.popen.stdout.close()


@contextmanager
def starter() -> Iterator[Callable[..., Process]]:
    """Starts processes, and ends them all."""
    processes: list[Process] = []

    def begin(*arguments: Any, **settings: Any) -> Process:
        processes.append(Process(*arguments, **settings))
        return processes[-1]

    try:
        yield begin
    finally:
        for process in processes:
            process.close()


@contextmanager
def meanwhile(*works: Callable[[threading.Event], None]) -> Iterator[None]:
    """Each of `works` in a thread; at the block's end, however it comes, they are told to stop, and waited for."""
    stop = threading.Event()
    threads = [threading.Thread(target=work, args=(stop,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
