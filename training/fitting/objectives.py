"""The objectives that the trainer minimises: the loss of each kind of network, and the random numbers for the loss.

Drawing random numbers and computing the loss are separate steps, because in a distributed run every process draws the
same numbers for the whole batch, but computes the loss of its own rows only.
"""

from collections.abc import Sequence
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
    for_losses,
    importance_weighted_terms,
    squared_error_terms,
    weight_penalty,
)

CONDITION_DROPOUT = 0.1  # share of the rows that training shows without the level of a column of conditions
NOISE_SPAN = 20.0  # ratio of the largest to the smallest standard deviation of the noise in denoising autoencoders


class Objective(Protocol):
    """A loss to minimise. `warm_up` is the share of the warm-up that is over, from 0 to 1."""

    def draw(self, rows: Tensor, random: torch.Generator, warm_up: float) -> tuple[Tensor, ...]:
        """Return the inputs of the loss for rows [B, D], such as the rows and noise. Each input has B entries."""

    def terms(self, drawn: tuple[Tensor, ...], warm_up: float) -> LossTerms:
        """Return the loss and its terms. `drawn` is the result of `draw`, or the part of that result for some rows."""


class SquaredErrorObjective:
    """The objective of an autoencoder, or of a denoising autoencoder if `config` has noise or masking.

    Args:
        levels: number of levels of each column of conditions; the rows are then [B, D + C].
    """

    def __init__(self, model: Autoencoder, config: TrainConfig, levels: Sequence[int] = ()) -> None:
        self._model, self._config, self._levels = model, config, levels
        self._noise = config.noise or 0.0

    def draw(self, rows: Tensor, random: torch.Generator, _warm_up: float) -> tuple[Tensor, ...]:
        """Return the rows [B, D], and their corrupted copy if there is noise or masking."""
        rows = drop_levels(rows, self._levels, random)
        if self._noise > 0 or self._config.masking > 0:
            noise_range = (self._noise / NOISE_SPAN, self._noise)
            width = rows.shape[1] - sum(self._levels)
            corrupted = corrupt(rows[:, :width], noise_range, self._config.masking, random)
            return rows, torch.cat((corrupted, rows[:, width:]), dim=1) if self._levels else corrupted
        return (rows,)

    def terms(self, drawn: tuple[Tensor, ...], _warm_up: float) -> LossTerms:
        """Return the squared reconstruction error."""
        return _with_weight_penalty(squared_error_terms(self._model, *drawn), self._model, self._config)


class ElboObjective:
    """The objective of a VAE: the negative ELBO, or minus the importance-weighted bound for several samples per row.

    Args:
        levels: number of levels of each column of conditions; the rows are then [B, D + C].
    """

    def __init__(self, vae: VAE, latents: int, config: TrainConfig, levels: Sequence[int] = ()) -> None:
        self._vae, self._latents, self._config, self._levels = vae, latents, config, levels

    def draw(self, rows: Tensor, random: torch.Generator, warm_up: float) -> tuple[Tensor, ...]:
        """Return the rows [B, D], binarised if configured, and normal noise [B, S, K]. S is 1 during the warm-up."""
        rows = drop_levels(rows, self._levels, random)
        if self._config.binarise:  # a condition has only zeros and ones, and stays as it is
            rows = binarise(rows, random)
        samples = self._config.samples if warm_up >= 1.0 else 1
        return rows, torch.randn(len(rows), samples, self._latents, generator=random).to(rows)

    def terms(self, drawn: tuple[Tensor, ...], warm_up: float) -> LossTerms:
        """Return the loss (the negative ELBO, or minus the bound) and its terms."""
        inputs, noise = drawn
        vae, rows = for_losses(self._vae, inputs)
        if self._config.samples > 1:
            terms = importance_weighted_terms(vae, rows, noise.transpose(0, 1))
        else:
            beta = warm_up * self._config.beta
            terms = elbo_terms(vae, rows, noise[:, 0], beta, self._config.free_bits)
        return _with_weight_penalty(terms, self._vae, self._config)


def drop_levels(rows: Tensor, levels: Sequence[int], random: torch.Generator) -> Tensor:
    """Return `rows` [B, D + C], with zeros in place of a random tenth of the levels in each column of conditions.

    The networks thus learn to encode and to decode rows whose condition is unknown.

    Args:
        rows: rows whose last C columns are their conditions, one-hot. Without conditions, the same rows are returned.
        levels: number of levels of each column of conditions; the sum is C.
        random: a CPU generator.
    """
    if not levels:
        return rows
    width = rows.shape[1] - sum(levels)
    kept = torch.rand(len(rows), len(levels), generator=random) >= CONDITION_DROPOUT  # [B, J]
    mask = kept.repeat_interleave(torch.tensor(levels), dim=1).to(rows)  # [B, C]
    return torch.cat((rows[:, :width], rows[:, width:] * mask), dim=1)


def _with_weight_penalty(terms: LossTerms, model: nn.Module, config: TrainConfig) -> LossTerms:
    if config.l2 > 0:
        terms["loss"] = terms["loss"] + config.l2 * weight_penalty(model)
    return terms
