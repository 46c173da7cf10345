"""What an artifact carries for people to look at: rows that trained nothing, their codes, scores, the model card."""

from collections.abc import Sequence

import numpy as np
import orjson
import torch

from models.artifact import CALIBRATION, CARD, HELD_OUT
from models.manifest import Manifest
from models.pipeline import Pipeline
from training.fitting.prepared_data import PreparedData
from training.reports.model_card import card

MOST_CODES = 2_000  # held-out rows whose codes are shown
MOST_VALUES = 400_000  # numbers in those rows that are shown themselves: 2 to 4 MB of text, before it is deflated
MOST_SCORES = 2_000  # calibration scores: of more, evenly spaced order statistics
_COMPACT = orjson.OPT_SERIALIZE_NUMPY


def exhibits(pipeline: Pipeline, manifest: Manifest, data: PreparedData, notes: Sequence[str]) -> dict[str, bytes]:
    """The exhibits of `pipeline` by name, as `models.artifact.publish` takes them.

    Without held-out rows and their codes where the run was `private`. notes: what the user was told meanwhile.
    """
    shown = {CALIBRATION: calibration(pipeline.calibration.scores), CARD: card(manifest, None, notes, ()).encode()}
    if manifest.training.get("private"):
        return shown
    return {HELD_OUT: _held_out(pipeline, data), **shown}


def _held_out(pipeline: Pipeline, data: PreparedData) -> bytes:
    """`latents` [M, K] and `labels` [M] of held-out rows, and `inputs` [R, D] of the first R of them, raw units."""
    rows = data.held_out[:MOST_CODES]
    with torch.inference_mode():
        latents = pipeline.encode(rows)[0]
    labels = data.table.labels
    fields = {
        "rows": len(data.held_out),
        "labels": None if labels is None else labels[data.split.held_out[: len(rows)]],
        "label_names": data.table.label_names,
        "latents": latents.contiguous().numpy(),
        "inputs": rows[: max(1, MOST_VALUES // rows.shape[1])].numpy(),
    }
    return orjson.dumps(fields, option=_COMPACT)


def calibration(scores: torch.Tensor) -> bytes:
    """Sorted `scores` [n]: all of them, or MOST_SCORES evenly spaced ones, the smallest and the largest among them."""
    places = np.linspace(0, len(scores) - 1, min(len(scores), MOST_SCORES)).round().astype(int)
    return orjson.dumps({"rows": len(scores), "scores": np.ascontiguousarray(scores.numpy()[places])}, option=_COMPACT)
