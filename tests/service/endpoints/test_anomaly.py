"""Verdicts of /anomaly, compared with the artifact, SciPy's Benjamini-Hochberg and the definition of each field."""

import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from models.artifact import Artifact, load
from models.calibration import Calibration
from service.anomaly.verdicts import benjamini_hochberg
from tests.service.hosts import HOST_FEATURES, host_table
from tests.service.running import post


def column(response: dict[str, Any], name: str) -> np.ndarray:
    return np.array([result[name] for result in response["results"]])


@pytest.fixture(scope="module")
def mixed(digits: np.ndarray) -> np.ndarray:
    """Return 20 digits and 10 rows of noise."""
    return np.concatenate((digits[:20], np.random.default_rng(0).random((10, 64)).astype(np.float32)))


@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001])
def test_every_field_of_the_response_matches_the_artifact(
    client: httpx.Client, vae: Artifact, mixed: np.ndarray, alpha: float
) -> None:
    response = post(client, "/anomaly", {"inputs": mixed.tolist(), "alpha": alpha, "extrapolated": True})
    with torch.inference_mode():
        score, parts, _, _ = vae.module.score(torch.from_numpy(mixed))
        severity = vae.module.severity(score, alpha)
        p_value, threshold = vae.module.p_value(score), float(vae.module.threshold(alpha))
    np.testing.assert_allclose(column(response, "score"), score, rtol=1e-5)
    np.testing.assert_allclose(column(response, "p_value"), p_value, rtol=1e-6)
    np.testing.assert_allclose(column(response, "severity"), severity, rtol=1e-4)
    np.testing.assert_allclose([list(p.values()) for p in column(response, "parts")], parts, rtol=1e-4, atol=1e-4)
    assert list(response["results"][0]["parts"]) == vae.manifest.parts
    assert response["threshold"] == pytest.approx(threshold, rel=1e-6)
    assert response["alpha"] == alpha
    assert response["calibration"] == {"rows": 359, "floor": 1 / 360}
    assert response["extrapolated"] == (alpha < 1 / 360)
    assert column(response, "row").tolist() == list(range(30))
    np.testing.assert_array_equal(column(response, "is_anomaly"), column(response, "severity") > 1)


def test_300_rows_get_the_same_verdicts_in_one_request_as_in_three(client: httpx.Client, mixed: np.ndarray) -> None:
    rows = np.tile(mixed, (10, 1)).tolist()
    rows[7] = rows[133] = rows[299] = [1.0]  # 300 rows, some of them invalid
    whole = post(client, "/anomaly", {"inputs": rows, "explain": 2})
    parts = [post(client, "/anomaly", {"inputs": rows[start : start + 100], "explain": 2}) for start in (0, 100, 200)]
    for name in ("results", "errors"):
        entries = [entry | {"row": entry["row"] + 100 * i} for i, part in enumerate(parts) for entry in part[name]]
        for found, expected in zip(whole[name], entries, strict=True):
            assert found.keys() == expected.keys()
            assert [found["row"], found.get("is_anomaly")] == [expected["row"], expected.get("is_anomaly")]
            assert found.get("score", 0.0) == pytest.approx(expected.get("score", 0.0), rel=1e-4)
    assert whole["rows"] == 300
    assert whole["failed"] == 3
    assert whole["anomalies"] == sum(part["anomalies"] for part in parts)


@pytest.mark.parametrize("model", ["pca", "ae", "vae"])
def test_row_is_anomalous_if_and_only_if_its_p_value_is_at_most_alpha(
    client: httpx.Client, mixed: np.ndarray, model: str
) -> None:
    response = post(client, "/anomaly", {"inputs": mixed.tolist(), "alpha": 0.05}, params={"model": model})
    np.testing.assert_array_equal(column(response, "is_anomaly"), column(response, "p_value") <= 0.05 * (1 + 1e-6))
    assert column(response, "is_anomaly")[20:].all()


