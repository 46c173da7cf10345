"""The Open Inference Protocol: values against the modules of the models, and the form of every refusal."""

import asyncio
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch

from service.app import create_app
from service.codec.budget import Budget
from service.codec.open_inference import read_request
from service.inference.sampling import NoiseSource
from service.settings import Settings
from tests.models import conditional
from tests.models.builders import B, D, K, batch, pipeline
from tests.models.publishing import publish, publish_conditional, publish_windowed
from tests.models.windows import N, windowed
from tests.plain_http import NO_AUTHORITIES
from tests.service.access.keys import KeySet
from tests.service.gate import Gate
from tests.service.running import running
from tests.service.scrape import increase, scrape, total
from tests.service.serving import serving

Array = npt.NDArray[Any]
X = batch()[0].numpy()
MAX_ROWS = 5000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with pca@1, the VAE vae@1 and vae@2, windows@1, and the conditional model kinds@1."""
    root = tmp_path_factory.mktemp("artifacts")
    publish(root, "pca", "pca")
    for _ in range(2):
        publish(root, "vae-gaussian", "vae")
    publish_windowed(root, "pca", "windows")
    publish_conditional(root, "kinds")
    return root


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[httpx.Client]:
    settings = Settings(artifacts=root, max_rows=MAX_ROWS, max_body_bytes=2**21, log_level="error", poll_seconds=3600)
    with running(create_app(settings)) as client:
        yield client


def tensor(x: Array, name: str = "x", datatype: str = "FP32", **fields: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(x.shape), "datatype": datatype, "data": x.tolist(), **fields}


def outputs(*names: str, **parameters: Any) -> list[dict[str, Any]]:
    return [{"name": name, "parameters": parameters} for name in names]


def infer(client: httpx.Client, model: str, body: dict[str, Any], **options: Any) -> dict[str, Array]:
    """Send a JSON request; return the outputs of the JSON response as arrays."""
    response = client.post(f"/v2/models/{model}/infer", json=body, **options)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return {each["name"]: np.array(each["data"]).reshape(each["shape"]) for each in response.json()["outputs"]}


def as_binary(*tensors: tuple[str, str, Array], **fields: Any) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of a request whose inputs (name, datatype, numbers) are binary."""
    inputs = [
        {"name": n, "datatype": d, "shape": list(a.shape), "parameters": {"binary_data_size": a.nbytes}}
        for n, d, a in tensors
    ]
    head = json.dumps({"inputs": inputs, **fields}).encode()
    body = head + b"".join(array.tobytes() for _, _, array in tensors)
    return body, {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}


def read_binary(response: httpx.Response) -> dict[str, Array]:
    """Return the outputs of a response whose numbers are all binary."""
    assert response.status_code == 200, response.text
    length = int(response.headers["inference-header-content-length"])
    rest, found = response.content[length:], {}
    for each in json.loads(response.content[:length])["outputs"]:
        size = each["parameters"]["binary_data_size"]
        dtype = {"FP32": np.float32, "BOOL": np.bool_}[each["datatype"]]
        found[each["name"]] = np.frombuffer(rest[:size], dtype).reshape(each["shape"])
        rest = rest[size:]
    assert not rest
    return found


def run(kind: str, method: str, *inputs: Array) -> list[Array]:
    """Return the outputs of a method of the model that was published."""
    result = getattr(pipeline(kind), method)(*map(torch.from_numpy, inputs))
    return [each.numpy() for each in (result if isinstance(result, tuple) else (result,))]


