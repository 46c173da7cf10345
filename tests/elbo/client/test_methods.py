"""Every method of both clients, over both transports, gives what a plain JSON request gives."""

import math
from typing import Any

import httpx
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch

from elbo.client import BadRequest, Client, Model, NotFound, NotSupported, RowError, Verdict
from elbo.client.rows import to_ordered_array
from tests.elbo.client.conftest import Call
from tests.service.groups import records
from tests.service.hosts import HOST_FEATURES, host_rows
from tests.service.running import post

pytestmark = pytest.mark.slow
HOSTS = np.array(host_rows(8), np.float32)
HOST_RECORDS = [dict(zip(HOST_FEATURES, map(float, row), strict=True)) for row in HOSTS]


def equal(actual: Any, expected: Any) -> bool:
    """Return whether two arrays agree to the 1e-6 that the server promises for requests that may share a batch."""
    return np.allclose(actual, np.array(expected, np.float32), rtol=1e-5, atol=1e-6)


def test_encode_gives_the_latents_their_deviations_and_the_identity_of_the_model(
    call: Call, plain: httpx.Client, digits: np.ndarray
) -> None:
    found = call("encode", digits[:5])
    expected = post(plain, "/encode", {"inputs": digits[:5].tolist()})
    assert equal(found.latents, expected["latents"])
    assert equal(found.std, expected["std"])
    assert (found.model, found.version, found.seed, found.imputed) == ("digits", 1, None, 0)
    assert len(found.request_id) == 16
    assert found.latents.flags.writeable


def test_encode_with_sample_gives_the_latents_of_its_seed(call: Call, plain: httpx.Client, digits: np.ndarray) -> None:
    found = call("encode", digits[:5], sample=True, seed=7)
    expected = post(plain, "/encode", {"inputs": digits[:5].tolist(), "sample": True, "seed": 7})
    assert found.seed == 7
    assert equal(found.latents, expected["latents"])


def test_decode_and_reconstruct_give_rows(call: Call, plain: httpx.Client, digits: np.ndarray) -> None:
    latents = [[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]]
    decoded = call("decode", latents)
    assert equal(decoded.outputs, post(plain, "/decode", {"latents": latents})["outputs"])
    assert (decoded.model, decoded.version) == ("digits", 1)
    found = call("reconstruct", digits[:3])
    expected = post(plain, "/reconstruct", {"inputs": digits[:3].tolist()})
    assert equal(found.outputs, expected["outputs"])
    assert equal(found.errors, expected["errors"])


def test_sample_gives_the_same_rows_for_a_seed(call: Call, plain: httpx.Client) -> None:
    found = call("sample", 4, seed=3, temperature=0.5)
    expected = post(plain, "/sample", {"n": 4, "seed": 3, "temperature": 0.5})
    assert equal(found.outputs, expected["outputs"])
    assert equal(found.latents, expected["latents"])
    assert (found.seed, found.conditions) == (3, None)


def test_sample_without_a_seed_returns_the_seed_that_gives_the_same_rows_again(call: Call) -> None:
    first = call("sample", 2)
    assert np.array_equal(call("sample", 2, seed=first.seed).outputs, first.outputs)


def test_sample_has_the_given_values(call: Call) -> None:
    found = call("sample", 6, model="hosts", given={"cpu": 0.5}, seed=1)
    assert equal(found.outputs[:, 0], np.full(6, 0.5))


def test_condition_for_a_model_without_conditions_is_a_bad_request(call: Call) -> None:
    with pytest.raises(BadRequest, match="condition") as raised:
        call("sample", 2, condition={"label": "7"})
    assert (raised.value.status, raised.value.code) == (422, "invalid_field")


def test_interpolate_and_edit_give_paths(call: Call, plain: httpx.Client, digits: np.ndarray) -> None:
    found = call("interpolate", digits[0], {"latent": [0.0, 1.0, 0.0]}, steps=5, method="slerp")
    ends = {"start": {"input": digits[0].tolist()}, "end": {"latent": [0.0, 1.0, 0.0]}}
    expected = post(plain, "/interpolate", {**ends, "steps": 5, "method": "slerp"})
    assert equal(found.outputs, expected["outputs"])
    assert equal(found.latents, expected["latents"])
    found = call("edit", digits[0], "7", amount=0.5)
    assert equal(
        found.outputs,
        post(plain, "/edit", {"input": digits[0].tolist(), "direction": "7", "amount": 0.5})["outputs"],
    )


