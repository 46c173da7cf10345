"""`elbo backtest` and POST /backtest give the same report, with the verdicts and alerts of the service."""

import json
import re
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import httpx
import numpy as np
import pytest

from models.manifest import read_manifest
from models.policy_rules import Policy
from service.anomaly.streams import JoinedRows
from service.app import create_app
from service.backtest.history import History, sort_history
from service.backtest.replay import DEFAULT_ALPHAS, Options, Replay, Replayer, replay
from service.backtest.report import list_alerts
from service.inference.model_loader import ModelLoader
from service.monitoring.alerts import AlertState
from service.monitoring.background import find_usual_step
from service.settings import Settings
from tests.commands import in_process
from tests.plain_http import NO_AUTHORITIES
from tests.service.running import post, running
from tests.service.scrape import scrape
from tests.waiting import wait_until
from training.config import TrainConfig
from training.data.table import read_table
from training.progress import SilentReporter
from training.train import train

pytestmark = pytest.mark.slow

NAMES = ["cpu", "disk", "load"]
HOSTS = ["a", "b", "c"]
START = 1_767_225_600  # 2026-01-01
ALPHAS = (0.05, 0.01)
POLICY = Policy.model_validate(
    {
        "alarms": {"rows": 3, "seconds": 150, "per_day": 36},
        "silences": [{"start": "02:30", "end": "03:30", "groups": ["a", "b"]}],
    }
)


