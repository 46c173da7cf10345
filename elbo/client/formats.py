"""The binary formats of the server, npy and safetensors, and JSON with NumPy arrays."""

import io
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from numpy.lib import format as npy_format

from elbo.client.errors import InvalidReply
from elbo.client.results import Array

JSON = "application/json"
NPY = "application/x-npy"
SAFETENSORS = "application/x-safetensors"
NDJSON = "application/x-ndjson"
_PREFIX_BYTES = 8  # a safetensors file begins with the length of its header, uint64
_METADATA = "__metadata__"
_FLOAT32 = np.dtype("<f4")


def dump_npy(array: Array) -> bytes:
    """Return a C-ordered array as an npy file."""
    return b"".join((_npy_header(array.shape, array.dtype.str), array.data.cast("B") if array.size else b""))


@lru_cache(maxsize=256)
def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    file = io.BytesIO()
    npy_format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def load_npy(content: bytes) -> Array:
    """Return the array in an npy file. Raises InvalidReply."""
    try:
        array: Array = npy_format.read_array(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise InvalidReply(f"the response is not an npy file: {error}") from error
    return array


def load_safetensors(content: bytes) -> tuple[dict[str, Array], Mapping[str, str]]:
    """Return the F32 tensors and the metadata in a safetensors file. Raises InvalidReply.

    The tensors are writable, and share one copy of `content`.
    """
    start = _PREFIX_BYTES + int.from_bytes(content[:_PREFIX_BYTES], "little")
    try:
        header = orjson.loads(content[_PREFIX_BYTES:start])
        metadata = header.pop(_METADATA, {})
        values = bytearray(content[start:])
        tensors = {name: _tensor(values, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidReply(f"the response is not a safetensors file: {error}") from error
    return tensors, metadata


def _tensor(values: bytearray, entry: Mapping[str, Any]) -> Array:
    """Return the tensor that `entry` describes, as an array over `values`.

    Raises:
        KeyError, TypeError, ValueError: `entry` is not an entry of safetensors.
    """
    if entry["dtype"] != "F32":
        raise ValueError(f"expected F32, got {entry['dtype']}")
    (first, last), shape = entry["data_offsets"], entry["shape"]
    if last > len(values):
        raise ValueError(f"the file is cut off: expected {last} bytes of values, got {len(values)}")
    if 4 * math.prod(shape) != last - first:
        raise ValueError(f"{last - first} bytes do not hold float32 values of shape {shape}")
    return np.ndarray(shape, _FLOAT32, values, first)


def dump_json(value: object) -> bytes:
    """Return `value` as JSON. NumPy arrays become lists, NaN becomes null, and times become ISO 8601.

    Infinity becomes 1e999, which the server reports as an error of its row. orjson writes null for it, which the server
    would take for a missing value.
    """
    content = _dump(value)
    return _dump(_with_infinities(value)) if b"null" in content else content


def _dump(value: object) -> bytes:
    return orjson.dumps(value, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)


def _with_infinities(value: Any) -> Any:
    """Return `value` with a fragment of JSON in place of each infinite number."""
    if isinstance(value, float | np.floating):
        return orjson.Fragment(b"1e999" if value > 0 else b"-1e999") if np.isinf(value) else value
    if isinstance(value, Mapping):
        return {name: _with_infinities(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_infinities(each) for each in value]
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and np.isinf(value).any():
        return _with_infinities(value.tolist())
    return value


def _plain(value: Any) -> Any:
    """Return what JSON has for a value of pandas, polars or NumPy: null, text, a number or a list."""
    if value != value:  # NaN and NaT
        return None
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__} cannot be sent as JSON: {value!r}"[:200])


def load_json(content: bytes) -> dict[str, Any]:
    """Return the object in a JSON document. Raises InvalidReply."""
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise InvalidReply(f"the response is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidReply(f"expected a JSON object, got {type(value).__name__}")
    return value


def to_float32(values: npt.ArrayLike) -> Array:
    """Return `values` as a C-ordered float32 array. Numbers beyond float32 become infinite: the server
    reports them.

    Raises:
        TypeError, ValueError: the values are not numbers.
    """
    if isinstance(values, np.ndarray) and values.dtype == np.float32 and values.flags.c_contiguous:
        return values
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32, order="C")
