"""`elbo calibrate`: what it must change, what it must not, and what it refuses."""

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
from training.config import KINDS as COMPARED
from training.data.table import MAX_HELD_OUT_ROWS, DataError, read_for_model
from training.errors import FitError
from training.publishing.recalibrate import recalibrate

KINDS = (*COMPARED, "ensemble")
DRIFT = 1.5  # by what every metric has grown since the training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with version 1 of a model of each kind, trained on 1,000 rows in train.csv beside it."""
    folder = tmp_path_factory.mktemp("trained")
    data = write(folder / "train.csv", two_factor_rows(1000, seed=0))
    import elbo

    for kind in KINDS:
        arguments = ["train", data, "--model", kind, "--name", kind, "--latents", "2", "--artifacts", str(folder / "a")]
        with pytest.raises(SystemExit):
            elbo.main([*arguments, "--runs", str(folder / "runs"), *([] if kind == "pca" else ["--epochs", "20"])])
    return folder


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "a", tmp_path / "a"))


def recent(folder: Path, rows: int = 400, seed: int = 7) -> str:
    return write(folder / "recent.csv", DRIFT * two_factor_rows(rows, seed=seed))


def refreshed(root: Path, kind: str, source: str, alpha: float = 0.05) -> tuple[Artifact, Artifact]:
    """Version 1 of `kind`, and the version that calibrating it on `source` made."""
    parent = load(root / kind / "1" / "model.pt")
    done = recalibrate(parent, read_for_model(source, parent.manifest), root, alpha)
    assert done.path == root / kind / "2" / "model.pt"
    return parent, load(done.path)


def rates(artifact: Artifact, rows: np.ndarray, alpha: float) -> tuple[int, int]:
    """How many of `rows` have p <= alpha, and how many a severity above 1."""
    with torch.inference_mode():
        score = artifact.module.score(torch.from_numpy(rows.astype(np.float32)))[0]
        p_value, severity = artifact.module.p_value(score), artifact.module.severity(score, alpha)
    return int((p_value <= alpha * (1 + 1e-6)).sum()), int((severity > 1).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_networks_and_scores_stay_to_the_bit_and_p_values_are_those_of_the_new_rows(
    kind: str, root: Path, tmp_path: Path
) -> None:
    source = recent(tmp_path)
    parent, child = refreshed(root, kind, source)
    before, after = thaw(parent).state_dict(), thaw(child).state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != name.startswith("calibration."), name
    x = torch.from_numpy(two_factor_rows(50, seed=3).astype(np.float32))
    rows = torch.from_numpy(np.genfromtxt(source, delimiter=",", skip_header=1).astype(np.float32))
    with torch.inference_mode():
        for mine, theirs in zip(child.module.score(x), parent.module.score(x), strict=True):
            assert torch.equal(mine, theirs)
        calibration, score = child.module.score(rows)[0].numpy(), child.module.score(x)[0].numpy()
        p_value = child.module.p_value(torch.from_numpy(score)).numpy()
    counted = (1 + (calibration[None, :] >= score[:, None]).sum(axis=1)) / 401
    np.testing.assert_allclose(p_value, counted, atol=1.01 / 401)  # up to a tie that rounding makes


@pytest.mark.parametrize("kind", KINDS)
def test_false_alarms_keep_to_alpha_again(kind: str, root: Path, tmp_path: Path) -> None:
    parent, child = refreshed(root, kind, recent(tmp_path))
    fresh = DRIFT * two_factor_rows(2000, seed=8)
    low, high = betabinom(2000, 20, 381).interval(0.9999)  # 20 = 0.05 * 401
    by_p_value, by_severity = rates(child, fresh, 0.05)
    assert by_p_value == by_severity
    assert low <= by_p_value <= high
    assert rates(parent, fresh, 0.05)[0] > high  # what it is for


def test_the_manifest_tells_where_it_comes_from(root: Path, tmp_path: Path) -> None:
    source = recent(tmp_path)
    parent, child = refreshed(root, "pca", source)
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
    same = ("name", "kind", "features", "training", "data", "metrics", "history", "spectrum")
    assert all(getattr(new, name) == getattr(old, name) for name in same)
    assert new.weights_sha256 != old.weights_sha256
    third = recalibrate(child, read_for_model(write(tmp_path / "b.csv", two_factor_rows(30, 9)), new), root, 0.05)
    assert third.manifest.recalibration is not None
    assert (third.manifest.recalibration.parent, third.manifest.recalibration.trained) == ("pca@2", old.created)


def test_a_twin_stays_true(tmp_path: Path) -> None:
    """Twins take their weights from the module: the new version's must repeat the new version's golden answers."""
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
        backend = select_backend(child, requested="onnx").backend  # raises if the twin is wrong
        assert backend.name == "onnx"


def test_rows_labelled_as_anomalies_are_left_out(root: Path, tmp_path: Path) -> None:
    rows = two_factor_rows(300, seed=4)
    rows[::3, 4] += 30
    labelled = np.column_stack((rows, np.arange(300) % 3 == 0))
    source = write(tmp_path / "labelled.csv", labelled, "cpu [%],memory [GB],disk,network,errors,label")
    parent = load(root / "pca" / "1" / "model.pt")
    done = recalibrate(parent, read_for_model(source, parent.manifest), root, 0.05)
    assert done.manifest.calibration.rows == 200
    assert "100 rows labelled 1 are left out" in done.notes
    clean = write(tmp_path / "clean.csv", rows[np.arange(300) % 3 != 0])
    other = recalibrate(parent, read_for_model(clean, parent.manifest), root, 0.05)
    assert torch.equal(thaw(load(done.path)).calibration.scores, thaw(load(other.path)).calibration.scores)


def test_more_rows_than_calibrate_are_drawn_from_the_whole_table(root: Path, tmp_path: Path) -> None:
    parent = load(root / "pca" / "1" / "model.pt")
    path = tmp_path / "many.npy"
    np.save(path, two_factor_rows(MAX_HELD_OUT_ROWS + 1000, seed=4).astype(np.float32))
    done = recalibrate(parent, read_for_model(str(path), parent.manifest), root, 0.05)
    assert done.manifest.calibration.rows == MAX_HELD_OUT_ROWS
    assert done.manifest.recalibration is not None
    assert done.manifest.recalibration.rows == MAX_HELD_OUT_ROWS + 1000


# Refusals: nothing is published


@pytest.mark.parametrize(
    ("rows", "alpha", "message"),
    [
        (18, 0.05, "has 18 normal rows, which allow an alpha from 0.0526 on: expected at least 19 for alpha 0.05"),
        (98, 0.01, "has 98 normal rows, which allow an alpha from 0.0101 on: expected at least 99 for alpha 0.01"),
        (19, 0.05, None),
        (99, 0.01, None),
        (9, 0.1, None),
    ],
)
def test_too_few_rows_are_refused_with_the_alpha_that_they_allow(
    rows: int, alpha: float, message: str | None, root: Path, tmp_path: Path
) -> None:
    source = recent(tmp_path, rows)
    if message is None:
        _, child = refreshed(root, "pca", source, alpha)
        assert child.manifest.calibration.floor <= alpha * (1 + 1e-9)
        return
    with pytest.raises(DataError) as refused:
        refreshed(root, "pca", source, alpha)
    assert message in str(refused.value)
    assert not (root / "pca" / "2").exists()


def test_rows_that_trained_it_are_refused(trained: Path, root: Path) -> None:
    with pytest.raises(DataError, match=r"holds the rows that pca@1 was trained on"):
        refreshed(root, "pca", str(trained / "train.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpu,memory,disk,network\n" + "1,2,3,4\n" * 30, "errors"),
        ("cpu,memory,disk,network,errors\n" + "1,2,3,4,5\n" * 30 + "1,,3,4,5\n", "memory"),
        ("cpu [mW],memory,disk,network,errors\n" + "1,2,3,4,5\n" * 30, "is in mW: expected %"),
        ("cpu,memory,disk,network,errors\n" + "1,2,3,4,5\n" * 30 + "3e38,-3e38,3e38,3e38,3e38\n", "row 30 overflows"),
    ],
)
def test_rows_that_the_model_cannot_read_are_refused(text: str, message: str, root: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DataError) as refused:
        refreshed(root, "pca", str(path))
    assert message in str(refused.value)
    assert not (root / "pca" / "2").exists()


