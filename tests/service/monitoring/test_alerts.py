"""Alerts: when they begin and end, and an Alertmanager that is down, slow, failing or refusing."""

import json
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from service.app import create_app
from service.monitoring import alerts, background
from service.monitoring.alerts import LASTS, RESEND, AlertSender, AlertState, Labels
from service.settings import Settings
from tests.service.hosts import host_records, host_rows
from tests.service.process import server_starter
from tests.service.running import running
from tests.service.scrape import scrape
from tests.waiting import wait_until

CALM = 60.0
A: Labels = ("m", "1", "a")
B: Labels = ("m", "1", "")


def seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_an_alert_begins_lasts_is_sent_again_and_ends() -> None:
    deciding = AlertState(CALM)
    assert deciding.look(0, {A: [5.0]}, {}) == {}  # of before this process
    found = deciding.look(1, {A: [6.0]}, {("m", "1", "cpu"): [1.0]})
    alert = found["m", "a"]
    assert alert["labels"] == {"alertname": "ElboAnomaly", "model": "m", "group": "a"}
    assert (seconds(alert["startsAt"]), seconds(alert["endsAt"])) == (1, 1 + LASTS)
    assert "most of all cpu" in alert["annotations"]["description"]
    assert deciding.look(2, {A: [6.0]}, {}) == {}
    again = deciding.look(1 + RESEND, {A: [9.0]}, {})["m", "a"]
    assert (again["labels"], again["startsAt"]) == (alert["labels"], alert["startsAt"])
    assert seconds(again["endsAt"]) == 1 + RESEND + LASTS
    assert "4 rows" in again["annotations"]["description"]
    for moment in range(2 + int(RESEND), int(RESEND + CALM)):
        assert "endsAt" not in deciding.look(moment, {A: [9.0]}, {}).get(("m", "b"), {})
    ended = deciding.look(1 + RESEND + CALM, {A: [9.0]}, {})["m", "a"]
    assert seconds(ended["endsAt"]) == 1 + RESEND + CALM
    assert deciding.active == {}
    assert deciding.look(2 + RESEND + CALM, {A: [9.0]}, {}) == {}


def test_groups_and_models_have_their_own_alerts_and_versions_share_one() -> None:
    deciding = AlertState(CALM)
    deciding.look(0, {}, {})
    found = deciding.look(1, {A: [1.0], B: [1.0], ("m", "2", "a"): [2.0], ("n", "1", "a"): [1.0]}, {})
    assert set(found) == {("m", "a"), ("m", ""), ("n", "a")}
    assert "group" not in found["m", ""]["labels"]
    assert deciding.active["m", "a"].rows == 3


def test_only_what_was_blamed_since_the_alert_began_is_named() -> None:
    deciding = AlertState(CALM)
    old: dict[Labels, list[float]] = {("m", "1", f"old{i}"): [100.0] for i in range(5)}
    old["n", "1", "other"] = [1.0]
    deciding.look(0, {}, old)
    new = old | {("m", "1", "x"): [3.0], ("m", "1", "y"): [1.0], ("n", "1", "other"): [9.0]}
    assert "most of all x, y (" in deciding.look(1, {A: [4.0]}, new)["m", "a"]["annotations"]["description"]


class Alertmanager:
    """A server that answers with `statuses` in turn, the last for ever, after `delay` seconds."""

    def __init__(self) -> None:
        self.statuses, self.delay = [200], 0.0
        self.taken: list[list[dict[str, Any]]] = []
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
                    outer.taken.append(json.loads(content))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,)).start()


@pytest.fixture
def alertmanager() -> Iterator[Alertmanager]:
    made = Alertmanager()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_alerts_are_posted_where_alertmanager_takes_them(alertmanager: Alertmanager) -> None:
    sender = AlertSender(f"http://user:p%40ss@127.0.0.1:{alertmanager.port}/prefix/")
    sender.start()
    sender.put({("m", "a"): {"labels": {"x": "1"}}, ("m", "b"): {"labels": {"x": "2"}}})
    wait_until(lambda: sender.waiting == 0)
    sender.close()
    assert alertmanager.taken == [[{"labels": {"x": "1"}}, {"labels": {"x": "2"}}]]
    assert alertmanager.paths == ["/prefix/api/v2/alerts"]
    assert alertmanager.headers[0]["Authorization"] == "Basic dXNlcjpwQHNz"
    assert sender.outcomes == {"sent": 2, "refused": 0, "retried": 0}


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_failing_alertmanager_is_tried_again_with_the_latest_alone(alertmanager: Alertmanager, status: int) -> None:
    alertmanager.statuses = [status] * 3 + [200]
    sender = AlertSender(f"http://127.0.0.1:{alertmanager.port}", backoff=(0.05, 0.1))
    sender.start()
    sender.put({("m", "a"): {"n": 1}})
    wait_until(lambda: sender.outcomes["retried"])
    sender.put({("m", "a"): {"n": 2}})
    wait_until(lambda: sender.waiting == 0)
    sender.close()
    assert alertmanager.taken[-1] == [{"n": 2}]
    assert sum(map(len, alertmanager.taken)) == 1
    assert sender.outcomes["retried"] == 3


