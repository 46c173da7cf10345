"""Manifests for tests that need no trained model."""

import numpy as np

from models.manifest import FORMAT_VERSION, CalibrationSize, Data, Feature, Golden, Manifest
from tests.data import values
from training.data.table import Table


def manifest_of(table: Table) -> Manifest:
    """Return the manifest of a PCA model named m that was trained on `table`."""
    x = values(table)
    medians, lows, highs = np.nanmedian(x, axis=0), np.nanmin(x, axis=0), np.nanmax(x, axis=0)
    return Manifest(
        format_version=FORMAT_VERSION,
        name="m",
        kind="pca",
        created="2026-01-02T03:04:05+00:00",
        shape=list(table.shape),
        features=[
            Feature(name=name, unit=unit, median=median, minimum=low, maximum=high, missing=missing)
            for name, unit, median, low, high, missing in zip(
                table.names, table.units, medians, lows, highs, table.missing.tolist(), strict=True
            )
        ],
        latents=2,
        parts=["t2", "q"],
        pixel_range=table.pixel_range,
        training={"model": "pca", "seed": 0},
        data=Data(source=table.source, rows=10, fingerprint=table.fingerprint, fit=7, held_out=1, calibration=2),
        metrics={"reconstruction_error": 0.25},
        calibration=CalibrationSize(rows=2, floor=1 / 3),
        golden=Golden(inputs={}, outputs={}),
        versions={"elbo": "0.1.0"},
        weights_sha256="0" * 64,
    )
