"""The networks of a configuration, and the shapes that convolutions refuse."""

import pytest
import torch
from torch import nn

from training.config import TrainConfig
from training.errors import FitError
from training.fitting.architecture import build_decoder, build_encoder


def layer_types(network: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in network.children()]


def test_perceptron_decoder_mirrors_the_widths_of_the_encoder() -> None:
    config = TrainConfig(model="vae", name="x", hidden=(7, 5), activation="tanh")
    encoder, decoder = build_encoder(config, (4, 3), 6), build_decoder(config, (4, 3), 2)
    assert layer_types(encoder) == layer_types(decoder) == ["Linear", "Tanh", "Linear", "Tanh", "Linear"]
    assert [tuple(p.shape) for p in encoder.parameters() if p.dim() == 2] == [(7, 12), (5, 7), (6, 5)]
    assert [tuple(p.shape) for p in decoder.parameters() if p.dim() == 2] == [(5, 2), (7, 5), (12, 7)]


@pytest.mark.parametrize("shape", [(28, 28), (5, 4, 3)])
def test_convolutions_use_the_default_channels_and_take_flat_rows(shape: tuple[int, ...]) -> None:
    config = TrainConfig(model="vae", name="x", network="conv")
    encoder, decoder = build_encoder(config, shape, 6), build_decoder(config, shape, 3)
    assert layer_types(encoder).count("Conv2d") == layer_types(decoder).count("ConvTranspose2d") == 2
    x = torch.randn(2, torch.Size(shape).numel())
    assert encoder(x).shape == (2, 6)
    assert decoder(torch.randn(2, 3)).shape == x.shape


def test_decoder_mirrors_the_dense_layers_between_convolutions_and_latents() -> None:
    config = TrainConfig(model="ae", name="x", network="conv", hidden=(4,), dense=(9, 7))
    encoder, decoder = build_encoder(config, (6, 6), 2), build_decoder(config, (6, 6), 2)
    assert layer_types(encoder)[-6:] == ["Flatten", "Linear", "SiLU", "Linear", "SiLU", "Linear"]
    assert layer_types(decoder)[:7] == ["Linear", "SiLU", "Linear", "SiLU", "Linear", "Unflatten", "SiLU"]
    widths = [layer.out_features for layer in [*encoder, *decoder] if isinstance(layer, nn.Linear)]
    assert widths == [9, 7, 2, 7, 9, 36]


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_decoder_of_images_gives_values_from_0_to_1(network: str) -> None:
    config = TrainConfig.model_validate({"model": "ae", "name": "x", "network": network})
    x = build_decoder(config, (6, 6), 2, unit_range=True)(100 * torch.randn(50, 2))
    assert 0 <= x.min() < 0.1 < 0.9 < x.max() <= 1


@pytest.mark.parametrize(
    ("options", "unit_range", "sigmoid"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"hidden": ()}, True, False),  # linear networks stay linear
        ({"output": "linear"}, True, False),
        ({"output": "sigmoid"}, False, True),
        ({"model": "vae"}, True, True),
        ({"model": "vae", "likelihood": "bernoulli"}, True, False),  # the decoder returns logits
        ({"model": "vae", "likelihood": "bernoulli", "output": "sigmoid"}, True, False),
    ],
)
def test_last_layer_of_the_decoder_depends_on_the_value_range_and_the_options(
    options: dict[str, object], unit_range: bool, sigmoid: bool
) -> None:
    config = TrainConfig.model_validate({"model": "ae", "name": "x", **options})
    assert (layer_types(build_decoder(config, (6, 6), 2, unit_range))[-1] == "Sigmoid") == sigmoid


@pytest.mark.parametrize("build", [build_encoder, build_decoder])
@pytest.mark.parametrize(
    ("shape", "hidden", "message"),
    [
        ((9,), (4,), r"needs images \(rows of shape \[H, W\] or \[H, W, C\]\), got shape \[9\]: use --network mlp"),
        ((2, 2, 2, 2), (4,), r"got shape \[2, 2, 2, 2\]"),
        ((8, 8), (4, 4, 4, 4), "4 times, but 8 x 8 pixels can be halved 3 times: give --hidden at most 3"),
        ((28, 5), (4, 4, 4, 4), "28 x 5 pixels can be halved 3 times"),
        ((1, 5), (4,), "1 x 5 pixels can be halved 0 times"),
    ],
)
def test_building_convolutions_for_rows_of_an_unsuitable_shape_raises(
    build: object, shape: tuple[int, ...], hidden: tuple[int, ...], message: str
) -> None:
    assert callable(build)
    with pytest.raises(FitError, match=message):
        build(TrainConfig(model="ae", name="x", network="conv", hidden=hidden), shape, 2)


def test_convolutions_that_halve_the_image_to_one_pixel_are_accepted() -> None:
    config = TrainConfig(model="ae", name="x", network="conv", hidden=(4, 4, 4))
    assert build_decoder(config, (5, 28), 2)(build_encoder(config, (5, 28), 2)(torch.randn(3, 140))).shape == (3, 140)
