"""Rows that arrive one by one are judged with the past of their group: formats, restarts, workers, lost clients."""

import asyncio
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest

from service.anomaly.group_memory import StateUnusable
from service.app import create_app
from service.codec import remote_write
from service.endpoints import offload
from service.endpoints.group_scoring import run_to_end
from tests.plain_http import NO_AUTHORITIES
from tests.service.gate import Gate
from tests.service.groups import FEATURES, Record, records, send, settings_of
from tests.service.process import ServerProcess, server_starter
from tests.service.running import running
from tests.service.scrape import scrape
from tests.service.serving import serving, until
from tests.training.series import host_metrics
from tests.waiting import wait_until

pytestmark = pytest.mark.slow
VERDICT = ["score", "p_value", "severity", "is_anomaly", "time", "group", "calibration", "state"]
WINDOW = ["window_rows", "warming_up"]


def verdicts(results: list[Record], model: str) -> list[Record]:
    """Return the fields of the results that the past of a row decides."""
    names = VERDICT + (WINDOW if model == "windows" else [])
    return [{name: result[name] for name in names} for result in results]


def assert_same_verdicts(found: list[Record], expected: list[Record]) -> None:
    """Assert that the verdicts are the same. The last digits of a score depend on the number of rows in its batch."""
    rounded = {"score": 1e-4, "p_value": 0.011, "severity": 0.05}
    for one, other in zip(found, expected, strict=True):
        assert {name: one[name] for name in one.keys() - rounded} == {
            name: other[name] for name in other.keys() - rounded
        }
        for name, tolerance in rounded.items():
            assert one[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance)


@pytest.fixture(scope="session")
def expected(group_models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Record]]:
    """Return, for each model, the verdicts on `records()` that were sent one by one to one process."""
    found = {}
    with running(create_app(settings_of(group_models, tmp_path_factory.mktemp("state")))) as client:
        for model in ("rows", "windows"):
            results = [send(client, [row], model)[0] for row in records()]
            found[model] = verdicts(results, model)
    return found


