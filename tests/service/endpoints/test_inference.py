"""Responses of the POST endpoints, compared with the artifact loaded outside the service."""

import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from models.artifact import Artifact
from service.inference.sampling import NoiseSource
from tests.service.running import post

NPY = {"content-type": "application/x-npy"}


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def call(artifact: Artifact, method: str, *arrays: np.ndarray) -> list[np.ndarray]:
    """Call `method` of the artifact's module; return the outputs as a list of arrays."""
    with torch.inference_mode():
        outputs = getattr(artifact.module, method)(*map(torch.from_numpy, arrays))
    return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def test_encode_returns_mean_and_std_of_the_posterior(client: httpx.Client, vae: Artifact, digits: np.ndarray) -> None:
    response = post(client, "/encode", {"inputs": digits[:7].tolist()})
    mean, std = call(vae, "encode", digits[:7])
    assert (response["model"], response["version"]) == ("vae", 1)
    assert list(response) == ["model", "version", "latents", "std"]
    np.testing.assert_allclose(response["latents"], mean, atol=1e-6)
    np.testing.assert_allclose(response["std"], std, atol=1e-6)


def test_encode_returns_a_sample_from_the_posterior_if_sample_is_true(
    client: httpx.Client, vae: Artifact, digits: np.ndarray
) -> None:
    response = post(client, "/encode", {"inputs": digits[:3].tolist(), "sample": True, "seed": 5})
    mean, std = call(vae, "encode", digits[:3])
    noise = NoiseSource().draw(5, 3, 16)[0]
    np.testing.assert_allclose(response["latents"], mean + std * noise, atol=1e-6)
    assert response["seed"] == 5


def test_encode_returns_a_seed_that_reproduces_the_sample_if_the_request_has_no_seed(
    client: httpx.Client, digits: np.ndarray
) -> None:
    body = {"inputs": digits[:2].tolist(), "sample": True}
    first, second = post(client, "/encode", body), post(client, "/encode", body)
    assert first["seed"] != second["seed"]
    assert post(client, "/encode", body | {"seed": first["seed"]})["latents"] == first["latents"]


def test_nested_and_flat_rows_give_the_same_response(client: httpx.Client, digits: np.ndarray) -> None:
    flat = post(client, "/encode", {"inputs": digits[:3].tolist()})
    nested = post(client, "/encode", {"inputs": digits[:3].reshape(3, 8, 8).tolist()})
    assert flat == nested


def test_decode_returns_flat_rows(client: httpx.Client, vae: Artifact) -> None:
    latents = NoiseSource().draw(1, 4, 16)[0]
    response = post(client, "/decode", {"latents": latents.tolist()})
    np.testing.assert_allclose(response["outputs"], call(vae, "decode", latents)[0], atol=1e-6)
    assert np.shape(response["outputs"]) == (4, 64)


def test_reconstruct_returns_the_rows_and_the_mean_squared_error_of_each(
    client: httpx.Client, vae: Artifact, digits: np.ndarray
) -> None:
    response = post(client, "/reconstruct", {"inputs": digits[:5].tolist()})
    (expected,) = call(vae, "forward", digits[:5])
    np.testing.assert_allclose(response["outputs"], expected, atol=1e-6)
    np.testing.assert_allclose(response["errors"], ((digits[:5] - expected) ** 2).mean(axis=1), rtol=1e-5)


@pytest.mark.parametrize("model", ["pca", "ae", "vae"])
def test_sample_endpoint_returns_samples_from_the_prior_of_the_artifact(
    client: httpx.Client, artifacts: Any, model: str
) -> None:
    from models.artifact import load

    response = post(client, "/sample", {"n": 6, "seed": 2**40 + 3, "temperature": 0.7}, params={"model": model})
    noise, choice = NoiseSource().draw(2**40 + 3, 6, 16)
    artifact = load(artifacts / model / "1" / "model.pt")
    (latents,) = call(artifact, "draw", noise * np.float32(0.7), choice)
    np.testing.assert_allclose(response["latents"], latents, atol=1e-6)
    np.testing.assert_allclose(response["outputs"], call(artifact, "decode", latents)[0], atol=1e-6)
    assert response["seed"] == 2**40 + 3


