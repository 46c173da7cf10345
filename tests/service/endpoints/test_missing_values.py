"""Rows with missing values: where they are allowed, how they are imputed, and how responses report them."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from models import artifact
from models.calibration import Calibration
from models.pipeline import Pipeline
from models.prior import gaussian_prior
from models.scaling import ImputingScaling, standardise
from service.app import create_app
from service.codec.row_arrays import parse_array
from service.codec.row_lists import parse_rows
from service.codec.row_records import parse_valid_records
from service.codec.row_schema import RowSchema
from service.errors import InvalidRows
from service.settings import Settings
from tests.data import values
from tests.service.hosts import HOST_FEATURES, host_table
from tests.service.published import publish
from tests.service.running import post, running
from training.fitting.completion import with_completion
from training.fitting.pca import fit_pca

OPTIONAL = (1, 3)  # columns with missing values in training
GOOD = [0.5, 110.0, 0.7, -2.0]
NPY = {"content-type": "application/x-npy"}


def rows_with_gaps() -> torch.Tensor:
    """Return the 400 host rows, with a fifth of the values in columns 1 and 3 missing.

    Row 0 lacks both values, and row 1 lacks neither.
    """
    x = torch.from_numpy(values(host_table()))
    x[:, OPTIONAL] = x[:, OPTIONAL].masked_fill(
        torch.rand(400, 2, generator=torch.Generator().manual_seed(0)) < 0.2, torch.nan
    )
    x[0, OPTIONAL], x[1] = torch.nan, torch.tensor(GOOD)
    return x


@pytest.fixture(scope="module")
def medians() -> np.ndarray:
    return np.asarray(np.nanmedian(rows_with_gaps().numpy(), axis=0))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, medians: np.ndarray) -> Iterator[httpx.Client]:
    """Return a client of a service with one model, hosts, which imputes its columns 1 and 3."""
    root, x, fill = tmp_path_factory.mktemp("artifacts"), rows_with_gaps(), torch.from_numpy(medians)
    scaling = ImputingScaling(standardise(torch.where(x.isnan(), fill, x)), fill)
    core = fit_pca(scaling(x).double(), 2).float()
    calibration = Calibration(core.score(scaling(x))[0])
    publish(root, "hosts", Pipeline(scaling, core, gaussian_prior(torch.ones(2)), calibration), x, HOST_FEATURES, [4])
    with running(create_app(Settings(artifacts=root))) as client:
        yield client


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one model, hosts, which scores rows with missing values."""
    root, x = tmp_path_factory.mktemp("gaps"), torch.from_numpy(values(host_table()))
    scaling = standardise(x)
    core = fit_pca(scaling(x).double(), 2).float()
    plain = Pipeline(scaling, core, gaussian_prior(torch.ones(2)), Calibration(core.score(scaling(x))[0]))
    publish(root, "hosts", with_completion(plain, x[:200], x[200:], seed=0), x, HOST_FEATURES, [4])
    return root


@pytest.fixture(scope="module")
def scoring(root: Path) -> Iterator[httpx.Client]:
    """Return a client of a service with the model of `root`."""
    with running(create_app(Settings(artifacts=root))) as client:
        yield client


def impute(row: list[Any], medians: np.ndarray) -> list[float]:
    return [float(median) if value is None else value for value, median in zip(row, medians, strict=True)]


INCOMPLETE: list[list[Any]] = [[0.5, None, 0.7, -2.0], GOOD, [0.5, None, 0.7, None]]


def test_missing_value_is_scored_like_the_median_of_the_training_rows(
    client: httpx.Client, medians: np.ndarray
) -> None:
    incomplete = post(client, "/anomaly", {"inputs": INCOMPLETE, "explain": 4})
    whole = post(client, "/anomaly", {"inputs": [impute(row, medians) for row in INCOMPLETE], "explain": 4})
    for result, expected in zip(incomplete["results"], whole["results"], strict=True):
        assert result["score"] == pytest.approx(expected["score"], rel=1e-5)
        for feature, other in zip(result["features"], expected["features"], strict=True):
            assert feature["name"] == other["name"]
            assert feature["expected"] == pytest.approx(other["expected"], rel=1e-5)
            assert feature["contribution"] == pytest.approx(other["contribution"], rel=1e-4)
    assert all("imputed" not in result for result in whole["results"])


