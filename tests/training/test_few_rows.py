"""`elbo train` on few rows: below the smallest possible p-value, no row is called anomalous unless asked."""

import json
from pathlib import Path

import numpy as np
import pytest

from models.manifest import CalibrationSize
from tests.commands import in_process, two_factor_rows, write

pytestmark = [pytest.mark.slow, pytest.mark.plots]

SPLIT = ["--calibration", "split"]
ROWS = 30  # 6 calibration rows: the smallest possible p-value is 1 / 7


@pytest.mark.parametrize("rows", [10, ROWS, 92])
def test_training_on_too_few_rows_for_alpha_warns_and_names_the_number_of_rows(
    rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "a.csv", two_factor_rows(rows, seed=0))
    options = ["--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs")]
    code, _, err = in_process(
        capsys, "train", data, "--model", "pca", "--name", "m", "--latents", "2", *options, *SPLIT
    )
    assert code == 0
    assert "WARNING: no row is called anomalous at alpha 0.05: the smallest possible p-value is" in err
    assert "Train on at least 95 distinct rows" in err
    assert (
        "**WARNING: no row is called anomalous at alpha 0.05" in (tmp_path / "runs" / "m" / "1" / "card.md").read_text()
    )
    fresh = two_factor_rows(200, seed=1)
    fresh[:5] += 100
    source = write(tmp_path / "fresh.csv", fresh)
    _, out, err = in_process(capsys, "score", "m", source, "--artifacts", str(tmp_path))
    verdicts = [json.loads(line) for line in out.splitlines()]
    assert not any(verdict["is_anomaly"] or verdict["severity"] > 1 for verdict in verdicts)
    assert err.startswith("WARNING: no row is called anomalous at alpha 0.05")
    _, out, err = in_process(capsys, "score", "m", source, "--artifacts", str(tmp_path), "--extrapolated")
    assert all(json.loads(line)["is_anomaly"] for line in out.splitlines()[:5])
    assert err == ""
    _, out, _ = in_process(capsys, "evaluate", "m", source, "--artifacts", str(tmp_path), "--json")
    rates = json.loads(out)["alarm_rates"]
    assert rates["0.05"] == 0


def test_training_on_enough_rows_for_alpha_does_not_warn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "a.csv", two_factor_rows(95, seed=0))
    options = ["--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs")]
    code, _, err = in_process(
        capsys, "train", data, "--model", "pca", "--name", "m", "--latents", "2", *options, *SPLIT
    )
    assert code == 0
    assert "WARNING" not in err


@pytest.mark.parametrize("rows", [1, 19, 99, 199, 359])
def test_calibration_reaches_an_alpha_equal_to_its_smallest_p_value_in_spite_of_rounding(rows: int) -> None:
    size = CalibrationSize(rows=rows, floor=1.0 / (rows + 1))
    assert size.reaches(1 / (rows + 1))
    assert size.reaches(float(np.nextafter(1 / (rows + 1), 0)))
    assert not size.reaches(0.999 / (rows + 1))
