"""PNG and JPEG bodies of requests, compared with the same pictures read from a folder by `elbo score`."""

import io
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from models.calibration import Calibration
from models.likelihood import BernoulliLikelihood
from models.manifest import read_manifest
from models.networks import mlp
from models.pipeline import Pipeline
from models.prior import gaussian_prior
from models.scaling import Scaling
from models.vae import VAE
from service.app import create_app
from service.codec import pictures
from service.settings import Settings
from tests.service.published import publish
from tests.service.running import running
from training.data.table import read_for_model

SHAPES = {"grey": (6, 5), "deep": (6, 5), "colour": (6, 5, 3), "table": (4,)}
WHITES = {"grey": 255.0, "deep": 4095.0, "colour": 255.0, "table": 255.0}
K = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        width = int(np.prod(shape))
        networks = mlp((width, 8, 2 * K)), mlp((K, 8, width))
        core = VAE(*networks, BernoulliLikelihood())
        scaling = Scaling(torch.zeros(width), torch.full((width,), WHITES[name]))
        model = Pipeline(scaling, core, gaussian_prior(torch.ones(K)), Calibration(torch.rand(99)))
        x = WHITES[name] * torch.rand(7, width)
        names = [f"pixel[{','.join(map(str, index))}]" for index in np.ndindex(shape)]
        pixel_range = None if name == "table" else (0.0, WHITES[name])
        publish(folder, name, model.eval().requires_grad_(False), x, names, shape, pixel_range)
    return folder


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[httpx.Client]:
    with running(create_app(Settings(artifacts=root, backend="torchscript"))) as client:
        yield client


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees to view
    return saved(Image.fromarray(noise(5, 6)), "JPEG", exif=exif)


PICTURES = {
    "grey.png": saved(Image.fromarray(noise(6, 5)), "PNG"),
    "colour.png": saved(Image.fromarray(noise(6, 5, 3)), "PNG"),
    "transparent.png": saved(Image.fromarray(noise(6, 5, 4)), "PNG"),
    "palette.png": saved(Image.fromarray(noise(6, 5, 3)).quantize(8), "PNG"),
    "binary.png": saved(Image.fromarray(noise(6, 5)).convert("1"), "PNG"),
    "wide.png": saved(Image.fromarray(noise(20, 64, 3)), "PNG"),
    "one-pixel.png": saved(Image.fromarray(noise(1, 1)), "PNG"),
    "grey.jpeg": saved(Image.fromarray(noise(6, 5)), "JPEG"),
    "colour.jpeg": saved(Image.fromarray(noise(6, 5, 3)), "JPEG"),
    "cmyk.jpeg": saved(Image.fromarray(noise(6, 5, 3)).convert("CMYK"), "JPEG"),
    "rotated.jpeg": rotated_jpeg(),
}


