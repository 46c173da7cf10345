"""The safetensors reader and writer, tested with files built from the description of the format."""

import json
import struct
from typing import Any

import httpx
import numpy as np
import pytest

from service.codec import safetensors
from service.errors import InvalidSafetensors

TYPE = {"content-type": safetensors.MEDIA_TYPE}
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def file(header: Any, data: bytes = X.tobytes()) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: Any = "F32", shape: Any = (2, 3), offsets: Any = (0, 24), **more: Any) -> dict[str, Any]:
    return {"inputs": {"dtype": dtype, "shape": shape, "data_offsets": offsets}, **more}


def read(body: bytes) -> dict[str, np.ndarray]:
    """Return the tensors of a file. Offsets count from the end of the header."""
    (size,) = struct.unpack("<Q", body[:8])
    header, data = json.loads(body[8 : 8 + size]), body[8 + size :]
    return {
        name: np.frombuffer(data[slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def test_tensor_is_read_without_a_copy() -> None:
    body = file(tensor(__metadata__={"format": "np"}))
    array = safetensors.loads(body, "inputs")
    np.testing.assert_array_equal(array, X)
    assert np.shares_memory(array, np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    ("dtype", "numpy"),
    [("F64", "<f8"), ("F16", "<f2"), ("I64", "<i8"), ("I32", "<i4"), ("I16", "<i2"), ("I8", "i1"), ("U8", "u1")],
)
def test_tensors_of_every_real_dtype_are_read(dtype: str, numpy: str) -> None:
    data = X.astype(numpy).tobytes()
    np.testing.assert_array_equal(safetensors.loads(file(tensor(dtype, offsets=(0, len(data))), data), "inputs"), X)


def test_bfloat16_values_are_read_as_the_upper_16_bits_of_float32_values() -> None:
    data = X.view(np.uint32) >> 16
    body = file(tensor("BF16", offsets=(0, 12)), data.astype("<u2").tobytes())
    np.testing.assert_array_equal(safetensors.loads(body, "inputs"), X)  # bfloat16 holds small integers exactly


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        file(b"{" * 3000),
        file(b"[1]"),
        file({"inputs": 3}),
        file({"inputs": {}}),
        file({}),
        file({"outputs": tensor()["inputs"]}),
        file({**tensor(), "other": tensor()["inputs"]}),
        file(tensor("C64")),
        file(tensor(["F32"])),
        file(tensor(shape=[2, -3])),
        file(tensor(shape=[2.0, 3])),
        file(tensor(shape=[True, 6])),
        file(tensor(shape=[2**39, 2**39])),
        file(tensor(shape=[1] * 500)),
        file(tensor(shape="23")),
        file(tensor(offsets=[0, 20])),
        file(tensor(offsets=[4, 28])),
        file(tensor(), X.tobytes()[:-1]),
        file(tensor(), X.tobytes() + b"x"),
        file({f"x{number}": {} for number in range(2000)}),
    ],
)
def test_invalid_file_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidSafetensors):
        safetensors.loads(body, "inputs")


def test_dumped_file_can_be_read() -> None:
    body = safetensors.dumps({"a": X, "b": X.T}, {"model": "vae"})
    tensors = read(body)
    np.testing.assert_array_equal(tensors["a"], X)
    np.testing.assert_array_equal(tensors["b"], X.T)
    assert (8 + struct.unpack("<Q", body[:8])[0]) % 8 == 0
    assert json.loads(body[8 : 8 + struct.unpack("<Q", body[:8])[0]])["__metadata__"] == {"model": "vae"}


def test_response_contains_every_array_under_its_name(client: httpx.Client, digits: np.ndarray) -> None:
    rows = digits[:3]
    body = safetensors.dumps({"inputs": rows}, {})
    expected = client.post("/reconstruct", json={"inputs": rows.tolist()}).json()
    response = client.post("/reconstruct", content=body, headers={**TYPE, "accept": safetensors.MEDIA_TYPE})
    assert response.headers["content-type"] == safetensors.MEDIA_TYPE
    tensors = read(response.content)
    assert set(tensors) == {"outputs", "errors"}
    for name, array in tensors.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-6)
    verdicts = client.post("/anomaly?explain=0", content=body, headers={**TYPE, "accept": safetensors.MEDIA_TYPE})
    results = client.post("/anomaly", json={"inputs": rows.tolist()}).json()["results"]
    for name, array in read(verdicts.content).items():
        np.testing.assert_allclose(array, [result[name] for result in results], rtol=1e-5)


def test_file_with_a_huge_shape_is_refused_with_422(client: httpx.Client) -> None:
    body = file(tensor(shape=[2**39, 2**20], offsets=(0, 2**61)))
    response = client.post("/encode", content=body, headers=TYPE)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_safetensors")


@pytest.mark.parametrize("accept", ["application/json", "application/x-npy", safetensors.MEDIA_TYPE])
def test_output_that_is_not_finite_is_an_error_in_every_format(client: httpx.Client, accept: str) -> None:
    body = safetensors.dumps({"latents": np.full((1, 4), 3e38, np.float32)}, {})
    width = client.get("/models/hosts").json()["latents"]
    body = safetensors.dumps({"latents": np.full((1, width), 3e38, np.float32)}, {})
    response = client.post("/decode?model=hosts", content=body, headers={**TYPE, "accept": accept})
    assert (response.status_code, response.json()["code"]) == (422, "overflow_in_model")
