"""Data for tests: the rows of a table, and the MNIST images in the folder ELBO_DATA (default: ../shared/data).

ELBO_DATA=none declares that the machine has no data. Tests that need data are then skipped, in CI too.
"""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.conftest import require
from training.data.table import Table

ROOT = Path(__file__).resolve().parent.parent
DATA_FOLDER = Path(os.environ.get("ELBO_DATA", ROOT.parent / "shared" / "data"))


def mnist(part: str) -> npt.NDArray[np.float64]:
    """Return the MNIST images of `part` (train or test), [N, 784] in [0, 1]. Skip the test if the file is missing."""
    if str(DATA_FOLDER) == "none":
        pytest.skip("ELBO_DATA=none: this machine has no MNIST")
    path = DATA_FOLDER / "mnist" / f"{part}.npz"
    require(
        path.is_file(), f"{path} does not exist: set ELBO_DATA to a folder with mnist/{part}.npz (x: uint8 [N, 28, 28])"
    )
    x = np.load(path)["x"]
    return np.asarray(x.reshape(len(x), -1) / 255.0)


def values(table: Table) -> npt.NDArray[np.float32]:
    """Return all rows of `table`, [N, D]."""
    return table.x.read_range(0, len(table.x))