def test_verdict_lists_the_features_with_the_largest_contributions(
    client: httpx.Client, vae: Artifact, mixed: np.ndarray
) -> None:
    response = post(client, "/anomaly", {"inputs": mixed.tolist(), "explain": 5})
    with torch.inference_mode():
        _, _, contribution, expected = (part.numpy() for part in vae.module.score(torch.from_numpy(mixed)))
    names = [feature.name for feature in vae.manifest.features]
    for row, result in enumerate(response["results"]):
        features = result["features"]
        largest = np.sort(contribution[row])[::-1][:5]
        np.testing.assert_allclose([feature["contribution"] for feature in features], largest, rtol=1e-4)
        for feature in features:
            index = names.index(feature["name"])
            assert np.float32(feature["value"]) == mixed[row, index]
            assert feature["expected"] == pytest.approx(expected[row, index], abs=1e-5)
            assert feature["contribution"] == pytest.approx(contribution[row, index], rel=1e-4)


@pytest.mark.parametrize(("explain", "count"), [(0, 0), (1, 1), (64, 64), (1000, 64)])
def test_option_explain_limits_the_number_of_features(client: httpx.Client, explain: int, count: int) -> None:
    response = post(client, "/anomaly", {"inputs": [[0.5] * 64], "explain": explain})
    assert len(response["results"][0]["features"]) == count


def test_records_give_the_same_response_as_rows(client: httpx.Client) -> None:
    rows = host_table().x.read_range(0, 20)
    records: list[dict[str, Any]] = [dict(zip(HOST_FEATURES, map(float, row), strict=True)) for row in rows]
    backwards = [dict(reversed(record.items())) | {"rack": "a", "hour": 12} for record in records]
    by_row = post(client, "/anomaly", {"inputs": rows.astype(float).tolist()}, params={"model": "hosts"})
    assert post(client, "/anomaly", {"records": records}, params={"model": "hosts"}) == by_row
    response = post(client, "/anomaly", {"records": backwards}, params={"model": "hosts"})
    assert response.pop("unknown_fields") == 40
    by_row.pop("unknown_fields")
    assert response == by_row


def test_invalid_rows_are_errors_and_the_other_rows_are_scored(client: httpx.Client, digits: np.ndarray) -> None:
    rows: list[Any] = digits[:5].tolist()
    alone = post(client, "/anomaly", {"inputs": rows})
    bad = [[None] * 64, "x", rows[0][:63], {"a": 1}, [1e39] * 64]
    mixed = [rows[0], bad[0], rows[1], bad[1], bad[2], rows[2], bad[3], rows[3], rows[4], bad[4]]
    response = post(client, "/anomaly", {"inputs": mixed})
    assert column(response, "row").tolist() == [0, 2, 5, 7, 8]
    assert [error["row"] for error in response["errors"]] == [1, 3, 4, 6, 9]
    assert [error["pointer"] for error in response["errors"]] == [
        "/inputs/1/0", "/inputs/3", "/inputs/4", "/inputs/6", "/inputs/9/0"
    ]  # fmt: skip
    for result, expected in zip(response["results"], alone["results"], strict=True):
        assert result["score"] == pytest.approx(expected["score"], rel=1e-6)
        assert result["p_value"] == expected["p_value"]


