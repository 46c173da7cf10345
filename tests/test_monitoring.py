"""The monitoring loop, with the real Prometheus, Alertmanager and node exporter; and what deploy/ holds is true."""

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
import yaml
from prometheus_client.core import Metric

from service.anomaly.series_mapping import read_mappings
from service.monitoring.metrics import Metrics
from service.shared_memory import SharedCounters
from tests.conftest import require
from tests.data import ROOT
from tests.waiting import wait_until

DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "elbo.json").read_text())
PROGRAMS = ("prometheus", "promtool", "prometheus-alertmanager", "amtool", "prometheus-node-exporter")
SUFFIXES = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("_total",), "gauge": ("",)}


def need(*programs: str) -> None:
    for program in programs:
        require(shutil.which(program), f"no {program}: apt-get install prometheus prometheus-alertmanager "
                "prometheus-node-exporter")  # fmt: skip


def exported() -> set[str]:
    """Every series that /metrics can have, by its name."""
    families: list[Metric] = list(Metrics(SharedCounters()).registry.collect())
    return {family.name + suffix for family in families for suffix in SUFFIXES[family.type]}


def queries() -> dict[str, str]:
    """Every expression of the dashboard and of the rules, by what it is for."""
    found = {f"panel {p['title']}": target["expr"] for p in DASHBOARD["panels"] for target in p["targets"]}
    for path in (DEPLOY / "prometheus").glob("*.rules.yml"):
        for group in yaml.safe_load(path.read_text())["groups"]:
            found |= {f"rule {rule.get('alert', rule.get('record'))}": rule["expr"] for rule in group["rules"]}
    return found


def test_every_metric_that_the_dashboard_or_a_rule_names_exists() -> None:
    known, asked = exported(), queries()
    named = {(where, name) for where, query in asked.items() for name in re.findall(r"\belbo_[a-z_]+\b", query)}
    assert len(named) >= 15
    assert {(where, name) for where, name in named if name not in known} == set()


def test_the_dashboard_shows_what_an_operator_looks_for() -> None:
    told = " ".join(queries())
    for subject in ("Requests", "Latency", "Queue", "anomalies", "p-values", "Drift"):
        assert subject in told
    sources = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"] for source in sources}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_series_of_the_mapping_are_those_that_the_rules_record() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "node.rules.yml").read_text())["groups"][0]["rules"]
    (target,) = read_mappings(DEPLOY / "elbo" / "remote-write.toml").values()
    assert set(target.features.values()) == {rule["record"] for rule in rules}
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    kept = re.compile(config["remote_write"][0]["write_relabel_configs"][0]["regex"])
    assert all(kept.fullmatch(series) for series in target.features.values())


def test_promtool_and_amtool_find_no_fault() -> None:
    need("promtool", "amtool")
    for command in (
        ["promtool", "check", "config", str(DEPLOY / "prometheus" / "prometheus.yml")],
        ["promtool", "check", "rules", *map(str, (DEPLOY / "prometheus").glob("*.rules.yml"))],
        ["amtool", "check-config", str(DEPLOY / "alertmanager" / "alertmanager.yml")],
    ):
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "FAILED" not in result.stdout + result.stderr


