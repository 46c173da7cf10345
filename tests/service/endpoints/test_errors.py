"""Every way to be refused: its status, its code, and what it tells."""

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.errors import ERRORS
from service.settings import Settings
from tests.service.running import running

ROW = [0.5] * 64
ENDS = {"start": {"latent": [0] * 16}, "end": {"latent": [1] * 16}}
JSON = {"content-type": "application/json"}
NPY = {"content-type": "application/x-npy"}
PATHS = ["/encode", "/decode", "/reconstruct", "/sample", "/interpolate", "/anomaly"]


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    error = next(error for error in ERRORS if error.code == code)
    assert (problem["status"], problem["code"], problem["title"]) == (status, code, error.title)
    assert problem["type"] == f"urn:elbo:problem:{code}"
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["detail"]
    assert "\n" not in problem["detail"]
    return problem


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("path", ["/nope", "/encode/", "/models/vae/1", "/static/nope.js", "/static/docs/nope", "/%ff"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path_is_not_found(client: httpx.Client, method: str, path: str) -> None:
    if path.startswith("/static") and method == "POST":
        response = client.request(method, path)
        refused(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "GET, HEAD"
        return
    refused(client.request(method, path), 404, "not_found")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_are_told_what_is_allowed(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(method, path)
    assert response.headers["allow"] == "POST"
    if method != "HEAD":
        problem = refused(response, 405, "method_not_allowed")
        assert (problem["expected"], problem["got"]) == ("POST", method)


@pytest.mark.parametrize(
    "path", ["/models", "/models/vae", "/livez", "/readyz", "/metrics", "/", "/docs", "/openapi.json"]
)
def test_get_endpoints_allow_get_and_head(client: httpx.Client, path: str) -> None:
    response = client.post(path)
    refused(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("model", ["nobody", "vae@9", "", "vae@1@1"])
def test_an_unknown_model_is_told_which_are_served(client: httpx.Client, path: str, model: str) -> None:
    problem = refused(client.post(path, params={"model": model}, json={}), 404, "model_not_found")
    assert problem["expected"] == "one of ae@1, hosts@1, pca@1, vae@1"
    assert problem["got"] == model


def test_an_unknown_model_has_no_description(client: httpx.Client) -> None:
    problem = refused(client.get("/models/nobody"), 404, "model_not_found")
    assert problem["got"] == "nobody"


@pytest.mark.parametrize(
    ("path", "accept"), [(path, "text/html") for path in PATHS] + [("/anomaly", "image/png"), ("/encode", "image/*")]
)
def test_a_format_that_there_is_not_is_refused_with_those_that_there_are(
    client: httpx.Client, path: str, accept: str
) -> None:
    problem = refused(client.post(path, json={}, headers={"accept": accept}), 406, "not_acceptable")
    assert "application/json" in problem["expected"]


def test_a_table_has_no_picture(client: httpx.Client) -> None:
    response = client.post("/sample?model=hosts", headers={"accept": "image/png"})
    assert (
        refused(response, 406, "not_acceptable")["expected"]
        == "application/json, application/x-npy, application/x-safetensors"
    )


@pytest.mark.parametrize("path", PATHS)
def test_other_content_types_are_refused(client: httpx.Client, path: str) -> None:
    response = client.post(path, data={"n": "1"})
    assert refused(response, 415, "unsupported_media_type")["got"] == "application/x-www-form-urlencoded"


@pytest.mark.parametrize("path", ["/sample", "/interpolate"])
def test_npy_is_no_body_where_no_field_is_an_array(client: httpx.Client, path: str) -> None:
    response = client.post(path, content=npy(np.zeros((1, 16))), headers=NPY)
    assert refused(response, 415, "unsupported_media_type")["expected"] == "application/json"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", [b"{", b"[]", b'{"a": 1, "a": 2}', b"\xff"])
def test_a_body_that_is_no_json_object_is_refused(client: httpx.Client, path: str, body: bytes) -> None:
    problem = refused(client.post(path, content=body, headers=JSON), 422, "invalid_json")
    assert problem["expected"]


@pytest.mark.parametrize("path", ["/encode", "/decode", "/reconstruct", "/anomaly"])
def test_an_npy_body_that_is_cut_off_is_refused(client: httpx.Client, path: str) -> None:
    body = npy(np.zeros((2, 64), np.float32))[:-1]
    problem = refused(client.post(path, content=body, headers=NPY), 422, "invalid_npy")
    assert (problem["expected"], problem["got"]) == ("512 bytes", "511 bytes")


@pytest.mark.parametrize(
    ("path", "body", "pointer", "words"),
    [
        ("/encode", {}, "/inputs", "missing"),
        ("/decode", {"inputs": [[1]]}, "/latents", "missing"),
        ("/encode", {"inputs": [ROW], "sed": 1}, "/sed", "did you mean seed?"),
        ("/encode", {"inputs": [ROW], "model": "vae"}, "/model", "?model=name"),
        ("/encode", {"inputs": [ROW], "a/b~": 1}, "/a~1b~0", "no field"),
        ("/encode", {"inputs": [ROW], "sample": 1}, "/sample", "boolean"),
        ("/encode", {"inputs": [ROW], "sample": "true"}, "/sample", "boolean"),
        ("/encode", {"inputs": [ROW], "seed": -1}, "/seed", "greater than or equal to 0"),
        ("/encode", {"inputs": [ROW], "seed": 2**53}, "/seed", "less than 9007199254740992"),
        ("/encode", {"inputs": [ROW], "seed": 1.5}, "/seed", "integer"),
        ("/encode", {"inputs": [ROW], "seed": "1"}, "/seed", "integer"),
        ("/encode", {"inputs": [ROW], "seed": True}, "/seed", "integer"),
        ("/sample", {"n": 0}, "/n", "greater than or equal to 1"),
        ("/sample", {"n": 301}, "/n", "at most 300"),
        ("/sample", {"n": None}, "/n", "integer"),
        ("/sample", {"temperature": -0.1}, "/temperature", "greater than or equal to 0"),
        ("/sample", {"temperature": 1e9}, "/temperature", "less than or equal to 100"),
        ("/interpolate", {"start": {"latent": [0] * 16}}, "/end", "missing"),
        ("/interpolate", ENDS | {"start": {}}, "/start", "neither"),
        ("/interpolate", ENDS | {"end": {"latent": [0] * 16, "input": ROW}}, "/end", "both"),
        ("/interpolate", ENDS | {"end": [0] * 16}, "/end", "a list of 16"),
        ("/interpolate", ENDS | {"end": {"latents": [0] * 16}}, "/end/latents", "did you mean latent?"),
        ("/interpolate", ENDS | {"steps": 1}, "/steps", "greater than or equal to 2"),
        ("/interpolate", ENDS | {"steps": 301}, "/steps", "at most 300"),
        ("/interpolate", ENDS | {"method": "cubic"}, "/method", "'linear' or 'slerp'"),
        ("/anomaly", {}, None, "got none"),
        ("/anomaly", {"inputs": [ROW], "records": [{}]}, None, "inputs and records"),
        ("/anomaly", {"inputs": [ROW], "alpha": 0}, "/alpha", "greater than 0"),
        ("/anomaly", {"inputs": [ROW], "alpha": 1}, "/alpha", "less than 1"),
        ("/anomaly", {"inputs": [ROW], "alpha": "0.05"}, "/alpha", "valid number"),
        ("/anomaly", {"inputs": [ROW], "fdr": 1.5}, "/fdr", "less than 1"),
        ("/anomaly", {"inputs": [ROW], "explain": -1}, "/explain", "greater than or equal to 0"),
    ],
)
def test_a_bad_field_is_named_with_what_was_expected(
    client: httpx.Client, path: str, body: dict[str, Any], pointer: str | None, words: str
) -> None:
    response = client.post(path, json=body)
    problem = refused(response, 422, "invalid_field")
    assert problem.get("pointer") == pointer
    assert words in response.text.replace("\\", "")


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ("sed=1", "/sed"),
        ("sample=yes", "/sample"),
        ("seed=-3", "/seed"),
        ("seed=1&seed=2", "/seed"),
        ("modle=vae", "/modle"),
    ],
)
def test_a_bad_query_is_refused_like_a_bad_field(client: httpx.Client, query: str, pointer: str) -> None:
    response = client.post(f"/encode?{query}", content=npy(np.zeros((1, 64))), headers=NPY)
    assert refused(response, 422, "invalid_field")["pointer"] == pointer


def test_a_field_may_stand_in_the_body_or_the_query_but_not_in_both(client: httpx.Client) -> None:
    assert client.post("/sample?seed=4", json={"n": 2}).status_code == 200
    refused(client.post("/sample?seed=4", json={"seed": 4}), 422, "invalid_field")


@pytest.mark.parametrize(
    ("path", "body", "pointer"),
    [
        ("/encode", {"inputs": ROW}, "/inputs"),
        ("/encode", {"inputs": [ROW, [*ROW[:17], None, *ROW[18:]]]}, "/inputs/1/17"),
        ("/encode", {"inputs": [ROW, [*ROW[:17], True, *ROW[18:]]]}, "/inputs/1/17"),
        ("/encode", {"inputs": [[*ROW[:63], "1"]]}, "/inputs/0/63"),
        ("/encode", {"inputs": [[*ROW[:63], 1e39]]}, "/inputs/0/63"),
        ("/reconstruct", {"inputs": [ROW, ROW[:-1]]}, "/inputs/1"),
        ("/reconstruct", {"inputs": []}, "/inputs"),
        ("/reconstruct", {"inputs": [[[0] * 8] * 7]}, "/inputs/0"),
        ("/reconstruct", {"inputs": [[[0] * 8] * 7 + [[0] * 7]]}, "/inputs/0/7"),
        ("/decode", {"latents": [[0] * 15]}, "/latents/0"),
        ("/decode", {"latents": [0] * 16}, "/latents"),
        ("/interpolate", ENDS | {"start": {"latent": [0] * 15}}, "/start/latent"),
        ("/interpolate", ENDS | {"end": {"input": [*ROW[:9], "x", *ROW[10:]]}}, "/end/input/9"),
        ("/anomaly", {"inputs": [[None] * 64]}, "/inputs/0/0"),
        ("/anomaly", {"records": [{"cpu": 1}]}, "/records/0"),
        ("/anomaly", {"records": {}}, "/records"),
    ],
)
def test_bad_rows_are_refused_with_the_place_of_the_first_bad_value(
    client: httpx.Client, path: str, body: dict[str, Any], pointer: str
) -> None:
    problem = refused(client.post(path, json=body), 422, "invalid_rows")
    assert problem["pointer"] == pointer
    assert problem["expected"]
    assert problem["got"]


@pytest.mark.parametrize("path", ["/encode", "/reconstruct", "/anomaly"])
def test_more_rows_than_one_request_may_have_are_refused(client: httpx.Client, path: str) -> None:
    problem = refused(client.post(path, json={"inputs": [ROW] * 301}), 413, "too_many_rows")
    assert (problem["expected"], problem["got"]) == ("at most 300 rows", "301")
    content = npy(np.zeros((301, 64), np.float32))
    refused(client.post(path, content=content, headers=NPY), 413, "too_many_rows")


def test_a_body_that_is_too_large_is_refused(client: httpx.Client) -> None:
    problem = refused(client.post("/encode", content=b" " * (2**20 + 1), headers=JSON), 413, "body_too_large")
    assert problem["expected"] == "at most 1048576 bytes"


def test_a_body_without_a_length_is_refused_at_the_first_byte_too_many(client: httpx.Client) -> None:
    chunks = (b" " * 2**16 for _ in range(64))
    problem = refused(client.post("/encode", content=chunks, headers=JSON), 413, "body_too_large")
    assert (problem["expected"], problem["got"]) == ("at most 1048576 bytes", "more")


def test_latents_so_large_that_the_answer_overflows_are_the_callers_error(client: httpx.Client) -> None:
    body = {"latents": [[0] * 16, [3e38, -3e38] * 8]}
    problem = refused(client.post("/decode?model=pca", json=body), 422, "overflow_in_model")
    assert "row 1" in problem["detail"]


def test_without_models_nothing_is_ready_but_the_process_lives(tmp_path: Path) -> None:
    with running(create_app(Settings(artifacts=tmp_path))) as client:
        assert client.get("/livez").status_code == 200
        assert "elbo train" in refused(client.get("/readyz"), 503, "not_ready")["hint"]
        assert client.get("/models").json() == {"default": None, "models": [], "failures": []}
        for path in PATHS:
            refused(client.post(path, json={}), 503, "not_ready")


def test_a_fault_of_the_server_tells_nothing_but_its_id(
    app: FastAPI, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    service = app.state.service
    batcher, service.batcher = service.batcher, None
    try:
        response = client.post("/encode", json={"inputs": [ROW]}, headers={"x-request-id": "find-me"})
    finally:
        service.batcher = batcher
    problem = refused(response, 500, "internal_error")
    assert "NoneType" not in response.text
    assert problem["request_id"] == "find-me"
    (record,) = [record for record in caplog.records if record.message == "unhandled error"]
    assert record.fields["request_id"] == "find-me"  # type: ignore[attr-defined] # ours, on a log record
    assert record.exc_info


def test_each_error_has_a_code_of_its_own() -> None:
    assert len({error.code for error in ERRORS}) == len(ERRORS)
