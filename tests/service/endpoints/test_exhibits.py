"""The exhibits of an artifact: held-out rows, calibration scores and the model card."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from models.artifact import Artifact
from tests.service.hosts import host_table
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Table
from training.train import train


def read_exhibits(path: Path) -> dict[str, bytes]:
    """Return the exhibits of an artifact, read with nothing but zipfile."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "/extra/exhibits/" in name]
        return {name.rpartition("/")[2]: archive.read(name) for name in names}


def test_held_out_exhibit_contains_the_latents_and_labels_of_the_held_out_rows(
    client: httpx.Client, digits: np.ndarray, artifacts: Path
) -> None:
    exhibit = client.get("/models/vae/held-out").json()
    assert (exhibit["model"], exhibit["version"], exhibit["rows"]) == ("vae", 1, 180)
    inputs = np.array(exhibit["inputs"], np.float32)
    assert inputs.shape == (180, 64)
    latents = client.post("/encode?model=vae", json={"inputs": exhibit["inputs"]}).json()["latents"]
    np.testing.assert_allclose(latents, exhibit["latents"], rtol=1e-4, atol=1e-5)
    from sklearn.datasets import load_digits

    labels = {row.tobytes(): label for row, label in zip(digits, load_digits().target, strict=True)}
    assert [labels[row.tobytes()] for row in inputs] == exhibit["labels"]
    file = json.loads(read_exhibits(artifacts / "vae" / "1" / "model.pt")["held-out.json"])
    assert file == {key: value for key, value in exhibit.items() if key not in ("model", "version")}


def test_p_value_and_threshold_of_a_verdict_follow_from_the_calibration_exhibit(
    client: httpx.Client, vae: Artifact
) -> None:
    exhibit = client.get("/models/vae@1/calibration").json()
    scores = np.array(exhibit["scores"])
    assert exhibit["rows"] == len(scores) == vae.manifest.calibration.rows
    assert (np.diff(scores) >= 0).all()
    row = [[0.0] * 64]
    verdict = client.post("/anomaly?model=vae", json={"inputs": row, "alpha": 0.05}).json()
    at_least = int((scores >= verdict["results"][0]["score"]).sum())
    assert verdict["results"][0]["p_value"] == pytest.approx((1 + at_least) / (1 + len(scores)))
    assert verdict["threshold"] in scores.astype(np.float32)


def test_model_card_is_markdown_with_the_training_command(client: httpx.Client) -> None:
    response = client.get("/models/pca/card")
    assert response.headers["content-type"] == "text/markdown; charset=utf-8"
    assert response.text.startswith("# pca\n")
    assert "calibrated on 359 rows" in response.text
    assert "elbo train digits --model pca --name pca" in response.text


@pytest.mark.slow
def test_exhibits_of_a_large_training_set_have_a_limited_size(tmp_path: Path) -> None:
    rows = np.random.RandomState(0).normal(size=(26_000, 300)).astype(np.float32)
    names = [f"f{i}" for i in range(300)]
    missing = np.zeros(300, np.int64)
    table = Table(RowStore(rows), (300,), names, [None] * 300, None, None, "made up", missing=missing)
    path = train(TrainConfig(model="pca", name="wide", latents=2), table, tmp_path, RecordingReporter())
    held, scores = (json.loads(read_exhibits(path)[name]) for name in ("held-out.json", "calibration.json"))
    assert held["rows"] == 2600
    assert np.shape(held["latents"]) == (2000, 2)
    assert np.shape(held["inputs"]) == (1333, 300)  # at most 400,000 numbers
    assert held["labels"] is None
    assert scores["rows"] == 5200
    assert len(scores["scores"]) == 2000


def test_private_artifact_has_no_held_out_rows(tmp_path: Path) -> None:
    config = TrainConfig(model="pca", name="secret", latents=2, private=True)
    exhibits = read_exhibits(train(config, host_table(), tmp_path, RecordingReporter()))
    assert set(exhibits) == {"calibration.json", "card.md"}


def test_missing_exhibit_gives_404_with_a_hint(app: FastAPI, client: httpx.Client) -> None:
    registry = app.state.service.registry
    catalogue = registry.catalogue
    without_exhibits = {version: replace(served, exhibits={}) for version, served in catalogue.models["hosts"].items()}
    registry.catalogue = replace(catalogue, models={**catalogue.models, "hosts": without_exhibits})
    try:
        assert client.get("/models/hosts").json()["exhibits"] == []
        problem = client.get("/models/hosts/held-out")
    finally:
        registry.catalogue = catalogue
    assert problem.status_code == 404
    assert problem.json()["code"] == "not_shown"
    assert "--private" in problem.json()["hint"]
    assert client.get("/models/hosts").json()["exhibits"] == ["held-out", "calibration", "card"]
    assert client.get("/models/nobody/card").json()["code"] == "model_not_found"
