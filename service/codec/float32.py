"""Checks and conversions of float32 arrays. Every request needs them twice, for its rows and for the response."""

from typing import Any

import numpy as np
import numpy.typing as npt

# Up to this many numbers, one dot product is faster than np.isfinite. For more, BLAS may start threads.
DOT_PRODUCT_LIMIT = 8192
_MAX_SQUARE_SUM = 1e76  # if a sum of squares is smaller, no number exceeds 1e38, and all of them fit float32


def is_finite(array: npt.NDArray[np.float32]) -> bool:
    """Return whether no number is infinite or NaN."""
    # An infinite or NaN number makes the sum of squares infinite or NaN. Large finite numbers can make it infinite too:
    # then np.isfinite decides.
    return bool((array.size <= DOT_PRODUCT_LIMIT and np.vdot(array, array) < np.inf) or np.isfinite(array).all())


def as_float32(array: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], bool]:
    """Return the numbers as float32 in C order, copied only if necessary; and whether all of them are finite."""
    if array.dtype == np.float64 and array.size <= DOT_PRODUCT_LIMIT and np.vdot(array, array) < _MAX_SQUARE_SUM:
        return array.astype(np.float32, order="C"), True
    with np.errstate(over="ignore", invalid="ignore"):
        x = array.astype(np.float32, order="C", copy=False)
    return x, is_finite(x)


def missing_mask(array: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_] | None:
    """Return which numbers are NaN, the mark of a missing value, or None if no number is NaN."""
    missing = np.isnan(array)
    return missing if missing.any() else None
