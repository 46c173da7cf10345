"""Several runs that publish under one name: each keeps its own checkpoint and history."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from models.manifest import read_manifest
from tests.commands import two_factor_rows, write
from tests.data import ROOT
from tests.preloaded import PreloadedProcess
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.table import Table, read_table
from training.fitting.checkpoint import claim
from training.train import train

pytestmark = pytest.mark.slow


class InterruptingReporter(RecordingReporter):
    """Stops the run like Ctrl-C at the end of the fourth epoch."""

    def epoch(self, epoch: int, step: int, terms: Mapping[str, float]) -> None:
        super().epoch(epoch, step, terms)
        if epoch == 4:
            raise KeyboardInterrupt


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return read_table(write(tmp_path / "rows.csv", two_factor_rows(300, seed=0)))


def config(seed: int) -> TrainConfig:
    return TrainConfig(model="ae", name="web", latents=2, hidden=(16,), epochs=8, seed=seed)


def weights(path: Path) -> str:
    return read_manifest(path).weights_sha256


def test_interrupted_run_can_be_resumed_after_another_run_of_the_same_name(table: Table, tmp_path: Path) -> None:
    undisturbed = train(config(seed=1), table, tmp_path / "undisturbed", RecordingReporter(), force=True)
    artifacts, runs = tmp_path / "artifacts", tmp_path / "runs"
    with pytest.raises(KeyboardInterrupt):
        train(config(seed=1), table, artifacts, InterruptingReporter(), force=True, runs=runs, checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        train(config(seed=2), table, artifacts, InterruptingReporter(), force=True, runs=runs, checkpoint_seconds=0)
    for seed in (2, 1):
        resumed = train(config(seed), table, artifacts, RecordingReporter(), force=True, runs=runs, resume=True)
        assert (weights(resumed) == weights(undisturbed)) == (seed == 1)
        lines = (runs / "web" / resumed.parent.name / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 8
    assert sorted(path.name for path in (runs / "web").iterdir()) == ["1", "2"]


def test_run_uses_a_folder_of_its_own_while_another_run_of_the_same_name_trains(table: Table, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with claim(runs / "web") as alone:
        assert alone
        with pytest.raises(KeyboardInterrupt):
            train(
                config(1),
                table,
                tmp_path / "artifacts",
                InterruptingReporter(),
                force=True,
                runs=runs,
                checkpoint_seconds=0,
            )
        (folder,) = (runs / "web").iterdir()
        assert folder.name.startswith("run-")
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "metrics.jsonl"]
    path = train(config(1), table, tmp_path / "artifacts", RecordingReporter(), force=True, runs=runs, resume=True)
    assert [entry.name for entry in (runs / "web").iterdir()] == [path.parent.name]


def test_two_commands_that_train_one_name_at_once_publish_two_versions(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.csv", two_factor_rows(300, seed=0))
    options = (
        f"--name web --model ae --epochs 60 --checkpoint-seconds 0 --calibration split --force "
        f"--artifacts {tmp_path / 'artifacts'}".split()
    )
    commands = [
        [sys.executable, "-m", "elbo", "train", source, *options, "--runs", str(tmp_path / "runs"), "--seed", str(seed)]
        for seed in (1, 2)
    ]
    processes = [PreloadedProcess(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
    manifests = [read_manifest(tmp_path / "artifacts" / "web" / version / "model.pt") for version in "12"]
    assert sorted(manifest.training["seed"] for manifest in manifests) == [1, 2]
    for version in "12":
        lines = (tmp_path / "runs" / "web" / version / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 60
    assert sorted(path.name for path in (tmp_path / "runs" / "web").iterdir()) == ["1", "2"]
