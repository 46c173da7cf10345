"""The models and rows of the serving benchmarks. The code of `elbo train` trains and publishes the models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.artifact import Artifact, load
from models.manifest import resolve
from service.inference.backend_selection import select_backend
from service.inference.backends import Backend
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Table
from training.progress import SilentReporter
from training.train import train

BATCH_SIZES = (1, 32, 256)
FEATURES = 784
FEW_FEATURES = 20  # number of features of the model "hosts"

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Workload:
    """The models that the servers serve, and the rows that the clients send.

    Args:
        folder: temporary folder. Its subfolder `artifacts` is the artifact folder, with the models "vae" and "hosts".
        model: path of the artifact of the model "vae", which all servers serve.
        module: TorchScript module of the model "vae", loaded in this process.
        twin: copy of the model "vae" for ONNX Runtime, loaded in this process.
        rows: inputs x [B, FEATURES], by batch size B.
        outputs: reconstructions [B, FEATURES] that `module` computes from `rows`, by batch size B.
        few_features: one row for the model "hosts", [1, FEW_FEATURES].
    """

    folder: Path
    model: Path
    module: Any
    twin: Backend
    rows: dict[int, Array]
    outputs: dict[int, Array]
    few_features: Array


def create_workload(folder: Path) -> Workload:
    """Train the models for one epoch, and publish them under `folder`.

    One epoch is enough, because the speed of a model does not depend on its weights.
    """
    torch.set_num_threads(1)
    artifacts = folder / "artifacts"
    train_vae(artifacts, "vae", FEATURES, hidden=(400, 400), latents=20)
    train_vae(artifacts, "hosts", FEW_FEATURES, hidden=(64, 32), latents=4)
    return open_workload(folder)


def open_workload(folder: Path) -> Workload:
    """Load the models that `create_workload` published under `folder`, and compute the expected outputs."""
    torch.set_num_threads(1)
    artifacts = folder / "artifacts"
    artifact = load(resolve(artifacts, "vae"))
    module = artifact.module
    _export_twin(artifact, folder)
    rows = {count: _uniform(1, count, FEATURES) for count in BATCH_SIZES}
    with torch.inference_mode():
        outputs = {count: module(torch.from_numpy(x)).numpy() for count, x in rows.items()}
    return Workload(
        folder=folder,
        model=resolve(artifacts, "vae"),
        module=module,
        twin=select_backend(artifact, requested="onnx").backend,
        rows=rows,
        outputs=outputs,
        few_features=_uniform(1, 1, FEW_FEATURES),
    )


def _export_twin(artifact: Artifact, folder: Path) -> None:
    """Write the graph for `reconstruct` and its weights to `folder`, for the servers that do not import torch."""
    assert artifact.twin is not None
    graph = artifact.twin.graphs["reconstruct"]
    (folder / "reconstruct.onnx").write_bytes(graph.onnx)
    weights = {name: artifact.twin.weights[name].contiguous().numpy() for name in graph.weights}
    np.savez(folder / "reconstruct.npz", **weights)  # type: ignore[arg-type] # NumPy's stub has one type for all keywords


def train_vae(artifacts: Path, name: str, features: int, hidden: tuple[int, ...], latents: int, seed: int = 0) -> None:
    """Train a model on uniform noise for one epoch, and publish it as the next version of `name` in `artifacts`."""
    x = _uniform(0, 200, features)
    names = [f"x{index}" for index in range(features)]
    missing = np.zeros(features, np.int64)
    table = Table(RowStore(x), (features,), names, [None] * features, None, None, "uniform noise", missing=missing)
    config = TrainConfig(model="vae", name=name, hidden=hidden, latents=latents, epochs=1, seed=seed)
    train(config, table, artifacts, SilentReporter())


def _uniform(seed: int, rows: int, features: int) -> Array:
    return np.random.RandomState(seed).uniform(size=(rows, features)).astype(np.float32)
