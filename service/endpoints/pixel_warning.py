"""Warn a client whose pixels are in another range than the model's, such as 0 to 255 instead of 0 to 1."""

from functools import partial

import numpy as np
import numpy.typing as npt

from models.manifest import DARK_SHARE, WIDE_SPAN
from service.endpoints import offload
from service.inference.served_model import ServedModel

Array = npt.NDArray[np.float32]
LARGE_ERROR = 0.05  # pixels are checked if the mean squared error of a row exceeds this share of the squared range


async def pixel_fields(served: ServedModel, *rows: Array) -> dict[str, str]:
    """Return the field "warning" if the pixels in `rows`, each [N, D], are in another range; otherwise no field."""
    if served.manifest.pixel_range is None or not rows:
        return {}
    size = sum(x.nbytes for x in rows)
    warning = await offload.run_in_thread_if_long(partial(pixel_warning, served, *rows), size * offload.ARRAY_BYTE)
    return {} if warning is None else {"warning": warning}


def pixel_warning(served: ServedModel, *rows: Array) -> str | None:
    """Return a warning if the pixels in `rows`, each [N, D], are in another range than the model's."""
    if served.manifest.pixel_range is None or not any(x.size for x in rows):
        return None
    low = min(float(np.fmin.reduce(x, axis=None)) for x in rows if x.size)
    high = max(float(np.fmax.reduce(x, axis=None)) for x in rows if x.size)
    return served.manifest.pixel_warning(low, high)


def may_be_out_of_range(served: ServedModel, x: Array, errors: Array) -> bool:
    """Return false if it is certain that `pixel_warning` has nothing to say about rows x [N, D].

    This takes less than a microsecond for one row; finding the smallest and the largest value takes several.

    Args:
        errors: mean squared reconstruction errors, [N]. If pixels are far out of range, at least one is large.
    """
    pixel_range = served.manifest.pixel_range
    if pixel_range is None:
        return False
    span = pixel_range[1] - pixel_range[0]
    largest = errors[0] if len(errors) == 1 else errors.max(initial=0.0)
    if not largest <= LARGE_ERROR * span * span:
        return True
    # Pixels can be too dark only for a model with a wide range, and the mean square of dark pixels is small.
    return span >= WIDE_SPAN and float(np.vdot(x, x)) <= x.size * (abs(pixel_range[0]) + span / DARK_SHARE) ** 2
