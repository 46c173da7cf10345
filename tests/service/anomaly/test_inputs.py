"""Rows for /anomaly in every format: equal rows get equal verdicts, and an invalid row affects no other row."""

import csv
import gzip
import io
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import timestamps
from service.anomaly.smoothing import exponential_mean
from service.codec import csv_rows, ndjson
from service.codec.feature_names import FeatureSelectors
from service.codec.row_errors import MalformedRow
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
from tests.service.scrape import increase, scrape

CSV, NPY = "text/csv", "application/x-npy"


def as_records(rows: RowList) -> Message:
    reordered = [dict(reversed(record.items())) | {"rack": 7} for record in host_records(rows)]
    return json.dumps({"records": reordered}).encode(), JSON


def as_ndjson_lists(rows: RowList) -> Message:
    return "".join(f"{json.dumps(row)}\r\n\n" for row in rows).encode(), f"{NDJSON}; charset=utf-8"


def as_csv(rows: RowList) -> Message:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["rack", *reversed(HOST_FEATURES)])
    writer.writerows(["r", *map(repr, reversed(row))] for row in rows)
    return b"\xef\xbb\xbf" + text.getvalue().encode(), CSV


def as_telegraf(rows: RowList) -> Message:
    metrics = []
    for second, (cpu, memory, disk, load) in enumerate(rows):
        fields_by_name = {
            "x": {"cpu": cpu, "kernel": "6.1"},
            "memory": {"used": memory},
            "disk~io": {"disk~io": disk, "load": load},
        }
        for name, fields in fields_by_name.items():
            metrics.append({"name": name, "tags": {"cluster": "a"}, "fields": fields, "timestamp": 1.7e9 + second})
    metrics.sort(key=lambda metric: str(metric["name"]))  # so that the metrics of one row are not adjacent
    return json.dumps({"metrics": metrics}).encode(), JSON


def as_npy(rows: RowList) -> Message:
    file = io.BytesIO()
    np.save(file, np.array(rows))
    return file.getvalue(), NPY


ENCODERS: list[Callable[[RowList], Message]] = [
    as_inputs,
    as_records,
    as_ndjson,
    as_ndjson_lists,
    as_csv,
    as_telegraf,
    as_npy,
]


def without_time(response: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in result.items() if key != "time"} for result in response["results"]]


@pytest.mark.parametrize("encode", ENCODERS)
def test_equal_rows_in_any_format_get_equal_verdicts(hosts: httpx.Client, encode: Callable[[RowList], Message]) -> None:
    rows = host_rows(50)
    response, expected = post_anomaly(hosts, encode(rows)), post_anomaly(hosts, as_inputs(rows))
    assert without_time(response) == expected["results"]
    assert (response["rows"], response["failed"], response["errors"]) == (50, 0, [])


def inputs_with_bad_row() -> Message:
    return json.dumps({"inputs": [*host_rows(500), [1, None, 2, 3], *host_rows(499)]}).encode(), JSON


def records_with_bad_row() -> Message:
    return json.dumps(
        {"records": [*host_records(host_rows(500)), {"cpu": "high"}, *host_records(host_rows(499))]}
    ).encode(), JSON


def with_line(message: Message, line: bytes) -> Message:
    """Insert `line` as line number 500 of the message's body."""
    body, media_type = message
    lines = body.split(b"\n")
    return b"\n".join([*lines[:500], line, *lines[500:]]), media_type


def metrics_with_bad_metric() -> Message:
    metrics = json.loads(as_telegraf(host_rows(999))[0])["metrics"]
    return json.dumps({"metrics": [*metrics[:500], {"fields": "none"}, *metrics[500:]]}).encode(), JSON


def npy_with_bad_row() -> Message:
    return as_npy([*host_rows(500), [1.0, np.nan, 2.0, 3.0], *host_rows(499)])


