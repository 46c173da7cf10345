"""Every way in which rows come: the same rows get the same verdicts, and what is broken costs only itself."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.anomaly.smoothing import exponential_mean
from service.app import create_app
from service.codec import csv_rows, ndjson, timestamps
from service.codec.feature_names import FeatureSelectors
from service.codec.row_errors import MalformedRow
from service.settings import Settings
from tests.service.hosts import (
    HOST_FEATURES,
    JSON,
    NDJSON,
    Message,
    RowList,
    as_inputs,
    as_ndjson,
    host_records,
    host_rows,
    post_anomaly,
)
from tests.service.running import running

CSV, NPY = "text/csv", "application/x-npy"


@pytest.fixture(scope="module")
def hosts(artifacts: Path) -> Iterator[httpx.Client]:
    """A client whose requests go to the table's model."""
    options = Settings(artifacts=artifacts, default_model="hosts", log_level="warning", backend="torchscript")
    with running(create_app(options)) as client:
        yield client


def as_records(found: RowList) -> Message:
    turned = [dict(reversed(record.items())) | {"rack": 7} for record in host_records(found)]
    return json.dumps({"records": turned}).encode(), JSON


def as_ndjson_lists(found: RowList) -> Message:
    return "".join(f"{json.dumps(row)}\r\n\n" for row in found).encode(), f"{NDJSON}; charset=utf-8"


def as_csv(found: RowList) -> Message:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["rack", *reversed(HOST_FEATURES)])
    writer.writerows(["r", *map(repr, reversed(row))] for row in found)
    return b"\xef\xbb\xbf" + text.getvalue().encode(), CSV


def as_telegraf(found: RowList) -> Message:
    metrics = []
    for moment, (cpu, memory, disk, load) in enumerate(found):
        for name, fields in (("x", {"cpu": cpu, "kernel": "6.1"}), ("memory", {"used": memory}), ("disk~io", {})):
            named = fields or {"disk~io": disk, "load": load}
            metrics.append({"name": name, "tags": {"cluster": "a"}, "fields": named, "timestamp": 1.7e9 + moment})
    metrics.sort(key=lambda metric: str(metric["name"]))  # rows are put together from pieces that lie apart
    return json.dumps({"metrics": metrics}).encode(), JSON


def as_npy(found: RowList) -> Message:
    file = io.BytesIO()
    np.save(file, np.array(found))
    return file.getvalue(), NPY


WAYS: list[Callable[[RowList], Message]] = [
    as_inputs,
    as_records,
    as_ndjson,
    as_ndjson_lists,
    as_csv,
    as_telegraf,
    as_npy,
]


def without_time(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in result.items() if key != "time"} for result in answer["results"]]


@pytest.mark.parametrize("way", WAYS)
def test_the_same_rows_get_the_same_verdicts_whichever_way_they_come(
    hosts: httpx.Client, way: Callable[[RowList], Message]
) -> None:
    found = host_rows(50)
    answer, expected = post_anomaly(hosts, way(found)), post_anomaly(hosts, as_inputs(found))
    assert without_time(answer) == expected["results"]
    assert (answer["rows"], answer["failed"], answer["errors"]) == (50, 0, [])


def bad_inputs() -> Message:
    return json.dumps({"inputs": [*host_rows(500), [1, None, 2, 3], *host_rows(499)]}).encode(), JSON


def bad_records() -> Message:
    return json.dumps(
        {"records": [*host_records(host_rows(500)), {"cpu": "high"}, *host_records(host_rows(499))]}
    ).encode(), JSON


def with_line(message: Message, line: bytes) -> Message:
    found = message[0].split(b"\n")
    return b"\n".join([*found[:500], line, *found[500:]]), message[1]


def bad_metrics() -> Message:
    metrics = json.loads(as_telegraf(host_rows(999))[0])["metrics"]
    return json.dumps({"metrics": [*metrics[:500], {"fields": "none"}, *metrics[500:]]}).encode(), JSON


def bad_npy() -> Message:
    return as_npy([*host_rows(500), [1.0, np.nan, 2.0, 3.0], *host_rows(499)])


BAD: list[tuple[str, Callable[[], Message], int]] = [
    ("inputs", bad_inputs, 500),
    ("records", bad_records, 500),
    ("metrics", bad_metrics, 500),
    ("npy", bad_npy, 500),
    ("ndjson, cut off", lambda: with_line(as_ndjson(host_rows(999)), b'{"cpu": 1, "mem'), 500),
    ("ndjson, not UTF-8", lambda: with_line(as_ndjson(host_rows(999)), b'{"cpu": "\xff\xfe"}'), 500),
    ("ndjson, a number", lambda: with_line(as_ndjson(host_rows(999)), b"17"), 500),
    ("ndjson, a key twice", lambda: with_line(as_ndjson(host_rows(999)), b'{"cpu": 1, "cpu": 2}'), 500),
    ("ndjson, a boolean", lambda: with_line(as_ndjson(host_rows(999)), b"[1, true, 2, 3]"), 500),
    ("csv, too few cells", lambda: with_line(as_csv(host_rows(999)), b"r,1,2"), 499),
    ("csv, no number", lambda: with_line(as_csv(host_rows(999)), b"r,1,2,3,high"), 499),
    ("csv, not UTF-8", lambda: with_line(as_csv(host_rows(999)), b"r,1,2,\xff,3"), 499),
    ("csv, infinite", lambda: with_line(as_csv(host_rows(999)), b"r,1,2,inf,3"), 499),
    ("csv, an enormous cell", lambda: with_line(as_csv(host_rows(999)), b"r,1,2,3," + b"9" * 200_000), 499),
]


