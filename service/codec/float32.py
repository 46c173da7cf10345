"""Whether numbers are what they should be, which is asked twice in every request."""

from typing import Any

import numpy as np
import numpy.typing as npt

SHORT = 8192  # numbers: of so many one product is cheaper than a look at each; of more, BLAS may ask threads to help
_SMALL = 1e76  # no term of a sum of squares below it has a root above 1e38, which float32 holds


def is_finite(array: npt.NDArray[np.float32]) -> bool:
    """Whether none is infinite or NaN."""
    # Such a one would make the sum of squares so. That of large ones is infinite too: then each is looked at.
    return bool((array.size <= SHORT and np.vdot(array, array) < np.inf) or np.isfinite(array).all())


def as_float32(array: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], bool]:
    """The numbers as float32 in C order, a copy where they are not that already; and whether all of them are finite."""
    if array.dtype == np.float64 and array.size <= SHORT and np.vdot(array, array) < _SMALL:
        return array.astype(np.float32, order="C"), True
    with np.errstate(over="ignore", invalid="ignore"):
        x = array.astype(np.float32, order="C", copy=False)
    return x, is_finite(x)


def gaps_of(array: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_] | None:
    """Which numbers are NaN, and stand for missing ones; None if none does."""
    found = np.isnan(array)
    return found if found.any() else None
