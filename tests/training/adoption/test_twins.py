"""Networks in forms whose ONNX export would have operators that a twin may not have get a twin all the same."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.artifact import load
from training.adoption.adopt import adopt
from training.adoption.files import read_onnx

pytestmark = pytest.mark.slow


class Chunks(nn.Module):
    """A VAE whose encoder gives the mean and the logarithm of the variance as halves of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.layer(x).chunk(2, dim=-1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        found: Tensor = self.decoder(z)
        return found


class LastState(nn.Module):
    """An autoencoder of windows [N, 3], whose code is the last state of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.writer = nn.LSTM(3, 2, batch_first=True), nn.LSTM(2, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        code = self.reader(x)[1][0].squeeze(0)
        found: Tensor = self.writer(code.unsqueeze(1).repeat(1, x.shape[1], 1))[0]
        return found


def from_onnx(folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(LastState().eval(), (torch.randn(2, 4, 3),), str(folder / "m.onnx"), dynamo=False,
                          input_names=["x"], dynamic_axes={"x": {0: "B"}})  # fmt: skip
    return read_onnx(folder / "m.onnx")


@pytest.mark.parametrize(
    ("build", "shape"), [(lambda _: Chunks(), (6,)), (from_onnx, (4, 3))], ids=["chunk", "squeeze of an ONNX file"]
)
def test_network_gets_a_twin(build: object, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert callable(build)
    rows = np.random.default_rng(0).normal(size=(90, *shape)).astype(np.float32)
    path = adopt(build(tmp_path), rows, name="m", artifacts=tmp_path / "artifacts")
    assert load(path).twin is not None
