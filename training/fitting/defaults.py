"""Defaults that depend on the data: tables and images need different networks. The module imports no torch."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from models.manifest import Manifest
from training.config import WIDTHS, TrainConfig

TABLE_WIDTHS = (128, 64)
TABLE_LEARNING_RATE, IMAGE_LEARNING_RATE = 3e-3, 1e-3
TABLE_STEPS = 1_500  # the default number of epochs gives about this many optimiser steps
MIN_TABLE_EPOCHS, MAX_TABLE_EPOCHS = 10, 1_500
TABLE_NOISE = 2.0  # default `noise` for tables, in standard deviations of a column
# The share of the variance that the default number of latents explains, for tables.
EXPLAINED_VARIANCE = {"pca": 0.9, "vae": 0.95, "ae": 0.99, "ensemble": 0.99}
MAX_TABLE_LATENTS = 64
IMAGE_LATENTS = 16


def with_defaults(config: TrainConfig, images: bool, rows: int) -> TrainConfig:
    """Return `config` with all defaults filled in, except those of `latents` and, for images, `epochs`.

    Args:
        images: whether the rows are images.
        rows: the number of fit rows.
    """
    steps_per_epoch = -(-rows // min(config.batch_size, rows))
    table_epochs = min(max(-(-TABLE_STEPS // steps_per_epoch), MIN_TABLE_EPOCHS), MAX_TABLE_EPOCHS)
    defaults: dict[str, Any] = {
        "noise": TABLE_NOISE if not images and config.model in ("ae", "ensemble") else 0.0,
        "learning_rate": IMAGE_LEARNING_RATE if images else TABLE_LEARNING_RATE,
        "variance": "learned" if images else "feature",
        "hidden": WIDTHS[config.network] if images or config.network == "conv" else TABLE_WIDTHS,
        "epochs": None if images else table_epochs,
        "kept": "best" if images or config.patience is not None else "last",
    }
    return config.model_copy(update={name: value for name, value in defaults.items() if getattr(config, name) is None})


def resolved_config(manifest: Manifest) -> TrainConfig:
    """Return the options that a published model was trained with, with the defaults filled in."""
    config = TrainConfig.model_validate(manifest.training | {"model": manifest.kind, "name": manifest.name})
    return with_defaults(config, manifest.is_image, max(1, manifest.data.fit))


def default_image_latents(width: int) -> int:
    """Return the default number of latents for images of `width` values."""
    return min(IMAGE_LATENTS, -(-width // 2))


def default_table_latents(kind: str, variance_shares: Sequence[float], rows: int, width: int) -> int:
    """Return the default number of latents for a table: enough to explain EXPLAINED_VARIANCE of the variance.

    Args:
        kind: kind of the model.
        variance_shares: the share of the variance that each principal component explains, largest first.
        rows: the number of fit rows.
        width: the number of features.
    """
    needed = bisect_left(list(accumulate(variance_shares)), EXPLAINED_VARIANCE[kind]) + 1
    return max(1, min(needed, width - 1, MAX_TABLE_LATENTS, (rows - 1) // 2))
