"""How long `import elbo` takes, and the first use of each of its names, each in a new process.

    .venv/bin/python benchmarks/python/import_time.py

The time of an interpreter that imports nothing is subtracted. Each figure is the median of ROUNDS runs.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 15
LIMIT_SECONDS = 0.1
PROGRAMS = {
    "import elbo": "import elbo",
    "import elbo.client": "import elbo.client",
    "elbo.load": "import elbo; elbo.load",
    "elbo.fit": "import elbo; elbo.fit",
    "elbo.adopt": "import elbo; elbo.adopt",
}


def seconds(program: str) -> float:
    """Return the time of a new interpreter that runs `program`."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    return time.perf_counter() - began


def main() -> None:
    """Print a table, and fail if `import elbo` takes longer than LIMIT_SECONDS."""
    programs = {"nothing": "pass", **PROGRAMS}
    for program in programs.values():
        seconds(program)  # fills the cache of the disk
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS):  # interleaved, so that a busy moment of the machine touches all programs
        for name, program in programs.items():
            times[name].append(seconds(program))
    base = statistics.median(times.pop("nothing"))
    print("| | seconds | allowed |\n|---|---|---|")
    for name, values in times.items():
        allowed = f"{LIMIT_SECONDS}" if name == "import elbo" else ""
        print(f"| `{name}` | {statistics.median(values) - base:.3f} | {allowed} |")
    if statistics.median(times["import elbo"]) - base > LIMIT_SECONDS:
        sys.exit(f"import elbo takes longer than {LIMIT_SECONDS} s")


if __name__ == "__main__":
    main()
