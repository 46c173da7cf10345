"""Alerts: when they begin and are resolved, and what happens if Alertmanager is down or slow, or refuses alerts."""

import json
import re
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from service.anomaly.online_calibration import State
from service.app import create_app
from service.monitoring import alerts, background
from service.monitoring.alert_states import AlertStates
from service.monitoring.alerts import EXPIRY_SECONDS, RESEND_SECONDS, AlertSender, AlertState
from service.monitoring.metric_types import Labels
from service.settings import Settings
from service.shared_memory import Segment, SharedCounters
from tests.service.hosts import host_records, host_rows
from tests.service.process import server_starter
from tests.service.running import running
from tests.service.scrape import scrape
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

RESOLVE_SECONDS = 60.0
A: Labels = ("m", "1", "a")
B: Labels = ("m", "1", "")


def seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def no_causes(_: Labels) -> list[str]:
    return []


def test_alert_is_sent_when_it_begins_then_at_intervals_and_when_it_is_resolved() -> None:
    state = AlertState(RESOLVE_SECONDS)
    assert state.update(0, {A: [5.0]}, no_causes) == {}  # the baseline: rows counted before this process started
    due = state.update(1, {A: [6.0]}, lambda labels: [f"cpu of {labels[2]}"])
    alert = due["m", "a"]
    assert alert["labels"] == {"alertname": "ElboAnomaly", "severity": "page", "model": "m", "group": "a"}
    assert (seconds(alert["startsAt"]), seconds(alert["endsAt"])) == (1, 1 + EXPIRY_SECONDS)
    assert "main causes: cpu of a (" in alert["annotations"]["description"]
    assert state.update(2, {A: [6.0]}, no_causes) == {}
    again = state.update(1 + RESEND_SECONDS, {A: [9.0]}, no_causes)["m", "a"]
    assert (again["labels"], again["startsAt"]) == (alert["labels"], alert["startsAt"])
    assert seconds(again["endsAt"]) == 1 + RESEND_SECONDS + EXPIRY_SECONDS
    assert "4 abnormal rows" in again["annotations"]["description"]
    for moment in range(2 + int(RESEND_SECONDS), int(RESEND_SECONDS + RESOLVE_SECONDS)):
        assert "endsAt" not in state.update(moment, {A: [9.0]}, no_causes).get(("m", "b"), {})
    ended = state.update(1 + RESEND_SECONDS + RESOLVE_SECONDS, {A: [9.0]}, no_causes)["m", "a"]
    assert seconds(ended["endsAt"]) == 1 + RESEND_SECONDS + RESOLVE_SECONDS
    assert state.active == {}
    assert state.update(2 + RESEND_SECONDS + RESOLVE_SECONDS, {A: [9.0]}, no_causes) == {}


def test_each_group_of_a_model_has_one_alert_for_all_versions() -> None:
    state = AlertState(RESOLVE_SECONDS)
    state.update(0, {}, no_causes)
    due = state.update(1, {A: [1.0], B: [1.0], ("m", "2", "a"): [2.0], ("n", "1", "a"): [1.0]}, no_causes)
    assert set(due) == {("m", "a"), ("m", ""), ("n", "a")}
    assert "group" not in due["m", ""]["labels"]
    assert state.active["m", "a"].rows == 3


def test_alert_keeps_the_causes_of_the_latest_abnormal_row_until_it_is_resolved() -> None:
    state = AlertState(RESOLVE_SECONDS)
    state.update(0, {}, no_causes)
    state.update(1, {A: [1.0]}, lambda _: ["x 1 (expected 2)", "y 3 (expected 4)"])
    ended = state.update(1 + RESOLVE_SECONDS, {A: [1.0]}, no_causes)["m", "a"]
    assert "main causes: x 1 (expected 2), y 3 (expected 4) (" in ended["annotations"]["description"]


def test_alert_stays_open_during_an_incident_and_then_says_that_the_group_has_changed() -> None:
    states: dict[Labels, State | None] = {A: "incident"}
    state = AlertState(RESOLVE_SECONDS)
    state.update(0, {}, no_causes, states.get)
    begun = state.update(1, {A: [1.0], B: [1.0]}, no_causes, states.get)
    assert begun["m", "a"]["annotations"]["state"] == "incident"
    assert "the incident goes on (" in begun["m", "a"]["annotations"]["description"]
    assert "state" not in begun["m", ""]["annotations"]
    later = 1 + 10 * RESOLVE_SECONDS
    assert set(state.update(later, {A: [1.0], B: [1.0]}, no_causes, states.get)) == {("m", "a"), ("m", "")}
    assert set(state.active) == {("m", "a")}  # no alarm for 10 * RESOLVE_SECONDS, but the incident goes on
    states[A] = "changed"
    changed = state.update(later + 1, {A: [1.0]}, no_causes, states.get)["m", "a"]  # at once, not at the next interval
    assert changed["labels"] == begun["m", "a"]["labels"]
    assert changed["startsAt"] == begun["m", "a"]["startsAt"]
    assert changed["annotations"]["state"] == "changed"
    assert "present rows are judged as its new normal (" in changed["annotations"]["description"]
    ended = state.update(later + RESOLVE_SECONDS, {A: [1.0]}, no_causes, states.get)["m", "a"]
    assert seconds(ended["endsAt"]) == later + RESOLVE_SECONDS
    assert ended["annotations"]["state"] == "changed"
    assert state.active == {}


