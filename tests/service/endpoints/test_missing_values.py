"""Rows that lack values: where they may, what stands for them, and what the answers say of it."""

import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch

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
from training.fitting.pca import fit_pca

LACKING = (1, 3)  # columns of which values are missing in training
GOOD = [0.5, 110.0, 0.7, -2.0]
NPY = {"content-type": "application/x-npy"}


def rows_with_gaps() -> torch.Tensor:
    """The hosts' 400 rows, a fifth of columns 1 and 3 missing; the first has both gaps, the second none."""
    x = torch.from_numpy(values(host_table()))
    x[:, LACKING] = x[:, LACKING].masked_fill(
        torch.rand(400, 2, generator=torch.Generator().manual_seed(0)) < 0.2, torch.nan
    )
    x[0, LACKING], x[1] = torch.nan, torch.tensor(GOOD)
    return x


@pytest.fixture(scope="module")
def medians() -> np.ndarray:
    return np.asarray(np.nanmedian(rows_with_gaps().numpy(), axis=0))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, medians: np.ndarray) -> Iterator[httpx.Client]:
    """A client of a service with one model, hosts, which imputes its columns 1 and 3."""
    root, x, fill = tmp_path_factory.mktemp("artifacts"), rows_with_gaps(), torch.from_numpy(medians)
    scaling = ImputingScaling(standardise(torch.where(x.isnan(), fill, x)), fill)
    core = fit_pca(scaling(x).double(), 2).float()
    calibration = Calibration(core.score(scaling(x))[0])
    publish(root, "hosts", Pipeline(scaling, core, gaussian_prior(torch.ones(2)), calibration), x, HOST_FEATURES, [4])
    with running(create_app(Settings(artifacts=root))) as client:
        yield client


def filled(row: list[Any], medians: np.ndarray) -> list[float]:
    return [float(median) if value is None else value for value, median in zip(row, medians, strict=True)]


GAPPED: list[list[Any]] = [[0.5, None, 0.7, -2.0], GOOD, [0.5, None, 0.7, None]]


def test_a_missing_value_is_judged_as_the_training_median(client: httpx.Client, medians: np.ndarray) -> None:
    gapped = post(client, "/anomaly", {"inputs": GAPPED, "explain": 4})
    whole = post(client, "/anomaly", {"inputs": [filled(row, medians) for row in GAPPED], "explain": 4})
    for mine, theirs in zip(gapped["results"], whole["results"], strict=True):
        assert mine["score"] == pytest.approx(theirs["score"], rel=1e-5)
        for feature, other in zip(mine["features"], theirs["features"], strict=True):
            assert feature["name"] == other["name"]
            assert feature["expected"] == pytest.approx(other["expected"], rel=1e-5)
            assert feature["contribution"] == pytest.approx(other["contribution"], rel=1e-4)
    assert all("imputed" not in result for result in whole["results"])


def test_a_verdict_names_what_was_missing_and_gives_it_no_value(client: httpx.Client) -> None:
    results = post(client, "/anomaly", {"inputs": GAPPED, "explain": 4})["results"]
    assert [result.get("imputed") for result in results] == [["memory/used"], None, ["memory/used", "load"]]
    values = [{feature["name"]: feature["value"] for feature in result["features"]} for result in results]
    assert values[0]["memory/used"] is None
    assert values[0]["cpu"] == 0.5
    assert values[1]["memory/used"] == 110.0
    assert (values[2]["memory/used"], values[2]["load"]) == (None, None)


def test_records_may_lack_a_key_or_say_null(client: httpx.Client) -> None:
    whole = dict(zip(HOST_FEATURES, GOOD, strict=True))
    null = whole | {"memory/used": None, "load": None}
    absent = {name: value for name, value in whole.items() if name not in ("memory/used", "load")}
    answers = [post(client, "/anomaly", {"records": records}) for records in ([null], [absent])]
    assert answers[0] == answers[1]
    assert answers[0]["results"] == post(client, "/anomaly", {"inputs": [GAPPED[2]]})["results"]
    mixed = post(client, "/anomaly", {"records": [absent, whole, absent | {"rack": "a"}]})
    assert mixed["unknown_fields"] == 1
    assert [result.get("imputed") for result in mixed["results"]] == [
        ["memory/used", "load"], None, ["memory/used", "load"],
    ]  # fmt: skip


def test_encode_and_reconstruct_count_what_was_missing(client: httpx.Client, medians: np.ndarray) -> None:
    whole = {"inputs": [filled(row, medians) for row in GAPPED]}
    for path, field in (("/encode", "latents"), ("/reconstruct", "outputs")):
        gapped, plain = post(client, path, {"inputs": GAPPED}), post(client, path, whole)
        np.testing.assert_allclose(gapped[field], plain[field], rtol=1e-5, atol=1e-5)
        assert gapped["imputed"] == 3
        assert "imputed" not in plain
    assert post(client, "/encode", {"inputs": GAPPED, "sample": True, "seed": 1})["imputed"] == 3
    ends = {"start": {"input": GAPPED[0]}, "end": {"latent": [0, 0]}, "steps": 2}
    assert post(client, "/interpolate", ends)["imputed"] == 1


