"""Start the measurement of `make coverage` in a Python of another environment, such as .venv-ray.

`make coverage` puts this folder on PYTHONPATH, from which each Python imports `sitecustomize` when it starts. The tests
start programs in several environments, and coverage.py is installed in only one of them.
"""

import os
import sys
from pathlib import Path

if "COVERAGE_PROCESS_CONFIG" in os.environ:  # coverage.py sets it for the processes that a measured process starts
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    sys.path.append(str(Path(__file__).resolve().parents[2] / ".venv-coverage" / "lib" / version / "site-packages"))
    import coverage  # type: ignore[import-not-found] # .venv does not have it

    coverage.process_startup()
