"""Start Python programs without waiting for the import of torch, which takes two seconds of a core.

A process that has imported the libraries forks for each program: see `PreloadedProcess`. This file is also the program
of that process.
"""

import atexit
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Elbo's modules are not here. A library with threads is here only if it starts its threads again after a fork.
LIBRARIES = (
    "numpy", "torch", "fastapi", "uvicorn", "uvloop", "httptools", "orjson", "simdjson",
    "prometheus_client", "google.protobuf", "cramjam", "typer", "pydantic_settings", "fastapi_offline", "rich.progress",
    "sklearn.datasets", "sklearn.metrics", "scipy.signal", "scipy.stats", "matplotlib.figure", "onnx", "torch.onnx",
    "torch._dynamo",
)  # fmt: skip
# The interpreter and the libraries read these variables when they start.
READ_AT_START = ("COVERAGE", "KMP_", "LD_", "MKL_", "MPL", "OMP_", "OPENBLAS_", "PYTHON", "TORCH")
SET_CHILD_SUBREAPER = 36  # an option of the system call prctl

lock = threading.Lock()


class PreloadedProcess(subprocess.Popen[Any]):
    """`subprocess.Popen` for `python -m MODULE ...` and `python -c CODE ...`, without the import of the libraries.

    The program runs in a process of its own, which is a child of the process of the test. It has the given arguments,
    environment, folder and standard streams, imports Elbo's modules itself, and ends like any program. It is a fork
    of a process that has started the interpreter and imported the libraries. So /proc/PID/cmdline and /proc/PID/environ
    do not show the arguments and the environment of the program.

    `Popen` starts the program as usual if a fork cannot run it: with other options of `Popen` or of Python, with a
    command that is not this Python, and with other values of the variables `READ_AT_START`.
    """

    def __init__(self, arguments: list[str], **options: Any) -> None:
        environment = dict(options.get("env") or os.environ)
        self._request: dict[str, Any] | None = None
        if set(options) <= {"stdin", "stdout", "stderr", "text", "cwd", "env"} and is_forkable(arguments, environment):
            folder = os.fspath(options.get("cwd") or Path.cwd())
            self._request = {"arguments": arguments[1:], "environment": environment, "folder": folder}
        super().__init__(arguments, **options)

    def _execute_child(self, *arguments: Any) -> None:
        """Start the program. This replaces one method of `Popen`; its methods that wait for the program stay."""
        if self._request is None:
            super()._execute_child(*arguments)  # type: ignore[misc]
            return
        pipes = arguments[10:16]  # the read end and the write end for standard input, then for output, then for error
        streams = pipes[0], pipes[3], pipes[5]
        files = [number if stream == -1 else stream for number, stream in enumerate(streams)]
        self.pid = forked(json.dumps(self._request).encode(), files)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def run_preloaded(arguments: list[str], *, timeout: float = 300, **options: Any) -> "subprocess.CompletedProcess[Any]":
    """Run a program like `subprocess.run`, with its output captured, in a `PreloadedProcess`."""
    with PreloadedProcess(arguments, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def is_forkable(arguments: Any, environment: dict[str, str]) -> bool:
    """Return whether a fork of this process's preloaded process can run the command `arguments`."""
    if sys.platform != "linux" or isinstance(arguments, str) or len(arguments) < 3:
        return False

    def read_at_start(variables: Any) -> dict[str, str]:
        return {name: value for name, value in variables.items() if name.startswith(READ_AT_START)}

    return (
        arguments[0] == sys.executable
        and arguments[1] in ("-m", "-c")
        and not any(name.startswith("COVERAGE") for name in environment)
        and read_at_start(environment) == read_at_start(os.environ)
    )


@functools.cache
def connection() -> socket.socket:
    """Start the process that has imported the libraries. Return the connection to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], cwd=ROOT, pass_fds=[theirs.fileno()]
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def forked(request: bytes, files: list[int]) -> int:
    """Fork a process that runs the program of `request` with the standard streams `files`. Return its process ID."""
    prctl = ctypes.CDLL(None).prctl
    with lock:
        to_server = connection()
        prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # this process becomes the parent of a child whose own parent has ended
        try:
            socket.send_fds(to_server, [request], files)
            pid = int(to_server.recv(100))
            to_server.recv(1)  # the parent of the new process has ended
        finally:
            prctl(SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    return pid


def wait_for_request(requests: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork a process for each request. Return only in the new processes: the request and its standard streams."""
    while True:
        content, files, _, _ = socket.recv_fds(requests, 2**20, 3)
        if not content:
            sys.exit()
        if between := os.fork():
            os.waitpid(between, 0)
            for file in files:
                os.close(file)
            requests.send(b".")
            continue
        parent = os.getpid()
        if pid := os.fork():
            requests.send(str(pid).encode())
            os._exit(0)
        while os.getppid() == parent:
            pass  # the process of the test is about to become the parent
        requests.close()
        return json.loads(content), files


def become(request: dict[str, Any], files: list[int]) -> None:
    """Run the program of `request` in this process."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    tempfile.tempdir = None  # it depends on the variable TMPDIR
    os.chdir(request["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules["numpy"].random.seed()  # otherwise every program would draw the same numbers
    option, program, *arguments = request["arguments"]
    sys.argv = [option, *arguments]
    if option == "-m":
        sys.path[0] = os.getcwd()  # noqa: PTH109
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return
    sys.path[0] = ""
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"]))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # the programs then end without a search for garbage in the libraries, which takes a second
    become(*wait_for_request(socket.socket(fileno=int(sys.argv[1]))))
