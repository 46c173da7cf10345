"""The artifact: what it says, what it refuses, and that it needs nothing but torch to answer."""

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

ROOT = Path(__file__).resolve().parents[2]
KINDS = (*CORES, "pca-imputing")
GAPS = ((0, 1), (2, 0), (2, 4))


def publish(root: Path, kind: str = "pca", name: str = "model", format_version: int = FORMAT_VERSION) -> Path:
    model = pipeline(kind)
    module = artifact.script(model)
    pairs = artifact.golden(module, *batch(gaps=GAPS if kind == "pca-imputing" else ()))
    return artifact.publish(module, manifest(name, artifact.weights_sha256(model), pairs, format_version), root)


@pytest.mark.parametrize("kind", KINDS)
def test_eager_scripted_and_frozen_agree(kind: str) -> None:
    model, inputs = pipeline(kind), batch(gaps=GAPS if kind == "pca-imputing" else ())
    scripted = artifact.script(model)
    eager = artifact.answers(model, *inputs)
    for other in (scripted, artifact.freeze(scripted)):
        for _ in range(3):  # TorchScript specialises on its second and third call
            answers = artifact.answers(other, *inputs)
        assert answers.keys() == eager.keys()
        for name in eager:
            assert torch.allclose(answers[name], eager[name], rtol=1e-6, atol=1e-6, equal_nan=True), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_artifact_answers_as_the_model_did(kind: str, tmp_path: Path) -> None:
    path = publish(tmp_path, kind)
    loaded, model = artifact.load(path), pipeline(kind)
    inputs = batch(gaps=GAPS if kind == "pca-imputing" else ())
    answers, eager = artifact.answers(loaded.module, *inputs), artifact.answers(model, *inputs)
    for name in eager:
        assert torch.allclose(answers[name], eager[name], rtol=1e-6, atol=1e-6, equal_nan=True), name
    assert loaded.manifest.weights_sha256 == artifact.weights_sha256(model)


def test_versions_count_up_and_the_newest_is_the_default(tmp_path: Path) -> None:
    first, second = publish(tmp_path), publish(tmp_path)
    assert [first, second] == [tmp_path / "model" / version / "model.pt" for version in ("1", "2")]
    assert versions(tmp_path, "model") == [1, 2]
    assert names(tmp_path) == ["model"]
    assert resolve(tmp_path, "model") == second
    assert resolve(tmp_path, "model@1") == first


@pytest.mark.parametrize(
    "reference", ["absent", "model@9", "model@01", "model@", "../model", "", "model/1", ".", "mo del"]
)
def test_a_reference_to_nothing_is_missing(reference: str, tmp_path: Path) -> None:
    publish(tmp_path)
    with pytest.raises(ArtifactMissing):
        resolve(tmp_path, reference)


def test_publishers_at_once_get_a_version_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: publish(tmp_path), range(8)))
    assert len(set(paths)) == 8
    assert versions(tmp_path, "model") == list(range(1, 9))
    assert not list(tmp_path.glob("model/.staging-*"))