def table(rows: int, start: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of three hosts, a row a minute, in order of time. Host b has an incident in its last third.

    In the history (seed 1), host c has a gap, and one row of host b is repeated with another value.
    """
    random = np.random.default_rng(seed)
    found = []
    for minute in range(rows):
        for number, host in enumerate(HOSTS):
            x = random.normal(size=3) + np.array([number, 0, 0])
            x[2] += x[0]
            if seed and host == "b" and 2 * rows / 3 < minute < 2 * rows / 3 + 40:
                x[1] += 6
            record = dict(zip(NAMES, x.round(4).tolist(), strict=True))
            found.append({"ts": start + 60 * minute, "host": host, **record})
    if seed:
        found = [row for row in found if row["host"] != "c" or not 100 <= (row["ts"] - start) // 60 < 130]
        found.insert(197, {**found[196], "cpu": 9.0})
    return found


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with the models `rows`, `windows`, `scaled` and `plain`, and the file of their history.

    `windows` has a policy. `scaled` has a window, and its rows are scaled by group. `plain` was trained without times.
    """
    folder = tmp_path_factory.mktemp("backtest")
    path = write_csv(folder / "train.csv", table(900, START - 10**6, seed=0))
    data = read_table(path, time="ts", group="host")
    write_csv(folder / "history.csv", table(300, START, seed=1))
    for name, window in (("rows", None), ("windows", 9)):
        config = TrainConfig(model="pca", name=name, latents=2, time="ts", group="host", window=window)
        train(config, data, folder, SilentReporter(), policy=POLICY if window else None)
    scaled = TrainConfig(model="pca", name="scaled", latents=2, time="ts", group="host", window=9, scale_by_group=True)
    train(scaled, data, folder, SilentReporter())
    plain = read_table(path, drop=("ts", "host"))
    train(TrainConfig(model="pca", name="plain", latents=2, drop=("ts", "host")), plain, folder, SilentReporter())
    return folder


def history() -> tuple[History, list[dict[str, Any]]]:
    rows = table(300, START, seed=1)
    x = np.array([[row[name] for name in NAMES] for row in rows], np.float32)
    time = np.array([row["ts"] for row in rows], np.float64)
    return sort_history(x, time, [row["host"] for row in rows], np.arange(len(rows))), rows


def replayed(root: Path, name: str, **options: Any) -> Replay:
    served = ModelLoader(backend="torchscript").load(root / name / "1" / "model.pt", name, 1)
    return replay(served, history()[0], Options(ALPHAS, **options))


@pytest.mark.parametrize(
    ("name", "online"),
    [("rows", True), ("rows", False), ("windows", True), ("scaled", True), ("scaled", False), ("plain", True)],
)
def test_verdicts_of_a_replay_equal_the_served_ones_row_by_row(root: Path, name: str, online: bool) -> None:
    judged = replayed(root, name, online=online)
    place = np.argsort(judged.history.source_rows)  # of each row of the source, its place in the replay
    rows = history()[1]
    live, others = ALPHAS
    served: dict[float, list[dict[str, Any]]] = {live: [], others: []}
    settings = Settings(
        artifacts=root, default_model=name, backend="torchscript", log_level="warning", online_calibration=online
    )
    with running(create_app(settings)) as client:
        for start in range(0, len(rows), 37):  # a request ends in the middle of a minute
            body = {"records": rows[start : start + 37]}
            served[others] += post(client, "/anomaly", {**body, "alpha": others, "observe": False})["results"]
            served[live] += post(client, "/anomaly", {**body, "alpha": live})["results"]
    silent = np.array([row.get("silenced", False) for row in served[live]])
    assert silent.sum() == (120 if name == "windows" else 0)
    for index, alpha in enumerate(ALPHAS):
        assert len(served[alpha]) == len(rows)
        assert [row["is_anomaly"] for row in served[alpha]] == judged.is_anomaly[index, place].tolist()
        np.testing.assert_allclose([row["p_value"] for row in served[alpha]], judged.p_value[place], rtol=1e-5)
        severities = np.array([row["severity"] for row in served[alpha]])
        np.testing.assert_allclose(severities[~silent], judged.severity[index, place][~silent], rtol=1e-3)
    assert (judged.states is not None) == (online and name != "plain")
    onsets = 0
    for row, judged_row in zip(served[live], place.tolist(), strict=True):
        if row["is_anomaly"]:
            since = [cause.since for cause in judged.causes_of(judged_row)]
            assert since == [feature.get("since") for feature in row["features"][: len(since)]]
            onsets += sum(time is not None for time in since)
    assert (onsets > 0) == (name in ("windows", "scaled"))
    if judged.states is not None:
        assert [row["state"] for row in served[live]] == np.array(judged.states)[place].tolist()
    assert judged.is_anomaly[1].any()
    assert not judged.is_anomaly[0].all()


def is_open(state: AlertState, group: str, started: float) -> bool:
    """Return whether a group has an active alert that began at `started`."""
    return any(name == group and alert.started == started for (_, name), alert in state.active.items())


def rows_with_an_incident_and_a_change() -> list[dict[str, Any]]:
    """Return rows of the three hosts, a row a minute. Host b has an incident, and later changes for good.

    The incident begins before a silence of the model `windows`, and goes on after it.
    """
    rows = table(460, START, seed=0)
    for row in rows:
        minute = (row["ts"] - START) // 60
        if row["host"] == "b" and (110 <= minute < 185 or minute >= 270):
            row["disk"] += 6
    return rows


@pytest.mark.parametrize(("name", "half_life", "calm_seconds"), [("rows", 3.0, 1.0), ("windows", 0.0, 300.0)])
def test_replay_gives_the_alerts_that_the_service_sends_for_the_same_rows(
    root: Path, name: str, half_life: float, calm_seconds: float
) -> None:
    rows = rows_with_an_incident_and_a_change()
    settings = Settings(
        artifacts=root,
        default_model=name,
        backend="torchscript",
        log_level="warning",
        alert_half_life=half_life,
        alert_max_age_seconds=1e9,
    )
    app = create_app(settings)
    state = AlertState(calm_seconds)
    open_alerts: dict[str, tuple[float, float]] = {}
    sent: list[tuple[str, float, float]] = []
    states: dict[str, list[str | None]] = {}
    with running(app) as client:
        anomalies = app.state.service.metrics.anomalies
        step_of = partial(find_usual_step, app.state.service.registry.catalogue)

        def update(now: float) -> None:
            state.update(now, anomalies.alarms.sums(), lambda _: [], anomalies.alert_states.latest, step_of)

        update(START - 60)
        for start in range(0, len(rows), len(HOSTS)):
            post(client, "/anomaly", {"records": rows[start : start + len(HOSTS)]})
            now = float(rows[start]["ts"])
            update(now)
            ended = [group for group, (started, _) in open_alerts.items() if not is_open(state, group, started)]
            sent += [(group, *open_alerts.pop(group)) for group in ended]
            for (_, group), alert in state.active.items():
                states.setdefault(group, []).append(alert.state)
                if alert.rule.last_abnormal == now:
                    open_alerts[group] = alert.started, now
            update(now + 59)
    sent += [(group, *times) for group, times in open_alerts.items()]
    x = np.array([[row[feature] for feature in NAMES] for row in rows], np.float32)
    times = np.array([row["ts"] for row in rows], np.float64)
    rehearsed = sort_history(x, times, [row["host"] for row in rows], np.arange(len(rows)))
    served = ModelLoader(backend="torchscript").load(root / name / "1" / "model.pt", name, 1)
    alpha = served.default_alpha or 0.05
    options = Options((alpha, 0.01), alert_half_life=half_life, calm_seconds=calm_seconds)
    judged = replay(served, rehearsed, options)
    found = list_alerts(judged, 0, np.zeros(len(rows), bool))
    assert sorted(sent) == sorted((alert.group, alert.start, alert.end) for alert in found)
    assert judged.calm_seconds == max(calm_seconds, 90.0)
    assert len(found) >= 2
    assert {"incident", "changed"} <= set(states["b"])
    assert {alert.state for alert in found if alert.group == "b"} >= {"changed"}
    anomalous_runs = np.flatnonzero(np.diff(judged.is_anomaly[0].astype(int), prepend=0) == 1)
    assert [alert.first_row for alert in found] != anomalous_runs.tolist()


def test_replay_in_chunks_of_any_size_gives_the_same_verdicts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replayed(root, "windows")
    monkeypatch.setattr("service.backtest.replay.CHUNK_ROWS", 53)
    parts = replayed(root, "windows")
    np.testing.assert_array_equal(parts.is_anomaly, whole.is_anomaly)
    np.testing.assert_allclose(parts.p_value, whole.p_value, rtol=1e-5)
    assert parts.states == whole.states
    np.testing.assert_array_equal(parts.causes_rows, whole.causes_rows)


@pytest.mark.parametrize("name", ["rows", "windows"])
def test_smoothed_replay_equals_one_request_with_the_whole_history(root: Path, name: str) -> None:
    judged = replayed(root, name, half_life_rows=3.0)
    place = np.argsort(judged.history.source_rows)
    settings = Settings(artifacts=root, default_model=name, backend="torchscript", log_level="warning")
    with running(create_app(settings)) as client:
        body = {"records": history()[1], "alpha": ALPHAS[0], "half_life_rows": 3.0}
        served = post(client, "/anomaly", body)["results"]
    assert [row["is_anomaly"] for row in served] == judged.is_anomaly[0, place].tolist()


def test_command_reports_alarms_incidents_and_causes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    incidents = root / "incidents.csv"
    incidents.write_text(f"start,end,host\n{START + 60 * 201},{START + 60 * 240},b\n")
    page = root / "page.html"
    arguments = ["rows", str(root / "history.csv"), "--labels", str(incidents), "--artifacts", str(root)]
    arguments += ["--alert-half-life", "0"]
    status, out, _ = in_process(capsys, "backtest", *arguments, "--html", str(page))
    assert status == 0
    assert re.search(r"0\.05 .* 1 of 1 +0 s", out)
    assert "disk" in page.read_text()
    status, out, _ = in_process(capsys, "backtest", *arguments, "--alpha", "0.05", "--json")
    report = json.loads(out)
    judged = replayed(root, "rows")
    assert status == 0
    assert report["rows"] == len(judged.history)
    assert report["alphas"][0]["anomalous_rows"] == int(judged.is_anomaly[0].sum())
    assert {group["group"]: group["rows"] for group in report["groups"]} == {"a": 300, "b": 301, "c": 270}
    assert report["incidents"][0]["delay_seconds"] == [0.0]


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("cpu,disk,load\n1,2,3\n", [], "has no column of times: .* --time"),
        ("ts,cpu,disk,load\nnow,1,2,3\n", [], "no row can be judged .*'ts' has 'now', which is not a timestamp"),
        ("ts,cpu,disk,load\n1,1,2,3\n", ["--alpha", "0"], "--alpha: expected numbers above 0 and below 1, got 0.0"),
        ("ts,cpu,disk,load\n1,1,2,3\n", ["--labels", "none.csv"], "cannot read the incidents in none.csv"),
        ("ts,cpu,disk,load\n1,1,2,3\n", ["--html", "/none/page.html"], "--html: there is no folder /none"),
    ],
)
def test_history_or_option_that_cannot_be_used_exits_with_status_2(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, arguments: list[str], message: str
) -> None:
    path = tmp_path / "history.csv"
    path.write_text(content)
    status, _, err = in_process(capsys, "backtest", "rows", str(path), *arguments, "--artifacts", str(root))
    assert status == 2
    assert re.search(f"elbo: error: .*{message}", err)


