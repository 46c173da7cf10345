"""The files of deploy/, and the whole monitoring loop with the real Prometheus, Alertmanager and node exporter."""

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.core import Metric

from service.anomaly.series_mapping import read_mappings
from service.monitoring.alerts import AlertState
from service.monitoring.metrics import Metrics
from service.shared_memory import SharedCounters
from tests.conftest import require
from tests.data import ROOT
from tests.plain_http import NO_AUTHORITIES
from tests.ports import free_port, free_ports
from tests.preloaded import PreloadedProcess
from tests.service.access.keys import KeySet
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "elbo.json").read_text())
PROGRAMS = ("prometheus", "promtool", "prometheus-alertmanager", "amtool", "prometheus-node-exporter")
SUFFIXES = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("_total",), "gauge": ("",)}


def require_programs(*programs: str) -> None:
    for program in programs:
        require(shutil.which(program), f"no {program}: apt-get install prometheus prometheus-alertmanager "
                "prometheus-node-exporter")  # fmt: skip


def exported_series() -> set[str]:
    """Return the names of all series that /metrics can contain."""
    families: list[Metric] = list(Metrics(SharedCounters()).registry.collect())
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


def queries() -> dict[str, str]:
    """Return the queries of all dashboard panels and all rules, keyed by the name of the panel or rule."""
    expressions = {f"panel {p['title']}": target["expr"] for p in DASHBOARD["panels"] for target in p["targets"]}
    for path in (DEPLOY / "prometheus").glob("*.rules.yml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            expressions |= {f"rule {rule.get('alert', rule.get('record'))}": rule["expr"] for rule in group["rules"]}
    return expressions


def test_dashboard_and_rules_use_only_metrics_that_exist() -> None:
    series = exported_series()
    used = {(where, name) for where, query in queries().items() for name in re.findall(r"\belbo_[a-z_]+\b", query)}
    assert len(used) >= 15
    assert {(where, name) for where, name in used if name not in series} == set()


def test_dashboard_has_panels_for_load_latency_anomalies_and_drift() -> None:
    panels = " ".join(queries())
    for subject in ("Requests", "Latency", "Queue", "anomalies", "p-values", "Drift"):
        assert subject in panels
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"] for source in sources}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_prometheus_records_and_sends_every_series_in_the_remote_write_mapping() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "node.rules.yml").read_text())["groups"][0]["rules"]
    (target,) = read_mappings(DEPLOY / "elbo" / "remote-write.toml").values()
    assert set(target.features.values()) == {rule["record"] for rule in rules}
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    kept = re.compile(config["remote_write"][0]["write_relabel_configs"][0]["regex"])
    assert all(kept.fullmatch(series) for series in target.features.values())


def test_promtool_and_amtool_accept_the_configuration() -> None:
    require_programs("promtool", "amtool")
    for command in (
        ["promtool", "check", "config", str(DEPLOY / "prometheus" / "prometheus.yml")],
        ["promtool", "check", "rules", *map(str, (DEPLOY / "prometheus").glob("*.rules.yml"))],
        ["amtool", "check-config", str(DEPLOY / "alertmanager" / "alertmanager.yml")],
    ):
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "FAILED" not in result.stdout + result.stderr


Firing = dict[str, str]  # the labels of an alert that fires, without `severity`


def check_rules(folder: Path, series: dict[str, str], cases: list[tuple[str, str, list[Firing]]]) -> None:
    """Let promtool evaluate the alert rules on simulated series.

    Args:
        folder: where the test file is written.
        series: the values of each series, one per minute, in promtool's notation.
        cases: the time, the name of an alert, and the labels of the alerts of that name that must fire then.
    """
    require_programs("promtool")
    rules = yaml.safe_load((DEPLOY / "prometheus" / "elbo.rules.yml").read_text())["groups"][0]["rules"]
    rule_of = {rule["alert"]: rule for rule in rules}

    def expected(alert: str, labels: Firing) -> dict[str, dict[str, str]]:
        annotations = {
            name: re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda match: labels[match[1]], text)
            for name, text in rule_of[alert]["annotations"].items()
        }
        return {"exp_labels": labels | rule_of[alert]["labels"], "exp_annotations": annotations}

    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {"eval_time": when, "alertname": alert, "exp_alerts": [expected(alert, labels) for labels in firing]}
            for when, alert, firing in cases
        ],
    }
    path = folder / "tests.yml"
    rules_file = str(DEPLOY / "prometheus" / "elbo.rules.yml")
    path.write_text(yaml.safe_dump({"rule_files": [rules_file], "evaluation_interval": "1m", "tests": [test]}))
    result = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


