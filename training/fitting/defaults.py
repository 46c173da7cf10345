"""What open options mean for the data: tables of measurements and pictures want different networks. Needs no torch."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from models.manifest import Manifest
from training.config import WIDTHS, TrainConfig

TABLE_WIDTHS = (128, 64)
TABLE_RATE = 3e-3
TABLE_STEPS = 1_500
FEWEST_EPOCHS, MOST_EPOCHS = 10, 1_500  # of a table
TABLE_NOISE = 2.0  # in standard deviations of a column
SHARES = {"pca": 0.9, "vae": 0.95, "ae": 0.99, "ensemble": 0.99}  # of a table's variance, which the latents explain
MOST_LATENTS = 64
PICTURE_LATENTS, PICTURE_RATE = 16, 1e-3


def with_defaults(config: TrainConfig, pictures: bool, rows: int) -> TrainConfig:
    """`config` with a value for every option that it leaves to the data, but for the latents.

    Args:
        pictures: whether rows are pictures.
        rows: how many fit the networks.
    """
    steps_an_epoch = -(-rows // min(config.batch_size, rows))
    epochs = min(max(-(-TABLE_STEPS // steps_an_epoch), FEWEST_EPOCHS), MOST_EPOCHS)
    usual: dict[str, Any] = {
        "noise": TABLE_NOISE if not pictures and config.model in ("ae", "ensemble") else 0.0,
        "learning_rate": PICTURE_RATE if pictures else TABLE_RATE,
        "variance": "learned" if pictures else "feature",
        "hidden": WIDTHS[config.network] if pictures or config.network == "conv" else TABLE_WIDTHS,
        "epochs": None if pictures else epochs,
        "kept": "best" if pictures or config.patience is not None else "last",
    }
    return config.model_copy(update={name: value for name, value in usual.items() if getattr(config, name) is None})


def resolved_config(manifest: Manifest) -> TrainConfig:
    """The options of a published model as they were understood."""
    config = TrainConfig.model_validate(manifest.training | {"model": manifest.kind, "name": manifest.name})
    return with_defaults(config, manifest.is_image, max(1, manifest.data.fit))


def default_image_latents(width: int) -> int:
    """How many latents a model of pictures of D = `width` pixels has unless it is told."""
    return min(PICTURE_LATENTS, -(-width // 2))


def default_table_latents(kind: str, shares: Sequence[float], rows: int, width: int) -> int:
    """How many latents a model of a table has unless it is told.

    Args:
        shares: of the variance, of the first components, largest first.
        rows: how many fit the model.
        width: D.
    """
    needed = bisect_left(list(accumulate(shares)), SHARES[kind]) + 1
    return max(1, min(needed, width - 1, MOST_LATENTS, (rows - 1) // 2))
