"""A folder of pictures: one a row, in grey or colour, values from 0 to 255."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.data.readers.source import Array, Block, RawTable, ReadOptions
from training.data.row_store import rows_per_block
from training.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
GREY = {"1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N"}
COLOUR = {"P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"}
TOGETHER = 64  # pictures that are decoded before they are handed on


def read_images(path: Path, request: ReadOptions) -> RawTable:
    """Every picture in the folder, or in its sub-folders, whose names then are the labels.

    A row is [H, W] where all are grey, else [H, W, 3]. Pictures are turned as their EXIF data say; the first frame of
    several counts; what is transparent is laid on white; 16 bits become 8. Raises DataError.
    """
    if request.drop:
        raise DataError(f"{path} is a folder of pictures and has no columns: leave --drop out")
    found = _found(path)
    with ThreadPoolExecutor() as pool:
        facts = set(pool.map(_facts, found.files))
    colour, transparent = any(c for c, _ in facts), any(t for _, t in facts)
    height, width, colour = _shape(found.files[0], request, colour)
    shape = (height, width, 3) if colour else (height, width)
    resize = request.size is not None or request.shape is not None
    notes = [f"{found.others} files are no pictures and are left out"] if found.others else []
    if transparent:
        notes.append("some pictures are transparent: they are laid on white")
    black, white = request.pixel_range or (0.0, 255.0)
    as_they_are = (black, white) == (0.0, 255.0)
    blocks = _blocks(found, partial(_pixels, first=found.files[0], shape=shape, resize=resize))
    return RawTable(
        blocks if as_they_are else _rescaled(blocks, black, white),
        shape,
        np.dtype(np.uint8 if as_they_are else np.float32),
        rows=len(found.files),
        pixel_range=(black, white),
        label_names=found.folders,
        notes=notes,
    )


@dataclass(frozen=True)
class _Found:
    files: list[Path]
    labels: list[int] | None
    folders: list[str] | None
    others: int  # files that are no pictures


def _found(path: Path) -> _Found:
    inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    here = [entry for entry in inside if _is_picture(entry)]
    others = sum(entry.is_file() for entry in inside) - len(here)
    below: dict[str, list[Path]] = {}
    for folder in (entry for entry in inside if entry.is_dir()):
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_file())
        if pictures := [entry for entry in entries if _is_picture(entry)]:
            below[folder.name] = pictures
        others += len(entries) - len(pictures)
    if here and below:
        both = f"pictures ({here[0].name}) and folders of them ({next(iter(below))})"
        raise DataError(f"{path} holds {both}: expected one or the other")
    if here:
        return _Found(here, None, None, others)
    if not below:
        raise DataError(f"{path} has no pictures: expected {', '.join(SUFFIXES)} in it or its folders")
    labels = [label for label, files in enumerate(below.values()) for _ in files]
    return _Found([file for files in below.values() for file in files], labels, list(below), others)


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _opened(path: Path) -> "Image.Image":
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path} unpacks to more pixels than is safe: remove it, or make it smaller") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise _damaged(path) from error
    if Image.MAX_IMAGE_PIXELS and math.prod(image.size) > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise DataError(f"{path} unpacks to more pixels than is safe: remove it, or make it smaller")
    return image


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is damaged or no picture: remove it")


def _facts(path: Path) -> tuple[bool, bool]:
    """Whether the picture at `path` has colour, and whether it has transparency, by its header."""
    with _opened(path) as image:
        if image.mode not in GREY | COLOUR:
            raise DataError(f"{path} has pixels of mode {image.mode}: expected 8 or 16 bits a channel; convert it")
        colour = image.mode in COLOUR
        if image.mode in ("P", "PA") and (palette := image.getpalette("RGB")):
            colour = not palette[0::3] == palette[1::3] == palette[2::3]
        return colour, image.has_transparency_data


def _shape(first: Path, request: ReadOptions, colour: bool) -> tuple[int, int, bool]:
    """Height, width and whether in colour: as demanded, else as in the first picture."""
    if request.shape is not None:
        if len(request.shape) == 2 or (len(request.shape) == 3 and request.shape[2] == 3):
            return request.shape[0], request.shape[1], len(request.shape) == 3
        raise DataError(f"{first.parent} holds pictures: expected rows of shape {list(request.shape)}, as the model's")
    if request.size is not None:
        return *request.size, colour
    height, width = _pixels(first, first, None, resize=False).shape[:2]
    return height, width, colour


def _pixels(path: Path, first: Path, shape: tuple[int, ...] | None, resize: bool) -> Array:
    """uint8 [H, W] or [H, W, 3], as `shape` says; as it is where there is none."""
    from PIL import Image, ImageOps

    with _opened(path) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            upright = upright.convert("RGB" if shape is not None and len(shape) == 3 else "L")
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise _damaged(path) from error
    if shape is None:
        return np.asarray(upright)
    size = (shape[1], shape[0])
    if resize:
        upright = ImageOps.fit(upright, size, Image.Resampling.LANCZOS)
    elif upright.size != size:
        raise DataError(
            f"{first} is {shape[0]}x{shape[1]} (height x width) and {path} {upright.height}x{upright.width}: expected "
            f"pictures of one size; add --size {min(shape[0], upright.height)}x{min(shape[1], upright.width)} to resize"
        )
    return np.asarray(upright)


def _blocks(found: _Found, pixels: "partial[Array]") -> Iterator[Block]:
    width = math.prod(pixels.keywords["shape"])
    step = min(TOGETHER, rows_per_block(width))
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(found.files), step):
            rows = list(pool.map(pixels, found.files[start : start + step]))
            labels = None if found.labels is None else np.array(found.labels[start : start + step])
            yield np.stack(rows).reshape(len(rows), -1), labels


def _rescaled(blocks: Iterator[Block], black: float, white: float) -> Iterator[Block]:
    for values, labels in blocks:
        yield black + values.astype(np.float64) / 255.0 * (white - black), labels
