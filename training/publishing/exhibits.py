"""The parts of an artifact that the explorer shows: held-out rows and latents, calibration scores, model card."""

from collections.abc import Sequence

import numpy as np
import orjson
import torch

from models.artifact import CALIBRATION, CARD, HELD_OUT, TRAINED_ROWS
from models.manifest import Manifest
from models.pipeline import Pipeline
from training.data.row_fingerprints import make_sketch
from training.fitting.feature_baseline import inputs_of_pool
from training.fitting.prepared_data import PreparedData
from training.reports.model_card import card

MAX_LATENT_ROWS = 2_000  # maximum number of held-out rows whose latents are stored
MAX_VALUES = 400_000  # maximum number of values of held-out rows that are stored: 2 to 4 MB as text before compression
MAX_SCORES = 2_000  # maximum number of calibration scores that are stored


def make_exhibits(pipeline: Pipeline, manifest: Manifest, data: PreparedData, notes: Sequence[str]) -> dict[str, bytes]:
    """Return the exhibits by name, in the form that `models.artifact.publish` takes.

    Models trained with the option `private` get no held-out rows, no latents, and no hashes of training rows.

    Args:
        notes: messages about the data and the training, repeated in the card.
    """
    exhibits, rows = {}, data.source_rows
    if not manifest.training.get("private"):
        exhibits[HELD_OUT] = _held_out_json(pipeline, manifest, data)
        exhibits[TRAINED_ROWS] = make_sketch(rows.table.x, np.concatenate((rows.split.fit, rows.split.held_out)))
    exhibits[CALIBRATION] = calibration_json(pipeline.calibration.scores)
    exhibits[CARD] = card(manifest, None, notes, ()).encode()
    return exhibits


def _held_out_json(pipeline: Pipeline, manifest: Manifest, data: PreparedData) -> bytes:
    """Return JSON with `latents` [M, K] and `labels` [M] of the first M held-out rows.

    The JSON also contains the first R of these rows, as `inputs` [R, D].
    """
    source = data.source_rows
    inputs = source.held_out[:MAX_LATENT_ROWS]
    rows = data.held_out[:MAX_LATENT_ROWS]
    if data.rows.by_group is not None:
        rows = inputs_of_pool(data, source.split.held_out[:MAX_LATENT_ROWS])
    with torch.inference_mode():
        rows = data.with_conditions(rows, data.split.held_out)
        latents = pipeline.encode(rows)[0][:, : manifest.latents]
    labels = data.table.labels
    fields = {
        "rows": len(data.held_out),
        "labels": None if labels is None else labels[data.split.held_out[: len(rows)]],
        "label_names": data.table.label_names,
        "latents": latents.contiguous().numpy(),
        "inputs": inputs[: max(1, MAX_VALUES // inputs.shape[1])].numpy(),
    }
    return orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)


def calibration_json(scores: torch.Tensor) -> bytes:
    """Return JSON with at most MAX_SCORES of the sorted `scores` [n], evenly spread, with the first and the last."""
    indices = np.linspace(0, len(scores) - 1, min(len(scores), MAX_SCORES)).round().astype(int)
    fields = {"rows": len(scores), "scores": np.ascontiguousarray(scores.numpy()[indices])}
    return orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)
