"""The encoder and the decoder that a configuration describes: perceptrons, or convolutions for images."""

import math

from torch import nn

from models.networks import AddLevels, conv_decoder, conv_encoder, mlp
from training.config import TrainConfig
from training.errors import FitError


def build_encoder(config: TrainConfig, shape: tuple[int, ...], outputs: int, levels: int = 0) -> nn.Sequential:
    """Return a network that maps rows [B, D] to [B, outputs], or rows with a condition, [B, D + levels].

    Args:
        shape: shape of one row; the product is D.
        levels: number of values of a condition, C; 0 without conditions.

    Raises:
        FitError: convolutions cannot take rows of this shape.
    """
    if config.network == "conv":
        _check_image_shape(config, shape)
        network = conv_encoder(shape, config.widths, outputs, config.activation, config.dense)
        return nn.Sequential(AddLevels(math.prod(shape), levels), *network) if levels else network
    return mlp([math.prod(shape) + levels, *config.widths, outputs], config.activation)


def build_decoder(
    config: TrainConfig, shape: tuple[int, ...], latents: int, unit_range: bool = False, levels: int = 0
) -> nn.Sequential:
    """Return a network that maps latents [B, K] to rows [B, D]. Its layers mirror those of the encoder.

    Args:
        shape: shape of one row; the product is D.
        unit_range: whether the rows are images with values in [0, 1].
        levels: number of values of a condition, C; the network then takes latents with a condition, [B, K + C].

    Raises:
        FitError: convolutions cannot take rows of this shape.
    """
    if config.network == "conv":
        _check_image_shape(config, shape)
        network = conv_decoder(shape, config.widths, latents + levels, config.activation, config.dense)
    else:
        network = mlp([latents + levels, *reversed(config.widths), math.prod(shape)], config.activation)
    return network.append(nn.Sigmoid()) if _ends_in_sigmoid(config, unit_range) else network


def _ends_in_sigmoid(config: TrainConfig, unit_range: bool) -> bool:
    if config.model == "vae" and config.likelihood == "bernoulli":
        return False  # the Bernoulli likelihood takes logits
    if config.output == "auto":
        return unit_range and bool(config.widths or config.dense)  # linear networks stay linear
    return config.output == "sigmoid"


def _check_image_shape(config: TrainConfig, shape: tuple[int, ...]) -> None:
    """Raise FitError unless rows are images whose sides can be halved once per convolution."""
    if len(shape) not in (2, 3):
        raise FitError(
            f"--network conv needs images (rows of shape [H, W] or [H, W, C]), got shape {list(shape)}: "
            "use --network mlp"
        )
    stages = len(config.widths)
    possible = (min(shape[:2]) - 1).bit_length()
    if stages > possible:
        raise FitError(
            f"--network conv halves the image once per width of --hidden, {stages} times, but {shape[0]} x {shape[1]} "
            f"pixels can be halved {possible} times: give --hidden at most {possible} widths"
        )
