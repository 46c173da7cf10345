"""Model selection for `--model auto`: paired comparison on held-out rows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.manifest import read_manifest
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Table, read_table
from training.evaluation.model_selection import significant_wins, swap_values
from training.evaluation.worth import trimmed_mean
from training.train import train

pytestmark = pytest.mark.slow


def test_significant_wins_contain_only_differences_above_two_standard_errors() -> None:
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0))
    noise = noise - trimmed_mean(noise)[0]  # the trimmed mean is 0
    noise = noise / (20 * trimmed_mean(noise)[1])  # its standard error is 1/20
    wins = significant_wins(
        {"one": {"a": noise + 0.11, "b": noise + 0.09}, "two": {"a": 0 * noise, "b": 0 * noise, "c": noise}}
    )
    assert wins == [("one", "two", "a")]
    assert significant_wins({"one": {"a": 0 * noise}, "two": {"a": noise + 0.11}}) == [("two", "one", "a")]


def test_small_paired_difference_is_significant_if_the_models_share_the_noise() -> None:
    shared = 100 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    better = 0.1 + 0.1 * torch.randn(50, generator=torch.Generator().manual_seed(1))
    assert significant_wins({"one": {"a": shared}, "two": {"a": shared + better}}) == [("two", "one", "a")]


def test_swapping_takes_a_tenth_of_the_values_and_at_least_one_from_the_previous_row() -> None:
    x = torch.arange(50.0).unsqueeze(1).expand(50, 20)
    swapped, previous_row = swap_values(x, seed=0), x.roll(1, dims=0)
    assert ((swapped != x).sum(dim=1) == 2).all()
    assert torch.equal(torch.where(swapped != x, swapped, previous_row), previous_row)
    assert ((swap_values(x[:, :3], seed=0) != x[:, :3]).sum(dim=1) == 1).all()


def table(x: np.ndarray, source: str) -> Table:
    names = [f"x{index}" for index in range(x.shape[1])]
    missing = np.zeros(x.shape[1], np.int64)
    units: list[str | None] = [None] * len(names)
    return Table(
        x=RowStore(x.astype(np.float32)),
        shape=x.shape[1:],
        names=names,
        units=units,
        labels=None,
        pixel_range=None,
        source=source,
        missing=missing,
    )


def line_of(report: RecordingReporter, name: str) -> list[float]:
    """Return the numbers of the line `name` of the table of `--model auto`, one for each kind."""
    (line,) = [note for note in report.notes if note.startswith(f"{name} ")]
    return [float(value) for value in line.split()[1:4]]


@pytest.mark.parametrize("curved", [False, True])
def test_auto_publishes_a_network_on_curved_data_and_pca_on_a_plane(tmp_path: Path, curved: bool) -> None:
    """PCA describes a plane well. One latent of a network can follow the curve, but one latent of PCA cannot."""
    random = np.random.RandomState(0)
    t = random.uniform(-1, 1, (1500, 2))
    factors = (
        np.stack([np.sin(2.5 * t[:, 0]), np.cos(2.5 * t[:, 0])], axis=1)
        if curved
        else random.standard_normal((1500, 2))
    )
    x = factors @ random.standard_normal((2, 8)) + 0.05 * random.standard_normal((1500, 8))
    report = RecordingReporter()
    config = TrainConfig(model="auto", name="m", latents=1 if curved else 2, hidden=(32, 32), epochs=60)
    path = train(config, table(x, "synthetic rows"), tmp_path, report, runs=tmp_path / "runs")
    manifest = read_manifest(path)
    assert (manifest.kind == "pca") is not curved
    assert set(manifest.comparison) == {"pca", "ae", "vae"}
    assert any(note.startswith(f"publishing {manifest.kind}: ") for note in report.notes)
    errors = {kind: measures["reconstruction_error"] for kind, measures in manifest.comparison.items()}
    assert (min(errors.values()) < 0.7 * errors["pca"]) is curved
    compared = dict(zip(manifest.comparison, line_of(report, "reconstruction_error"), strict=True))
    assert (min(compared.values()) < 0.7 * compared["pca"]) is curved
    assert len(set(compared.values())) == 3
    assert not list((tmp_path / "runs").rglob("checkpoint.pt"))


def test_auto_gives_the_same_weights_and_metrics_as_training_the_chosen_kind_alone(tmp_path: Path) -> None:
    config = TrainConfig(model="auto", name="m", epochs=3)
    auto = read_manifest(train(config, read_table("digits"), tmp_path, RecordingReporter()))
    alone = read_manifest(
        train(config.model_copy(update={"model": auto.kind}), read_table("digits"), tmp_path, RecordingReporter())
    )
    assert auto.weights_sha256 == alone.weights_sha256
    assert auto.metrics == alone.metrics