def test_command_begins_with_the_alpha_that_keeps_the_budget_of_the_policy(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(root / "windows" / "1" / "model.pt")
    assert manifest.policy is not None
    arguments = ["windows", str(root / "history.csv"), "--json", "--artifacts", str(root)]
    status, out, _ = in_process(capsys, "backtest", *arguments)
    assert status == 0
    assert [summary["alpha"] for summary in json.loads(out)["alphas"]] == [manifest.policy.alpha, *DEFAULT_ALPHAS]


def test_faulty_rows_cost_only_themselves(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "history.csv"
    path.write_text("ts,host,cpu,disk,load\n60,a,1,2,3\nlater,a,1,2,3\n120,a,1,x,3\n180,a,1,2,3\n")
    status, out, err = in_process(capsys, "backtest", "rows", str(path), "--json", "--artifacts", str(root))
    assert status == 0
    assert (json.loads(out)["rows"], json.loads(out)["faulty_rows"]) == (2, 2)
    assert "2 rows cannot be judged; row 1: 'ts' has 'later', which is not a timestamp" in err


def settings_of(root: Path, **options: Any) -> Settings:
    return Settings(artifacts=root, default_model="rows", backend="torchscript", log_level="warning", **options)


def backtest_csv(client: httpx.Client, content: str, **options: Any) -> httpx.Response:
    return client.post("/backtest", params=options, content=content, headers={"Content-Type": "text/csv"})


@pytest.mark.parametrize("name", ["rows", "windows"])
def test_endpoint_reports_what_the_command_reports_and_remembers_nothing(
    root: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    status, out, _ = in_process(capsys, "backtest", name, str(root / "history.csv"), "--json", "--artifacts", str(root))
    assert status == 0
    expected = json.loads(out)
    with running(create_app(settings_of(root))) as client:
        response = backtest_csv(client, (root / "history.csv").read_text(), model=name, drawings=True)
        metrics = scrape(client)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["model"], answer["version"], answer["errors"]) == (name, 1, [])
    report = answer["report"]
    for key in ("rows", "rules", "first", "last", "warming_up_rows"):
        assert report[key] == expected[key]
    assert [(group["group"], group["alerts"], group["state"]) for group in report["groups"]] == [
        (group["group"], group["alerts"], group["state"]) for group in expected["groups"]
    ]
    assert [alpha["anomalous_rows"] for alpha in report["alphas"]] == [a["anomalous_rows"] for a in expected["alphas"]]
    assert [alert["start"] for alert in report["worst_false_alerts"]] == [
        alert["start"] for alert in expected["worst_false_alerts"]
    ]
    assert len(answer["drawings"]["groups"]) == 3
    assert len(answer["drawings"]["alerts"]) == len(report["worst_false_alerts"]) > 0
    labels = frozenset({("model", name), ("version", "1")})
    assert metrics["elbo_unobserved_rows_total", labels] == len(history()[0])
    assert ("elbo_scored_rows_total", labels) not in metrics


@pytest.mark.parametrize("form", ["csv", "records"])
def test_endpoint_reports_known_incidents_as_the_command_does(
    root: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    labels = root / f"known-{form}.csv"
    found, quiet = (START + 60 * 201, START + 60 * 240, "b"), (START, START + 300, "a")
    labels.write_text(
        "".join(f"{start},{end},{group}\n" for start, end, group in [("start", "end", "host"), found, quiet])
    )
    arguments = ["rows", str(root / "history.csv"), "--labels", str(labels), "--json", "--artifacts", str(root)]
    status, out, _ = in_process(capsys, "backtest", *arguments)
    assert status == 0
    expected = json.loads(out)
    incidents = [
        {"start": found[0], "end": datetime.fromtimestamp(found[1], UTC).isoformat(), "group": "b"},
        {"start": str(quiet[0]), "end": float(quiet[1]), "group": "a"},
    ]
    with running(create_app(settings_of(root))) as client:
        if form == "csv":
            content = (root / "history.csv").read_text()
            response = backtest_csv(client, content, drawings=True, incidents=json.dumps(incidents))
        else:
            body = {"records": history()[1], "drawings": True, "incidents": incidents}
            response = client.post("/backtest", json=body)
    assert response.status_code == 200, response.text
    report = response.json()["report"]
    assert report["incidents"] == expected["incidents"]
    assert report["incidents"][0]["delay_seconds"][0] is not None
    assert report["incidents"][1]["delay_seconds"][-1] is None
    assert report["alphas"] == expected["alphas"]
    assert report["alphas"][0]["incidents_found"] >= 1
    assert [alert["start"] for alert in report["worst_false_alerts"]] == [
        alert["start"] for alert in expected["worst_false_alerts"]
    ]
    names = [group["group"] for group in report["groups"]]
    drawn = dict(zip(names, response.json()["drawings"]["groups"], strict=True))
    assert {name for name in names if "class='known'" in drawn[name]} == {"a", "b"}


@pytest.mark.parametrize(
    ("incidents", "message", "pointer"),
    [
        ([{"start": 1}], "incidents.0.end is missing", "/incidents/0/end"),
        ([{"start": 1, "end": 2}, {"start": "soon", "end": 2}], "incidents/1/start should be", "/incidents/1/start"),
        ([{"start": 2, "end": 1}], r"incidents/0 ends \(1.0\) before it starts \(2.0\)", "/incidents/0/end"),
        ([{"start": 1, "end": 2, "hots": "a"}], "there is no field incidents.0.hots", "/incidents/0/hots"),
        ([{"start": 1, "end": 2}] * 1001, "at most 1000 items", "/incidents"),
    ],
)
def test_invalid_incidents_are_refused_with_a_pointer_to_the_fault(
    root: Path, incidents: list[dict[str, Any]], message: str, pointer: str
) -> None:
    with running(create_app(settings_of(root))) as client:
        response = client.post("/backtest", json={"records": history()[1], "incidents": incidents})
    assert response.status_code == 422
    assert re.search(message, response.json()["detail"])
    assert response.json()["pointer"] == pointer


@pytest.mark.parametrize(
    ("content", "options", "status", "message"),
    [
        ("cpu,disk,load\n1,2,3\n", {}, 422, "no row has a time: .* looked for the times under 'ts'"),
        ("ts,cpu,disk,load\n1,1,2,3\n", {"time": "when"}, 422, "no row has a time: .*'when'"),
        ("ts,memory\n1,2\n", {}, 422, "missing from the CSV header"),
        ("ts,cpu,disk,load\n" + "1,1,2,3\n" * 400, {}, 413, "at most 50 rows"),
        ("ts,cpu,disk,load\n1,1,2,3\n", {"alphas": "[0.05,1]"}, 422, "alphas.1 should be less than 1"),
    ],
)
def test_endpoint_says_why_it_cannot_replay_a_history(
    root: Path, content: str, options: dict[str, str], status: int, message: str
) -> None:
    with running(create_app(settings_of(root, max_rows=50))) as client:
        response = backtest_csv(client, content, **options)
    assert response.status_code == status
    assert re.search(message, response.json()["detail"])


def test_faulty_rows_of_a_history_are_reported_and_left_out(root: Path) -> None:
    content = "ts,host,cpu,disk,load\n60,a,1,2,3\n,a,1,2,3\n120,a,1,x,3\n180,a,1,2,3\n"
    with running(create_app(settings_of(root))) as client:
        answer = backtest_csv(client, content).json()
    assert (answer["report"]["rows"], answer["report"]["faulty_rows"], answer["drawings"]) == (2, 2, None)
    assert [error["row"] for error in answer["errors"]] == [1, 2]


def test_replay_stops_when_its_client_disconnects(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[slice] = []
    join = Replayer.join

    def join_slowly(self: Replayer, part: slice) -> JoinedRows:
        joined.append(part)
        sleep(0.05)
        return join(self, part)

    monkeypatch.setattr("service.backtest.replay.CHUNK_ROWS", 5)
    monkeypatch.setattr(Replayer, "join", join_slowly)
    with running(create_app(settings_of(root))) as client:
        with (
            pytest.raises(httpx.ReadTimeout),
            httpx.Client(verify=NO_AUTHORITIES, base_url=client.base_url, timeout=1.0) as leaving,
        ):
            backtest_csv(leaving, (root / "history.csv").read_text())
        labels = {("endpoint", "/backtest"), ("model", "rows"), ("version", "1"), ("status", "499")}
        wait_until(lambda: scrape(client).get(("elbo_requests_total", frozenset(labels))) == 1)
        assert 0 < len(joined) < len(history()[0]) / 5
