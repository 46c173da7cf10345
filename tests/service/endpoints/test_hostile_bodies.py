"""Bodies that are nested too deeply, or state impossible numbers and shapes: a client error, never a 500."""

import json
import struct
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from service.anomaly import inputs
from service.endpoints import anomaly_stream
from tests.service.hosts import HOST_FEATURES, JSON, NDJSON

NPY, SAFETENSORS = "application/x-npy", "application/x-safetensors"
RECORD = json.dumps(dict.fromkeys(HOST_FEATURES, 1.0))
NUMBERS = "[1, 100, 1, 1]"
DEPTHS = [200, 970, 985, 1000, 1015, 1023, 1024, 1025, 5000, 100_000]


def lists(depth: int) -> str:
    return "[" * depth + "]" * depth


def objects(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def with_extra(value: str) -> str:
    return f'{RECORD[:-1]}, "rack": {value}}}'


def field_of(value: str) -> str:
    return f'{{"fields": {{"cpu": {value}}}}}'


DEEP_BODIES: dict[str, tuple[str, Callable[[str], str]]] = {
    "inputs": ("/anomaly", lambda value: f'{{"inputs": [{value}]}}'),
    "a row": ("/reconstruct", lambda value: f'{{"inputs": [[1, 1, 1, {value}]]}}'),
    "latents": ("/decode", lambda value: f'{{"latents": {value}}}'),
    "an end": ("/interpolate", lambda value: f'{{"start": {value}, "end": {{"input": {NUMBERS}}}}}'),
    "a seed": ("/sample", lambda value: f'{{"seed": {value}}}'),
    "an unknown field": ("/encode", lambda value: f'{{"inputs": [{NUMBERS}], "x": {value}}}'),
    "a duplicate key": ("/encode", lambda value: f'{{"inputs": [{NUMBERS}], "x": {value}, "x": 1}}'),
    "a number that is not finite": ("/encode", lambda value: f'{{"inputs": [[NaN, {value}]]}}'),
    "records": ("/anomaly", lambda value: f'{{"records": [{value}]}}'),
    "metrics": ("/anomaly", lambda value: f'{{"metrics": [{value}]}}'),
    "a field": ("/anomaly", lambda value: f'{{"metrics": [{field_of(value)}, {field_of("1")}]}}'),
    "equal fields": ("/anomaly", lambda value: f'{{"metrics": [{field_of(value)}, {field_of(value)}]}}'),
    "tags": ("/anomaly", lambda value: f'{{"metrics": [{{"fields": {RECORD}, "tags": {{"host": {value}}}}}]}}'),
}  # fmt: skip


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("nest", [lists, objects])
@pytest.mark.parametrize("kind", DEEP_BODIES)
def test_deeply_nested_json_is_a_client_error(
    hosts: httpx.Client, kind: str, nest: Callable[[int], str], depth: int
) -> None:
    path, body = DEEP_BODIES[kind]
    response = hosts.post(path, content=body(nest(depth)), headers={"content-type": JSON})
    assert response.status_code == 422, response.text[:300]
    assert response.json()["code"] in ("invalid_json", "invalid_field", "invalid_rows")


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("nest", [lists, objects])
def test_deeply_nested_unknown_value_of_a_record_is_ignored_or_refused(
    hosts: httpx.Client, nest: Callable[[int], str], depth: int
) -> None:
    body = f'{{"records": [{with_extra(nest(depth))}]}}'
    response = hosts.post("/anomaly", content=body, headers={"content-type": JSON})
    assert response.status_code == (200 if depth <= 1015 else 422), response.text[:300]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("nest", [lists, objects])
@pytest.mark.parametrize("detail", ["full", "none"])
def test_deeply_nested_line_fails_alone_and_a_stream_ends_with_the_counts(
    hosts: httpx.Client, nest: Callable[[int], str], depth: int, detail: str
) -> None:
    body = f"{RECORD}\n{nest(depth)}\n{RECORD}\n"
    whole = hosts.post("/anomaly?explain=0", content=body, headers={"content-type": NDJSON})
    assert (whole.status_code, whole.json()["rows"], whole.json()["failed"]) == (200, 3, 1)
    headers = {"content-type": NDJSON, "accept": NDJSON}
    response = hosts.post(f"/anomaly?explain=0&detail={detail}", content=body, headers=headers)
    *lines, last = map(json.loads, response.text.splitlines())
    assert (last["rows"], last["failed"]) == (3, 1)
    assert [("detail" in line) for line in lines] == ([False, True, False] if detail == "full" else [])


def failure(*_arguments: Any, **_options: Any) -> Any:
    raise RuntimeError("a fault in the server")


@pytest.mark.parametrize(("module", "name"), [(anomaly_stream, "score_rows"), (inputs, "parse_valid_records")])
def test_stream_ends_with_a_problem_if_an_unexpected_exception_occurs(
    hosts: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, module: Any, name: str
) -> None:
    monkeypatch.setattr(module, name, failure)
    headers = {"content-type": NDJSON, "accept": NDJSON, "x-request-id": "stream-1"}
    response = hosts.post("/anomaly", content=f"{RECORD}\n", headers=headers)
    (last,) = map(json.loads, response.text.splitlines())
    assert (last["code"], last["status"], last["request_id"]) == ("internal_error", 500, "stream-1")
    assert "a fault in the server" not in response.text
    assert any(record.exc_info for record in caplog.records)


def npy(shape: str, data: bytes = b"", descr: str = "'<f4'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + data


def safetensors(header: str, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header.encode() + data


def tensor(shape: str, dtype: str = '"F32"', offsets: str = "[0, 0]") -> str:
    return f'{{"inputs": {{"dtype": {dtype}, "shape": {shape}, "data_offsets": {offsets}}}}}'


SHAPES = [
    (0, 2**62, 2**62), (2**62, 0, 2**62), (2**63, 0), (0, 2**63), (2**64, 0), (0, 2**200), (0, 2**39, 2**39, 64),
    (0, -1), (-1, 0), (-1, -4), (0,) * 9, (0,) * 70, (1,) * 70, (0, 4), (0,), (2**62, 0), (10**400, 0),
]  # fmt: skip


@pytest.mark.parametrize("path", ["/anomaly", "/encode", "/reconstruct"])
@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_array_of_an_impossible_shape_is_a_client_error(hosts: httpx.Client, path: str, shape: tuple[int, ...]) -> None:
    data = b"\0" * 4 if set(shape) == {1} else b""
    for body, media_type in (
        (npy(str(shape), data), NPY),
        (safetensors(tensor(json.dumps(shape), offsets=f"[0, {len(data)}]"), data), SAFETENSORS),
    ):
        response = hosts.post(path, content=body, headers={"content-type": media_type})
        assert response.status_code in (413, 422), response.text
        assert response.json()["detail"]


@pytest.mark.parametrize("shape", ["(True, 4)", "(1, True, 4)", "(False, 4)", "(1.0, 4)", "[1, 4]", "(None, 4)", "4"])
def test_array_whose_lengths_are_no_integers_is_a_client_error(hosts: httpx.Client, shape: str) -> None:
    for data in (b"", np.ones(4, "<f4").tobytes()):
        response = hosts.post("/encode", content=npy(shape, data), headers={"content-type": NPY})
        assert (response.status_code, response.json()["code"]) == (422, "invalid_npy")


@pytest.mark.parametrize("depth", [200, 985, 1000, 1015, 1023])
@pytest.mark.parametrize("part", ["shape", "dtype", "offsets"])
@pytest.mark.parametrize("nest", [lists, lambda depth: f"[1, {lists(depth - 1)}]"])
def test_deeply_nested_safetensors_header_is_a_client_error(
    hosts: httpx.Client, part: str, nest: Callable[[int], str], depth: int
) -> None:
    parts = {"shape": "[1, 4]", "dtype": '"F32"', "offsets": "[0, 16]"} | {part: nest(depth)}
    response = hosts.post(
        "/encode", content=safetensors(tensor(**parts), b"\0" * 16), headers={"content-type": SAFETENSORS}
    )
    assert (response.status_code, response.json()["code"]) == (422, "invalid_safetensors")


@pytest.mark.parametrize(
    "offsets", ["[0.0, 16.0]", "[false, 16]", "[0, 16, 16]", "null", '"0"', "{}", "16", "[0, 1e400]"]
)
def test_invalid_offsets_of_a_tensor_are_a_client_error(hosts: httpx.Client, offsets: str) -> None:
    body = safetensors(tensor("[1, 4]", offsets=offsets), b"\0" * 16)
    response = hosts.post("/encode", content=body, headers={"content-type": SAFETENSORS})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_safetensors")


@pytest.mark.parametrize("number", ["1" * 400, "-" + "9" * 400, "1" * 5000, "1e400", "1e999999999", "0." + "1" * 5000])
@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/anomaly", "alpha"), ("/anomaly", "fdr"), ("/anomaly", "half_life_rows"), ("/anomaly", "explain"),
        ("/anomaly", "impute"), ("/anomaly", "time"), ("/sample", "n"), ("/sample", "seed"), ("/sample", "temperature"),
    ],
)  # fmt: skip
def test_number_of_many_digits_in_an_option_is_never_a_server_error(
    hosts: httpx.Client, path: str, field: str, number: str
) -> None:
    rows = f'"inputs": [{NUMBERS}], ' if path == "/anomaly" else ""
    responses = [hosts.post(path, content=f'{{{rows}"{field}": {number}}}', headers={"content-type": JSON})]
    content = f"{{{rows[:-2]}}}"
    responses.append(hosts.post(f"{path}?{field}={number}", content=content, headers={"content-type": JSON}))
    for response in responses:
        assert response.status_code in (200, 422), response.text
