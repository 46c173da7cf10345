"""Encoder and decoder as a configuration asks for them: perceptrons, or convolutions for pictures."""

import math

from torch import nn

from models.networks import conv_decoder, conv_encoder, mlp
from training.config import TrainConfig
from training.errors import FitError


def build_encoder(config: TrainConfig, shape: tuple[int, ...], outputs: int) -> nn.Sequential:
    """[B, D] to [B, outputs] for rows of `shape`, whose product is D. Raises FitError where conv does not fit them."""
    if config.network == "conv":
        _require_room(config, shape)
        return conv_encoder(shape, config.widths, outputs, config.activation, config.dense)
    return mlp([math.prod(shape), *config.widths, outputs], config.activation)


def build_decoder(config: TrainConfig, shape: tuple[int, ...], latents: int, unit: bool = False) -> nn.Sequential:
    """[B, latents] to [B, D] for rows of `shape`: the encoder mirrored. Raises FitError like it.

    Args:
        unit: whether rows are pictures with values in [0, 1].
    """
    if config.network == "conv":
        _require_room(config, shape)
        network = conv_decoder(shape, config.widths, latents, config.activation, config.dense)
    else:
        network = mlp([latents, *reversed(config.widths), math.prod(shape)], config.activation)
    return network.append(nn.Sigmoid()) if _ends_in_sigmoid(config, unit) else network


def _ends_in_sigmoid(config: TrainConfig, unit: bool) -> bool:
    if config.model == "vae" and config.likelihood == "bernoulli":
        return False  # that likelihood takes logits
    if config.output == "auto":
        return unit and bool(config.widths or config.dense)
    return config.output == "sigmoid"


def _require_room(config: TrainConfig, shape: tuple[int, ...]) -> None:
    """Raise FitError unless rows are pictures which can be halved as often as the network does."""
    if len(shape) not in (2, 3):
        raise FitError(
            f"--network conv needs pictures, rows of shape [H, W] or [H, W, C], got {list(shape)}: use --network mlp"
        )
    stages, room = len(config.widths), (min(shape[:2]) - 1).bit_length()
    if stages > room:
        raise FitError(
            f"--network conv halves the picture once for each of its {stages} widths, and {shape[0]} x {shape[1]} has "
            f"room for {room}: give --hidden no more widths than that"
        )
