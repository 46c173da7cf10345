"""What the serving benchmark serves and sends: two models, published as Elbo publishes, and rows with their answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.artifact import load
from models.manifest import resolve
from service.inference.backend_selection import select_backend
from service.inference.backends import Backend
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Table
from training.progress import SilentReporter
from training.train import train

ROWS = (1, 32, 256)
FEATURES = 784
FEW = 20  # features of the second model, of which /anomaly names five

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Stage:
    """Where the artifacts are, and what the first model answers in this process."""

    folder: Path
    model: Path  # the file that all serve
    module: Any
    twin: Backend  # the same network in ONNX Runtime
    rows: dict[int, Array]  # x [B, D] by B
    answers: dict[int, Array]  # x_hat [B, D] by B
    few: Array  # a row of the second model, [1, FEW]


def stage_in(folder: Path) -> Stage:
    """Publish the models under `folder`. One epoch each: how fast a network is does not depend on its weights."""
    torch.set_num_threads(1)
    artifacts = folder / "artifacts"
    _publish(artifacts, "vae", FEATURES, (400, 400), 20)
    _publish(artifacts, "hosts", FEW, (64, 32), 4)
    artifact = load(resolve(artifacts, "vae"))
    module = artifact.module
    rows = {count: _noise(1, count, FEATURES) for count in ROWS}
    with torch.inference_mode():
        answers = {count: module(torch.from_numpy(x)).numpy() for count, x in rows.items()}
    twin = select_backend(artifact, requested="onnx").backend
    return Stage(folder, resolve(artifacts, "vae"), module, twin, rows, answers, _noise(1, 1, FEW))


def _publish(artifacts: Path, name: str, features: int, hidden: tuple[int, ...], latents: int) -> None:
    x = _noise(0, 200, features)
    names = [f"x{index}" for index in range(features)]
    missing = np.zeros(features, np.int64)
    table = Table(RowStore(x), (features,), names, [None] * features, None, None, "uniform noise", missing=missing)
    config = TrainConfig(model="vae", name=name, hidden=hidden, latents=latents, epochs=1)
    train(config, table, artifacts, SilentReporter())


def _noise(seed: int, rows: int, features: int) -> Array:
    return np.random.RandomState(seed).uniform(size=(rows, features)).astype(np.float32)
