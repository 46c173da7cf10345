"""Check whether the arrays of requests and responses are finite, and convert arrays to float32."""

from typing import Any

import numpy as np
import numpy.typing as npt

# Arrays of at most this size are checked with one dot product, which is faster than np.isfinite. For larger arrays, the
# dot product might start BLAS threads.
DOT_PRODUCT_LIMIT = 8192
_MAX_SQUARE_SUM = 1e76  # if the sum of squares is below this, absolute values are below 1e38 and fit float32


def is_finite(array: npt.NDArray[np.float32]) -> bool:
    """Return whether every number is finite."""
    # If the sum of squares is finite, every number is finite. If the sum is not finite, np.isfinite decides, because
    # large finite numbers can also make the sum infinite.
    return bool((array.size <= DOT_PRODUCT_LIMIT and np.vdot(array, array) < np.inf) or np.isfinite(array).all())


def as_float32(array: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float32], bool]:
    """Return `array` as float32 in C order, and whether every number is finite.

    The array is copied only if necessary.
    """
    if array.dtype == np.float64 and array.size <= DOT_PRODUCT_LIMIT and np.vdot(array, array) < _MAX_SQUARE_SUM:
        return array.astype(np.float32, order="C"), True
    with np.errstate(over="ignore", invalid="ignore"):
        x = array.astype(np.float32, order="C", copy=False)
    return x, is_finite(x)


def missing_mask(array: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_] | None:
    """Return a mask of the missing values (NaN), or None if no value is missing."""
    missing = np.isnan(array)
    return missing if missing.any() else None