def test_what_alertmanager_refuses_is_not_sent_again(alertmanager: Alertmanager) -> None:
    alertmanager.statuses = [400, 200]
    sender = AlertSender(f"http://127.0.0.1:{alertmanager.port}", backoff=(0.01, 0.01))
    sender.start()
    sender.put({("m", "a"): {"n": 1}})
    wait_until(lambda: sender.outcomes["refused"] == 1)
    assert sender.waiting == 0
    sender.close()
    assert alertmanager.taken == []


def test_one_that_is_down_is_found_again(alertmanager: Alertmanager) -> None:
    port = alertmanager.port
    alertmanager.server.shutdown()
    alertmanager.server.server_close()
    sender = AlertSender(f"http://127.0.0.1:{port}", backoff=(0.05, 0.1))
    sender.start()
    for number in range(1000):
        sender.put({("m", str(number % 10)): {"n": number}})
    assert sender.waiting == 10  # as many as there are groups
    wait_until(lambda: sender.outcomes["retried"] >= 20)
    started = time.monotonic()
    sender.close()
    assert time.monotonic() - started < 2


@pytest.fixture
def slow(alertmanager: Alertmanager, monkeypatch: pytest.MonkeyPatch) -> Alertmanager:
    monkeypatch.setattr(alerts, "TIMEOUT", 0.3)
    monkeypatch.setattr(background, "SECONDS", 0.1)
    alertmanager.delay = 1.0
    return alertmanager


def test_a_slow_alertmanager_holds_up_no_request(slow: Alertmanager, artifacts: Path) -> None:
    options = {"alertmanager_url": f"http://127.0.0.1:{slow.port}", "default_model": "hosts", "log_level": "error"}
    with running(create_app(Settings(artifacts=artifacts, **options))) as client:  # type: ignore[arg-type] # options of several types
        strange = dict.fromkeys(host_records(host_rows(1))[0], 1e5) | {"host": "web1"}
        took = []
        for _ in range(50):
            started = time.perf_counter()
            assert client.post("/anomaly", json={"records": [strange] * 3}).status_code == 200
            took.append(time.perf_counter() - started)
            time.sleep(0.02)
        wait_until(lambda: scrape(client).get(("elbo_alert_pushes_total", frozenset({("outcome", "retried")}))))
        assert scrape(client)["elbo_alerts", frozenset({("model", "hosts")})] == 1
        assert scrape(client)["elbo_alerts_waiting", frozenset()] == 1
    assert sorted(took)[45] < 0.3  # one that waited for a push would take all of its time-out


def test_the_whole_way_from_rows_to_an_alert_and_its_end(
    alertmanager: Alertmanager, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "SECONDS", 0.05)
    options = {"alertmanager_url": f"http://127.0.0.1:{alertmanager.port}", "default_model": "hosts"}
    settings = Settings(artifacts=artifacts, alert_calm_seconds=0.5, log_level="error", **options)  # type: ignore[arg-type] # options of several types
    with running(create_app(settings)) as client:
        calm = [record | {"host": "web2"} for record in host_records(host_rows(30))]
        client.post("/anomaly?alpha=0.001", json={"records": calm})
        strange = dict.fromkeys(host_records(host_rows(1))[0], 1e5) | {"host": "web1"}
        client.post("/anomaly?alpha=0.001", json={"records": [strange] * 3})
        wait_until(lambda: len(alertmanager.taken) >= 2)
    first, *_, last = [alert for batch in alertmanager.taken for alert in batch]
    assert {alert["labels"]["group"] for batch in alertmanager.taken for alert in batch} == {"web1"}
    assert first["labels"] == last["labels"]
    assert seconds(first["endsAt"]) > time.time() + 60
    assert seconds(last["endsAt"]) <= time.time()


def test_of_several_workers_one_alerts_by_the_sums_of_all(alertmanager: Alertmanager, artifacts: Path) -> None:
    settings = {"ALERTMANAGER_URL": f"http://127.0.0.1:{alertmanager.port}", "ALERT_CALM_SECONDS": 2}
    with server_starter() as start:
        process = start(artifacts, WORKERS=2, DEFAULT_MODEL="hosts", **settings)
        process.wait_for_worker()
        strange = dict.fromkeys(host_records(host_rows(1))[0], 1e5) | {"host": "web1"}
        clients = [process.client() for _ in range(6)]  # connections go to the workers in turn
        for client in clients:
            assert client.post("/anomaly", json={"records": [strange] * 5}).status_code == 200
        wait_until(lambda: len(alertmanager.taken) == 2)
        first, last = (alert for batch in alertmanager.taken for alert in batch)
        counted = scrape(clients[0])
        for client in clients:
            client.close()
        assert process.stop() == 0
    assert counted["elbo_alarms_total", frozenset({"model": "hosts", "version": "1", "group": "web1"}.items())] == 30
    assert first["labels"] == last["labels"] == {"alertname": "ElboAnomaly", "model": "hosts", "group": "web1"}
    assert "30 rows" in last["annotations"]["description"]
    assert seconds(last["endsAt"]) <= time.time()


@pytest.mark.parametrize("url", ["alertmanager:9093", "ftp://x", "http://"])
def test_an_address_that_is_none_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(ValueError, match="http://alertmanager:9093"):
        Settings(alertmanager_url=url)
