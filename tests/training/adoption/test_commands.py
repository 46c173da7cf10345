"""The commands of `elbo` work on adopted models as on others."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models.manifest import read_manifest
from tests.commands import in_process, succeed
from training.adoption.adopt import adopt

pytestmark = pytest.mark.slow
NAMES = ["load", "temperature", "current", "voltage"]


def rows(count: int, seed: int) -> np.ndarray:
    """Return rows [count, 4] near a plane."""
    random = np.random.default_rng(seed)
    factors = random.normal(size=(count, 2)) @ np.array([[1.0, 2.0, 0.5, 1.0], [0.0, 1.0, 1.0, -1.0]])
    return np.asarray(factors + 0.1 * random.normal(size=(count, 4)), np.float32)


class Projection(nn.Module):
    """The projection onto the plane of the rows, which needs no training."""

    def __init__(self) -> None:
        super().__init__()
        directions = np.linalg.svd(rows(2_000, 0))[2][:2].astype(np.float32)
        self.encoder, self.decoder = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        with torch.no_grad():
            self.encoder.weight.copy_(torch.from_numpy(directions))
            self.decoder.weight.copy_(torch.from_numpy(directions.T))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.decoder(self.encoder(x))
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the artifacts plane and without (which only reconstructs), and tables."""
    root = tmp_path_factory.mktemp("adopted")
    module = Projection()
    for name, network in (("plane", module), ("without", nn.Sequential(module.encoder, module.decoder))):
        adopt(network, rows(900, 1), name=name, artifacts=root / "artifacts", feature_names=NAMES)
    header = ",".join(NAMES)
    np.savetxt(root / "new.csv", rows(1_000, 2), delimiter=",", header=header, comments="")
    anomalous = rows(200, 4)
    anomalous[:, 2] += 3.0
    labelled = np.c_[np.r_[rows(1_000, 3), anomalous], np.r_[np.zeros(1_000), np.ones(200)]]
    formats = [*["%.7g"] * 4, "%d"]
    np.savetxt(root / "labelled.csv", labelled, delimiter=",", header=f"{header},label", comments="", fmt=formats)
    return root


@pytest.mark.parametrize("name", ["plane", "without"])
def test_inspect_says_that_the_network_was_adopted(folder: Path, name: str) -> None:
    text = succeed("inspect", name, "--artifacts", f"{folder}/artifacts").stdout
    assert "adopted network" in text
    assert "trained elsewhere" in text
    assert ("only reconstructs and scores rows" in text) == (name == "without")


@pytest.mark.parametrize("name", ["plane", "without"])
def test_score_gives_a_p_value_for_each_row(folder: Path, name: str) -> None:
    lines = succeed("score", name, f"{folder}/new.csv", "--artifacts", f"{folder}/artifacts").stdout.splitlines()
    verdicts = [json.loads(line) for line in lines]
    assert len(verdicts) == 1_000
    assert 20 <= sum(verdict["is_anomaly"] for verdict in verdicts) <= 90


@pytest.mark.parametrize("name", ["plane", "without"])
def test_evaluate_finds_the_labelled_anomalies(folder: Path, name: str) -> None:
    text = succeed("evaluate", name, f"{folder}/labelled.csv", "--artifacts", f"{folder}/artifacts").stdout
    (line,) = (line for line in text.splitlines() if line.startswith("AUROC"))
    assert float(line.split()[1]) > 0.99


@pytest.mark.parametrize("name", ["plane", "without"])
def test_calibrate_publishes_the_same_network_with_new_scores(folder: Path, name: str, tmp_path: Path) -> None:
    root = folder / "artifacts"
    succeed("calibrate", name, f"{folder}/new.csv", "--artifacts", str(root), "--runs", str(tmp_path))
    newest = max(int(path.name) for path in (root / name).iterdir() if path.name.isdigit())
    manifest = read_manifest(root / name / str(newest) / "model.pt")
    assert manifest.calibration.rows == 1_000
    assert manifest.recalibration is not None
    assert manifest.adoption is not None
    card = next(tmp_path.rglob("card.md")).read_text()
    assert f"elbo calibrate {name}@1" in card
    assert "it was trained elsewhere" in card


def test_directions_are_refused_for_a_model_without_latents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = in_process(
        capsys, "directions", "without", f"{folder}/labelled.csv", "--artifacts", f"{folder}/artifacts"
    )
    assert status == 2
    assert "was adopted without an encoder and a decoder" in error
