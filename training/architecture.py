"""Encoder and decoder as a configuration asks for them: perceptrons, or convolutions for pictures."""

import math

from torch import nn

from models.networks import conv_decoder, conv_encoder, mlp
from training.config import TrainConfig
from training.errors import FitError


def encoder_of(config: TrainConfig, shape: tuple[int, ...], outputs: int) -> nn.Module:
    """[B, D] to [B, outputs] for rows of `shape`, whose product is D. Raises FitError where conv does not fit them."""
    if config.network == "conv":
        _require_room(config, shape)
        return conv_encoder(shape, config.widths, outputs, config.activation, config.dense)
    return mlp([math.prod(shape), *config.widths, outputs], config.activation)


def decoder_of(config: TrainConfig, shape: tuple[int, ...], latents: int) -> nn.Module:
    """[B, latents] to [B, D] for rows of `shape`: the encoder mirrored. Raises FitError like it."""
    if config.network == "conv":
        _require_room(config, shape)
        return conv_decoder(shape, config.widths, latents, config.activation, config.dense)
    return mlp([latents, *reversed(config.widths), math.prod(shape)], config.activation)


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