def test_impute_gives_the_same_for_arrays_records_and_frames(call: Call, plain: httpx.Client) -> None:
    rows = HOSTS.copy()
    rows[0, 1] = rows[3, 2] = np.nan
    inputs = [[None if np.isnan(value) else float(value) for value in row] for row in rows]
    expected = post(plain, "/impute?model=hosts", {"inputs": inputs})
    frames = pl.DataFrame(rows, schema=HOST_FEATURES), pd.DataFrame(rows, columns=HOST_FEATURES)
    further = frames[0].with_columns(pl.lit("web-1").alias("host")), frames[1].assign(time="2026-01-01")
    forms = [rows, *frames, *further, further[1][[*further[1].columns][::-1]]]
    for form in forms:
        found = call("impute", form, model="hosts")
        for name in ("outputs", "std", "low", "high"):
            assert equal(getattr(found, name), expected[name])
        assert found.imputed == 2


def test_impute_of_a_frame_without_any_feature_is_refused(call: Call) -> None:
    with pytest.raises(ValueError, match=r"the rows have no column .*; they have 'host'"):
        call("impute", pl.DataFrame({"host": ["web-1"]}), model="hosts")


def test_neighbours_gives_the_nearest_held_out_rows(call: Call, plain: httpx.Client, digits: np.ndarray) -> None:
    held_out = call("held_out")
    found = call("neighbours", digits[:2], n=3, values=True)
    latents = np.array(post(plain, "/encode", {"inputs": digits[:2].tolist()})["latents"])
    distances = np.linalg.norm(held_out.latents[None] - latents[:, None], axis=2)
    assert np.allclose(found.distances, np.sort(distances)[:, :3], atol=1e-4)
    assert np.array_equal(found.indices[:, 0], distances.argmin(axis=1))
    assert found.labels == [[str(held_out.labels[index]) for index in row] for row in found.indices]
    assert equal(found.values[0][0], held_out.inputs[found.indices[0, 0]])
    assert equal(call("neighbours", latents=latents, n=3).distances, found.distances)


def test_anomaly_gives_verdicts_and_the_errors_of_rows(call: Call, plain: httpx.Client) -> None:
    rows = [*HOST_RECORDS[:3], {**HOST_RECORDS[3], "cpu": 99.0}, {"cpu": "high"}]
    found = call("anomaly", rows, model="hosts", observe=False, explain=1, alpha=0.1)
    expected = post(plain, "/anomaly?model=hosts", {"records": rows, "observe": False, "explain": 1, "alpha": 0.1})
    assert (found.rows, found.anomalies, found.failed, found.alpha) == (5, expected["anomalies"], 1, 0.1)
    assert found.is_anomaly.tolist() == [each["is_anomaly"] for each in expected["results"]] + [False]
    assert found.is_anomaly[3]
    assert equal(found.array("p_value")[:4], [each["p_value"] for each in expected["results"]])
    assert np.isnan(found.array("score")[4])
    assert found.results[3].features[0].name == expected["results"][3]["features"][0]["name"]
    assert [(error.row, error.detail) for error in found.errors] == [(4, expected["errors"][0]["detail"])]


def test_score_gives_the_numbers_of_anomaly_as_arrays(call: Call) -> None:
    verdicts = call("anomaly", HOSTS, model="hosts", observe=False)
    scores = call("score", HOSTS, model="hosts", observe=False)
    for name in ("score", "p_value", "severity"):
        assert equal(getattr(scores, name), verdicts.array(name))
    assert scores.is_anomaly.tolist() == verdicts.is_anomaly.tolist()


