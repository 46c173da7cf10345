"""Models of no use: `elbo train` warns about them, and refuses those that are worse than predicting the mean."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import trim_mean

from models.manifest import versions
from tests.commands import in_process, two_factor_rows, write
from training.evaluation.model_selection import significant_wins
from training.evaluation.worth import is_worse, trimmed_mean


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
    arguments: tuple[str, ...] = (
        "train",
        data,
        "--model",
        "ae",
        "--name",
        "m",
        "--epochs",
        "1",
        "--learning-rate",
        "1",
    )
    arguments += ("--artifacts", str(artifacts), "--runs", str(tmp_path / "runs"))
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
    rows = two_factor_rows(1000, 0)
    rows[::10] += 1e4 * np.random.RandomState(1).standard_normal((100, 5))
    arguments: tuple[str, ...] = (
        "train",
        write(tmp_path / "rows.csv", rows),
        "--model",
        "pca",
        "--name",
        "m",
        "--robust",
    )
    arguments += ("--artifacts", str(tmp_path / "artifacts"), "--runs", str(tmp_path / "runs"))
    status, _, error = in_process(capsys, *arguments)
    assert status == 0
    assert "WARNING: the threshold at alpha 0.05" in error
    assert "elbo calibrate" in error