def test_errors_of_reconstruct_are_over_the_values_that_were_there(client: httpx.Client) -> None:
    answer = post(client, "/reconstruct", {"inputs": GAPPED})
    x = np.array(GAPPED, np.float32)
    expected = np.nanmean((np.array(answer["outputs"]) - x) ** 2, axis=1)
    np.testing.assert_allclose(answer["errors"], expected, rtol=1e-4)


def npy(x: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["<f4", ">f8"])
def test_npy_rows_may_hold_nan_where_json_may_hold_null(client: httpx.Client, dtype: str) -> None:
    body = npy(np.array(GAPPED, dtype))
    for path in ("/anomaly", "/encode", "/reconstruct"):
        response = client.post(path, content=body, headers=NPY)
        assert response.status_code == 200, response.text
        assert response.json() == post(client, path, {"inputs": GAPPED})


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
def test_what_may_not_be_missing_is_refused_with_its_place(client: httpx.Client, row: list[Any], pointer: str) -> None:
    problem = client.post("/encode", json={"inputs": [GOOD, row]}).json()
    assert (problem["code"], problem["pointer"]) == ("invalid_rows", pointer)
    answer = post(client, "/anomaly", {"inputs": [GOOD, row]})
    assert [error["pointer"] for error in answer["errors"]] == [pointer]


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
def test_in_npy_too_what_may_not_be_missing_is_refused(client: httpx.Client, row: list[float], place: str) -> None:
    body = npy(np.array([GOOD, row]))
    assert client.post("/encode", content=body, headers=NPY).json()["pointer"] == f"/inputs/1{place}"
    errors = client.post("/anomaly", content=body, headers=NPY).json()["errors"]
    assert [error["pointer"] for error in errors] == [f"/inputs/1{place}"]


def test_a_refusal_says_where_values_may_be_missing(client: httpx.Client) -> None:
    problem = client.post("/encode", json={"inputs": [[None, 1, 1, 1]]}).json()
    assert "missing > 0" in problem["hint"]
    told = client.get("/models/hosts").json()["features"]
    assert [feature["missing"] > 0 for feature in told] == [False, True, False, True]


def test_a_nan_in_json_is_refused_with_the_way_to_say_it(client: httpx.Client) -> None:
    body = '{"inputs": [[0.5, NaN, 0.7, null]]}'
    problem = client.post("/encode", content=body, headers={"content-type": "application/json"}).json()
    assert problem["pointer"] == "/inputs/0/1"
    assert "null" in problem["hint"]


@pytest.mark.parametrize("without", ["cpu", "disk~io"])
def test_a_record_without_what_must_be_there_names_it_alone(client: httpx.Client, without: str) -> None:
    record = {"cpu": 1.0, "disk~io": 1.0}
    del record[without]
    problem = client.post("/anomaly", json={"records": [record], "impute": False}).json()
    assert problem["detail"] == f"the record has no value for {without}"
    assert (problem["expected"], problem["got"]) == ("numbers for all 2 required features", "1 of them")


@pytest.mark.parametrize("gap", [{}, {"cpu": None}])
def test_a_record_may_lack_what_never_lacked_in_training_up_to_half_of_it(
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


def test_nested_rows_may_lack_values_too() -> None:
    schema = RowSchema([2, 2], "abcd", [False, True, False, True])
    x = parse_rows(schema, [[[1, None], [3, 4]], [[1, 2], [3, None]], [1, None, 3, None]], "/inputs", True)
    np.testing.assert_array_equal(x, np.array([[1, np.nan, 3, 4], [1, 2, 3, np.nan], [1, np.nan, 3, np.nan]]))
    with pytest.raises(InvalidRows) as caught:
        parse_rows(schema, [[[1, None], [None, 4]]], "/inputs", False)
    assert caught.value.pointer == "/inputs/0/1/0"


def test_a_row_of_which_all_may_be_missing_must_hold_something(client: httpx.Client) -> None:
    schema = RowSchema([2], "ab", [True, True])
    for read in (
        lambda: parse_rows(schema, [[None, None]], "/inputs", False),
        lambda: parse_valid_records(schema, [{"c": 1}], "/records", may_contain_non_floats=False),
        lambda: parse_array(schema, np.array([[np.nan, np.nan]]), "/inputs"),
    ):
        with pytest.raises(InvalidRows, match="every value of the row is missing"):
            read()
    assert client.post("/anomaly", json={"records": [{"host": "a"}]}).json()["got"] == "0 of them"
