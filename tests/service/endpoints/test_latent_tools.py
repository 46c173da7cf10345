"""/neighbours and /edit, compared with numpy on the held-out rows and the module of the artifact."""

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from models.artifact import DIRECTIONS, HELD_OUT, Artifact
from service.app import create_app
from service.inference.latent_space import BadExhibitError, read_held_out, read_label_means
from service.settings import Settings
from tests.service.access.keys import one_key_per_scope
from tests.service.running import post, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def held_out(client: httpx.Client) -> dict[str, Any]:
    """Return the latents, the values and the labels of the held-out rows in the artifact of the VAE."""
    answer = client.get("/models/vae/held-out").json()
    return {name: np.array(answer[name], np.float32) for name in ("latents", "inputs")} | {"labels": answer["labels"]}


def encode(artifact: Artifact, x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(artifact.module.encode(torch.from_numpy(x))[0])


def decode(artifact: Artifact, z: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(artifact.module.decode(torch.from_numpy(z)))


def test_neighbours_of_rows_are_the_held_out_rows_with_the_nearest_latents(
    client: httpx.Client, vae: Artifact, digits: np.ndarray, held_out: dict[str, Any]
) -> None:
    rows = digits[:30]
    answer = post(client, "/neighbours?model=vae", {"inputs": rows.tolist(), "n": 4})
    distances = np.linalg.norm(encode(vae, rows)[:, None].astype(np.float64) - held_out["latents"], axis=2)
    nearest = np.argsort(distances, axis=1)[:, :4]
    np.testing.assert_array_equal(answer["indices"], nearest)
    np.testing.assert_allclose(answer["distances"], np.take_along_axis(distances, nearest, axis=1), rtol=1e-5)
    assert answer["labels"] == [[str(held_out["labels"][index]) for index in row] for row in nearest]
    assert "values" not in answer
    own = np.linalg.norm(held_out["latents"][:, None] - held_out["latents"], axis=2)
    np.fill_diagonal(own, np.inf)
    assert answer["usual_distance"] == pytest.approx(np.median(own.min(axis=1)), rel=1e-5)


def test_nearest_neighbour_of_a_held_out_row_is_the_row_itself(client: httpx.Client, held_out: dict[str, Any]) -> None:
    some = [3, 0, 8]
    by_row = post(client, "/neighbours?model=vae", {"inputs": held_out["inputs"][some].tolist(), "values": True})
    by_latent = post(client, "/neighbours?model=vae", {"latents": held_out["latents"][some].tolist(), "n": 1})
    assert [row[0] for row in by_row["indices"]] == [row[0] for row in by_latent["indices"]] == some
    np.testing.assert_array_equal(by_latent["distances"], [[0], [0], [0]])
    np.testing.assert_allclose([row[0] for row in by_row["values"]], held_out["inputs"][some])


def test_every_held_out_row_is_returned_if_there_are_fewer_than_n(client: httpx.Client) -> None:
    answer = post(client, "/neighbours?model=hosts", {"latents": [[0.0, 0.0]], "n": 100})
    count = len(client.get("/models/hosts/held-out").json()["latents"])
    assert len(set(answer["indices"][0])) == min(count, 100)
    assert answer["distances"][0] == sorted(answer["distances"][0])
    assert "labels" not in answer


def test_edit_moves_a_row_by_the_difference_of_mean_latents(
    client: httpx.Client, vae: Artifact, digits: np.ndarray, held_out: dict[str, Any]
) -> None:
    labels = np.array(held_out["labels"])
    mean = {label: held_out["latents"][labels == label].mean(axis=0) for label in (1, 7)}
    start = encode(vae, digits[:1])[0]
    body = {"input": digits[0].tolist(), "direction": "7", "amount": 2.0}
    moved = post(client, "/edit?model=vae", body)
    expected = start + 2 * (mean[7] - held_out["latents"][labels != 7].mean(axis=0))
    np.testing.assert_allclose(moved["latents"], [expected], atol=1e-4)
    np.testing.assert_allclose(moved["outputs"], decode(vae, expected[None]), atol=1e-4)
    path = post(client, "/edit?model=vae", {"latent": start.tolist(), "direction": "7", "away_from": "1", "steps": 5})
    steps = start + np.linspace(0, 1, 5)[:, None] * (mean[7] - mean[1])
    np.testing.assert_allclose(path["latents"], steps, atol=1e-4)
    np.testing.assert_allclose(path["outputs"][0], decode(vae, start[None])[0], atol=1e-4)


def test_edit_of_the_mean_one_towards_zero_reaches_the_zeros(client: httpx.Client, held_out: dict[str, Any]) -> None:
    start = held_out["latents"][np.array(held_out["labels"]) == 1].mean(axis=0)
    path = post(client, "/edit?model=vae", {"latent": start.tolist(), "direction": "0", "away_from": "1", "steps": 2})
    ones, zeros = post(client, "/neighbours?model=vae", {"latents": path["latents"], "n": 10})["labels"]
    assert ones.count("1") > ones.count("0") == 0
    assert zeros.count("0") > zeros.count("1") == 0
    assert client.get("/models/vae").json()["directions"] == [str(digit) for digit in range(10)]


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "text"),
    [
        ("/edit?model=vae", {"latent": [0.0] * 16, "direction": "seven"}, 422, "invalid_field", "it knows '"),
        ("/edit?model=vae", {"latent": [0.0] * 16, "direction": "7", "away_from": "x"}, 422, "invalid_field", "'x'"),
        ("/edit?model=vae", {"direction": "7"}, 422, "invalid_field", "the request needs either input or latent"),
        ("/edit?model=vae", {"latent": [0.0] * 3, "direction": "7"}, 422, "invalid_rows", "of 16 numbers"),
        ("/edit?model=vae", {"latent": [0.0] * 16, "direction": "7", "amount": 1e9}, 422, "invalid_field", "amount"),
        (
            "/edit?model=vae",
            {"latent": [0.0] * 16, "direction": "7", "steps": 301},
            422,
            "invalid_field",
            "at most 300",
        ),
        ("/edit?model=hosts", {"latent": [0.0] * 2, "direction": "7"}, 409, "not_supported", "knows no labels"),
        ("/neighbours?model=vae", {}, 422, "invalid_field", "expected one of the fields inputs and latents"),
        ("/neighbours?model=vae", {"latents": [[0.0] * 16] * 61, "n": 5}, 413, "too_many_rows", "61 rows with 5 each"),
        ("/neighbours?model=vae", {"latents": [[0.0] * 15]}, 422, "invalid_rows", "of 16 numbers"),
        ("/neighbours?model=vae", {"latents": [[0.0] * 16], "n": 0}, 422, "invalid_field", "n"),
    ],
)
def test_request_about_latents_is_refused_if_it_is_not_valid(
    client: httpx.Client, path: str, body: dict[str, Any], status: int, code: str, text: str
) -> None:
    response = client.post(path, json=body)
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert text in response.json()["detail"]