def test_model_without_requested_outputs_gives_every_output_of_its_metadata(client: httpx.Client) -> None:
    found = infer(client, "vae", {"inputs": [tensor(X)]})
    metadata = client.get("/v2/models/vae").json()
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, D]}]
    assert [each["name"] for each in metadata["outputs"]] == list(found)
    for each in metadata["outputs"]:
        assert list(found[each["name"]].shape) == [B, *each["shape"][1:]]
    (x_hat,) = run("vae-gaussian", "forward", X)
    mean, std = run("vae-gaussian", "encode", X)
    score, parts, contribution, expected = run("vae-gaussian", "score", X)
    (p_value,) = run("vae-gaussian", "p_value", score)
    error = ((x_hat - X) ** 2).mean(axis=1)
    values = {
        "x_hat": x_hat, "error": error, "mean": mean, "std": std, "score": score, "parts": parts, "p_value": p_value,
        "contribution": contribution, "expected": expected, "is_anomaly": p_value <= 0.05,
    }  # fmt: skip
    for name, value in values.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert (found["severity"] > 1).tolist() == found["is_anomaly"].tolist()


def test_binary_request_gives_binary_outputs_of_the_same_numbers(client: httpx.Client) -> None:
    body, headers = as_binary(("x", "FP32", X), parameters={"binary_data_output": True})
    response = client.post("/v2/models/vae/infer", content=body, headers=headers)
    found, texts = read_binary(response), infer(client, "vae", {"inputs": [tensor(X)]})
    assert list(found) == list(texts)
    for name, value in found.items():
        np.testing.assert_allclose(value, texts[name], rtol=1e-6, err_msg=name)
    assert response.headers["elbo-model"] == "vae@2"


def test_response_has_the_requested_outputs_in_order_and_each_in_its_format(client: httpx.Client) -> None:
    wanted = [*outputs("score", binary_data=True), *outputs("mean")]
    response = client.post("/v2/models/pca/infer", json={"id": "7", "inputs": [tensor(X)], "outputs": wanted})
    head = json.loads(response.content[: int(response.headers["inference-header-content-length"])])
    assert (head["id"], head["model_name"], head["model_version"]) == ("7", "pca", "1")
    score, mean = head["outputs"]
    assert (score["name"], score["parameters"], "data" in score) == ("score", {"binary_data_size": 4 * B}, False)
    np.testing.assert_allclose(np.reshape(mean["data"], mean["shape"]), run("pca", "encode", X)[0], atol=1e-5)
    binary = np.frombuffer(response.content[-4 * B :], np.float32)
    np.testing.assert_allclose(binary, run("pca", "score", X)[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("datatype", "dtype"),
    [("FP16", "f2"), ("FP64", "f8"), ("INT8", "i1"), ("INT16", "i2"), ("INT32", "i4"), ("INT64", "i8"), ("UINT8", "u1"),
     ("UINT16", "u2"), ("UINT32", "u4"), ("UINT64", "u8")],
)  # fmt: skip
def test_numbers_of_another_datatype_are_converted(client: httpx.Client, datatype: str, dtype: str) -> None:
    x = np.arange(2 * D).reshape(2, D).astype(dtype)
    body, headers = as_binary(("x", datatype, x), outputs=outputs("mean", binary_data=True))
    found = read_binary(client.post("/v2/models/pca/infer", content=body, headers=headers))
    np.testing.assert_allclose(found["mean"], run("pca", "encode", x.astype(np.float32))[0], atol=1e-5)
    assert infer(client, "pca", {"inputs": [tensor(x, datatype=datatype)], "outputs": outputs("mean")})


def test_bf16_numbers_are_the_upper_halves_of_float32(client: httpx.Client) -> None:
    x = np.array([[1.0, -2.5, 0.0, 3.0, 96.0]], np.float32)
    body, headers = as_binary(("x", "BF16", (x.view(np.uint32) >> 16).astype("u2")), outputs=outputs("mean"))
    response = client.post("/v2/models/pca/infer", content=body, headers=headers)
    np.testing.assert_allclose(response.json()["outputs"][0]["data"], run("pca", "encode", x)[0][0], rtol=1e-5)


@pytest.mark.parametrize("flat", [True, False])
def test_long_json_data_are_read_like_short_data(client: httpx.Client, flat: bool) -> None:
    x = np.random.RandomState(0).standard_normal((4000, D)).astype(np.float32)
    data = x.ravel().tolist() if flat else x.tolist()
    body = {"inputs": [tensor(x, data=data)], "outputs": outputs("x_hat")}
    assert len(json.dumps(body)) > 2**17
    found = infer(client, "vae", body)
    np.testing.assert_allclose(found["x_hat"], run("vae-gaussian", "forward", x)[0], rtol=1e-4, atol=1e-5)


def test_decode_is_a_model_of_its_own(client: httpx.Client) -> None:
    z = batch()[1].numpy()
    described = client.get("/v2/models/vae:decode").json()
    assert described["inputs"] == [{"name": "z", "datatype": "FP32", "shape": [-1, K]}]
    found = infer(client, "vae%3Adecode", {"inputs": [tensor(z, "z")]})
    np.testing.assert_allclose(found["x_hat"], run("vae-gaussian", "decode", z)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"seed": -1}, {"n": 0}, {"temperature": "hot"}, {"prior": "none"}])
