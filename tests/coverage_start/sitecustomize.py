"""Measure the coverage of every process of a test run. `make coverage` puts this folder on PYTHONPATH.

Each Python imports `sitecustomize` when it starts. The tests start programs in several environments, such as .venv-ray,
and coverage.py is installed in only one of them. Elbo's processes fork, and many end with `os._exit` and within limits
of files and memory. The options `patch = fork, _exit` of coverage.py register their functions again in each fork, so a
fork of a fork also saves the measurement of its parents, at the same time as they do. The functions here are registered
once, and each fork saves only its own measurement.
"""

import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

version = f"python{sys.version_info.major}.{sys.version_info.minor}"
sys.path.append(str(Path(__file__).resolve().parents[2] / ".venv-coverage" / "lib" / version / "site-packages"))
import coverage  # type: ignore[import-not-found] # noqa: E402 - .venv does not have it

# Writing a measurement may exceed these limits.
LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_AS)
exit_at_once, set_limit = os._exit, resource.setrlimit


def set_soft_limit(limit: int, values: tuple[int, int]) -> None:
    """Set a limit like `resource.setrlimit`. Keep the hard limit if it would keep `save_and_exit` from writing a file.

    A process that tries an artifact out forbids itself to open and to write files. It can raise a soft limit again.
    """
    if limit in LIMITS and (values == (0, 0) or limit == resource.RLIMIT_AS):
        values = values[0], resource.getrlimit(limit)[1]
    set_limit(limit, values)


def restart() -> None:
    """Begin the measurement of a process that has just been forked. The parent saves its own measurement itself."""
    parent: Any = coverage.Coverage.current()
    if parent is None:
        return
    parent.stop()
    parent.save = lambda: None
    if signal.getsignal(signal.SIGTERM) == parent._on_sigterm:
        signal.signal(signal.SIGTERM, parent._old_sigterm or signal.SIG_DFL)
    coverage.process_startup(force=True)


def save_and_exit(status: int) -> NoReturn:
    """Save the measurement of this process, and end it like `os._exit`."""
    if measurement := coverage.Coverage.current():
        for limit in LIMITS:
            hard_limit = resource.getrlimit(limit)[1]
            set_limit(limit, (hard_limit, hard_limit))
        with suppress(Exception):
            measurement.save()
    exit_at_once(status)


os._exit = save_and_exit
resource.setrlimit = set_soft_limit
os.register_at_fork(after_in_child=restart)
coverage.process_startup()  # of a process that a measured process has started: COVERAGE_PROCESS_CONFIG is set there