def test_promtool_fires_the_rules_when_it_should(tmp_path: Path) -> None:
    need("promtool")
    labels = {"instance": "api:8000", "model": "node", "version": "1"}
    series = "{" + ", ".join(f'{name}="{value}"' for name, value in labels.items()) + "}"
    stale = {"exp_labels": labels | {"severity": "ticket"}}
    down = {"exp_labels": {"instance": "api:8000", "job": "elbo", "severity": "page"}}
    tests = {
        "rule_files": [str(DEPLOY / "prometheus" / "elbo.rules.yml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": f"elbo_drift_alarm{series}", "values": "0x9 1x40 0x10"},
                    {"series": 'up{job="elbo", instance="api:8000"}', "values": "1x4 0x4 1x60"},
                ],
                "alert_rule_test": [
                    {"eval_time": "30m", "alertname": "ElboModelStale", "exp_alerts": []},
                    {"eval_time": "45m", "alertname": "ElboModelStale", "exp_alerts": [stale]},
                    {"eval_time": "55m", "alertname": "ElboModelStale", "exp_alerts": []},
                    {"eval_time": "7m", "alertname": "ElboDown", "exp_alerts": [down]},
                    {"eval_time": "12m", "alertname": "ElboDown", "exp_alerts": []},
                ],
            }
        ],
    }
    rules = yaml.safe_load((DEPLOY / "prometheus" / "elbo.rules.yml").read_text())["groups"][0]["rules"]
    told = {"ElboModelStale": labels, "ElboDown": {"instance": "api:8000"}}
    for case in tests["tests"][0]["alert_rule_test"]:  # type: ignore[index] # YAML
        rule = next(rule for rule in rules if rule.get("alert") == case["alertname"])
        for alert in case["exp_alerts"]:
            alert["exp_annotations"] = {
                name: re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda m: told[case["alertname"]][m[1]], text)  # noqa: B023 - called at once
                for name, text in rule["annotations"].items()
            }
    path = tmp_path / "tests.yml"
    path.write_text(yaml.safe_dump(tests))
    result = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


# The loop

FEATURES = ("app_queue_depth", "app_latency_seconds", "node_memory_MemTotal_bytes")


class App:
    """What the node exporter's textfile collector tells of an application; `ill` for one that is overrun."""

    def __init__(self, folder: Path) -> None:
        self._path, self.ill, self._closing = folder / "app.prom", False, threading.Event()
        self._random = random.Random(0)
        self._write()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _write(self) -> None:
        depth = self._random.gauss(900 if self.ill else 50, 5)
        latency = self._random.gauss(3 if self.ill else 0.2, 0.02)
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
def process(*command: str, **environment: str) -> Iterator[None]:
    """A program that runs until the block ends."""
    started = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.extend(started.stdout or ()))
    reader.start()
    try:
        yield
    except BaseException:
        print(command[0], "".join(output[-20:]))
        raise
    finally:
        started.terminate()
        try:
            assert started.wait(20) in (0, -15, 143), "".join(output[-20:])
        finally:
            started.kill()
            started.wait()
        reader.join()
        assert started.stdout
        started.stdout.close()


def free_ports(count: int) -> list[int]:
    import socket

    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


def up(port: int, path: str) -> Callable[[], bool]:
    return lambda: httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200


def alerts(port: int) -> list[dict[str, Any]]:
    """What Alertmanager shows."""
    found: list[dict[str, Any]] = httpx.get(f"http://127.0.0.1:{port}/api/v2/alerts").json()
    return [alert for alert in found if alert["labels"]["alertname"] == "ElboAnomaly"]