MESSAGES_WITH_BAD_ROW: list[tuple[str, Callable[[], Message], int]] = [
    ("inputs", inputs_with_bad_row, 500),
    ("records", records_with_bad_row, 500),
    ("metrics", metrics_with_bad_metric, 500),
    ("npy", npy_with_bad_row, 500),
    ("ndjson, cut off", lambda: with_line(as_ndjson(host_rows(999)), b'{"cpu": 1, "mem'), 500),
    ("ndjson, not UTF-8", lambda: with_line(as_ndjson(host_rows(999)), b'{"cpu": "\xff\xfe"}'), 500),
    ("ndjson, a number", lambda: with_line(as_ndjson(host_rows(999)), b"17"), 500),
    ("ndjson, a duplicate key", lambda: with_line(as_ndjson(host_rows(999)), b'{"cpu": 1, "cpu": 2}'), 500),
    ("ndjson, a boolean", lambda: with_line(as_ndjson(host_rows(999)), b"[1, true, 2, 3]"), 500),
    ("csv, too few cells", lambda: with_line(as_csv(host_rows(999)), b"r,1,2"), 499),
    ("csv, not a number", lambda: with_line(as_csv(host_rows(999)), b"r,1,2,3,high"), 499),
    ("csv, not UTF-8", lambda: with_line(as_csv(host_rows(999)), b"r,1,2,\xff,3"), 499),
    ("csv, infinite", lambda: with_line(as_csv(host_rows(999)), b"r,1,2,inf,3"), 499),
    ("csv, an enormous cell", lambda: with_line(as_csv(host_rows(999)), b"r,1,2,3," + b"9" * 200_000), 499),
]


@pytest.mark.parametrize(
    ("message", "place"), [case[1:] for case in MESSAGES_WITH_BAD_ROW], ids=[case[0] for case in MESSAGES_WITH_BAD_ROW]
)
def test_one_bad_row_among_a_thousand_fails_alone(
    hosts: httpx.Client, message: Callable[[], Message], place: int
) -> None:
    response = post_anomaly(hosts, message(), "?explain=0")
    assert (response["rows"], response["failed"]) == (1000, 1)
    assert len(response["results"]) == 999
    (error,) = response["errors"]
    if "metrics" not in error["pointer"]:
        assert error["row"] == place
    assert f"/{place}" in error["pointer"]
    assert error["detail"]


@pytest.mark.parametrize(
    ("body", "media_type", "code", "words"),
    [
        (b"not json\n{\n", NDJSON, "invalid_rows", "invalid JSON"),
        (b"\n \n", NDJSON, "invalid_field", "got none"),
        (b"a,b,c\n1,2,3\n", CSV, "invalid_rows", "missing from the CSV header"),
        (b"1,2,3,4\n5,6,7,8\n", CSV, "invalid_rows", "the first line must name"),
        (b"cpu,cpu\n1,2\n", CSV, "invalid_csv", "duplicate column 'cpu'"),
        (b"\n\n", CSV, "invalid_csv", "no header"),
        (b"cpu,load\n", CSV, "invalid_field", "got none"),
        (b'{"metrics": {}}', JSON, "invalid_rows", "no metrics"),
        (
            b'{"metrics": [{"fields": {"cpu": 1, "load": "1", "disk~io": 1}}]}',
            JSON,
            "invalid_rows",
            "expected a number",
        ),
        (b"<xml/>", "text/xml", "unsupported_media_type", "text/csv"),
    ],
)
def test_request_without_a_valid_row_is_refused(
    hosts: httpx.Client, body: bytes, media_type: str, code: str, words: str
) -> None:
    response = hosts.post("/anomaly", content=body, headers={"content-type": media_type})
    assert response.status_code in (415, 422)
    assert response.json()["code"] == code
    assert words in response.text


