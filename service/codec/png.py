"""Rows of an image model as one PNG picture: a grid, magnified so that a person sees the pixels."""

import io
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MEDIA_TYPE = "image/png"
TILE = 64  # pixels: a smaller image is magnified to at least this
WIDEST = 2048  # pixels: beyond this width nothing is magnified
COLOURS = (1, 3)
GAP, GAP_GREY = 2, 96  # pixels between images, and their colour


def is_picture(shape: Sequence[int], pixel_range: tuple[float, float] | None) -> bool:
    """Whether rows of `shape` can be shown: [H, W], [H, W, 1] or [H, W, 3]."""
    flat = len(shape) == 2
    return pixel_range is not None and (flat or (len(shape) == 3 and shape[2] in COLOURS))


def dumps(
    rows: npt.NDArray[np.float32], shape: Sequence[int], pixel_range: tuple[float, float], columns: int | None = None
) -> bytes:
    """Rows [N, D] as a grid, row by row; `columns` wide, by default as square as it gets.

    pixel_range: the raw values of black and of white; what lies beyond is black or white.
    """
    from PIL import Image

    columns = columns or math.ceil(math.sqrt(len(rows)))
    lines = math.ceil(len(rows) / columns)
    tiles = _tiles(rows, shape, pixel_range, columns)  # [N, h, w, C]
    missing = lines * columns - len(tiles)
    tiles = np.pad(tiles, ((0, missing), (0, GAP), (0, GAP), (0, 0)), constant_values=GAP_GREY)
    _, height, width, colours = tiles.shape
    grid = tiles.reshape(lines, columns, height, width, colours).swapaxes(1, 2)
    picture = grid.reshape(lines * height, columns * width, colours)[:-GAP, :-GAP]
    file = io.BytesIO()
    Image.fromarray(picture if colours == 3 else picture[:, :, 0]).save(file, "PNG")
    return file.getvalue()


def _tiles(
    rows: npt.NDArray[np.float32], shape: Sequence[int], pixel_range: tuple[float, float], columns: int
) -> npt.NDArray[np.uint8]:
    black, white = pixel_range
    grey = ((rows - black) / (white - black)).clip(0.0, 1.0) * 255.0  # [N, D]
    height, width = shape[0], shape[1]
    images = grey.round().astype(np.uint8).reshape(len(rows), height, width, -1)
    scale = max(1, min(math.ceil(TILE / max(height, width)), (WIDEST // columns - GAP) // width))
    return images.repeat(scale, axis=1).repeat(scale, axis=2)
