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
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# A library with threads is here only if it starts its threads again after a fork.
LIBRARIES = (
    "numpy", "torch", "fastapi", "uvicorn", "uvloop", "httptools", "orjson", "simdjson",
    "prometheus_client", "google.protobuf", "cramjam", "typer", "pydantic_settings", "fastapi_offline", "rich.progress",
    "sklearn.datasets", "sklearn.metrics", "scipy.signal", "scipy.stats", "matplotlib.figure", "onnx", "torch.onnx",
    "torch._dynamo",
)  # fmt: skip
# What the programs `python -m elbo` and `python -m service` import, which takes 0.7 s. Other programs import Elbo's
# modules themselves: a test may need to know which modules a program imports.
ELBO = ("elbo.cli", "training.train", "service.app", "service.server.trials", "service.server.supervisor")
ELBO_PROGRAMS = ("elbo", "service", "training")
ELBO_PACKAGES = ("elbo", "models", "service", "training")
# The interpreter and the libraries read these variables when they start.
READ_AT_START = ("COVERAGE", "KMP_", "LD_", "MKL_", "MPL", "OMP_", "OPENBLAS_", "PYTHON", "TORCH")
SET_CHILD_SUBREAPER, GET_CHILD_SUBREAPER = 36, 37  # options of the system call prctl

LIMIT_ON_OPEN_FILES = ["prlimit", "--nofile="]  # a command may begin with these words and a number
FORKABLE_OPTIONS = {"stdin", "stdout", "stderr", "text", "cwd", "env", "start_new_session"}  # of `Popen`

lock = threading.Lock()
forgotten: list[types.ModuleType] = []  # see `forget_elbo`


class PreloadedProcess(subprocess.Popen[Any]):
    """`subprocess.Popen` for `python -m MODULE ...` and `python -c CODE ...`, without the import of the libraries.

    The program runs in a process of its own, which is a child of the process of the test. It has the given arguments,
    environment, folder and standard streams. It is a fork of a process that has started the interpreter and imported
    the libraries. So /proc/PID/cmdline and /proc/PID/environ do not show the arguments and the environment of the
    program. It waits for its threads, calls its exit functions and flushes its streams, but does not take down the
    interpreter: that would take 0.6 s, because it changes, and so copies, all memory that the fork shares.

    The command may begin with `prlimit --nofile=N`: the fork then sets its limit on open files.

    `Popen` starts the program as usual if a fork cannot run it: with other options of `Popen` or of Python, with a
    command that is not this Python, and with other values of the variables `READ_AT_START`.
    """

    def __init__(self, arguments: list[str], **options: Any) -> None:
        environment = dict(options.get("env") or os.environ)
        self._request: dict[str, Any] | None = None
        limit, command = split_limit(arguments)
        if set(options) <= FORKABLE_OPTIONS and is_forkable(command, environment):
            self._request = {
                "arguments": command[1:],
                "open_files": limit,
                "environment": environment,
                "folder": os.fspath(options.get("cwd") or Path.cwd()),
                "new_session": options.get("start_new_session", False),
            }
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


def split_limit(arguments: Any) -> tuple[int | None, Any]:
    """Return the limit on open files that a command begins with, or None, and the rest of the command."""
    program, option = LIMIT_ON_OPEN_FILES
    if isinstance(arguments, str) or arguments[0] != program or not arguments[1].startswith(option):
        return None, arguments
    return int(arguments[1].removeprefix(option)), arguments[2:]


def is_forkable(arguments: Any, environment: dict[str, str]) -> bool:
    """Return whether a fork of this process's preloaded process can run the command `arguments`."""
    if sys.platform != "linux" or isinstance(arguments, str) or len(arguments) < 3:
        return False

    def read_at_start(variables: Any) -> dict[str, str]:
        return {name: value for name, value in variables.items() if name.startswith(READ_AT_START)}

    return (
        arguments[0] == sys.executable
        and arguments[1] in ("-m", "-c")
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
    prctl, before = ctypes.CDLL(None).prctl, ctypes.c_int()
    with lock:
        to_server = connection()
        prctl(GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
        prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # this process becomes the parent of a child whose own parent has ended
        try:
            socket.send_fds(to_server, [request], files)
            pid = int(to_server.recv(100))
            to_server.recv(1)  # the parent of the new process has ended
        finally:
            prctl(SET_CHILD_SUBREAPER, before.value, 0, 0, 0)
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


def become(request: dict[str, Any], files: list[int], variables: dict[str, str]) -> None:
    """Run the program of `request` in this process. `variables` are those that importing Elbo sets."""
    if request["new_session"]:
        os.setsid()
    if request["open_files"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (request["open_files"], request["open_files"]))
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(request["environment"])
    option, program, *arguments = request["arguments"]
    if (option, program) in {("-m", name) for name in ELBO_PROGRAMS}:
        os.environ.update(variables)
    else:
        forget_elbo()
    time.tzset()
    tempfile.tempdir = None  # it depends on the variable TMPDIR
    os.chdir(request["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules["numpy"].random.seed()  # otherwise every program would draw the same numbers
    sys.argv = [option, *arguments]
    if option == "-m":
        sys.path[0] = os.getcwd()  # noqa: PTH109
        run_and_exit(lambda: runpy.run_module(program, run_name="__main__", alter_sys=True))
    sys.path[0] = ""
    sys.modules["__main__"] = types.ModuleType("__main__")
    run_and_exit(lambda: exec(compile(program, "<string>", "exec"), vars(sys.modules["__main__"])))


def run_and_exit(program: Callable[[], Any]) -> None:
    """Run a program in this process and exit. Return, or raise, only if Python has to report an error at its exit."""
    try:
        program()
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            raise  # Python prints the code
        exit_quickly(int(end.code or 0))
    exit_quickly(0)


def forget_elbo() -> None:
    """Let the next import of a module of Elbo execute it again. The old modules stay in memory."""
    names = [name for name in sys.modules if name.partition(".")[0] in ELBO_PACKAGES]
    forgotten.extend(sys.modules.pop(name) for name in names)


def exit_quickly(status: int) -> None:
    """Exit as Python does, except that the objects of this process are not freed one by one."""
    threading._shutdown()  # type: ignore[attr-defined] # waits for the threads that are no daemons
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.exit(status)  # Python reports that the stream is broken or closed, and exits
    os._exit(status & 0xFF)


def import_all() -> dict[str, str]:
    """Import the libraries and Elbo. Return the environment variables that importing Elbo has set."""
    for library in LIBRARIES:
        importlib.import_module(library)
    before = dict(os.environ)
    sys.path[0] = str(ROOT)
    for module in ELBO:
        importlib.import_module(module)
    return dict(os.environ.items() - before.items())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_by_elbo = import_all()
    gc.freeze()  # the programs then end without a search for garbage in the libraries, which takes a second
    become(*wait_for_request(socket.socket(fileno=int(sys.argv[1]))), set_by_elbo)
