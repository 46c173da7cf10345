"""The objectives that the trainer minimises: the loss of each kind of network, and the random numbers for the loss.

Drawing random numbers and computing the loss are separate steps, because in a distributed run every process draws the
same numbers for the whole batch, but computes the loss of its own rows only.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from models.autoencoder import Autoencoder
from models.vae import VAE
from training.config import TrainConfig
from training.fitting.losses import (
    LossTerms,
    binarise,
    corrupt,
    elbo_terms,
    importance_weighted_terms,
    squared_error_terms,
    weight_penalty,
)

NOISE_SPAN = 20.0  # ratio of the largest to the smallest standard deviation of the noise in denoising autoencoders


class Objective(Protocol):
    """A loss to minimise. `warm_up` is the share of the warm-up that is over, from 0 to 1."""

    def draw(self, rows: Tensor, random: torch.Generator, warm_up: float) -> tuple[Tensor, ...]:
        """Return the inputs of the loss for rows [B, D], such as the rows and noise. Each input has B entries."""

    def terms(self, drawn: tuple[Tensor, ...], warm_up: float) -> LossTerms:
        """Return the loss and its terms. `drawn` is the result of `draw`, or the part of that result for some rows."""


class SquaredErrorObjective:
    """The objective of an autoencoder, or of a denoising autoencoder if `config` has noise or masking."""

    def __init__(self, model: Autoencoder, config: TrainConfig) -> None:
        self._model, self._config = model, config
        self._noise = config.noise or 0.0

    def draw(self, rows: Tensor, random: torch.Generator, _warm_up: float) -> tuple[Tensor, ...]:
        """Return the rows [B, D], and their corrupted copy if there is noise or masking."""
        if self._noise > 0 or self._config.masking > 0:
            noise_range = (self._noise / NOISE_SPAN, self._noise)
            return rows, corrupt(rows, noise_range, self._config.masking, random)
        return (rows,)

    def terms(self, drawn: tuple[Tensor, ...], _warm_up: float) -> LossTerms:
        """Return the squared reconstruction error."""
        return _with_weight_penalty(squared_error_terms(self._model, *drawn), self._model, self._config)


class ElboObjective:
    """The objective of a VAE: the negative ELBO, or minus the importance-weighted bound for several samples per row."""

    def __init__(self, vae: VAE, latents: int, config: TrainConfig) -> None:
        self._vae, self._latents, self._config = vae, latents, config

    def draw(self, rows: Tensor, random: torch.Generator, warm_up: float) -> tuple[Tensor, ...]:
        """Return the rows [B, D], binarised if configured, and normal noise [B, S, K]. S is 1 during the warm-up."""
        if self._config.binarise:
            rows = binarise(rows, random)
        samples = self._config.samples if warm_up >= 1.0 else 1
        return rows, torch.randn(len(rows), samples, self._latents, generator=random).to(rows)

    def terms(self, drawn: tuple[Tensor, ...], warm_up: float) -> LossTerms:
        """Return the loss (the negative ELBO, or minus the bound) and its terms."""
        rows, noise = drawn
        if self._config.samples > 1:
            terms = importance_weighted_terms(self._vae, rows, noise.transpose(0, 1))
        else:
            beta = warm_up * self._config.beta
            terms = elbo_terms(self._vae, rows, noise[:, 0], beta, self._config.free_bits)
        return _with_weight_penalty(terms, self._vae, self._config)


def _with_weight_penalty(terms: LossTerms, model: nn.Module, config: TrainConfig) -> LossTerms:
    if config.l2 > 0:
        terms["loss"] = terms["loss"] + config.l2 * weight_penalty(model)
    return terms
