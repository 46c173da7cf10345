"""The policy of a served model: silences, the default alpha, and how long an alarm must last."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import numpy as np
import pytest

from models.policy_rules import AlarmRule, FeatureRule, Policy, Silence
from service.app import create_app
from service.settings import Settings
from tests.service.hosts import HOST_FEATURES, host_rows, host_table
from tests.service.running import post, running
from tests.service.scrape import scrape
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.timeline import Timeline
from training.train import train

pytestmark = pytest.mark.slow

POLICY = Policy(
    features={"cpu": FeatureRule(direction="high", minimum=-50.0)},
    silences=[Silence(zone="Europe/Berlin", start="02:00", end="04:00", groups=["db-*"])],
    alarms=AlarmRule(rows=3),
)
BROKEN = [8.0, 100.0, -8.0, 0.0]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Return a client of a server with three models: `hosts` under POLICY, `budget` with a budget, and `plain`."""
    root = tmp_path_factory.mktemp("artifacts")
    for name, policy in (("hosts", POLICY), ("plain", None)):
        config = TrainConfig(model="pca", name=name, latents=2)
        train(config, host_table(), root, RecordingReporter(), policy=policy)
    timeline = Timeline(
        time=600 * 10**9 * np.arange(400),
        group=np.zeros(400, np.int32),
        groups=("",),
        time_column="time",
        group_column=None,
        source_rows=np.arange(400),
    )
    config = TrainConfig(model="pca", name="budget", latents=2, time="time")
    table = replace(host_table(), timeline=timeline)
    train(config, table, root, RecordingReporter(), policy=Policy(alarms=AlarmRule(per_day=20.0)))
    settings = Settings(
        artifacts=root, poll_seconds=3600, log_level="warning", alert_half_life=0, alert_max_age_seconds=1e9
    )
    with running(create_app(settings)) as found:
        yield found


def records(values: list[float], times: list[str], host: str) -> dict[str, Any]:
    row = dict(zip(HOST_FEATURES, values, strict=True))
    return {"records": [{**row, "timestamp": time, "host": host} for time in times]}


def test_silenced_row_is_not_anomalous_and_says_so(client: httpx.Client) -> None:
    times = ["2024-01-15T00:59:59Z", "2024-01-15T01:00:00Z"]
    results = post(client, "/anomaly?model=hosts", records(BROKEN, times, "db-1"))["results"]
    assert [result["is_anomaly"] for result in results] == [True, False]
    assert [result.get("silenced") for result in results] == [None, True]
    assert results[0]["severity"] == results[1]["severity"] > 1
    other = post(client, "/anomaly?model=hosts", records(BROKEN, times, "web-1"))["results"]
    assert [result["is_anomaly"] for result in other] == [True, True]


def test_silenced_row_changes_no_other_verdict_of_the_request(client: httpx.Client) -> None:
    normal = dict(zip(HOST_FEATURES, host_rows(1)[0], strict=True)) | {"host": "db-1"}
    broken = dict(zip(HOST_FEATURES, BROKEN, strict=True)) | {"host": "db-1", "timestamp": "2024-01-15T01:00:00Z"}
    after = normal | {"timestamp": "2024-01-15T03:00:00Z"}
    smoothed = post(client, "/anomaly?model=hosts", {"records": [broken, after], "half_life": 1e6})["results"]
    alone = post(client, "/anomaly?model=hosts", {"records": [after], "half_life": 1e6})["results"]
    assert smoothed[1]["smoothed"] == pytest.approx(alone[0]["smoothed"])
    assert "smoothed" not in smoothed[0]
    decided = post(client, "/anomaly?model=hosts", {"records": [broken, broken, after], "fdr": 0.1})["results"]
    assert [result["is_anomaly"] for result in decided] == [False, False, False]


def alarms(client: httpx.Client, host: str) -> float:
    line = f'elbo_alarms_total{{group="{host}",model="hosts",version="1"}}'
    lines = client.get("/metrics").text.splitlines()
    found = [float(text.rpartition(" ")[2]) for text in lines if text.startswith(line)]
    return found[0] if found else 0.0


def test_alarm_needs_as_many_anomalous_rows_in_a_row_as_the_policy_says(client: httpx.Client) -> None:
    at = datetime(2024, 5, 3, 12, tzinfo=UTC)

    def send(values: list[float], count: int) -> None:
        nonlocal at
        times = [(at + timedelta(seconds=i)).isoformat() for i in range(count)]
        at += timedelta(seconds=count)
        post(client, "/anomaly?model=hosts", records(values, times, "web-9"))

    send(BROKEN, 2)
    send(host_rows(1)[0], 1)
    send(BROKEN, 2)
    assert alarms(client, "web-9") == 0
    send(BROKEN, 2)
    assert alarms(client, "web-9") == 2


def test_silenced_rows_raise_no_alarm(client: httpx.Client) -> None:
    post(client, "/anomaly?model=hosts", records(BROKEN, [f"2024-01-15T01:{i:02}:00Z" for i in range(9)], "db-2"))
    assert alarms(client, "db-2") == 0


def test_silenced_live_rows_are_counted_and_are_no_evidence_of_drift(client: httpx.Client) -> None:
    labels = frozenset({"model": "hosts", "version": "1"}.items())
    names = ("elbo_silenced_rows_total", "elbo_scored_rows_total", "elbo_p_value_count")
    before = [scrape(client)[name, labels] for name in names]  # exported from start-up
    silenced = [f"2024-01-15T01:{i:02}:00Z" for i in range(7)]
    later = [f"2024-01-15T09:{i:02}:00Z" for i in range(4)]
    body = records(BROKEN, [*silenced, *later], "db-3")
    body["records"][0]["cpu"] = "high"  # cannot be scored, so it does not count as silenced
    post(client, "/anomaly?model=hosts", body)
    post(client, "/anomaly?model=hosts", {**body, "observe": False})
    after = [scrape(client)[name, labels] for name in names]
    assert [last - first for last, first in zip(after, before, strict=True)] == [6, 10, 4]


def test_model_is_described_with_its_policy(client: httpx.Client) -> None:
    described = client.get("/models/hosts").json()
    assert described["policy"]["rules"]["features"]["cpu"]["direction"] == "high"
    assert described["parts"] == ["t2", "q", "range"]
    assert "policy" not in client.get("/models/plain").json()


def test_budget_of_the_policy_gives_the_default_alpha(client: httpx.Client) -> None:
    rows = {"inputs": host_rows(3)}
    alpha = client.get("/models/budget").json()["policy"]["alpha"]
    assert 0.06 < alpha < 0.3  # 20 alarms a day, of 144 rows
    assert post(client, "/anomaly?model=budget", rows)["alpha"] == alpha
    assert post(client, "/anomaly?model=budget", {**rows, "alpha": 0.01})["alpha"] == 0.01
    assert post(client, "/anomaly?model=budget&alpha=0.02", rows)["alpha"] == 0.02
    assert post(client, "/anomaly?model=plain", rows)["alpha"] == 0.05


def test_given_value_outside_of_its_valid_range_is_refused(client: httpx.Client) -> None:
    response = client.post("/sample", json={"given": {"cpu": -60.0}, "n": 2}, params={"model": "hosts"})
    problem = response.json()
    assert (response.status_code, problem["code"], problem["pointer"]) == (422, "invalid_rows", "/given/cpu"), problem
    assert (problem["expected"], problem["got"]) == ("a number from -50 to inf", "-60")
    assert len(post(client, "/sample?model=hosts", {"given": {"cpu": -40.0}, "n": 2})["outputs"]) == 2