API = {"instance": "api:8000"}


def requests(endpoint: str, status: int) -> str:
    """Return the name of the series that counts the requests to `endpoint` with `status`."""
    return f'elbo_requests_total{{instance="api:8000", endpoint="{endpoint}", model="", version="", status="{status}"}}'


def test_alert_rules_fire_and_stop_on_simulated_series(tmp_path: Path) -> None:
    model = API | {"model": "node", "version": "1"}
    series = {
        'elbo_drift_alarm{instance="api:8000", model="node", version="1"}': "0x9 1x40 0x10",
        'up{job="elbo", instance="api:8000"}': "1x4 0x4 1x60",
    }
    down = API | {"job": "elbo"}
    cases: list[tuple[str, str, list[Firing]]] = [
        ("30m", "ElboModelStale", []), ("45m", "ElboModelStale", [model]), ("55m", "ElboModelStale", []),
        ("7m", "ElboDown", [down]), ("12m", "ElboDown", []),
    ]  # fmt: skip
    check_rules(tmp_path, series, cases)


def test_every_rule_has_the_severity_page_or_ticket() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "elbo.rules.yml").read_text())["groups"][0]["rules"]
    assert {rule["labels"]["severity"] for rule in rules} == {"page", "ticket"}


@pytest.mark.parametrize("endpoint", ["/api/v1/write", "/anomaly", "/anomaly:stream", "/readyz"])
def test_failure_alert_does_not_fire_before_the_first_model_is_published(tmp_path: Path, endpoint: str) -> None:
    """On the first day, every sender gets 503 for hours, while Prometheus scrapes /metrics."""
    series = {requests(endpoint, 503): "0+12x300", requests("/metrics", 200): "0+4x300"}
    check_rules(tmp_path, series, [(f"{minutes}m", "ElboFails", []) for minutes in (6, 30, 290)])


def test_failure_alert_does_not_fire_when_the_first_model_is_published(tmp_path: Path) -> None:
    """The last responses with 503 and the first with 204 are in the same window of five minutes."""
    series = {requests("/api/v1/write", 503): "0+12x60 720x60", requests("/api/v1/write", 204): "_x60 0+12x60"}
    check_rules(tmp_path, series, [(f"{minutes}m", "ElboFails", []) for minutes in range(55, 90, 5)])


@pytest.mark.parametrize("endpoint", ["/api/v1/write", "/anomaly"])
def test_failure_alert_fires_if_an_endpoint_that_has_succeeded_responds_with_503(tmp_path: Path, endpoint: str) -> None:
    """The model is served for an hour, then it is gone. The 1st window with 503 ends 1 minute later."""
    series = {requests(endpoint, 200): "0+12x60 720x60", requests(endpoint, 503): "0x60 12+12x60"}
    check_rules(tmp_path, series, [("60m", "ElboFails", []), ("68m", "ElboFails", [API]), ("115m", "ElboFails", [API])])


def test_failure_alert_fires_if_the_server_restarts_without_the_model_that_it_served(tmp_path: Path) -> None:
    """A restart removes the series of successes, because they are counted in memory."""
    series = {requests("/api/v1/write", 204): "0+12x60 _x60", requests("/api/v1/write", 503): "_x60 0+12x60"}
    check_rules(tmp_path, series, [("68m", "ElboFails", [API])])


@pytest.mark.parametrize("status", [500, 504])
def test_failure_alert_fires_for_other_errors_of_the_server_even_on_the_first_day(tmp_path: Path, status: int) -> None:
    series = {requests("/anomaly", status): "0+1x60", requests("/anomaly", 200): "0+9x60"}
    check_rules(tmp_path, series, [("4m", "ElboFails", []), ("20m", "ElboFails", [API])])


def test_failure_alert_does_not_fire_for_one_error_in_a_thousand_requests(tmp_path: Path) -> None:
    series = {requests("/anomaly", 500): "0+1x60", requests("/anomaly", 200): "0+999x60"}
    check_rules(tmp_path, series, [("20m", "ElboFails", []), ("50m", "ElboFails", [])])