@pytest.mark.parametrize(
    ("header", "query", "detail", "pointer"),
    [
        ("cpu,memory/used,disk~io", "?impute=false", "column 'load' is missing", "/records/0"),
        ("load", "", "columns 'cpu', 'memory/used', 'disk~io' are missing", "/records/0"),
        ("x,y", "", "columns 'cpu', 'memory/used', 'disk~io', 'load' are missing", ""),
    ],
)
def test_csv_header_that_lacks_required_features_is_refused_with_the_missing_names(
    hosts: httpx.Client, header: str, query: str, detail: str, pointer: str
) -> None:
    line = ",".join("1" for _ in header.split(","))
    response = hosts.post(f"/anomaly{query}", content=f"{header}\n{line}\n", headers={"content-type": CSV})
    problem = response.json()
    assert (response.status_code, problem["code"], problem["pointer"]) == (422, "invalid_rows", pointer)
    assert problem["detail"] == f"{detail} from the CSV header: the model needs cpu, memory/used, disk~io, load"


def test_missing_value_is_imputed_and_reported_in_every_format_that_has_feature_names(hosts: httpx.Client) -> None:
    record = host_records(host_rows(1))[0]
    del record["load"]
    metric = {"name": "m", "tags": {}, "fields": record, "timestamp": 1}
    for message in (
        (json.dumps({"records": [record | {"load": None}]}).encode(), JSON),
        (json.dumps(record).encode(), NDJSON),
        (",".join(record).encode() + b",load\n" + ",".join(map(repr, record.values())).encode() + b",NaN", CSV),
        (json.dumps({"metrics": [metric]}).encode(), JSON),
    ):
        (result,) = post_anomaly(hosts, message)["results"]
        assert result["imputed"] == ["load"]
        body, media_type = message
        refused = hosts.post("/anomaly?impute=false", content=body, headers={"content-type": media_type})
        assert refused.status_code == 422, refused.text


def test_response_has_only_the_counts_if_detail_is_none(hosts: httpx.Client) -> None:
    records = [*host_records(host_rows(5)), {"cpu": "x"}, dict.fromkeys(HOST_FEATURES, 1000000.0) | {"colour": 3}]
    response = post_anomaly(hosts, (json.dumps({"records": records, "detail": "none"}).encode(), JSON))
    whole = post_anomaly(hosts, (json.dumps({"records": records}).encode(), JSON))
    assert response == {
        key: whole[key] for key in ("model", "version", "rows", "anomalies", "failed", "unknown_fields")
    }
    assert (response["rows"], response["failed"], response["unknown_fields"]) == (7, 1, 1)
    assert response["anomalies"] == sum(result["is_anomaly"] for result in whole["results"]) >= 1


def records_with_time_and_host(count: int) -> list[dict[str, Any]]:
    intervals = np.random.default_rng(0).permutation(count)
    return [
        record | {"timestamp": 1_700_000_000 + 30 * int(interval), "host": "ab"[index % 2]}
        for index, (record, interval) in enumerate(zip(host_records(host_rows(count)), intervals, strict=True))
    ]


@pytest.mark.parametrize(
    ("query", "by_rows"), [("?half_life=60", False), ("?half_life_rows=3", True)], ids=["seconds", "rows"]
)
def test_half_life_smooths_the_severity_of_each_host(hosts: httpx.Client, query: str, by_rows: bool) -> None:
    records = records_with_time_and_host(60)
    message = "\n".join(map(json.dumps, records)).encode(), NDJSON
    response, plain = post_anomaly(hosts, message, query), post_anomaly(hosts, message)
    severity = [result["severity"] for result in plain["results"]]
    time, host = [record["timestamp"] for record in records], [record["host"] for record in records]
    expected = exponential_mean(severity, 3.0 if by_rows else 60.0, time, host, by_rows=by_rows)
    smoothed = np.array([result["smoothed"] for result in response["results"]])
    np.testing.assert_allclose(smoothed, expected, rtol=1e-6)
    assert [result["is_anomaly"] for result in response["results"]] == (smoothed > 1).tolist()
    for result, plain_result in zip(response["results"], plain["results"], strict=True):
        assert result["p_value"] == plain_result["p_value"]
        assert result["time"] == plain_result["time"]
        assert result["group"] == plain_result["group"] in ("a", "b")


