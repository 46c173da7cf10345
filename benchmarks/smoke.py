"""Run benchmarks with `--smoke`, which checks that they work; their figures do not matter.

    python -m benchmarks.smoke            # every benchmark with this option
    python -m benchmarks.smoke FILE ...

Each benchmark runs in a fork of this process, which has imported the libraries and Elbo. That saves three seconds of a
core for each benchmark. The servers that a benchmark starts are new processes, as always.
"""

import os
import sys
import tempfile
import traceback
import types
from pathlib import Path

from tests import preloaded

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent


def benchmarks() -> list[Path]:
    """Return the files that have the option `--smoke`. They import or start the other files of the folder."""
    return [path for path in sorted(FOLDER.glob("*/*.py")) if '"--smoke"' in path.read_text()]


def smoke(path: Path) -> bool:
    """Run a benchmark in a new process. Return whether it succeeds; print what it printed if it fails."""
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if pid == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            _become(path)
        _, status, used = os.wait4(pid, 0)
        output.seek(0)
        seconds = f"{used.ru_utime + used.ru_stime:.0f} s of processor time"
        result = seconds if status == 0 else f"failed after {seconds}\n{output.read()}"
        print(f"{path.relative_to(ROOT)} --smoke: {result}", flush=True)
    return status == 0


def _become(path: Path) -> None:
    sys.argv = [str(path), "--smoke"]
    sys.path[0] = str(path.parent)
    main_module = types.ModuleType("__main__")
    main_module.__file__ = str(path)
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main_module  # the second is for multiprocessing
    try:
        preloaded.run_and_exit(lambda: exec(compile(path.read_text(), str(path), "exec"), vars(main_module)))
    except BaseException:  # noqa: BLE001 - a fork must not go on with the work of its parent
        traceback.print_exc()
    os._exit(1)


def main() -> None:
    """Run the benchmarks that the command line names, or all."""
    paths = [Path(name).resolve() for name in sys.argv[1:]] or benchmarks()
    preloaded.import_all()
    succeeded = [smoke(path) for path in paths]  # all of them, also after a failure
    sys.exit(0 if all(succeeded) else 1)


if __name__ == "__main__":
    main()
