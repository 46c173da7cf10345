"""POST /feedback: a person says that rows were normal, or an incident, and their scores change the calibration."""

import asyncio
import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from service.anomaly.online_calibration import RECENT_ROWS
from service.app import create_app
from service.schemas import FeedbackAnswer, GroupFeedback
from service.settings import Settings
from tests.plain_http import NO_AUTHORITIES
from tests.service.access.keys import one_key_per_scope
from tests.service.groups import Record, send, settings_of
from tests.service.running import running
from tests.service.scrape import scrape
from tests.service.serving import serving, until
from tests.training.series import host_metrics

pytestmark = pytest.mark.slow
ROWS, BEGIN, END = 130, 50, 90  # an incident from row BEGIN to row END - 1
NUMBERS = count()
MODELS = pytest.mark.parametrize("model", ["rows", "windows"])


def stream(host: str, rows: int = ROWS) -> list[Record]:
    """Return rows of one host in order of time, with an incident."""
    frame = host_metrics(rows, 1, seed=9).with_columns(pl.col("ts").dt.epoch("s"), host=pl.lit(host))
    found: list[Record] = frame.to_dicts()
    for row in found[BEGIN:END]:
        row["cpu"] += 8.0
    return found


def give(client: httpx.Client, model: str, **body: Any) -> dict[str, Any]:
    """Send feedback, and return what it has changed in its only group."""
    response = client.post("/feedback", params={"model": model}, json=body)
    assert response.status_code == 200, response.text
    (group,) = response.json()["groups"]
    assert set(response.json()) == set(FeedbackAnswer.model_fields)
    assert set(group) == set(GroupFeedback.model_fields)
    return {**group, "unused": response.json()["unused"]}


def period(rows: list[Record]) -> dict[str, Any]:
    return {"group_name": rows[0]["host"], "since": rows[0]["ts"], "until": rows[-1]["ts"]}


def probe(client: httpx.Client, model: str, host: str) -> dict[str, Any]:
    """Return the verdict on a row of a new incident. The server does not remember the rows that this function sends."""
    rows = stream(host, 400)[-10:]
    for row in rows:
        row["cpu"] += 8.0
    return send(client, rows, model, observe="false")[-1]