def test_half_life_may_be_in_rows_but_not_in_seconds_if_the_rows_have_no_time(hosts: httpx.Client) -> None:
    results = post_anomaly(hosts, as_inputs(host_rows(9)), "?half_life_rows=2")["results"]
    expected = exponential_mean([result["severity"] for result in results], 2.0)
    np.testing.assert_allclose([result["smoothed"] for result in results], expected, rtol=1e-6)
    body, media_type = as_inputs(host_rows(9))
    for query, pointer in (
        ("half_life=2", "/half_life"),
        ("half_life_rows=2&fdr=0.1", "/half_life_rows"),
        ("half_life=0", "/half_life"),
    ):
        response = hosts.post(f"/anomaly?{query}", content=body, headers={"content-type": media_type})
        assert (response.status_code, response.json()["pointer"]) == (422, pointer)


def test_metric_with_a_name_of_900_kilobytes_and_many_fields_takes_little_time(hosts: httpx.Client) -> None:
    metric = {"name": "m" * 900_000, "tags": {}, "fields": {f"f{number}": 1 for number in range(9000)}, "timestamp": 1}
    row = {"name": "", "tags": {}, "fields": dict.fromkeys(HOST_FEATURES, 1.0), "timestamp": 2}
    started = time.perf_counter()
    response = post_anomaly(hosts, (json.dumps({"metrics": [metric, row]}).encode(), JSON))
    assert time.perf_counter() - started < 2  # joining the names of the metric and of each field copies 24 GB
    assert (response["rows"], response["unknown_fields"]) == (1, 9000)


def test_row_is_an_error_if_several_metrics_give_one_feature_different_values(hosts: httpx.Client) -> None:
    base = host_records(host_rows(1))[0]
    metrics = [
        {"name": "x", "tags": {"host": "a"}, "fields": base, "timestamp": 5},
        {"name": "x", "tags": {"host": "a", "disk": "sdb"}, "fields": {"load": 9.5}, "timestamp": 5},
        {"name": "x", "tags": {"host": "b"}, "fields": base, "timestamp": 5},
    ]
    response = post_anomaly(hosts, (json.dumps({"metrics": metrics}).encode(), JSON))
    assert [error["pointer"] for error in response["errors"]] == ["/metrics/0"]
    assert "several metrics" in response["errors"][0]["detail"]
    assert [(result["row"], result["group"], result["time"]) for result in response["results"]] == [(1, "b", 5.0)]
    assert post_anomaly(hosts, (json.dumps({"metrics": [metrics[0], metrics[0]]}).encode(), JSON))["failed"] == 0


def test_matching_selector_with_the_most_labels_is_preferred() -> None:
    selectors = FeatureSelectors(
        {"any": "load", "sda": 'load{disk="sda"}', "both": 'load{disk="sda", host="a"}', "odd": "a{b"}
    )
    assert selectors.find(["load"], {}) == "any"
    assert selectors.find(["load"], {"disk": "sda"}) == "sda"
    assert selectors.find(["other", "load"], {"host": "a", "disk": "sda", "more": "x"}) == "both"
    assert selectors.find(["a{b"], {}) == "odd"
    assert selectors.find(["loads"], {}) is None


SECONDS = 1_700_000_000.0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1_700_000_000, SECONDS), (1_700_000_000.5, SECONDS + 0.5), (1_700_000_000_500, SECONDS + 0.5),
        (1_700_000_000_000_000, SECONDS), (1_700_000_000_000_000_000, SECONDS), ("1700000000", SECONDS),
        ("1700000000500", SECONDS + 0.5), ("2023-11-14T22:13:20Z", SECONDS), ("2023-11-14 22:13:20", SECONDS),
        ("2023-11-14T23:13:20+01:00", SECONDS), ("yesterday", None), (True, None), (None, None), ([], None),
        (float("inf"), None), ("nan", None),
    ],
)  # fmt: skip
def test_unit_of_a_timestamp_is_inferred_from_its_magnitude(value: Any, expected: float | None) -> None:
    seconds = timestamps.to_unix_seconds(value)
    assert (np.isnan(seconds) and expected is None) or seconds == pytest.approx(expected, abs=1e-6)


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_ndjson_and_csv_readers_accept_any_bytes(body: bytes) -> None:
    rows = list(ndjson.read_fields(body).values.get("records", []))
    lines = body.removeprefix(b"\xef\xbb\xbf").split(b"\n")  # a byte order mark is no part of the first line
    assert len(rows) == sum(1 for line in lines if line.strip(b" \t\r\v\f"))
    for value in rows:
        assert value is None or type(value) in (dict, list, int, float, str, bool, MalformedRow)
    try:
        records = csv_rows.read_fields(b"a,b\n" + body).values.get("records", [])
    except UnicodeDecodeError:
        pytest.fail("bytes that are not UTF-8 must be replaced")
    assert all(type(row) is MalformedRow or set(row) == {"a", "b"} for row in records)