def test_single_option_that_is_not_valid_gives_422(client: httpx.Client, options: dict[str, Any]) -> None:
    response = client.post("/v2/models/vae:sample/infer", json={"inputs": [], "parameters": options})
    assert_refused(response, 422, f"{next(iter(options))} should be")


def test_sample_gives_the_rows_of_its_seed_and_returns_a_fresh_seed(client: httpx.Client) -> None:
    body = {"inputs": [], "parameters": {"seed": 5, "n": 3, "noise": False}}
    found = infer(client, "vae:sample", body)
    (z,) = run("vae-gaussian", "draw", *NoiseSource().draw(5, 3, K))
    np.testing.assert_allclose(found["z"], z, rtol=1e-5)
    np.testing.assert_allclose(found["x"], run("vae-gaussian", "decode", z)[0], rtol=1e-4, atol=1e-5)
    answer = client.post("/v2/models/vae:sample/infer", json={"inputs": []}).json()
    seeded = infer(client, "vae:sample", {"inputs": [], "parameters": {"seed": answer["parameters"]["seed"]}})
    assert seeded["x"].ravel().tolist() == next(each["data"] for each in answer["outputs"] if each["name"] == "x")


def test_window_model_takes_windows(client: httpx.Client) -> None:
    x = np.random.RandomState(0).standard_normal((2, N, D)).astype(np.float32)
    assert client.get("/v2/models/windows").json()["inputs"][0]["shape"] == [-1, N, D]
    found = infer(client, "windows", {"inputs": [tensor(x)], "outputs": outputs("score", "mean")})
    module = windowed("pca")
    np.testing.assert_allclose(found["score"], module.score(torch.from_numpy(x))[0], rtol=1e-3)
    np.testing.assert_allclose(found["mean"], module.encode(torch.from_numpy(x))[0], atol=1e-4)


def test_version_in_the_path_chooses_the_version(client: httpx.Client) -> None:
    body = {"inputs": [tensor(X)], "outputs": outputs("score")}
    chosen = client.post("/v2/models/vae/versions/1/infer", json=body).json()
    newest = client.post("/v2/models/vae/infer", json=body).json()
    assert (chosen["model_version"], newest["model_version"]) == ("1", "2")
    assert client.get("/v2/models/vae/versions/1").json()["versions"] == ["1", "2"]
    assert client.get("/v2/models/vae/versions/2/ready").json() == {"name": "vae", "ready": True}


def test_alpha_decides_which_rows_are_anomalous(client: httpx.Client) -> None:
    body = {"inputs": [tensor(X)], "outputs": outputs("p_value", "is_anomaly")}
    for alpha in (0.1, 0.5, 0.9):
        found = infer(client, "pca", body | {"parameters": {"alpha": alpha}})
        assert found["is_anomaly"].tolist() == (found["p_value"] <= alpha).tolist()