@pytest.fixture(scope="module")
def client(group_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with running(create_app(settings_of(group_models, tmp_path_factory.mktemp("state")))) as found:
        yield found


@pytest.fixture
def host(client: httpx.Client, request: pytest.FixtureRequest) -> str:
    """Return the name of a new host, whose `stream` was sent to the model of the test."""
    name = f"host-{next(NUMBERS)}"
    model = request.node.callspec.params.get("model", "rows") if hasattr(request.node, "callspec") else "rows"
    states = [result["state"] for result in send(client, stream(name), model)]
    assert states[-1] == "usual"
    assert "incident" in states
    return name


@MODELS
def test_incident_that_was_declared_normal_raises_no_alarm_when_it_recurs(
    client: httpx.Client, host: str, model: str
) -> None:
    incident = stream(host)[BEGIN:END]
    before = probe(client, model, host)
    assert before["is_anomaly"]
    given = give(client, model, verdict="normal", **period(incident))
    assert (given["group"], given["rows"], given["added"], given["removed"]) == (host, 40, 40, 0)
    after = probe(client, model, host)
    assert not after["is_anomaly"]
    assert after["p_value"] > 5 * before["p_value"]
    assert after["score"] == before["score"]
    again = give(client, model, verdict="normal", **period(incident))
    assert (again["added"], again["calibration_rows"]) == (0, given["calibration_rows"])
    withdrawn = give(client, model, verdict="incident", **period(incident))
    assert (withdrawn["rows"], withdrawn["removed"]) == (40, 40)
    assert probe(client, model, host)["p_value"] == before["p_value"]


@MODELS
@pytest.mark.parametrize("form", ["records", "csv", "ndjson"])
def test_feedback_with_rows_has_the_effect_of_feedback_on_the_same_remembered_rows(
    client: httpx.Client, host: str, model: str, form: str
) -> None:
    rows, before = stream(host)[BEGIN:END], probe(client, model, host)["p_value"]
    content, media_type = {
        "records": (json.dumps({"records": rows}), "application/json"),
        "csv": (pl.DataFrame(rows).write_csv(), "text/csv"),
        "ndjson": ("\n".join(map(json.dumps, rows)), "application/x-ndjson"),
    }[form]
    # The server no longer knows the windows of these rows, so that the first row is alone in its window.
    used = 40 if model == "rows" else 39
    query = {"model": model, "verdict": "normal"}
    answer = client.post("/feedback", params=query, content=content, headers={"content-type": media_type})
    assert answer.status_code == 200, answer.text
    (group,) = answer.json()["groups"]
    assert (group["rows"], group["added"], answer.json()["unused"]) == (used, used, 40 - used)
    assert probe(client, model, host)["p_value"] > 3 * before
    if model == "rows":
        assert give(client, model, verdict="normal", **period(rows))["added"] == 0


@MODELS
def test_feedback_with_rows_of_an_unknown_group_begins_a_calibration(client: httpx.Client, model: str) -> None:
    rows = stream(f"new-{model}")
    given = give(client, model, verdict="normal", records=rows[:BEGIN])
    unused = 0 if model == "rows" else 1  # a row needs at least a third of a window, so the first row is not judged
    assert (given["rows"], given["added"], given["unused"]) == (BEGIN - unused, BEGIN - unused, unused)
    # The rows of feedback are not in the windows of later rows.
    assert send(client, rows[:1], model)[0].get("window_rows", 1) == 1
    assert probe(client, model, f"new-{model}")["is_anomaly"]


def test_feedback_with_rows_that_lack_values_uses_every_row(client: httpx.Client) -> None:
    rows = [{name: value for name, value in row.items() if name != "disk"} for row in stream(f"host-{next(NUMBERS)}")]
    given = give(client, "rows", verdict="normal", records=rows[:BEGIN])
    assert (given["rows"], given["unused"]) == (BEGIN, 0)


@MODELS
def test_latest_rows_get_the_same_scores_if_they_are_sent_again_with_feedback(client: httpx.Client, model: str) -> None:
    rows = stream(f"late-{model}")
    send(client, rows, model)
    give(client, model, verdict="incident", **period(rows[-4:]))
    given = give(client, model, verdict="normal", records=rows[-4:])
    assert (given["rows"], given["unused"], given["added"]) == (4, 0, 4)
    assert give(client, model, verdict="normal", **period(rows[-4:]))["added"] == 0  # their scores are the same


@MODELS
def test_feedback_on_the_state_of_a_group_ends_an_incident_at_once_and_reverts_a_change(
    client: httpx.Client, model: str
) -> None:
    rows = stream(f"state-{model}")
    assert send(client, rows[:END], model)[-1]["state"] == "incident"
    given = give(client, model, verdict="normal", group_name=f"state-{model}")
    assert given["state"] == "changed"
    assert given["rows"] == given["calibration_rows"] >= 40
    assert not probe(client, model, f"state-{model}")["is_anomaly"]
    given = give(client, model, verdict="incident", group_name=f"state-{model}")
    assert given["state"] == "usual"
    assert probe(client, model, f"state-{model}")["is_anomaly"]


def test_feedback_reaches_running_processes_and_later_ones(group_models: Path, tmp_path: Path) -> None:
    rows = stream("web-0")
    settings = settings_of(group_models, tmp_path)  # each application opens the files anew, as another worker does
    with running(create_app(settings)) as one, running(create_app(settings)) as other:
        for part in range(0, ROWS, 10):
            send(other if part % 20 else one, rows[part : part + 10], "windows")
        assert probe(other, "windows", "web-0")["is_anomaly"]
        give(one, "windows", verdict="normal", **period(rows[BEGIN:END]))
        p_values = {probe(client, "windows", "web-0")["p_value"] for client in (other, one)}
        with running(create_app(settings)) as later:  # the files are still open, as after a kill
            p_values.add(probe(later, "windows", "web-0")["p_value"])
    assert len(p_values) == 1
    assert min(p_values) > 0.05


def test_rows_of_several_groups_change_each_group_and_unreadable_rows_are_listed(
    client: httpx.Client, host: str
) -> None:
    rows = [{**row, "host": name} for row in stream(host)[BEGIN:END] for name in (host, "other")]
    rows[2] = {"host": host, "ts": rows[2]["ts"], "cpu": "high"}
    labels = frozenset({"model": "rows", "version": "1", "verdict": "normal"}.items())
    before = scrape(client).get(("elbo_feedback_rows_total", labels), 0)
    answer = client.post("/feedback", params={"model": "rows"}, json={"verdict": "normal", "records": rows}).json()
    assert [(group["group"], group["rows"], group["added"]) for group in answer["groups"]] == [
        (host, 39, 39),
        ("other", 40, 40),
    ]
    assert answer["unused"] == 1
    assert [(error["row"], error["pointer"]) for error in answer["errors"]] == [(2, "/records/2")]
    assert scrape(client)["elbo_feedback_rows_total", labels] == before + 79


def test_feedback_on_a_model_without_groups_needs_no_group_name(client: httpx.Client) -> None:
    rows = [{name: value for name, value in row.items() if name != "host"} for row in stream("")]
    send(client, rows, "rows")
    since, until = rows[BEGIN]["ts"], rows[END - 1]["ts"]
    given = give(client, "rows", verdict="normal", since=since, until=until)
    assert (given["group"], given["rows"]) == (None, 40)


@pytest.mark.parametrize(
    ("body", "status", "code", "part"),
    [
        ({}, 422, "invalid_field", "verdict is missing"),
        ({"verdict": "fine"}, 422, "invalid_field", "'normal' or 'incident'"),
        ({"verdict": "normal", "group": "web-0", "host": 1}, 422, "invalid_field", "no field host"),
        ({"verdict": "normal", "group_name": "known", "since": "yesterday"}, 422, "invalid_field", "since should be"),
        ({"verdict": "normal", "group_name": "known", "until": 1e300}, 422, "invalid_field", "until should be"),
        ({"verdict": "normal", "group_name": "known", "since": 9e9, "until": 8e9}, 422, "invalid_field", "be after"),
        ({"verdict": "normal", "group_name": "a", "records": [{}]}, 422, "invalid_field", "no group_name"),
        ({"verdict": "normal", "records": [], "metrics": []}, 422, "invalid_field", "one of the fields"),
        ({"verdict": "normal", "records": []}, 422, "invalid_rows", "record"),
        ({"verdict": "normal", "records": [{"cpu": 1, "mem": 1, "disk": 1}]}, 422, "invalid_field", "time of each row"),
        ({"verdict": "normal", "group_name": "web-7"}, 404, "not_remembered", "remembers no rows of 'web-7'"),
        ({"verdict": "normal", "group_name": "known", "since": 1}, 404, "not_remembered", "no row in this time"),
        ({"verdict": "incident", "group_name": "known", "until": 1}, 404, "not_remembered", "no row in this time"),
    ],
)  # fmt: skip
def test_feedback_that_cannot_be_used_is_refused_and_changes_nothing(
    client: httpx.Client, body: dict[str, Any], status: int, code: str, part: str
) -> None:
    send(client, stream("known")[:1], "rows")
    if body.get("since") == 1:
        body = {**body, "since": "2030-01-01T00:00:00Z"}
    before = probe(client, "rows", "known")
    answer = client.post("/feedback", params={"model": "rows"}, json=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert part in answer.json()["detail"]
    assert probe(client, "rows", "known") == before


def test_period_that_is_partly_forgotten_is_refused_with_the_time_of_the_first_remembered_row(
    client: httpx.Client,
) -> None:
    rows = stream("web-2", RECENT_ROWS + 30)
    send(client, rows, "rows")
    answer = client.post("/feedback", params={"model": "rows"}, json={"verdict": "normal", **period(rows[:60])})
    assert (answer.status_code, answer.json()["code"]) == (404, "not_remembered")
    assert "only rows since 2024-01-01T05:00:00+00:00 are remembered" in answer.json()["detail"]
    assert "records" in answer.json()["hint"]
    assert give(client, "rows", verdict="normal", **period(rows[30:60]))["rows"] == 30


@pytest.mark.parametrize(("model", "online"), [("hosts", True), ("rows", False)])
def test_feedback_on_a_model_without_online_calibration_is_refused_with_a_hint(
    artifacts: Path, group_models: Path, tmp_path: Path, model: str, online: bool
) -> None:
    folder = artifacts if model == "hosts" else group_models
    settings = settings_of(folder, tmp_path, default_model=model, online_calibration=online)
    with running(create_app(settings)) as client:
        answer = client.post("/feedback", json={"verdict": "normal", "group_name": "known"})
    assert (answer.status_code, answer.json()["code"]) == (409, "no_online_calibration")
    assert f"elbo calibrate {model}" in answer.json()["hint"]


def test_unknown_model_and_other_formats_are_refused(client: httpx.Client) -> None:
    answer = client.post("/feedback?model=none", json={"verdict": "normal"})
    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")
    answer = client.post("/feedback", json={"verdict": "normal"}, headers={"accept": "application/x-npy"})
    assert (answer.status_code, answer.json()["expected"]) == (406, "application/json")


def test_feedback_needs_a_key_with_the_scope_write(group_models: Path, tmp_path: Path) -> None:
    keys = one_key_per_scope(tmp_path / "keys.toml")
    settings = settings_of(group_models, tmp_path / "state", api_keys_file=keys.path)
    with running(create_app(settings)) as client:
        codes = {
            name: client.post("/feedback", json={"verdict": "normal"}, headers=keys.headers(name)).status_code
            for name in ("infer", "metrics", "write", "admin")
        }
    assert codes == {"infer": 403, "metrics": 403, "write": 404, "admin": 404}  # 404: no row is remembered yet


@pytest.mark.parametrize("path", ["/anomaly", "/feedback"])
def test_request_that_waits_for_a_group_ends_and_changes_nothing_if_the_client_disconnects(
    group_models: Path, tmp_path: Path, path: str
) -> None:
    body = json.dumps(
        {"records": stream("web-0")[:5], **({"verdict": "normal"} if path == "/feedback" else {})}
    ).encode()
    head = f"POST {path}?model=windows HTTP/1.1\r\nHost: elbo\r\nContent-Type: application/json\r\n".encode()
    request = head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)

    async def check() -> None:
        settings: Settings = settings_of(group_models, tmp_path)
        async with serving(settings) as (service, port):
            memory = await service.groups.of(service.find("windows"))
            transaction = await memory.file.begin(["web-0"], asyncio.get_running_loop().time() + 1e6)
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            await until(lambda: service.admission.body_bytes.amount > 0)
            await asyncio.sleep(0.05)
            assert service.admission.body_bytes.amount > 0  # the request waits for the group
            writer.close()
            await until(lambda: service.admission.body_bytes.amount == 0)
            transaction.end()
            assert memory.file.is_idle
            assert not memory.file.has_slot("web-0")
            async with httpx.AsyncClient(
                verify=NO_AUTHORITIES, base_url=f"http://127.0.0.1:{port}", timeout=20
            ) as client:
                answer = await client.post("/anomaly?model=windows", json={"records": stream("web-0")[:1]})
            assert answer.json()["results"][0]["window_rows"] == 1

    asyncio.run(check())
