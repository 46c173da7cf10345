"""Publish the models of `builders`, with or without an ONNX twin (the copy of the networks for ONNX Runtime)."""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from models import artifact
from models.manifest import FORMAT_VERSION, ConditionColumn, Conditions, Window
from tests.data import ROOT
from tests.models import conditional
from tests.models.builders import batch, manifest, pipeline
from tests.models.windows import SCALES, N, windowed, windows
from tests.preloaded import run_preloaded
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


@lru_cache(maxsize=1)
def pca_artifacts() -> tuple[bytes, bytes]:
    """Return two artifacts of a PCA, with and without an ONNX twin, from a new process.

    The names of their code members are always the same. In a process that has scripted other models, torch may rename
    `code/__torch__/models/pca.py` to `code/__torch__/models/___torch_mangle_0/pca.py`.
    """
    program = """
import sys
from pathlib import Path
from tests.models.publishing import publish, publish_twin
publish_twin(Path(sys.argv[1]), "pca")
publish(Path(sys.argv[1]))
"""
    with tempfile.TemporaryDirectory() as folder:
        run_preloaded([sys.executable, "-c", program, folder], cwd=ROOT).check_returncode()
        twin, plain = (Path(folder, "model", version, "model.pt").read_bytes() for version in "12")
    return twin, plain


def publish_copy(root: Path, twin: bool = False) -> Path:
    """Copy an artifact of `pca_artifacts` to model@1 under `root`; return its path."""
    path = root / "model" / "1" / "model.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(pca_artifacts()[0 if twin else 1])
    return path


def publish_windowed(root: Path, kind: str, name: str = "model") -> Path:
    """Publish the model of `kind` with a window and a twin as `name`@1 under `root`; return the path of the artifact.

    If the model imputes missing values, its features x0 and x1 may lack them.
    """
    imputes = kind.endswith("imputing")
    model, inputs = windowed(kind), windows(gaps=imputes)
    module = artifact.script(model)
    description = manifest(name, artifact.weights_sha256(model), artifact.record_golden(module, *inputs))
    features = [
        feature.model_copy(update={"missing": int(imputes and index < 2)})
        for index, feature in enumerate(description.features)
    ]
    update = {"window": Window(rows=N, scales=list(SCALES)), "features": features}
    return artifact.publish(module, description.model_copy(update=update), root, export(model, *inputs[:2]))


def publish_conditional(root: Path, name: str = "model", kind: str = "vae") -> Path:
    """Publish a conditional model of `kind` as `name`@1 under `root`; return the path of the artifact.

    Its columns of conditions are a and b. Their levels are the numbers from 0.
    """
    model, inputs = conditional.conditional(kind), conditional.batch()
    module = artifact.script(model)
    plain = manifest(name, artifact.weights_sha256(model), artifact.record_golden(module, *inputs))
    columns = [
        ConditionColumn(name=column, levels=[str(level) for level in range(count)])
        for column, count in zip("ab", conditional.LEVELS, strict=True)
    ]
    conditions = Conditions(columns=columns, combinations=[[0, 0]], shares=[1.0])
    update = {"conditions": conditions, "latents": conditional.L, "parts": ["first", "second", "correction"]}
    return artifact.publish(module, plain.model_copy(update=update), root)