@pytest.mark.parametrize("method", ["encode", "reconstruct", "score"])
def test_columns_are_found_by_name_in_frames_and_records(call: Call, method: str) -> None:
    options = {"observe": False} if method == "score" else {}
    field = {"encode": "latents", "reconstruct": "outputs", "score": "p_value"}[method]
    expected = getattr(call(method, HOSTS, model="hosts", **options), field)
    order = [2, 0, 3, 1]
    names = [HOST_FEATURES[place] for place in order]
    shuffled = pl.DataFrame(HOSTS[:, order], schema=names).with_columns(host=pl.lit("web-1"))
    for form in (shuffled, pd.DataFrame(shuffled.to_dict(as_series=False)), shuffled.to_dicts()):
        assert equal(getattr(call(method, form, model="hosts", **options), field), expected)


def test_frame_without_a_feature_is_refused_with_the_name_of_the_feature(call: Call) -> None:
    frame = pl.DataFrame(HOSTS, schema=HOST_FEATURES).drop("load")
    with pytest.raises(ValueError, match="no column 'load', which the model hosts needs"):
        call("encode", frame, model="hosts")


@pytest.mark.parametrize("kind", ["polars", "pandas", "records"])
def test_titles_with_the_unit_of_the_feature_are_found_and_other_units_are_refused(kind: str) -> None:
    features = [{"name": "cpu", "unit": "%"}, {"name": "temp", "unit": "°C"}, {"name": "errors", "unit": None}]
    model = Model("web", 1, "pca", (3,), 3, 2, ("cpu", "temp", "errors"), {"features": features})

    def array(titles: list[str]) -> list[list[float]]:
        frame = pl.DataFrame({title: [float(place)] for place, title in enumerate(titles)})
        forms: dict[str, Any] = {"polars": frame, "pandas": pd.DataFrame(frame.to_dict(as_series=False))}
        values: list[list[float]] = to_ordered_array(forms.get(kind, frame.to_dicts()), model).tolist()
        return values

    assert array(["errors", "temp  [°C]", "host", "cpu [%]"]) == [[3, 1, 0]]
    with pytest.raises(ValueError, match="no column 'temp', which the model web needs; they have 'errors', 'temp"):
        array(["errors", "temp [°F]", "cpu"])
    with pytest.raises(ValueError, match=r"'cpu' and 'cpu \[%\]' are both the feature 'cpu': remove one"):
        array(["cpu", "cpu [%]", "temp", "errors"])


@pytest.mark.parametrize("infinity", [math.inf, -math.inf, np.float32(np.inf)])
def test_infinite_value_in_a_record_is_an_error_of_its_row_and_not_a_missing_value(
    call: Call, address: str, infinity: float
) -> None:
    rows: list[dict[str, Any]] = [dict(each) for each in HOST_RECORDS[:3]]
    rows[1]["cpu"], rows[2]["cpu"] = infinity, None
    verdicts = call("anomaly", rows, model="hosts", observe=False)
    assert [(each.row, each.pointer) for each in verdicts.errors] == [(1, "/records/1/cpu")]
    assert "finite" in verdicts.errors[0].detail
    with Client(address, "hosts") as elbo:
        stream = list(elbo.anomaly_stream(rows, observe=False))
    assert [type(each).__name__ for each in stream] == ["Verdict", "RowError", "Verdict"]


def test_rows_may_be_tensors_and_lists(call: Call) -> None:
    expected = call("encode", HOSTS, model="hosts").latents
    assert equal(call("encode", torch.from_numpy(HOSTS), model="hosts").latents, expected)
    assert equal(call("encode", HOSTS.tolist(), model="hosts").latents, expected)
    assert equal(call("encode", HOSTS.astype(np.float64), model="hosts").latents, expected)


def test_rows_that_are_no_numbers_are_refused_before_they_are_sent(call: Call) -> None:
    with pytest.raises(TypeError, match="expected rows of numbers"):
        call("encode", ["a", "b"])


def test_feedback_backtest_and_peers_of_groups(call: Call, plain: httpx.Client) -> None:
    history = records(40, hosts=6)
    seen = call("anomaly", history, model="rows", observe=True)
    assert seen.rows == len(history)
    peers = call("peers", model="rows", n=2)
    expected = plain.get("/models/rows/peers", params={"n": 2}).json()
    assert (peers.limit, peers.compared, list(peers.groups)) == (
        expected["limit"], expected["compared"], expected["groups"]
    )  # fmt: skip
    feedback = call("feedback", "incident", history[-3:], model="rows")
    assert feedback.verdict == "incident"
    assert sum(group["rows"] for group in feedback.groups) == 3
    report = call("backtest", history, model="rows", alphas=[0.05])
    assert report.report == post(plain, "/backtest?model=rows", {"records": history, "alphas": [0.05]})