def test_verdict_lists_missing_features_and_gives_them_no_value(client: httpx.Client) -> None:
    results = post(client, "/anomaly", {"inputs": INCOMPLETE, "explain": 4})["results"]
    assert [result.get("imputed") for result in results] == [["memory/used"], None, ["memory/used", "load"]]
    values = [{feature["name"]: feature["value"] for feature in result["features"]} for result in results]
    assert values[0]["memory/used"] is None
    assert values[0]["cpu"] == 0.5
    assert values[1]["memory/used"] == 110.0
    assert (values[2]["memory/used"], values[2]["load"]) == (None, None)


def test_record_gets_the_same_verdict_whether_a_key_is_absent_or_null(client: httpx.Client) -> None:
    whole = dict(zip(HOST_FEATURES, GOOD, strict=True))
    null = whole | {"memory/used": None, "load": None}
    absent = {name: value for name, value in whole.items() if name not in ("memory/used", "load")}
    responses = [post(client, "/anomaly", {"records": records}) for records in ([null], [absent])]
    assert responses[0] == responses[1]
    assert responses[0]["results"] == post(client, "/anomaly", {"inputs": [INCOMPLETE[2]]})["results"]
    mixed = post(client, "/anomaly", {"records": [absent, whole, null | {"rack": "a"}]})
    assert mixed["unknown_fields"] == 1
    assert [result.get("imputed") for result in mixed["results"]] == [
        ["memory/used", "load"], None, ["memory/used", "load"],
    ]  # fmt: skip


def test_responses_of_encode_reconstruct_and_interpolate_count_missing_values(
    client: httpx.Client, medians: np.ndarray
) -> None:
    whole = {"inputs": [impute(row, medians) for row in INCOMPLETE]}
    for path, field in (("/encode", "latents"), ("/reconstruct", "outputs")):
        incomplete, plain = post(client, path, {"inputs": INCOMPLETE}), post(client, path, whole)
        np.testing.assert_allclose(incomplete[field], plain[field], rtol=1e-5, atol=1e-5)
        assert incomplete["imputed"] == 3
        assert "imputed" not in plain
    assert post(client, "/encode", {"inputs": INCOMPLETE, "sample": True, "seed": 1})["imputed"] == 3
    ends = {"start": {"input": INCOMPLETE[0]}, "end": {"latent": [0, 0]}, "steps": 2}
    assert post(client, "/interpolate", ends)["imputed"] == 1


def test_reconstruction_error_is_the_mean_over_the_present_values(client: httpx.Client) -> None:
    response = post(client, "/reconstruct", {"inputs": INCOMPLETE})
    x = np.array(INCOMPLETE, np.float32)
    expected = np.nanmean((np.array(response["outputs"]) - x) ** 2, axis=1)
    np.testing.assert_allclose(response["errors"], expected, rtol=1e-4)


def npy(x: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["<f4", ">f8"])
def test_nan_in_npy_rows_is_treated_like_null_in_json(client: httpx.Client, dtype: str) -> None:
    body = npy(np.array(INCOMPLETE, dtype))
    for path in ("/anomaly", "/encode", "/reconstruct"):
        response = client.post(path, content=body, headers=NPY)
        assert response.status_code == 200, response.text
        assert response.json() == post(client, path, {"inputs": INCOMPLETE})


