"""What the service tells of its own work: ids, timings, log lines, metrics."""

import asyncio
import json
import logging
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.monitoring import logs
from service.monitoring.timings import RequestRecord
from service.settings import Settings
from tests.service.running import running
from tests.service.scrape import increase, scrape

ROW = [0.5] * 64


@pytest.mark.parametrize("path", ["/livez", "/nope", "/docs", "/static/page.css"])
def test_the_clients_request_id_comes_back_on_every_answer(client: httpx.Client, path: str) -> None:
    response = client.get(path, headers={"x-request-id": "abc 123/~"})
    assert response.headers["x-request-id"] == "abc 123/~"


@pytest.mark.parametrize("given", ["", "x" * 129, "caf\xe9", "tab\there"])
def test_an_unfit_request_id_is_replaced(client: httpx.Client, given: str) -> None:
    response = client.get("/livez", headers={b"x-request-id": given.encode("latin-1")})
    assert re.fullmatch(r"[0-9a-f]{16}", response.headers["x-request-id"])


def test_without_an_id_each_request_gets_its_own(client: httpx.Client) -> None:
    assert len({client.get("/livez").headers["x-request-id"] for _ in range(20)}) == 20


def test_server_timing_tells_where_the_time_went(client: httpx.Client) -> None:
    header = client.post("/encode", json={"inputs": [ROW]}).headers["server-timing"]
    spans = {name: float(value) for name, value in re.findall(r"(\w+);dur=([\d.]+)", header)}
    assert list(spans) == ["parse", "queue", "compute", "write", "total"]
    assert 0 < spans["compute"] < spans["total"]
    assert sum(spans.values()) - spans["total"] <= spans["total"] + 0.01
    assert "total;dur=" in client.get("/nope").headers["server-timing"]


def test_a_request_leaves_one_line_with_what_one_needs_to_know(
    artifacts: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with running(create_app(Settings(artifacts=artifacts))) as client:
        client.post("/encode?model=ae", json={"inputs": [ROW] * 3}, headers={"x-request-id": "r1"})
        client.post("/encode", json={}, headers={"x-request-id": "r2"})
        client.get("/nope", headers={"x-request-id": "r3"})
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    lines = {line["request_id"]: line for line in found if line.get("path") != "/livez"}
    assert set(lines) == {"r1", "r2", "r3"}
    good = lines["r1"]
    assert (good["level"], good["logger"], good["message"]) == ("info", "elbo.access", "request")
    assert (good["method"], good["path"], good["status"]) == ("POST", "/encode", 200)
    assert (good["model"], good["version"], good["rows"], good["client"]) == ("ae", 1, 3, "127.0.0.1")
    assert good["ms"] >= good["compute_ms"] > 0
    assert (lines["r2"]["status"], lines["r2"]["rows"]) == (422, 0)
    assert lines["r3"]["status"] == 404


def over(request_id: str) -> RequestRecord:
    """A request that has been answered."""
    return RequestRecord(request_id, "GET", "/a", None)


def test_a_reader_that_does_not_read_holds_up_no_request_and_the_lost_lines_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logs, "MOST_LINES", 5)
    reads = threading.Event()
    written: list[dict[str, Any]] = []

    def write(lines: bytes) -> None:
        reads.wait(20)
        written.extend(map(json.loads, lines.splitlines()))

    async def scenario() -> None:
        access = logs.AccessLog("json", True, write)
        access.tell(over("first"))
        await asyncio.sleep(2 * logs.GATHER_SECONDS)  # its line is being written, which lasts
        for number in range(12):
            access.tell(over(str(number)))
        reads.set()
        await access.close()

    asyncio.run(scenario())
    assert [line["request_id"] for line in written if "request_id" in line] == ["first", "0", "1", "2", "3", "4"]
    assert [line["lost"] for line in written if "lost" in line] == [7]


def test_lines_that_cannot_be_written_are_counted_and_later_ones_are_written() -> None:
    written: list[dict[str, Any]] = []
    full = True

    def write(lines: bytes) -> None:
        if full:
            Path("/dev/full").write_bytes(lines)  # a full disk
        written.extend(map(json.loads, lines.splitlines()))

    async def scenario() -> None:
        nonlocal full
        access = logs.AccessLog("json", True, write)
        for requests in (3, 1):  # two attempts that fail
            for number in range(requests):
                access.tell(over(str(number)))
            await access.close()
        full = False
        access.tell(over("after"))
        await access.close()
        access.tell(over("later"))
        await access.close()

    asyncio.run(scenario())
    assert [line["request_id"] for line in written if "request_id" in line] == ["after", "later"]
    assert [line["lost"] for line in written if "lost" in line] == [4]


