"""Load the images that several benchmarks use, and describe the machine on which a benchmark runs."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ELBO_DATA", ROOT.parent / "shared" / "data"))


def load_images(part: str) -> tuple[str, npt.NDArray[np.uint8]]:
    """Return the name of a data set, and the images of its `part`, which is "train" or "test".

    The images are [N, H, W], with values from 0 to 255. The data set is MNIST if the folder ELBO_DATA (default
    ../shared/data) contains mnist/{train,test}.npz. Otherwise the data set is scikit-learn's digits.
    """
    name, x, _ = load_labelled_images(part)
    return name, x


def load_labelled_images(part: str) -> tuple[str, npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the name of a data set, and the images and the labels [N] of its `part`; see `load_images`."""
    path = DATA / "mnist" / f"{part}.npz"
    if path.is_file():
        with np.load(path) as arrays:
            return "MNIST", arrays["x"], arrays["y"].astype(np.int64)
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, labels = np.rint(digits.images * 255.0 / 16.0).astype(np.uint8), digits.target.astype(np.int64)
    rows = slice(None, -300) if part == "train" else slice(-300, None)
    return "digits", x[rows], labels[rows]


def describe_machine(*packages: str) -> str:
    """Return one line with the processor and the versions of Python and of `packages`."""
    names = ", ".join(f"{name} {version(name)}" for name in packages)
    processor = platform.processor() or platform.machine()
    lines = [line for line in _read_cpuinfo() if line.startswith("model name")]
    if lines:
        processor = lines[0].split(":")[1].strip()
    return f"{os.cpu_count()} cores of {processor}; Python {platform.python_version()}, {names}"


def _read_cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
