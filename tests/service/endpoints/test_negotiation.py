"""What headers, byte order marks and query strings mean, tried over HTTP."""

import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest

from tests.service.hosts import HOST_FEATURES, JSON, NDJSON

NPY = "application/x-npy"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ROW = [1.0, 100.0, 1.0, 1.0]
RECORD = dict(zip(HOST_FEATURES, ROW, strict=True))
LINE = json.dumps(RECORD).encode() + b"\n"


@pytest.fixture(scope="module")
def hosts(hosts: httpx.Client) -> httpx.Client:
    """Return a client whose default model is `hosts`, and which sends no Accept header of its own."""
    del hosts.headers["accept"]
    return hosts


# Accept


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["text/html", NPY], NPY),
        ([NPY + ";q=0.1", "*/*"], JSON),
        (["application/json;q=0", NPY], NPY),
        (["", NPY], NPY),
        (["text/html", "image/webp", "application/json"], JSON),
    ],
)
def test_every_accept_line_counts(hosts: httpx.Client, lines: list[str], expected: str) -> None:
    headers = [("content-type", JSON), *(("accept", line) for line in lines)]
    response = hosts.post("/encode", content=json.dumps({"inputs": [ROW]}), headers=headers)
    assert (response.status_code, response.headers["content-type"]) == (200, expected)


def test_every_content_encoding_line_counts(hosts: httpx.Client) -> None:
    headers = [("content-type", JSON), ("content-encoding", "gzip"), ("content-encoding", "br")]
    response = hosts.post("/encode", content=b"x", headers=headers)
    assert (response.status_code, response.json()["got"]) == (415, "gzip, br")


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ([NDJSON], NDJSON),
        (["application/ndjson"], "application/ndjson"),
        (["application/jsonl"], "application/jsonl"),
        (["application/x-jsonlines"], "application/x-jsonlines"),
        (["Application/X-NDJSON"], NDJSON),
        (["text/html", NDJSON], NDJSON),
        (["application/x-ndjson, */*;q=0.1"], NDJSON),
        (["application/x-ndjson, application/json"], NDJSON),
        (["application/json, application/x-ndjson"], NDJSON),
        (["application/x-ndjson;q=0.1, application/jsonl;q=0.9"], "application/jsonl"),
        (["application/json;q=0.9, application/x-ndjson;q=0.1"], JSON),
        (["application/json, application/x-ndjson;q=0"], JSON),
        (["application/x-ndjson;q=0.5, */*"], JSON),
        (["application/x-npy, application/x-ndjson;q=0.5"], NPY),
        (['application/json;profile="a,application/x-ndjson,b"'], JSON),
        (["application/*"], JSON),
        (["*/*"], JSON),
        ([], JSON),
        (["application/x-ndjson;q=0"], None),
        (["text/x-ndjson"], None),
        (["foo/application/x-ndjson"], None),
    ],
)
def test_accept_header_chooses_between_a_stream_and_a_whole_response(
    hosts: httpx.Client, accept: list[str], expected: str | None
) -> None:
    headers = [("content-type", NDJSON), *(("accept", line) for line in accept)]
    response = hosts.post("/anomaly", content=LINE, headers=headers)
    if expected is None:
        assert (response.status_code, response.json()["code"]) == (406, "not_acceptable")
        return
    assert (response.status_code, response.headers["content-type"]) == (200, expected)
    if expected not in (JSON, NPY):
        assert [json.loads(line).get("row") for line in response.text.splitlines()] == [0, None]


# Byte order marks


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/encode", {"inputs": [ROW]}),
        ("/encode", {"inputs": [ROW], "sample": False}),
        ("/anomaly", {"records": [RECORD]}),
        ("/anomaly", {"inputs": [ROW], "detail": "none"}),
        ("/sample", {"n": 2, "seed": 1}),
    ],
)
def test_byte_order_mark_before_json_changes_nothing(hosts: httpx.Client, path: str, content: dict[str, Any]) -> None:
    body, headers = json.dumps(content).encode(), {"content-type": JSON}
    plain, marked = (hosts.post(path, content=mark + body, headers=headers) for mark in (b"", BYTE_ORDER_MARK))
    assert plain.status_code == marked.status_code == 200
    assert plain.json() == marked.json()


