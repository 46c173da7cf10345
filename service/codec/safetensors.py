"""The safetensors format: eight bytes for the size of a JSON header, the header, the tensors as they lie in memory.

Read by hand: the library copies every tensor, and this needs a JSON object and a view of the body. As there, nothing in
the file is believed before it is checked: names, types, shapes, that each tensor has the bytes that its shape needs,
and that all together are the whole body, without gaps and overlaps.

Format: https://huggingface.co/docs/safetensors
"""

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from service.errors import InvalidSafetensors

MEDIA_TYPE = "application/x-safetensors"
MAX_HEADER = 4096  # bytes; one tensor takes 70
MAX_DIMENSIONS = 8
_SIZE = struct.Struct("<Q")
_METADATA = "__metadata__"
_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1",
}  # fmt: skip


def loads(body: bytes, name: str) -> npt.NDArray[Any]:
    """The tensor in `body`, which must be the only one and be called `name`; not copied unless it is BF16.

    Raises InvalidSafetensors.
    """
    header, start = _header(body)
    tensors = {key: value for key, value in header.items() if key != _METADATA}
    if list(tensors) != [name]:
        got = ", ".join(map(str, tensors))[:200] or "none"
        raise InvalidSafetensors(
            f"expected one tensor called {name}, got {got}", pointer="", expected=name, got=got,
            hint=f'save_file({{"{name}": rows}}, path)',
        )  # fmt: skip
    dtype, shape = _described(tensors[name])
    needed, present = math.prod(shape) * np.dtype(_TYPES[dtype]).itemsize, len(body) - start
    if needed != present or tensors[name].get("data_offsets") != [0, needed]:
        raise InvalidSafetensors(
            f"the header says shape {shape} of {dtype}, which is {needed} bytes, but {present} follow",
            expected=f"{needed} bytes at data_offsets [0, {needed}]",
            got=f"{present} bytes at data_offsets {str(tensors[name].get('data_offsets'))[:40]}",
            hint="the file may be cut off: send it whole",
        )
    array = np.frombuffer(body, _TYPES[dtype], math.prod(shape), start).reshape(shape)
    if dtype == "BF16":  # the upper half of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def dumps(arrays: Mapping[str, npt.NDArray[np.float32]], metadata: Mapping[str, str]) -> bytes:
    """`arrays` as F32 tensors, with `metadata`."""
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    parts, end = [], 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": (start, end)}
        parts.append(np.ascontiguousarray(array, "<f4").data)
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)  # so that the tensors begin where a reader can use them in place
    return b"".join([_SIZE.pack(len(text)), text, *parts])


def _header(body: bytes) -> tuple[dict[str, Any], int]:
    """The header, an object whose values are objects, and where the tensors begin."""
    size = _SIZE.unpack_from(body)[0] if len(body) >= _SIZE.size else 0
    start = _SIZE.size + size
    if 0 < size <= MAX_HEADER and start <= len(body):
        try:
            header = orjson.loads(body[_SIZE.size : start])
        except orjson.JSONDecodeError:
            header = None
        if isinstance(header, dict) and all(isinstance(value, dict) for value in header.values()):
            return header, start
    raise InvalidSafetensors(
        "the body has no valid safetensors header",
        expected=f"a safetensors file with a header of at most {MAX_HEADER} bytes",
        hint="write it with safetensors.numpy.save",
    )


def _described(tensor: Mapping[str, Any]) -> tuple[str, list[int]]:
    """Its type and its shape."""
    dtype, shape = tensor.get("dtype"), tensor.get("shape")
    if not isinstance(dtype, str) or dtype not in _TYPES:
        known = ", ".join(_TYPES)
        raise InvalidSafetensors(f"the tensor holds {str(dtype)[:40]}", expected=f"one of {known}", got=str(dtype)[:40])
    plain = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    if not plain or not all(type(length) is int and 0 <= length < 2**40 for length in shape or ()):
        raise InvalidSafetensors(
            f"the tensor's shape is {str(shape)[:80]}", expected="a list of lengths", got=str(shape)[:80]
        )
    return dtype, list(shape or ())
