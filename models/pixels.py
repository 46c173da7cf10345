"""The values of pixels: one rule for folders of images, for pictures in requests, and for PNG responses."""

DEEP_WHITES = frozenset(2.0**bits - 1 for bits in range(9, 17))  # the largest values of images of 9 to 16 bits


def has_deep_pixels(pixel_range: tuple[float, float]) -> bool:
    """Return whether raw values are those of grey images of more than 8 bits, from 0 to 2^bits - 1."""
    black, white = pixel_range
    return black == 0 and white in DEEP_WHITES
