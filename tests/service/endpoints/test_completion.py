"""POST /impute, and /sample with given values: what the service answers is what the model's module computes."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch

from models.artifact import load
from models.pipeline import Pipeline
from models.scaling import ImputingScaling
from service.app import create_app
from service.inference.sampling import NoiseSource
from service.settings import Settings
from tests.models import builders
from tests.models.publishing import GAPS, publish_windowed
from tests.service.gate import Gate
from tests.service.hosts import HOST_FEATURES, host_records, host_rows
from tests.service.published import publish
from tests.service.running import post, running
from tests.service.serving import ROWS, serving, until
from training.adoption.adopt import adopt

pytestmark = pytest.mark.slow

Doubles = npt.NDArray[np.float64]
FIELDS = ("outputs", "std", "low", "high")


def with_gaps(rows: list[list[float]]) -> list[list[float | None]]:
    """Return `rows` without one value of each row."""
    return [
        [None if column == index % 4 else value for column, value in enumerate(row)] for index, row in enumerate(rows)
    ]


def to_array(rows: list[list[float | None]]) -> npt.NDArray[np.float32]:
    return np.array([[np.nan if value is None else value for value in row] for row in rows], np.float32)


def imputed(artifacts: Path, rows: list[list[float | None]]) -> dict[str, npt.NDArray[np.float32]]:
    """Return what the module of `hosts` computes for `rows`."""
    module = load(artifacts / "hosts" / "1" / "model.pt").module
    return dict(zip(FIELDS, (array.numpy() for array in module.impute(torch.from_numpy(to_array(rows)))), strict=True))


def test_impute_of_lists_and_records_gives_what_the_module_computes(hosts: httpx.Client, artifacts: Path) -> None:
    rows = with_gaps(host_rows(70))  # more than one part
    expected = imputed(artifacts, rows)
    records = [dict(zip(HOST_FEATURES, row, strict=True)) for row in rows]
    absent = [{name: value for name, value in record.items() if value is not None} for record in records]
    for body in ({"inputs": rows}, {"records": records}, {"records": absent}):
        answer = post(hosts, "/impute", body)
        assert answer["imputed"] == 70
        for name in FIELDS:
            assert np.array(answer[name]) == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name
    assert (np.array(answer["low"]) <= np.array(answer["outputs"])).all()


def test_impute_of_a_complete_row_returns_the_row(hosts: httpx.Client) -> None:
    answer = post(hosts, "/impute", {"inputs": host_rows(1)})
    assert answer["imputed"] == 0
    assert answer["std"] == [[0.0] * 4]
    for name in ("outputs", "low", "high"):
        assert np.array(answer[name]) == pytest.approx(np.array(host_rows(1)), rel=1e-6)


def test_impute_of_npy_with_nan_gives_the_rows_without_nan(hosts: httpx.Client, artifacts: Path) -> None:
    from io import BytesIO

    rows, content = with_gaps(host_rows(3)), BytesIO()
    np.save(content, to_array(rows))
    headers = {"content-type": "application/x-npy", "accept": "application/x-npy"}
    response = hosts.post("/impute", content=content.getvalue(), headers=headers)
    assert response.status_code == 200, response.text
    assert np.load(BytesIO(response.content)) == pytest.approx(imputed(artifacts, rows)["outputs"], rel=1e-6)


def test_impute_runs_no_further_rows_after_its_client_has_left(artifacts: Path) -> None:
    rows = json.dumps({"inputs": with_gaps(host_rows(200))}).encode()
    head = b"POST /impute?model=hosts HTTP/1.1\r\nHost: elbo\r\nContent-Type: application/json\r\n"

    async def check() -> None:
        async with serving(Settings(artifacts=artifacts)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), ROWS)
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + b"Content-Length: %d\r\n\r\n%b" % (len(rows), rows))
            await until(lambda: service.batcher.pending_rows > len(ROWS))
            writer.close()
            await until(lambda: service.batcher.pending_rows == len(ROWS))
            gate.open.set()
            await held
            sample = service.metrics.registry.get_sample_value
            labels = {"endpoint": "/impute", "model": "hosts", "version": "1", "status": "499"}
            assert sample("elbo_requests_total", labels) == 1
            assert not sample("elbo_batch_rows_sum", {"operation": "impute"})

    asyncio.run(check())


def test_given_values_stay_and_the_others_are_drawn_by_the_module(hosts: httpx.Client, artifacts: Path) -> None:
    body = {"given": {"cpu [%]": 1.5, "load": -2.0}, "n": 6, "seed": 9, "temperature": 0.5}
    answer = post(hosts, "/sample", body)
    source, module = NoiseSource(), load(artifacts / "hosts" / "1" / "model.pt").module
    normal, uniform = source.draw(9, 6, 2)
    row_noise = source.draw_rows(9, 6, 8)
    row = torch.tensor([[1.5, torch.nan, torch.nan, -2.0]])
    z, x_hat, rows = module.complete(row, *map(torch.from_numpy, (normal * 0.5, uniform, row_noise * 0.5)))
    assert np.array(answer["outputs"]) == pytest.approx(rows.numpy(), rel=1e-5, abs=1e-5)
    assert np.array(answer["latents"]) == pytest.approx(z.numpy(), rel=1e-5, abs=1e-5)
    assert np.array(answer["outputs"])[:, [0, 3]].tolist() == [[1.5, -2.0]] * 6
    plain = post(hosts, "/sample", {**body, "noise": False})
    assert np.array(plain["outputs"]) == pytest.approx(x_hat.numpy(), rel=1e-5, abs=1e-5)
    as_list = post(hosts, "/sample", {**body, "given": [1.5, None, None, -2.0]})
    assert as_list == answer
    fewer = post(hosts, "/sample", {**body, "n": 2})["outputs"]
    assert np.array(fewer) == pytest.approx(np.array(answer["outputs"][:2]))


def test_draws_are_in_the_range_of_the_rows_and_agree_with_impute(hosts: httpx.Client) -> None:
    rows = np.array(host_rows(400))
    drawn = np.array(post(hosts, "/sample", {"given": {"cpu": 0.5}, "n": 4000, "seed": 1})["outputs"])
    answer = post(hosts, "/impute", {"records": [{"cpu": 0.5}]})
    mean, std = np.array(answer["outputs"][0]), np.array(answer["std"][0])
    assert (np.abs(drawn.mean(axis=0) - mean) <= 0.07 * std + 1e-5).all()  # four standard errors
    assert drawn.std(axis=0) == pytest.approx(std, rel=0.05, abs=1e-5)
    assert (drawn >= rows.min(axis=0) - 1e-5).all()
    assert (drawn <= rows.max(axis=0) + 1e-5).all()


REFUSED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "unknown name": ("/sample", {"given": {"cpuu": 1.0}}, "/given/cpuu", "did you mean cpu?"),
    "unknown name of a record": ("/impute", {"records": [{"cpu": 1.0}, {"lod": 1.0}]}, "/records/1/lod", "load"),
    "wrong unit": ("/sample", {"given": {"cpu [GB]": 1.0}}, "/given/cpu [GB]", "cpu in %"),
    "two names of a feature": ("/sample", {"given": {"cpu": 1.0, "cpu [%]": 2.0}}, "/given/cpu [%]", "given twice"),
    "all given": ("/sample", {"given": host_records(host_rows(1))[0]}, "/given", "nothing is left to draw"),
    "none given": ("/sample", {"given": {}}, "/given", "every value of the row is missing"),
    "only null given": ("/sample", {"given": [None] * 4}, "/given", "every value of the row is missing"),
    "text given": ("/sample", {"given": {"cpu": "97"}}, "/given/cpu", "97"),
    "boolean given": ("/sample", {"given": {"cpu": True}}, "/given/cpu", "true"),
    "number beyond float32 given": ("/sample", {"given": {"cpu": 1e300}}, "/given/cpu", "overflows float32"),
    "too short": ("/sample", {"given": [1.0, None]}, "/given", "a list of 4 numbers"),
    "no object": ("/sample", {"given": 97}, "/given", "expected"),
    "other prior": ("/sample", {"given": {"cpu": 1.0}, "prior": "standard"}, "/prior", "no prior to choose"),
    "near and given": ("/sample", {"near": {"latent": [0, 0]}, "given": {"cpu": 1}}, "/given", "got near and given"),
    "near and prior": ("/sample", {"near": {"latent": [0, 0]}, "prior": "standard"}, "/prior", "got near and prior"),
    "near nothing": ("/sample", {"near": {}}, "/near", "needs either input or latent"),
    "near a short row": ("/sample", {"near": {"input": [1.0]}}, "/near/input", "a list of 4 numbers"),
    "spread alone": ("/sample", {"spread": 1.0}, "/spread", "near is missing"),
    "spread below 0": ("/sample", {"near": {"latent": [0, 0]}, "spread": -1}, "/spread", "greater than or equal to 0"),
    "too many samples": ("/sample", {"given": {"cpu": 1.0}, "n": 10**9}, "/n", "ELBO_MAX_ROWS"),
    "no rows": ("/impute", {"inputs": []}, "/inputs", "no rows"),
    "no records": ("/impute", {"records": {}}, "/records", "no records"),
    "row without values": ("/impute", {"inputs": [[1.0] * 4, [None] * 4]}, "/inputs/1", "every value"),
    "neither": ("/impute", {}, "", "expected one of the fields inputs or records"),
    "both": ("/impute", {"inputs": [[1.0] * 4], "records": [{"cpu": 1.0}]}, "", "got inputs and records"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_request_is_refused_and_the_error_says_where_and_why(hosts: httpx.Client, case: str) -> None:
    path, body, pointer, text = REFUSED[case]
    response = hosts.post(path, json=body)
    assert response.status_code == 422, response.text
    problem = response.json()
    assert (problem.get("pointer") or "") == pointer
    assert text in problem["detail"] + str(problem.get("hint")), problem


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_given_value_that_is_not_finite_is_refused(hosts: httpx.Client, value: str) -> None:
    response = hosts.post(
        "/sample", content=f'{{"given": {{"cpu": {value}}}}}', headers={"content-type": "application/json"}
    )
    assert response.status_code == 422, response.text


def test_models_say_whether_they_complete_rows(hosts: httpx.Client, others: httpx.Client) -> None:
    listed = {
        model["name"]: model["completes_rows"]
        for client in (hosts, others)
        for model in client.get("/models").json()["models"]
    }
    complete = {"hosts": True, "pca": True, "ae": True, "vae": True}
    incomplete = {"earlier": False, "earlier-gaps": False, "window": False, "slow": False}
    assert listed == complete | incomplete | {"adopted": True, "reconstructs": True}


def test_more_rows_than_allowed_are_refused(hosts: httpx.Client) -> None:
    rows = b'{"inputs":[' + b",".join([b"[1,2,3,null]"] * 100_001) + b"]}"
    response = hosts.post("/impute", content=rows, headers={"content-type": "application/json"})
    assert response.status_code == 413, response.text
    assert response.json()["code"] == "too_many_rows"


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield a client of a server with four models that cannot complete rows, and two adopted models that can.

    `earlier` and `earlier-gaps` are models of an earlier release; rows of the latter may have missing values. `window`
    has a window, and `slow` is an adopted network that is too slow for it. `reconstructs` has no latents.
    """
    root = tmp_path_factory.mktemp("others")
    complete = builders.pipeline("pca")
    parts = complete.scaling, complete.core, complete.prior, complete.calibration
    names = [f"x{i}" for i in range(builders.D)]
    publish(root, "earlier", Pipeline(*parts), builders.batch()[0], names, [builders.D])
    rows = builders.batch(gaps=GAPS)[0]
    scaling = ImputingScaling(complete.scaling, torch.from_numpy(np.nanmedian(rows.numpy(), axis=0)))
    publish(root, "earlier-gaps", Pipeline(scaling, *parts[1:]), rows, names, [builders.D])
    publish_windowed(root, "pca", "window")
    encoder, decoder = torch.nn.Linear(builders.D, 2), torch.nn.Linear(2, builders.D)
    module = torch.nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    normal, layer = np.random.RandomState(0).normal(size=(120, builders.D)), torch.nn.Linear(800, 800)
    slow = torch.nn.Sequential(torch.nn.Linear(builders.D, 800), *[layer] * 24, torch.nn.Linear(800, 2))
    for name, network in (
        ("adopted", module),
        ("reconstructs", torch.nn.Sequential(encoder, decoder)),
        ("slow", torch.nn.ModuleDict({"encoder": slow, "decoder": decoder})),
    ):
        adopt(network, normal, name=name, artifacts=root, feature_names=names)
    with running(create_app(Settings(artifacts=root, default_model="earlier", log_level="warning"))) as client:
        yield client


