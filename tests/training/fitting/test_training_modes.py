"""Training from disk, with convolutions, in bfloat16 and with torch.compile gives good models."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from models.artifact import load
from models.manifest import Manifest, read_manifest
from tests.commands import command, succeed
from tests.conftest import require
from tests.data import ROOT
from tests.preloaded import PreloadedProcess
from tests.training.reporters import RecordingReporter
from tests.training.waiting import wait_until_newer
from training.config import TrainConfig
from training.data.table import Table, read_table
from training.fitting.checkpoint import FILE_NAME
from training.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of an .npy file with the digits as bytes."""
    path = tmp_path_factory.mktemp("data") / "digits.npy"
    values = read_table("digits").x.read_range(0, 1797) * 255
    np.save(path, values.reshape(-1, 8, 8).round().astype(np.uint8))
    return path


def read_on_disk(path: Path) -> Table:
    table = read_table(str(path), limit=0)
    assert table.x.on_disk
    return table


def trained(table: Table, root: Path, **options: object) -> Manifest:
    """Train a model and return its manifest. Loading the model verifies its golden answers."""
    config = TrainConfig.model_validate({"name": "m", "epochs": 20, "latents": 8} | options)
    path = train(config, table, root, RecordingReporter())
    load(path)
    return read_manifest(path)


@pytest.mark.parametrize("scale", ["standardise", "none"])
def test_pca_trained_from_disk_equals_pca_trained_from_memory(digits_file: Path, tmp_path: Path, scale: str) -> None:
    disk = trained(read_on_disk(digits_file), tmp_path / "disk", model="pca", scale=scale)
    memory = trained(read_table(str(digits_file)), tmp_path / "memory", model="pca", scale=scale)
    assert disk.weights_sha256 == memory.weights_sha256
    assert disk.metrics == memory.metrics
    assert disk.features == memory.features


@pytest.mark.parametrize("model", ["ae", "vae"])
def test_networks_trained_from_disk_and_from_memory_reconstruct_equally_well(
    digits_file: Path, tmp_path: Path, model: str
) -> None:
    options = {"model": model, "batch_size": 32, "learning_rate": 3e-3}
    disk = trained(read_on_disk(digits_file), tmp_path / "disk", **options).metrics
    memory = trained(read_table(str(digits_file)), tmp_path / "memory", **options).metrics
    assert disk["reconstruction_error"] == pytest.approx(memory["reconstruction_error"], rel=0.1)
    assert disk["reconstruction_error"] < 0.5 * disk["baseline_error"]


TRAIN_FROM_DISK = """
import sys
from pathlib import Path
from training.config import TrainConfig
from training.data.table import read_table
from training.progress import SilentReporter
from training.train import train

table, root, config = read_table(sys.argv[1], limit=0), Path(sys.argv[2]), TrainConfig.model_validate_json(sys.argv[3])
train(config, table, root, SilentReporter(), runs=root / "runs", checkpoint_seconds=0.0)
"""


def test_training_from_disk_gives_the_same_weights_if_it_is_killed_and_resumed(
    digits_file: Path, tmp_path: Path
) -> None:
    config = TrainConfig(model="ae", name="m", epochs=25, hidden=(32,), latents=4, noise=0.2)
    arguments = [str(digits_file), str(tmp_path / "killed"), config.model_dump_json()]
    process = PreloadedProcess([sys.executable, "-c", TRAIN_FROM_DISK, *arguments], cwd=ROOT)
    wait_until_newer(tmp_path / "killed" / "runs" / "m" / FILE_NAME, 0, process)
    process.kill()
    process.wait()
    table = read_on_disk(digits_file)
    train(config, table, tmp_path / "killed", RecordingReporter(), runs=tmp_path / "killed" / "runs", resume=True)
    train(config, table, tmp_path / "whole", RecordingReporter())
    killed, whole = (read_manifest(tmp_path / name / "m" / "1" / "model.pt") for name in ("killed", "whole"))
    assert killed.weights_sha256 == whole.weights_sha256


@pytest.mark.parametrize("model", ["ae", "vae"])
def test_convolutional_network_reconstructs_digits_better_than_pca(tmp_path: Path, model: str) -> None:
    options = {"network": "conv", "hidden": (16, 32), "epochs": 15, "batch_size": 32, "learning_rate": 5e-3}
    metrics = trained(read_table("digits"), tmp_path, model=model, **options).metrics
    assert metrics["reconstruction_error"] < metrics["pca_error"]


@pytest.mark.parametrize("model", ["ae", "vae"])
def test_bfloat16_training_changes_the_reconstruction_error_by_at_most_10_percent(tmp_path: Path, model: str) -> None:
    bf16 = trained(read_table("digits"), tmp_path / "bf16", model=model, epochs=8, precision="bf16")
    float32 = trained(read_table("digits"), tmp_path / "float32", model=model, epochs=8)
    assert bf16.weights_sha256 != float32.weights_sha256
    assert bf16.metrics["reconstruction_error"] == pytest.approx(float32.metrics["reconstruction_error"], rel=0.1)


def test_outputs_do_not_depend_on_whether_the_network_was_compiled_for_training(tmp_path: Path) -> None:
    require(shutil.which("c++") or shutil.which("g++"), "torch.compile needs a C++ compiler")
    options = ["--model", "ae", "--name", "m", "--epochs", "2", "--force"]
    options += ["--hidden", "8", "--latents", "4", "--batch-size", "629"]
    runs = ["--runs", str(tmp_path / "runs")]
    succeed("train", "digits", *options, "--artifacts", str(tmp_path / "plain"), *runs)
    compiled = command(
        "train", "digits", *options, "--compile", "--artifacts", str(tmp_path / "compiled"), *runs,
        environment={"TORCHINDUCTOR_COMPILE_THREADS": "1"},  # starts no processes, which would import torch
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stderr
    rows = torch.from_numpy(np.random.RandomState(0).uniform(size=(50, 64)).astype(np.float32))
    outputs = [load(tmp_path / name / "m" / "1" / "model.pt").module(rows) for name in ("plain", "compiled")]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