def telegraf_batch(*metrics: tuple[str, dict[str, str], dict[str, Any]]) -> bytes:
    """Return the bytes that Telegraf's `http` output sends for `metrics`, each with name, tags and fields."""
    listed = [
        {"fields": fields, "name": name, "tags": {"host": "web-1", **tags}, "timestamp": 1767225600}
        for name, tags, fields in metrics
    ]
    return json.dumps({"metrics": listed}, separators=(",", ":")).encode() + b"\n"


KERNEL: tuple[str, dict[str, str], dict[str, Any]] = (
    "kernel",
    {},
    {"boot_time": 1767000000, "context_switches": 123456, "entropy_avail": 256},
)
USELESS_BATCHES: dict[str, tuple[bytes, dict[str, int]]] = {  # with rows, failed and unknown_fields of the response
    "no feature": (telegraf_batch(KERNEL), {"rows": 0, "failed": 0, "unknown_fields": 3}),
    "no feature, several hosts": (
        telegraf_batch(KERNEL, ("kernel", {"host": "web-2"}, {"entropy_avail": 1})),
        {"rows": 0, "failed": 0, "unknown_fields": 4},
    ),
    "no field": (telegraf_batch(("empty", {}, {})), {"rows": 0, "failed": 0, "unknown_fields": 0}),
    "the end of a row": (telegraf_batch(("x", {}, {"cpu": 1.5})), {"rows": 1, "failed": 1, "unknown_fields": 0}),
    "two numbers for one feature": (
        telegraf_batch(("x", {"cpu": "cpu0"}, {"cpu": 1.5}), ("x", {"cpu": "cpu-total"}, {"cpu": 2.5})),
        {"rows": 1, "failed": 1, "unknown_fields": 0},
    ),
}


@pytest.mark.parametrize("content_type", ["text/plain; charset=utf-8", "application/json"])
@pytest.mark.parametrize("detail", ["full", "none"])
@pytest.mark.parametrize("kind", USELESS_BATCHES)
def test_batch_of_metrics_without_a_complete_row_is_accepted_and_counted(
    hosts: httpx.Client, kind: str, detail: str, content_type: str
) -> None:
    """Telegraf would repeat a refused batch for ever. text/plain is the Content-Type of its default settings."""
    body, counts = USELESS_BATCHES[kind]
    before = scrape(hosts)
    headers = {"content-type": content_type, "content-encoding": "gzip", "user-agent": "Telegraf/1.36.3 Go/1.25.1"}
    response = hosts.post(f"/anomaly?model=hosts&detail={detail}", content=gzip.compress(body), headers=headers)
    assert response.status_code == 200, response.text
    fields = response.json()
    assert {name: fields[name] for name in counts} == counts
    assert fields["anomalies"] == 0
    if detail == "full":
        assert fields["results"] == []
        assert len(fields["errors"]) == counts["failed"]
    after = scrape(hosts)
    labels = {"model": "hosts", "version": "1"}
    assert increase(before, after, "elbo_unknown_fields_total", **labels) == counts["unknown_fields"]
    assert increase(before, after, "elbo_unreadable_rows_total", **labels) == counts["failed"]
    assert increase(before, after, "elbo_scored_rows_total", **labels) == 0