def test_values_of_neighbours_need_the_scope_admin(artifacts: Path, tmp_path: Path) -> None:
    keys = one_key_per_scope(tmp_path / "keys.toml")
    settings = Settings(artifacts=artifacts, api_keys_file=keys.path, log_level="error", backend="torchscript")
    with running(create_app(settings)) as client:
        body = {"latents": [[0.0] * 16], "n": 1, "values": True}
        found = {
            scope: client.post("/neighbours?model=vae", json=body, headers=keys.headers(scope)).status_code
            for scope in ("admin", "infer")
        }
        without = client.post("/neighbours?model=vae", json=body | {"values": False}, headers=keys.headers("infer"))
    assert found == {"admin": 200, "infer": 403}
    assert without.status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'{"latents":[],"inputs":[],"labels":null}',
        b'{"latents":[[1,2,3]],"inputs":[[1]],"labels":null}',
        b'{"latents":[[1,null]],"inputs":[[1]],"labels":null}',
        b'{"latents":[[1,2]],"inputs":[[1]],"labels":[0,1],"label_names":null}',
        b'{"latents":[[1,2]],"inputs":[[1]],"labels":[5],"label_names":["a"]}',
    ],
)
def test_damaged_held_out_rows_are_an_error_that_names_the_file(content: bytes) -> None:
    with pytest.raises(BadExhibitError, match=r"held-out\.json is damaged"):
        read_held_out({HELD_OUT: content}, 2)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b'[{"label":"a"}]',
        b'[{"label":"a","rows":3,"mean":[1],"others":[1,2]}]',
        b'[{"label":"a","rows":"x","mean":[1,2],"others":[1,2]}]',
    ],
)
def test_damaged_directions_are_an_error_that_names_the_file(content: bytes) -> None:
    with pytest.raises(BadExhibitError, match=r"directions\.json is damaged"):
        read_label_means({DIRECTIONS: content}, 2, None)
