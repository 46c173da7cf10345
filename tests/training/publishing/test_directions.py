"""`elbo directions` adds the mean latents of labels to a model, and changes nothing else."""

from pathlib import Path

import numpy as np
import orjson
import pytest
import torch

from models.artifact import DIRECTIONS, HELD_OUT, Artifact, load
from service.inference.latent_space import read_label_means
from tests.commands import HEADER, in_process, succeed, two_factor_rows, write

pytestmark = pytest.mark.slow

ROWS = 300


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with the model `web`, a PCA of five metrics, without labels."""
    folder = tmp_path_factory.mktemp("directions")
    data = write(folder / "train.csv", two_factor_rows(500, seed=0))
    options = ["--model", "pca", "--name", "web", "--latents", "2", "--runs", str(folder / "runs")]
    succeed("train", data, *options, "--artifacts", str(folder / "a"))
    return folder / "a"


def write_labelled(path: Path, x: np.ndarray, columns: dict[str, np.ndarray]) -> str:
    """Write rows x [N, 5] with further columns of texts to a CSV file, and return its path."""
    texts = zip(x.tolist(), *columns.values(), strict=True)
    lines = [",".join([*map(repr, row), *cells]) for row, *cells in texts]
    path.write_text("\n".join([",".join([HEADER, *columns]), *lines]) + "\n")
    return str(path)


def halves(x: np.ndarray, feature: int) -> np.ndarray:
    """Return the label "high" for each row of x [N, D] whose feature is above its median, and "low" for the others."""
    return np.where(x[:, feature] > np.median(x[:, feature]), "high", "low").astype("<U8")


def newest(root: Path) -> Artifact:
    return load(max((root / "web").glob("*/model.pt"), key=lambda path: int(path.parent.name)))


def test_directions_are_the_mean_latents_of_the_labels(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = two_factor_rows(ROWS, seed=1)
    labels = halves(x, 0)
    labels[:4] = "odd"  # too few rows for a direction of their own
    source = write_labelled(tmp_path / "labelled.csv", x, {"load": labels})
    before = newest(trained)
    status, out, err = in_process(capsys, "directions", "web", source, "--label", "load", "--artifacts", str(trained))
    assert status == 0, err
    after = newest(trained)
    assert int(after.path.parent.name) == int(before.path.parent.name) + 1
    with torch.inference_mode():
        z = before.module.encode(torch.from_numpy(x.astype(np.float32)))[0].numpy()
    means = read_label_means(after.exhibits, 2, None)
    assert list(means) == ["high", "low"]
    for name, found in means.items():
        has_label = labels == name
        assert found.rows == has_label.sum()
        np.testing.assert_allclose(found.mean, z[has_label].mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(found.others, z[~has_label].mean(axis=0), atol=1e-5)
    assert "labels with fewer than 10 rows get no direction: 'odd'\n" in err
    separations = [float(line.split()[-1]) for line in out.splitlines() if line.startswith(("high", "low"))]
    assert len(separations) == 2
    assert min(separations) > 0.9  # the latents describe the load that the first feature depends on


def test_directions_leave_weights_scores_and_calibration_unchanged(trained: Path, tmp_path: Path) -> None:
    x = two_factor_rows(ROWS, seed=2)
    source = write_labelled(tmp_path / "labelled.csv", x, {"label": halves(x, 1)})
    before = newest(trained)
    succeed("directions", "web", source, "--artifacts", str(trained))
    after = newest(trained)
    assert after.manifest.weights_sha256 == before.manifest.weights_sha256
    assert after.manifest.golden == before.manifest.golden
    assert after.manifest.model_copy(update={"created": before.manifest.created}) == before.manifest
    assert after.exhibits[HELD_OUT] == before.exhibits[HELD_OUT]
    assert (after.twin is None) == (before.twin is None)


def test_new_directions_replace_only_those_of_the_same_labels(trained: Path, tmp_path: Path) -> None:
    x = two_factor_rows(ROWS, seed=3)
    smiling = np.where(x[:, 2] > np.median(x[:, 2]), "smiling", "earnest")
    for name, labels in (("mood", smiling), ("load", halves(x, 0)), ("load", halves(x, 4))):
        source = write_labelled(tmp_path / "labelled.csv", x, {name: labels})
        succeed("directions", "web", source, "--label", name, "--artifacts", str(trained))
    entries = orjson.loads(newest(trained).exhibits[DIRECTIONS])
    assert {"smiling", "earnest", "high", "low"} == {entry["label"] for entry in entries}
    assert len(entries) == 4
    with torch.inference_mode():
        z = newest(trained).module.encode(torch.from_numpy(x.astype(np.float32)))[0].numpy()
    (high,) = [entry["mean"] for entry in entries if entry["label"] == "high"]
    np.testing.assert_allclose(high, z[halves(x, 4) == "high"].mean(axis=0), atol=1e-5)


def test_recalibration_keeps_directions(trained: Path, tmp_path: Path) -> None:
    x = two_factor_rows(ROWS, seed=4)
    source = write_labelled(tmp_path / "labelled.csv", x, {"load": halves(x, 0)})
    succeed("directions", "web", source, "--label", "load", "--artifacts", str(trained))
    before = newest(trained)
    recent = write(tmp_path / "recent.csv", two_factor_rows(ROWS, seed=5))
    succeed("calibrate", "web", recent, "--artifacts", str(trained), "--runs", str(tmp_path / "runs"))
    assert newest(trained).path != before.path
    assert newest(trained).exhibits[DIRECTIONS] == before.exhibits[DIRECTIONS]


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({}, "has no labels: expected a column of labels"),
        ({"label": np.full(ROWS, "same")}, "has 1 labels, of which 1 have at least 10 rows"),
        (
            {"label": np.array([f"kind {i // 6}" for i in range(ROWS)])},
            "has 50 labels, of which 0 have at least 10 rows",
        ),
    ],
)
def test_data_without_usable_labels_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], columns: dict[str, np.ndarray], text: str
) -> None:
    versions = list((trained / "web").iterdir())
    source = write_labelled(tmp_path / "rows.csv", two_factor_rows(ROWS, seed=6), columns)
    status, _, err = in_process(capsys, "directions", "web", source, "--artifacts", str(trained))
    assert status == 2
    assert text in err
    assert list((trained / "web").iterdir()) == versions