def test_row_is_an_error_if_it_contains_nan(client: httpx.Client, digits: np.ndarray) -> None:
    rows: list[Any] = digits[:3].tolist()
    rows[1][7] = float("nan")
    body = str({"inputs": rows}).replace("'", '"').replace("nan", "NaN")
    response = client.post("/anomaly", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200
    assert [error["pointer"] for error in response.json()["errors"]] == ["/inputs/1/7"]


def test_record_that_lacks_a_feature_is_an_error_that_names_it_if_impute_is_off(client: httpx.Client) -> None:
    good = dict.fromkeys(HOST_FEATURES, 1.0)
    records = [good, {key: value for key, value in good.items() if key != "memory/used"}, good]
    response = post(client, "/anomaly", {"records": records, "impute": False}, params={"model": "hosts"})
    assert column(response, "row").tolist() == [0, 2]
    assert response["errors"][0]["row"] == 1
    assert "memory/used" in response["errors"][0]["detail"]


def test_request_with_only_invalid_rows_gives_422(client: httpx.Client) -> None:
    response = client.post("/anomaly", json={"inputs": [[None] * 64, [1]]})
    assert response.status_code == 422
    assert response.json()["pointer"] == "/inputs/0/0"


def test_score_is_the_largest_float32_if_it_overflows(client: httpx.Client, digits: np.ndarray) -> None:
    response = post(client, "/anomaly", {"inputs": [digits[0].tolist(), [1e30] * 64]}, params={"model": "pca"})
    assert column(response, "is_anomaly").tolist() == [False, True]
    assert np.float32(response["results"][1]["score"]) == np.finfo(np.float32).max
    assert np.isfinite(column(response, "severity")).all()


def test_row_that_overflows_in_the_model_does_not_affect_another_row(client: httpx.Client, digits: np.ndarray) -> None:
    response = post(client, "/anomaly", {"inputs": [[3e38, -3e38] * 32, digits[0].tolist()]}, params={"model": "vae"})
    scored = column(response, "row").tolist()
    assert 1 in scored
    assert sorted(scored + [error["row"] for error in response["errors"]]) == [0, 1]


def test_fdr_flags_the_rows_that_benjamini_hochberg_rejects(client: httpx.Client, mixed: np.ndarray) -> None:
    for q in (0.01, 0.1, 0.5):
        response = post(client, "/anomaly", {"inputs": mixed.tolist(), "fdr": q})
        expected = false_discovery_control(column(response, "p_value")) <= q * (1 + 1e-6)
        np.testing.assert_array_equal(column(response, "is_anomaly"), expected)
        assert response["fdr"] == q


def test_control_of_the_false_discovery_rate_ignores_the_severity_of_an_extreme_row(client: httpx.Client) -> None:
    """The p-value of the extreme row is the smallest possible p-value, 1 / 81.

    Among 30 rows, Benjamini-Hochberg rejects a single row at q = 0.1 only if its p-value is at most 0.1 / 30.
    """
    rows = host_table().x.read_range(0, 30).astype(float)
    rows[7] += 1e4
    body = {"inputs": rows.tolist(), "fdr": 0.1, "alpha": 1e-6, "extrapolated": True}
    response = post(client, "/anomaly", body, params={"model": "hosts"})
    assert response["extrapolated"]
    assert response["results"][7]["severity"] > 100
    assert response["results"][7]["p_value"] == pytest.approx(1 / 81)  # larger than 0.1 / 30
    assert not column(response, "is_anomaly").any()


@pytest.mark.parametrize("alpha", [1 / 81, 0.0123, 0.0124])
def test_threshold_is_extrapolated_only_if_alpha_is_below_the_smallest_p_value(
    client: httpx.Client, alpha: float
) -> None:
    body = {"inputs": host_table().x.read_range(0, 1).astype(float).tolist(), "alpha": alpha, "extrapolated": True}
    response = post(client, "/anomaly", body, params={"model": "hosts"})
    assert response["calibration"]["floor"] == pytest.approx(1 / 81)
    assert response["extrapolated"] == (alpha == 0.0123)


@pytest.mark.parametrize(
    ("alpha", "options", "anomalous"),
    [
        (0.0124, {}, True),
        (0.0123, {}, False),
        (1e-6, {}, False),
        (0.0123, {"half_life_rows": 0.1}, False),
        (0.0123, {"extrapolated": True}, True),
        (1e-6, {"extrapolated": True, "half_life_rows": 0.1}, True),
    ],
)
def test_no_row_is_anomalous_below_the_smallest_p_value_unless_extrapolation_is_requested(
    client: httpx.Client, alpha: float, options: dict[str, object], anomalous: bool
) -> None:
    rows = host_table().x.read_range(0, 3).astype(float)
    rows[1:] += 1e4
    body = {"inputs": rows.tolist(), "alpha": alpha, **options}
    response = post(client, "/anomaly", body, params={"model": "hosts"})
    assert response["anomalies"] == (2 if anomalous else 0)
    assert column(response, "is_anomaly").tolist() == [False, anomalous, anomalous]
    assert (column(response, "severity")[1:] > 1).all() == anomalous
    assert column(response, "p_value")[1:].tolist() == pytest.approx([1 / 81, 1 / 81])
    assert (response["threshold"] is None) == (not anomalous)


@pytest.mark.parametrize(("query", "anomalies"), [("", 0), ("&extrapolated=true", 1)])
def test_stream_calls_no_row_anomalous_below_the_smallest_p_value_unless_extrapolation_is_requested(
    client: httpx.Client, query: str, anomalies: int
) -> None:
    record = dict.fromkeys(host_table().names, 1e4)
    response = client.post(
        f"/anomaly?model=hosts&alpha=0.001{query}",
        content=json.dumps(record),
        headers={"Content-Type": "application/x-ndjson", "Accept": "application/x-ndjson"},
    )
    verdict, counts = map(json.loads, response.text.splitlines())
    assert verdict["is_anomaly"] == bool(anomalies)
    assert counts["anomalies"] == anomalies


FDR_TRIALS = 3_000


def false_discovery_proportions(n: int, normal: int, anomalous: int, q: float) -> np.ndarray:
    """Return, for each trial, the share of normal rows among the flagged rows, or 0 if no row is flagged."""
    random, proportions = np.random.RandomState(0), []
    for _ in range(FDR_TRIALS):
        calibration = Calibration(torch.from_numpy(random.standard_normal(n)))
        scores = np.concatenate((random.standard_normal(normal), 3.5 + random.standard_normal(anomalous)))
        p_value = calibration.p_value(torch.from_numpy(scores)).float().numpy()
        flagged = benjamini_hochberg(p_value, q)
        proportions.append(flagged[:normal].sum() / max(1, flagged.sum()))
    return np.array(proportions)


@pytest.mark.parametrize(("n", "normal", "anomalous", "q"), [(199, 15, 5, 0.1), (199, 20, 0, 0.1), (99, 8, 2, 0.3)])
@pytest.mark.slow
def test_false_discovery_rate_is_q_times_the_share_of_normal_rows(
    n: int, normal: int, anomalous: int, q: float
) -> None:
    """With n calibration rows and m new rows, the rate has exactly this value if q (n + 1) / m is an integer.

    Source: Mary & Roquain, "Semi-supervised multiple testing", 2022.
    """
    share = false_discovery_proportions(n, normal, anomalous, q)
    error = share.std() / np.sqrt(FDR_TRIALS)
    assert abs(share.mean() - q * normal / (normal + anomalous)) < 4 * error


@pytest.mark.parametrize(("n", "normal", "anomalous", "q"), [(150, 14, 7, 0.1), (60, 30, 30, 0.2)])
@pytest.mark.slow
def test_false_discovery_rate_is_at_most_q_times_the_share_of_normal_rows(
    n: int, normal: int, anomalous: int, q: float
) -> None:
    share = false_discovery_proportions(n, normal, anomalous, q)
    assert share.mean() < q * normal / (normal + anomalous) + 4 * share.std() / np.sqrt(FDR_TRIALS)
    assert share.mean() > 0


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.sampled_from([0.01, 0.05, 0.1, 0.3, 0.9]))
def test_benjamini_hochberg_matches_scipy(ranks: list[int], q: float) -> None:
    p_value = np.array(ranks, np.float32) / np.float32(100)
    exact = np.array(ranks) / 100
    expected = false_discovery_control(exact) <= q * (1 + 1e-9)
    np.testing.assert_array_equal(benjamini_hochberg(p_value, q), expected)


