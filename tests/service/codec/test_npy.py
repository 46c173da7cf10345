"""The .npy reader and writer, compared with numpy.save and numpy.load."""

import contextlib
import io
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.codec import npy
from service.errors import InvalidNpy


def saved(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8", "i1", "u1", "<i8", ">u4"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_array_that_numpy_saved_is_read_unchanged(dtype: str, version: tuple[int, int], order: str) -> None:
    array = np.array(np.arange(24).reshape(4, 3, 2), dtype=dtype, order=order)  # type: ignore[call-overload] # an order that is a str
    loaded = npy.loads(saved(array, version=version))
    assert loaded.dtype == array.dtype
    np.testing.assert_array_equal(loaded, array)


@pytest.mark.parametrize("shape", [(5, 7), (0, 7), (5, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_can_read_the_output_of_dumps(shape: tuple[int, int], order: Literal["C", "F"]) -> None:
    array = np.asarray(np.random.default_rng(0).normal(size=shape), np.float32, order=order)
    np.testing.assert_array_equal(np.load(io.BytesIO(npy.dumps(array)), allow_pickle=False), array)


@pytest.mark.parametrize(
    "array",
    [
        np.array([object()]), np.array(["a"]), np.array([b"a"]), np.array([True]), np.array([1j]),
        np.zeros(2, [("a", "f4")]), np.array(["2020"], "M8[D]"), np.zeros((1, 2), np.longdouble),
    ],
    ids=lambda array: str(array.dtype),
)  # fmt: skip
def test_array_of_unsupported_dtype_is_refused(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(InvalidNpy):
        npy.loads(saved(array, allow_pickle=True))


def test_file_is_refused_if_it_is_cut_off_anywhere() -> None:
    body = saved(np.ones((2, 3), np.float32))
    for length in range(len(body)):
        with pytest.raises(InvalidNpy):
            npy.loads(body[:length])


def test_file_with_trailing_bytes_is_refused() -> None:
    with pytest.raises(InvalidNpy, match="24 bytes, but 25 bytes follow"):
        npy.loads(saved(np.ones((2, 3), np.float32)) + b"x")


def header(text: str, length: int | None = None) -> bytes:
    content = text.encode()
    return b"\x93NUMPY\x02\x00" + (len(content) if length is None else length).to_bytes(4, "little") + content


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"\x93NUMPY", b"\x93NUMPY\x09\x00" + b" " * 100, b"PK\x03\x04" + b"\0" * 100,
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4)}"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", length=2**31),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (10**9, 10**9)}"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999, 999999999999)}"),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}") + b"\x80\x04.",
        header("{'descr': '<f4', 'fortran_order': False}"),
        header("__import__('os').system('true')"),
        header("(" * 300),
        header("[" * 2000 + "]" * 2000),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}" + " " * 10_000) + b"\0\0\0\0",
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1L,)}") + b"\0\0\0\0\0",
    ],
    ids=range(16),
)  # fmt: skip
def test_malicious_header_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidNpy):
        npy.loads(body)


@given(st.data())
@settings(max_examples=300)
def test_damaged_file_is_read_or_raises_invalid_npy(data: st.DataObject) -> None:
    body = bytearray(saved(np.arange(6, dtype=np.float32).reshape(2, 3)))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidNpy):
        assert npy.loads(bytes(body)).dtype.kind in "fiu"
