"""Artifacts: publishing, loading, verification, and use with only torch installed."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from models import artifact
from models.errors import (
    ArtifactCorrupt,
    ArtifactError,
    ArtifactForeign,
    ArtifactMismatch,
    ArtifactMissing,
    ArtifactTooNew,
    DeviceMissing,
)
from models.manifest import FORMAT_VERSION, names, read_manifest, resolve, versions
from models.pipeline import Pipeline
from models.scaling import ImputingScaling
from tests.models.builders import CORES, batch, manifest, pipeline
from tests.models.publishing import GAPS, publish
from tests.preloaded import PreloadedProcess, run_preloaded

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
KINDS = (*CORES, "pca-imputing")


@pytest.mark.parametrize("kind", KINDS)
def test_model_gives_equal_outputs_whether_eager_scripted_or_frozen(kind: str) -> None:
    model, inputs = pipeline(kind), batch(gaps=GAPS if kind == "pca-imputing" else ())
    scripted = artifact.script(model)
    eager = artifact.compute_outputs(model, *inputs)
    for other in (scripted, artifact.freeze(scripted)):
        for _ in range(3):  # TorchScript optimises the code during the second and third calls
            outputs = artifact.compute_outputs(other, *inputs)
        assert outputs.keys() == eager.keys()
        for name in eager:
            assert torch.allclose(outputs[name], eager[name], rtol=1e-6, atol=1e-6, equal_nan=True), name


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_artifact_gives_the_outputs_of_the_published_model(kind: str, tmp_path: Path) -> None:
    path = publish(tmp_path, kind)
    loaded, model = artifact.load(path), pipeline(kind)
    inputs = batch(gaps=GAPS if kind == "pca-imputing" else ())
    outputs, eager = artifact.compute_outputs(loaded.module, *inputs), artifact.compute_outputs(model, *inputs)
    for name in eager:
        assert torch.allclose(outputs[name], eager[name], rtol=1e-6, atol=1e-6, equal_nan=True), name
    assert loaded.manifest.weights_sha256 == artifact.weights_sha256(model)


def test_publish_increments_the_version_and_resolve_returns_the_newest_version(tmp_path: Path) -> None:
    first, second = publish(tmp_path), publish(tmp_path)
    assert [first, second] == [tmp_path / "model" / version / "model.pt" for version in ("1", "2")]
    assert versions(tmp_path, "model") == [1, 2]
    assert names(tmp_path) == ["model"]
    assert resolve(tmp_path, "model") == second
    assert resolve(tmp_path, "model@1") == first


@pytest.mark.parametrize(
    "reference", ["absent", "model@9", "model@01", "model@", "../model", "", "model/1", ".", "mo del"]
)
def test_resolve_raises_artifact_missing_if_the_reference_is_unknown_or_malformed(
    reference: str, tmp_path: Path
) -> None:
    publish(tmp_path)
    with pytest.raises(ArtifactMissing):
        resolve(tmp_path, reference)


def test_concurrent_publishers_get_different_versions(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: publish(tmp_path), range(8)))
    assert len(set(paths)) == 8
    assert versions(tmp_path, "model") == list(range(1, 9))
    assert not list(tmp_path.glob("model/.staging-*"))


def test_killing_a_publisher_leaves_only_complete_versions(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.models.publishing import publish\n"
        "while True: publish(Path(sys.argv[1]))"
    )
    for delay in (0.0, 0.013):
        before = len(versions(tmp_path, "model"))
        process = PreloadedProcess([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
        deadline = time.monotonic() + 60
        while len(versions(tmp_path, "model")) == before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(versions(tmp_path, "model")) > before
    for version in versions(tmp_path, "model"):
        artifact.load(tmp_path / "model" / str(version) / "model.pt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_loading_a_truncated_file_raises_an_artifact_error(share: float, tmp_path: Path) -> None:
    path = publish(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises((ArtifactCorrupt, ArtifactForeign)):
        artifact.load(path)


def test_loading_a_file_with_one_flipped_bit_raises_an_artifact_error(tmp_path: Path) -> None:
    path = publish(tmp_path)
    content = path.read_bytes()
    offsets = np.random.RandomState(0).choice(len(content), 200, replace=False)
    for offset in (*offsets.tolist(), 0, len(content) - 1):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 0x10]) + content[offset + 1 :])
        with pytest.raises(ArtifactError):
            artifact.load(path)
    path.write_bytes(content)
    artifact.load(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04\x95", b"PK\x03\x04rest"])
def test_loading_a_file_of_another_format_raises_an_error_with_advice(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises((ArtifactForeign, ArtifactCorrupt), match=r"elbo train|copy it again"):
        artifact.load(path)


def test_load_raises_artifact_foreign_if_a_torchscript_file_has_no_seal(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(artifact.script(pipeline("pca")), path)
    with pytest.raises(ArtifactForeign, match="without Elbo's seal"):
        artifact.load(path)


def test_load_raises_artifact_too_new_for_a_later_format_version(tmp_path: Path) -> None:
    path = publish(tmp_path, format_version=FORMAT_VERSION + 1)
    with pytest.raises(ArtifactTooNew, match=f"format version {FORMAT_VERSION + 1}.*upgrade Elbo"):
        artifact.load(path)


def test_load_raises_artifact_too_new_for_a_later_format_version_even_if_the_seal_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "archive/extra/manifest.json",
            json.dumps({"format_version": FORMAT_VERSION + 1, "seal": "unknown"}),
        )
    with pytest.raises(ArtifactTooNew, match=f"format version {FORMAT_VERSION + 1}.*upgrade Elbo"):
        artifact.load(path)


def test_loading_an_absent_file_raises_artifact_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissing, match="elbo train"):
        artifact.load(tmp_path / "absent.pt")


def test_load_raises_artifact_mismatch_if_the_model_does_not_give_its_golden_answers(tmp_path: Path) -> None:
    model = pipeline("pca")
    module = artifact.script(model)
    golden = artifact.record_golden(module, *batch())
    golden.outputs["forward"][0][0] += 0.1
    path = artifact.publish(module, manifest("model", artifact.weights_sha256(model), golden), tmp_path)
    with pytest.raises(ArtifactMismatch, match=r"forward differs from its golden answer by 0\.1"):
        artifact.load(path)


def test_load_raises_artifact_corrupt_if_the_weights_do_not_match_the_manifest(tmp_path: Path) -> None:
    module = artifact.script(pipeline("pca"))
    path = artifact.publish(module, manifest("model", "0" * 64, artifact.record_golden(module, *batch())), tmp_path)
    with pytest.raises(ArtifactCorrupt, match="weights"):
        artifact.load(path)


def test_artifact_is_a_zip_file_that_contains_the_manifest_as_json(tmp_path: Path) -> None:
    path = publish(tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        (member,) = (name for name in archive.namelist() if name.endswith("extra/manifest.json"))
        content = json.loads(archive.read(member))
    assert content == read_manifest(path).model_dump(mode="json")


def test_reading_the_manifest_does_not_import_torch(tmp_path: Path) -> None:
    path = publish(tmp_path)
    program = (
        "import sys; from pathlib import Path; from models.manifest import read_manifest\n"
        "print(read_manifest(Path(sys.argv[1])).name, 'torch' in sys.modules)"
    )
    output = subprocess.check_output([sys.executable, "-c", program, str(path)], cwd=ROOT, text=True)
    assert output.split() == ["model", "False"]


PLAIN_TORCH = """
import json, os, sys, warnings, zipfile
warnings.simplefilter("ignore")
sys.path = [folder for folder in sys.path if not os.path.isdir(os.path.join(folder, "models"))]  # drop our own source
import torch
for package in ("models", "training", "service"):
    try:
        __import__(package)
    except ImportError:
        continue
    sys.exit(f"{package} is importable, so this test proves nothing")
