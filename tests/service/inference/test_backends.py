"""Which backend serves: the twin where it is true and faster, TorchScript wherever not, and the reason is told."""

import re
import sys
from collections.abc import Callable
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
from service.inference import backends, operations
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


def truncated() -> Graphs:
    """A twin whose decoder breaks off."""
    twin = graphs()
    return twin | {"decode": replace(twin["decode"], onnx=twin["decode"].onnx[:-300])}


def tampered() -> Graphs:
    """A twin whose decoder brings a weight of its own, which is a little off."""
    twin = graphs()
    model = onnx.load_from_string(twin["decode"].onnx)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "scaling.shift")
    tensor.CopyFrom(onnx.numpy_helper.from_array(pipeline("vae-gaussian").scaling.shift.numpy() + 1e-3, tensor.name))
    names = tuple(name for name in twin["decode"].weights if name != tensor.name)
    return twin | {"decode": artifact.Graph(model.SerializeToString(), names)}


def misnamed() -> Graphs:
    """A twin that asks for a weight which the module has not."""
    twin = graphs()
    return twin | {"encode": replace(twin["encode"], weights=("nobody", *twin["encode"].weights))}


BAD: list[tuple[Callable[[], Graphs], str]] = [
    (truncated, "cannot be run"),
    (tampered, r"decode differs from its golden answer by 0\.001"),
    (misnamed, "cannot be run"),
]


@pytest.mark.parametrize(("twin", "told"), BAD, ids=["truncated", "tampered", "misnamed"])
def test_a_twin_that_is_not_the_model_is_not_used_and_the_reason_is_told_once(
    twin: Callable[[], Graphs], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish_twin(tmp_path, "vae-gaussian", twin())
    registry = ModelRegistry(tmp_path, "cpu", "model", 2, "auto")
    for _ in range(2):
        registry.refresh()
    backend = registry.catalogue.find("model").backend
    assert backend.name == "torchscript"
    assert re.search(told, backend.reason)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    expected = pipeline("vae-gaussian")(batch()[0]).numpy()
    outputs = backend.run(operations.reconstruct(False), (batch()[0].numpy(),))
    np.testing.assert_allclose(outputs[0], expected, atol=1e-5)


@pytest.mark.parametrize(("twin", "told"), BAD, ids=["truncated", "tampered", "misnamed"])
def test_where_the_twin_is_asked_for_a_false_one_is_refused(
    twin: Callable[[], Graphs], told: str, tmp_path: Path
) -> None:
    loaded = artifact.load(publish_twin(tmp_path, "vae-gaussian", twin()))
    with pytest.raises(ArtifactMismatch, match=f"{told}.*ELBO_BACKEND=torchscript"):
        backends.choose(loaded, "onnx", 1)
    registry = ModelRegistry(tmp_path, "cpu", "model", 2, "onnx")
    registry.refresh()
    assert not registry.catalogue.models
    assert [failure.code for failure in registry.catalogue.failures] == ["artifact_mismatch"]


@pytest.mark.parametrize(("asked", "name"), [("onnx", "onnx"), ("torchscript", "torchscript")])
def test_what_is_asked_for_runs(asked: str, name: str, tmp_path: Path) -> None:
    backend = backends.choose(artifact.load(publish_twin(tmp_path, "pca")), asked, 1)
    assert (backend.name, backend.reason) == (name, "ELBO_BACKEND asks for it")


@pytest.mark.parametrize("kind", CORES)
def test_every_operation_has_the_same_answers_on_both(kind: str, tmp_path: Path) -> None:
    loaded = artifact.load(publish_twin(tmp_path, kind))
    plain, twin = (backends.choose(loaded, asked, 1) for asked in ("torchscript", "onnx"))
    x, noise, choice = (tensor.numpy() for tensor in batch(33))
    asked: list[tuple[operations.Operation, tuple[np.ndarray, ...]]]
    asked = [(operations.ENCODE, (x,)), (operations.reconstruct(False), (x,)), (operations.DECODE, (noise,))]
    asked += [(operations.SAMPLE, (noise, choice)), (operations.anomaly(0.05), (x,))]
    for operation, inputs in asked:
        for answer, expected in zip(twin.run(operation, inputs), plain.run(operation, inputs), strict=True):
            assert answer.dtype == np.float32
            assert answer.flags.c_contiguous
            np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5, err_msg=operation.name)


