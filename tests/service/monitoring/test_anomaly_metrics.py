"""Metrics of anomaly scoring, in a running service and in several processes, and the limit on their labels."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from models.onset import UsualCourse
from service.anomaly.inputs import InputRows
from service.anomaly.onsets import Onsets
from service.anomaly.verdicts import Past, Scores, Verdicts
from service.app import create_app
from service.codec.row_schema import ParsedRows
from service.inference.registry import Catalogue
from service.monitoring.anomaly_metrics import MAX_LABELS, P_VALUE_BOUNDS
from service.monitoring.metrics import Metrics
from service.settings import Settings
from service.shared_memory import Segment, SharedCounters
from tests.service.hosts import HOST_FEATURES, host_records, host_rows, post_anomaly
from tests.service.running import running
from tests.service.scrape import increase, scrape

MODEL = {"model": "hosts", "version": "1"}
JSON = "application/json"


@pytest.fixture(scope="module")
def app(artifacts: Path) -> FastAPI:
    return create_app(Settings(artifacts=artifacts, default_model="hosts", log_level="warning", backend="torchscript"))


@pytest.fixture(scope="module")
def hosts(app: FastAPI) -> Iterator[httpx.Client]:
    with running(app) as client:
        yield client


def post_records(client: httpx.Client, records: Sequence[Mapping[str, object]], **options: object) -> dict[str, object]:
    return post_anomaly(client, (json.dumps({"records": records, **options}).encode(), JSON))


@pytest.mark.parametrize("count", [1, 3, 50])
def test_request_increases_the_counts_of_rows_anomalies_p_values_and_missing_values(
    hosts: httpx.Client, count: int
) -> None:
    records: list[dict[str, object]] = [{**record, "host": "h"} for record in host_records(host_rows(count))]
    records += [dict.fromkeys(HOST_FEATURES, 1e5) | {"host": "ill", "colour": 1}, {"cpu": "x"}]
    del records[0]["load"]
    before = scrape(hosts)
    response = post_records(hosts, records, alpha=0.001, extrapolated=True)
    after = scrape(hosts)
    results: list[dict[str, float]] = response["results"]  # type: ignore[assignment] # JSON
    assert increase(before, after, "elbo_scored_rows_total", **MODEL) == len(results) == count + 1
    assert increase(before, after, "elbo_unreadable_rows_total", **MODEL) == 1
    assert increase(before, after, "elbo_unknown_fields_total", **MODEL) == 1
    assert increase(before, after, "elbo_missing_values_total", **MODEL, feature="load") == 1
    assert increase(before, after, "elbo_anomalies_total", **MODEL, group="ill") == 1
    assert increase(before, after, "elbo_anomalies_total", **MODEL, group="h") == response["anomalies"] - 1  # type: ignore[operator] # JSON
    p_values = np.array([result["p_value"] for result in results])
    for bound in P_VALUE_BOUNDS:
        expected = (p_values <= bound * (1 + 1e-6)).sum()
        assert increase(before, after, "elbo_p_value_bucket", **MODEL, le=str(bound)) == expected
    assert increase(before, after, "elbo_p_value_sum", **MODEL) == pytest.approx(p_values.sum(), rel=1e-5)
    cause = next(result for result in results if result["is_anomaly"] and result["score"] > 1e6)["features"][0]["name"]  # type: ignore[index] # JSON
    assert increase(before, after, "elbo_anomaly_causes_total", **MODEL, feature=cause) >= 1


def test_every_row_counts_as_an_alarm_while_the_mean_severity_of_its_group_is_abnormal(hosts: httpx.Client) -> None:
    before = scrape(hosts)
    abnormal = dict.fromkeys(HOST_FEATURES, 1e5) | {"host": "lasting"}
    post_records(hosts, [abnormal] * 5)
    assert increase(before, scrape(hosts), "elbo_alarms_total", **MODEL, group="lasting") == 5


def test_groups_beyond_the_limit_are_counted_under_the_label_other(hosts: httpx.Client) -> None:
    abnormal = dict.fromkeys(HOST_FEATURES, 1e5)
    for start in range(0, 3 * MAX_LABELS, 50):
        post_records(hosts, [abnormal | {"host": f"h{start + i}"} for i in range(50)])
    groups = {dict(labels)["group"] for name, labels in scrape(hosts) if name == "elbo_anomalies_total"}
    # Other tests have already used some of the labels, for groups that do not all have anomalies.
    assert MAX_LABELS - 10 < len(groups) <= MAX_LABELS + 1
    assert "other" in groups


ABNORMAL = dict.fromkeys(HOST_FEATURES, 1e5)


@pytest.mark.parametrize("form", ["records", "metrics", "ndjson", "csv"])
def test_two_groups_with_long_names_get_different_labels_of_128_characters(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr("service.monitoring.background.UPDATE_SECONDS", 3600.0)  # no update in the background
    names = ["x" * 100_000 + end for end in "ab"]
    app = create_app(Settings(artifacts=artifacts, default_model="hosts", log_level="error", backend="torchscript"))
    with running(app) as client:
        for name in names:
            if form == "records":
                response = client.post("/anomaly", json={"records": [ABNORMAL | {"host": name}]})
            elif form == "metrics":
                metric = {"name": "", "tags": {"host": name}, "fields": ABNORMAL, "timestamp": 1}
                response = client.post("/anomaly", json={"metrics": [metric]})
            elif form == "ndjson":
                line = json.dumps(ABNORMAL | {"host": name})
                response = client.post("/anomaly", content=line, headers={"content-type": "application/x-ndjson"})
            else:
                table = f"{','.join(ABNORMAL)},host\n{','.join(map(str, ABNORMAL.values()))},{name}\n"
                response = client.post("/anomaly", content=table, headers={"content-type": "text/csv"})
            assert response.status_code == 200, response.text[:500]
            assert response.json()["anomalies"] == 1
        samples = scrape(client)
        size = len(client.get("/metrics").content)
    groups = {dict(labels)["group"] for name, labels in samples if name == "elbo_anomalies_total"}
    assert [len(group) for group in groups] == [128, 128]
    assert all(group.startswith("xxx") for group in groups)
    assert size < 100_000


def test_drift_alarm_metric_is_1_after_the_rows_have_shifted(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.monitoring.background.UPDATE_SECONDS", 3600.0)  # no update in the background
    app = create_app(Settings(artifacts=artifacts, default_model="hosts", log_level="error", backend="torchscript"))
    service = app.state.service
    with running(app) as client:
        post_records(client, host_records(host_rows(200)))
        service.metrics.anomalies.update_drift(service.registry.catalogue)
        assert scrape(client)["elbo_drift_alarm", frozenset(MODEL.items())] == 0
        shifted = [record | {"load": record["load"] + 12} for record in host_records(host_rows(200))]
        post_records(client, shifted)
        service.metrics.anomalies.update_drift(service.registry.catalogue)
        assert scrape(client)["elbo_drift_alarm", frozenset(MODEL.items())] == 1
        assert scrape(client)["elbo_drift_evidence", frozenset(MODEL.items())] >= 3


def test_every_process_reports_the_sum_of_the_metrics_of_all_processes() -> None:
    segments = [Segment(2**20) for _ in range(3)]
    processes = [Metrics(SharedCounters(segments, index)) for index in range(3)]
    assert [metrics.is_leader for metrics in processes] == [True, False, False]
    for metrics in processes:
        metrics.anomalies.alarms.add(("m", "1", "a"), 2)
    assert processes[0].anomalies.alarms.sums() == {("m", "1", "a"): [6.0]}
    processes[0].anomalies.update_alerts([("m", "incident")], 1, {"sent": 2, "refused": 0, "retried": 0})
    text = processes[2].exposition(processes[2]._catalogue).decode()
    assert 'elbo_alerts{model="m"} 1.0' in text
    assert 'elbo_alert_pushes_total{outcome="sent"} 2.0' in text


def verdicts_of(severities: list[float], expected: list[list[float]]) -> Verdicts:
    """Return verdicts on rows i with the values (10 i, 10 i + 1). Only the first feature contributes to the score."""
    count = len(severities)
    x = 10 * np.arange(count, dtype=np.float32)[:, None] + np.array([0, 1], np.float32)
    scores = Scores(
        score=np.array(severities, np.float32),
        p_value=np.full(count, 0.5, np.float32),
        severity=np.array(severities, np.float32),
        parts=np.zeros((count, 1), np.float32),
        contribution=np.tile(np.array([1, 0], np.float32), (count, 1)),
        expected=np.array(expected, np.float32),
    )
    return Verdicts(InputRows(ParsedRows(x, list(range(count)), [], None), count), scores, [False] * count, None)


def test_causes_of_an_alert_say_when_the_deviation_began_if_the_model_has_a_window() -> None:
    features = [SimpleNamespace(name="cpu", unit="%"), SimpleNamespace(name="load", unit=None)]
    model: Any = SimpleNamespace(metric_labels=("m", "1"), manifest=SimpleNamespace(features=features, policy=None))
    metrics = Metrics(SharedCounters()).anomalies
    x = np.zeros((2, 5, 2), np.float32)
    x[:, -3:, 0] = 10.0  # cpu deviates in three rows
    course = UsualCourse(np.zeros(2), np.stack([np.eye(2)] * 2), np.ones((2, 2)), np.ones((2, 2)))
    onsets = Onsets(course, x.__getitem__, np.tile(1.7e9 + 60 * np.arange(5.0), (2, 1)).__getitem__)
    verdicts = verdicts_of([0.5, 5.0], [[0, 0], [7, 0]])._replace(past=Past([5, 5], 5, onsets=onsets))
    metrics.count(model, verdicts.input_rows, verdicts)
    assert metrics.causes_of_alert(Catalogue({"m": {1: model}}), ("m", "1", "")) == [
        "cpu 10 % (expected 7 %) since 2023-11-14T22:15:20Z"
    ]


def test_causes_of_an_alert_come_from_the_most_severe_row_with_a_verdict_and_stay_if_normal_rows_follow() -> None:
    features = [SimpleNamespace(name="cpu", unit="%"), SimpleNamespace(name="load", unit=None)]
    model: Any = SimpleNamespace(metric_labels=("m", "1"), manifest=SimpleNamespace(features=features, policy=None))
    catalogue = Catalogue({"m": {1: model}})
    labels = ("m", "1", "")
    metrics = Metrics(SharedCounters()).anomalies
    # The expected values of row 3 overflow, so that this row gets no verdict although it is the most severe.
    abnormal = verdicts_of([2.0, 5.0, 3.0, 9.0], [[0, 0], [7, 0], [0, 0], [np.inf, 0]])
    metrics.count(model, abnormal.input_rows, abnormal)
    assert metrics.causes_of_alert(catalogue, labels) == ["cpu 10 % (expected 7 %)"]
    normal = verdicts_of([0.5], [[0, 0]])  # the mean severity of the group stays above 1
    metrics.count(model, normal.input_rows, normal)
    assert metrics.alarms.sums()[labels] == [5.0]
    assert metrics.causes_of_alert(catalogue, labels) == ["cpu 10 % (expected 7 %)"]
