"""What the training benchmarks share: the rows that they measure on, and how a table says where it was measured."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("ELBO_DATA", ROOT.parent / "shared" / "data"))


def pictures(part: str) -> tuple[str, npt.NDArray[np.uint8]]:
    """What they are called, and the pictures of `part` (train or test) [N, H, W], 0 to 255.

    MNIST, where ELBO_DATA or ../shared/data has mnist/{train,test}.npz; else scikit-learn's digits.
    """
    path = FOLDER / "mnist" / f"{part}.npz"
    if path.is_file():
        return "MNIST", np.load(path)["x"]
    from sklearn.datasets import load_digits

    x = np.rint(load_digits().images * 255.0 / 16.0).astype(np.uint8)
    return "digits", x[:-300] if part == "train" else x[-300:]


def where(*packages: str) -> str:
    """One line: the machine, and the versions of Python and of `packages`."""
    names = ", ".join(f"{name} {version(name)}" for name in packages)
    cpu = platform.processor() or platform.machine()
    models = [line for line in _cpuinfo() if line.startswith("model name")]
    if models:
        cpu = models[0].split(":")[1].strip()
    return f"{os.cpu_count()} cores of {cpu}; Python {platform.python_version()}, {names}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