@pytest.mark.parametrize("kind", CORES)
def test_a_row_of_the_twin_does_not_depend_on_its_company(kind: str, tmp_path: Path) -> None:
    backend = backends.choose(artifact.load(publish_twin(tmp_path, kind)), "onnx", 1)
    x = batch(33)[0].numpy()
    (together, _) = backend.run(operations.reconstruct(False), (x,))
    for row in range(33):
        (alone, _) = backend.run(operations.reconstruct(False), (x[row : row + 1],))
        np.testing.assert_allclose(alone[0], together[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("gain", "name"), [(0.9, "torchscript"), (1.05, "torchscript"), (1.2, "onnx")])
def test_the_twin_serves_only_where_it_is_measured_faster(
    gain: float, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_best", lambda *_: [gain, 1.0])
    backend = backends.choose(artifact.load(publish_twin(tmp_path, "pca")), "auto", 1)
    assert backend.name == name
    assert f"measured {gain:.2f} times as fast as TorchScript at 1 and 32 rows" in backend.reason


def test_an_artifact_without_a_twin_runs_torchscript_whatever_is_asked(tmp_path: Path) -> None:
    loaded = replace(artifact.load(publish_twin(tmp_path, "pca")), twin=None)
    for asked in ("auto", "onnx"):
        backend = backends.choose(loaded, asked, 1)
        assert (backend.name, backend.reason) == ("torchscript", "the artifact has no ONNX twin")


def test_without_onnxruntime_torchscript_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    backend = backends.choose(artifact.load(publish_twin(tmp_path, "pca")), "auto", 1)
    assert backend.name == "torchscript"
    assert "onnxruntime, which runs ONNX twins, is not installed" in backend.reason


def test_a_gpu_runs_torchscript(tmp_path: Path) -> None:
    loaded = replace(artifact.load(publish_twin(tmp_path, "pca")), device=torch.device("cuda"))
    assert "is cuda" in backends.choose(loaded, "onnx", 1).reason


def test_a_twin_that_lacks_a_graph_is_corrupt(tmp_path: Path) -> None:
    path = publish_twin(tmp_path, "pca", {name: graph for name, graph in graphs("pca").items() if name != "score"})
    with pytest.raises(ArtifactCorrupt, match="ONNX twin is incomplete"):
        artifact.load(path)


def test_a_twin_of_an_earlier_artifact_reconstructs_by_its_code_and_decoder(tmp_path: Path) -> None:
    earlier = {name: graph for name, graph in graphs("ae").items() if name != "reconstruct"}
    x = batch(7)[0].numpy()
    answers = []
    for name, twin in (("now", None), ("then", earlier)):
        backend = backends.choose(artifact.load(publish_twin(tmp_path / name, "ae", twin)), "onnx", 1)
        answers.append(backend.run(operations.reconstruct(False), (x,)))
    for found, expected in zip(*answers, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_twin_whose_errors_are_not_those_of_its_rows_is_not_used(tmp_path: Path) -> None:
    graph = onnx.load_from_string(graphs("ae")["reconstruct"].onnx)
    for node in graph.graph.node:
        if node.op_type == "ReduceMean":
            node.op_type = "ReduceMax"
    false = graphs("ae") | {"reconstruct": replace(graphs("ae")["reconstruct"], onnx=graph.SerializeToString())}
    backend = backends.choose(artifact.load(publish_twin(tmp_path, "ae", false)), "auto", 1)
    assert backend.name == "torchscript"
    assert "errors of reconstructions are not theirs" in backend.reason


@pytest.mark.parametrize("kind", ["pca-imputing", "ae-imputing"])
def test_errors_of_rows_with_gaps_are_alike_on_both(kind: str, tmp_path: Path) -> None:
    loaded = artifact.load(publish_twin(tmp_path, kind, gaps=GAPS))
    x = batch(7, gaps=GAPS)[0].numpy()
    plain, twin = (backends.choose(loaded, asked, 1) for asked in ("torchscript", "onnx"))
    rows = operations.reconstruct(True), (x,)
    for found, expected in zip(twin.run(*rows), plain.run(*rows), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_models_tell_the_backend_and_the_twin_answers_over_http(tmp_path: Path) -> None:
    publish_twin(tmp_path, "vae-gaussian")
    told = {"name": "onnx", "reason": "ELBO_BACKEND asks for it", "precision": "float32", "errors": {}}
    with running(create_app(Settings(artifacts=tmp_path, device="cpu", backend="onnx"))) as client:
        assert client.get("/models").json()["models"][0]["backend"] == told
        assert client.get("/models/model").json()["backend"] == told
        answer: httpx.Response = client.post("/reconstruct", json={"inputs": batch()[0].tolist()})
    outputs = np.array(answer.json()["outputs"], np.float32)
    assert outputs.shape == (B, D)
    np.testing.assert_allclose(outputs, pipeline("vae-gaussian")(batch()[0]).numpy(), rtol=1e-5, atol=1e-5)