def test_npy_response_has_a_line_for_each_row_and_nan_if_the_row_is_invalid(
    client: httpx.Client, mixed: np.ndarray
) -> None:
    x = mixed[:6].copy()
    x[2, 5] = np.nan
    file = io.BytesIO()
    np.save(file, x)
    headers = {"content-type": "application/x-npy", "accept": "application/x-npy"}
    response = client.post("/anomaly?alpha=0.1", content=file.getvalue(), headers=headers)
    table = np.load(io.BytesIO(response.content))
    expected = post(client, "/anomaly", {"inputs": mixed[:6].tolist(), "alpha": 0.1})
    for name, values in zip(("score", "p_value", "severity"), table.T, strict=True):
        np.testing.assert_allclose(np.delete(values, 2), np.delete(column(expected, name), 2), rtol=1e-5)
    assert np.isnan(table[2]).all()


def test_false_alarm_rate_on_fresh_normal_rows_matches_alpha(client: httpx.Client, artifacts: Path) -> None:
    rng = np.random.default_rng(99)
    base = rng.normal(size=(300, 2))
    x = np.column_stack((base[:, 0], 100 + 20 * base[:, 1], base[:, 0] + base[:, 1], 3 * rng.normal(size=300)))
    response = post(client, "/anomaly", {"inputs": x.tolist(), "alpha": 0.1}, params={"model": "hosts"})
    n = load(artifacts / "hosts" / "1" / "model.pt").manifest.calibration.rows
    from scipy.stats import betabinom

    allowed = int(0.1 * (n + 1))
    low, high = betabinom(300, allowed, n + 1 - allowed).interval(0.999)
    assert low <= column(response, "is_anomaly").sum() <= high
