"""A model with a window over HTTP: windows as JSON, npy and safetensors, missing rows, and what is refused."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch

from service.app import create_app
from service.codec import safetensors
from service.settings import Settings
from tests.models.builders import D, K
from tests.models.publishing import publish_twin, publish_windowed
from tests.models.windows import SCALES, N, windowed
from tests.service.running import post, running

NPY = {"content-type": "application/x-npy"}
LEAST = 3  # rows of a window of nine that must be there


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Return a client of a service with the models hosts and gaps. The latter imputes missing values."""
    root = tmp_path_factory.mktemp("artifacts")
    publish_windowed(root, "pca-imputing", "gaps")
    publish_windowed(root, "pca", "hosts")
    with running(create_app(Settings(artifacts=root, default_model="hosts"))) as client:
        yield client


def inputs(rows: int = 4) -> npt.NDArray[np.float32]:
    """Return windows [rows, N, D]. The last one has only two rows."""
    x = np.random.RandomState(0).standard_normal((rows, N, D)).round(3).astype(np.float32)
    x[-1, :-2] = np.nan
    return x


def as_json(x: npt.NDArray[np.float32]) -> list[Any]:
    """Return `x` as nested lists with None for NaN."""
    values = x.astype(object)
    values[np.isnan(x)] = None
    nested: list[Any] = values.tolist()
    return nested


def as_npy(x: npt.NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x)
    return buffer.getvalue()


def test_anomaly_scores_windows_and_says_how_many_rows_they_have(client: httpx.Client) -> None:
    x = inputs()
    body = post(client, "/anomaly", {"inputs": as_json(x), "explain": D})
    score, parts, contribution, expected = windowed("pca").score(torch.from_numpy(x))
    for row, result in enumerate(body["results"]):
        assert result["score"] == pytest.approx(float(score[row]), rel=1e-4)
        assert sum(result["parts"].values()) == pytest.approx(result["score"], rel=1e-4)
        assert list(result["parts"].values()) == pytest.approx(parts[row].tolist(), rel=1e-3)
        found = {feature["name"]: feature for feature in result["features"]}
        for column in range(D):
            assert found[f"x{column}"]["value"] == pytest.approx(float(x[row, -1, column]))
            assert found[f"x{column}"]["contribution"] == pytest.approx(float(contribution[row, column]), rel=1e-3)
            assert found[f"x{column}"]["expected"] == pytest.approx(float(expected[row, column]), rel=1e-3, abs=1e-4)
    assert [result["window_rows"] for result in body["results"]] == [N, N, N, 2]


def test_window_with_too_few_rows_is_never_anomalous(client: httpx.Client) -> None:
    x = np.full((1, N, D), 1e3, np.float32)
    for rows in range(1, N + 1):
        x[0, : N - rows] = np.nan
        result = post(client, "/anomaly", {"inputs": as_json(x)})["results"][0]
        assert result["window_rows"] == rows
        assert result["warming_up"] == (rows < N)
        assert result["is_anomaly"] == (rows >= LEAST)
        x[0] = 1e3


def test_every_format_gives_the_same_scores(client: httpx.Client) -> None:
    x = inputs()
    expected = [result["score"] for result in post(client, "/anomaly", {"inputs": as_json(x)})["results"]]
    from_npy = client.post("/anomaly", content=as_npy(x), headers=NPY).json()
    tensors = safetensors.dumps({"inputs": x}, {})
    from_tensors = client.post(
        "/anomaly", content=tensors, headers={"content-type": "application/x-safetensors"}
    ).json()
    for body in (from_npy, from_tensors):
        assert [result["score"] for result in body["results"]] == pytest.approx(expected, rel=1e-6)


