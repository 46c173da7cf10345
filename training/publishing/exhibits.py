"""Exhibits, parts of an artifact that people look at: held-out rows and latents, calibration scores, model card."""

from collections.abc import Sequence

import numpy as np
import orjson
import torch

from models.artifact import CALIBRATION, CARD, HELD_OUT
from models.manifest import Manifest
from models.pipeline import Pipeline
from training.fitting.prepared_data import PreparedData
from training.reports.model_card import card

MAX_LATENT_ROWS = 2_000  # held-out rows whose latents are stored
MAX_VALUES = 400_000  # numbers of those rows that are stored: 2 to 4 MB of text before compression
MAX_SCORES = 2_000  # calibration scores that are stored; of more, evenly spaced order statistics
_COMPACT = orjson.OPT_SERIALIZE_NUMPY


def exhibits(pipeline: Pipeline, manifest: Manifest, data: PreparedData, notes: Sequence[str]) -> dict[str, bytes]:
    """Return the exhibits by name, as `models.artifact.publish` takes them.

    With the option `private`, held-out rows and their latents are left out.

    Args:
        notes: messages that the user saw during training.
    """
    shown = {CALIBRATION: calibration(pipeline.calibration.scores), CARD: card(manifest, None, notes, ()).encode()}
    if manifest.training.get("private"):
        return shown
    return {HELD_OUT: _held_out(pipeline, data), **shown}


def _held_out(pipeline: Pipeline, data: PreparedData) -> bytes:
    """Return JSON: `latents` [M, K] and `labels` [M] of held-out rows, `inputs` [R, D] of the first R, raw units."""
    rows = data.held_out[:MAX_LATENT_ROWS]
    with torch.inference_mode():
        latents = pipeline.encode(rows)[0]
    labels = data.table.labels
    fields = {
        "rows": len(data.held_out),
        "labels": None if labels is None else labels[data.split.held_out[: len(rows)]],
        "label_names": data.table.label_names,
        "latents": latents.contiguous().numpy(),
        "inputs": rows[: max(1, MAX_VALUES // rows.shape[1])].numpy(),
    }
    return orjson.dumps(fields, option=_COMPACT)


def calibration(scores: torch.Tensor) -> bytes:
    """Return JSON: the sorted `scores` [n], thinned evenly to at most MAX_SCORES, smallest and largest included."""
    places = np.linspace(0, len(scores) - 1, min(len(scores), MAX_SCORES)).round().astype(int)
    return orjson.dumps({"rows": len(scores), "scores": np.ascontiguousarray(scores.numpy()[places])}, option=_COMPACT)