def test_sample_endpoint_at_temperature_zero_returns_the_centres_of_the_components(
    client: httpx.Client, vae: Artifact
) -> None:
    response = post(client, "/sample", {"n": 5, "seed": 3, "temperature": 0})
    latents = np.array(response["latents"], np.float32)
    _, choices = NoiseSource().draw(3, 5, 16)
    (centres,) = call(vae, "draw", np.zeros((5, 16), np.float32), choices)
    np.testing.assert_allclose(latents, centres, atol=1e-6)
    np.testing.assert_allclose(response["outputs"], call(vae, "decode", latents)[0], atol=1e-6)


def test_sample_endpoint_with_the_standard_prior_returns_decoded_standard_normal_noise(
    client: httpx.Client, vae: Artifact
) -> None:
    body = {"n": 5, "seed": 3, "temperature": 0.5, "prior": "standard"}
    response = post(client, "/sample", body, params={"model": "vae"})
    noise = np.float32(0.5) * NoiseSource().draw(3, 5, 16)[0]
    np.testing.assert_allclose(response["latents"], noise, atol=1e-6)
    np.testing.assert_allclose(response["outputs"], call(vae, "decode", noise)[0], atol=1e-6)


@pytest.mark.parametrize("model", ["pca", "ae"])
def test_sample_endpoint_refuses_the_standard_prior_for_other_kinds_with_422(client: httpx.Client, model: str) -> None:
    response = client.post("/sample", json={"prior": "standard"}, params={"model": model})
    assert response.status_code == 422
    assert response.json()["pointer"] == "/prior"
    assert f"{model}@1 is of the kind {model}, and only a VAE has the prior N(0, I)" in response.json()["detail"]


def test_first_samples_of_a_seed_are_the_same_for_any_number_of_samples(client: httpx.Client) -> None:
    two, five = (np.array(post(client, "/sample", {"n": n, "seed": 9})["latents"]) for n in (2, 5))
    np.testing.assert_allclose(two, five[:2], atol=1e-6)


def test_sample_endpoint_without_a_body_uses_the_defaults(client: httpx.Client) -> None:
    first = client.post("/sample").json()
    assert np.shape(first["outputs"]) == (1, 64)
    assert client.post("/sample", params={"seed": first["seed"]}).json() == first


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_interpolation_between_two_rows_starts_and_ends_at_the_latents_of_the_rows(
    client: httpx.Client, vae: Artifact, digits: np.ndarray, method: str
) -> None:
    body = {"start": {"input": digits[0].tolist()}, "end": {"input": digits[1].reshape(8, 8).tolist()}}
    response = post(client, "/interpolate", body | {"steps": 6, "method": method})
    mean, _ = call(vae, "encode", digits[:2])
    np.testing.assert_allclose(response["latents"][0], mean[0], atol=1e-6)
    np.testing.assert_allclose(response["latents"][-1], mean[1], atol=1e-6)
    assert len(response["latents"]) == 6
    latents = np.array(response["latents"], np.float32)
    np.testing.assert_allclose(response["outputs"], call(vae, "decode", latents)[0], atol=1e-6)


def test_interpolation_may_start_at_latents_and_end_at_a_row(
    client: httpx.Client, vae: Artifact, digits: np.ndarray
) -> None:
    body = {"start": {"latent": [0.5] * 16}, "end": {"input": digits[3].tolist()}, "steps": 3}
    latents = np.array(post(client, "/interpolate", body)["latents"])
    end = call(vae, "encode", digits[3:4])[0][0]
    np.testing.assert_allclose(latents[0], 0.5)
    np.testing.assert_allclose(latents[1], (0.5 + end) / 2, atol=1e-6)
    np.testing.assert_allclose(latents[2], end, atol=1e-6)


@pytest.mark.parametrize(("reference", "model"), [("pca", "pca"), ("ae", "ae"), ("vae@1", "vae"), ("hosts", "hosts")])
def test_query_parameter_model_selects_the_model(client: httpx.Client, reference: str, model: str) -> None:
    response = post(client, "/sample", {"n": 1}, params={"model": reference})
    assert (response["model"], response["version"]) == (model, 1)