@pytest.mark.parametrize(
    ("model", "reason", "hint"),
    [
        ("earlier", "comes from an earlier release", "train the model again"),
        ("window", "judges windows", "without --window"),
        ("slow", "was adopted, and the network is too slow", "that elbo train has trained"),
    ],
    ids=["earlier", "window", "slow"],
)
@pytest.mark.parametrize(
    ("path", "body"), [("/impute", {"inputs": [[1.0, None]]}), ("/sample", {"given": {"x0": 1.0}})]
)
def test_model_that_cannot_complete_rows_says_what_to_do(
    others: httpx.Client, model: str, reason: str, hint: str, path: str, body: dict[str, Any]
) -> None:
    response = others.post(path, json=body, params={"model": model})
    problem = response.json()
    assert (response.status_code, problem["code"]) == (409, "not_supported"), problem
    assert reason in problem["detail"]
    assert hint in problem["hint"]
    assert others.post("/sample", json={"n": 2}, params={"model": model}).status_code == 200


@pytest.mark.parametrize("model", ["adopted", "reconstructs"])
def test_adopted_model_completes_rows_and_scores_rows_with_missing_values(others: httpx.Client, model: str) -> None:
    rows: list[list[float | None]] = np.random.RandomState(1).normal(size=(3, builders.D)).tolist()
    rows[1][0] = rows[2][builders.D - 1] = None
    answer = post(others, "/impute", {"inputs": rows}, params={"model": model})
    assert answer["imputed"] == 2
    low, high = np.array(answer["low"]), np.array(answer["high"])
    assert (low[1, 0] < high[1, 0], low[2, -1] < high[2, -1]) == (True, True)
    records = [{f"x{i}": value for i, value in enumerate(row) if value is not None} for row in rows]
    verdicts = post(others, "/anomaly", {"records": records}, params={"model": model})
    assert len(verdicts["results"]) == 3
    assert verdicts["errors"] == []


