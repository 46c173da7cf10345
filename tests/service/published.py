"""Publish a model that was built without training."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from models import artifact
from models.manifest import Feature
from models.pipeline import Pipeline
from tests.models import builders


def publish(
    root: Path,
    name: str,
    model: Pipeline,
    x: torch.Tensor,
    names: Sequence[str],
    shape: Sequence[int],
    pixel_range: tuple[float, float] | None = None,
) -> None:
    """Publish `model` as `name` under `root`; its training rows are `x` [N, D]."""
    module = artifact.script(model.eval())
    latents = module.encode(x[:1])[0].shape[1]
    random = torch.Generator().manual_seed(0)
    golden = artifact.record_golden(
        module, x[:3], torch.randn(3, latents, generator=random), torch.rand(3, generator=random)
    )
    rows = x.numpy()
    columns = zip(
        names, np.nanmedian(rows, 0), np.nanmin(rows, 0), np.nanmax(rows, 0), np.isnan(rows).sum(0), strict=True
    )
    features = [
        Feature(name=n, unit=None, median=float(median), minimum=float(low), maximum=float(high), missing=int(missing))
        for n, median, low, high, missing in columns
    ]
    update = {
        "shape": list(shape), "features": features, "latents": latents, "parts": list(model.core.parts),
        "pixel_range": pixel_range,
    }  # fmt: skip
    plain = builders.manifest(name, artifact.weights_sha256(model), golden)
    artifact.publish(module, plain.model_copy(update=update), root)