@contextmanager
def running_alertmanager(folder: Path) -> Iterator[httpx.Client]:
    """Run the real Alertmanager with the configuration of deploy/, and yield a client of its API."""
    require_programs("prometheus-alertmanager")
    port = free_port()
    command = [
        "prometheus-alertmanager", f"--config.file={DEPLOY}/alertmanager/alertmanager.yml", "--cluster.listen-address=",
        f"--storage.path={folder}/am", f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with running_program(*command), httpx.Client(verify=NO_AUTHORITIES, base_url=f"http://127.0.0.1:{port}") as client:
        wait_until(is_up(port, "/-/ready"), 60, httpx.TransportError)
        yield client


def test_no_other_alert_about_a_model_mutes_the_alert_about_its_anomalies(tmp_path: Path) -> None:
    """Every alert of the rules fires for the model at once; Alertmanager must still notify of the anomaly."""
    rules = yaml.safe_load((DEPLOY / "prometheus" / "elbo.rules.yml").read_text())["groups"][0]["rules"]
    labels = {"model": "node", "version": "1", "instance": "api:8000", "job": "elbo", "code": "overloaded"}
    others = [{"labels": labels | rule["labels"] | {"alertname": rule["alert"]}} for rule in rules]
    state = AlertState(60)
    state.update(0, {}, lambda _: [])
    now = time.time()
    (anomaly,) = state.update(now, {("node", "1", "web1"): [1.0]}, lambda _: ["cpu 9 (expected 1)"]).values()
    with running_alertmanager(tmp_path) as client:
        assert client.post("/api/v2/alerts", json=others).status_code == 200
        assert client.post("/api/v2/alerts", json=[anomaly]).status_code == 200

        def listed() -> dict[str, dict[str, Any]]:
            return {alert["labels"]["alertname"]: alert for alert in client.get("/api/v2/alerts").json()}

        wait_until(lambda: len(listed()) == len(rules) + 1)
        wait_until(lambda: all(alert["status"]["state"] != "unprocessed" for alert in listed().values()))
        found = listed()
    status = found["ElboAnomaly"]["status"]
    assert (status["state"], status["inhibitedBy"]) == ("active", [])
    receivers = {name: [receiver["name"] for receiver in alert["receivers"]] for name, alert in found.items()}
    assert receivers == {
        "ElboAnomaly": ["page"], **{rule["alert"]: [rule["labels"]["severity"]] for rule in rules}
    }  # fmt: skip


# The whole loop

FEATURES = ("app_queue_depth", "app_latency_seconds", "node_memory_MemTotal_bytes")


class Application:
    """Writes the metrics of an application to a text file for the node exporter. `overloaded` makes them abnormal."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "app.prom"
        self.overloaded = False
        self._closing = threading.Event()
        self._random = random.Random(0)
        self._write()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _write(self) -> None:
        depth = self._random.gauss(900 if self.overloaded else 50, 5)
        latency = self._random.gauss(3 if self.overloaded else 0.2, 0.02)
        new = self._path.with_suffix(".new")
        new.write_text(f"app_queue_depth {depth}\napp_latency_seconds {latency}\n")
        new.rename(self._path)

    def _run(self) -> None:
        while not self._closing.wait(0.05):
            self._write()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()


@contextmanager
def running_program(*command: str, **environment: str) -> Iterator[None]:
    """Run a program until the block ends."""
    program = PreloadedProcess(
        list(command),
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(program.stdout or ()))
    reader.start()
    try:
        yield
    except BaseException:
        print(command[0], "".join(output[-20:]))
        raise
    finally:
        program.terminate()
        try:
            assert program.wait(20) in (0, -15, 143), "".join(output[-20:])
        finally:
            program.kill()
            program.wait()
        reader.join()
        assert program.stdout
        program.stdout.close()


def is_up(port: int, path: str) -> Callable[[], bool]:
    return lambda: httpx.get(f"http://127.0.0.1:{port}{path}", verify=NO_AUTHORITIES).status_code == 200


def anomaly_alerts(port: int) -> list[dict[str, Any]]:
    """Return the alerts about anomalies that Alertmanager lists."""
    alerts: list[dict[str, Any]] = httpx.get(f"http://127.0.0.1:{port}/api/v2/alerts", verify=NO_AUTHORITIES).json()
    return [alert for alert in alerts if alert["labels"]["alertname"] == "ElboAnomaly"]


def write_prometheus_config(folder: Path, exporter: int, elbo: int) -> Path:
    """Write the Prometheus configuration of deploy/, but with the ports of this test and with short intervals."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / "node.rules.yml")]
    config["scrape_configs"] = [
        {"job_name": "node", "static_configs": [{"targets": [f"127.0.0.1:{exporter}"], "labels": {"instance": "web1"}}]}
    ]
    del config["alerting"]
    (remote_write,) = config["remote_write"]
    remote_write["url"] = f"http://127.0.0.1:{elbo}/api/v1/write"
    remote_write["queue_config"] |= {"batch_send_deadline": "300ms", "max_backoff": "500ms"}
    remote_write["write_relabel_configs"][0]["regex"] = "|".join(FEATURES)
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_anomaly_in_node_metrics_raises_an_alert_that_ends_with_the_anomaly(tmp_path: Path) -> None:
    require_programs(*PROGRAMS)
    exporter, prometheus, alertmanager, elbo = free_ports(4)
    for name in ("text", "artifacts"):
        (tmp_path / name).mkdir()
    mapping = tmp_path / "map.toml"
    features = "".join(f'{name} = "{name}"\n' for name in FEATURES)
    mapping.write_text(f"[node]\nalpha = 0.001\nextrapolated = true\nwait_seconds = 2\n[node.features]\n{features}")
    local = "--web.listen-address=127.0.0.1:"
    with ExitStack() as stack:
        app = Application(tmp_path / "text")
        stack.callback(app.close)
        start = stack.enter_context
        collectors = [f"--collector.{name}" for name in ("disable-defaults", "meminfo", "textfile")]
        textfile = f"--collector.textfile.directory={tmp_path}/text"
        start(running_program("prometheus-node-exporter", *collectors, textfile, f"{local}{exporter}"))
        config = f"--config.file={DEPLOY}/alertmanager/alertmanager.yml"
        storage = f"--storage.path={tmp_path}/am"
        start(
            running_program(
                "prometheus-alertmanager", config, storage, "--cluster.listen-address=", f"{local}{alertmanager}"
            )
        )
        start(running_program(
            sys.executable, "-m", "service", ELBO_PORT=str(elbo), ELBO_ARTIFACTS=str(tmp_path / "artifacts"),
            ELBO_POLL_SECONDS="0.2", ELBO_REMOTE_WRITE=str(mapping), ELBO_ALERT_CALM_SECONDS="3",
            ELBO_ALERTMANAGER_URL=f"http://127.0.0.1:{alertmanager}", ELBO_LOG_FORMAT="text",
        ))  # fmt: skip
        # Prometheus starts last and therefore stops first. If Elbo stopped first, Prometheus would retry remote write
        # for a minute.
        config = f"--config.file={write_prometheus_config(tmp_path, exporter, elbo)}"
        start(running_program("prometheus", config, f"--storage.tsdb.path={tmp_path}/tsdb", f"{local}{prometheus}"))
        wait_until(is_up(exporter, "/"), 60, httpx.TransportError)
        wait_until(is_up(alertmanager, "/-/ready"), 60, httpx.TransportError)
        wait_until(is_up(prometheus, "/-/ready"), 60, httpx.TransportError)
        time.sleep(15)  # Prometheus collects normal rows for training
        train_on_history(tmp_path, mapping, prometheus)
        wait_until(is_up(elbo, "/readyz"), 30, httpx.TransportError)
        wait_until(lambda: scored_rows(elbo) > 20, 60, httpx.TransportError)
        wait_until(lambda: anomaly_alerts(alertmanager) == [], 60, httpx.TransportError)
        app.overloaded = True
        wait_until(lambda: anomaly_alerts(alertmanager) != [], 60, httpx.TransportError)
        (alert,) = anomaly_alerts(alertmanager)
        labels = {"alertname": "ElboAnomaly", "severity": "page", "model": "node", "group": "web1"}
        assert alert["labels"] == labels
        assert alert["status"]["state"] == "active"
        causes = r"main causes: app_\w+ \S+ \(expected \S+\)"
        assert re.search(causes, alert["annotations"]["description"])
        app.overloaded = False
        wait_until(lambda: anomaly_alerts(alertmanager) == [], 60, httpx.TransportError)
        text = httpx.get(f"http://127.0.0.1:{elbo}/metrics", verify=NO_AUTHORITIES).text
        assert re.search(r'^elbo_anomalies_total\{group="web1",model="node",version="1"\} [1-9]', text, re.MULTILINE)
        assert re.search(r'^elbo_alerts\{model="node"\} 0', text, re.MULTILINE)


def train_on_history(folder: Path, mapping: Path, prometheus: int) -> None:
    """Train a PCA on the samples in Prometheus and publish it to the server's artifact folder."""
    from tests.commands import command

    table = folder / "node.csv"
    with table.open("w") as file:
        options = ["--url", f"http://127.0.0.1:{prometheus}", "--hours", "0.02", "--step", "0.2"]
        history = [sys.executable, str(DEPLOY / "history.py"), str(mapping), "node", *options]
        subprocess.run(history, stdout=file, check=True)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) > 40
    assert tuple(rows[0]) == ("time", "host", *FEATURES)
    folders = {"ELBO_ARTIFACTS": str(folder / "artifacts"), "ELBO_RUNS": str(folder / "runs")}
    options = ["--model", "pca", "--latents", "1", "--name", "node", "--time", "time", "--group", "host"]
    result = command("train", str(table), *options, environment=folders)
    assert result.returncode == 0, result.stdout + result.stderr