def test_scored_rows_count_as_live_traffic_unless_the_request_declines(client: httpx.Client) -> None:
    body = {"inputs": [tensor(X)], "outputs": outputs("score")}
    before = scrape(client)
    infer(client, "pca", body)
    infer(client, "pca", body | {"parameters": {"observe": False}})
    infer(client, "pca", body | {"outputs": outputs("mean")})
    after = scrape(client)
    for metric in ("elbo_scored_rows_total", "elbo_unobserved_rows_total"):
        assert total(after, metric) - total(before, metric) == B
    labels = {"endpoint": "/v2/models/{name}/infer", "model": "pca", "version": "1"}
    assert increase(before, after, "elbo_rows_total", **labels) == 3 * B


def test_gzip_body_is_read_like_the_plain_body(client: httpx.Client) -> None:
    body, headers = as_binary(("x", "FP32", X), outputs=outputs("mean"))
    plain = client.post("/v2/models/pca/infer", content=body, headers=headers)
    zipped = client.post(
        "/v2/models/pca/infer", content=gzip.compress(body), headers=headers | {"content-encoding": "gzip"}
    )
    assert zipped.json()["outputs"] == plain.json()["outputs"]


def test_server_describes_itself_and_is_ready(client: httpx.Client) -> None:
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}


# Refusals


def assert_refused(response: httpx.Response, status: int, reason: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    assert reason in response.json()["error"]


ONE = [[0.5] * D]
GOOD = {"name": "x", "shape": [1, D], "datatype": "FP32", "data": ONE}
MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({}, "inputs should be a list"),
    ({"inputs": {}}, "inputs should be a list"),
    ({"inputs": [1]}, "inputs[0] should be an object"),
    ({"inputs": [GOOD | {"name": 1}]}, "name should be a string"),
    ({"inputs": [GOOD, GOOD]}, "'x' is given twice"),
    ({"inputs": []}, "takes the input x, got none"),
    ({"inputs": [GOOD | {"name": "y"}]}, "takes the input x, got y"),
    ({"inputs": [GOOD, GOOD | {"name": "y"}]}, "takes the input x, got x, y"),
    ({"inputs": [GOOD | {"shape": [2**40, 2**40]}]}, "shape should be"),
    ({"inputs": [GOOD | {"shape": [-1, D]}]}, "shape should be"),
    ({"inputs": [GOOD | {"shape": [1] * 9}]}, "shape should be"),
    ({"inputs": [GOOD | {"shape": [2, D]}]}, "but data has the shape"),
    ({"inputs": [GOOD | {"shape": [D]}]}, "but data has the shape"),
    ({"inputs": [GOOD | {"shape": [D], "data": ONE[0]}]}, "expected an array [N, 5]"),
    ({"inputs": [GOOD | {"shape": [], "data": []}]}, "but data has the shape"),
    ({"inputs": [GOOD | {"shape": [0, D], "data": []}]}, "expected an array [N, 5]"),
    ({"inputs": [GOOD | {"data": [[0.5] * D, [0.5]], "shape": [2, D]}]}, "different lengths"),
    ({"inputs": [GOOD | {"data": [[True] * D]}]}, "list of numbers, got true"),
    ({"inputs": [GOOD | {"data": [["a"] * D]}]}, 'list of numbers, got "a"'),
    ({"inputs": [GOOD | {"data": [[None] * D]}]}, "x/0"),
    ({"inputs": [GOOD | {"data": [[1e39] * D]}]}, "x/0/0"),
    ({"inputs": [GOOD | {"datatype": "BOOL"}]}, "datatype should be one of FP16"),
    ({"inputs": [GOOD | {"datatype": "BYTES"}]}, "shape should be [N] or [N, 1]"),
    ({"inputs": [GOOD | {"datatype": "BF16"}]}, "BF16 numbers must be binary"),
    ({"inputs": [GOOD | {"data": None}]}, "needs either data or binary_data_size, got neither"),
    ({"inputs": [GOOD | {"parameters": {"binary_data_size": 4 * D}}]}, "got both"),
    ({"inputs": [GOOD | {"parameters": {"shared_memory_region": "a"}}]}, "does not read shared memory"),
    ({"inputs": [GOOD | {"parameters": []}]}, "parameters should be an object"),
    ({"inputs": [GOOD], "id": 7}, "id should be a string"),
    ({"inputs": [GOOD], "outputs": outputs("nope")}, "pca has no output 'nope'"),
    ({"inputs": [GOOD], "outputs": outputs("mean", "mean")}, "'mean' is given twice"),
    ({"inputs": [GOOD], "outputs": outputs("mean", classification=2)}, "does not support classification"),
    ({"inputs": [GOOD], "outputs": outputs("mean", binary_data=1)}, "binary_data should be true or false"),
    ({"inputs": [GOOD], "outputs": False}, "outputs should be a list"),
    ({"inputs": [GOOD], "parameters": {"alhpa": 0.1}}, "pca has no parameter 'alhpa'"),
    ({"inputs": [GOOD], "parameters": {"alpha": 2}}, "alpha should be less than 1"),
    ({"inputs": [GOOD], "outputs": outputs("mean"), "parameters": {"alpha": 2}}, "alpha should be less than 1"),
    ({"inputs": [GOOD], "parameters": {"timeout": -1}}, "timeout should be"),
    ({"inputs": [GOOD], "parameters": {"condition": "{"}}, "invalid JSON"),
    ({"inputs": [GOOD], "parameters": {"condition": '{"a": 1}'}}, "knows no condition"),
    ({"inputs": [GOOD], "parameters": {"binary_data_output": 1}}, "binary_data_output should be true or false"),
]


