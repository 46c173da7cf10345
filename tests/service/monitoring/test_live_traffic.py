"""Which rows are live traffic: only these raise alerts and are evidence of drift."""

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.app import create_app
from service.codec import remote_write
from service.settings import Settings
from tests.service.hosts import HOST_FEATURES, host_records, host_rows
from tests.service.running import running
from tests.service.scrape import Samples, scrape

ABNORMAL = dict.fromkeys(HOST_FEATURES, 1e5)
NDJSON = "application/x-ndjson"
ROWS = 5
# Metrics that lead to an alert or a ticket, or that describe live traffic.
LIVE = (
    "elbo_scored_rows_total", "elbo_anomalies_total", "elbo_alarms_total", "elbo_anomaly_causes_total",
    "elbo_p_value_count", "elbo_unreadable_rows_total", "elbo_unknown_fields_total", "elbo_missing_values_total",
)  # fmt: skip
Body = tuple[bytes, dict[str, str]]


def serve(artifacts: Path, **settings: Any) -> Any:
    options = {"default_model": "hosts", "log_level": "error", "backend": "torchscript", **settings}
    return running(create_app(Settings(artifacts=artifacts, **options)))


@pytest.fixture(scope="module")
def hosts(artifacts: Path) -> Iterator[httpx.Client]:
    with serve(artifacts) as client:
        yield client


@pytest.fixture(scope="module")
def quiet_hosts(artifacts: Path) -> Iterator[httpx.Client]:
    with serve(artifacts, observe=False) as client:
        yield client


def json_body(**fields: Any) -> Body:
    return json.dumps(fields).encode(), {"content-type": "application/json"}


def npy_body() -> Body:
    file = io.BytesIO()
    np.save(file, np.full((ROWS, 4), 1e5, np.float32))
    return file.getvalue(), {"content-type": "application/x-npy"}


RECORDS = [ABNORMAL | {"host": "trial", "colour": 1}] * ROWS
METRIC = {"name": "m", "tags": {"host": "trial"}, "fields": ABNORMAL}
LINES = "\n".join(map(json.dumps, RECORDS)).encode()
CSV = "\n".join([",".join(HOST_FEATURES), *["1e5,1e5,1e5,1e5"] * ROWS]).encode()
BODIES: dict[str, Body] = {
    "inputs": json_body(inputs=[[1e5] * 4] * ROWS),
    "records": json_body(records=RECORDS),
    "metrics": json_body(metrics=[METRIC | {"timestamp": time.time() + second} for second in range(ROWS)]),
    "ndjson": (LINES, {"content-type": NDJSON}),
    "stream": (LINES, {"content-type": NDJSON, "accept": NDJSON}),
    "csv": (CSV, {"content-type": "text/csv"}),
    "npy": npy_body(),
}


def post(client: httpx.Client, body: Body, query: str = "") -> None:
    content, headers = body
    response = client.post(f"/anomaly{query}", content=content, headers=headers)
    assert response.status_code == 200, response.text


def totals(samples: Samples, names: tuple[str, ...] = LIVE) -> dict[str, float]:
    return {name: sum(value for (sample, _), value in samples.items() if sample == name) for name in names}


def count(samples: Samples, name: str) -> float:
    return totals(samples, (name,))[name]


@pytest.mark.parametrize("kind", BODIES)
def test_rows_of_a_request_with_observe_false_count_only_as_unobserved(hosts: httpx.Client, kind: str) -> None:
    before = scrape(hosts)
    post(hosts, BODIES[kind], "?observe=false")
    after = scrape(hosts)
    assert totals(after) == totals(before)
    assert count(after, "elbo_unobserved_rows_total") - count(before, "elbo_unobserved_rows_total") == ROWS


def test_observe_in_a_json_body_has_the_same_effect_as_in_the_query(hosts: httpx.Client) -> None:
    before = scrape(hosts)
    post(hosts, json_body(records=RECORDS, observe=False))
    assert totals(scrape(hosts)) == totals(before)


@pytest.mark.parametrize("query", ["", "?observe=true"])
@pytest.mark.parametrize("kind", BODIES)
def test_rows_of_other_requests_raise_alarms(hosts: httpx.Client, kind: str, query: str) -> None:
    before = scrape(hosts)
    post(hosts, BODIES[kind], query)
    assert count(scrape(hosts), "elbo_alarms_total") - count(before, "elbo_alarms_total") == ROWS


def test_observe_must_be_true_or_false(hosts: httpx.Client) -> None:
    problem = hosts.post("/anomaly?observe=maybe", json={"records": RECORDS}).json()
    assert (problem["code"], problem["pointer"]) == ("invalid_field", "/observe")


@pytest.mark.parametrize(("query", "alarms"), [("", 0), ("?observe=false", 0), ("?observe=true", ROWS)])
def test_setting_observe_is_the_default_of_requests(quiet_hosts: httpx.Client, query: str, alarms: int) -> None:
    before = scrape(quiet_hosts)
    post(quiet_hosts, BODIES["records"], query)
    assert count(scrape(quiet_hosts), "elbo_alarms_total") - count(before, "elbo_alarms_total") == alarms


def write_samples(client: httpx.Client, milliseconds: int) -> None:
    """Send ROWS abnormal rows by remote write, one second apart."""
    moments = [milliseconds + 1000 * second for second in range(ROWS)]
    series: list[remote_write.Series] = [
        ((("__name__", name), ("instance", "a")), [(moment, 1e5) for moment in moments]) for name in HOST_FEATURES
    ]
    headers = {"content-type": "application/x-protobuf", "content-encoding": "snappy"}
    response = client.post("/api/v1/write", content=remote_write.dumps(series), headers=headers)
    assert response.status_code == 204, response.text


