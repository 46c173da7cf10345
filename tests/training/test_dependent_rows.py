"""`elbo train` on rows that are copies of each other or form a time series: false alarms, and warnings."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from models.manifest import read_manifest
from tests.commands import in_process

pytestmark = pytest.mark.slow


def correlated(rows: int, seed: int) -> npt.NDArray[np.float64]:
    """Return independent rows of eight columns that depend on three factors."""
    mixing = np.random.RandomState(5).standard_normal((3, 8))
    random = np.random.RandomState(seed)
    return np.asarray(random.standard_normal((rows, 3)) @ mixing + 0.3 * random.standard_normal((rows, 8)))


def save(path: Path, rows: npt.NDArray[np.float64]) -> str:
    header = ",".join(f"sensor{column}" for column in range(rows.shape[1]))
    np.savetxt(path, rows, delimiter=",", header=header, comments="", fmt="%.7g")
    return str(path)


def train(capsys: pytest.CaptureFixture[str], folder: Path, source: str, kind: str) -> tuple[str, Path]:
    """Train a model with the command. Return standard error and the path of the artifact."""
    options = ["--artifacts", str(folder / "a"), "--runs", str(folder / "runs")]
    fit = ["--calibration", "split", *([] if kind == "pca" else ["--epochs", "10", "--force"])]
    code, _, err = in_process(capsys, "train", source, "--model", kind, "--name", "m", *fit, *options)
    assert code == 0, err
    return err, folder / "a" / "m" / "1" / "model.pt"


def flagged(capsys: pytest.CaptureFixture[str], path: Path, source: str) -> float:
    """Return the share of rows that `elbo score` calls anomalous at alpha 0.05."""
    code, out, err = in_process(capsys, "score", str(path), source, "--format", "csv", "--explain", "0")
    assert code == 0, err
    verdicts = [line.rsplit(",", 1)[1] for line in out.splitlines()[1:]]
    return verdicts.count("1") / len(verdicts)


@pytest.mark.parametrize(("kind", "noise"), [("ensemble", 0.0), ("ensemble", 1e-4), ("ensemble", 0.03), ("pca", 0.0)])
def test_fresh_rows_raise_few_alarms_if_every_training_row_was_saved_four_times(
    kind: str, noise: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = np.tile(correlated(500, 0), (4, 1))
    copied += noise * np.random.RandomState(2).standard_normal(copied.shape)
    err, path = train(capsys, tmp_path, save(tmp_path / "train.csv", copied), kind)
    assert "of the 2,000 rows are distinct" in err
    assert "WARNING" not in err  # copies are no series
    manifest = read_manifest(path)
    assert manifest.calibration.rows == pytest.approx(100, abs=3)
    assert manifest.data.distinct == pytest.approx(500, abs=15)
    assert flagged(capsys, path, save(tmp_path / "fresh.csv", correlated(1000, 1))) < 0.14


def test_training_on_a_time_series_warns_at_the_start_at_the_end_and_in_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.RandomState(0)
    walk = np.cumsum(random.standard_normal((2000, 2)), axis=0) / 10  # the day changes slowly, a row per minute
    day = np.column_stack((np.sin(np.arange(2000) / 200), walk)) + 0.05 * random.standard_normal((2000, 3))
    err, path = train(capsys, tmp_path, save(tmp_path / "room.csv", day), "ensemble")
    lines = err.splitlines()
    warnings = [index for index, line in enumerate(lines) if line.startswith("WARNING: rows that follow each other")]
    assert len(warnings) == 2
    assert warnings[0] < next(index for index, line in enumerate(lines) if line.startswith("trained in")) < warnings[1]
    card = (tmp_path / "runs" / "m" / "1" / "card.md").read_text()
    assert "Rows of other days are not exchangeable" in card
    assert "**The rows that trained it depend on each other: the rank correlation" in card
    assert (read_manifest(path).data.neighbour_correlation or 0) > 0.9


def test_training_on_independent_rows_does_not_warn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err, path = train(capsys, tmp_path, save(tmp_path / "train.csv", correlated(500, 0)), "pca")
    assert "WARNING" not in err
    assert "distinct" not in err
    assert "depend on each other" not in (tmp_path / "runs" / "m" / "1" / "card.md").read_text()
    assert read_manifest(path).data.distinct == 500


def test_recalibration_counts_copies_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(capsys, tmp_path, save(tmp_path / "train.csv", correlated(500, 0)), "pca")
    source = save(tmp_path / "recent.csv", np.repeat(correlated(40, 3), 5, axis=0))
    options = ["--artifacts", str(tmp_path / "a"), "--runs", str(tmp_path / "runs")]
    code, out, err = in_process(capsys, "calibrate", "m", source, *options)
    assert code == 0
    assert "calibrated on 40 rows: the smallest p-value is 0.0244" in out
    assert "only 40 of the 200 rows are distinct" in err
    few = save(tmp_path / "few.csv", np.repeat(correlated(10, 3), 5, axis=0))
    code, _, err = in_process(capsys, "calibrate", "m", few, *options)
    assert code == 2
    assert "has 10 distinct normal rows" in err