def test_incident_without_an_alarm_begins_no_alert() -> None:
    state = AlertState(RESOLVE_SECONDS)
    state.update(0, {A: [1.0]}, no_causes, lambda _: "incident")
    assert state.update(1, {A: [1.0]}, no_causes, lambda _: "incident") == {}


def test_latest_state_of_any_process_counts_until_it_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [Segment(4096), Segment(4096)]
    first, second = (AlertStates(SharedCounters(segments, index), max_age=60.0) for index in range(2))
    assert first.latest(A) is None
    first.record(A, "incident")
    assert (first.latest(A), second.latest(A), second.latest(B)) == ("incident", "incident", None)
    second.record(A, "changed")
    assert (first.latest(A), second.latest(A)) == ("changed", "changed")
    now = time.monotonic()
    monkeypatch.setattr("service.monitoring.alert_states.monotonic", lambda: now + 61)
    assert first.latest(A) is None


class Alertmanager:
    """A fake Alertmanager that responds after `delay` seconds with the next of `statuses`; the last status repeats."""

    def __init__(self) -> None:
        self.statuses, self.delay = [200], 0.0
        self.accepted: list[list[dict[str, Any]]] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                time.sleep(outer.delay)
                outer.paths.append(self.path)
                outer.headers.append(dict(self.headers))
                status = outer.statuses.pop(0) if len(outer.statuses) > 1 else outer.statuses[0]
                if status == 200:
                    outer.accepted.append(json.loads(content))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,)).start()


@pytest.fixture
def alertmanager() -> Iterator[Alertmanager]:
    server = Alertmanager()
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_sender_posts_with_credentials_to_the_api_below_the_prefix_of_the_url(alertmanager: Alertmanager) -> None:
    sender = AlertSender(f"http://user:p%40ss@127.0.0.1:{alertmanager.port}/prefix/")
    sender.start()
    sender.enqueue({("m", "a"): {"labels": {"x": "1"}}, ("m", "b"): {"labels": {"x": "2"}}})
    wait_until(lambda: sender.pending == 0)
    sender.close()
    assert alertmanager.accepted == [[{"labels": {"x": "1"}}, {"labels": {"x": "2"}}]]
    assert alertmanager.paths == ["/prefix/api/v2/alerts"]
    assert alertmanager.headers[0]["Authorization"] == "Basic dXNlcjpwQHNz"
    assert sender.outcomes == {"sent": 2, "refused": 0, "retried": 0}


@pytest.mark.parametrize("status", [500, 503, 429])
def test_sender_retries_with_only_the_latest_alert_if_alertmanager_fails(
    alertmanager: Alertmanager, status: int
) -> None:
    alertmanager.statuses = [status] * 3 + [200]
    sender = AlertSender(f"http://127.0.0.1:{alertmanager.port}", retry_seconds=(0.05, 0.1))
    sender.start()
    sender.enqueue({("m", "a"): {"n": 1}})
    wait_until(lambda: sender.outcomes["retried"])
    sender.enqueue({("m", "a"): {"n": 2}})
    wait_until(lambda: sender.pending == 0)
    sender.close()
    assert alertmanager.accepted[-1] == [{"n": 2}]
    assert sum(map(len, alertmanager.accepted)) == 1
    assert sender.outcomes["retried"] == 3


def test_refused_alerts_are_not_sent_again(alertmanager: Alertmanager) -> None:
    alertmanager.statuses = [400, 200]
    sender = AlertSender(f"http://127.0.0.1:{alertmanager.port}", retry_seconds=(0.01, 0.01))
    sender.start()
    sender.enqueue({("m", "a"): {"n": 1}})
    wait_until(lambda: sender.outcomes["refused"] == 1)
    assert sender.pending == 0
    sender.close()
    assert alertmanager.accepted == []


