"""Selection of the backend; agreement of TorchScript with the ONNX twin (a copy of the networks for ONNX Runtime)."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
import torch

from models import artifact
from models.errors import ArtifactCorrupt, ArtifactMismatch
from service.app import create_app
from service.inference import backend_selection, operations
from service.inference.backend_selection import select_backend
from service.inference.model_loader import ModelLoader
from service.inference.registry import ModelRegistry
from service.settings import Settings
from tests.models.builders import CORES, B, D, batch, pipeline
from tests.models.publishing import GAPS, publish_twin
from tests.service.running import running
from training.publishing.onnx_export import export

Graphs = dict[str, artifact.Graph]


def graphs(kind: str = "vae-gaussian") -> Graphs:
    x, z, _ = batch()
    return export(pipeline(kind), x, z)


def tampered() -> Graphs:
    """Return a twin whose decoder graph contains a changed copy of a weight."""
    twin = graphs()
    model = onnx.load_from_string(twin["decode"].onnx)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "scaling.shift")
    tensor.CopyFrom(onnx.numpy_helper.from_array(pipeline("vae-gaussian").scaling.shift.numpy() + 1e-3, tensor.name))
    names = tuple(name for name in twin["decode"].weights if name != tensor.name)
    return twin | {"decode": artifact.Graph(model.SerializeToString(), names)}


def test_auto_selects_torchscript_and_logs_the_reason_once_if_the_onnx_twin_is_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish_twin(tmp_path, "vae-gaussian", tampered())
    registry = ModelRegistry(tmp_path, ModelLoader(backend="auto"), default_model="model", keep_versions=2)
    for _ in range(2):
        registry.refresh()
    served = registry.catalogue.find("model")
    assert served.backend.name == "torchscript"
    assert "decode differs from its golden answer by 0.001" in served.selection.reason
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    expected = pipeline("vae-gaussian")(batch()[0]).numpy()
    outputs = served.backend.run(operations.reconstruct(False), (batch()[0].numpy(),))
    np.testing.assert_allclose(outputs[0], expected, atol=1e-5)


def test_backend_onnx_raises_artifact_mismatch_if_the_copy_for_onnx_runtime_is_wrong(tmp_path: Path) -> None:
    loaded = artifact.load(publish_twin(tmp_path, "vae-gaussian", tampered()))
    reason = r"decode differs from its golden answer by 0\.001.*ELBO_BACKEND=torchscript"
    with pytest.raises(ArtifactMismatch, match=reason):
        select_backend(loaded, requested="onnx")
    registry = ModelRegistry(tmp_path, ModelLoader(backend="onnx"), default_model="model", keep_versions=2)
    registry.refresh()
    assert not registry.catalogue.models
    assert [failure.code for failure in registry.catalogue.failures] == ["artifact_mismatch"]


@pytest.mark.parametrize(
    ("output", "error", "usable"),
    [("score", 5e-5, True), ("score", 3e-4, False), ("forward", 5e-6, True), ("forward", 5e-5, False)],
)
def test_a_twin_is_used_if_its_errors_are_those_of_rounding(
    output: str, error: float, usable: bool, tmp_path: Path
) -> None:
    loaded = artifact.load(publish_twin(tmp_path, "ae"))
    outputs = loaded.manifest.golden.outputs
    values = np.array(outputs[output])
    outputs[output] = (values + error * abs(values).max()).tolist()
    with nullcontext() if usable else pytest.raises(ArtifactMismatch, match=f"{output} differs from its golden answer"):
        assert select_backend(loaded, requested="onnx").backend.name == "onnx"


@pytest.mark.parametrize("name", ["onnx", "torchscript"])
def test_requested_backend_is_selected(name: str, tmp_path: Path) -> None:
    selection = select_backend(artifact.load(publish_twin(tmp_path, "pca")), requested=name)
    assert (selection.backend.name, selection.reason) == (name, "requested by ELBO_BACKEND")


@pytest.mark.parametrize("kind", CORES)
def test_all_operations_give_equal_results_on_both_backends(kind: str, tmp_path: Path) -> None:
    loaded = artifact.load(publish_twin(tmp_path, kind))
    plain, twin = (select_backend(loaded, requested=name).backend for name in ("torchscript", "onnx"))
    x, noise, choice = (tensor.numpy() for tensor in batch(33))
    calls: list[tuple[operations.Operation, tuple[np.ndarray, ...]]] = [
        (operations.ENCODE, (x,)),
        (operations.reconstruct(False), (x,)),
        (operations.DECODE, (noise,)),
        (operations.SAMPLE, (noise, choice)),
        (operations.anomaly(0.05), (x,)),
    ]
    for operation, inputs in calls:
        for output, expected in zip(twin.run(operation, inputs), plain.run(operation, inputs), strict=True):
            assert output.dtype == np.float32
            assert output.flags.c_contiguous
            np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-5, err_msg=operation.name)


@pytest.mark.parametrize("kind", CORES)
def test_onnx_result_of_a_row_does_not_depend_on_its_batch(kind: str, tmp_path: Path) -> None:
    backend = select_backend(artifact.load(publish_twin(tmp_path, kind)), requested="onnx").backend
    x = batch(33)[0].numpy()
    (together, _) = backend.run(operations.reconstruct(False), (x,))
    for row in range(33):
        (single, _) = backend.run(operations.reconstruct(False), (x[row : row + 1],))
        np.testing.assert_allclose(single[0], together[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("speedup", "name"), [(0.9, "torchscript"), (1.05, "torchscript"), (1.2, "onnx")])
def test_auto_selects_onnx_only_if_it_is_measurably_faster_than_torchscript(
    speedup: float, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_selection, "_best_seconds", lambda *_: [speedup, 1.0])
    selection = select_backend(artifact.load(publish_twin(tmp_path, "pca")))
    assert selection.backend.name == name
    assert f"{speedup:.2f} times as fast as TorchScript, measured with 1 and 32 rows" in selection.reason


def test_artifact_without_an_onnx_twin_gets_torchscript(tmp_path: Path) -> None:
    loaded = replace(artifact.load(publish_twin(tmp_path, "pca")), twin=None)
    for requested in ("auto", "onnx"):
        selection = select_backend(loaded, requested=requested)
        assert (selection.backend.name, selection.reason) == ("torchscript", "the artifact has no ONNX twin")


def test_auto_selects_torchscript_if_onnxruntime_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    selection = select_backend(artifact.load(publish_twin(tmp_path, "pca")))
    assert selection.backend.name == "torchscript"
    assert "onnxruntime, which runs ONNX twins, is not installed" in selection.reason


def test_artifact_on_a_gpu_gets_torchscript(tmp_path: Path) -> None:
    loaded = replace(artifact.load(publish_twin(tmp_path, "pca")), device=torch.device("cuda"))
    assert "the device is cuda" in select_backend(loaded, requested="onnx").reason


def test_load_raises_artifact_corrupt_if_the_onnx_twin_lacks_a_required_graph(tmp_path: Path) -> None:
    path = publish_twin(tmp_path, "pca", {name: graph for name, graph in graphs("pca").items() if name != "score"})
    with pytest.raises(ArtifactCorrupt, match="ONNX twin is incomplete"):
        artifact.load(path)


def test_reconstruction_uses_encode_and_decode_if_the_onnx_twin_has_no_graph_for_it(tmp_path: Path) -> None:
    earlier = {name: graph for name, graph in graphs("ae").items() if name != "reconstruct"}
    x = batch(7)[0].numpy()
    results = []
    for name, twin in (("current", None), ("earlier", earlier)):
        backend = select_backend(artifact.load(publish_twin(tmp_path / name, "ae", twin)), requested="onnx").backend
        results.append(backend.run(operations.reconstruct(False), (x,)))
    for result, expected in zip(*results, strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_auto_selects_torchscript_if_the_onnx_twin_returns_wrong_reconstruction_errors(tmp_path: Path) -> None:
    graph = onnx.load_from_string(graphs("ae")["reconstruct"].onnx)
    for node in graph.graph.node:
        if node.op_type == "ReduceMean":
            node.op_type = "ReduceMax"
    wrong = graphs("ae") | {"reconstruct": replace(graphs("ae")["reconstruct"], onnx=graph.SerializeToString())}
    selection = select_backend(artifact.load(publish_twin(tmp_path, "ae", wrong)))
    assert selection.backend.name == "torchscript"
    assert "reconstruction errors are not the mean squared errors" in selection.reason


@pytest.mark.parametrize("kind", ["pca-imputing", "ae-imputing"])
def test_both_backends_give_equal_reconstructions_of_rows_with_missing_values(kind: str, tmp_path: Path) -> None:
    loaded = artifact.load(publish_twin(tmp_path, kind, gaps=GAPS))
    x = batch(7, gaps=GAPS)[0].numpy()
    plain, twin = (select_backend(loaded, requested=name).backend for name in ("torchscript", "onnx"))
    operation = operations.reconstruct(True)
    for result, expected in zip(twin.run(operation, (x,)), plain.run(operation, (x,)), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_requests_run_on_the_onnx_backend_that_the_models_endpoint_reports(tmp_path: Path) -> None:
    publish_twin(tmp_path, "vae-gaussian")
    description = {"name": "onnx", "reason": "requested by ELBO_BACKEND", "precision": "float32", "errors": {}}
    with running(create_app(Settings(artifacts=tmp_path, device="cpu", backend="onnx"))) as client:
        assert client.get("/models").json()["models"][0]["backend"] == description
        assert client.get("/models/model").json()["backend"] == description
        response: httpx.Response = client.post("/reconstruct", json={"inputs": batch()[0].tolist()})
    outputs = np.array(response.json()["outputs"], np.float32)
    assert outputs.shape == (B, D)
    np.testing.assert_allclose(outputs, pipeline("vae-gaussian")(batch()[0]).numpy(), rtol=1e-5, atol=1e-5)