def test_a_publisher_killed_at_any_moment_leaves_only_whole_versions(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.models.test_artifact import publish\n"
        "while True: publish(Path(sys.argv[1]))"
    )
    for delay in (0.0, 0.013):
        seen = len(versions(tmp_path, "model"))
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
        deadline = time.monotonic() + 60
        while len(versions(tmp_path, "model")) == seen and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(versions(tmp_path, "model")) > seen
    for version in versions(tmp_path, "model"):
        artifact.load(tmp_path / "model" / str(version) / "model.pt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    path = publish(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises((ArtifactCorrupt, ArtifactForeign)):
        artifact.load(path)


def test_a_flipped_bit_anywhere_is_refused(tmp_path: Path) -> None:
    path = publish(tmp_path)
    content = path.read_bytes()
    places = np.random.RandomState(0).choice(len(content), 200, replace=False)
    for place in (*places.tolist(), 0, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(ArtifactError):
            artifact.load(path)
    path.write_bytes(content)
    artifact.load(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04\x95", b"PK\x03\x04rest"])
def test_a_foreign_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises((ArtifactForeign, ArtifactCorrupt), match=r"elbo train|copy it again"):
        artifact.load(path)


def test_a_plain_torchscript_file_is_foreign(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(artifact.script(pipeline("pca")), path)
    with pytest.raises(ArtifactForeign, match="without Elbo's seal"):
        artifact.load(path)


def test_a_later_format_is_refused_and_says_so(tmp_path: Path) -> None:
    path = publish(tmp_path, format_version=FORMAT_VERSION + 1)
    with pytest.raises(ArtifactTooNew, match=f"format version {FORMAT_VERSION + 1}.*upgrade Elbo"):
        artifact.load(path)


def test_a_later_format_is_named_as_such_though_its_seal_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "archive/extra/manifest.json",
            json.dumps({"format_version": FORMAT_VERSION + 1, "sealed": "in another way"}),
        )
    with pytest.raises(ArtifactTooNew, match=f"format version {FORMAT_VERSION + 1}.*upgrade Elbo"):
        artifact.load(path)


def test_a_file_that_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissing, match="elbo train"):
        artifact.load(tmp_path / "absent.pt")


def test_a_model_that_does_not_repeat_its_golden_answers_is_refused(tmp_path: Path) -> None:
    model = pipeline("pca")
    module = artifact.script(model)
    pairs = artifact.golden(module, *batch())
    pairs.outputs["forward"][0][0] += 0.1
    path = artifact.publish(module, manifest("model", artifact.weights_sha256(model), pairs), tmp_path)
    with pytest.raises(ArtifactMismatch, match=r"forward differs from its golden answer by 0\.1"):
        artifact.load(path)


def test_weights_other_than_the_manifest_names_are_refused(tmp_path: Path) -> None:
    module = artifact.script(pipeline("pca"))
    path = artifact.publish(module, manifest("model", "0" * 64, artifact.golden(module, *batch())), tmp_path)
    with pytest.raises(ArtifactCorrupt, match="weights"):
        artifact.load(path)


def test_the_manifest_is_plain_json_in_a_plain_zip(tmp_path: Path) -> None:
    path = publish(tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        (member,) = (name for name in archive.namelist() if name.endswith("extra/manifest.json"))
        content = json.loads(archive.read(member))
    assert content == read_manifest(path).model_dump(mode="json")


def test_the_manifest_is_read_without_torch(tmp_path: Path) -> None:
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
sys.path = [place for place in sys.path if not os.path.isdir(os.path.join(place, "models"))]  # our own source
import torch
for absent in ("models", "training", "service"):
    try:
        __import__(absent)
    except ImportError:
        continue
    sys.exit(f"{absent} is importable, so this proves nothing")
archive = zipfile.ZipFile(sys.argv[1])
golden = json.loads(archive.read(next(n for n in archive.namelist() if n.endswith("extra/manifest.json"))))["golden"]
module = torch.jit.load(sys.argv[1])
inputs = (golden["inputs"][name] for name in ("x", "noise", "choice"))
x, noise, choice = (torch.tensor(json.loads(json.dumps(values).replace("null", "NaN"))) for values in inputs)
mean, std = module.encode(x)
score, parts, contribution, expected = module.score(x)
answers = {"forward": module(x), "encode.mean": mean, "encode.std": std, "decode": module.decode(mean),
           "draw": module.draw(noise, choice), "score": score, "p_value": module.p_value(score)}
print(max(float((answer - torch.tensor(golden["outputs"][name])).abs().max()) for name, answer in answers.items()))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_where_only_torch_is_installed(kind: str, tmp_path: Path) -> None:
    path = publish(tmp_path, kind)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", PLAIN_TORCH, str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1e-5


def test_load_touches_no_random_stream_and_no_thread_setting(tmp_path: Path) -> None:
    path = publish(tmp_path)
    torch.manual_seed(5)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    artifact.load(path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_the_cpu_is_always_there_and_a_missing_gpu_is_said() -> None:
    assert artifact.choose_device("cpu") == "cpu"
    if torch.cuda.is_available():
        assert artifact.choose_device("auto") == artifact.choose_device("cuda") == "cuda"
        return
    assert artifact.choose_device("auto") == "cpu"
    with pytest.raises(DeviceMissing, match="no CUDA device here: use auto or cpu"):
        artifact.choose_device("cuda")


class Earlier(Pipeline):
    """A pipeline as it was when an artifact had no log_weight."""

    log_weight = None  # type: ignore[assignment] # what an earlier artifact lacks


def test_an_artifact_from_before_log_weight_still_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pipeline("pca")
    earlier = Earlier(model.scaling, model.core, model.prior, model.calibration)
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "METHODS", tuple(name for name in artifact.METHODS if name != "log_weight"))
        module = artifact.script(earlier)
    pairs = artifact.golden(module, *batch())
    assert "log_weight" not in pairs.outputs
    path = artifact.publish(module, manifest("model", artifact.weights_sha256(earlier), pairs), tmp_path)
    loaded = artifact.load(path).module
    assert torch.allclose(loaded(batch()[0]), model(batch()[0]), atol=1e-6)
    assert not hasattr(loaded, "log_weight")


@pytest.mark.parametrize(("kind", "told"), [("pca", True), ("vae-bernoulli", True), ("ae", False)])
def test_golden_answers_tell_log_weights_where_there_is_a_density(kind: str, told: bool) -> None:
    pairs = artifact.golden(artifact.script(pipeline(kind)), *batch())
    assert ("log_weight" in pairs.outputs) is told


def test_golden_rows_may_have_gaps_and_load_fills_them_again(tmp_path: Path) -> None:
    loaded = artifact.load(publish(tmp_path, "pca-imputing"))
    assert loaded.manifest.golden.inputs["x"][2][4] is None
    scaling, rows = pipeline("pca-imputing").scaling, batch(gaps=GAPS)[0]
    assert isinstance(scaling, ImputingScaling)
    filled = torch.where(rows.isnan(), scaling.fill, rows)
    assert torch.equal(loaded.module(rows), loaded.module(filled))
