"""Exported models: their outputs against the modules that were published, their files, and what is refused."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from models import artifact
from tests.commands import command
from tests.conftest import require
from tests.data import ROOT
from tests.models import builders, conditional
from tests.models.publishing import publish, publish_conditional, publish_windowed
from tests.models.windows import windowed, windows
from tests.training.adoption.networks import perceptron, settle
from training.adoption.adopt import adopt
from training.errors import ExportError
from training.exporting import export as exporting
from training.exporting.export import export, relative_difference
from training.exporting.module import WholeModel

pytestmark = pytest.mark.slow

ROWS = 11  # not the number of rows that the exporter traces with
OUTPUTS = ("x_hat", "mean", "std", "score", "p_value", "parts", "contribution", "expected")
KINDS = (
    "pca", "ae", "ensemble", "vae-gaussian", "vae-bernoulli", "pca-imputing", "window", "conditional", "adopted",
    "adopted-reconstruction",
)  # fmt: skip
CLIENTS = ROOT / ".venv-clients" / "bin" / "python"
READ_CONFIG = ROOT / "tests" / "service" / "protocol_clients" / "triton_config.py"


class Coder(nn.Module):
    """An autoencoder with functions of its own for both halves."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(builders.D, builders.K), nn.Linear(builders.K, builders.D)

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.down(x))

    def decode(self, z: Tensor) -> Tensor:
        rows: Tensor = self.up(z)
        return rows

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def publish_adopted(root: Path, has_code: bool) -> Path:
    network: nn.Module = Coder() if has_code else perceptron(builders.D)
    rows = np.random.default_rng(0).normal(size=(90, builders.D)).astype(np.float32)
    return adopt(settle(network, (builders.D,)), rows, name="model", artifacts=root)


def published(kind: str, root: Path) -> tuple[artifact.Artifact, Any, Tensor]:
    """Return the artifact of a model of `kind`, the module that was published, and rows [ROWS, ...]."""
    if kind == "window":
        x = torch.cat([windows(gaps=False)[0], windows(gaps=False)[0][:5]])
        return artifact.load(publish_windowed(root, "ensemble")), windowed("ensemble"), x
    if kind == "conditional":
        x = torch.cat([conditional.batch()[0], conditional.batch()[0][:5]])
        return artifact.load(publish_conditional(root)), conditional.conditional("vae"), x
    x = builders.batch(ROWS, gaps=[(0, 1), (9, 4)] if kind.endswith("imputing") else ())[0]
    if kind in ("adopted", "adopted-reconstruction"):
        loaded = artifact.load(publish_adopted(root, has_code=kind == "adopted"))
        return loaded, loaded.module, x
    return artifact.load(publish(root, kind)), builders.pipeline(kind), x


def outputs_of(module: Any, x: Tensor) -> dict[str, Tensor]:
    with torch.inference_mode():
        mean, std = module.encode(x)
        score, parts, contribution, expected = module.score(x)
        values = module.decode(mean), mean, std, score, module.p_value(score), parts, contribution, expected
    return dict(zip(OUTPUTS, values, strict=True))


