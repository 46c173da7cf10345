"""Run untrusted work in a child process that can harm nobody: with limits of time and memory, and without new files.

`models.inspection` refuses artifacts that call anything but harmless operators, but it cannot tell how long an artifact
runs or how much memory it takes. A trial runs the artifact in a child process first. The kernel ends the child at its
limits, so the parent needs no thread and no signal to stop it. This module does not import torch.
"""

import ctypes
import json
import os
import resource
import select
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

from models import errors
from models.errors import ArtifactError, ArtifactUnsafe, printable

POLL_SECONDS = 0.1  # interval of the calls of `is_stopped`
MAX_VERDICT_BYTES = 65_536
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
IS_POSSIBLE = sys.platform == "linux"  # other kernels lack these limits: artifacts are then inspected, not tried out
TRIAL_SECONDS = 30.0
TRIAL_BYTES = 4 * 2**30
Verdict = dict[str, Any]


class TrialStopped(ArtifactError):
    """The trial was stopped, because the process that asked for it is about to end."""

    code = "trial_stopped"


@dataclass(frozen=True)
class TrialLimits:
    """What a trial may use.

    Args:
        seconds: the elapsed time, and also the processor time.
        memory_bytes: memory, beyond that of the process that starts the trial.
    """

    seconds: float = TRIAL_SECONDS
    memory_bytes: int = TRIAL_BYTES


def run_trial(
    path: Path,
    prepare: Callable[[], bytes],
    work: Callable[[bytes], Verdict],
    limits: TrialLimits,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Verdict:
    """Run `work` in a child process, and return its result.

    Args:
        path: the path of the artifact, for messages.
        prepare: reads the artifact; it may still open files.
        work: tries the artifact out. It gets the result of `prepare`, and returns what JSON can hold. It cannot open
            files or sockets.
        limits: the limits of the child.
        is_stopped: called every POLL_SECONDS; the trial ends if it returns true.

    Raises:
        ArtifactError: what `prepare` or `work` raised, or ArtifactUnsafe if the child reached a limit or crashed.
        TrialStopped: `is_stopped` returned true.
    """
    reader, writer = os.pipe()
    started = monotonic()
    sys.stdout.flush()  # otherwise the child would get a copy of the text in the buffer
    pid = fork()
    if pid == 0:
        _run_child(path, prepare, work, limits, writer)
    os.close(writer)
    try:
        answer = _read_answer(reader, path, is_stopped)
    finally:
        os.close(reader)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # no effect if the child has ended
        _, status, usage = os.wait4(pid, 0)
    if answer:
        return open_verdict(answer, path)
    seconds = max(monotonic() - started, usage.ru_utime + usage.ru_stime)
    raise ArtifactUnsafe(f"{path}: {_describe_end(os.waitstatus_to_exitcode(status), seconds, limits)}")


def fork() -> int:
    """Fork this process. See `os.fork`."""
    with warnings.catch_warnings():
        # Python warns that the child could wait for a lock of another thread. The child needs no such lock, because the
        # other threads only write the log or wait for work.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _read_answer(reader: int, path: Path, is_stopped: Callable[[], bool]) -> bytes:
    """Wait until the child ends, and return what it has written."""
    answer = b""
    while True:
        if select.select([reader], [], [], POLL_SECONDS)[0]:
            part = os.read(reader, MAX_VERDICT_BYTES)
            answer += part
            if not part or len(answer) > MAX_VERDICT_BYTES:
                return answer if len(answer) <= MAX_VERDICT_BYTES else b""
        elif is_stopped():
            raise TrialStopped(f"{path} was not loaded, because the server stops")


def open_verdict(answer: bytes, path: Path) -> Verdict:
    """Return the verdict in `answer`, or raise the error that it contains."""
    try:
        verdict: Verdict = json.loads(answer)
        code, detail = verdict.get("code"), str(verdict.get("detail", ""))
    except (ValueError, AttributeError):
        raise ArtifactUnsafe(f"{path} cannot be tried out: the trial gave no verdict") from None
    if code is None:
        return verdict
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = {kind.code: kind for kind in classes if issubclass(kind, ArtifactError)}
    raise kinds.get(code, ArtifactUnsafe)(printable(detail))


def _describe_end(code: int, seconds: float, limits: TrialLimits) -> str:
    if -code in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL) and seconds >= 0.9 * limits.seconds:
        return (
            f"the trial of the model took longer than {limits.seconds:g} s, so it was not loaded; a model that is only "
            "slow needs a higher ELBO_TRIAL_SECONDS"
        )
    end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return (
        f"the trial of the model crashed ({end}), so it was not loaded; a model that is only large needs a higher "
        f"ELBO_TRIAL_BYTES than {limits.memory_bytes:,}"
    )


def _run_child(
    path: Path, prepare: Callable[[], bytes], work: Callable[[bytes], Verdict], limits: TrialLimits, writer: int
) -> NoReturn:
    """Do the work in the process that has just been forked, write the verdict, and end."""
    verdict: Verdict
    try:
        _limit_time_and_memory(limits)
        close_files(writer)
        content = prepare()
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        verdict = work(content)
    except ArtifactError as error:
        verdict = {"code": error.code, "detail": str(error)}
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent gets it
        detail = (str(error).splitlines() or [""])[0][:500]
        verdict = {"code": ArtifactUnsafe.code, "detail": f"{path}: the trial failed: {type(error).__name__}: {detail}"}
        if isinstance(error, MemoryError):
            needed = f"more memory than {limits.memory_bytes:,} bytes (ELBO_TRIAL_BYTES)"
            verdict["detail"] = f"{path}: the trial of the model needs {needed}, so it was not loaded"
    with suppress(BaseException):
        os.write(writer, json.dumps(verdict).encode()[:MAX_VERDICT_BYTES])
    os._exit(0)


def _limit_time_and_memory(limits: TrialLimits) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the child ends with its parent
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limits.seconds)  # the kernel ends the child, also in the middle of an operator
    seconds = int(limits.seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    memory = used_bytes + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, the kernel ends this process first


def name_process(name: str) -> None:
    """Give this process a name of at most 15 characters for `ps` and `top`."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


def close_files(kept: int) -> None:
    """Close every file but `kept`, and let standard input, output and error go nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - needs only the names
        if int(name) > 2 and int(name) != kept:
            with suppress(OSError):  # the names include the descriptor that `listdir` has closed
                os.close(int(name))
