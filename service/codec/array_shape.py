"""Check the shape that the header of an npy or safetensors body states, before numpy sees it."""

import math
from collections.abc import Sequence

MAX_DIMENSIONS = 8  # rows of images have 4
_MAX_NUMBERS = 2**60  # numpy counts bytes in signed 64-bit integers, and a number has up to 8 bytes


def is_possible(shape: Sequence[object]) -> bool:
    """Return whether numpy can create an array of this shape.

    If one length is 0, the array has no numbers, but numpy still refuses it if the product of the other lengths is too
    large.
    """
    lengths = [length for length in shape if type(length) is int and length >= 0]  # bool is a subclass of int
    is_valid = len(lengths) == len(shape) <= MAX_DIMENSIONS
    return is_valid and math.prod(length or 1 for length in lengths) <= _MAX_NUMBERS