def run_onnx(path: Path, x: Tensor, name: str = "x") -> dict[str, Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, {name: x.numpy()})), strict=True))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        assert relative_difference(value, expected[name]) <= tolerance, name


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_pipeline_gives_the_outputs_of_the_model_for_any_number_of_rows(kind: str, tmp_path: Path) -> None:
    loaded, module, x = published(kind, tmp_path / "artifacts")
    (path,) = export(loaded, "model", 1, "onnx-pipeline", tmp_path / "out")
    assert path == tmp_path / "out" / "model" / "1" / "model.onnx"
    has_latents = kind != "adopted-reconstruction"
    for rows in (x, x[:1]):
        found = run_onnx(path, rows)
        assert tuple(found) == tuple(each for each in OUTPUTS if has_latents or each not in ("mean", "std"))
        assert_equal(found, outputs_of(module, rows), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_pt2_gives_the_outputs_of_the_model_for_any_number_of_rows(kind: str, tmp_path: Path) -> None:
    loaded, module, x = published(kind, tmp_path / "artifacts")
    (path,) = export(loaded, "model", 1, "pt2", tmp_path / "out")
    program = torch.export.load(path).module()
    for rows in (x, x[:1]):
        names = [each for each in OUTPUTS if kind != "adopted-reconstruction" or each not in ("mean", "std")]
        assert_equal(dict(zip(names, program(rows), strict=True)), outputs_of(module, rows), 1e-6)
    assert [each.name for each in (tmp_path / "out" / "model").iterdir()] == ["1"]


def test_onnx_has_a_file_for_each_method(tmp_path: Path) -> None:
    loaded, module, x = published("vae-gaussian", tmp_path / "artifacts")
    paths = export(loaded, "model", 3, "onnx", tmp_path / "out")
    names = [str(path.relative_to(tmp_path / "out")) for path in paths]
    assert names == [f"model-{method}/3/model.onnx" for method in ("encode", "score", "decode")]
    expected = outputs_of(module, x)
    encoded = run_onnx(paths[0], x)
    assert_equal(encoded | run_onnx(paths[1], x), expected, 1e-5)
    assert_equal(run_onnx(paths[2], encoded["mean"], "z"), expected, 1e-5)


def test_p_values_are_those_of_the_calibration_at_ties_and_beyond_both_ends(tmp_path: Path) -> None:
    loaded = artifact.load(publish(tmp_path / "artifacts", "pca"))
    whole = WholeModel(artifact.thaw(loaded), loaded.manifest, loaded.calibration["scores"])
    scores = loaded.calibration["scores"]
    edges = torch.cat([scores, scores.nextafter(torch.tensor(1e9)), torch.tensor([-1e9, 1e9, torch.inf, torch.nan])])
    assert torch.equal(whole.p_value(edges), builders.pipeline("pca").p_value(edges))


def test_config_that_triton_reads_describes_the_inputs_and_outputs_of_the_onnx_files(tmp_path: Path) -> None:
    require(CLIENTS.exists(), "no .venv-clients: make test installs it")
    paths = []
    for name, path in (
        ("pca", publish(tmp_path / "plain", "pca")),
        ("windows", publish_windowed(tmp_path / "windowed", "pca")),
        ("conditional", publish_conditional(tmp_path / "conditional", kind="ae")),
    ):
        loaded = artifact.load(path)
        paths += export(loaded, name, 1, "onnx-pipeline", tmp_path / "out")
    paths += export(loaded, "methods", 1, "onnx", tmp_path / "out")
    configs = [str(path.parents[1] / "config.pbtxt") for path in paths]
    result = subprocess.run([CLIENTS, READ_CONFIG, *configs], capture_output=True, text=True, check=True)
    for path, config in zip(paths, json.loads(result.stdout), strict=True):
        assert (config["name"], config["backend"]) == (path.parents[1].name, "onnxruntime")
        assert (config["max_batch_size"], config["dynamic_batching"]) == (1024, {})
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for described, found in ((config["input"], session.get_inputs()), (config["output"], session.get_outputs())):
            assert [each["name"] for each in described] == [each.name for each in found]
            for each, tensor in zip(described, found, strict=True):
                assert (each["data_type"], tensor.type) == ("TYPE_FP32", "tensor(float)")
                # Triton's dims are without the batch, and it does not know a tensor that has only a batch.
                dims = [int(length) for length in each["dims"]]
                assert (dims, each.get("reshape")) == ((tensor.shape[1:], None) if tensor.shape[1:] else ([1], {}))


def test_export_that_exists_is_refused_and_another_version_is_added(tmp_path: Path) -> None:
    loaded = artifact.load(publish(tmp_path / "artifacts", "pca"))
    (first,) = export(loaded, "model", 1, "onnx-pipeline", tmp_path / "out")
    content = first.read_bytes()
    with pytest.raises(ExportError, match="exists already"):
        export(loaded, "model", 1, "onnx-pipeline", tmp_path / "out")
    export(loaded, "model", 2, "onnx-pipeline", tmp_path / "out")
    assert first.read_bytes() == content
    names = sorted(each.name for each in (tmp_path / "out" / "model").iterdir())
    assert names == ["1", "2", "config.pbtxt"]
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["model"]


@pytest.mark.parametrize("place", ["_write_synced", "_onnx"])
def test_failed_export_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    loaded = artifact.load(publish(tmp_path / "artifacts", "pca"))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, place, fail)
    with pytest.raises((ExportError, OSError), match="No space left"):
        export(loaded, "model", 1, "onnx-pipeline", tmp_path / "out")
    assert list((tmp_path / "out").glob("*")) == []


def test_model_whose_export_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = artifact.load(publish(tmp_path / "artifacts", "pca"))
    right: Callable[[exporting.Part], tuple[bytes, Any]] = exporting._onnx

    def wrong(part: exporting.Part) -> tuple[bytes, Any]:
        content, run = right(part)
        return content, lambda x: [1.001 * each for each in run(x)]

    monkeypatch.setattr(exporting, "_onnx", wrong)
    with pytest.raises(ExportError, match=r"model@1 cannot be exported as onnx-pipeline: x_hat differs"):
        export(loaded, "model", 1, "onnx-pipeline", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_that_needs_the_group_of_a_row_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "artifacts"
    loaded = artifact.load(publish(root, "pca"))
    scales: Any = SimpleNamespace(features=object())
    with pytest.raises(ExportError, match="--scale-by-group"):
        export(replace(loaded, baseline=scales), "model", 1, "pt2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_command_exports_the_newest_version(tmp_path: Path) -> None:
    for _ in range(2):
        publish(tmp_path / "artifacts", "pca")
    result = command("export", "model", "--artifacts", str(tmp_path / "artifacts"), "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"exported model@2: {tmp_path}/out/model/2/model.onnx\n"
    again = command("export", "model", "--artifacts", str(tmp_path / "artifacts"), "--out", str(tmp_path / "out"))
    assert (again.returncode, "exists already" in again.stderr) == (1, True)
