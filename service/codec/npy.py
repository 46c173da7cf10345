"""The .npy format, versions 1 and 2, for real numbers.

The reader refuses pickled objects, long headers, and bodies whose size differs from the size that the header states.
"""

import io
import math
import tokenize
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from service.codec.array_shape import is_possible
from service.errors import InvalidNpy

MEDIA_TYPE = "application/x-npy"
MAX_HEADER_BYTES = 4096  # most headers have 128 bytes
_HEADER_READERS = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}


def loads(body: bytes) -> npt.NDArray[Any]:
    """Return the array in `body`, of any real dtype and byte order, as a view of `body`. Raises InvalidNpy."""
    shape, fortran_order, dtype, offset = _parse_header(_header_bytes(body))
    if dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise InvalidNpy(
            f"the array has dtype {dtype}", expected="float16, float32, float64 or integers", got=str(dtype)
        )
    if not is_possible(shape):
        got = str(list(shape))[:80]
        raise InvalidNpy(f"the header states the shape {got}, which is not possible", expected="[N, D]", got=got)
    count = math.prod(shape)
    needed, present = count * dtype.itemsize, len(body) - offset
    if needed != present:
        raise InvalidNpy(
            f"the header states shape {list(shape)} of {dtype}, which is {needed} bytes, but {present} bytes follow it",
            expected=f"{needed} bytes",
            got=f"{present} bytes",
            hint="the file may be cut off: send the whole file",
        )
    return np.frombuffer(body, dtype, count, offset).reshape(shape, order="F" if fortran_order else "C")


def dumps(array: npt.NDArray[np.float32]) -> bytes:
    """Return `array` as an .npy file of version 1.0."""
    return b"".join(parts(array))


def parts(array: npt.NDArray[np.float32]) -> tuple[bytes | memoryview, ...]:
    """Return the parts of the file that `dumps` returns. The numbers of a C-ordered array are not copied."""
    if array.flags.c_contiguous and array.size:
        return _header_for(array.shape, array.dtype.str), array.data.cast("B")
    file = io.BytesIO()
    npy_format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return (file.getvalue(),)


@lru_cache(maxsize=256)
def _header_for(shape: tuple[int, ...], dtype: str) -> bytes:
    """Return the bytes before the numbers of a C-ordered array. They are cached, because few different shapes occur."""
    file = io.BytesIO()
    npy_format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def _header_bytes(body: bytes) -> bytes:
    """Return the bytes before the numbers in `body`; fewer bytes if `body` is cut off or the header is too long."""
    length_bytes = 2 if body[6:7] == b"\x01" else 4
    start = 8 + length_bytes
    return body[: start + min(int.from_bytes(body[8:start], "little"), 2 * MAX_HEADER_BYTES)]


@lru_cache(maxsize=64)  # numpy parses the header as a Python literal, which is slow
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return the shape, whether the array is in Fortran order, the dtype, and the offset of the numbers.

    Raises InvalidNpy.
    """
    file = io.BytesIO(header)
    try:
        version = npy_format.read_magic(file)
        return (*_HEADER_READERS[version](file, max_header_size=MAX_HEADER_BYTES), file.tell())
    except KeyError:
        got = f"version {version[0]}.{version[1]}"
        raise InvalidNpy(f"npy {got} is not supported", expected="version 1.0 or 2.0", got=got) from None
    # numpy parses the header with Python's parser, and does not catch the errors that the parser raises.
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError, UserWarning) as error:
        raise InvalidNpy(
            "the npy header is not valid",
            expected=f"an .npy file with a header of at most {MAX_HEADER_BYTES} bytes",
            hint="write it with numpy.save(file, array, allow_pickle=False)",
        ) from error