WRITER = """
import sys
from service.monitoring import logs
print("ready", file=sys.stderr, flush=True)
sys.stdin.read()
for turn in range(50):
    logs._to_standard_output(b"".join([b"%s %d %d\\n" % (b"WHO" * 100, turn, line) for line in range(400)]))
"""


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_workers_that_write_at_the_same_time_leave_each_others_lines_whole(kind: str, tmp_path: Path) -> None:
    path, names, pipe = tmp_path / "log", ("abc", "xyz"), subprocess.PIPE
    with path.open("wb") as file:
        reader = subprocess.Popen(["cat"], stdin=pipe, stdout=file)
        output = reader.stdin if kind == "pipe" else file
        programs = [[sys.executable, "-c", WRITER.replace("WHO", name)] for name in names]
        workers = [subprocess.Popen(program, stdin=pipe, stdout=output, stderr=pipe) for program in programs]
        for worker in workers:
            assert worker.stderr
            assert worker.stderr.readline() == b"ready\n"
        for worker in workers:
            assert worker.stdin
            worker.stdin.close()
        assert [worker.wait(60) for worker in workers] == [0, 0]
        reader.communicate()
        for worker in workers:
            assert worker.stderr
            worker.stderr.close()
    expected = [f"{name * 100} {turn} {line}" for name in names for turn in range(50) for line in range(400)]
    assert sorted(path.read_text().splitlines()) == sorted(expected)


def test_a_request_can_be_told_as_text_or_not_at_all() -> None:
    written: list[bytes] = []

    async def scenario() -> None:
        for form, enabled in (("text", True), ("text", False)):
            access = logs.AccessLog(form, enabled, written.append)
            access.tell(over("r"))
            await access.close()

    asyncio.run(scenario())
    assert re.fullmatch(rb"\S+ \S+ INFO +request request_id=r method=GET path=/a .*\n", b"".join(written))


def record(**fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("elbo.x", logging.INFO, "file", 1, "said %s", ("so",), None)
    made.fields = fields
    return made


def test_a_log_line_is_one_json_object() -> None:
    line = logs.JsonFormatter().format(record(ms=1.5, path="/a\nb"))
    assert "\n" not in line
    told = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", told.pop("ts"))
    assert told == {"level": "info", "logger": "elbo.x", "message": "said so", "ms": 1.5, "path": "/a\nb"}


def test_a_traceback_stays_inside_its_json_line() -> None:
    try:
        raise ValueError("deep")
    except ValueError as error:
        made = record()
        made.exc_info = (ValueError, error, error.__traceback__)
    line = logs.JsonFormatter().format(made)
    assert "\n" not in line
    assert "ValueError: deep" in json.loads(line)["exception"]


def test_a_text_line_is_for_a_person() -> None:
    assert re.fullmatch(r"\S+ \S+ INFO +said so ms=1.5 path=/a", logs.TextFormatter().format(record(ms=1.5, path="/a")))


def test_requests_rows_and_times_are_counted(client: httpx.Client) -> None:
    before = scrape(client)
    client.post("/reconstruct?model=pca", json={"inputs": [ROW] * 5})
    client.post("/reconstruct?model=pca", json={"inputs": [ROW[1:]]})
    client.post("/reconstruct?model=nobody", json={"inputs": [ROW]})
    client.get("/some/where")
    after = scrape(client)
    labels = {"endpoint": "/reconstruct", "model": "pca", "version": "1"}
    nobody = {"model": "", "version": ""}
    assert increase(before, after, "elbo_requests_total", **labels, status="200") == 1
    assert increase(before, after, "elbo_requests_total", **labels, status="422") == 1
    assert increase(before, after, "elbo_requests_total", endpoint="/reconstruct", **nobody, status="404") == 1
    assert increase(before, after, "elbo_requests_total", endpoint="other", **nobody, status="404") == 1
    assert increase(before, after, "elbo_rows_total", **labels) == 5
    assert increase(before, after, "elbo_problems_total", **labels, code="invalid_rows") == 1
    assert increase(before, after, "elbo_request_seconds_count", **labels, outcome="ok") == 1
    assert increase(before, after, "elbo_request_seconds_count", **labels, outcome="refused") == 1
    assert increase(before, after, "elbo_queue_seconds_count", **labels, outcome="ok") == 1
    assert increase(before, after, "elbo_compute_seconds_count", **labels, outcome="ok") == 1
    assert 0 < increase(before, after, "elbo_compute_seconds_sum", **labels, outcome="ok") < 1
    assert increase(before, after, "elbo_batch_rows_count", operation="reconstruct") == 1
    assert increase(before, after, "elbo_batch_rows_sum", operation="reconstruct") == 5


def test_models_are_gauges(client: httpx.Client) -> None:
    found = scrape(client)
    info = {dict(labels)["model"]: value for (name, labels), value in found.items() if name == "elbo_model_info"}
    assert info == {"ae": 1, "hosts": 1, "pca": 1, "vae": 1}
    assert found["elbo_pending_rows", frozenset()] == 0
    assert found["elbo_model_load_failures", frozenset()] == 0


def test_unknown_models_and_paths_add_no_labels(client: httpx.Client) -> None:
    client.get("/livez")
    client.get("/nope")
    client.post("/encode?model=x", json={})
    before = set(scrape(client))
    for i in range(20):
        client.get(f"/nope/{i}")
        client.post(f"/encode?model=x{i}", json={})
    assert set(scrape(client)) == before


def test_two_applications_in_one_process_keep_their_own_counts(app: FastAPI, artifacts: Path) -> None:
    other = create_app(Settings(artifacts=artifacts))
    with running(other) as client:
        counted = {key for key in scrape(client) if key[0] == "elbo_requests_total"}
        assert len(counted) == 1  # the /livez by which the test waits; /metrics is counted after it is written
    assert other.state.service.metrics.registry is not app.state.service.metrics.registry
