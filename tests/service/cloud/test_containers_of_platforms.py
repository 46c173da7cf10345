"""The entry point of the image, started as SageMaker and Vertex AI start it, and their requests."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.data import ROOT
from tests.ports import free_port
from tests.service.process import ServerProcess, server_starter
from tests.service.scrape import increase, scrape

pytestmark = pytest.mark.slow
IMAGE = {"ELBO_HOST": "0.0.0.0", "ELBO_PORT": "8000"}  # what the Dockerfile sets
ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"
HEALTH = "/v1/endpoints/7/deployedModels/8"
PREDICT = f"{HEALTH}:predict"
ROWS = [[0.1, 110.0, 0.6, -1.0], [0.2, 90.0, -0.3, 2.0], [50.0, 90.0, 0.0, 0.0]]  # the features of the model `hosts`
HOSTS = "model=hosts"


def start(artifacts: Path, environment: dict[str, str], start_server: Any) -> ServerProcess:
    command = ("-c", "from elbo import cli; cli.main(['serve'])")  # the entry point and command of the image
    server: ServerProcess = start_server(artifacts, command=command, environment={**IMAGE, **environment})
    return server


@pytest.fixture(scope="module")
def sagemaker(artifacts: Path) -> Iterator[httpx.Client]:
    """Yield a client of a server on the port of an inference pipeline."""
    port = str(free_port())
    with server_starter() as start_server:
        server = start(artifacts, {"SAGEMAKER_BIND_TO_PORT": port, "ELBO_DEFAULT_MODEL": "hosts"}, start_server)
        assert server.port == int(port)
        with server.client() as client:
            yield client


@pytest.fixture(scope="module")
def vertex(artifacts: Path) -> Iterator[httpx.Client]:
    """Yield a client of a server that has the models in a local AIP_STORAGE_URI."""
    port = str(free_port())
    environment = {
        "AIP_HTTP_PORT": port,
        "AIP_HEALTH_ROUTE": HEALTH,
        "AIP_PREDICT_ROUTE": PREDICT,
        "AIP_STORAGE_URI": f"file://{artifacts}",
        "ELBO_ARTIFACTS": "/artifacts",
        "ELBO_MAX_ROWS": "300",
    }
    with server_starter() as start_server:
        server = start(artifacts, environment, start_server)
        assert server.port == int(port)
        with server.client() as client:
            yield client


def verdicts(client: httpx.Client, rows: Any = ROWS, **options: Any) -> list[dict[str, Any]]:
    """Return the results of /anomaly for rows of the model `hosts`."""
    response = client.post("/anomaly", params={"model": "hosts", **options}, json={"inputs": rows})
    assert response.status_code == 200, response.text
    results: list[dict[str, Any]] = response.json()["results"]
    return results


def invoke(client: httpx.Client, body: str | bytes, media_type: str, attributes: str = HOSTS, **headers: str) -> Any:
    headers = {"Content-Type": media_type, ATTRIBUTES: attributes, **headers}
    return client.post("/invocations", content=body, headers=headers)


def csv(rows: list[list[Any]] = ROWS) -> str:
    return "".join(f"{','.join(map(str, row))}\n" for row in rows)


def npy(rows: Any = ROWS) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(rows, np.float32))
    return buffer.getvalue()


def lines(rows: list[Any] = ROWS) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def test_health_check_of_the_image_asks_the_port_of_the_platform(sagemaker: httpx.Client) -> None:
    environment = os.environ | IMAGE | {"SAGEMAKER_BIND_TO_PORT": str(sagemaker.base_url.port)}
    command = [sys.executable, "-m", "service.healthcheck"]
    assert subprocess.run(command, cwd=ROOT, env=environment, timeout=60).returncode == 0


def test_ping_of_sagemaker_answers_200_when_models_are_served(sagemaker: httpx.Client) -> None:
    assert sagemaker.get("/ping").status_code == 200


@pytest.mark.parametrize(
    ("body", "media_type"),
    [
        (csv(), "text/csv"),
        (csv(), "text/csv; header=absent"),
        ("cpu,memory/used,disk~io,load\n" + csv(), "text/csv"),
        ("load,cpu,memory/used,disk~io\n" + csv([[row[3], *row[:3]] for row in ROWS]), "text/csv; header=present"),
        (lines(), "application/jsonlines"),
        (npy(), "application/x-npy"),
        (json.dumps({"inputs": ROWS}), "application/json"),
    ],
)
def test_invocations_in_every_format_give_the_verdicts_of_the_anomaly_endpoint(
    sagemaker: httpx.Client, body: str | bytes, media_type: str
) -> None:
    response = invoke(sagemaker, body, media_type)
    assert response.status_code == 200, response.text
    found = response.json()["results"]
    assert [row["is_anomaly"] for row in found] == [False, False, True]
    assert found == verdicts(sagemaker)


def test_invocations_in_json_lines_answer_one_line_for_each_row(sagemaker: httpx.Client) -> None:
    # Batch transform joins the lines of a response with the lines of its request.
    response = invoke(sagemaker, lines([*ROWS, ["x"]]), "application/jsonlines", Accept="application/jsonlines")
    assert response.headers["content-type"] == "application/jsonlines"
    *scored, wrong = map(json.loads, response.text.splitlines())
    assert scored == verdicts(sagemaker)
    assert (wrong["row"], "detail" in wrong) == (3, True)


def test_row_of_a_csv_that_is_not_valid_gets_an_error_and_the_others_a_verdict(sagemaker: httpx.Client) -> None:
    answer = invoke(sagemaker, csv([*ROWS[:2], [1, 2]]), "text/csv").json()
    assert [row["row"] for row in answer["results"]] == [0, 1]
    assert [error["row"] for error in answer["errors"]] == [2]


@pytest.mark.parametrize("method", ["reconstruct", "encode"])
@pytest.mark.parametrize(("body", "media_type"), [(csv(), "text/csv"), (lines(), "application/jsonlines")])
def test_custom_attributes_choose_the_method_and_the_model(
    sagemaker: httpx.Client, method: str, body: str, media_type: str
) -> None:
    response = invoke(sagemaker, body, media_type, f"method={method}, {HOSTS}")
    assert response.status_code == 200, response.text
    expected = sagemaker.post(f"/{method}", params={"model": "hosts"}, json={"inputs": ROWS}).json()
    assert response.json() == expected


def test_custom_attributes_choose_options_and_samples(sagemaker: httpx.Client) -> None:
    strict = invoke(sagemaker, csv(), "text/csv", f"{HOSTS},explain=1,alpha=0.01").json()
    assert strict["results"] == verdicts(sagemaker, explain=1, alpha=0.01)
    sample = invoke(sagemaker, '{"n": 2, "seed": 1}', "application/json", f"method=sample,{HOSTS}").json()
    assert sample == sagemaker.post("/sample", params={"model": "hosts"}, json={"n": 2, "seed": 1}).json()


def test_custom_attribute_that_is_an_id_is_ignored(sagemaker: httpx.Client) -> None:
    found = invoke(sagemaker, csv(), "text/csv", "c000b4f9-df62-4c85-a0bf-7c525f9104a4").json()
    assert found["results"] == verdicts(sagemaker)


@pytest.mark.parametrize(
    ("body", "media_type", "attributes", "status", "code"),
    [
        (csv(), "text/csv", "method=classify", 422, "invalid_field"),
        (csv(), "text/csv", "colour=red", 422, "invalid_field"),
        (csv(), "text/csv", "model=none", 404, "model_not_found"),
        (csv(), "text/plain", f"method=encode,{HOSTS}", 415, "unsupported_media_type"),
        ('1,2,3,"4\n', "text/csv", f"method=encode,{HOSTS}", 422, "invalid_csv"),
        ("[1,2\n", "application/jsonlines", f"method=encode,{HOSTS}", 422, "invalid_json"),
        ("", "text/csv", HOSTS, 422, "invalid_field"),
    ],
)
def test_invocation_that_is_not_valid_gets_a_problem(
    sagemaker: httpx.Client, body: str, media_type: str, attributes: str, status: int, code: str
) -> None:
    response = invoke(sagemaker, body, media_type, attributes)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"


def test_requests_of_a_platform_are_counted_under_its_route(sagemaker: httpx.Client) -> None:
    before = scrape(sagemaker)
    invoke(sagemaker, csv(), "text/csv")
    labels = {"endpoint": "/invocations", "model": "hosts", "version": "1", "status": "200"}
    assert increase(before, scrape(sagemaker), "elbo_requests_total", **labels) == 1


def predict(client: httpx.Client, instances: Any, **parameters: Any) -> httpx.Response:
    body = {"instances": instances, "parameters": parameters} if parameters else {"instances": instances}
    return client.post(PREDICT, json=body)


def test_health_route_of_vertex_answers_200_when_models_are_served(vertex: httpx.Client) -> None:
    assert vertex.get(HEALTH).status_code == 200


@pytest.mark.parametrize("is_object", [False, True])
def test_instances_of_vertex_get_a_prediction_each_with_the_verdict(vertex: httpx.Client, is_object: bool) -> None:
    names = ["cpu", "memory/used", "disk~io", "load"]
    instances = [dict(zip(names, row, strict=True)) for row in ROWS] if is_object else ROWS
    response = predict(vertex, instances, model="hosts", explain=2)
    assert response.status_code == 200, response.text
    assert response.json() == {"predictions": verdicts(vertex, explain=2)}


def test_instance_that_is_not_valid_has_its_error_in_its_place(vertex: httpx.Client) -> None:
    first, wrong, last = predict(vertex, [ROWS[0], [1.0], ROWS[2]], model="hosts").json()["predictions"]
    assert [first["is_anomaly"], last["is_anomaly"]] == [False, True]
    assert (wrong["row"], wrong["pointer"]) == (1, "/instances/1")


@pytest.mark.parametrize("count", [3, 300])  # 300 rows are read in a thread
def test_parameters_of_vertex_choose_the_method_and_the_model(vertex: httpx.Client, count: int) -> None:
    rows = (ROWS * 100)[:count]
    answers = {
        method: predict(vertex, rows, method=method, model="hosts").json()["predictions"]
        for method in ("reconstruct", "encode")
    }
    direct = vertex.post("/reconstruct", params={"model": "hosts"}, json={"inputs": rows}).json()
    assert [each["output"] for each in answers["reconstruct"]] == direct["outputs"]
    assert [each["error"] for each in answers["reconstruct"]] == direct["errors"]
    latents = vertex.post("/encode", params={"model": "hosts"}, json={"inputs": rows}).json()
    assert [each["latent"] for each in answers["encode"]] == latents["latents"]
    assert [each["std"] for each in answers["encode"]] == latents["std"]
    decoded = predict(vertex, latents["latents"], method="decode", model="hosts").json()["predictions"]
    expected = vertex.post("/decode", params={"model": "hosts"}, json={"latents": latents["latents"]}).json()
    assert [each["output"] for each in decoded] == expected["outputs"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"instances": ROWS, "parameters": {"method": "classify"}}, 422, "/parameters/method"),
        ({"instances": ROWS, "parameters": {"method": ["anomaly"]}}, 422, "/parameters/method"),
        ({"instances": ROWS, "parameters": {"model": "hosts", "inputs": ROWS}}, 422, "/parameters/inputs"),
        ({"instances": ROWS, "parameters": {"model": "none"}}, 404, "none"),
        ({"instances": ROWS, "parameters": {"model": 7}}, 422, "/parameters/model"),
        ({"instances": ROWS, "parameters": {"model": "hosts", "alpha": 2}}, 422, "/parameters/alpha"),
        ({"instances": [], "parameters": {}}, 422, "/instances"),
        ({"rows": ROWS}, 422, "/instances"),
        ({"instances": [[1.0], ["x"]], "parameters": {"model": "hosts"}}, 422, "/instances/0"),
        ({"instances": [{"cpu": 1.0}], "parameters": {"model": "hosts"}}, 422, "/instances/0"),
        ({"instances": [[1.0]], "parameters": {"model": "hosts", "method": "encode"}}, 422, "/instances/0"),
        ({"instances": ROWS * 101, "parameters": {"model": "hosts"}}, 413, "300 rows"),
        ({"instances": ROWS, "parameters": 7}, 422, "/parameters"),
    ],
)
def test_request_of_vertex_that_is_not_valid_gets_an_error_text(
    vertex: httpx.Client, body: Any, status: int, words: str
) -> None:
    response = vertex.post(PREDICT, json=body)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    assert words in response.json()["error"]


def test_request_of_vertex_that_is_not_json_gets_415(vertex: httpx.Client) -> None:
    response = vertex.post(PREDICT, content=b"1,2", headers={"Content-Type": "text/csv"})
    assert (response.status_code, set(response.json())) == (415, {"error"})


def test_other_endpoints_keep_their_errors_on_a_platform(vertex: httpx.Client) -> None:
    assert vertex.post("/anomaly", json={}).json()["code"] == "invalid_field"
    assert vertex.post("/invocations", json={}).status_code == 404