@pytest.mark.parametrize(("message", "place"), [(message, place) for _, message, place in BAD], ids=[b[0] for b in BAD])
def test_one_bad_row_of_a_thousand_costs_that_row(
    hosts: httpx.Client, message: Callable[[], Message], place: int
) -> None:
    answer = post_anomaly(hosts, message(), "?explain=0")
    assert (answer["rows"], answer["failed"]) == (1000, 1)
    assert len(answer["results"]) == 999
    (error,) = answer["errors"]
    if "metrics" not in error["pointer"]:
        assert error["row"] == place
    assert f"/{place}" in error["pointer"]
    assert error["detail"]


@pytest.mark.parametrize(
    ("body", "media_type", "code", "words"),
    [
        (b"not json\n{\n", NDJSON, "invalid_rows", "the body is not valid JSON"),
        (b"\n \n", NDJSON, "invalid_field", "neither"),
        (b"a,b,c\n1,2,3\n", CSV, "invalid_rows", "missing from the CSV header"),
        (b"1,2,3,4\n5,6,7,8\n", CSV, "invalid_rows", "the first line must name"),
        (b"cpu,cpu\n1,2\n", CSV, "invalid_csv", "duplicate column 'cpu'"),
        (b"\n\n", CSV, "invalid_csv", "no header"),
        (b"cpu,load\n", CSV, "invalid_field", "neither"),
        (b'{"metrics": {}}', JSON, "invalid_rows", "no metrics"),
        (b'{"metrics": [{"fields": {"x": 1}}]}', JSON, "invalid_rows", "no value for"),
        (b"<xml/>", "text/xml", "unsupported_media_type", "text/csv"),
    ],
)
def test_only_when_nothing_can_be_read_the_request_is_refused(
    hosts: httpx.Client, body: bytes, media_type: str, code: str, words: str
) -> None:
    response = hosts.post("/anomaly", content=body, headers={"content-type": media_type})
    assert response.status_code in (415, 422)
    assert response.json()["code"] == code
    assert words in response.text


def test_what_is_missing_is_imputed_and_said_in_every_format_with_names(hosts: httpx.Client) -> None:
    whole = host_records(host_rows(1))[0]
    del whole["load"]
    metric = {"name": "m", "tags": {}, "fields": whole, "timestamp": 1}
    for message in (
        (json.dumps({"records": [whole | {"load": None}]}).encode(), JSON),
        (json.dumps(whole).encode(), NDJSON),
        (",".join(whole).encode() + b",load\n" + ",".join(map(repr, whole.values())).encode() + b",NaN", CSV),
        (json.dumps({"metrics": [metric]}).encode(), JSON),
    ):
        (result,) = post_anomaly(hosts, message)["results"]
        assert result["imputed"] == ["load"]
        body, media_type = message
        refused = hosts.post("/anomaly?impute=false", content=body, headers={"content-type": media_type})
        assert refused.status_code == 422, refused.text


def test_a_short_answer_counts(hosts: httpx.Client) -> None:
    found = [*host_records(host_rows(5)), {"cpu": "x"}, dict.fromkeys(HOST_FEATURES, 1000000.0) | {"colour": 3}]
    answer = post_anomaly(hosts, (json.dumps({"records": found, "detail": "none"}).encode(), JSON))
    whole = post_anomaly(hosts, (json.dumps({"records": found}).encode(), JSON))
    assert answer == {key: whole[key] for key in ("model", "version", "rows", "anomalies", "failed", "unknown_fields")}
    assert (answer["rows"], answer["failed"], answer["unknown_fields"]) == (7, 1, 1)
    assert answer["anomalies"] == sum(result["is_anomaly"] for result in whole["results"]) >= 1


def timed(count: int) -> list[dict[str, Any]]:
    moments = np.random.default_rng(0).permutation(count)
    return [
        record | {"timestamp": 1_700_000_000 + 30 * int(moment), "host": "ab"[index % 2]}
        for index, (record, moment) in enumerate(zip(host_records(host_rows(count)), moments, strict=True))
    ]