def test_frames_with_times_and_groups_are_judged_like_records(call: Call) -> None:
    history = records(10)
    expected = call("anomaly", history, model="rows", observe=False)
    frame = pl.DataFrame(history).with_columns(pl.from_epoch("ts"))
    for form in (frame, pd.DataFrame(frame.to_dict(as_series=False))):
        found = call("anomaly", form, model="rows", observe=False)
        assert [each.group for each in found.results] == [each.group for each in expected.results]
        assert [each.time for each in found.results] == [each.time for each in expected.results]
        assert equal(found.array("score"), expected.array("score"))


def test_information_about_the_server_and_its_models(call: Call, plain: httpx.Client) -> None:
    assert call("health") is True
    assert call("ready") is True
    listed = call("models")
    assert listed.default == "digits"
    assert {model.name for model in listed.models} == {"digits", "hosts", "rows", "windows"}
    model = call("model", "hosts")
    assert (model.features, model.kind, model.width, model.latents) == (tuple(HOST_FEATURES), "pca", 4, 3)
    assert call("model").name == "digits"
    assert call("card") == plain.get("/models/digits/card").text
    assert equal(call("calibration").scores, plain.get("/models/digits/calibration").json()["scores"])


def test_errors_have_the_status_the_code_the_place_and_the_request_id(call: Call, digits: np.ndarray) -> None:
    with pytest.raises(NotFound, match="model 'nope' is not served") as missing:
        call("encode", digits[:1], model="nope")
    assert (missing.value.status, missing.value.code) == (404, "model_not_found")
    assert "request id " + missing.value.request_id in str(missing.value)
    with pytest.raises(BadRequest) as wrong:
        call("encode", [[1.0, 2.0]])
    assert (wrong.value.status, wrong.value.code, wrong.value.pointer) == (422, "invalid_rows", "/inputs")
    with pytest.raises(NotSupported) as unsupported:
        call("peers")
    assert unsupported.value.status == 409


@pytest.mark.parametrize("kind", ["array", "frame"])
def test_large_arrays_are_computed_in_parts_by_one_version(address: str, plain: httpx.Client, kind: str) -> None:
    rows = np.array(host_rows(1000), np.float32)
    form = rows if kind == "array" else pl.DataFrame(rows, schema=HOST_FEATURES)
    before = requests_to(plain, "/encode")
    with Client(address, "hosts", chunk_rows=300) as client:
        found = client.encode(form)
    assert requests_to(plain, "/encode") - before == 4
    assert equal(found.latents, post(plain, "/encode?model=hosts", {"inputs": rows.tolist()})["latents"])


def test_stream_gives_a_verdict_or_an_error_per_row_in_order(call: Call, address: str) -> None:
    rows = [HOST_RECORDS[0], {"cpu": "high"}, HOSTS[1].tolist(), {**HOST_RECORDS[2], "cpu": 99.0}]
    with Client(address, "hosts") as client, client.anomaly_stream(rows, observe=False) as stream:
        found = list(stream)
    assert [type(each) for each in found] == [Verdict, RowError, Verdict, Verdict]
    assert [each.row for each in found] == [0, 1, 2, 3]
    expected = call("anomaly", [*rows[:1], HOST_RECORDS[1], *rows[3:]], model="hosts", observe=False)
    scores = [each.score for each in found if isinstance(each, Verdict)]
    assert equal(scores, expected.array("score"))
    assert stream.summary is not None
    assert (stream.summary.rows, stream.summary.failed, stream.summary.anomalies) == (4, 1, expected.anomalies)


def requests_to(plain: httpx.Client, endpoint: str) -> float:
    """Return how many requests to `endpoint` the server has answered."""
    lines = plain.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith("elbo_requests_total{") and f'endpoint="{endpoint}"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in found)