def configured(folder: Path, exporter: int, elbo: int) -> Path:
    """deploy/'s Prometheus with the addresses and the pace of this test."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / "node.rules.yml")]
    config["scrape_configs"] = [
        {"job_name": "node", "static_configs": [{"targets": [f"127.0.0.1:{exporter}"], "labels": {"instance": "web1"}}]}
    ]
    del config["alerting"]
    (writing,) = config["remote_write"]
    writing["url"] = f"http://127.0.0.1:{elbo}/api/v1/write"
    writing["queue_config"] |= {"batch_send_deadline": "300ms", "max_backoff": "500ms"}
    writing["write_relabel_configs"][0]["regex"] = "|".join(FEATURES)
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_node_metrics_reach_elbo_and_an_anomaly_becomes_an_alert_that_resolves(tmp_path: Path) -> None:
    need(*PROGRAMS)
    exporter, prometheus, alertmanager, elbo = free_ports(4)
    for name in ("text", "artifacts"):
        (tmp_path / name).mkdir()
    mapping = tmp_path / "map.toml"
    features = "".join(f'{name} = "{name}"\n' for name in FEATURES)
    mapping.write_text(f"[node]\nalpha = 0.001\nwait_seconds = 2\n[node.features]\n{features}")
    local = "--web.listen-address=127.0.0.1:"
    with ExitStack() as stack:
        app = App(tmp_path / "text")
        stack.callback(app.close)
        start = stack.enter_context
        collectors = [f"--collector.{name}" for name in ("disable-defaults", "meminfo", "textfile")]
        told = f"--collector.textfile.directory={tmp_path}/text"
        start(process("prometheus-node-exporter", *collectors, told, f"{local}{exporter}"))
        config = f"--config.file={DEPLOY}/alertmanager/alertmanager.yml"
        where = f"--storage.path={tmp_path}/am"
        start(process("prometheus-alertmanager", config, where, "--cluster.listen-address=", f"{local}{alertmanager}"))
        start(process(
            sys.executable, "-m", "service", ELBO_PORT=str(elbo), ELBO_ARTIFACTS=str(tmp_path / "artifacts"),
            ELBO_POLL_SECONDS="0.2", ELBO_REMOTE_WRITE=str(mapping), ELBO_ALERT_CALM_SECONDS="3",
            ELBO_ALERTMANAGER_URL=f"http://127.0.0.1:{alertmanager}", ELBO_LOG_FORMAT="text",
        ))  # fmt: skip
        # Last, so that it ends first: one that cannot write what it has goes on for a minute.
        config = f"--config.file={configured(tmp_path, exporter, elbo)}"
        start(process("prometheus", config, f"--storage.tsdb.path={tmp_path}/tsdb", f"{local}{prometheus}"))
        wait_until(up(exporter, "/"), 60, httpx.TransportError)
        wait_until(up(alertmanager, "/-/ready"), 60, httpx.TransportError)
        wait_until(up(prometheus, "/-/ready"), 60, httpx.TransportError)
        time.sleep(15)  # what is normal, to train on
        train(tmp_path, mapping, prometheus)
        wait_until(up(elbo, "/readyz"), 30, httpx.TransportError)
        wait_until(lambda: scored(elbo) > 20, 60, httpx.TransportError)
        wait_until(lambda: alerts(alertmanager) == [], 60, httpx.TransportError)
        app.ill = True
        wait_until(lambda: alerts(alertmanager) != [], 60, httpx.TransportError)
        (alert,) = alerts(alertmanager)
        assert alert["labels"] == {"alertname": "ElboAnomaly", "model": "node", "group": "web1"}
        assert alert["status"]["state"] == "active"
        assert "most of all app_" in alert["annotations"]["description"]
        app.ill = False
        wait_until(lambda: alerts(alertmanager) == [], 60, httpx.TransportError)
        text = httpx.get(f"http://127.0.0.1:{elbo}/metrics").text
        assert re.search(r'^elbo_anomalies_total\{group="web1",model="node",version="1"\} [1-9]', text, re.MULTILINE)
        assert re.search(r'^elbo_alerts\{model="node"\} 0', text, re.MULTILINE)


def train(folder: Path, mapping: Path, prometheus: int) -> None:
    """A PCA of what Prometheus has seen, published where the server looks."""
    from tests.commands import command

    table = folder / "node.csv"
    with table.open("w") as file:
        options = ["--url", f"http://127.0.0.1:{prometheus}", "--hours", "0.02", "--step", "0.2"]
        history = [sys.executable, str(DEPLOY / "history.py"), str(mapping), "node", *options]
        subprocess.run(history, stdout=file, check=True)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) > 40
    assert tuple(rows[0]) == FEATURES
    folders = {"ELBO_ARTIFACTS": str(folder / "artifacts"), "ELBO_RUNS": str(folder / "runs")}
    done = command("train", str(table), "--model", "pca", "--latents", "1", "--name", "node", environment=folders)
    assert done.returncode == 0, done.stdout + done.stderr


def scored(port: int) -> float:
    """How many rows Elbo has judged."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    found = re.search(r"^elbo_scored_rows_total\{.*\} (\S+)", text, re.MULTILINE)
    return float(found[1]) if found else 0.0
