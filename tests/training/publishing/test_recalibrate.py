"""`elbo calibrate` replaces only the calibration, and refuses unsuitable rows."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import betabinom

from models.artifact import Artifact, Twin, load, thaw
from models.calibration import Calibration
from models.errors import ArtifactCorrupt
from service.inference.backend_selection import select_backend
from tests.commands import in_process, two_factor_rows, write
from tests.models.publishing import GAPS, publish_twin
from training.config import EVERY_KIND
from training.data.table import MAX_HELD_OUT_ROWS, DataError, read_for_model
from training.errors import FitError
from training.publishing.recalibrate import recalibrate

pytestmark = pytest.mark.slow

DISTINCT_LINES = "".join(f"{number},2,3,4,5\n" for number in range(30))
DRIFT = 1.5  # factor by which every metric has grown since training; the models flag all such rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with train.csv (1,000 rows) and the artifact folder a/.

    For every kind of model, a/ contains one version that was trained on train.csv.
    """
    folder = tmp_path_factory.mktemp("trained")
    data = write(folder / "train.csv", two_factor_rows(1000, seed=0))
    from elbo import cli

    for kind in EVERY_KIND:
        arguments = ["train", data, "--model", kind, "--name", kind, "--latents", "2", "--artifacts", str(folder / "a")]
        with pytest.raises(SystemExit):
            cli.main([*arguments, "--runs", str(folder / "runs"), *([] if kind == "pca" else ["--epochs", "20"])])
    return folder


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the artifact folder that the test may change."""
    return Path(shutil.copytree(trained / "a", tmp_path / "a"))


def write_recent_rows(folder: Path, rows: int = 400, seed: int = 7) -> str:
    """Write rows measured after the drift, and return the path of the file."""
    return write(folder / "recent.csv", DRIFT * two_factor_rows(rows, seed=seed))


def recalibrate_on(root: Path, kind: str, source: str, alpha: float = 0.05) -> tuple[Artifact, Artifact]:
    """Recalibrate version 1 of `kind` on `source`. Return versions 1 and 2."""
    parent = load(root / kind / "1" / "model.pt")
    result = recalibrate(parent, read_for_model(source, parent.manifest), root, alpha, force=True)  # see DRIFT
    assert result.path == root / kind / "2" / "model.pt"
    return parent, load(result.path)


def count_alarms(artifact: Artifact, rows: np.ndarray, alpha: float) -> tuple[int, int]:
    """Return how many `rows` have a p-value of at most alpha, and how many have a severity above 1."""
    with torch.inference_mode():
        score = artifact.module.score(torch.from_numpy(rows.astype(np.float32)))[0]
        p_value, severity = artifact.module.p_value(score), artifact.module.severity(score, alpha)
    return int((p_value <= alpha * (1 + 1e-6)).sum()), int((severity > 1).sum())


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_recalibration_keeps_weights_and_scores_but_computes_p_values_from_the_new_rows(
    kind: str, root: Path, tmp_path: Path
) -> None:
    source = write_recent_rows(tmp_path)
    parent, child = recalibrate_on(root, kind, source)
    before, after = thaw(parent).state_dict(), thaw(child).state_dict()
    assert before.keys() == after.keys()
    replaced = ("calibration.", "gap_scores.knots", "gap_scores.heights", "gap_scores.slopes")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != name.startswith(replaced), name
    x = torch.from_numpy(two_factor_rows(50, seed=3).astype(np.float32))
    rows = torch.from_numpy(np.genfromtxt(source, delimiter=",", skip_header=1).astype(np.float32))
    with torch.inference_mode():
        for new, old in zip(child.module.score(x), parent.module.score(x), strict=True):
            assert torch.equal(new, old)
        calibration, score = child.module.score(rows)[0].numpy(), child.module.score(x)[0].numpy()
        p_value = child.module.p_value(torch.from_numpy(score)).numpy()
    expected = (1 + (calibration[None, :] >= score[:, None]).sum(axis=1)) / 401
    # Rounding can make a score equal to one calibration score, which changes the p-value by 1 / 401.
    np.testing.assert_allclose(p_value, expected, atol=1.01 / 401)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_false_alarm_rate_matches_alpha_after_a_drift_if_the_model_is_recalibrated(
    kind: str, root: Path, tmp_path: Path
) -> None:
    parent, child = recalibrate_on(root, kind, write_recent_rows(tmp_path))
    fresh = DRIFT * two_factor_rows(2000, seed=8)
    low, high = betabinom(2000, 20, 381).interval(0.9999)  # 20 is 0.05 * 401, rounded down
    by_p_value, by_severity = count_alarms(child, fresh, 0.05)
    assert by_p_value == by_severity
    assert low <= by_p_value <= high
    assert count_alarms(parent, fresh, 0.05)[0] > high  # without recalibration


def test_manifest_of_a_recalibrated_model_names_the_parent_version_and_keeps_the_training_facts(
    root: Path, tmp_path: Path
) -> None:
    source = write_recent_rows(tmp_path)
    parent, child = recalibrate_on(root, "pca", source)
    old, new = parent.manifest, child.manifest
    assert new.recalibration is not None
    assert new.recalibration.model_dump() == {
        "parent": "pca@1",
        "parent_weights_sha256": old.weights_sha256,
        "trained": old.created,
        "source": source,
        "rows": 400,
        "fingerprint": read_for_model(source, old).fingerprint,
    }
    assert (new.calibration.rows, new.calibration.floor) == (400, 1 / 401)
    unchanged = ("name", "kind", "features", "training", "data", "metrics", "history", "spectrum")
    assert all(getattr(new, name) == getattr(old, name) for name in unchanged)
    assert new.weights_sha256 != old.weights_sha256
    third = recalibrate(child, read_for_model(write(tmp_path / "b.csv", two_factor_rows(30, 9)), new), root, 0.05)
    assert third.manifest.recalibration is not None
    assert (third.manifest.recalibration.parent, third.manifest.recalibration.trained) == ("pca@2", old.created)


def test_twin_gives_the_new_golden_answers_after_recalibration(tmp_path: Path) -> None:
    """The ONNX graphs read all weights from the TorchScript module, so the old graphs also serve the new version."""
    for number, kind in enumerate(("pca", "ae", "vae-gaussian", "ensemble", "ae-imputing")):
        root = tmp_path / str(number)
        parent = load(publish_twin(root, kind, gaps=GAPS if kind.endswith("-imputing") else ()))
        rows = np.random.RandomState(0).standard_normal((60, 5))
        header = ",".join(feature.name for feature in parent.manifest.features)
        table = read_for_model(write(tmp_path / "rows.csv", rows, header), parent.manifest)
        child = load(recalibrate(parent, table, root, 0.05).path)
        assert isinstance(child.twin, Twin)
        assert isinstance(parent.twin, Twin)
        assert child.twin.graphs == parent.twin.graphs
        backend = select_backend(child, requested="onnx").backend  # raises if the twin gives wrong answers
        assert backend.name == "onnx"


def test_recalibration_leaves_out_rows_labelled_as_anomalies(root: Path, tmp_path: Path) -> None:
    rows = two_factor_rows(300, seed=4)
    rows[::3, 4] += 30
    labelled = np.column_stack((rows, np.arange(300) % 3 == 0))
    source = write(tmp_path / "labelled.csv", labelled, "cpu [%],memory [GB],disk,network,errors,label")
    parent = load(root / "pca" / "1" / "model.pt")
    from_labelled = recalibrate(parent, read_for_model(source, parent.manifest), root, 0.05)
    assert from_labelled.manifest.calibration.rows == 200
    assert "left out 100 rows labelled 1" in from_labelled.notes
    clean = write(tmp_path / "clean.csv", rows[np.arange(300) % 3 != 0])
    from_clean = recalibrate(parent, read_for_model(clean, parent.manifest), root, 0.05)
    scores, expected = (thaw(load(result.path)).calibration.scores for result in (from_labelled, from_clean))
    assert torch.equal(scores, expected)


def test_row_whose_score_overflows_stops_a_recalibration_only_if_its_label_means_normal(
    root: Path, tmp_path: Path
) -> None:
    rows = two_factor_rows(100, seed=4)
    rows[7, 4] = 1e20
    anomalous = np.isin(np.arange(100), (3, 7))
    header = "cpu [%],memory [GB],disk,network,errors,label"
    parent = load(root / "pca" / "1" / "model.pt")
    source = write(tmp_path / "anomalous.csv", np.column_stack((rows, anomalous)), header)
    manifest = recalibrate(parent, read_for_model(source, parent.manifest), root, 0.05).manifest
    assert manifest.calibration.rows == 98
    anomalous[7] = False
    source = write(tmp_path / "normal.csv", np.column_stack((rows, anomalous)), header)
    with pytest.raises(DataError, match="the score of row 7 overflows float32"):
        recalibrate(parent, read_for_model(source, parent.manifest), root, 0.05)


def test_recalibration_uses_a_sample_if_there_are_more_rows_than_the_maximum(root: Path, tmp_path: Path) -> None:
    parent = load(root / "pca" / "1" / "model.pt")
    path = tmp_path / "many.npy"
    np.save(path, two_factor_rows(MAX_HELD_OUT_ROWS + 1000, seed=4).astype(np.float32))
    manifest = recalibrate(parent, read_for_model(str(path), parent.manifest), root, 0.05).manifest
    assert manifest.calibration.rows == MAX_HELD_OUT_ROWS
    assert manifest.recalibration is not None
    assert manifest.recalibration.rows == MAX_HELD_OUT_ROWS + 1000


# Refused recalibrations publish nothing


@pytest.mark.parametrize(
    ("rows", "alpha", "message"),
    [
        (18, 0.05, "has 18 distinct normal rows, enough for alpha 0.0526 or more: expected at least 19 for alpha 0.05"),
        (98, 0.01, "has 98 distinct normal rows, enough for alpha 0.0101 or more: expected at least 99 for alpha 0.01"),
        (19, 0.05, None),
        (99, 0.01, None),
        (9, 0.1, None),
    ],
)
def test_error_about_too_few_rows_names_the_smallest_alpha_that_the_rows_allow(
    rows: int, alpha: float, message: str | None, root: Path, tmp_path: Path
) -> None:
    source = write_recent_rows(tmp_path, rows)
    if message is None:
        _, child = recalibrate_on(root, "pca", source, alpha)
        assert child.manifest.calibration.floor <= alpha * (1 + 1e-9)
        return
    with pytest.raises(DataError) as error:
        recalibrate_on(root, "pca", source, alpha)
    assert message in str(error.value)
    assert not (root / "pca" / "2").exists()


def test_recalibration_on_the_training_rows_fails(trained: Path, root: Path) -> None:
    with pytest.raises(DataError, match=r"holds the rows that pca@1 was trained on"):
        recalibrate_on(root, "pca", str(trained / "train.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu,memory,disk,network\n" + "1,2,3,4\n" * 30, "errors"),
        ("cpu,memory,disk,network,errors\n" + "1,2,3,4,5\n" * 30 + "1,,3,4,5\n", "memory"),
        ("cpu [mW],memory,disk,network,errors\n" + "1,2,3,4,5\n" * 30, "is in mW, expected %"),
        ("cpu,memory,disk,network,errors\n" + DISTINCT_LINES + "3e38,-3e38,3e38,3e38,3e38\n", "row 30 overflows"),
    ],
)
def test_recalibration_fails_if_the_rows_do_not_fit_the_model(
    text: str, message: str, root: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        recalibrate_on(root, "pca", str(path))
    assert message in str(error.value)
    assert not (root / "pca" / "2").exists()


def test_recalibration_fails_if_the_artifact_uses_another_calibration_method(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later version of Calibration computes p-values that differ from those of the artifact."""

    class LaterCalibration(Calibration):
        def p_value(self, score: torch.Tensor) -> torch.Tensor:
            return super().p_value(score) * 0.5

    monkeypatch.setattr("training.publishing.recalibrate.Calibration", LaterCalibration)
    with pytest.raises(
        FitError, match=r"pca@1 comes from a version of Elbo that calibrates differently: train it again"
    ):
        recalibrate_on(root, "pca", write_recent_rows(tmp_path))
    assert not (root / "pca" / "2").exists()