@pytest.mark.parametrize(
    ("query", "by_rows"), [("?half_life=60", False), ("?half_life_rows=3", True)], ids=["seconds", "rows"]
)
def test_smoothing_is_the_severitys_mean_over_each_hosts_rows(hosts: httpx.Client, query: str, by_rows: bool) -> None:
    found = timed(60)
    message = "\n".join(map(json.dumps, found)).encode(), NDJSON
    answer, plain = post_anomaly(hosts, message, query), post_anomaly(hosts, message)
    severity = [result["severity"] for result in plain["results"]]
    time, host = [record["timestamp"] for record in found], [record["host"] for record in found]
    expected = exponential_mean(severity, 3.0 if by_rows else 60.0, time, host, by_rows=by_rows)
    smoothed = np.array([result["smoothed"] for result in answer["results"]])
    np.testing.assert_allclose(smoothed, expected, rtol=1e-6)
    assert [result["is_anomaly"] for result in answer["results"]] == (smoothed > 1).tolist()
    for mine, theirs in zip(answer["results"], plain["results"], strict=True):
        assert mine["p_value"] == theirs["p_value"]
        assert mine["time"] == theirs["time"]
        assert mine["group"] == theirs["group"] in ("a", "b")


def test_inputs_can_be_smoothed_by_rows_alone(hosts: httpx.Client) -> None:
    answer = post_anomaly(hosts, as_inputs(host_rows(9)), "?half_life_rows=2")
    expected = exponential_mean([result["severity"] for result in answer["results"]], 2.0)
    np.testing.assert_allclose([result["smoothed"] for result in answer["results"]], expected, rtol=1e-6)
    body, media_type = as_inputs(host_rows(9))
    for query, pointer in (
        ("half_life=2", "/half_life"),
        ("half_life_rows=2&fdr=0.1", "/half_life_rows"),
        ("half_life=0", "/half_life"),
    ):
        response = hosts.post(f"/anomaly?{query}", content=body, headers={"content-type": media_type})
        assert (response.status_code, response.json()["pointer"]) == (422, pointer)


def test_a_metric_that_several_tags_give_is_ambiguous_until_the_feature_selects_one(hosts: httpx.Client) -> None:
    base = host_records(host_rows(1))[0]
    metrics = [
        {"name": "x", "tags": {"host": "a"}, "fields": base, "timestamp": 5},
        {"name": "x", "tags": {"host": "a", "disk": "sdb"}, "fields": {"load": 9.5}, "timestamp": 5},
        {"name": "x", "tags": {"host": "b"}, "fields": base, "timestamp": 5},
    ]
    answer = post_anomaly(hosts, (json.dumps({"metrics": metrics}).encode(), JSON))
    assert [error["pointer"] for error in answer["errors"]] == ["/metrics/0"]
    assert "several metrics" in answer["errors"][0]["detail"]
    assert [(result["row"], result["group"], result["time"]) for result in answer["results"]] == [(1, "b", 5.0)]
    assert post_anomaly(hosts, (json.dumps({"metrics": [metrics[0], metrics[0]]}).encode(), JSON))["failed"] == 0


def test_a_selector_prefers_the_labels_that_it_names() -> None:
    found = FeatureSelectors(
        {"any": "load", "sda": 'load{disk="sda"}', "both": 'load{disk="sda", host="a"}', "odd": "a{b"}
    )
    assert found.find(["load"], {}) == "any"
    assert found.find(["load"], {"disk": "sda"}) == "sda"
    assert found.find(["other", "load"], {"host": "a", "disk": "sda", "more": "x"}) == "both"
    assert found.find(["a{b"], {}) == "odd"
    assert found.find(["loads"], {}) is None


MOMENT = 1_700_000_000.0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1_700_000_000, MOMENT), (1_700_000_000.5, MOMENT + 0.5), (1_700_000_000_500, MOMENT + 0.5),
        (1_700_000_000_000_000, MOMENT), (1_700_000_000_000_000_000, MOMENT), ("1700000000", MOMENT),
        ("1700000000500", MOMENT + 0.5), ("2023-11-14T22:13:20Z", MOMENT), ("2023-11-14 22:13:20", MOMENT),
        ("2023-11-14T23:13:20+01:00", MOMENT), ("yesterday", None), (True, None), (None, None), ([], None),
        (float("inf"), None), ("nan", None),
    ],
)  # fmt: skip
def test_the_size_of_a_timestamp_tells_its_unit(value: Any, expected: float | None) -> None:
    found = timestamps.to_unix_seconds(value)
    assert (np.isnan(found) and expected is None) or found == pytest.approx(expected, abs=1e-6)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_no_bytes_break_the_readers_of_lines_and_tables(body: bytes) -> None:
    found = ndjson.read_fields(body).values.get("records", [])
    assert len(found) == sum(1 for line in body.split(b"\n") if line.strip(b" \t\r\v\f"))
    for value in found:
        assert value is None or type(value) in (dict, list, int, float, str, bool, MalformedRow)
    try:
        table = csv_rows.read_fields(b"a,b\n" + body).values.get("records", [])
    except UnicodeDecodeError:
        pytest.fail("bytes that are no UTF-8 are replaced")
    assert all(type(row) is MalformedRow or set(row) == {"a", "b"} for row in table)