def test_a_calibration_of_another_kind_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later Calibration that counts otherwise than the one that is scripted in the artifact."""

    class Strict(Calibration):
        def p_value(self, score: torch.Tensor) -> torch.Tensor:
            return super().p_value(score) * 0.5

    monkeypatch.setattr("training.publishing.recalibrate.Calibration", Strict)
    with pytest.raises(FitError, match=r"pca@1 calibrates in another way than this Elbo: train it again"):
        refreshed(root, "pca", recent(tmp_path))
    assert not (root / "pca" / "2").exists()


def test_an_artifact_that_was_replaced_meanwhile_is_noticed(root: Path) -> None:
    parent = load(root / "pca" / "1" / "model.pt")
    shutil.copy(root / "ae" / "1" / "model.pt", parent.path)
    with pytest.raises(ArtifactCorrupt, match="has changed since it was loaded"):
        thaw(parent)


# The command


def test_the_command_says_what_it_did_and_leaves_a_card(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folders = recent(tmp_path), ["--artifacts", str(root), "--runs", str(tmp_path / "runs")]
    code, out, err = in_process(capsys, "calibrate", "pca", source, *folders)
    assert code == 0
    assert out.splitlines() == [
        f"published pca@2: {root}/pca/2/model.pt",
        "calibrated on 400 rows: the smallest p-value is 0.00249",
    ]
    flagged, warning = err.splitlines()
    assert flagged.startswith("pca@1 calls ")
    assert warning.startswith("warning: that is more than chance explains.")
    _, told, _ = in_process(capsys, "inspect", "pca", "--artifacts", str(root))
    assert f"400 of 400 rows of {source}" in told
    assert "the networks are those of pca@1" in told
    _, judged, _ = in_process(capsys, "evaluate", "pca", source, "--artifacts", str(root))
    assert judged.splitlines()[0].endswith(": 400 rows, the ones that it was calibrated on")
    card = (tmp_path / "runs" / "pca" / "2" / "card.md").read_text()
    assert f"elbo calibrate pca@1 {source}" in card
    assert "No p-value is below 0.00249" in card


def test_rows_like_those_before_raise_no_warning(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "same.csv", two_factor_rows(400, seed=11))
    code, _, err = in_process(capsys, "calibrate", "vae@1", source, "--artifacts", str(root), "--runs", str(tmp_path))
    assert code == 0
    assert "warning" not in err


def test_a_renamed_folder_keeps_its_name(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "pca").rename(root / "production")
    folders = ["--artifacts", str(root), "--runs", str(tmp_path)]
    _, out, _ = in_process(capsys, "calibrate", "production", recent(tmp_path), *folders)
    assert out.startswith("published production@2: ")
    assert not (root / "pca").exists()