def test_sender_keeps_one_alert_per_group_and_closes_quickly_if_alertmanager_is_down(
    alertmanager: Alertmanager,
) -> None:
    port = alertmanager.port
    alertmanager.server.shutdown()
    alertmanager.server.server_close()
    sender = AlertSender(f"http://127.0.0.1:{port}", retry_seconds=(0.05, 0.1))
    sender.start()
    for number in range(1000):
        sender.enqueue({("m", str(number % 10)): {"n": number}})
    assert sender.pending == 10  # one per group
    wait_until(lambda: sender.outcomes["retried"] >= 20)
    started = time.monotonic()
    sender.close()
    assert time.monotonic() - started < 2


@pytest.fixture
def slow_alertmanager(alertmanager: Alertmanager, monkeypatch: pytest.MonkeyPatch) -> Alertmanager:
    monkeypatch.setattr(alerts, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(background, "UPDATE_SECONDS", 0.1)
    alertmanager.delay = 1.0
    return alertmanager


@pytest.mark.alone
def test_requests_do_not_wait_for_alertmanager_if_it_is_slow(slow_alertmanager: Alertmanager, artifacts: Path) -> None:
    options = {
        "alertmanager_url": f"http://127.0.0.1:{slow_alertmanager.port}",
        "default_model": "hosts",
        "log_level": "error",
    }
    with running(create_app(Settings(artifacts=artifacts, **options))) as client:  # type: ignore[arg-type] # values of several types
        abnormal = dict.fromkeys(host_records(host_rows(1))[0], 1e5) | {"host": "web1"}
        durations = []
        for _ in range(50):
            started = time.perf_counter()
            assert client.post("/anomaly", json={"records": [abnormal] * 3}).status_code == 200
            durations.append(time.perf_counter() - started)
            time.sleep(0.02)
        wait_until(lambda: scrape(client).get(("elbo_alert_pushes_total", frozenset({("outcome", "retried")}))))
        assert scrape(client)["elbo_alerts", frozenset({("model", "hosts")})] == 1
        assert scrape(client)["elbo_alerts_waiting", frozenset()] == 1
    assert sorted(durations)[45] < 0.3  # a request that waited for Alertmanager would take 0.3 s, the timeout


def test_posted_abnormal_rows_raise_an_alert_that_is_resolved_later(
    alertmanager: Alertmanager, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "UPDATE_SECONDS", 0.05)
    options = {"alertmanager_url": f"http://127.0.0.1:{alertmanager.port}", "default_model": "hosts"}
    settings = Settings(artifacts=artifacts, alert_calm_seconds=0.5, log_level="error", **options)  # type: ignore[arg-type] # values of several types
    with running(create_app(settings)) as client:
        normal = [record | {"host": "web2"} for record in host_records(host_rows(30))]
        client.post("/anomaly?alpha=0.001&extrapolated=true", json={"records": normal})
        abnormal = dict.fromkeys(host_records(host_rows(1))[0], 1e5) | {"host": "web1"}
        client.post("/anomaly?alpha=0.001&extrapolated=true", json={"records": [abnormal] * 3})
        wait_until(lambda: len(alertmanager.accepted) >= 2)
    first, *_, last = [alert for batch in alertmanager.accepted for alert in batch]
    assert {alert["labels"]["severity"] for batch in alertmanager.accepted for alert in batch} == {"page"}
    assert {alert["labels"]["group"] for batch in alertmanager.accepted for alert in batch} == {"web1"}
    assert first["labels"] == last["labels"]
    assert seconds(first["endsAt"]) > time.time() + 60
    assert seconds(last["endsAt"]) <= time.time()


def posted_alerts(
    alertmanager: Alertmanager, artifacts: Path, monkeypatch: pytest.MonkeyPatch, content: Any, **settings: Any
) -> list[dict[str, Any]]:
    """Post `content` to /anomaly and return the first alert of each group that Alertmanager gets, sorted by group."""
    monkeypatch.setattr(background, "UPDATE_SECONDS", 0.05)
    url = f"http://127.0.0.1:{alertmanager.port}"
    options = {"alertmanager_url": url, "default_model": "hosts", "log_level": "error", **settings}
    with running(create_app(Settings(artifacts=artifacts, **options))) as client:
        assert client.post("/anomaly", json=content).status_code == 200
        wait_until(lambda: alertmanager.accepted)
    first: dict[str, dict[str, Any]] = {}
    for alert in (alert for batch in alertmanager.accepted for alert in batch):
        first.setdefault(alert["labels"].get("group", ""), alert)
    return [first[group] for group in sorted(first)]


def test_alert_names_the_value_seen_and_expected_of_the_features_of_its_own_group(
    alertmanager: Alertmanager, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups are abnormal at once, each because of another feature; normal rows come before and after."""
    normal = host_records(host_rows(1))[0]
    hot, full = normal | {"cpu": 90.0}, normal | {"load": 5000.0}
    records = [
        *(normal | {"host": host} for host in ("a", "b")), hot | {"host": "a"}, full | {"host": "b"},
        *(normal | {"host": host} for host in ("a", "b")),
    ]  # fmt: skip
    verdicts: list[dict[str, Any]] = []
    with running(create_app(Settings(artifacts=artifacts, default_model="hosts", log_level="error"))) as client:
        verdicts = client.post("/anomaly", json={"records": records, "explain": 1}).json()["results"]
    alerts_by_group = posted_alerts(alertmanager, artifacts, monkeypatch, {"records": records})
    assert [alert["labels"]["group"] for alert in alerts_by_group] == ["a", "b"]
    for alert, row, unit in zip(alerts_by_group, (2, 3), (" %", ""), strict=True):
        (cause,) = verdicts[row]["features"]
        description = alert["annotations"]["description"]
        match = re.search(r"main causes: (\S+) (\S+)( %)? \(expected (\S+)( %)?\)", description)
        assert match, description
        assert (match[1], float(match[2]), match[3] or "") == (cause["name"], cause["value"], unit)
        assert float(match[4]) == pytest.approx(cause["expected"], rel=1e-4)


def test_alert_names_the_expected_value_of_a_feature_that_is_missing(
    alertmanager: Alertmanager, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"cpu": 3.0, "memory/used": 160.0, "load": 9e3, "host": "a"}
    (alert,) = posted_alerts(alertmanager, artifacts, monkeypatch, {"records": [record], "impute": True})
    assert "nan" not in alert["annotations"]["description"]


def test_severity_of_alerts_is_a_setting(
    alertmanager: Alertmanager, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    abnormal = dict.fromkeys(host_records(host_rows(1))[0], 1e5)
    (alert,) = posted_alerts(alertmanager, artifacts, monkeypatch, {"records": [abnormal]}, alert_severity="critical")
    assert alert["labels"] == {"alertname": "ElboAnomaly", "severity": "critical", "model": "hosts"}


def test_trial_requests_and_history_raise_no_alert(
    alertmanager: Alertmanager, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "UPDATE_SECONDS", 0.05)
    options = {"alertmanager_url": f"http://127.0.0.1:{alertmanager.port}", "default_model": "hosts"}
    settings = Settings(artifacts=artifacts, log_level="error", **options)  # type: ignore[arg-type] # values of several types
    abnormal = dict.fromkeys(host_records(host_rows(1))[0], 1e5)
    with running(create_app(settings)) as client:
        client.post("/anomaly?observe=false", json={"records": [abnormal | {"host": "trial"}] * 9})
        client.post("/anomaly", json={"records": [abnormal | {"host": "old", "timestamp": "2025-01-01T00:00:00Z"}] * 9})
        client.post("/anomaly", json={"records": [abnormal | {"host": "live"}] * 9})
        wait_until(lambda: alertmanager.accepted)
    groups = {alert["labels"]["group"] for batch in alertmanager.accepted for alert in batch}
    assert groups == {"live"}


def test_alert_of_two_workers_is_sent_once_with_the_rows_of_both(alertmanager: Alertmanager, artifacts: Path) -> None:
    settings = {"ALERTMANAGER_URL": f"http://127.0.0.1:{alertmanager.port}", "ALERT_CALM_SECONDS": 2}
    with server_starter() as start:
        process = start(artifacts, WORKERS=2, DEFAULT_MODEL="hosts", **settings)
        process.wait_for_worker()
        abnormal = dict.fromkeys(host_records(host_rows(1))[0], 1e5) | {"host": "web1"}
        clients = [process.client() for _ in range(6)]  # the supervisor spreads their connections over both workers
        for client in clients:
            assert client.post("/anomaly", json={"records": [abnormal] * 5}).status_code == 200
        wait_until(lambda: len(alertmanager.accepted) == 2)
        first, last = (alert for batch in alertmanager.accepted for alert in batch)
        samples = scrape(clients[0])
        for client in clients:
            client.close()
        assert process.stop() == 0
    assert samples["elbo_alarms_total", frozenset({"model": "hosts", "version": "1", "group": "web1"}.items())] == 30
    labels = {"alertname": "ElboAnomaly", "severity": "page", "model": "hosts", "group": "web1"}
    assert first["labels"] == last["labels"] == labels
    assert "30 abnormal rows" in last["annotations"]["description"]
    # The causes were recorded by either worker; the leader reads them.
    assert re.search(r"main causes: \S+ 100000( %| MB)? \(expected ", last["annotations"]["description"])
    assert seconds(last["endsAt"]) <= time.time()


@pytest.mark.parametrize("url", ["alertmanager:9093", "ftp://x", "http://"])
def test_settings_are_refused_if_the_alertmanager_url_is_invalid(url: str) -> None:
    with pytest.raises(ValueError, match="http://alertmanager:9093"):
        Settings(alertmanager_url=url)
