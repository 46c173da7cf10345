"""`elbo train` on tables in which a column has almost no value: no seed and no kind ends in a traceback."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest

from models.manifest import read_manifest
from tests.commands import in_process
from training.config import EVERY_KIND

pytestmark = [pytest.mark.slow, pytest.mark.plots]


def write_sparse(path: Path, values: int, rows: int = 200) -> str:
    """Write four columns, of which the third has only `values` values, in the middle of the file."""
    x = np.random.RandomState(0).standard_normal((rows, 4))
    lines = ["a,b,c,d"]
    for row, (a, b, c, d) in enumerate(x):
        lines.append(f"{a},{b},{c if rows // 2 <= row < rows // 2 + values else ''},{d}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "values", "seed"),
    [*((kind, 1, 2) for kind in EVERY_KIND), *(("pca", values, seed) for values in (1, 2, 5) for seed in range(4))],
)
def test_training_on_a_nearly_empty_column_publishes_a_model_without_numpy_warnings(
    kind: str, values: int, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_sparse(tmp_path / "a.csv", values)
    options = ["--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs"), "--seed", str(seed)]
    epochs = [] if kind == "pca" else ["--epochs", "3", "--force"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        code, _, err = in_process(capsys, "train", data, "--model", kind, "--name", "m", *epochs, *options)
    assert code == 0, err
    assert "WARNING: fewer than 10 rows have a value in c: a model cannot learn from so few, add --drop c" in err
    assert "RuntimeWarning" not in err
    feature = read_manifest(tmp_path / "m" / "1" / "model.pt").features[2]
    assert math.isfinite(feature.median)
    assert feature.missing == 200 - values
    code, out, err = in_process(capsys, "score", "m", data, "--artifacts", str(tmp_path))
    assert code == 0, err
    assert all(math.isfinite(json.loads(line)["score"]) for line in out.splitlines())


def test_training_with_a_cell_near_the_largest_float32_publishes_a_model_without_numpy_warnings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{a},{b}" for a, b in np.random.RandomState(0).standard_normal((200, 2))]
    lines[5] = "1e38,0"
    (tmp_path / "a.csv").write_text("\n".join(["a,b", *lines]) + "\n")
    options = ["--artifacts", str(tmp_path), "--runs", str(tmp_path / "runs"), "--force"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        code, _, err = in_process(capsys, "train", str(tmp_path / "a.csv"), "--model", "pca", "--name", "m", *options)
    assert code == 0, err
