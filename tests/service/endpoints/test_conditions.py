"""The field `condition` of requests to conditional models, and columns of conditions in records."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from models.artifact import Artifact, load
from service.app import create_app
from service.codec import npy
from service.endpoints.inference import LATENT_DRAWS
from service.inference.sampling import NoiseSource
from service.settings import Settings
from tests.service.running import post, running
from tests.training.conditions import FEATURES, KINDS, SHIFTS, rows_with_conditions
from tests.waiting import wait_until
from training.data.conditions import one_hot

COUNT = 5


@pytest.fixture(scope="module")
def client(conditional_models: Path) -> Iterator[httpx.Client]:
    settings = Settings(
        artifacts=conditional_models / "artifacts", default_model="digits", poll_seconds=3600, max_rows=300,
        log_level="warning",
    )  # fmt: skip
    with running(create_app(settings)) as found:
        yield found


@pytest.fixture(scope="module")
def model(conditional_models: Path) -> Artifact:
    return load(conditional_models / "artifacts" / "digits" / "1" / "model.pt")


def run(method: Any, *inputs: np.ndarray) -> list[np.ndarray]:
    with torch.inference_mode():
        outputs = method(*[torch.from_numpy(each.astype(np.float32)) for each in inputs])
    return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def digits(count: int = COUNT) -> np.ndarray:
    return np.random.RandomState(1).rand(count, 64)


def with_label(rows: np.ndarray, label: int | None) -> np.ndarray:
    condition = np.zeros((len(rows), 10))
    if label is not None:
        condition[:, label] = 1
    return np.concatenate((rows, condition), axis=1)


def refused(client: httpx.Client, path: str, body: dict[str, Any], **options: Any) -> dict[str, Any]:
    response = client.post(path, json=body, **options)
    assert response.status_code == 422, response.text
    content: dict[str, Any] = response.json()
    return content


def test_sample_draws_rows_of_the_level_as_the_artifact_does(client: httpx.Client, model: Artifact) -> None:
    answer = post(client, "/sample", {"n": COUNT, "seed": 3, "condition": {"label": "7"}})
    noise, choice = NoiseSource().draw(3, COUNT, model.manifest.latents)
    (latents,) = run(model.module.draw, with_label(noise, 7), choice)
    np.testing.assert_allclose(answer["latents"], latents[:, :-10], rtol=1e-5)
    np.testing.assert_allclose(answer["outputs"], run(model.module.decode, latents)[0], rtol=1e-4, atol=1e-6)
    assert answer["conditions"] == [{"label": "7"}] * COUNT
    again = post(client, "/decode", {"latents": answer["latents"], "condition": answer["conditions"]})
    np.testing.assert_allclose(again["outputs"], answer["outputs"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", ["7", 7, 7.0, " 7 ", "7.0"])
def test_level_may_be_text_or_a_number(client: httpx.Client, level: object) -> None:
    expected = post(client, "/sample", {"n": 2, "seed": 3, "condition": {"label": "7"}})
    assert post(client, "/sample", {"n": 2, "seed": 3, "condition": {"label": level}}) == expected


def test_sample_without_a_condition_draws_levels_by_their_shares(client: httpx.Client, model: Artifact) -> None:
    answer = post(client, "/sample", {"n": 300, "seed": 1})
    labels = [condition["label"] for condition in answer["conditions"]]
    assert model.manifest.conditions is not None
    expected = 300 * np.array(model.manifest.conditions.shares)
    counts = np.array([labels.count(str(digit)) for digit in range(10)])
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001
    fewer = post(client, "/sample", {"n": 20, "seed": 1})
    assert fewer["conditions"] == answer["conditions"][:20]
    again = post(client, "/decode", {"latents": answer["latents"], "condition": answer["conditions"]})
    np.testing.assert_allclose(again["outputs"], answer["outputs"], rtol=1e-4, atol=1e-5)


def test_sample_draws_the_shift_if_the_request_gives_only_the_kind(client: httpx.Client) -> None:
    body = {"n": 200, "seed": 2, "condition": {"kind": KINDS[1]}}
    found = post(client, "/sample", body, params={"model": "kinds"})["conditions"]
    assert {each["kind"] for each in found} == {KINDS[1]}
    assert 60 < sum(each["shift"] == "yes" for each in found) < 140


def test_same_seed_gives_the_same_bytes_and_standard_prior_decodes_noise(client: httpx.Client, model: Artifact) -> None:
    body = {"n": 3, "seed": 9, "condition": {"label": "4"}}
    assert client.post("/sample", json=body).content == client.post("/sample", json=body).content
    answer = post(client, "/sample", {**body, "prior": "standard"})
    noise, _ = NoiseSource().draw(9, 3, model.manifest.latents)
    np.testing.assert_allclose(answer["latents"], noise, rtol=1e-6)
    (outputs,) = run(model.module.decode, with_label(noise, 4))
    np.testing.assert_allclose(answer["outputs"], outputs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("label", [None, 3])
def test_samples_near_a_row_are_encoded_and_decoded_with_the_condition(
    client: httpx.Client, model: Artifact, label: int | None
) -> None:
    row = digits(1)
    condition = {} if label is None else {"condition": {"label": str(label)}}
    body = {"near": {"input": row[0].tolist()}, "n": COUNT, "seed": 6, "spread": 0.5, **condition}
    answer = post(client, "/sample", body)
    mean = run(model.module.encode, with_label(row, label))[0][0, :-10]
    usual, choice = NoiseSource().draw(0, LATENT_DRAWS, model.manifest.latents)
    drawn = run(model.module.draw, with_label(usual, label), choice)[0][:, :-10]
    noise, _ = NoiseSource().draw(6, COUNT, model.manifest.latents)
    latents = mean + 0.5 * drawn.std(axis=0) * noise
    np.testing.assert_allclose(answer["latents"], latents, rtol=1e-3, atol=1e-4)
    (outputs,) = run(model.module.decode, with_label(latents, label))
    np.testing.assert_allclose(answer["outputs"], outputs, rtol=1e-3, atol=1e-4)
    assert answer["conditions"] == [{} if label is None else {"label": str(label)}] * COUNT
    assert post(client, "/sample", body) == answer


def test_samples_near_a_row_take_one_condition_that_the_model_knows(client: httpx.Client) -> None:
    near = {"near": {"input": digits(1)[0].tolist()}, "n": 2}
    problem = refused(client, "/sample", near | {"condition": {"label": "11"}})
    assert problem["pointer"] == "/condition/label"
    assert "'9'" in problem["detail"]
    problem = refused(client, "/sample", near | {"condition": [{"label": "1"}, {"label": "2"}]})
    assert (problem["pointer"], problem["expected"]) == ("/condition", "an object with 'label'")


@pytest.mark.parametrize("label", [None, 3])
def test_rows_are_encoded_and_reconstructed_with_their_condition(
    client: httpx.Client, model: Artifact, label: int | None
) -> None:
    x = digits()
    body = {"inputs": x.tolist(), **({} if label is None else {"condition": {"label": str(label)}})}
    inputs = with_label(x, label)
    mean, std = run(model.module.encode, inputs)
    answer = post(client, "/encode", body)
    np.testing.assert_allclose(answer["latents"], mean[:, :-10], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(answer["std"], std[:, :-10], rtol=1e-4, atol=1e-5)
    drawn = post(client, "/encode", {**body, "sample": True, "seed": 5})
    noise, _ = NoiseSource().draw(5, COUNT, model.manifest.latents)
    np.testing.assert_allclose(drawn["latents"], (mean + std * np.pad(noise, ((0, 0), (0, 10))))[:, :-10], rtol=1e-3)
    (x_hat,) = run(model.module.forward, inputs)
    answer = post(client, "/reconstruct", body)
    np.testing.assert_allclose(answer["outputs"], x_hat, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(answer["errors"], np.square(x_hat - x).mean(axis=1), rtol=1e-4)


def test_interpolate_and_edit_endpoints_use_the_condition_of_the_request(client: httpx.Client, model: Artifact) -> None:
    x = digits(2)
    mean = run(model.module.encode, with_label(x, 2))[0][:, :-10]
    body = {"start": {"input": x[0].tolist()}, "end": {"latent": mean[1].tolist()}, "steps": 3}
    answer = post(client, "/interpolate", {**body, "condition": {"label": "2"}})
    path = np.stack([mean[0], mean.mean(axis=0), mean[1]])
    np.testing.assert_allclose(answer["latents"], path, rtol=1e-3, atol=1e-4)
    (outputs,) = run(model.module.decode, with_label(path, 2))
    np.testing.assert_allclose(answer["outputs"], outputs, rtol=1e-3, atol=1e-4)
    edit = {"input": x[0].tolist(), "direction": "3", "amount": 0, "condition": {"label": "2"}}
    (expected,) = run(model.module.decode, with_label(mean[:1], 2))
    np.testing.assert_allclose(post(client, "/edit", edit)["outputs"], expected, rtol=1e-3, atol=1e-4)
    near = post(client, "/neighbours", {"inputs": x.tolist(), "n": 1, "condition": {"label": "2"}})
    assert near["indices"] == post(client, "/neighbours", {"latents": mean.tolist(), "n": 1})["indices"]


def expected_scores(artifact: Artifact, x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    assert artifact.manifest.conditions is not None
    inputs = np.concatenate((x, one_hot(artifact.manifest.conditions, codes)), axis=1)
    return run(artifact.module.score, inputs)[0]


@pytest.fixture(scope="module")
def kinds(conditional_models: Path) -> Artifact:
    return load(conditional_models / "artifacts" / "kinds" / "1" / "model.pt")


def test_rows_are_judged_with_the_condition_of_the_request_or_of_each_row(
    client: httpx.Client, kinds: Artifact
) -> None:
    x, kind, shift = rows_with_conditions(4, seed=6)
    conditions = [{"kind": KINDS[k], "shift": SHIFTS[s]} for k, s in zip(kind, shift, strict=True)]
    cases: list[tuple[Any, np.ndarray]] = [
        (conditions, np.stack((kind, shift), axis=1)),
        ({"kind": KINDS[2]}, np.array([[2, -1]] * 4)),
        ({}, np.full((4, 2), -1)),
        (None, np.full((4, 2), -1)),
    ]
    for condition, codes in cases:
        body = {"inputs": x.tolist(), "condition": condition}
        answer = post(client, "/anomaly", body, params={"model": "kinds"})
        scores = [result["score"] for result in answer["results"]]
        np.testing.assert_allclose(scores, expected_scores(kinds, x.astype(np.float32), codes), rtol=1e-3, atol=1e-3)
        assert all(("condition" in result["parts"]) for result in answer["results"])


def records(count: int) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    x, kind, shift = rows_with_conditions(count, seed=7)
    x = x.astype(np.float32)
    found = [dict(zip(FEATURES, row, strict=True)) for row in x.tolist()]
    for record, k, s in zip(found, kind, shift, strict=True):
        record |= {"kind": KINDS[k], "shift": SHIFTS[s]}
    return found, x, np.stack((kind, shift), axis=1)


def test_condition_of_a_row_is_read_from_its_record_or_its_cells(client: httpx.Client, kinds: Artifact) -> None:
    rows, x, codes = records(6)
    rows[1]["shift"] = None
    codes[1, 1] = 1  # the condition of the request is "yes"
    rows[2]["kind"] = "nothing known"
    kept = [0, 1, 3, 4, 5]
    expected = expected_scores(kinds, x[kept], codes[kept])
    header = ",".join([*FEATURES, "kind", "shift"])
    lines = [
        ",".join([*map(str, x[i].tolist()), '"{}"'.format(row["kind"].replace('"', '""')), row["shift"] or ""])
        for i, row in enumerate(rows)
    ]
    bodies = {
        "application/json": json.dumps({"records": rows}),
        "application/x-ndjson": "\n".join(map(json.dumps, rows)),
        "text/csv": "\n".join([header, *lines]),
    }
    for media_type, body in bodies.items():
        params = {"model": "kinds", "condition": json.dumps({"shift": "yes"})}
        headers = {"Content-Type": media_type, "Accept": "application/json"}
        answer = client.post("/anomaly", content=body.encode(), params=params, headers=headers).json()
        assert [result["row"] for result in answer["results"]] == kept, media_type
        scores = [result["score"] for result in answer["results"]]
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-3, err_msg=media_type)
        assert answer["unknown_fields"] == 0
        (error,) = answer["errors"]
        assert error["row"] == 2
        assert error["detail"].startswith("'kind' has no level \"nothing known\": expected 'a \"quoted\", kind', 'b'")
        assert error["pointer"].endswith("/2/kind")


def test_stream_of_lines_gives_each_row_its_condition(client: httpx.Client, kinds: Artifact) -> None:
    rows, x, codes = records(5)
    content = "\n".join(map(json.dumps, rows)).encode()
    headers = {"Content-Type": "application/x-ndjson", "Accept": "application/x-ndjson"}
    response = client.post("/anomaly", content=content, headers=headers, params={"model": "kinds"})
    lines = [json.loads(line) for line in response.text.splitlines()]
    scores = [line["score"] for line in lines[:-1]]
    np.testing.assert_allclose(scores, expected_scores(kinds, x, codes), rtol=1e-3, atol=1e-3)
    params = {"model": "kinds", "condition": json.dumps({"kind": "?"})}
    assert client.post("/anomaly", content=content, headers=headers, params=params).status_code == 422


def test_array_takes_its_condition_from_the_query(client: httpx.Client, model: Artifact) -> None:
    x = digits().astype(np.float32)
    buffer = io.BytesIO()
    np.save(buffer, x)
    headers = {"Content-Type": npy.MEDIA_TYPE, "Accept": npy.MEDIA_TYPE}
    params = {"condition": json.dumps({"label": 8})}
    response = client.post("/encode", content=buffer.getvalue(), headers=headers, params=params)
    latents = np.load(io.BytesIO(response.content))
    np.testing.assert_allclose(latents, run(model.module.encode, with_label(x, 8))[0][:, :-10], rtol=1e-4, atol=1e-5)
    picture = client.post("/sample", json={"n": 4, "condition": {"label": "1"}}, headers={"Accept": "image/png"})
    assert picture.content.startswith(b"\x89PNG")


BAD = [
    ({"label": "12"}, "'label' has no level \"12\": expected '0', '1'", "/condition/label"),
    ({"label": [1]}, "'label' has no level a list of 1", "/condition/label"),
    ({"label": {"x": 1}}, "'label' has no level an object", "/condition/label"),
    ({"label": True}, "'label' has no level true", "/condition/label"),
    ({"label": 1.5}, "'label' has no level 1.5", "/condition/label"),
    ({"label": 10**30}, "'label' has no level", "/condition/label"),
    ({"label": "7" * 100_000}, "'label' has no level", "/condition/label"),
    ({"colour~/": "red"}, "the model knows no condition 'colour~/'", "/condition/colour~0~1"),
    ("7", "condition should be an object with 'label', got \"7\"", "/condition"),
    (7, "condition should be an object", "/condition"),
]


@pytest.mark.parametrize(("condition", "detail", "pointer"), BAD)
def test_condition_that_the_model_does_not_know_is_refused(
    client: httpx.Client, condition: Any, detail: str, pointer: str
) -> None:
    x, z = digits(1)[0].tolist(), [0.0] * 16
    for path, body in (
        ("/sample", {"n": 2}),
        ("/encode", {"inputs": [x]}),
        ("/decode", {"latents": [z]}),
        ("/reconstruct", {"inputs": [x]}),
        ("/interpolate", {"start": {"latent": z}, "end": {"latent": z}}),
        ("/edit", {"latent": z, "direction": "1"}),
        ("/neighbours", {"latents": [z]}),
        ("/anomaly", {"inputs": [x]}),
        ("/anomaly", {"records": [{}]}),
    ):
        problem = refused(client, path, {**body, "condition": condition})
        assert problem["detail"].startswith(detail), path
        assert len(problem["detail"]) < 300
        assert problem["pointer"] == pointer, path


@pytest.mark.parametrize("conditions", [[], [{"label": "1"}], [{}, {"label": "0"}, {}], [{"label": "1"}, 3]])
def test_list_of_conditions_must_have_one_object_for_each_row(client: httpx.Client, conditions: list[Any]) -> None:
    for path, body in (("/sample", {"n": 2}), ("/encode", {"inputs": digits(2).tolist()})):
        problem = refused(client, path, {**body, "condition": conditions})
        assert problem["pointer"] in ("/condition", "/condition/1")
    points = {"start": {"latent": [0.0] * 16}, "end": {"latent": [1.0] * 16}}
    assert refused(client, "/interpolate", {**points, "condition": conditions})["pointer"] == "/condition"


def test_long_list_of_conditions_is_read_like_a_short_one(client: httpx.Client) -> None:
    conditions = [{"label": str(row % 10)} for row in range(300)]
    body = json.dumps({"n": 300, "seed": 1, "condition": conditions}, indent=300)  # a body of some 300 KB
    headers = {"Content-Type": "application/json"}
    answer = client.post("/sample", content=body.encode(), headers=headers).json()
    assert answer["conditions"] == conditions


def test_model_without_conditions_refuses_a_condition_and_answers_without_one(client: httpx.Client) -> None:
    x, z = digits(1).tolist(), [[0.0] * 16]
    params = {"model": "plain"}
    latents = post(client, "/encode", {"inputs": x}, params=params)["latents"]
    for path, body in (
        ("/sample", {"n": 2}),
        ("/encode", {"inputs": x}),
        ("/decode", {"latents": latents}),
        ("/reconstruct", {"inputs": x}),
        ("/interpolate", {"start": {"input": x[0]}, "end": {"input": x[0]}}),
        ("/anomaly", {"inputs": x}),
        ("/neighbours", {"latents": z}),
    ):
        problem = refused(client, path, {**body, "condition": {"label": "7"}}, params=params)
        assert problem["detail"].startswith("plain knows no condition of a row"), path
        assert "--condition" in problem["hint"]
    assert "conditions" not in post(client, "/sample", {"n": 2}, params=params)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/impute", {"inputs": [[None, *[0.5] * 63]]}),
        ("/sample", {"given": [None, *[0.5] * 63]}),
    ],
)
def test_conditional_model_does_not_complete_rows(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    response = client.post(path, json=body)
    assert (response.status_code, response.json()["code"]) == (409, "not_supported"), response.text
    assert "without --condition" in response.json()["hint"]


def test_models_list_the_levels(client: httpx.Client) -> None:
    found = {entry["name"]: entry.get("conditions") for entry in client.get("/models").json()["models"]}
    assert found == {
        "digits": {"label": [str(digit) for digit in range(10)]},
        "kinds": {"kind": KINDS, "shift": SHIFTS},
        "plain": None,
    }
    assert client.get("/models/digits").json()["latents"] == 16


def test_backtest_refuses_a_conditional_model(client: httpx.Client) -> None:
    rows, _, _ = records(3)
    timed = [row | {"timestamp": 60 * number} for number, row in enumerate(rows)]
    problem = refused(client, "/backtest", {"records": timed}, params={"model": "kinds"})
    assert "knows conditions of rows, and a backtest does not" in problem["detail"]


def test_new_version_with_other_levels_is_served_without_a_restart(conditional_models: Path, tmp_path: Path) -> None:
    source = conditional_models / "artifacts"
    shutil.copytree(source / "digits", tmp_path / "m")
    settings = Settings(artifacts=tmp_path, poll_seconds=0.05, log_level="warning")
    with running(create_app(settings)) as client:
        post(client, "/sample", {"condition": {"label": "7"}})
        shutil.copytree(source / "kinds" / "1", tmp_path / "staged")
        (tmp_path / "staged").rename(tmp_path / "m" / "2")

        wait_until(lambda: client.get("/models/m").json()["version"] == 2)
        assert post(client, "/sample", {"condition": {"kind": "b"}})["conditions"][0]["kind"] == "b"
        assert "knows no condition 'label'" in refused(client, "/sample", {"condition": {"label": "7"}})["detail"]
        assert post(client, "/sample", {"condition": {"label": "7"}}, params={"model": "m@1"})["version"] == 1
