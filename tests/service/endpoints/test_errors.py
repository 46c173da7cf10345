"""Error responses: status, code, and the content of the problem document."""

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


def assert_problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
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
def test_unknown_path_gives_not_found(client: httpx.Client, method: str, path: str) -> None:
    if path.startswith("/static") and method == "POST":
        response = client.request(method, path)
        assert_problem(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "GET, HEAD"
        return
    assert_problem(client.request(method, path), 404, "not_found")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_unsupported_method_gives_405_with_an_allow_header(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(method, path)
    assert response.headers["allow"] == "POST"
    if method != "HEAD":
        problem = assert_problem(response, 405, "method_not_allowed")
        assert (problem["expected"], problem["got"]) == ("POST", method)


@pytest.mark.parametrize(
    "path", ["/models", "/models/vae", "/livez", "/readyz", "/metrics", "/", "/docs", "/openapi.json"]
)
def test_post_to_a_get_endpoint_gives_405_with_get_and_head_in_the_allow_header(
    client: httpx.Client, path: str
) -> None:
    response = client.post(path)
    assert_problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("model", ["nobody", "vae@9", "", "vae@1@1"])
def test_unknown_model_gives_404_that_lists_the_served_models(client: httpx.Client, path: str, model: str) -> None:
    problem = assert_problem(client.post(path, params={"model": model}, json={}), 404, "model_not_found")
    assert problem["expected"] == "one of ae@1, hosts@1, pca@1, vae@1"
    assert problem["got"] == model


def test_description_of_an_unknown_model_gives_404(client: httpx.Client) -> None:
    problem = assert_problem(client.get("/models/nobody"), 404, "model_not_found")
    assert problem["got"] == "nobody"


@pytest.mark.parametrize(
    ("path", "accept"), [(path, "text/html") for path in PATHS] + [("/anomaly", "image/png"), ("/encode", "image/*")]
)
def test_unavailable_response_format_gives_406_that_lists_the_available_formats(
    client: httpx.Client, path: str, accept: str
) -> None:
    problem = assert_problem(client.post(path, json={}, headers={"accept": accept}), 406, "not_acceptable")
    assert "application/json" in problem["expected"]


def test_request_for_a_png_gives_406_if_the_model_is_for_tables(client: httpx.Client) -> None:
    response = client.post("/sample?model=hosts", headers={"accept": "image/png"})
    assert (
        assert_problem(response, 406, "not_acceptable")["expected"]
        == "application/json, application/x-npy, application/x-safetensors"
    )


@pytest.mark.parametrize("path", PATHS)
def test_form_data_gives_415(client: httpx.Client, path: str) -> None:
    response = client.post(path, data={"n": "1"})
    assert assert_problem(response, 415, "unsupported_media_type")["got"] == "application/x-www-form-urlencoded"


@pytest.mark.parametrize("path", ["/sample", "/interpolate"])
def test_npy_body_gives_415_if_the_endpoint_has_no_array_field(client: httpx.Client, path: str) -> None:
    response = client.post(path, content=npy(np.zeros((1, 16))), headers=NPY)
    assert assert_problem(response, 415, "unsupported_media_type")["expected"] == "application/json"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", [b"{", b"[]", b'{"a": 1, "a": 2}', b"\xff"])
def test_body_that_is_not_a_json_object_gives_invalid_json(client: httpx.Client, path: str, body: bytes) -> None:
    problem = assert_problem(client.post(path, content=body, headers=JSON), 422, "invalid_json")
    assert problem["expected"]


@pytest.mark.parametrize("path", ["/encode", "/decode", "/reconstruct", "/anomaly"])
def test_truncated_npy_body_gives_invalid_npy(client: httpx.Client, path: str) -> None:
    body = npy(np.zeros((2, 64), np.float32))[:-1]
    problem = assert_problem(client.post(path, content=body, headers=NPY), 422, "invalid_npy")
    assert (problem["expected"], problem["got"]) == ("512 bytes", "511 bytes")


@pytest.mark.parametrize(
    ("path", "body", "pointer", "words"),
    [
        ("/decode", {}, "/latents", "missing"),
        ("/encode", {}, None, "records"),
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
        ("/interpolate", ENDS | {"end": [0] * 16}, "/end", "end should be an object, got a list of 16"),
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
        ("/anomaly", {"inputs": [ROW], "half_life": 60}, "/half_life", "inputs have no timestamps"),
        ("/anomaly", {"inputs": [ROW], "half_life_rows": 2, "fdr": 0.1}, "/half_life_rows", "half_life_rows and fdr"),
    ],
)
def test_invalid_field_is_refused_with_its_pointer_and_the_expected_value(
    client: httpx.Client, path: str, body: dict[str, Any], pointer: str | None, words: str
) -> None:
    response = client.post(path, json=body)
    problem = assert_problem(response, 422, "invalid_field")
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
def test_invalid_query_option_gives_its_pointer(client: httpx.Client, query: str, pointer: str) -> None:
    response = client.post(f"/encode?{query}", content=npy(np.zeros((1, 64))), headers=NPY)
    assert assert_problem(response, 422, "invalid_field")["pointer"] == pointer


@pytest.mark.parametrize("seconds", ["soon", "0", "-1", "nan", ""])
def test_timeout_that_is_no_number_above_0_gives_invalid_field(client: httpx.Client, seconds: str) -> None:
    response = client.post("/encode", json={"inputs": [ROW]}, headers={"X-Request-Timeout": seconds})
    problem = assert_problem(response, 422, "invalid_field")
    assert (problem["expected"], problem["got"]) == ("a number above 0", seconds)
    assert "X-Request-Timeout" in problem["detail"]


def test_field_in_both_body_and_query_gives_invalid_field(client: httpx.Client) -> None:
    assert client.post("/sample?seed=4", json={"n": 2}).status_code == 200
    assert_problem(client.post("/sample?seed=4", json={"seed": 4}), 422, "invalid_field")


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
def test_invalid_rows_give_the_pointer_of_the_first_invalid_value(
    client: httpx.Client, path: str, body: dict[str, Any], pointer: str
) -> None:
    problem = assert_problem(client.post(path, json=body), 422, "invalid_rows")
    assert problem["pointer"] == pointer
    assert problem["expected"]
    assert problem["got"]


@pytest.mark.parametrize("path", ["/encode", "/reconstruct", "/anomaly"])
def test_more_rows_than_max_rows_give_413(client: httpx.Client, path: str) -> None:
    problem = assert_problem(client.post(path, json={"inputs": [ROW] * 301}), 413, "too_many_rows")
    assert (problem["expected"], problem["got"]) == ("at most 300 rows", "301")
    content = npy(np.zeros((301, 64), np.float32))
    assert_problem(client.post(path, content=content, headers=NPY), 413, "too_many_rows")


@pytest.mark.parametrize("form", ["csv", "x-ndjson"])
def test_small_body_with_more_rows_than_max_rows_gives_413(client: httpx.Client, form: str) -> None:
    names, row = ["cpu", "memory/used", "disk~io", "load"], [1, 100, 1, 0]
    first, second = (",".join(map(str, cells)) for cells in (names, row))
    lines = [first, second] if form == "csv" else [f"[{second}]"]
    faulty = ["x"] * 299  # each counts as a row
    headers = {"content-type": f"{'text' if form == 'csv' else 'application'}/{form}"}
    accepted, refused = (
        client.post("/anomaly?model=hosts", content="\n".join([*lines, *faulty, *more]), headers=headers)
        for more in ([], ["x"])
    )
    assert accepted.status_code == 200, accepted.text
    assert (len(accepted.json()["results"]), len(accepted.json()["errors"])) == (1, 299)
    assert len(refused.request.content) < 700
    assert assert_problem(refused, 413, "too_many_rows")["expected"] == "at most 300 rows"


def test_body_larger_than_max_body_bytes_gives_413(client: httpx.Client) -> None:
    problem = assert_problem(client.post("/encode", content=b" " * (2**20 + 1), headers=JSON), 413, "body_too_large")
    assert problem["expected"] == "at most 1048576 bytes"


def test_chunked_body_larger_than_max_body_bytes_gives_413(client: httpx.Client) -> None:
    chunks = (b" " * 2**16 for _ in range(64))
    problem = assert_problem(client.post("/encode", content=chunks, headers=JSON), 413, "body_too_large")
    assert (problem["expected"], problem["got"]) == ("at most 1048576 bytes", "more")


def test_decode_gives_422_that_names_the_row_if_an_output_overflows(client: httpx.Client) -> None:
    body = {"latents": [[0] * 16, [3e38, -3e38] * 8]}
    problem = assert_problem(client.post("/decode?model=pca", json=body), 422, "overflow_in_model")
    assert "row 1" in problem["detail"]


def test_service_without_models_is_alive_but_not_ready(tmp_path: Path) -> None:
    with running(create_app(Settings(artifacts=tmp_path))) as client:
        assert client.get("/livez").status_code == 200
        assert "elbo train" in assert_problem(client.get("/readyz"), 503, "not_ready")["hint"]
        assert client.get("/models").json() == {"default": None, "models": [], "failures": []}
        for path in PATHS:
            assert_problem(client.post(path, json={}), 503, "not_ready")


def test_unexpected_exception_gives_500_without_details_and_is_logged(
    app: FastAPI, client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    service = app.state.service
    batcher, service.batcher = service.batcher, None  # every use of the batcher raises AttributeError
    try:
        response = client.post("/encode", json={"inputs": [ROW]}, headers={"x-request-id": "find-me"})
    finally:
        service.batcher = batcher
    problem = assert_problem(response, 500, "internal_error")
    assert "NoneType" not in response.text
    assert problem["request_id"] == "find-me"
    (record,) = [record for record in caplog.records if record.message == "unhandled error"]
    assert record.fields["request_id"] == "find-me"  # type: ignore[attr-defined] # set by `extra`
    assert record.exc_info


def test_error_codes_are_unique() -> None:
    assert len({error.code for error in ERRORS}) == len(ERRORS)