@pytest.mark.parametrize(("body", "reason"), MALFORMED, ids=[reason for _, reason in MALFORMED])
def test_malformed_request_gives_422_with_the_reason(client: httpx.Client, body: dict[str, Any], reason: str) -> None:
    assert_refused(client.post("/v2/models/pca/infer", json=body), 422, reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "got nothing"),
        (b"[]", "an empty list"),
        (b"{", "invalid JSON"),
        (b'{"id": "a", "id": "b"}', "duplicate key"),
    ],
)
def test_body_that_is_no_json_object_gives_422(client: httpx.Client, content: bytes, reason: str) -> None:
    response = client.post("/v2/models/pca/infer", content=content, headers={"content-type": "application/json"})
    assert_refused(response, 422, reason)


@pytest.mark.parametrize("length", ["0", "-1", "99999", "1.5", "x", "9" * 100])
def test_wrong_length_of_the_json_object_gives_422(client: httpx.Client, length: str) -> None:
    body, headers = as_binary(("x", "FP32", X))
    response = client.post(
        "/v2/models/pca/infer", content=body, headers=headers | {"inference-header-content-length": length}
    )
    assert_refused(response, 422, "Inference-Header-Content-Length should be the length of the JSON object")


def test_binary_numbers_of_another_size_than_the_shape_give_422(client: httpx.Client) -> None:
    body, headers = as_binary(("x", "FP32", X))
    path = "/v2/models/pca/infer"
    assert_refused(client.post(path, content=body[:-1], headers=headers), 422, "bytes are left in the body")
    assert_refused(client.post(path, content=body + b"1", headers=headers), 422, "1 bytes follow the last binary")
    wrong = body.replace(str(X.nbytes).encode(), str(X.nbytes - 4).encode())
    assert len(wrong) == len(body)
    assert_refused(client.post(path, content=wrong, headers=headers), 422, "but binary_data_size is")


def test_too_many_rows_give_413(client: httpx.Client) -> None:
    x = np.zeros((MAX_ROWS + 1, D), np.float32)
    body, headers = as_binary(("x", "FP32", x))
    assert_refused(client.post("/v2/models/pca/infer", content=body, headers=headers), 413, "ELBO_MAX_ROWS")
    many = {"inputs": [], "parameters": {"n": MAX_ROWS + 1}}
    assert_refused(client.post("/v2/models/pca:sample/infer", json=many), 422, "ELBO_MAX_ROWS")
    claimed = {"inputs": [GOOD | {"shape": [2**40, D]}]}  # far more rows than the body has
    assert_refused(client.post("/v2/models/pca/infer", json=claimed), 422, "but data has the shape")