def test_thaw_fails_if_the_artifact_was_replaced_after_it_was_loaded(root: Path) -> None:
    parent = load(root / "pca" / "1" / "model.pt")
    shutil.copy(root / "ae" / "1" / "model.pt", parent.path)
    with pytest.raises(ArtifactCorrupt, match="has changed since it was loaded"):
        thaw(parent)


# The command `elbo calibrate`


def test_calibrate_command_reports_the_new_version_and_writes_a_card(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folders = write_recent_rows(tmp_path), ["--artifacts", str(root), "--runs", str(tmp_path / "runs")]
    code, out, err = in_process(capsys, "calibrate", "pca", source, "--force", *folders)
    assert code == 0
    assert out.splitlines() == [
        f"published pca@2: {root}/pca/2/model.pt",
        "calibrated on 400 rows: the smallest p-value is 0.00249",
    ]
    flagged, warning = err.splitlines()
    assert flagged.startswith("pca@1 flags ")
    assert warning.startswith("warning: chance does not explain so many alarms.")
    _, description, _ = in_process(capsys, "inspect", "pca", "--artifacts", str(root))
    assert f"400 of 400 rows of {source}" in description
    assert "the networks are those of pca@1" in description
    _, evaluation, _ = in_process(capsys, "evaluate", "pca", source, "--artifacts", str(root))
    assert evaluation.splitlines()[0].endswith(": 400 rows, the rows it was calibrated on")
    card = (tmp_path / "runs" / "pca" / "2" / "card.md").read_text()
    assert f"elbo calibrate pca@1 {source}" in card
    assert "The smallest possible p-value is 0.00249" in card


def test_calibrate_command_does_not_warn_if_the_rows_show_no_drift(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "same.csv", two_factor_rows(400, seed=11))
    code, _, err = in_process(capsys, "calibrate", "vae@1", source, "--artifacts", str(root), "--runs", str(tmp_path))
    assert code == 0
    assert "warning" not in err


def test_calibrate_command_publishes_under_the_new_name_if_the_folder_was_renamed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "pca").rename(root / "production")
    folders = ["--artifacts", str(root), "--runs", str(tmp_path)]
    _, out, _ = in_process(capsys, "calibrate", "production", write_recent_rows(tmp_path), "--force", *folders)
    assert out.startswith("published production@2: ")
    assert not (root / "pca").exists()
