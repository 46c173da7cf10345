"""Models of no use: `elbo train` warns about them, and refuses those that are worse than predicting the mean."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean

from models.manifest import read_manifest, versions
from service.app import create_app
from service.settings import Settings
from tests.commands import Rows, in_process, two_factor_rows, write
from tests.service.running import running
from training.evaluation.model_selection import significant_wins
from training.evaluation.worth import is_worse, trimmed_mean

WORSE_THAN_PCA = "warning: the model reconstructs held-out rows worse than PCA with as many latents"
HIGH_THRESHOLD = "WARNING: the threshold at alpha 0.05"


def rows_with_anomalies(rows: int, seed: int) -> Rows:
    """Return random rows, of which a tenth is far from the others."""
    x = two_factor_rows(rows, seed)
    x[::10] += 1e4 * np.random.RandomState(seed).standard_normal((len(x[::10]), 5))
    return x


def warnings_of(root: Path, version: int) -> list[str]:
    """Return the first 30 characters of each warning in the manifest of the given version of m."""
    return [warning[:30] for warning in read_manifest(root / "m" / str(version) / "model.pt").warnings]


def test_trimmed_mean_equals_that_of_scipy_and_ignores_an_extreme_value() -> None:
    values = np.random.RandomState(0).standard_normal(200)
    extreme = np.append(values[:-1], 1e12)
    assert trimmed_mean(torch.from_numpy(values))[0] == pytest.approx(trim_mean(values, 0.1))
    assert trimmed_mean(torch.from_numpy(extreme))[0] == pytest.approx(trim_mean(values, 0.1), abs=0.05)
    assert trimmed_mean(torch.from_numpy(values))[1] == pytest.approx(1 / np.sqrt(200), rel=0.2)


def test_difference_between_models_counts_although_one_row_outweighs_all_others() -> None:
    better, worse = torch.full((200,), -0.1), torch.full((200,), -0.2)
    better += 0.01 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    better[0], worse[0] = -1e6, -0.9e6
    assert significant_wins({"a": {"reconstruction_error": better}, "b": {"reconstruction_error": worse}}) == [
        ("a", "b", "reconstruction_error")
    ]
    assert is_worse(-worse, -better)


@pytest.mark.slow
def test_train_command_refuses_a_model_that_is_worse_than_the_mean_unless_force_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.csv", two_factor_rows(400, 0))
    artifacts = tmp_path / "artifacts"
    arguments = ["train", data, "--model", "ae", "--name", "m", "--epochs", "1", "--learning-rate", "1"]
    arguments += ["--artifacts", str(artifacts), "--runs", str(tmp_path / "runs")]
    status, _, error = in_process(capsys, *arguments)
    assert status == 1
    assert "worse than predicting the mean" in error
    assert "--force" in error
    assert versions(artifacts, "m") == []
    status, _, error = in_process(capsys, *arguments, "--force")
    assert status == 0
    assert "WARNING: the model reconstructs held-out rows worse than predicting the mean" in error
    assert "worse than predicting the mean" in (tmp_path / "runs" / "m" / "1" / "card.md").read_text()


@pytest.mark.slow
def test_train_command_warns_if_anomalies_among_the_calibration_rows_raise_the_threshold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_with_anomalies(1000, 0)
    arguments = ["train", write(tmp_path / "rows.csv", rows), "--model", "pca", "--name", "m", "--robust"]
    arguments += ["--artifacts", str(tmp_path / "artifacts"), "--runs", str(tmp_path / "runs")]
    status, _, error = in_process(capsys, *arguments)
    assert status == 0
    assert "WARNING: the threshold at alpha 0.05" in error
    assert "elbo calibrate" in error


@pytest.mark.slow
def test_warning_about_a_model_worse_than_pca_is_in_every_description_and_survives_recalibration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, runs = tmp_path / "artifacts", tmp_path / "runs"
    folders = ("--artifacts", str(root), "--runs", str(runs))
    data = write(tmp_path / "rows.csv", two_factor_rows(400, 0))  # two factors, so PCA with two latents fits them
    too_few_epochs = ("--latents", "2", "--noise", "0", "--epochs", "5")
    status, _, error = in_process(capsys, "train", data, "--model", "ae", "--name", "m", *too_few_epochs, *folders)
    assert status == 0
    assert WORSE_THAN_PCA in error
    status, _, _ = in_process(capsys, "train", data, "--model", "pca", "--name", "fine", "--latents", "2", *folders)
    assert status == 0

    spoilt = write(tmp_path / "spoilt.csv", rows_with_anomalies(400, 1))
    status, _, error = in_process(capsys, "calibrate", "m", spoilt, *folders)
    assert status == 0
    assert HIGH_THRESHOLD in error
    status, _, error = in_process(
        capsys, "calibrate", "m", write(tmp_path / "new.csv", two_factor_rows(400, 2)), *folders
    )
    assert status == 0
    assert HIGH_THRESHOLD not in error

    about_pca, about_threshold = WORSE_THAN_PCA[:30], HIGH_THRESHOLD[:30]
    assert [warnings_of(root, version) for version in (1, 2, 3)] == [
        [about_pca],
        [about_pca, about_threshold],
        [about_pca],
    ]
    for version, with_threshold in ((1, 0), (2, 1), (3, 0)):
        card = (runs / "m" / str(version) / "card.md").read_text()
        assert card.count(WORSE_THAN_PCA) == 1
        assert card.count(HIGH_THRESHOLD) == with_threshold
    _, description, _ = in_process(capsys, "inspect", "m@2", "--artifacts", str(root))
    labels = [line.split("  ")[0] for line in description.splitlines()]
    assert {"warning", "WARNING"} <= set(labels)
    with running(create_app(Settings(artifacts=root, log_level="error", backend="torchscript"))) as client:
        listed = {f"{m['name']}@{m['version']}": m["warnings"] for m in client.get("/models").json()["models"]}
        one = client.get("/models/m").json()["warnings"]
    assert listed["fine@1"] == []
    assert listed["m@3"] == one == read_manifest(root / "m" / "3" / "model.pt").warnings


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "is_warned"), [("0.05", False), ("0.01", True)])
def test_calibrate_command_checks_the_threshold_at_the_given_alpha(
    alpha: str, is_warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = ("--artifacts", str(tmp_path / "artifacts"), "--runs", str(tmp_path / "runs"))
    data = write(tmp_path / "rows.csv", two_factor_rows(400, 0))
    status, _, _ = in_process(capsys, "train", data, "--model", "pca", "--name", "m", *folders)
    assert status == 0
    rows = two_factor_rows(1000, 1)
    rows[::40] += 1e4 * np.random.RandomState(1).standard_normal((25, 5))  # 2.5 % of the rows
    status, _, error = in_process(
        capsys, "calibrate", "m", write(tmp_path / "new.csv", rows), "--alpha", alpha, *folders
    )
    assert status == 0
    assert (f"WARNING: the threshold at alpha {alpha} is" in error) == is_warned