@pytest.mark.parametrize("name", ["nobody", "vae:nope", "vae@9", "vae/versions/9"])
def test_unknown_model_gives_404(client: httpx.Client, name: str) -> None:
    for response in (
        client.get(f"/v2/models/{name}"),
        client.get(f"/v2/models/{name}/ready"),
        client.post(f"/v2/models/{name}/infer", json={"inputs": [GOOD]}),
    ):
        assert_refused(response, 404, "is not served")


def test_unknown_path_and_method_give_errors_of_the_protocol(client: httpx.Client) -> None:
    assert_refused(client.get("/v2/nope"), 404, "does not exist")
    assert_refused(client.post("/v2/repository/index"), 404, "does not exist")
    response = client.get("/v2/models/vae/infer")
    assert_refused(response, 405, "supports POST")
    assert response.headers["allow"] == "POST"


def test_body_that_a_page_of_another_site_can_send_gives_415(client: httpx.Client) -> None:
    path, body = "/v2/models/pca/infer", json.dumps({"inputs": [GOOD]}).encode()
    assert client.post(path, content=body).status_code == 200  # as Triton's client sends it
    assert_refused(client.post(path, content=body, headers={"origin": "https://a.example"}), 415, "no Content-Type")
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert_refused(client.post(path, content=body, headers=form), 415, "x-www-form-urlencoded")


def test_server_without_models_gives_503(tmp_path: Path) -> None:
    with running(create_app(Settings(artifacts=tmp_path, log_level="error"))) as client:
        for path in ("/v2/health/ready", "/v2/models/vae/ready", "/v2/models/vae"):
            assert_refused(client.get(path), 503, "no model is served yet")
        assert_refused(client.post("/v2/models/vae/infer", json={"inputs": [GOOD]}), 503, "no model is served yet")
        assert client.get("/v2/health/live").status_code == 200


def test_live_scoring_needs_the_scope_write(root: Path, tmp_path: Path) -> None:
    keys = KeySet(tmp_path / "keys.toml")
    keys.add("reader", "infer")
    with running(create_app(Settings(artifacts=root, api_keys_file=keys.path, log_level="error"))) as client:
        body = {"inputs": [GOOD], "outputs": outputs("score"), "parameters": {"observe": True}}
        path = "/v2/models/pca/infer"
        assert_refused(client.post(path, json=body), 401, "API key")
        assert_refused(client.post(path, json=body, headers=keys.headers("reader")), 403, "scope write")
        del body["parameters"]
        assert client.post(path, json=body, headers=keys.headers("reader")).status_code == 200


def test_full_queue_gives_429_and_a_passed_timeout_504(root: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=root, max_rows=3, queue_rows=3, default_model="pca")) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find("pca"), np.zeros((2, D), np.float32))
            body = {"inputs": [GOOD], "outputs": outputs("mean"), "parameters": {"timeout": 100_000}}
            async with httpx.AsyncClient(
                verify=NO_AUTHORITIES, base_url=f"http://127.0.0.1:{port}", timeout=20
            ) as client:
                late = await client.post("/v2/models/pca/infer", json=body)
                other = await gate.hold(service.batcher, service.find("pca"), np.zeros((1, D), np.float32))
                refused = await client.post("/v2/models/pca/infer", json=body)
                gate.open.set()
                await asyncio.gather(held, other)
        assert_refused(late, 504, "was not ready after")
        assert_refused(refused, 429, "too many rows are pending")
        assert int(refused.headers["retry-after"]) >= 1

    asyncio.run(scenario())


LEVELS = [("0", "1"), ("2", ""), ("", "0")]


