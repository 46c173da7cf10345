"""Cross-conformal calibration: every row calibrates, scored by a model that was fitted without it."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.covariance import ledoit_wolf

from models.artifact import load
from models.manifest import read_manifest
from models.policy_rules import FeatureRule, Policy
from tests.commands import in_process, two_factor_rows, write
from tests.data import ROOT
from tests.preloaded import PreloadedProcess
from tests.training.waiting import wait_until_newer
from training.config import TrainConfig
from training.data.cross_split import CrossSplit, cross_split
from training.data.table import DataError, Table, read_table
from training.fitting.cross_calibration import fit_and_calibrate, with_calibration
from training.fitting.windows import prepare
from training.progress import SilentReporter
from training.reports.model_card import command_of
from training.train import train

Rows = npt.NDArray[np.float64]


def gaussian(rows: int, seed: int = 0, width: int = 4) -> Rows:
    """Return `rows` correlated Gaussian rows."""
    random = np.random.RandomState(seed)
    mixing = np.random.RandomState(99).standard_normal((width, width))
    return random.standard_normal((rows, width)) @ mixing + 5.0


def table_of(path: Path, x: npt.NDArray[Any]) -> Table:
    np.save(path / "rows.npy", x)
    return read_table(str(path / "rows.npy"))


def options(kind: str = "pca", **others: Any) -> TrainConfig:
    return TrainConfig.model_validate({"model": kind, "name": "m", "calibration": "cross", **others})


@pytest.mark.parametrize("seed", [0, 1])
def test_each_distinct_row_calibrates_in_one_fold_that_fits_none_of_its_copies(tmp_path: Path, seed: int) -> None:
    x = gaussian(60)
    table = table_of(tmp_path, np.concatenate((x, x[:7], x[:3])))
    split = cross_split(len(table.x), seed, 4, table.copies)
    folds = split.folds(5)
    assert sorted(np.concatenate([fold.calibration for fold in folds])) == list(range(60))
    groups = table.copies.groups
    for fold in [split, *folds]:
        assert not set(groups[fold.fit]) & set(groups[fold.held_out])
    for fold in folds:
        assert not set(groups[fold.calibration]) & set(groups[np.concatenate((fold.fit, fold.held_out))])
        seen = set(groups[np.concatenate((fold.fit, fold.held_out, fold.calibration))])
        assert seen == set(range(60))
    assert len(split.held_out) == 6
    assert len(split.fit) + len(split.held_out) >= 60


def test_cross_split_of_more_rows_than_memory_holds_is_refused() -> None:
    with pytest.raises(DataError, match=r"at most 1,365 distinct rows of 12,288 values, got 2,000"):
        cross_split(2000, 0, 12_288)


def test_calibration_scores_of_pca_equal_those_of_numpy_by_hand(tmp_path: Path) -> None:
    x = gaussian(30).astype(np.float32)
    table, config = table_of(tmp_path, x), options(seed=3)
    data, _ = prepare(config, table)
    pipeline = fit_and_calibrate(config, data, SilentReporter())
    split = data.split
    assert isinstance(split, CrossSplit)
    expected = []
    for fold in split.folds(20):
        fit, seen = x[fold.fit].astype(float), x[np.concatenate((fold.fit, fold.held_out))].astype(float)
        shift, scale = fit.mean(axis=0), fit.std(axis=0)
        u, new = (seen - shift) / scale, (x[fold.calibration] - shift) / scale
        usual = u.var(axis=0).mean()
        deviation = np.sqrt((len(u) * u.var(axis=0) + 3 * usual) / (len(u) + 3))
        correlation = ledoit_wolf((u - u.mean(axis=0)) / deviation, assume_centered=True)[0]
        np.fill_diagonal(correlation, np.maximum(np.diag(correlation), 1.0))
        inverse = np.linalg.inv(correlation * np.outer(deviation, deviation))
        centred = new - u.mean(axis=0)
        expected += np.einsum("nd,de,ne->n", centred, inverse, centred).tolist()
    assert len(expected) == 30
    np.testing.assert_allclose(pipeline.calibration.scores.numpy(), np.sort(expected), rtol=1e-4, atol=1e-4)


def test_score_of_pca_uses_all_rows(tmp_path: Path) -> None:
    x = gaussian(30)
    config = options()
    data, _ = prepare(config, table_of(tmp_path, x))
    pipeline = fit_and_calibrate(config, data, SilentReporter())
    u = pipeline.scaling(torch.from_numpy(x.astype(np.float32))).double()
    mean = dict(pipeline.core.named_buffers())["whitening.mean"]
    np.testing.assert_allclose(mean.numpy(), u.mean(dim=0).numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", ["vae", "ensemble"])
@pytest.mark.slow
def test_extreme_row_changes_no_other_score_of_its_fold(tmp_path: Path, kind: str) -> None:
    x = gaussian(40).astype(np.float32)
    config = options(kind, epochs=2)
    data, _ = prepare(config, table_of(tmp_path, x))
    assert isinstance(data.split, CrossSplit)
    fold = data.split.folds(5)[2]
    scores = fit_and_calibrate(config, data, SilentReporter()).calibration.scores
    changed = x.copy()
    changed[fold.calibration[0]] = 1e4
    other, _ = prepare(config, table_of(tmp_path, changed))
    new = fit_and_calibrate(config, other, SilentReporter()).calibration.scores
    # The calibration rounds scores up: see `ROUNDING` there.
    is_kept = torch.isclose(scores.unsqueeze(1), new, rtol=1e-3).any(dim=1)
    assert len(fold.calibration) - 1 <= int(is_kept.sum()) <= len(x) / 2
    assert float(new[-1]) > 100 * float(scores[-1])


def run(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> tuple[str, str]:
    """Run a command with the artifacts and the runs in `folder`. Return its output and its messages."""
    places = ["--artifacts", str(folder / "a")]
    if arguments[0] in ("train", "calibrate"):
        places += ["--runs", str(folder / "runs")]
    code, out, err = in_process(capsys, *arguments, *places)
    assert code == 0, err
    return out, err


def test_table_of_100_rows_is_calibrated_by_all_of_them_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.csv", two_factor_rows(100, seed=0))
    _, err = run(capsys, tmp_path, "train", data, "--model", "pca", "--name", "m")
    assert "fitting the model of fold 20 of 20" in err
    assert "WARNING" not in err
    manifest = read_manifest(tmp_path / "a" / "m" / "1" / "model.pt")
    assert manifest.calibration.model_dump() == {"rows": 100, "floor": 1 / 101, "method": "cross", "folds": 20}
    assert (manifest.data.fit, manifest.data.held_out, manifest.data.calibration) == (90, 10, 100)
    out, _ = run(capsys, tmp_path, "inspect", "m")
    assert "calibrated on 100 rows, each scored by one of 20 models fitted without it" in out
    text = (tmp_path / "runs" / "m" / "1" / "card.md").read_text()
    assert "each scored by one of 20 other models" in text
    assert "This is measured, and not guaranteed" in text
    assert f"elbo train {data} --model pca --name m --calibration cross" in text
    unusual = write(tmp_path / "unusual.csv", two_factor_rows(5, seed=1) + 100)
    out, err = run(capsys, tmp_path, "score", "m", unusual, "--alpha", "0.02")
    assert [json.loads(line)["is_anomaly"] for line in out.splitlines()] == [True] * 5
    assert err == ""


@pytest.mark.parametrize(("rows", "expected"), [(500, "cross"), (501, "split")])
def test_auto_calibration_depends_on_the_number_of_distinct_rows(tmp_path: Path, rows: int, expected: str) -> None:
    x = gaussian(rows)
    table = table_of(tmp_path, np.concatenate((x, x[:100])))
    assert with_calibration(options(calibration="auto"), table).calibration == expected
    assert with_calibration(options(calibration="split"), table).calibration == "split"


def test_auto_calibration_of_images_and_of_rows_with_times_is_split(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    images = table_of(tmp_path, random.randint(0, 256, (60, 8, 8)).astype(np.uint8))
    assert with_calibration(options(calibration="auto"), images).calibration == "split"
    lines = [f"{1.7e9 + 60 * row:.0f},{value:.4f}" for row, value in enumerate(random.standard_normal(60))]
    (tmp_path / "a.csv").write_text("\n".join(["ts,cpu", *lines]))
    table = read_table(str(tmp_path / "a.csv"), time="ts")
    assert with_calibration(options(calibration="auto", time="ts"), table).calibration == "split"


def test_cross_calibration_with_times_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = in_process(
        capsys, "train", "a.csv", "--model", "pca", "--name", "m", "--time", "ts", "--calibration", "cross"
    )
    assert code == 2
    assert "--calibration" in err
    assert "expected split or auto with --time, because neighbouring rows resemble each other" in " ".join(err.split())


def test_command_in_the_card_of_a_small_table_names_the_split(tmp_path: Path) -> None:
    table = table_of(tmp_path, gaussian(40))
    path = train(options(calibration="split"), table, tmp_path / "a", SilentReporter())
    manifest = read_manifest(path)
    assert manifest.calibration.model_dump() == {"rows": 8, "floor": 1 / 9}  # as in earlier releases
    assert "calibration" not in manifest.training
    assert command_of(manifest).endswith("--name m --calibration split")


def test_rows_outside_of_valid_ranges_fit_but_do_not_calibrate(tmp_path: Path) -> None:
    x = gaussian(60)
    limit = float(np.sort(x[:, 0])[-6]) + 1e-4  # five rows are above
    table = table_of(tmp_path, x)
    policy = Policy(features={table.names[0]: FeatureRule(maximum=limit)})
    path = train(options(), table, tmp_path / "a", SilentReporter(), policy=policy)
    artifact = load(path)
    assert artifact.manifest.calibration.rows == 55
    assert artifact.manifest.data.fit == 54
    assert artifact.manifest.policy is not None
    assert artifact.manifest.policy.outside == 5
    assert len(artifact.calibration["scores"]) == 55


def test_recalibrated_model_has_the_new_rows_and_no_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "rows.csv", two_factor_rows(100, seed=0))
    recent = write(tmp_path / "recent.csv", two_factor_rows(80, seed=1))
    run(capsys, tmp_path, "train", data, "--model", "pca", "--name", "m")
    places = ["--artifacts", str(tmp_path / "a"), "--runs", str(tmp_path / "runs")]
    code, _, err = in_process(capsys, "calibrate", "m", data, *places)
    assert code == 2
    assert "was trained on" in err
    run(capsys, tmp_path, "calibrate", "m", recent)
    second = load(tmp_path / "a" / "m" / "2" / "model.pt")
    assert second.manifest.calibration.model_dump() == {"rows": 80, "floor": 1 / 81}

    text = (tmp_path / "runs" / "m" / "2" / "card.md").read_text()
    assert "It was recalibrated on 80 of 80 rows" in text
    assert "at most 5 % of the normal rows" in text


@pytest.mark.slow
def test_run_that_was_killed_in_a_fold_resumes_to_the_same_calibration(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.csv", two_factor_rows(60, seed=0))

    def start(folder: str, *more: str) -> "subprocess.Popen[str]":
        options = ["--model", "ae", "--name", "m", "--epochs", "40", "--force", "--checkpoint-seconds", "0", *more]
        places = ["--artifacts", str(tmp_path / folder / "a"), "--runs", str(tmp_path / folder / "runs")]
        command = [sys.executable, "-m", "elbo", "train", source, *options, *places]
        return PreloadedProcess(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)

    with start("whole") as whole, start("parts") as parts:
        wait_until_newer(tmp_path / "parts" / "runs" / "m" / "fold-3" / "checkpoint.pt", 0, parts)
        parts.send_signal(signal.SIGKILL)
        parts.wait(timeout=60)
        assert whole.wait(timeout=300) == 0
    assert not (tmp_path / "parts" / "a" / "m" / "1").exists()
    with start("parts", "--resume") as rest:
        assert rest.wait(timeout=300) == 0
    manifests = [read_manifest(tmp_path / folder / "a" / "m" / "1" / "model.pt") for folder in ("whole", "parts")]
    assert manifests[0].weights_sha256 == manifests[1].weights_sha256  # of the calibration scores, too
    assert manifests[0].calibration.folds == 5
    assert [path.name for path in (tmp_path / "parts" / "runs" / "m").iterdir()] == ["1"]