def test_remote_write_is_live_traffic_even_if_requests_are_not(quiet_hosts: httpx.Client) -> None:
    before = scrape(quiet_hosts)
    write_samples(quiet_hosts, int(time.time() * 1000))
    assert count(scrape(quiet_hosts), "elbo_alarms_total") - count(before, "elbo_alarms_total") == ROWS


# History

HOUR = 3600


def send_records(client: httpx.Client, start: float) -> None:
    post(client, json_body(records=[ABNORMAL | {"host": "old", "timestamp": start + second} for second in range(ROWS)]))


def send_metrics(client: httpx.Client, start: float) -> None:
    post(client, json_body(metrics=[METRIC | {"timestamp": int(start + second)} for second in range(ROWS)]))


def send_csv(client: httpx.Client, start: float) -> None:
    lines = [",".join([*HOST_FEATURES, "when"]), *[f"1e5,1e5,1e5,1e5,{start + second}" for second in range(ROWS)]]
    post(client, ("\n".join(lines).encode(), {"content-type": "text/csv"}), "?time=when")


def send_stream(client: httpx.Client, start: float) -> None:
    lines = [json.dumps(ABNORMAL | {"timestamp": (start + second) * 1e3}) for second in range(ROWS)]
    post(client, ("\n".join(lines).encode(), BODIES["stream"][1]))


def send_remote_write(client: httpx.Client, start: float) -> None:
    write_samples(client, int(start * 1000))


SENDERS = [send_records, send_metrics, send_csv, send_stream, send_remote_write]


@pytest.mark.parametrize("hours", [1.1, 24, 24 * 365])
@pytest.mark.parametrize("send", SENDERS)
def test_history_is_scored_but_raises_no_alarm(
    hosts: httpx.Client, send: Callable[[httpx.Client, float], None], hours: float
) -> None:
    before = scrape(hosts)
    send(hosts, time.time() - hours * HOUR)
    after = scrape(hosts)
    increases = {name: count(after, name) - count(before, name) for name in ("elbo_alarms_total", *LIVE[:2])}
    assert increases == {"elbo_alarms_total": 0, "elbo_scored_rows_total": ROWS, "elbo_anomalies_total": ROWS}
    assert count(after, "elbo_history_rows_total") - count(before, "elbo_history_rows_total") == ROWS


@pytest.mark.parametrize("hours", [0.9, 0.0, -3.0])
@pytest.mark.parametrize("send", SENDERS)
def test_rows_of_the_last_hour_and_of_fast_clocks_raise_alarms(
    hosts: httpx.Client, send: Callable[[httpx.Client, float], None], hours: float
) -> None:
    before = scrape(hosts)
    send(hosts, time.time() - hours * HOUR)
    assert count(scrape(hosts), "elbo_alarms_total") - count(before, "elbo_alarms_total") == ROWS


def test_history_does_not_hide_the_live_rows_of_the_same_request(hosts: httpx.Client) -> None:
    """The mean severity of the group contains the live row only, although a normal row of history comes first."""
    now = time.time()
    normal = host_records(host_rows(1))[0] | {"host": "mixed", "timestamp": now - 2 * HOUR}
    live = ABNORMAL | {"host": "mixed", "timestamp": now}
    undated = ABNORMAL | {"host": "mixed"}
    before = scrape(hosts)
    post(hosts, json_body(records=[live, normal, undated]))
    after = scrape(hosts)
    assert count(after, "elbo_alarms_total") - count(before, "elbo_alarms_total") == 2
    assert count(after, "elbo_history_rows_total") - count(before, "elbo_history_rows_total") == 1


def test_setting_moves_the_age_at_which_rows_become_history(artifacts: Path) -> None:
    with serve(artifacts, alert_max_age_seconds=30) as client:
        send_records(client, time.time() - 20)
        assert count(scrape(client), "elbo_alarms_total") == ROWS
        send_records(client, time.time() - 60)
        assert count(scrape(client), "elbo_alarms_total") == ROWS


@pytest.mark.parametrize("kind", ["history", "unobserved"])
def test_rows_that_are_not_live_are_no_evidence_of_drift(
    artifacts: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.monitoring.background.UPDATE_SECONDS", 3600.0)  # no update in the background
    options = {"default_model": "hosts", "log_level": "error", "backend": "torchscript"}
    app = create_app(Settings(artifacts=artifacts, **options))  # type: ignore[arg-type] # options of several types
    service = app.state.service
    start = time.time() - 5 * HOUR
    shifted = [
        record | {"load": record["load"] + 12, "timestamp": start + second}
        for second, record in enumerate(host_records(host_rows(200)))
    ]
    with running(app) as client:
        post(client, json_body(records=shifted), "?observe=false" if kind == "unobserved" else "")
        service.metrics.anomalies.update_drift(service.registry.catalogue)
        assert count(scrape(client), "elbo_drift_evidence") <= 0
        post(client, json_body(records=[record | {"timestamp": time.time()} for record in shifted]))
        service.metrics.anomalies.update_drift(service.registry.catalogue)
        assert count(scrape(client), "elbo_drift_alarm") == 1


def test_history_is_logged_once_per_model(artifacts: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serve(artifacts, log_level="warning") as client:
        for _ in range(3):
            send_records(client, time.time() - 9 * HOUR)
    (record,) = [record for record in caplog.records if "ELBO_ALERT_MAX_AGE_SECONDS" in record.getMessage()]
    assert record.fields == {"model": "hosts", "version": "1", "rows": ROWS}  # type: ignore[attr-defined] # set by `extra`
