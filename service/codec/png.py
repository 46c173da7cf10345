"""PNG images of rows: a grid with one tile per row. Small tiles are magnified so that single pixels are visible."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from models.pixels import has_deep_pixels

MEDIA_TYPE = "image/png"
TILE = 64  # in pixels; a tile is magnified if its longer side is shorter than this
MAX_WIDTH = 2048  # maximum width of a grid with magnified tiles, in pixels
CHANNELS = (1, 3)
GAP = 2  # number of pixels between tiles
GAP_GREY = 96  # grey level of the gaps, from 0 to 255


def is_image(shape: Sequence[int], pixel_range: tuple[float, float] | None) -> bool:
    """Return whether rows are images: `shape` is [H, W], [H, W, 1] or [H, W, 3], and there is a `pixel_range`."""
    is_grey = len(shape) == 2
    return pixel_range is not None and (is_grey or (len(shape) == 3 and shape[2] in CHANNELS))


def dumps(
    rows: npt.NDArray[np.float32], shape: Sequence[int], pixel_range: tuple[float, float], columns: int | None = None
) -> bytes:
    """Return the rows as one PNG image, a grid that is filled line by line.

    Args:
        rows: [N, D] in raw units.
        shape: the shape of one row.
        pixel_range: the raw values of black and of white; values beyond them are clipped.
        columns: tiles per line of the grid; by default the grid is as square as possible.
    """
    from PIL import Image

    columns = columns or math.ceil(math.sqrt(len(rows)))
    line_count = math.ceil(len(rows) / columns)
    tiles = _tiles(rows, shape, pixel_range, columns)  # [N, h, w, C]
    missing = line_count * columns - len(tiles)
    gap = round(pixel_range[1] * GAP_GREY / 255) if tiles.dtype == np.uint16 else GAP_GREY
    tiles = np.pad(tiles, ((0, missing), (0, GAP), (0, GAP), (0, 0)), constant_values=gap)
    _, height, width, channels = tiles.shape
    lines = tiles.reshape(line_count, columns, height, width, channels).swapaxes(1, 2)
    grid = lines.reshape(line_count * height, columns * width, channels)[:-GAP, :-GAP]
    file = io.BytesIO()
    Image.fromarray(grid if channels == 3 else grid[:, :, 0]).save(file, "PNG")
    return file.getvalue()


def _tiles(
    rows: npt.NDArray[np.float32], shape: Sequence[int], pixel_range: tuple[float, float], columns: int
) -> npt.NDArray[Any]:
    """Return the rows as magnified tiles, [N, h, w, C].

    If grey images have more than 8 bits, their tiles have 16 bits and keep the values of the rows. No depth is lost,
    and the PNG can be sent back as a picture. Pillow cannot write colours of 16 bits.
    """
    black, white = pixel_range
    height, width = shape[0], shape[1]
    deep = has_deep_pixels(pixel_range) and math.prod(shape) == height * width
    largest, dtype = (white, np.dtype(np.uint16)) if deep else (255.0, np.dtype(np.uint8))
    grey = ((rows - black) / (white - black)).clip(0.0, 1.0) * largest  # [N, D]
    tiles = grey.round().astype(dtype).reshape(len(rows), height, width, -1)
    scale = max(1, min(math.ceil(TILE / max(height, width)), (MAX_WIDTH // columns - GAP) // width))
    return tiles.repeat(scale, axis=1).repeat(scale, axis=2)