@pytest.mark.parametrize("path", ["/encode", "/reconstruct"])
@pytest.mark.parametrize("dtype", ["<f4", ">f8"])
def test_npy_response_to_an_npy_request_equals_the_json_response(
    client: httpx.Client, digits: np.ndarray, path: str, dtype: str
) -> None:
    rows = digits[:4].astype(dtype).reshape(4, 8, 8)
    response = client.post(path, content=npy(rows), headers=NPY | {"accept": "application/x-npy"})
    assert response.headers["content-type"] == "application/x-npy"
    assert response.headers["elbo-model"] == "vae@1"
    array = np.load(io.BytesIO(response.content), allow_pickle=False)
    expected = post(client, path, {"inputs": digits[:4].tolist()})
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, expected["latents" if path == "/encode" else "outputs"], atol=1e-6)


def test_query_options_of_an_npy_request_act_like_json_fields(client: httpx.Client, digits: np.ndarray) -> None:
    response = client.post("/encode?sample=true&seed=8&model=ae", content=npy(digits[:2]), headers=NPY)
    body = {"inputs": digits[:2].tolist(), "sample": True, "seed": 8}
    assert response.json() == post(client, "/encode", body, params={"model": "ae"})


def test_npy_response_of_the_sample_endpoint_has_the_seed_in_a_header(client: httpx.Client) -> None:
    response = client.post("/sample?n=3", headers={"accept": "application/x-npy"})
    again = client.post(f"/sample?n=3&seed={response.headers['elbo-seed']}", headers={"accept": "application/x-npy"})
    assert again.content == response.content


@pytest.mark.parametrize(
    ("path", "body", "tiles"),
    [
        ("/decode", {"latents": [[0] * 16] * 5}, (2, 3)),
        ("/sample", {"n": 4}, (2, 2)),
        ("/reconstruct", {"inputs": [[0] * 64]}, (1, 1)),
        ("/interpolate", {"start": {"latent": [1] * 16}, "end": {"latent": [0] * 16}, "steps": 9}, (1, 9)),
    ],
)
def test_image_model_responds_with_a_png_of_tiles(
    client: httpx.Client, path: str, body: dict[str, Any], tiles: tuple[int, int]
) -> None:
    response = client.post(path, json=body, headers={"accept": "image/png"})
    assert response.headers["content-type"] == "image/png"
    width, height = Image.open(io.BytesIO(response.content)).size
    assert ((height + 2) / 66, (width + 2) / 66) == tiles


def test_models_endpoint_lists_the_served_models(client: httpx.Client, vae: Artifact) -> None:
    catalogue = client.get("/models").json()
    assert catalogue["default"] == "vae"
    assert [model["name"] for model in catalogue["models"]] == ["ae", "hosts", "pca", "vae"]
    assert catalogue["failures"] == []
    hosts = catalogue["models"][1]
    assert (hosts["shape"], hosts["width"], hosts["latents"], hosts["pictures"]) == ([4], 4, 2, False)
    assert catalogue["models"][3]["metrics"] == json.loads(json.dumps(vae.manifest.metrics))


@pytest.mark.parametrize("reference", ["hosts", "hosts@1"])
def test_model_endpoint_describes_one_model(client: httpx.Client, reference: str) -> None:
    model = client.get(f"/models/{reference}").json()
    assert [feature["name"] for feature in model["features"]] == ["cpu", "memory/used", "disk~io", "load"]
    assert [feature["unit"] for feature in model["features"]] == ["%", "MB", None, None]
    assert model["calibration"] == {"rows": 80, "floor": pytest.approx(1 / 81)}
    assert model["training"]["model"] == "pca"


@pytest.mark.parametrize(
    "path", ["/models", "/models/vae", "/livez", "/readyz", "/metrics", "/", "/docs", "/openapi.json"]
)
def test_head_returns_the_same_content_type_as_get(client: httpx.Client, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, get.status_code) == (200, 200)
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]