def test_body_of_only_a_byte_order_mark_is_empty(hosts: httpx.Client) -> None:
    response = hosts.post("/sample?seed=1", content=BYTE_ORDER_MARK, headers={"content-type": JSON})
    assert response.json() == hosts.post("/sample?seed=1").json()


@pytest.mark.parametrize(
    "body", [BYTE_ORDER_MARK + 3 * LINE, (BYTE_ORDER_MARK + LINE) * 3, BYTE_ORDER_MARK + b"\n" + 3 * LINE]
)
def test_byte_order_mark_before_ndjson_costs_no_row(hosts: httpx.Client, body: bytes) -> None:
    whole = hosts.post("/anomaly", content=body, headers={"content-type": NDJSON}).json()
    assert (whole["rows"], whole["failed"]) == (3, 0)
    response = hosts.post("/anomaly", content=body, headers={"content-type": NDJSON, "accept": NDJSON})
    last = json.loads(response.text.splitlines()[-1])
    assert (last["rows"], last["failed"]) == (3, 0)


# Query strings


def ask(client: httpx.Client, path: str, query: str) -> httpx.Response:
    """POST without a body; write the query as it is, except for characters that a URL cannot contain."""
    return client.post(f"{path}?{quote(query, safe='=&+%')}")


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/decode", "latents", "[[true, 1]]"),
        ("/decode", "latents", "[[1, false]]"),
        ("/decode", "latents", "[[NaN, 1]]"),
        ("/decode", "latents", "[[1, Infinity]]"),
        ("/decode", "latents", "[[1e999, 1]]"),
        ("/decode", "latents", '[[1, "1"]]'),
        ("/decode", "latents", "[[1, null]]"),
        ("/decode", "latents", "[[1, 1]"),
        ("/decode", "latents", "[1, 1]"),
        ("/encode", "inputs", "[[true, 1, 1, 1]]"),
        ("/anomaly", "inputs", "[[1, 1, 1, true]]"),
        ("/anomaly", "records", json.dumps([RECORD | {"cpu": True}])),
        ("/anomaly", "records", '[{"cpu": 1, "cpu": 2}]'),
        ("/sample", "n", "2.5"),
        ("/sample", "n", "true"),
        ("/sample", "n", "0"),
        ("/sample", "n", '"2"'),
        ("/sample", "seed", "1.5"),
        ("/sample", "seed", "-1"),
        ("/sample", "seed", "9" * 30),
        ("/sample", "n", "1" * 30),
        ("/sample", "n", "-" + "1" * 30),
        ("/anomaly", "explain", "1" * 30),
        ("/sample", "temperature", "true"),
        ("/sample", "temperature", "101"),
        ("/decode", "latents", "[" * 985 + "]" * 985),
    ],
)
def test_value_in_the_query_is_refused_like_the_same_value_in_the_body(
    hosts: httpx.Client, path: str, field: str, value: str
) -> None:
    in_query = ask(hosts, path, f"{field}={value}")
    in_body = hosts.post(path, content=f'{{"{field}": {value}}}', headers={"content-type": JSON})
    assert (in_query.status_code, in_query.json()["code"]) == (422, in_body.json()["code"])
    if in_body.json()["code"] != "invalid_json":
        assert in_query.json()["detail"] == in_body.json()["detail"]
        assert in_query.json()["pointer"] == in_body.json()["pointer"]


def test_rows_in_the_query_get_the_response_of_rows_in_the_body(hosts: httpx.Client) -> None:
    for path, content in (("/decode", {"latents": [[0.5, -1]]}), ("/anomaly", {"records": [RECORD], "explain": 1})):
        query = "&".join(f"{name}={json.dumps(value)}" for name, value in content.items())
        assert ask(hosts, path, query).json() == hosts.post(path, json=content).json()


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ('start={"latent": [1, 1], "latent": [2, 2]}&end={"latent": [1, 1]}', "/start"),
        ('start={"latent": [true, 1]}&end={"latent": [1, 1]}', "/start/latent/0"),
    ],
)
def test_ends_of_an_interpolation_in_the_query_are_judged_as_in_the_body(
    hosts: httpx.Client, query: str, pointer: str
) -> None:
    response = ask(hosts, "/interpolate", query)
    assert (response.status_code, response.json()["pointer"]) == (422, pointer)


