"""Read a folder of images, one per row, in grey or in colour.

Values are from 0 to 255. Grey images of 16 bits keep their values, from 0 to 65535.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from models.pixels import has_deep_pixels
from training.data.readers.raw_table import Array, Block, BlockDetails, RawTable, ReadOptions
from training.data.row_store import rows_per_block
from training.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
GREY_MODES = {"1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N"}
COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"}
MAX_BLOCK_IMAGES = 64  # maximum number of images per block


def read_images(path: Path, options: ReadOptions) -> RawTable:
    """Return the images in the folder `path`. If the images are in sub-folders, each sub-folder is a label.

    A row is [H, W] if all images are grey, else [H, W, 3]. Images are rotated as their EXIF data specify. For an
    animation, the first frame is used. Transparent pixels are blended with white.

    If all images are grey and have 16 bits, they keep their values. The range of pixels is then unknown, because many
    cameras use fewer bits. For a model of such images, images of 8 bits are scaled to its range. Among images
    of 8 bits, those of 16 bits are scaled to 255 and keep fractions. Colour channels of 16 bits become 8-bit ones.

    Raises:
        DataError: the folder has no images, an image is damaged, or images differ in size and the options set no size.
    """
    if options.drop:
        raise DataError(f"{path} is a folder of images and has no columns to drop: leave --drop out")
    folder = _list_images(path)
    first = folder.files[0]
    details = BlockDetails()
    faults = details.faults if options.tolerant else None
    with ThreadPoolExecutor() as pool:
        modes = set(pool.map(partial(_read_mode, tolerant=options.tolerant), folder.files))
    shape = _row_shape(first, options, any(mode.colour for mode in modes))
    resize = options.size is not None or options.shape is not None
    notes = [f"{folder.others} files are not images and are ignored"] if folder.others else []
    if any(mode.transparent for mode in modes):
        notes.append("some images are transparent: they are blended with a white background")
    pixel_range = options.pixel_range or (0.0, 255.0)
    keeps_values = all(mode.deep for mode in modes) if options.pixel_range is None else has_deep_pixels(pixel_range)
    keeps_values = keeps_values and len(shape) == 2
    any_deep = any(mode.deep for mode in modes)
    exact = keeps_values or pixel_range != (0.0, 255.0) or any_deep
    if any(mode.shallow_copy for mode in modes):
        notes.append("some images have 16 bits per channel: they are read with 8 bits")
    if any_deep and not keeps_values and options.pixel_range is None:
        notes.append("some images have 16 bits and others 8: 65535 is read as 255, and fractions are kept")
    white = pixel_range[1] if keeps_values else 255.0
    read_pixels = partial(_read_pixels, first=first, shape=shape, resize=resize, keeps_values=keeps_values, white=white)
    blocks = _blocks(folder, read_pixels, math.prod(shape), faults)
    dtype: np.dtype[Any] = np.dtype(np.float32 if exact else np.uint8)
    if keeps_values and options.pixel_range is None:
        dtype = np.dtype(np.uint16)
    if exact and not keeps_values:
        blocks = _rescaled(blocks, *pixel_range)
    return RawTable(
        blocks=blocks,
        shape=shape,
        dtype=dtype,
        rows=len(folder.files),
        pixel_range=None if dtype == np.uint16 else pixel_range,
        label_names=folder.label_names,
        details=details,
        notes=notes,
    )


@dataclass(frozen=True)
class _ImageFolder:
    files: list[Path]
    labels: list[int] | None
    label_names: list[str] | None
    others: int  # number of files that are not images


def _list_images(path: Path) -> _ImageFolder:
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    images = [entry for entry in entries if _is_image(entry)]
    others = sum(entry.is_file() for entry in entries) - len(images)
    by_folder: dict[str, list[Path]] = {}
    for folder in (entry for entry in entries if entry.is_dir()):
        files = sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_file())
        if found := [file for file in files if _is_image(file)]:
            by_folder[folder.name] = found
        others += len(files) - len(found)
    if images and by_folder:
        raise DataError(
            f"{path} contains images ({images[0].name}) and folders of images ({next(iter(by_folder))}): "
            "expected one or the other; move the images into a folder, or the folders elsewhere"
        )
    if images:
        return _ImageFolder(images, None, None, others)
    if not by_folder:
        raise DataError(f"{path} has no images: expected {', '.join(SUFFIXES)} in it or its folders")
    labels = [label for label, files in enumerate(by_folder.values()) for _ in files]
    return _ImageFolder([file for files in by_folder.values() for file in files], labels, list(by_folder), others)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _open_image(path: Path) -> "Image.Image":
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise _damaged(path) from error
    if Image.MAX_IMAGE_PIXELS and math.prod(image.size) > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise _too_large(path)
    return image


def _too_large(path: Path) -> DataError:
    return DataError(f"{path} has more pixels than is safe to decode: remove it, or make it smaller")


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is damaged or not an image: remove it, or save it again")


class _Mode(NamedTuple):
    """What the header of an image says about its pixels."""

    colour: bool
    transparent: bool
    deep: bool  # grey, opaque, 16 bits
    shallow_copy: bool  # 16 bits per channel, of which Pillow reads only 8


def _read_mode(path: Path, tolerant: bool) -> _Mode:
    """Return the mode of the image at `path`. Only the header is read.

    Args:
        tolerant: whether an unreadable image counts as grey and opaque instead of raising DataError.
    """
    try:
        image = _open_image(path)
    except DataError:
        if tolerant:
            return _Mode(False, False, False, False)
        raise
    with image:
        if image.mode not in GREY_MODES | COLOUR_MODES:
            raise DataError(f"{path} has pixels of mode {image.mode}: expected 8 or 16 bits per channel; convert it")
        colour = image.mode in COLOUR_MODES
        if image.mode in ("P", "PA") and (palette := image.getpalette("RGB")):
            colour = not palette[0::3] == palette[1::3] == palette[2::3]
        transparent = image.has_transparency_data
        deep = image.mode.startswith("I;16") and not transparent
        return _Mode(colour, transparent, deep, not deep and _has_16_bits(image))


def _has_16_bits(image: "Image.Image") -> bool:
    """Return whether the channels of the file have 16 bits, even if Pillow reads only 8 of them."""
    return any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))  # the tile names the format in the file


def _row_shape(first: Path, options: ReadOptions, any_colour: bool) -> tuple[int, ...]:
    """Return the shape of a row, [H, W] or [H, W, 3]. H and W come from the options, else from the first image."""
    if options.shape is not None:
        if len(options.shape) == 2 or (len(options.shape) == 3 and options.shape[2] == 3):
            return options.shape
        raise DataError(
            f"{first.parent} contains images: expected rows of shape {list(options.shape)}, as the model takes"
        )
    if options.size is not None:
        height, width = options.size
    else:
        height, width = _read_pixels(first, first, None, resize=False, keeps_values=False, white=255.0).shape[:2]
    return (height, width, 3) if any_colour else (height, width)


def _read_pixels(
    path: Path,
    first: Path,
    shape: tuple[int, ...] | None,
    *,
    resize: bool,
    keeps_values: bool,
    white: float,
) -> Array:
    """Return the pixels of one image, from 0 to `white`.

    Args:
        first: the first image of the folder, for messages.
        shape: [H, W] or [H, W, 3]; None to return a grey image in its own size.
        resize: whether an image of another size is cropped and resized; if false, such an image raises DataError.
        keeps_values: whether images of 16 bits keep their values.
        white: the largest value of an image of 8 bits.
    """
    from PIL import Image, ImageOps

    colour = shape is not None and len(shape) == 3
    with _open_image(path) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            deep = upright.mode.startswith("I;16") and not upright.has_transparency_data
            if deep:
                upright = Image.fromarray(np.asarray(upright).astype(np.float32))  # Pillow resizes no 16-bit integers
            elif upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            if not deep:
                upright = upright.convert("RGB" if colour else "L")
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise _damaged(path) from error
    if shape is not None:
        size = (shape[1], shape[0])
        if resize and upright.size != size:
            upright = ImageOps.fit(upright, size, Image.Resampling.LANCZOS)
        elif upright.size != size:
            raise DataError(
                f"{path} is {upright.height}x{upright.width} (height x width), {first} is {shape[0]}x{shape[1]}: "
                "expected images of one size; "
                f"add --size {min(shape[0], upright.height)}x{min(shape[1], upright.width)} to resize"
            )
    pixels: Array = np.asarray(upright)
    if not deep:
        return (pixels * (white / 255)).astype(np.float32) if keeps_values else pixels
    pixels = np.rint(pixels).clip(0, 65535)
    if keeps_values:
        return pixels.astype(np.uint16)
    pixels = pixels / np.float32(257)
    return np.repeat(pixels[:, :, None], 3, axis=2) if colour else pixels


def _blocks(
    folder: _ImageFolder, read_pixels: "partial[Array]", width: int, faults: dict[int, str] | None
) -> Iterator[Block]:
    """Yield the images in blocks.

    Args:
        faults: if given, an unreadable image is recorded here by row, and read as a black one. Each block replaces the
            faults of the previous one.
    """
    step = min(MAX_BLOCK_IMAGES, rows_per_block(width))

    def read(path: Path) -> Array | DataError:
        try:
            return read_pixels(path)
        except DataError as error:
            return error

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(folder.files), step):
            read_rows = list(pool.map(read, folder.files[start : start + step]))
            failed = {start + index: row for index, row in enumerate(read_rows) if isinstance(row, DataError)}
            if faults is not None:
                faults.clear()
                faults.update({row: str(error) for row, error in failed.items()})
            elif failed:
                raise next(iter(failed.values()))
            rows = [np.zeros(width, np.uint8) if isinstance(row, DataError) else row.reshape(-1) for row in read_rows]
            labels = None if folder.labels is None else np.array(folder.labels[start : start + step])
            yield np.stack(rows).reshape(len(rows), -1), labels


def _rescaled(blocks: Iterator[Block], black: float, white: float) -> Iterator[Block]:
    """Yield the blocks with their values mapped from [0, 255] to [black, white]."""
    for values, labels in blocks:
        yield black + values.astype(np.float64) / 255.0 * (white - black), labels