archive = zipfile.ZipFile(sys.argv[1])
golden = json.loads(archive.read(next(n for n in archive.namelist() if n.endswith("extra/manifest.json"))))["golden"]
module = torch.jit.load(sys.argv[1])
inputs = (golden["inputs"][name] for name in ("x", "noise", "choice"))
x, noise, choice = (torch.tensor(json.loads(json.dumps(values).replace("null", "NaN"))) for values in inputs)
mean, std = module.encode(x)
score, parts, contribution, expected = module.score(x)
outputs = {"forward": module(x), "encode.mean": mean, "encode.std": std, "decode": module.decode(mean),
           "draw": module.draw(noise, choice), "score": score, "p_value": module.p_value(score)}
print(max(float((output - torch.tensor(golden["outputs"][name])).abs().max()) for name, output in outputs.items()))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_artifact_gives_its_golden_answers_if_only_torch_is_installed(kind: str, tmp_path: Path) -> None:
    path = publish(tmp_path, kind)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", PLAIN_TORCH, str(path)]
    process = run_preloaded(command, cwd=tmp_path, env=environment, text=True)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) <= 1e-5


def test_load_leaves_the_random_state_and_the_thread_count_unchanged(tmp_path: Path) -> None:
    path = publish(tmp_path)
    torch.manual_seed(5)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    artifact.load(path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_choose_device_returns_an_available_device_or_raises_device_missing() -> None:
    assert artifact.choose_device("cpu") == "cpu"
    if torch.cuda.is_available():
        assert artifact.choose_device("auto") == artifact.choose_device("cuda") == "cuda"
        return
    assert artifact.choose_device("auto") == "cpu"
    with pytest.raises(DeviceMissing, match="no CUDA device on this machine: use auto or cpu"):
        artifact.choose_device("cuda")


class PipelineWithoutLogWeight(Pipeline):
    """A pipeline of an earlier release, when pipelines had no log_weight."""

    log_weight = None  # type: ignore[assignment] # absent from artifacts of earlier releases


def test_artifact_without_log_weight_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pipeline("pca")
    earlier = PipelineWithoutLogWeight(model.scaling, model.core, model.prior, model.calibration)
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "METHODS", tuple(name for name in artifact.METHODS if name != "log_weight"))
        module = artifact.script(earlier)
    golden = artifact.record_golden(module, *batch())
    assert "log_weight" not in golden.outputs
    path = artifact.publish(module, manifest("model", artifact.weights_sha256(earlier), golden), tmp_path)
    loaded = artifact.load(path).module
    assert torch.allclose(loaded(batch()[0]), model(batch()[0]), atol=1e-6)
    assert not hasattr(loaded, "log_weight")


@pytest.mark.parametrize(("kind", "has_density"), [("pca", True), ("vae-bernoulli", True), ("ae", False)])
def test_golden_answers_include_log_weights_only_if_the_model_has_a_density(kind: str, has_density: bool) -> None:
    golden = artifact.record_golden(artifact.script(pipeline(kind)), *batch())
    assert ("log_weight" in golden.outputs) is has_density


def test_golden_rows_store_missing_values_as_null_and_the_loaded_model_imputes_them(tmp_path: Path) -> None:
    loaded = artifact.load(publish(tmp_path, "pca-imputing"))
    assert loaded.manifest.golden.inputs["x"][2][4] is None
    scaling, rows = pipeline("pca-imputing").scaling, batch(gaps=GAPS)[0]
    assert isinstance(scaling, ImputingScaling)
    filled = torch.where(rows.isnan(), scaling.fill, rows)
    assert torch.equal(loaded.module(rows), loaded.module(filled))