def test_model_of_an_earlier_release_judges_a_row_with_missing_values_with_the_medians(others: httpx.Client) -> None:
    features = others.get("/models/earlier-gaps").json()["features"]
    rows = builders.batch(gaps=GAPS)[0].numpy()
    assert np.isnan(rows).any()
    medians = np.array([feature["median"] for feature in features])
    filled = np.where(np.isnan(rows), medians, rows).tolist()
    incomplete = [[None if np.isnan(value) else value for value in row] for row in rows.tolist()]
    found, expected = (
        post(others, "/anomaly", {"inputs": content}, params={"model": "earlier-gaps"})["results"]
        for content in (incomplete, filled)
    )
    for name in ("score", "p_value", "severity"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=1e-5), name
    assert len({row["score"] for row in found}) > 1


def test_samples_near_a_row_scatter_around_its_latents_by_spread(hosts: httpx.Client) -> None:
    row = host_rows(1)[0]
    body = {"near": {"input": row}, "n": 4000, "seed": 2, "spread": 0.5, "noise": False}
    answer = post(hosts, "/sample", body)
    latents = np.array(answer["latents"])
    centre = np.array(post(hosts, "/encode", {"inputs": [row]})["latents"][0])
    unit = np.array(post(hosts, "/sample", {"n": 4000, "seed": 3})["latents"]).std(axis=0)
    assert latents.std(axis=0) == pytest.approx(0.5 * unit, rel=0.08)
    assert (np.abs(latents.mean(axis=0) - centre) < 0.04 * unit).all()
    decoded = post(hosts, "/decode", {"latents": answer["latents"][:5]})["outputs"]
    assert np.array(decoded) == pytest.approx(np.array(answer["outputs"][:5]), rel=1e-5, abs=1e-5)
    by_latent = post(hosts, "/sample", {**body, "near": {"latent": centre.tolist()}})
    assert np.array(by_latent["outputs"]) == pytest.approx(np.array(answer["outputs"]), rel=1e-5, abs=1e-4)
    assert post(hosts, "/sample", body) == answer


def test_samples_near_a_row_are_its_reconstruction_if_spread_is_zero(hosts: httpx.Client) -> None:
    row = host_rows(1)[0]
    answer = post(hosts, "/sample", {"near": {"input": row}, "n": 2, "spread": 0, "noise": False})
    expected = post(hosts, "/reconstruct", {"inputs": [row, row]})["outputs"]
    assert np.array(answer["outputs"]) == pytest.approx(np.array(expected), rel=1e-5, abs=1e-5)


def test_model_that_cannot_complete_rows_still_samples_near_a_row(others: httpx.Client) -> None:
    row = builders.batch()[0][0].tolist()
    answer = post(others, "/sample", {"near": {"input": row}, "n": 3}, params={"model": "earlier"})
    assert len(answer["outputs"]) == 3
