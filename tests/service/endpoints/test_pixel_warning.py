"""Pixels in another range than the model's: every response to them has a warning."""

import io
import json
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from models.manifest import Manifest
from tests.service.running import post

WARNING = "the pixels lie between 0 and {high:g}, but the model was trained on pixels from 0 (black) to 1 (white): "
Floats = npt.NDArray[np.float32]


@pytest.mark.parametrize("factor", [16, 255, 65535])
@pytest.mark.parametrize("endpoint", ["/encode", "/reconstruct", "/anomaly", "/anomaly?detail=none"])
@pytest.mark.parametrize("rows", [1, 7])
def test_response_warns_if_pixels_are_far_out_of_range(
    client: httpx.Client, digits: Floats, endpoint: str, factor: int, rows: int
) -> None:
    inputs = (digits[:rows] * factor).astype(float)
    response = post(client, endpoint, {"inputs": inputs.tolist()})
    assert response["warning"].startswith(WARNING.format(high=float(f"{inputs.max():.6g}")))


@pytest.mark.parametrize("endpoint", ["/encode", "/reconstruct", "/anomaly"])
def test_response_warns_if_pixels_are_scaled_to_minus_one_to_one(
    client: httpx.Client, digits: Floats, endpoint: str
) -> None:
    response = post(client, endpoint, {"inputs": (2.0 * digits[:3] - 1).astype(float).tolist()})
    assert response["warning"].startswith("the pixels lie between -1 and 1, but")


@pytest.mark.parametrize("endpoint", ["/encode", "/reconstruct", "/anomaly"])
def test_response_has_no_warning_for_usual_bright_dark_or_noisy_pictures(
    client: httpx.Client, digits: Floats, endpoint: str
) -> None:
    noisy = digits[:5] + 0.1 * np.random.RandomState(0).standard_normal((5, 64))
    for rows in (digits[:5], np.zeros((1, 64)), np.ones((1, 64)), 0.01 * digits[:2], noisy):
        assert "warning" not in post(client, endpoint, {"inputs": rows.astype(float).tolist()})


def test_response_warns_about_a_row_of_an_interpolation(client: httpx.Client, digits: Floats) -> None:
    ends: dict[str, Any] = {"start": {"input": (255.0 * digits[0]).tolist()}, "end": {"input": digits[1].tolist()}}
    assert "warning" in post(client, "/interpolate", ends)


def test_response_for_a_table_never_has_a_warning(client: httpx.Client) -> None:
    response = post(client, "/anomaly", {"inputs": [[1e6, 1e6, 1e6, 1e6]]}, params={"model": "hosts"})
    assert "warning" not in response


@pytest.mark.parametrize("accept", ["application/x-npy", "application/x-safetensors", "image/png"])
@pytest.mark.parametrize("factor", [1, 255])
def test_response_in_another_format_has_the_warning_as_a_header(
    client: httpx.Client, digits: Floats, accept: str, factor: int
) -> None:
    body = io.BytesIO()
    np.save(body, digits[:3] * np.float32(factor))
    headers = {"Content-Type": "application/x-npy", "Accept": accept}
    response = client.post("/reconstruct", content=body.getvalue(), headers=headers)
    assert response.status_code == 200
    assert ("elbo-warning" in response.headers) == (factor == 255)


def test_last_line_of_a_stream_has_the_warning(client: httpx.Client, digits: Floats) -> None:
    lines = "\n".join(json.dumps((255.0 * row).tolist()) for row in digits[:3])
    headers = {"Content-Type": "application/x-ndjson", "Accept": "application/x-ndjson"}
    last = json.loads(client.post("/anomaly", content=lines, headers=headers).text.splitlines()[-1])
    assert last["rows"] == 3
    assert "warning" in last


@pytest.mark.parametrize(
    ("pixel_range", "low", "high", "warns"),
    [
        ((0, 1), 0, 1, False),
        ((0, 1), -0.4, 1.4, False),  # noise
        ((0, 1), 0, 1.6, True),
        ((0, 1), 0, 255, True),
        ((0, 1), -1, 1, True),
        ((0, 255), 0, 255, False),
        ((0, 255), 0, 1, True),
        ((0, 255), -1, 1, True),
        ((0, 255), 0, 0, False),  # a black picture
        ((0, 255), 0, 20, False),  # a dark picture
        ((0, 255), 0, 65535, True),
        ((0, 65535), 0, 255, True),
        ((0, 16), 0, 1, True),
        ((-1, 1), 0, 255, True),
        ((-1, 1), 0, 1, True),
        (None, 0, 255, False),
    ],
)
def test_pixel_warning_depends_on_the_range_of_the_model(
    pixel_range: tuple[float, float] | None, low: float, high: float, warns: bool
) -> None:
    manifest = Manifest.model_construct(pixel_range=pixel_range)  # type: ignore[call-arg] # only this field matters
    assert (manifest.pixel_warning(low, high) is not None) == warns