def test_encode_reconstruct_and_interpolate_take_windows_and_give_rows(client: httpx.Client) -> None:
    x, model = inputs(), windowed("pca")
    latents = post(client, "/encode", {"inputs": as_json(x)})["latents"]
    np.testing.assert_allclose(latents, model.encode(torch.from_numpy(x))[0], rtol=1e-4, atol=1e-4)
    body = post(client, "/reconstruct", {"inputs": as_json(x)})
    outputs = np.array(body["outputs"])
    np.testing.assert_allclose(outputs, model(torch.from_numpy(x)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(body["errors"], np.square(outputs - x[:, -1]).mean(axis=1), rtol=1e-4)
    path = post(client, "/interpolate", {"start": {"input": as_json(x)[0]}, "end": {"latent": [0.0] * K}, "steps": 3})
    np.testing.assert_allclose(path["latents"][0], latents[0], rtol=1e-4, atol=1e-4)
    assert np.array(path["outputs"]).shape == (3, D)
    response = client.post("/encode", content=as_npy(x), headers=NPY | {"accept": "application/x-npy"})
    np.testing.assert_allclose(np.load(io.BytesIO(response.content)), latents, rtol=1e-5)


def test_sample_and_decode_give_rows(client: httpx.Client) -> None:
    assert np.array(post(client, "/sample", {"n": 5, "seed": 1})["outputs"]).shape == (5, D)
    latents = [[0.5, -0.5]]
    outputs = post(client, "/decode", {"latents": latents})["outputs"]
    np.testing.assert_allclose(outputs, windowed("pca").decode(torch.tensor(latents)), rtol=1e-4, atol=1e-4)


def test_models_say_how_many_rows_a_window_has(client: httpx.Client) -> None:
    described = {model["name"]: model for model in client.get("/models").json()["models"]}
    assert described["hosts"]["window"] == {"rows": N, "scales": list(SCALES)}


def test_missing_values_are_imputed_and_absent_rows_do_not_count_as_missing(client: httpx.Client) -> None:
    x = inputs()
    x[0, 3, 1] = np.nan
    body = post(client, "/encode?model=gaps", {"inputs": as_json(x)})
    assert body["imputed"] == 1
    expected = windowed("pca-imputing").encode(torch.from_numpy(x))[0]
    np.testing.assert_allclose(body["latents"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("place", "pointer", "detail"),
    [
        ((1, N - 1), "/inputs/1/8", "the newest row of the window has no value"),
        ((1, 4), "/inputs/1/4", "row 4 of the window has no value, but an earlier row has"),
        ((1, 4, 2), "/inputs/1/4/2", "'x2' has no value in row 4 of the window"),
    ],
)
def test_window_with_a_wrong_gap_costs_only_itself(
    client: httpx.Client, place: tuple[int, ...], pointer: str, detail: str
) -> None:
    x = inputs()
    expected = post(client, "/anomaly?model=gaps", {"inputs": as_json(x)})["results"]
    x[place] = np.nan
    for body in (
        post(client, "/anomaly?model=gaps", {"inputs": as_json(x)}),
        client.post("/anomaly?model=gaps", content=as_npy(x), headers=NPY).json(),
    ):
        assert [error["row"] for error in body["errors"]] == [1]
        assert body["errors"][0]["pointer"] == pointer
        assert body["errors"][0]["detail"] == detail
        assert [result["row"] for result in body["results"]] == [0, 2, 3]
        assert [result["score"] for result in body["results"]] == pytest.approx(
            [expected[row]["score"] for row in (0, 2, 3)], rel=1e-5
        )
    refused = client.post("/encode?model=gaps", json={"inputs": as_json(x)})
    assert refused.status_code == 422
    assert refused.json()["pointer"] == pointer


@pytest.mark.parametrize("path", ["/encode", "/reconstruct"])
def test_rows_without_their_past_are_refused_with_the_shape_of_a_window(client: httpx.Client, path: str) -> None:
    for body in ({"json": {"inputs": inputs()[0].tolist()}}, {"content": as_npy(inputs()[:, -1]), "headers": NPY}):
        response = client.post(path, **body)
        assert response.status_code == 422
        problem = response.json()
        assert problem["code"] == "invalid_rows"
        assert f"[B, {N}, {D}]" in problem["detail"]
        assert "together with the 8 rows before it" in problem["detail"]


@pytest.mark.parametrize("shape", [(2, N - 1, D), (2, N + 1, D), (2, N, D + 1), (0, N, D), (2, 1, N, D)])
def test_windows_of_another_shape_are_refused(client: httpx.Client, shape: tuple[int, ...]) -> None:
    for path in ("/encode", "/anomaly"):
        for body in (
            {"json": {"inputs": np.ones(shape).tolist()}},
            {"content": as_npy(np.ones(shape, np.float32)), "headers": NPY},
        ):
            response = client.post(path, **body)
            assert response.status_code == 422, response.text
            assert response.json()["code"] == "invalid_rows"


def test_model_without_a_window_refuses_windows(tmp_path: Path) -> None:
    publish_twin(tmp_path, "pca")
    with running(create_app(Settings(artifacts=tmp_path))) as client:
        for path in ("/encode", "/anomaly"):
            assert client.post(path, json={"inputs": np.ones((2, N, D)).tolist()}).status_code == 422
        assert "window" not in client.get("/models").json()["models"][0]


def test_many_windows_are_scored_in_several_batches(client: httpx.Client) -> None:
    x = np.tile(inputs()[:1], (3000, 1, 1))
    body = client.post("/anomaly", content=as_npy(x), headers=NPY | {"accept": "application/x-npy"}).content
    numbers = np.load(io.BytesIO(body))
    assert numbers.shape[0] == 3000
    expected = post(client, "/anomaly", {"inputs": as_json(x[:1])})["results"][0]["score"]
    np.testing.assert_allclose(numbers[:, 0], expected, rtol=1e-5)


def test_large_json_of_windows_is_read_in_pieces(client: httpx.Client) -> None:
    x = np.random.RandomState(1).standard_normal((2000, N, D)).round(3).astype(np.float32)
    body = post(client, "/anomaly", {"inputs": as_json(x)})
    score = windowed("pca").score(torch.from_numpy(x))[0]
    np.testing.assert_allclose([result["score"] for result in body["results"]], score, rtol=1e-4)
