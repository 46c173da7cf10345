"""The .npy format, version 1 and 2, of real numbers: no pickle, a bounded header, exactly as many bytes as it says."""

import io
import math
import tokenize
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy_format

from service.errors import InvalidNpy

MEDIA_TYPE = "application/x-npy"
MAX_HEADER = 4096  # bytes; 128 is usual
_HEADER_READERS = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}


def loads(body: bytes) -> npt.NDArray[Any]:
    """The array in `body`, of a real dtype, any byte order; C-ordered bodies are not copied. Raises InvalidNpy."""
    shape, fortran, dtype, offset = _header(_head(body))
    if dtype.kind not in "fiu" or dtype.itemsize > 8:
        raise InvalidNpy(f"the array holds {dtype}", expected="float16, 32, 64 or integers", got=str(dtype))
    count = math.prod(shape)
    needed, present = count * dtype.itemsize, len(body) - offset
    if needed != present or min(shape, default=0) < 0:
        raise InvalidNpy(
            f"the header says shape {list(shape)} of {dtype}, which is {needed} bytes, but {present} follow",
            expected=f"{needed} bytes",
            got=f"{present} bytes",
            hint="the file may be cut off: send it whole",
        )
    return np.frombuffer(body, dtype, count, offset).reshape(shape, order="F" if fortran else "C")


def dumps(array: npt.NDArray[np.float32]) -> bytes:
    """`array` as a version 1.0 file."""
    if array.flags.c_contiguous and array.size:
        return b"".join((_head_for(array.shape, array.dtype.str), array.data.cast("B")))
    file = io.BytesIO()
    npy_format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return file.getvalue()


@lru_cache(maxsize=256)
def _head_for(shape: tuple[int, ...], dtype: str) -> bytes:
    """The bytes before those of a C-ordered array: clients send and get the same few shapes."""
    file = io.BytesIO()
    npy_format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def _head(body: bytes) -> bytes:
    """The bytes of `body` before its numbers, as far as it has them."""
    width = 2 if body[6:7] == b"\x01" else 4
    start = 8 + width
    return body[: start + min(int.from_bytes(body[8:start], "little"), 2 * MAX_HEADER)]


@lru_cache(maxsize=64)  # numpy evaluates it as a Python literal
def _header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether in Fortran's order, dtype, and where the numbers begin. Raises InvalidNpy."""
    file = io.BytesIO(head)
    try:
        version = npy_format.read_magic(file)
        return (*_HEADER_READERS[version](file, max_header_size=MAX_HEADER), file.tell())
    except KeyError:
        raise InvalidNpy(f"npy version {version[0]}.{version[1]}", expected="version 1.0 or 2.0") from None
    # numpy evaluates the header as a Python literal, whose own errors come through
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError, UserWarning) as error:
        raise InvalidNpy(
            "the body has no valid npy header",
            expected=f"an .npy file with a header of at most {MAX_HEADER} bytes",
            hint="write it with numpy.save(file, array, allow_pickle=False)",
        ) from error