def texts(name: str, values: list[str], shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "shape": shape or [len(values), 1], "datatype": "BYTES", "data": values}


def rows_with_levels() -> tuple[Array, Array]:
    """Return rows [3, D], and the rows with LEVELS, as the module takes them."""
    x = conditional.batch()[0][:3, : conditional.D]
    codes = [[int(level) if level else None for level in levels] for levels in LEVELS]
    return x.numpy(), torch.cat((x, torch.stack([conditional.condition(*each) for each in codes])), dim=1).numpy()


def test_inputs_of_texts_give_each_row_its_condition(client: httpx.Client) -> None:
    x, known = rows_with_levels()
    module = conditional.conditional("vae")
    with torch.inference_mode():
        mean, score = module.encode(torch.from_numpy(known))[0], module.score(torch.from_numpy(known))[0]
    named = [list(column) for column in zip(*LEVELS, strict=True)]
    inputs = [tensor(x), *(texts(name, values) for name, values in zip("ab", named, strict=True))]
    found = infer(client, "kinds", {"inputs": inputs, "outputs": outputs("mean", "score")})
    np.testing.assert_allclose(found["mean"], mean[:, : conditional.L], atol=1e-5)
    np.testing.assert_allclose(found["score"], score, rtol=1e-4)
    encoded = [b"".join(len(each).to_bytes(4, "little") + each.encode() for each in values) for values in named]
    columns = [(name, "BYTES", np.frombuffer(each, np.uint8)) for name, each in zip("ab", encoded, strict=True)]
    body, headers = as_binary(("x", "FP32", x), *columns, outputs=outputs("mean", binary_data=True))
    head = json.loads(body[: int(headers["inference-header-content-length"])])
    for described in head["inputs"][1:]:
        described["shape"] = [3, 1]
    text = json.dumps(head).encode()
    body = text + body[int(headers["inference-header-content-length"]) :]
    headers["inference-header-content-length"] = str(len(text))
    binary = read_binary(client.post("/v2/models/kinds/infer", content=body, headers=headers))
    np.testing.assert_array_equal(binary["mean"], found["mean"].astype(np.float32))
    short = client.post("/v2/models/kinds/infer", content=body[:-1], headers=headers)
    assert (short.status_code, "are not 3 texts" in short.json()["error"]) == (422, True)


@pytest.mark.parametrize("is_nested", [False, True])
def test_long_list_of_texts_in_json_gives_each_row_its_condition(client: httpx.Client, is_nested: bool) -> None:
    x, _ = rows_with_levels()
    repeats = 1600
    named = [level for level, _ in LEVELS]
    values = named * repeats
    wanted = outputs("mean", binary_data=True)
    described = texts("a", values, [len(values), 1] if is_nested else [len(values)])
    if is_nested:
        described["data"] = [[value] for value in values]
    body, headers = as_binary(("x", "FP32", np.tile(x, (repeats, 1))), outputs=wanted)
    length = int(headers["inference-header-content-length"])
    head = json.loads(body[:length])
    head["inputs"].append(described)
    text = json.dumps(head, indent=20).encode()  # more bytes than are read at once
    headers["inference-header-content-length"] = str(len(text))
    response = client.post("/v2/models/kinds/infer", content=text + body[length:], headers=headers)
    short = infer(client, "kinds", {"inputs": [tensor(x), texts("a", named)], "outputs": outputs("mean")})
    np.testing.assert_allclose(read_binary(response)["mean"], np.tile(short["mean"], (repeats, 1)), atol=1e-5)


def test_list_of_more_texts_than_a_field_may_have_values_is_read_in_pieces() -> None:
    values = [json.dumps(f'text {index}, with "\\[ and a comma') for index in range(60_000)]
    described = json.dumps(texts("a", []) | {"data": ["VALUES"], "shape": [len(values)]})
    text = b'{"inputs": [%b]}' % described.replace('"VALUES"', ",".join(values)).encode()
    budget = Budget(
        max_bytes=10**9,
        max_rows=10**6,
        width=3,
        deadline=perf_counter() + 60,
        hold=lambda _: None,
        release=lambda _: None,
    )
    assert read_request(text, None, budget).texts["a"].values == [json.loads(value) for value in values]