@pytest.mark.parametrize("model", ["grey", "colour"])
@pytest.mark.parametrize("name", PICTURES)
def test_picture_body_gives_the_same_row_as_the_picture_in_a_folder(
    name: str, model: str, root: Path, client: httpx.Client, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(PICTURES[name])
    table = read_for_model(str(tmp_path), read_manifest(root / model / "1" / "model.pt"))
    rows = table.x.read_range(0, 1).astype(float).tolist()
    headers = {"content-type": f"image/{name.rpartition('.')[2]}"}
    for path in ("/encode", "/reconstruct"):
        expected = client.post(f"{path}?model={model}", json={"inputs": rows}).json()
        response = client.post(f"{path}?model={model}", content=PICTURES[name], headers=headers)
        assert response.status_code == 200, response.text
        assert response.json().keys() == expected.keys()
        for field in ("latents", "outputs", "errors"):
            if field in expected:
                np.testing.assert_allclose(response.json()[field], expected[field], rtol=1e-5, atol=1e-5)
    verdict = client.post(f"/anomaly?model={model}&explain=30", content=PICTURES[name], headers=headers).json()
    values = {feature["name"]: feature["value"] for feature in verdict["results"][0]["features"]}
    assert len(values) == 30
    assert values == {feature: pytest.approx(rows[0][table.names.index(feature)]) for feature in values}


def test_picture_with_16_bits_per_pixel_keeps_its_depth(client: httpx.Client) -> None:
    levels = np.linspace(0, 65535, 30).astype(np.uint16).reshape(6, 5)
    body = saved(Image.fromarray(levels), "PNG")
    rows = (levels.reshape(1, 30) / 257).tolist()
    expected = client.post("/reconstruct?model=grey", json={"inputs": rows}).json()
    response = client.post("/reconstruct?model=grey", content=body, headers={"content-type": "image/png"})
    np.testing.assert_allclose(response.json()["errors"], expected["errors"], rtol=1e-5)


@pytest.mark.parametrize("largest", [4095, 300, 60_000])
def test_picture_with_16_bits_keeps_its_values_for_a_model_of_such_pictures(
    largest: int, root: Path, client: httpx.Client, tmp_path: Path
) -> None:
    values = np.linspace(0, largest, 30).astype(np.uint16).reshape(6, 5)
    body = saved(Image.fromarray(values), "PNG")
    expected = client.post("/encode?model=deep", json={"inputs": [values.ravel().tolist()]}).json()
    response = client.post("/encode?model=deep", content=body, headers={"content-type": "image/png"})
    np.testing.assert_allclose(response.json()["latents"], expected["latents"], rtol=1e-4, atol=1e-5)
    (tmp_path / "a.png").write_bytes(body)
    table = read_for_model(str(tmp_path), read_manifest(root / "deep" / "1" / "model.pt"))
    assert np.array_equal(table.x.read_range(0, 1)[0], values.ravel())


@pytest.mark.parametrize("model", ["grey", "deep"])
def test_reconstruction_as_a_picture_has_the_depth_of_the_model(model: str, client: httpx.Client) -> None:
    levels = np.linspace(0, WHITES[model], 30).round().reshape(1, 30).tolist()
    outputs = client.post(f"/reconstruct?model={model}", json={"inputs": levels}).json()["outputs"][0]
    response = client.post(f"/reconstruct?model={model}", json={"inputs": levels}, headers={"accept": "image/png"})
    picture = Image.open(io.BytesIO(response.content))
    assert picture.mode == ("I;16" if model == "deep" else "L")
    pixels = np.asarray(picture)[:: picture.height // 6, :: picture.width // 5]  # small pictures are magnified
    assert np.abs(pixels.astype(float) - np.array(outputs).reshape(6, 5)).max() <= 0.51


def test_reconstruction_of_a_picture_can_be_a_picture(client: httpx.Client) -> None:
    headers = {"content-type": "image/png", "accept": "image/png"}
    response = client.post("/reconstruct?model=colour", content=PICTURES["wide.png"], headers=headers)
    assert response.headers["content-type"] == "image/png"
    width, height = Image.open(io.BytesIO(response.content)).size
    assert width * 6 == height * 5


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size, with almost no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0"))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content_type", "body", "message"),
    [
        ("image/png", PICTURES["wide.png"][:200], "the body is not a PNG picture, or it is damaged"),
        ("image/png", b"no picture", "the body is not a PNG picture, or it is damaged"),
        ("image/png", PICTURES["grey.jpeg"], "the body is not a PNG picture, or it is damaged"),
        ("image/jpeg", PICTURES["grey.png"], "the body is not a JPEG picture, or it is damaged"),
        ("image/jpeg; q=1", PICTURES["grey.jpeg"][:100], "the body is not a JPEG picture, or it is damaged"),
        ("image/png", png_header(3000, 3000), "the picture has 3000 x 3000 pixels"),
        ("image/png", png_header(60_000, 60_000), "the picture has too many pixels"),
        ("image/png", png_header(0, 5), "the body is not a PNG picture, or it is damaged"),
    ],
)
def test_body_that_is_no_readable_picture_is_an_error(
    content_type: str, body: bytes, message: str, client: httpx.Client
) -> None:
    for path in ("/encode", "/reconstruct", "/anomaly"):
        response = client.post(f"{path}?model=grey", content=body, headers={"content-type": content_type})
        assert (response.status_code, response.json()["code"]) == (422, "invalid_picture")
        assert response.json()["detail"] == message


@pytest.mark.parametrize("path", ["/encode?model=table", "/anomaly?model=table", "/decode?model=grey", "/sample"])
def test_picture_body_is_refused_if_the_model_or_the_endpoint_takes_no_pictures(
    path: str, client: httpx.Client
) -> None:
    response = client.post(path, content=PICTURES["grey.png"], headers={"content-type": "image/png"})
    assert response.status_code == 415
    assert "image/png" not in response.json()["expected"]


def test_small_file_of_a_large_picture_is_decoded_outside_of_the_event_loop(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    Image.new("1", (2048, 2048)).save(file, "PNG", optimize=True)
    assert len(file.getvalue()) < 1000  # decoding it takes 60 ms
    threads, loads = [], pictures.loads

    def record_thread(body: bytes, media_type: str, row: pictures.PictureRow) -> object:
        threads.append(threading.current_thread().name)
        return loads(body, media_type, row)

    monkeypatch.setattr(pictures, "loads", record_thread)
    response = client.post("/encode?model=grey", content=file.getvalue(), headers={"content-type": "image/png"})
    assert response.status_code == 200
    assert [name.rpartition("_")[0] for name in threads] == ["reader"]
