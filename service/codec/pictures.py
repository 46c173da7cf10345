"""PNG and JPEG pictures in request bodies. A picture is one row of a model of images.

A picture is converted like the images of a folder in training (training/data/readers/images.py): rotated as its EXIF
data specify, blended with white where it is transparent, converted to grey or colour, cropped and resized. For a model
of images of more than 8 bits, a picture of 16 bits keeps its values.
"""

import io
import struct
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from models.pixels import has_deep_pixels
from service.errors import InvalidPicture

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG"}  # Pillow's name of each media type
MEDIA_TYPES = tuple(FORMATS)
DEEPEST = 65535  # the largest value of 16 bits
MAX_PIXELS = 1 << 22  # a few hundred bytes can describe a picture of gigabytes


class PictureRow(NamedTuple):
    """The row that a model of images takes."""

    shape: Sequence[int]  # [H, W], [H, W, 1] or [H, W, 3]
    pixel_range: tuple[float, float]  # the raw values of black and white


def loads(body: bytes, media_type: str, row: PictureRow) -> npt.NDArray[np.float32]:
    """Return the picture in `body` as rows [1, D] in raw units. Raises InvalidPicture."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF data, and about sizes that are refused below
            with Image.open(io.BytesIO(body), formats=(FORMATS[media_type],)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise InvalidPicture(
                        f"the picture has {image.width} x {image.height} pixels",
                        expected=f"at most {MAX_PIXELS} pixels",
                        got=str(image.width * image.height),
                        hint=f"make the picture smaller: the model takes {row.shape[1]} x {row.shape[0]} pixels",
                    )
                deep = image.mode.startswith("I")  # 16 bits per pixel
                levels = _levels(image, row)  # [H, W] or [H, W, 3], from 0 to 1
    # Pillow raises these for damaged files and for damaged EXIF data.
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, struct.error) as error:
        raise _not_a_picture(media_type) from error
    except Image.DecompressionBombError as error:
        raise InvalidPicture("the picture has too many pixels", expected=f"at most {MAX_PIXELS} pixels") from error
    black, white = row.pixel_range
    if has_deep_pixels(row.pixel_range) and deep:
        return np.asarray(levels.reshape(1, -1) * DEEPEST, np.float32)  # the values of the file
    return np.asarray(black + levels.reshape(1, -1) * (white - black), np.float32)


def _not_a_picture(media_type: str) -> InvalidPicture:
    name = FORMATS[media_type]
    return InvalidPicture(
        f"the body is not a {name} picture, or it is damaged",
        expected=f"a {name} picture",
        hint="send the file itself as the body, with the Content-Type of its format",
    )


def _levels(image: "Image.Image", row: PictureRow) -> npt.NDArray[np.float64]:
    """Return the levels of the picture, from 0 (black) to 1 (white), in the shape of the row."""
    from PIL import Image, ImageOps

    in_colour = len(row.shape) == 3 and row.shape[2] == 3
    size = (row.shape[1], row.shape[0])
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits per pixel
        deep = Image.fromarray(np.asarray(upright, np.float32) / DEEPEST)
        grey = np.asarray(_fit(deep, size), np.float64).clip(0, 1)
        return np.repeat(grey[:, :, None], 3, axis=2) if in_colour else grey
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return np.asarray(_fit(upright.convert("RGB" if in_colour else "L"), size)) / 255.0


def _fit(image: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    """Return the picture cropped around its centre and resized, or the picture itself if it has this size."""
    from PIL import Image, ImageOps

    return image if image.size == size else ImageOps.fit(image, size, Image.Resampling.LANCZOS)