@pytest.fixture
def start(group_models: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Yield a function that starts a server of `group_models`."""
    with server_starter() as start_server:
        yield lambda **settings: start_server(group_models, DEFAULT_MODEL="windows", POLL_SECONDS=30, **settings)


def ndjson(rows: list[Record]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def telegraf(rows: list[Record]) -> bytes:
    metrics = [
        {
            "name": "host",
            "tags": {"host": row["host"]},
            "fields": {name: row[name] for name in FEATURES},
            "timestamp": row["ts"],
        }
        for row in rows
    ]
    return json.dumps({"metrics": metrics}).encode()


def csv(rows: list[Record]) -> bytes:
    return pl.DataFrame(rows).write_csv().encode()


@pytest.mark.parametrize("one_by_one", [True, False])
def test_explanation_says_since_when_a_feature_deviates(group_models: Path, tmp_path: Path, one_by_one: bool) -> None:
    rows = host_metrics(40, 1, seed=9).with_columns(pl.col("ts").dt.epoch("s")).to_dicts()
    start, rows_of_window = 30, 6
    for row in rows[start:]:
        row["cpu"] += 8.0
    with running(create_app(settings_of(group_models, tmp_path))) as client:
        parts = [[row] for row in rows] if one_by_one else [rows]
        results = [result for part in parts for result in send(client, part, "windows")]
        windows = [[[row[name] for name in FEATURES] for row in rows[end - 6 : end]] for end in (start, start + 3)]
        body = {"inputs": windows}
        usual, anomalous = client.post("/anomaly", params={"model": "windows"}, json=body).json()["results"]
    for age, result in enumerate(results[start:]):
        causes = {feature["name"]: feature for feature in result["features"]}
        assert result["is_anomaly"]
        if age < rows_of_window:
            assert causes["cpu"]["lag"] == age
            assert causes["cpu"]["since"] == rows[start]["ts"]
        else:  # every row of the window deviates
            assert causes["cpu"]["lag"] <= rows_of_window - 1
    assert not any("lag" in feature for feature in usual["features"])
    assert {feature["name"]: feature.get("lag") for feature in anomalous["features"]}["cpu"] == 2
    assert not any("since" in feature for feature in anomalous["features"])
    for result in results:
        if not result["is_anomaly"]:
            assert not any("lag" in feature or "since" in feature for feature in result["features"])


def test_verdicts_of_the_uninterrupted_stream_show_windows_incidents_and_calibrations(
    expected: dict[str, list[Record]],
) -> None:
    for model, found in expected.items():
        anomalies = [row["is_anomaly"] for row in found]
        assert 8 <= sum(anomalies) <= 40
        assert sum(anomalies[60:72]) >= 9
        assert {row["calibration"] for row in found} == {"pool"}
        assert {row["state"] for row in found} <= {"usual", "incident"}
        if model == "windows":
            assert [row["window_rows"] for row in found[::3]] == [min(row + 1, 6) for row in range(40)]
            assert [row["warming_up"] for row in found[::3]] == [row < 5 for row in range(40)]


@pytest.mark.parametrize("model", ["rows", "windows"])
@pytest.mark.parametrize(
    ("body", "media_type"),
    [
        (telegraf, "application/json"),
        (csv, "text/csv"),
        (ndjson, "application/x-ndjson"),
        (lambda rows: json.dumps({"records": rows}).encode(), "application/json"),
    ],
    ids=["telegraf", "csv", "ndjson", "records"],
)
def test_every_format_gives_the_verdicts_of_single_rows(
    group_models: Path,
    tmp_path: Path,
    expected: dict[str, list[Record]],
    model: str,
    body: Callable[[list[Record]], bytes],
    media_type: str,
) -> None:
    rows = records()
    found = []
    with running(create_app(settings_of(group_models, tmp_path))) as client:
        for part in (rows[:1], rows[1:70], rows[70:]):
            headers = {"content-type": media_type, "accept": "application/json"}
            answer = client.post("/anomaly", params={"model": model}, content=body(part), headers=headers)
            assert answer.status_code == 200, answer.text
            found += answer.json()["results"]
            assert answer.json()["threshold"] is None  # each group has its own
    assert_same_verdicts(verdicts(found, model), expected[model])


def test_streamed_lines_have_the_verdicts_of_single_rows(
    group_models: Path, tmp_path: Path, expected: dict[str, list[Record]]
) -> None:
    with running(create_app(settings_of(group_models, tmp_path))) as client:
        headers = {"content-type": "application/x-ndjson", "accept": "application/x-ndjson"}
        answer = client.post("/anomaly", params={"model": "windows"}, content=ndjson(records()), headers=headers)
        lines = [json.loads(line) for line in answer.text.splitlines()]
    assert_same_verdicts(verdicts(lines[:-1], "windows"), expected["windows"])
    assert lines[-1]["rows"] == 120


def test_restarts_in_the_middle_of_a_stream_change_no_verdict(
    start: Callable[..., ServerProcess], tmp_path: Path, expected: dict[str, list[Record]]
) -> None:
    rows = records()
    found: dict[str, list[Record]] = {"rows": [], "windows": []}
    for part, sig in ((rows[:35], signal.SIGKILL), (rows[35:65], signal.SIGTERM), (rows[65:], signal.SIGTERM)):
        process = start(STATE=tmp_path / "state")
        with process.client() as client:
            for model, results in found.items():
                results += [send(client, [row], model)[0] for row in part]
        process.stop(sig)
    assert {model: verdicts(results, model) for model, results in found.items()} == expected


def test_two_workers_with_alternating_connections_judge_like_one_process(
    start: Callable[..., ServerProcess], expected: dict[str, list[Record]]
) -> None:
    process = start(WORKERS=2)
    process.wait_for_worker()
    found = []
    with process.client() as first, process.client() as second:  # the supervisor gives each worker one connection
        for number, row in enumerate(records()):
            found += send((first, second)[number % 2], [row], "windows")
    assert verdicts(found, "windows") == expected["windows"]
    said = [line for line in process.lines if "set ELBO_STATE to keep it" in line["message"]]
    folder = Path(said[0]["folder"])
    assert [path.name.partition("@")[0] for path in sorted(folder.iterdir())] == ["rows", "windows"]
    assert process.stop() == 0
    assert not folder.exists()


def test_late_and_repeated_rows_change_no_other_verdict(
    group_models: Path, tmp_path: Path, expected: dict[str, list[Record]]
) -> None:
    rows = [row for row in records() if row["host"] == "web-0"]
    wanted = [row for row in expected["windows"] if row["group"] == "web-0"]
    with running(create_app(settings_of(group_models, tmp_path))) as client:
        found = [send(client, [row], "windows")[0] for row in rows[:10]]
        again = send(client, rows[5:10], "windows")  # the client did not get the response
        late = send(client, [rows[11]], "windows") + send(client, [rows[10]], "windows")
        found += [send(client, [row], "windows")[0] for row in rows[12:]]
        text = client.get("/metrics").text
    assert verdicts(found[:10], "windows") == wanted[:10]
    names = ["score", "window_rows", "group", "time"]
    for one, other in zip((*again, late[1]), (*wanted[5:10], wanted[10]), strict=True):
        assert [one[name] for name in names[1:]] == [other[name] for name in names[1:]]
        assert one["score"] == pytest.approx(other["score"], rel=1e-4)
    # The windows of all later rows are those of the uninterrupted stream, although row 10 came after row 11.
    assert [row["score"] for row in found[10:]] == [row["score"] for row in wanted[12:]]
    assert 'elbo_repeated_rows_total{model="windows",version="1"} 5.0' in text
    assert 'elbo_late_rows_total{model="windows",version="1"} 1.0' in text
    assert 'elbo_warming_up_rows_total{model="windows",version="1"} 5.0' in text


@pytest.mark.parametrize(("query", "status"), [({"observe": "false"}, 200), ({"alpha": "2"}, 422)])
def test_rows_that_are_not_live_or_fail_change_nothing(
    group_models: Path, tmp_path: Path, expected: dict[str, list[Record]], query: dict[str, str], status: int
) -> None:
    rows = records()
    with running(create_app(settings_of(group_models, tmp_path))) as client:
        found = []
        for number, row in enumerate(rows):
            if number % 20 == 10:
                content = {"records": rows[number : number + 30]}
                answer = client.post("/anomaly", params={"model": "windows", **query}, json=content)
                assert answer.status_code == status
                if answer.status_code == 200:  # judged with the past of the group
                    ahead = verdicts(answer.json()["results"], "windows")
                    assert_same_verdicts(ahead, expected["windows"][number : number + 30])
            found += send(client, [row], "windows")
    assert verdicts(found, "windows") == expected["windows"]


def test_client_that_leaves_while_it_sends_changes_nothing(
    group_models: Path, tmp_path: Path, expected: dict[str, list[Record]]
) -> None:
    rows, choices = records(), random.Random(0)
    with running(create_app(settings_of(group_models, tmp_path))) as client:
        found = []
        for number, row in enumerate(rows):
            if number % 30 == 10:
                content = request(rows[number : number + 40])
                with socket.create_connection(("127.0.0.1", client.base_url.port)) as connection:
                    connection.sendall(content[: choices.randint(10, len(content) - 1)])
            found += send(client, [row], "windows")
    assert verdicts(found, "windows") == expected["windows"]


@pytest.mark.parametrize("reason", ["client leaves", "time is over"])
def test_request_that_ends_while_its_rows_wait_for_the_model_changes_nothing(
    group_models: Path, tmp_path: Path, expected: dict[str, list[Record]], reason: str
) -> None:
    rows = records()

    async def check() -> list[Record]:
        found: list[Record] = []
        async with (
            serving(settings_of(group_models, tmp_path)) as (service, port),
            httpx.AsyncClient(verify=NO_AUTHORITIES, timeout=20) as client,
        ):
            for number, row in enumerate(rows):
                if number == 40:  # once: the batcher would run a second gate in the event loop
                    gate = Gate()
                    held = await gate.hold(service.batcher, service.find("windows"), np.zeros((1, 3), np.float32))
                    seconds = b"X-Request-Timeout: 0.1\r\n" if reason == "time is over" else b""
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.write(request(rows[number : number + 10], seconds))
                    await until(lambda: service.batcher.pending_rows == 11)
                    if reason == "time is over":
                        assert b" 504 " in await reader.readline()
                    writer.close()
                    await until(lambda: service.batcher.pending_rows == 1)
                    gate.open.set()
                    await held
                answer = await client.post(
                    f"http://127.0.0.1:{port}/anomaly", params={"model": "windows"}, json={"records": [row]}
                )
                found += answer.json()["results"]
        return found

    assert verdicts(asyncio.run(check()), "windows") == expected["windows"]


def request(rows: list[Record], header: bytes = b"") -> bytes:
    """Return a request with `rows` to the model `windows`."""
    body = json.dumps({"records": rows}).encode()
    head = b"POST /anomaly?model=windows HTTP/1.1\r\nHost: elbo\r\nContent-Type: application/json\r\n" + header
    return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


@pytest.mark.parametrize("reason", ["client leaves", "time is over"])
def test_request_that_ends_while_its_groups_are_locked_changes_nothing(
    group_models: Path, tmp_path: Path, reason: str
) -> None:
    rows = [row for row in records() if row["host"] == "web-0"][:2]

    async def check() -> None:
        async with serving(settings_of(group_models, tmp_path)) as (service, port):
            memory = await service.groups.of(service.find("windows"))
            transaction = await memory.file.begin(["web-0"], time.perf_counter() + 60)
            seconds = b"X-Request-Timeout: 0.2\r\n" if reason == "time is over" else b""
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request(rows, seconds))
            await until(lambda: service.admission.requests.amount == 1)
            if reason == "time is over":
                answer = await reader.read(65536)
                assert answer.startswith(b"HTTP/1.1 429 ")
                assert b"other requests kept the groups of this request busy" in answer
            writer.close()
            await until(lambda: service.admission.requests.amount == 0)
            transaction.end()
            assert memory.file.is_idle
            assert not memory.file.has_slot("web-0")
            status = "429" if reason == "time is over" else "499"
            labels = {"endpoint": "/anomaly", "model": "windows", "version": "1", "status": status}
            assert service.metrics.registry.get_sample_value("elbo_requests_total", labels) == 1

    asyncio.run(check())


def test_cancelled_request_keeps_its_groups_locked_until_its_thread_has_ended() -> None:
    """Otherwise another request could change a group that the thread still writes."""
    may_end, ended = threading.Event(), threading.Event()

    def work() -> None:
        assert may_end.wait(20)
        ended.set()

    async def check() -> None:
        task = asyncio.create_task(run_to_end(work, 2 * offload.MAX_LOOP_NS))
        await asyncio.sleep(0.05)
        for _ in range(2):  # the second cancel comes while the first waits for the thread
            task.cancel()
            await asyncio.sleep(0.05)
            assert not task.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    asyncio.run(check())


def test_files_of_versions_that_are_no_longer_served_are_closed_and_removed(group_models: Path, tmp_path: Path) -> None:
    async def check() -> None:
        async with serving(settings_of(group_models, tmp_path)) as (service, _):
            groups, served = service.groups, service.find("windows")
            memory = await groups.of(served)
            older = memory.file.path.with_name(memory.file.path.name.replace("windows@1", "windows@0"))
            others = [tmp_path / "notes.txt", tmp_path / f"gone@1-{16 * '0'}.groups"]
            for path in (older, *others):
                path.write_text("")
            groups.remove_unserved(service.registry.catalogue)
            assert not older.exists()
            assert memory.file.path.exists()
            assert all(path.exists() for path in others)  # of no model that is served, so nobody knows if it returns
            nothing = replace(service.registry.catalogue, models={})
            transaction = await memory.file.begin(["web-0"], time.perf_counter() + 60)
            groups.close_unserved(nothing)
            assert [model for model, _ in groups.opened()] == [served]  # a request still uses it
            transaction.end()
            groups.close_unserved(nothing)
            assert groups.opened() == []
            assert await groups.of(served) is not memory

    asyncio.run(check())


def test_killed_worker_releases_its_groups_and_what_is_sent_again_is_judged_as_before(
    start: Callable[..., ServerProcess], tmp_path: Path, expected: dict[str, list[Record]]
) -> None:
    process = start(WORKERS=2, STATE=tmp_path)
    process.wait_for_worker()
    workers = [line["pid"] for line in process.lines if "is ready" in line["message"]]
    assert len(workers) == 2
    rows, choices = records(), random.Random(1)
    answers: dict[int, Record] = {}

    async def send_all() -> None:
        async with httpx.AsyncClient(
            verify=NO_AUTHORITIES, base_url=f"http://127.0.0.1:{process.port}", timeout=20
        ) as client:
            for number, row in enumerate(rows):
                if number in (25, 62):  # kill a worker at some moment of the next request
                    delay = choices.uniform(0.0, 0.006)
                    asyncio.get_running_loop().call_later(delay, os.kill, workers.pop(), signal.SIGKILL)
                while number not in answers:
                    try:
                        answer = await client.post("/anomaly", params={"model": "windows"}, json={"records": [row]})
                    except httpx.TransportError:
                        continue  # as Telegraf and Prometheus do
                    if answer.status_code == 200:
                        answers[number] = answer.json()["results"][0]

    asyncio.run(send_all())
    scores = [answers[number]["score"] for number in range(len(rows))]
    assert scores == [row["score"] for row in expected["windows"]]
    flags = [answers[number]["is_anomaly"] for number in range(len(rows))]
    assert sum(one != row["is_anomaly"] for one, row in zip(flags, expected["windows"], strict=True)) <= 1


def test_p_values_are_those_of_the_artifact_if_online_calibration_is_off(group_models: Path, tmp_path: Path) -> None:
    rows = records()
    with running(create_app(settings_of(group_models, tmp_path, online_calibration=False))) as client:
        found = send(client, rows, "rows")
        inputs = [[row[name] for name in FEATURES] for row in rows]
        answer = client.post("/anomaly", params={"model": "rows"}, json={"inputs": inputs}).json()
    assert [result["p_value"] for result in found] == [result["p_value"] for result in answer["results"]]
    assert not {"state", "calibration", "window_rows"} & found[0].keys()
    assert answer["threshold"] is not None


def test_requests_with_many_groups_leave_the_server_responsive(group_models: Path, tmp_path: Path) -> None:
    rows = [{**row, "host": f"host-{number}"} for number, row in enumerate(records(800, 5))]
    slowest = 0.0
    with running(create_app(settings_of(group_models, tmp_path, max_groups=2000))) as client:

        async def probe() -> httpx.Response:
            nonlocal slowest
            async with httpx.AsyncClient(verify=NO_AUTHORITIES, base_url=client.base_url, timeout=60) as probing:
                sending = asyncio.create_task(
                    probing.post("/anomaly", params={"model": "windows", "explain": 0}, json={"records": rows})
                )
                while not sending.done():
                    started = time.perf_counter()
                    assert (await probing.get("/livez")).status_code == 200
                    slowest = max(slowest, time.perf_counter() - started)
                    await asyncio.sleep(0.01)
                return sending.result()

        answer = asyncio.run(probe())
        assert answer.status_code == 200, answer.text
        assert answer.json()["rows"] == 4000
        wait_until(
            lambda: 'elbo_groups{model="windows",state="usual",version="1"} 2000.0' in client.get("/metrics").text
        )
    assert slowest < 1.0


@pytest.mark.parametrize("problem", ["file", "forbidden"])
def test_unusable_folder_is_reported_at_the_start(group_models: Path, tmp_path: Path, problem: str) -> None:
    state = Path("/proc/elbo-state")  # nobody can create it
    if problem == "file":
        state = tmp_path / "state"
        state.write_text("")
    with pytest.raises(StateUnusable, match="cannot use the folder of ELBO_STATE") as refused:
        create_app(settings_of(group_models, state))
    assert str(state) in str(refused.value)


@pytest.mark.parametrize("model", ["rows", "windows"])
def test_remote_write_remembers_groups_as_the_anomaly_endpoint_does(
    group_models: Path, tmp_path: Path, expected: dict[str, list[Record]], model: str
) -> None:
    mapping = tmp_path / "map.toml"
    mapping.write_text(f'[{model}]\ngroup = ["host"]\nalpha = 0.05\n')
    app = create_app(settings_of(group_models, tmp_path / "remote", remote_write=mapping))
    other = create_app(settings_of(group_models, tmp_path / "state"))
    headers = {"content-type": "application/x-protobuf", "content-encoding": "snappy"}
    rows = records()
    with running(app) as client, running(other) as direct:
        for row in rows:
            found: list[remote_write.Series] = [
                ((("__name__", name), ("host", str(row["host"]))), [(1000 * row["ts"], row[name])])
                for name in sorted(FEATURES)
            ]
            answer = client.post("/api/v1/write", content=remote_write.dumps(found), headers=headers)
            assert answer.status_code == 204, answer.text
            send(direct, [row], model)
        pasts = []
        for service in (app.state.service, other.state.service):
            (memory,) = (memory for served, memory in service.groups.opened() if served.name == model)
            pasts.append({name: memory.file.read(name)[1] for name in ("web-0", "web-1", "web-2")})
        assert pasts[0] == pasts[1]
        anomalies = sum(value for (name, _), value in scrape(client).items() if name == "elbo_anomalies_total")
    assert anomalies == sum(row["is_anomaly"] for row in expected[model])