@pytest.mark.parametrize("path", ["/encode", "/decode", "/reconstruct", "/sample", "/interpolate", "/anomaly"])
@pytest.mark.parametrize("query", ["model=hosts&model=vae", "model=vae&model=hosts", "model=hosts&model=hosts"])
def test_model_that_is_named_twice_is_refused(hosts: httpx.Client, path: str, query: str) -> None:
    response = hosts.post(f"{path}?{query}", json={"inputs": [ROW]})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_field")
    assert response.json()["pointer"] == "/model"
    headers = {"content-type": NDJSON, "accept": NDJSON}
    assert hosts.post(f"/anomaly?{query}", content=LINE, headers=headers).status_code == 422


@pytest.mark.parametrize("value", ["True", "TRUE", "true", "tRUE"])
def test_true_in_a_query_may_have_upper_case_letters(hosts: httpx.Client, value: str) -> None:
    response = hosts.post(f"/encode?seed=3&sample={value}", json={"inputs": [ROW]})
    assert response.json() == hosts.post("/encode", json={"inputs": [ROW], "seed": 3, "sample": True}).json()


@pytest.mark.parametrize("value", ["False", "FALSE", "false"])
def test_false_in_a_query_may_have_upper_case_letters(hosts: httpx.Client, value: str) -> None:
    incomplete = {name: number for name, number in RECORD.items() if name != "load"}
    response = hosts.post(f"/anomaly?impute={value}", json={"records": [incomplete]})
    assert (response.status_code, response.json()["detail"]) == (422, "the record has no value for load")


@pytest.mark.parametrize("value", [".05", "0.05", "5e-2", "5.E-2", "%2B.05", "+0.05", "00.05", "0.05 ", "50e-3"])
def test_number_in_a_query_may_be_spelt_in_any_usual_way(hosts: httpx.Client, value: str) -> None:
    for field in ("alpha", "fdr"):
        response = hosts.post(f"/anomaly?{field}={value}", json={"inputs": [ROW]})
        assert response.status_code == 200, response.text
        assert response.json()[field] == 0.05


def test_long_text_of_digits_in_a_query_is_refused_without_a_stall(hosts: httpx.Client) -> None:
    started = time.perf_counter()
    response = hosts.post(f"/anomaly?alpha={'9' * 20_000}x", json={"inputs": [ROW]})
    assert response.status_code == 422
    assert time.perf_counter() - started < 1.0  # with a time that grows with the square of the length: 13 s


@pytest.mark.parametrize("value", ["2", "02", "%2B2", "+2"])
def test_integer_in_a_query_may_be_spelt_in_any_usual_way(hosts: httpx.Client, value: str) -> None:
    assert len(hosts.post(f"/sample?n={value}").json()["outputs"]) == 2


@pytest.mark.parametrize("value", ["1_0", "0x2", "two", "1,5", "1/2", "inf", "nan", "NaN", "", "٣"])
def test_text_in_place_of_a_number_is_refused(hosts: httpx.Client, value: str) -> None:
    for query in (f"temperature={value}", f"n={value}"):
        response = ask(hosts, "/sample", query)
        assert (response.status_code, response.json()["code"]) == (422, "invalid_field")


@pytest.mark.parametrize("name", ["123", "1e5", ".5", "true", "null", "[1]", "{}", "host", '"quoted"'])
def test_text_option_in_a_query_means_its_text(hosts: httpx.Client, name: str) -> None:
    key = name.strip('"')  # a JSON string means its content
    grouped: dict[str, Any] = RECORD | {key: "web-1"}
    response = hosts.post(f"/anomaly?group={quote(name)}", json={"records": [grouped]})
    assert response.status_code == 200, response.text
    assert response.json()["results"][0]["group"] == "web-1"
    timed = RECORD | {key: 1_700_000_000}
    response = hosts.post(f"/anomaly?time={quote(name)}", json={"records": [timed]})
    assert response.json()["results"][0]["time"] == 1_700_000_000


def test_query_of_an_npy_request_is_read_by_the_same_rules(hosts: httpx.Client, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([ROW]))
    response = hosts.post(
        "/anomaly?alpha=.01&detail=none", content=(tmp_path / "x.npy").read_bytes(), headers={"content-type": NPY}
    )
    assert response.json()["rows"] == 1
