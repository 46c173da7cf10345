"""The safetensors format: eight bytes with the length of the header, the JSON header, then the bytes of the tensors.

This module replaces the safetensors library, because the library copies every tensor. Like the library, the reader
checks the names, types and shapes in the header. It also checks that the tensor has as many bytes as its shape requires
and that these bytes fill the rest of the body.

Format: https://huggingface.co/docs/safetensors
"""

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from service.codec.array_shape import MAX_DIMENSIONS, is_possible
from service.codec.json_values import describe_value
from service.errors import InvalidSafetensors

MEDIA_TYPE = "application/x-safetensors"
MAX_HEADER_BYTES = 4096  # a header that describes one tensor needs only 70 bytes
_SIZE = struct.Struct("<Q")
_METADATA = "__metadata__"
_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1",
}  # fmt: skip


def loads(body: bytes, name: str) -> npt.NDArray[Any]:
    """Return the only tensor in `body` as a view of `body`. The tensor must be called `name`.

    A BF16 tensor is converted to float32, and is therefore a copy. Raises InvalidSafetensors.
    """
    header, start = _parse_header(body)
    tensors = {key: value for key, value in header.items() if key != _METADATA}
    if list(tensors) != [name]:
        got = ", ".join(map(str, tensors))[:200] or "none"
        raise InvalidSafetensors(
            f"expected one tensor called {name}, got {got}",
            pointer="",
            expected=name,
            got=got,
            hint=f'save_file({{"{name}": rows}}, path)',
        )
    dtype, shape = _type_and_shape(tensors[name])
    needed = math.prod(shape) * np.dtype(_TYPES[dtype]).itemsize
    present = len(body) - start
    offsets = tensors[name].get("data_offsets")
    offsets = offsets if isinstance(offsets, list) else [offsets]
    if needed != present or offsets != [0, needed] or not all(type(offset) is int for offset in offsets):
        raise InvalidSafetensors(
            f"the header states shape {shape} of {dtype}, which is {needed} bytes, but {present} bytes follow it",
            expected=f"{needed} bytes at data_offsets [0, {needed}]",
            got=f"{present} bytes at data_offsets [{', '.join(map(describe_value, offsets[:3]))}]",
            hint="the file may be cut off: send the whole file",
        )
    array = np.frombuffer(body, _TYPES[dtype], math.prod(shape), start).reshape(shape)
    if dtype == "BF16":  # a BF16 number is the upper 16 bits of a float32
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def dumps(arrays: Mapping[str, npt.NDArray[np.float32]], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors file that contains `metadata`, and `arrays` as F32 tensors."""
    return b"".join(parts(arrays, metadata))


def parts(arrays: Mapping[str, npt.NDArray[np.float32]], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """Return the parts of the file that `dumps` returns: the header, and the tensors, which are not copied."""
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    tensors: list[bytes | memoryview] = []
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": (start, end)}
        tensors.append(np.ascontiguousarray(array, "<f4").data)
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)  # align the tensors, so that readers need not copy them
    return [_SIZE.pack(len(text)), text, *tensors]


def _parse_header(body: bytes) -> tuple[dict[str, Any], int]:
    """Return the header, in which every value is an object, and the offset of the tensors."""
    size = _SIZE.unpack_from(body)[0] if len(body) >= _SIZE.size else 0
    start = _SIZE.size + size
    if 0 < size <= MAX_HEADER_BYTES and start <= len(body):
        try:
            header = orjson.loads(body[_SIZE.size : start])
        except orjson.JSONDecodeError:
            header = None
        if isinstance(header, dict) and all(isinstance(value, dict) for value in header.values()):
            return header, start
    raise InvalidSafetensors(
        "the safetensors header is not valid",
        expected=f"a safetensors file with a header of at most {MAX_HEADER_BYTES} bytes",
        hint="write it with safetensors.numpy.save",
    )


def _type_and_shape(tensor: Mapping[str, Any]) -> tuple[str, list[int]]:
    """Return the type and shape in a tensor's header. Raises InvalidSafetensors."""
    dtype, shape = tensor.get("dtype"), tensor.get("shape")
    if not isinstance(dtype, str) or dtype not in _TYPES:
        known = ", ".join(_TYPES)
        got = describe_value(dtype)
        raise InvalidSafetensors(f"the tensor has dtype {got}", expected=f"one of {known}", got=got)
    if not isinstance(shape, list) or not is_possible(shape):
        # `describe_value` does not recurse into nested lists; str() would.
        got = (
            describe_value(shape) if not isinstance(shape, list) else f"[{', '.join(map(describe_value, shape))}]"[:80]
        )
        expected = f"a list of at most {MAX_DIMENSIONS} lengths"
        raise InvalidSafetensors(f"the tensor's shape {got} is not possible", expected=expected, got=got)
    return dtype, shape