def test_batch_of_metrics_without_a_complete_row_gives_an_array_without_verdicts(hosts: httpx.Client) -> None:
    for kind, rows in (("no feature", 0), ("the end of a row", 1)):
        headers = {"content-type": JSON, "accept": "application/x-npy"}
        response = hosts.post("/anomaly", content=USELESS_BATCHES[kind][0], headers=headers)
        array = np.load(io.BytesIO(response.content))
        assert array.shape == (rows, 3)
        assert np.isnan(array).all()


def test_batch_of_metrics_with_and_without_features_gives_the_row_that_has_them(hosts: httpx.Client) -> None:
    cpu, memory, disk, load = host_rows(1)[0]
    body = telegraf_batch(
        KERNEL,
        ("sys", {}, {"cpu": cpu, "memory/used": memory}),
        ("io", {}, {"disk~io": disk}),
        ("sys", {}, {"load": load, "uptime_format": "1 day"}),
    )
    response = post_anomaly(hosts, (body, "text/plain"))
    assert (response["rows"], response["failed"], response["unknown_fields"]) == (1, 0, 4)
    assert response["results"][0]["group"] == "web-1"


def test_text_that_is_no_json_is_refused_with_the_reason(hosts: httpx.Client) -> None:
    line_protocol = b"cpu,host=web-1 usage_idle=98.3 1767225600000000000\n"
    response = hosts.post("/anomaly", content=line_protocol, headers={"content-type": "text/plain; charset=utf-8"})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_json")


def test_chunk_of_fluent_bit_is_scored_with_its_settings_of_the_documentation(hosts: httpx.Client) -> None:
    """The body and the headers are those that Fluent Bit's `http` output sends with `Format json_lines`."""
    lines = [{"date": 1767225600.25 + second} | record for second, record in enumerate(host_records(host_rows(3)))]
    body = "\n".join(json.dumps(line, separators=(",", ":")) for line in lines).encode() + b"\n"
    headers = {"content-type": "application/x-ndjson", "user-agent": "Fluent-Bit", "content-encoding": "gzip"}
    response = hosts.post("/anomaly?model=hosts&detail=none&time=date", content=gzip.compress(body), headers=headers)
    assert response.status_code == 200, response.text
    assert response.json() | {"anomalies": 0} == {
        "model": "hosts", "version": 1, "rows": 3, "anomalies": 0, "failed": 0, "unknown_fields": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "rows", "unknown_fields"),
    [
        (b'{"date":1767225600.25,"Mem.total":8,"Mem.used":4}\n{"date":1767225601.25,"Mem.total":8}\n', 2, 3),
        (b'{"date":1767225600.25,"cpu":1.5,"cpu0.p_cpu":2.0}\n', 1, 1),
        (b'{"date":1767225600.25,"message":"started"}\n', 1, 1),
    ],
)
def test_chunk_of_fluent_bit_without_a_complete_row_is_accepted_only_with_impute(
    hosts: httpx.Client, lines: bytes, rows: int, unknown_fields: int
) -> None:
    headers = {"content-type": "application/x-ndjson", "user-agent": "Fluent-Bit"}
    path = "/anomaly?model=hosts&detail=none&time=date"
    accepted = hosts.post(f"{path}&impute=true", content=lines, headers=headers)
    assert accepted.status_code == 200, accepted.text
    counts = accepted.json()
    assert (counts["rows"], counts["failed"], counts["unknown_fields"]) == (rows, rows, unknown_fields)
    assert hosts.post(path, content=lines, headers=headers).status_code == 422


def test_chunk_without_a_readable_line_is_refused_with_impute(hosts: httpx.Client) -> None:
    for lines in (b"not json\n", b'["x"]\n', b'{"cpu":"x","load":1,"disk~io":1}\n'):
        response = hosts.post("/anomaly?impute=true", content=lines, headers={"content-type": NDJSON})
        assert (response.status_code, response.json()["code"]) == (422, "invalid_rows"), response.text
