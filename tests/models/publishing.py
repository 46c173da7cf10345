"""Artifacts of the builders' models, with their twins."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from models import artifact
from tests.models.builders import batch, manifest, pipeline
from training.publishing.onnx_export import export

GAPS = ((0, 1), (2, 0), (2, 4))


def publish_twin(
    root: Path, kind: str, twin: Mapping[str, artifact.Graph] | None = None, gaps: Sequence[tuple[int, int]] = ()
) -> Path:
    """The model of `kind` as model@1 under `root`, with its own twin or the one that is given; its file."""
    model, inputs = pipeline(kind), batch(gaps=gaps)
    module = artifact.script(model)
    described = manifest("model", artifact.weights_sha256(model), artifact.golden(module, *inputs))
    return artifact.publish(module, described, root, twin or export(model, inputs[0], inputs[1]))
