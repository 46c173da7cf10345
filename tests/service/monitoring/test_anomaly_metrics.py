"""What is counted of verdicts, through the real service, alone and by several processes; bounded whatever is sent."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.monitoring.anomaly_metrics import MOST_LABELS, P_BOUNDS
from service.monitoring.metrics import Metrics
from service.settings import Settings
from service.shared_memory import Segment, SharedCounters
from tests.service.hosts import HOST_FEATURES, host_records, host_rows, post_anomaly
from tests.service.running import running
from tests.service.scrape import increase, scrape

WHO = {"model": "hosts", "version": "1"}
JSON = "application/json"


@pytest.fixture(scope="module")
def app(artifacts: Path) -> FastAPI:
    return create_app(Settings(artifacts=artifacts, default_model="hosts", log_level="warning", backend="torchscript"))


@pytest.fixture(scope="module")
def hosts(app: FastAPI) -> Iterator[httpx.Client]:
    with running(app) as client:
        yield client


def post(client: httpx.Client, found: Sequence[Mapping[str, object]], **options: object) -> dict[str, object]:
    return post_anomaly(client, (json.dumps({"records": found, **options}).encode(), JSON))


@pytest.mark.parametrize("count", [1, 3, 50])
def test_rows_anomalies_p_values_and_gaps_are_counted(hosts: httpx.Client, count: int) -> None:
    found: list[dict[str, object]] = [{**record, "host": "h"} for record in host_records(host_rows(count))]
    found += [dict.fromkeys(HOST_FEATURES, 1e5) | {"host": "ill", "colour": 1}, {"cpu": "x"}]
    del found[0]["load"]
    before = scrape(hosts)
    answer = post(hosts, found, alpha=0.001)
    after = scrape(hosts)
    results: list[dict[str, float]] = answer["results"]  # type: ignore[assignment] # JSON
    assert increase(before, after, "elbo_scored_rows_total", **WHO) == len(results) == count + 1
    assert increase(before, after, "elbo_unreadable_rows_total", **WHO) == 1
    assert increase(before, after, "elbo_unknown_fields_total", **WHO) == 1
    assert increase(before, after, "elbo_missing_values_total", **WHO, feature="load") == 1
    assert increase(before, after, "elbo_anomalies_total", **WHO, group="ill") == 1
    assert increase(before, after, "elbo_anomalies_total", **WHO, group="h") == answer["anomalies"] - 1  # type: ignore[operator] # JSON
    p_values = np.array([result["p_value"] for result in results])
    for bound in P_BOUNDS:
        expected = (p_values <= bound * (1 + 1e-6)).sum()
        assert increase(before, after, "elbo_p_value_bucket", **WHO, le=str(bound)) == expected
    assert increase(before, after, "elbo_p_value_sum", **WHO) == pytest.approx(p_values.sum(), rel=1e-5)
    cause = next(r for r in results if r["is_anomaly"] and r["score"] > 1e6)["features"][0]["name"]  # type: ignore[index] # JSON
    assert increase(before, after, "elbo_anomaly_causes_total", **WHO, feature=cause) >= 1


def test_a_group_raises_an_alarm_when_its_mean_is_abnormal(hosts: httpx.Client) -> None:
    before = scrape(hosts)
    strange = dict.fromkeys(HOST_FEATURES, 1e5) | {"host": "lasting"}
    post(hosts, [strange] * 5)
    assert increase(before, scrape(hosts), "elbo_alarms_total", **WHO, group="lasting") == 5


def test_groups_that_senders_invent_fill_no_memory(hosts: httpx.Client) -> None:
    strange = dict.fromkeys(HOST_FEATURES, 1e5)
    for start in range(0, 3 * MOST_LABELS, 50):
        post(hosts, [strange | {"host": f"h{start + i}"} for i in range(50)])
    groups = {dict(labels)["group"] for name, labels in scrape(hosts) if name == "elbo_anomalies_total"}
    assert MOST_LABELS - 10 < len(groups) <= MOST_LABELS + 1  # some were known before, and normal
    assert "other" in groups


def test_a_model_that_has_become_stale_says_so(artifacts: Path) -> None:
    app = create_app(Settings(artifacts=artifacts, default_model="hosts", log_level="error", backend="torchscript"))
    service = app.state.service
    with running(app) as client:
        post(client, host_records(host_rows(200)))
        service.metrics.judged.look_for_drift(service.registry.catalogue)
        assert scrape(client)["elbo_drift_alarm", frozenset(WHO.items())] == 0
        moved = [record | {"load": record["load"] + 12} for record in host_records(host_rows(200))]
        post(client, moved)
        service.metrics.judged.look_for_drift(service.registry.catalogue)
        assert scrape(client)["elbo_drift_alarm", frozenset(WHO.items())] == 1
        assert scrape(client)["elbo_drift_evidence", frozenset(WHO.items())] >= 3


def test_the_sums_of_several_processes_decide_and_one_of_them_tells() -> None:
    parts = [Segment(2**20) for _ in range(3)]
    telemetries = [Metrics(SharedCounters(parts, number)) for number in range(3)]
    assert [one.leads for one in telemetries] == [True, False, False]
    for one in telemetries:
        one.judged.alarms.add(("m", "1", "a"), 2)
    assert telemetries[0].judged.alarms.sums() == {("m", "1", "a"): [6.0]}
    telemetries[0].judged.tell_of_alerts([("m", "a")], 1, {"sent": 2, "refused": 0, "retried": 0})
    found = telemetries[2].exposition(telemetries[2]._catalogue).decode()
    assert 'elbo_alerts{model="m"} 1.0' in found
    assert 'elbo_alert_pushes_total{outcome="sent"} 2.0' in found