@pytest.mark.parametrize(
    ("row", "pointer"),
    [
        ([None, 110.0, 0.7, -2.0], "/inputs/1/0"),
        ([0.5, None, None, -2.0], "/inputs/1/2"),
        ([0.5, "x", None, -2.0], "/inputs/1/1"),
        ([0.5, None, 0.7, 1e39], "/inputs/1/3"),
        ([0.5, True, 0.7, None], "/inputs/1/1"),
        ([0.5, None, 0.7], "/inputs/1"),
        ([None, None, None, None], "/inputs/1"),
    ],
)
def test_missing_required_value_is_refused_with_its_pointer(client: httpx.Client, row: list[Any], pointer: str) -> None:
    problem = client.post("/encode", json={"inputs": [GOOD, row]}).json()
    assert (problem["code"], problem["pointer"]) == ("invalid_rows", pointer)
    response = post(client, "/anomaly", {"inputs": [GOOD, row]})
    assert [error["pointer"] for error in response["errors"]] == [pointer]


@pytest.mark.parametrize(
    ("row", "place"),
    [
        ([np.nan, 110.0, 0.7, -2.0], "/0"),
        ([0.5, np.nan, np.nan, -2.0], "/2"),
        ([0.5, np.nan, 0.7, 1e39], "/3"),
        ([0.5, -np.inf, 0.7, np.nan], "/1"),
        ([np.nan] * 4, ""),
    ],
)
def test_missing_required_value_in_npy_is_refused(client: httpx.Client, row: list[float], place: str) -> None:
    body = npy(np.array([GOOD, row]))
    assert client.post("/encode", content=body, headers=NPY).json()["pointer"] == f"/inputs/1{place}"
    errors = client.post("/anomaly", content=body, headers=NPY).json()["errors"]
    assert [error["pointer"] for error in errors] == [f"/inputs/1{place}"]


def test_refused_request_gets_a_hint_about_the_features_that_may_be_missing(client: httpx.Client) -> None:
    problem = client.post("/encode", json={"inputs": [[None, 1, 1, 1]]}).json()
    assert "missing > 0" in problem["hint"]
    features = client.get("/models/hosts").json()["features"]
    assert [feature["missing"] > 0 for feature in features] == [False, True, False, True]


def test_nan_in_json_is_refused_with_a_hint_to_use_null(client: httpx.Client) -> None:
    body = '{"inputs": [[0.5, NaN, 0.7, null]]}'
    problem = client.post("/encode", content=body, headers={"content-type": "application/json"}).json()
    assert problem["pointer"] == "/inputs/0/1"
    assert "null" in problem["hint"]


@pytest.mark.parametrize("without", ["cpu", "disk~io"])
def test_error_names_only_the_missing_feature_of_a_record_if_impute_is_off(client: httpx.Client, without: str) -> None:
    record = {"cpu": 1.0, "disk~io": 1.0}
    del record[without]
    problem = client.post("/anomaly", json={"records": [record], "impute": False}).json()
    assert problem["detail"] == f"the record has no value for {without}"
    assert (problem["expected"], problem["got"]) == ("numbers for all 2 required features", "1 of them")


@pytest.mark.parametrize("gap", [{}, {"cpu": None}])
def test_record_is_imputed_if_at_most_half_of_its_required_features_are_missing(
    client: httpx.Client, medians: np.ndarray, gap: dict[str, None]
) -> None:
    whole = dict(zip(HOST_FEATURES, GOOD, strict=True))
    record = {name: value for name, value in whole.items() if name != "cpu"} | gap
    (result,) = post(client, "/anomaly", {"records": [record], "explain": 4})["results"]
    assert result["imputed"] == ["cpu"]
    assert {f["name"]: f["value"] for f in result["features"]}["cpu"] is None
    (same,) = post(client, "/anomaly", {"records": [record | {"cpu": float(medians[0])}]})["results"]
    assert result["score"] == pytest.approx(same["score"], rel=1e-5)
    assert result["p_value"] == same["p_value"]
    problem = client.post("/anomaly", json={"records": [{"memory/used": 1.0, "load": 2.0}]}).json()
    assert problem["detail"] == "the record has no value for cpu, disk~io"
    assert problem["expected"] == "numbers for at least 1 of the 2 required features"


