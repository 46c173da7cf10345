"""`elbo calibrate` refuses rows that trained the model, and a table whose rows are all flagged."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from models.artifact import load, read_trained_rows
from tests.commands import in_process, two_factor_rows, write
from training.data.row_fingerprints import find_known_rows, make_sketch
from training.data.row_store import RowStore

Rows = npt.NDArray[np.float64]
TRAINING = two_factor_rows(600, seed=0)
FRESH = two_factor_rows(300, seed=1)


def train(capsys: pytest.CaptureFixture[str], folder: Path, *options: str, rows: Rows = TRAINING) -> list[str]:
    """Train m@1, and return the options that name its folders."""
    folders = ["--artifacts", str(folder), "--runs", str(folder / "runs")]
    data = write(folder / "train.csv", rows)
    code, _, err = in_process(
        capsys, "train", data, "--model", "pca", "--name", "m", "--latents", "2", *options, *folders
    )
    assert code == 0, err
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choose", "digits"),
    [
        (lambda x: x[::-1], 9),
        (lambda x: np.random.RandomState(0).permutation(x), 9),
        (lambda x: x[:200], 9),
        (lambda x: x[::7], 9),
        (lambda x: x[100:120], 9),
        (lambda x: np.vstack((x[:100], FRESH[:100])), 9),  # half of the rows are new
        (lambda x: np.repeat(x[:50], 4, axis=0), 9),
        (lambda x: x, 6),  # saved again with fewer digits
    ],
)
def test_calibrate_refuses_training_rows_even_if_they_are_reordered_or_only_a_part(
    choose: Callable[[Rows], Rows], digits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = train(capsys, tmp_path)
    source = tmp_path / "again.csv"
    header = "cpu [%],memory [GB],disk,network,errors"
    np.savetxt(source, choose(TRAINING), delimiter=",", header=header, comments="", fmt=f"%.{digits}g")
    code, _, err = in_process(capsys, "calibrate", "m", str(source), *folders)
    assert code == 2
    assert "that m@1 was trained on, and scores of training rows are too low" in err
    assert not (tmp_path / "m" / "2").exists()


@pytest.mark.slow
def test_calibrate_keeps_the_hashes_so_that_the_next_version_refuses_the_training_rows_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = train(capsys, tmp_path)
    code, _, err = in_process(capsys, "calibrate", "m", write(tmp_path / "fresh.csv", FRESH), *folders)
    assert code == 0, err
    assert "equal rows that trained the model" not in err
    code, _, err = in_process(capsys, "calibrate", "m@2", write(tmp_path / "part.csv", TRAINING[:300]), *folders)
    assert code == 2
    assert "that m@2 was trained on" in err


@pytest.mark.slow
def test_calibrate_accepts_new_rows_that_equal_training_rows_by_chance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def counts(seed: int) -> Rows:
        return np.asarray(np.random.RandomState(seed).poisson(0.8, (600, 5)), float)

    folders = train(capsys, tmp_path, rows=counts(0))
    code, _, err = in_process(capsys, "calibrate", "m", write(tmp_path / "fresh.csv", counts(1)), *folders)
    assert code == 0, err


@pytest.mark.slow
def test_private_artifact_contains_no_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(capsys, tmp_path, "--private")
    assert read_trained_rows(load(tmp_path / "m" / "1" / "model.pt")) is None


@pytest.mark.slow
def test_calibrate_refuses_rows_if_all_are_flagged_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = train(capsys, tmp_path)
    source = write(tmp_path / "scaled.csv", 1000 * FRESH)
    code, _, err = in_process(capsys, "calibrate", "m", source, *folders)
    assert code == 2
    assert f"m@1 flags all rows of {source} at alpha 0.05" in err
    assert not (tmp_path / "m" / "2").exists()
    code, _, err = in_process(capsys, "calibrate", "m", source, "--force", *folders)
    assert code == 0
    assert "m@1 flags 100 % of the rows" in err


def test_sketch_of_a_large_table_estimates_the_share_of_known_rows() -> None:
    x = np.random.RandomState(0).standard_normal((100_000, 4)).astype(np.float32)
    sketch = make_sketch(RowStore(x), np.arange(80_000))
    assert len(sketch) == 16 + 8 * 16_384
    mixed = RowStore(np.vstack((x[:3000], np.random.RandomState(1).standard_normal((7000, 4)).astype(np.float32))))
    known = find_known_rows(sketch, mixed, np.arange(10_000))
    assert known.share == pytest.approx(0.3, abs=0.06)  # about 2,000 rows are in the sample
    assert known.significant
    new = find_known_rows(sketch, mixed, np.arange(3000, 10_000))
    assert (new.share, new.significant) == (0.0, False)