@pytest.mark.parametrize("data", [["0"] * 40_000, [0] * 60_000, [[] for _ in range(60_000)], ["a,b", '"[,'] * 9000])
def test_long_list_with_another_number_of_texts_is_refused_for_its_shape(client: httpx.Client, data: Any) -> None:
    described = texts("a", []) | {"data": data, "shape": [3, 1]}
    response = client.post("/v2/models/kinds/infer", json={"inputs": [tensor(rows_with_levels()[0]), described]})
    assert response.status_code == 422
    assert f"the shape is [3, 1], but data has {len(data)} texts" in response.json()["error"]


def test_one_text_and_the_parameter_give_all_rows_the_same_condition(client: httpx.Client) -> None:
    x, _ = rows_with_levels()
    wanted = outputs("mean", "p_value")
    found = infer(client, "kinds", {"inputs": [tensor(x), texts("a", ["1"])], "outputs": wanted})
    for condition in ({"a": "1"}, '{"a": "1"}', [{"a": "1"}] * 3):
        other = infer(
            client, "kinds", {"inputs": [tensor(x)], "outputs": wanted, "parameters": {"condition": condition}}
        )
        for name in ("mean", "p_value"):
            np.testing.assert_array_equal(other[name], found[name])


def test_metadata_list_the_inputs_of_texts_of_a_conditional_model(client: httpx.Client) -> None:
    for model, name, width in (("kinds", "x", conditional.D), ("kinds:decode", "z", conditional.L)):
        columns = [{"name": column, "datatype": "BYTES", "shape": [-1, 1]} for column in "ab"]
        expected = [{"name": name, "datatype": "FP32", "shape": [-1, width]}, *columns]
        assert client.get(f"/v2/models/{model}").json()["inputs"] == expected
    assert client.get("/v2/models/kinds:sample").json()["inputs"] == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"inputs": [texts("c", ["0"])]}, "takes the input x, and as BYTES a, b, got x, c (BYTES)"),
        ({"inputs": [texts("a", ["7"])]}, "'a' has no level \"7\": expected '0', '1', '2'"),
        ({"inputs": [texts("a", ["0", "1"])]}, "has the shape [2, 1] for 3 rows"),
        ({"inputs": [texts("a", ["0"], [1, 1, 1])]}, "shape should be [N] or [N, 1]"),
        ({"inputs": [texts("a", ["0"], [3, 1])]}, "the shape is [3, 1], but data has 1 texts"),
        ({"inputs": [{**texts("a", []), "data": [1, 2, 3], "shape": [3]}]}, "data should be a list of texts"),
        ({"inputs": [texts("a", ["0"])], "parameters": {"condition": {"b": "0"}}}, "the condition is given twice"),
        ({"inputs": [texts("a", ["0"]), texts("a", ["0"])]}, "the input 'a' is given twice"),
    ],
)
def test_texts_that_are_no_conditions_are_refused(client: httpx.Client, fields: dict[str, Any], words: str) -> None:
    x, _ = rows_with_levels()
    body = {**fields, "inputs": [tensor(x), *fields["inputs"]]}
    answer = client.post("/v2/models/kinds/infer", json=body)
    assert (answer.status_code, words in answer.json()["error"]) == (422, True), answer.text


def test_texts_beside_a_single_number_are_refused_for_the_shape_of_the_number(client: httpx.Client) -> None:
    number = {"name": "x", "shape": [], "datatype": "FP32", "data": [1.0]}
    answer = client.post("/v2/models/kinds/infer", json={"inputs": [texts("a", ["0"]), number]})
    assert (answer.status_code, "expected an array [N" in answer.json()["error"]) == (422, True), answer.text
