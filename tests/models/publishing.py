"""Publish the models of `builders`, with their ONNX twins."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from models import artifact
from tests.models.builders import batch, manifest, pipeline
from training.publishing.onnx_export import export

GAPS = ((0, 1), (2, 0), (2, 4))


def publish_twin(
    root: Path, kind: str, twin: Mapping[str, artifact.Graph] | None = None, gaps: Sequence[tuple[int, int]] = ()
) -> Path:
    """Publish the model of `kind` as model@1 under `root` with `twin`, by default its exported one; return the path."""
    model, inputs = pipeline(kind), batch(gaps=gaps)
    x, noise, _ = inputs
    module = artifact.script(model)
    description = manifest("model", artifact.weights_sha256(model), artifact.record_golden(module, *inputs))
    return artifact.publish(module, description, root, twin or export(model, x, noise))
