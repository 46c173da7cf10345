"""What the dimensions of an array [N, ...] mean: images, or series whose channels have ranges of their own.

Images share one range of values, from black to white. If measurements of different scales shared one range, a fault in
a channel with small values would be invisible.
"""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from training.errors import DataError

Layout = Literal["nhwc", "nchw", "ntc", "flat"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
PIXEL_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))  # the usual values of black and white
CHANNELS = (1, 3, 4)  # usual numbers of channels of an image
MIN_SIDE = 5  # a shorter axis may be something other than the height or the width of an image
SMALL_RANGE = 0.1  # a channel is small if its range is at most this share of the range of all channels
MAX_CHANNELS = 16  # more channels than this may instead be the rows or columns of an image
MANY_SMALL = 0.5  # if at least this share of the channels is small, they are not the rows or columns of an image

Doubles = npt.NDArray[np.float64]


def arrange(shape: tuple[int, ...], layout: str | None, source: str) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return the shape of a row in `layout`, and the order of the axes of [N, ...] if they must be moved.

    Args:
        shape: the shape of a row in the source.
        layout: None to keep the shape.

    Raises:
        DataError: rows of this shape cannot have that layout.
    """
    if layout == "flat":
        return (int(np.prod(shape)),), None
    if layout is not None and (len(shape) < 2 or (layout == "nchw" and len(shape) != 3)):
        expected = "[N, C, H, W]" if layout == "nchw" else "an array of three or more dimensions"
        raise DataError(f"{source}: --layout {layout} needs {expected}, got {['N', *shape]}: leave --layout out")
    if layout == "nchw":
        return (*shape[1:], shape[0]), (0, 2, 3, 1)
    return shape, None


def recognise(shape: tuple[int, ...], dtype: np.dtype[np.generic], low: Doubles, high: Doubles) -> Layout:
    """Return the layout of rows of `shape`, which has two or more dimensions.

    Args:
        dtype: the type of the values in the source.
        low: the smallest value of each feature, [D].
        high: the largest value of each feature, [D].
    """
    low, high = low.reshape(shape), high.reshape(shape)
    if len(shape) == 2 and min(shape) < MIN_SIDE and max(shape) > 2 * min(shape):
        return "ntc"  # no image is so narrow
    channels_first = _may_have_channels_first(shape)
    if dtype != np.uint8:
        different = any(
            _have_different_ranges(low, high, axis, _may_be_side_of_image(shape, axis, channels_first))
            for axis in {0, len(shape) - 1}
        )
        if different or not _can_be_pixels(low, high):
            return "ntc"
    return "nchw" if channels_first else "nhwc"


def _may_have_channels_first(shape: tuple[int, ...]) -> bool:
    """Return whether `shape` may be [C, H, W] and is not the usual shape of an image with its channels last."""
    if len(shape) != 3 or shape[2] in CHANNELS or shape[0] >= min(shape[1:]) or min(shape[1:]) < MIN_SIDE:
        return False
    return shape[0] in CHANNELS or (shape[0] <= MAX_CHANNELS and shape[1] == shape[2])


def _may_be_side_of_image(shape: tuple[int, ...], axis: int, channels_first: bool) -> bool:
    """Return whether `axis` may be the height or width of an image. A short axis beside a much longer one cannot."""
    count, longest = shape[axis], max(shape)
    if len(shape) > 2 and (axis == 0) == channels_first:
        return False
    return count > MAX_CHANNELS or (count >= MIN_SIDE and longest <= 2 * count)


def _can_be_pixels(low: Doubles, high: Doubles) -> bool:
    """Return whether all values are in a usual range of pixels, or none is negative, or all are whole numbers."""
    least, most = float(np.nanmin(low)), float(np.nanmax(high))
    usual = any(black <= least and most <= white for black, white in PIXEL_RANGES)
    whole = bool(np.array_equal(low, np.rint(low)) and np.array_equal(high, np.rint(high)))
    return usual or least >= 0 or whole


def _have_different_ranges(low: Doubles, high: Doubles, axis: int, may_be_columns: bool) -> bool:
    """Return whether the channels along `axis` are measurements of different scales.

    Args:
        may_be_columns: whether the channels may be the rows or columns of an image. If so, a few small channels
            count only if they lie between large ones: the outer columns of an image are often nearly empty.
    """
    others = tuple(other for other in range(low.ndim) if other != axis)
    low, high = np.nanmin(low, axis=others), np.nanmax(high, axis=others)  # [C], [C]
    varying = high > low
    if varying.sum() < 2:
        return False
    small = (high - low <= SMALL_RANGE * (high[varying].max() - low[varying].min()))[varying]
    if not may_be_columns:
        return bool(small.any())
    large = np.flatnonzero(~small)
    between = small[large[0] : large[-1]].any() if len(large) else False
    return bool(between) or float(small.mean()) >= MANY_SMALL
