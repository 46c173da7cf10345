"""Publish the models of `builders`, with or without an ONNX twin (the copy of the networks for ONNX Runtime)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from models import artifact
from models.manifest import FORMAT_VERSION
from tests.models.builders import batch, manifest, pipeline
from training.publishing.onnx_export import export

GAPS = ((0, 1), (2, 0), (2, 4))


def publish(root: Path, kind: str = "pca", name: str = "model", format_version: int = FORMAT_VERSION) -> Path:
    """Publish the model of `kind` as `name` under `root`, without a twin; return the path of the artifact."""
    model = pipeline(kind)
    module = artifact.script(model)
    golden = artifact.record_golden(module, *batch(gaps=GAPS if kind == "pca-imputing" else ()))
    return artifact.publish(module, manifest(name, artifact.weights_sha256(model), golden, format_version), root)


def publish_twin(
    root: Path, kind: str, twin: Mapping[str, artifact.Graph] | None = None, gaps: Sequence[tuple[int, int]] = ()
) -> Path:
    """Publish the model of `kind` as model@1 under `root`; return the path of the artifact.

    Args:
        twin: the ONNX twin to publish; by default the one exported from the model.
        gaps: positions (row, column) of missing values in the golden inputs.
    """
    model, inputs = pipeline(kind), batch(gaps=gaps)
    x, noise, _ = inputs
    module = artifact.script(model)
    description = manifest("model", artifact.weights_sha256(model), artifact.record_golden(module, *inputs))
    return artifact.publish(module, description, root, twin or export(model, x, noise))
