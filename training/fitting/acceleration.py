"""Faster networks during training: bfloat16 matrix products and torch.compile."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from models.autoencoder import Autoencoder
from models.vae import VAE
from training.config import TrainConfig


@contextmanager
def accelerated(model: Autoencoder | VAE, config: TrainConfig) -> Iterator[None]:
    """Wrap the encoder and the decoder as `config` requires, and put the plain networks back at the end.

    The wrappers share the parameters of the networks, so training the wrappers trains the networks.
    """
    encoder, decoder = model.encoder, model.decoder
    if config.precision == "bf16":
        model.encoder, model.decoder = _Bf16(model.encoder), _Bf16(model.decoder)
    if config.compile:
        model.encoder = cast(nn.Module, torch.compile(model.encoder))
        model.decoder = cast(nn.Module, torch.compile(model.decoder))
    try:
        yield
    finally:
        model.encoder, model.decoder = encoder, decoder


class _Bf16(nn.Module):
    """A network whose matrix products are computed in bfloat16. Its input and its output are float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs] to [B, outputs]."""
        with torch.autocast(x.device.type, torch.bfloat16):
            y: Tensor = self.network(x)
        return y.float()
