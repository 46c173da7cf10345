"""Every endpoint, called with a convolutional model of RGB images."""

import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from models.calibration import Calibration
from models.likelihood import BernoulliLikelihood
from models.networks import conv_decoder, conv_encoder
from models.pipeline import Pipeline
from models.prior import gaussian_prior
from models.scaling import Scaling
from models.vae import VAE
from service.app import create_app
from service.settings import Settings
from tests.service.published import publish
from tests.service.running import post, running

SHAPE, K = (6, 5, 3), 4
D = 6 * 5 * 3


def pipeline() -> Pipeline:
    torch.manual_seed(0)
    networks = conv_encoder(SHAPE, (4, 6), 2 * K), conv_decoder(SHAPE, (4, 6), K)
    scaling = Scaling(torch.zeros(D), torch.full((D,), 255.0))
    model = Pipeline(
        scaling, VAE(*networks, BernoulliLikelihood()), gaussian_prior(torch.ones(K)), Calibration(torch.rand(99))
    )
    return model.eval().requires_grad_(False)


def images() -> np.ndarray:
    """Return images [7, 6, 5, 3] with values from 0 to 255 and a different mean in each channel."""
    bright = np.random.default_rng(0).random((7, *SHAPE)) * [250, 120, 30]
    return bright.astype(np.float32)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    root, x = tmp_path_factory.mktemp("artifacts"), torch.from_numpy(images().reshape(7, D))
    names = [f"pixel[{','.join(map(str, index))}]" for index in np.ndindex(SHAPE)]
    publish(root, "colour-images", pipeline(), x, names, SHAPE, (0.0, 255.0))
    with running(create_app(Settings(artifacts=root))) as client:
        yield client


def test_latents_are_the_same_for_nested_rows_flat_rows_and_npy_rows(client: httpx.Client) -> None:
    x = images()
    nested = post(client, "/encode", {"inputs": x.astype(float).tolist()})
    assert post(client, "/encode", {"inputs": x.reshape(7, D).astype(float).tolist()}) == nested
    file = io.BytesIO()
    np.save(file, x)
    response = client.post("/encode", content=file.getvalue(), headers={"content-type": "application/x-npy"})
    assert response.json() == nested
    mean, _ = pipeline().encode(torch.from_numpy(x.reshape(7, D)))
    np.testing.assert_allclose(nested["latents"], mean, atol=1e-5)


def test_pointer_of_an_invalid_value_names_line_column_and_channel(client: httpx.Client) -> None:
    rows: list[Any] = images()[:2].astype(float).tolist()
    rows[1][4][2][1] = None
    assert client.post("/encode", json={"inputs": rows}).json()["pointer"] == "/inputs/1/4/2/1"


def test_feature_name_contains_the_line_the_column_and_the_channel(client: httpx.Client) -> None:
    x = images()[:1]
    result = post(client, "/anomaly", {"inputs": x.astype(float).tolist(), "explain": D})["results"][0]
    value = {feature["name"]: feature["value"] for feature in result["features"]}
    assert value["pixel[4,2,1]"] == pytest.approx(float(x[0, 4, 2, 1]))


def test_png_of_a_reconstruction_has_the_colours_of_the_outputs(client: httpx.Client) -> None:
    body = {"inputs": images()[:1].astype(float).tolist()}
    outputs = np.array(post(client, "/reconstruct", body)["outputs"]).reshape(SHAPE)
    response = client.post("/reconstruct", json=body, headers={"accept": "image/png"})
    image = Image.open(io.BytesIO(response.content))
    assert image.mode == "RGB"
    scale = image.size[1] // SHAPE[0]
    shown = np.asarray(image)[scale // 2 :: scale, scale // 2 :: scale]
    assert shown.shape == SHAPE
    np.testing.assert_allclose(shown, outputs, atol=0.51)


def test_png_of_samples_is_a_grid_of_rgb_images(client: httpx.Client) -> None:
    response = client.post("/sample?n=4", headers={"accept": "image/png"})
    image = Image.open(io.BytesIO(response.content))
    assert image.mode == "RGB"
    tile = (image.size[0] + 2) // 2, (image.size[1] + 2) // 2
    scale = (tile[1] - 2) // SHAPE[0]
    assert tile == (SHAPE[1] * scale + 2, SHAPE[0] * scale + 2)
    manifest = client.get("/models/colour-images").json()
    assert (manifest["shape"], manifest["pictures"]) == ([6, 5, 3], True)


def test_interpolation_and_decoding_return_flat_images(client: httpx.Client) -> None:
    x = images().astype(float).tolist()
    response = post(client, "/interpolate", {"start": {"input": x[0]}, "end": {"input": x[1]}, "steps": 3})
    assert np.shape(response["outputs"]) == (3, D)
    decoded = post(client, "/decode", {"latents": response["latents"]})["outputs"]
    np.testing.assert_allclose(decoded, response["outputs"], rtol=1e-5)
