"""Writing response bodies: content negotiation, JSON numbers, PNG pixels."""

import io
import json

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from service.codec import png
from service.codec.response_body import ARRAY_FORMATS, IMAGE_FORMATS, JSON_ONLY, negotiate_media_type, to_json
from service.errors import NotAcceptable, OverflowInModel

JSON, NPY, SAFETENSORS, PNG = IMAGE_FORMATS


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("application/json", JSON),
        ("application/*", JSON),
        ("application/x-npy", NPY),
        ("application/x-safetensors", SAFETENSORS),
        ("image/png", PNG),
        ("image/*", PNG),
        ("image/webp, image/png", PNG),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8", JSON),
        ("application/json;q=0.5, application/x-npy", NPY),
        ("application/json, application/x-npy", JSON),
        ("application/json;q=0, */*", NPY),
        ("image/png;q=0.2, application/x-npy;q=0.1, */*;q=0", PNG),
        ("*/*;q=0.1, image/png;q=0.9", PNG),
        ("APPLICATION/X-NPY ; Q=0.7", NPY),
        ("application/json; charset=utf-8", JSON),
    ],
)
def test_accept_header_selects_the_format(accept: str, expected: str) -> None:
    assert negotiate_media_type(accept, IMAGE_FORMATS) == expected


@pytest.mark.parametrize(
    "accept", ["text/html", "image/png", "application/json;q=0", "*/*;q=0", "application/json;q=x"]
)
def test_accept_header_is_refused_with_the_offered_formats_if_it_accepts_none_of_them(accept: str) -> None:
    with pytest.raises(NotAcceptable) as caught:
        negotiate_media_type(accept, JSON_ONLY)
    assert caught.value.expected == "application/json"


def test_array_formats_do_not_include_png() -> None:
    with pytest.raises(NotAcceptable):
        negotiate_media_type("image/png", ARRAY_FORMATS)


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 4)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_float32_values_are_exact_after_conversion_to_json_and_back(array: np.ndarray) -> None:
    for text in (to_json({"a": array}), to_json({"a": [list(row) for row in array]})):
        np.testing.assert_array_equal(np.array(json.loads(bytes(text))["a"], np.float32), array)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_number_in_json_is_an_error(value: float) -> None:
    array = np.zeros((3, 2), np.float32)
    array[1, 1] = value
    with pytest.raises(OverflowInModel, match="row 1"):
        to_json({"outputs": array})


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def test_png_shows_the_grey_values_of_each_row_in_one_tile() -> None:
    rows = np.array([[0, 1, 2, 3], [4, 4, 4, 4], [-9, 99, 2, 2]], np.float32)
    image = pixels(png.dumps(rows, [2, 2], (0.0, 4.0), columns=2))
    tile, gap = png.TILE, png.GAP
    assert image.shape == (2 * tile + gap, 2 * tile + gap)
    centres = [tile // 4, 3 * tile // 4]
    assert [image[y, x] for y in centres for x in centres] == [0, 64, 128, 191]
    assert (image[:tile, tile + gap :] == 255).all()
    below = image[tile + gap :, :tile]
    assert [below[y, x] for y in centres for x in centres] == [0, 255, 128, 128]
    assert (image[tile + gap :, tile + gap :] == png.GAP_GREY).all()  # three rows, so the fourth tile is empty


def test_png_of_three_channels_has_colours() -> None:
    rows = np.array([[255, 0, 0, 0, 0, 255]], np.float32)
    image = pixels(png.dumps(rows, [1, 2, 3], (0.0, 255.0)))
    assert image[0, 0].tolist() == [255, 0, 0]
    assert image[0, -1].tolist() == [0, 0, 255]


def test_white_may_be_the_smaller_value_of_the_pixel_range() -> None:
    image = pixels(png.dumps(np.array([[0.0, 1.0]], np.float32), [1, 2], (1.0, 0.0)))
    assert (image[0, 0], image[0, -1]) == (255, 0)


def test_many_images_are_not_magnified_beyond_the_maximum_width() -> None:
    assert pixels(png.dumps(np.zeros((2500, 64), np.float32), [8, 8], (0.0, 1.0))).shape[1] <= png.MAX_WIDTH


@pytest.mark.parametrize(
    ("shape", "pixel_range", "expected"),
    [([8, 8], (0, 1), True), ([8, 8], None, False), ([8, 8, 3], (0, 1), True), ([8, 8, 1], (0, 1), True),
     ([3, 8, 8], (0, 1), False), ([64], (0, 1), False)],
)  # fmt: skip
def test_only_rows_with_an_image_shape_and_a_pixel_range_are_images(
    shape: list[int], pixel_range: tuple[float, float] | None, expected: bool
) -> None:
    assert png.is_image(shape, pixel_range) is expected


@pytest.mark.parametrize("shape", [(100_000,), (5000, 64), (3, 40_000), (1, 70_000), (600, 8, 8)])
def test_json_of_a_large_array_equals_the_json_that_orjson_writes(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    fields = {"model": "vae", "outputs": x, "errors": x[:2].copy(), "seed": 7}
    assert to_json(fields) == orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)