def scored_rows(port: int) -> float:
    """Return how many rows Elbo has scored."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", verify=NO_AUTHORITIES).text
    match = re.search(r"^elbo_scored_rows_total\{.*\} (\S+)", text, re.MULTILINE)
    return float(match[1]) if match else 0.0


def test_prometheus_scrapes_and_sends_with_a_key_if_authorization_is_uncommented_in_its_configuration(
    tmp_path: Path,
) -> None:
    require_programs("prometheus")
    keys = KeySet(tmp_path / "keys.toml")
    (tmp_path / "elbo.key").write_text(keys.add("prometheus", "metrics", "write"))
    prometheus, elbo = free_ports(2)
    text = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
    text, uncommented = re.subn(r"# (authorization: .*)", r"\1", text)
    assert uncommented == 2
    config = yaml.safe_load(text.replace("/etc/prometheus", str(tmp_path)).replace("api:8000", f"127.0.0.1:{elbo}"))
    config["global"] = {"scrape_interval": "200ms", "scrape_timeout": "200ms"}
    config["rule_files"], config["alerting"] = [], {}
    config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] == "elbo"]
    config["remote_write"][0]["write_relabel_configs"][0]["regex"] = "up"
    path = tmp_path / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))

    def counted(endpoint: str, status: int) -> bool:
        headers = {"X-API-Key": keys.values["prometheus"]}
        metrics = httpx.get(f"http://127.0.0.1:{elbo}/metrics", verify=NO_AUTHORITIES, headers=headers).text
        return f'endpoint="{endpoint}",key="prometheus",model="",status="{status}",version=""' in metrics

    settings = {"ELBO_PORT": str(elbo), "ELBO_ARTIFACTS": str(tmp_path / "none"), "ELBO_API_KEYS_FILE": str(keys.path)}
    storage = [f"--storage.tsdb.path={tmp_path}/tsdb", "--storage.remote.flush-deadline=1s"]
    local = f"--web.listen-address=127.0.0.1:{prometheus}"
    with ExitStack() as stack:
        stack.enter_context(running_program(sys.executable, "-m", "service", **settings))
        stack.enter_context(running_program("prometheus", f"--config.file={path}", *storage, local))
        wait_until(lambda: counted("/metrics", 200), 60, httpx.TransportError)
        # No model is served, so the samples are refused, but not because of the key.
        wait_until(lambda: counted("/api/v1/write", 503), 60, httpx.TransportError)
        assert not counted("/api/v1/write", 403)
        query = httpx.get(
            f"http://127.0.0.1:{prometheus}/api/v1/query", verify=NO_AUTHORITIES, params={"query": 'up{job="elbo"}'}
        ).json()
        assert query["data"]["result"][0]["value"][1] == "1"