def test_nested_rows_may_have_missing_values() -> None:
    schema = RowSchema([2, 2], "abcd", [False, True, False, True])
    x = parse_rows(schema, [[[1, None], [3, 4]], [[1, 2], [3, None]], [1, None, 3, None]], "/inputs", True)
    np.testing.assert_array_equal(x, np.array([[1, np.nan, 3, 4], [1, 2, 3, np.nan], [1, np.nan, 3, np.nan]]))
    with pytest.raises(InvalidRows) as caught:
        parse_rows(schema, [[[1, None], [None, 4]]], "/inputs", False)
    assert caught.value.pointer == "/inputs/0/1/0"


def test_row_is_refused_if_every_value_is_missing(client: httpx.Client) -> None:
    schema = RowSchema([2], "ab", [True, True])
    for read in (
        lambda: parse_rows(schema, [[None, None]], "/inputs", False),
        lambda: parse_valid_records(schema, [{"c": 1}], "/records", may_contain_non_floats=False),
        lambda: parse_array(schema, np.array([[np.nan, np.nan]]), "/inputs"),
    ):
        with pytest.raises(InvalidRows, match="every value of the row is missing"):
            read()
    assert client.post("/anomaly", json={"records": [{"host": "a"}]}).json()["got"] == "0 of them"


WHOLE = dict(zip(HOST_FEATURES, GOOD, strict=True))
RECORDS = [{"cpu": 0.5, "disk~io": 0.7}, WHOLE, {"memory/used": 110.0, "load": -2.0}]


def test_rows_with_gaps_get_the_scores_that_the_module_computes_for_them(scoring: httpx.Client, root: Path) -> None:
    module = artifact.load(root / "hosts" / "1" / "model.pt").module
    names = list(HOST_FEATURES)
    x = torch.tensor([[record.get(name, np.nan) for name in names] for record in RECORDS])
    score, parts, contribution, expected = artifact.score(module, x)
    results = post(scoring, "/anomaly", {"records": RECORDS, "explain": 4})["results"]
    for index, result in enumerate(results):
        assert result["score"] == pytest.approx(float(score[index]), rel=1e-5)
        assert result["p_value"] == pytest.approx(float(module.p_value(score)[index]), rel=1e-5)
        assert list(result["parts"].values()) == pytest.approx(parts[index].tolist(), rel=1e-4, abs=1e-5)
        for feature in result["features"]:
            column = names.index(feature["name"])
            assert feature["contribution"] == pytest.approx(float(contribution[index, column]), rel=1e-4, abs=1e-5)
            assert feature["expected"] == pytest.approx(float(expected[index, column]), rel=1e-4)
            if feature["name"] not in RECORDS[index]:
                assert (feature["value"], feature["contribution"]) == (None, 0.0)
    assert [len(result.get("imputed", [])) for result in results] == [2, 0, 2]


def test_rows_with_gaps_get_the_same_verdicts_in_a_stream_as_in_a_request(scoring: httpx.Client) -> None:
    whole = post(scoring, "/anomaly", {"records": RECORDS})["results"]
    headers = dict.fromkeys(("content-type", "accept"), "application/x-ndjson")
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    answer = scoring.post("/anomaly", content=lines, headers=headers)
    streamed = [json.loads(line) for line in answer.text.splitlines() if '"score"' in line]
    assert [each["score"] for each in streamed] == pytest.approx([each["score"] for each in whole], rel=1e-5)
    assert [each["is_anomaly"] for each in streamed] == [each["is_anomaly"] for each in whole]


def test_request_of_many_rows_with_gaps_is_answered_in_order(scoring: httpx.Client) -> None:
    records = [{"cpu": 0.01 * index, "disk~io": 0.7} if index % 3 else RECORDS[1] for index in range(300)]
    answer = post(scoring, "/anomaly", {"records": records, "explain": 0})
    single = [
        post(scoring, "/anomaly", {"records": [records[index]]})["results"][0]["score"] for index in (1, 149, 299)
    ]
    scores = [result["score"] for result in answer["results"]]
    assert [scores[index] for index in (1, 149, 299)] == pytest.approx(single, rel=1e-5)
    assert len(set(scores[::3])) == 1
