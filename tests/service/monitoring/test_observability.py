"""Request ids, Server-Timing, log lines and metrics of requests."""

import ast
import asyncio
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.monitoring import logs
from service.monitoring.log_output import LogOutput, LogQueue, QueuedText
from service.monitoring.request_record import RequestRecord
from service.settings import Settings
from tests.preloaded import PreloadedProcess
from tests.service.running import running
from tests.service.scrape import increase, scrape

ROW = [0.5] * 64


@pytest.mark.parametrize("path", ["/livez", "/nope", "/docs", "/static/page.css"])
def test_request_id_of_the_client_is_returned_with_every_response(client: httpx.Client, path: str) -> None:
    response = client.get(path, headers={"x-request-id": "abc 123/~"})
    assert response.headers["x-request-id"] == "abc 123/~"


@pytest.mark.parametrize("given", ["", "x" * 129, "caf\xe9", "tab\there"])
def test_invalid_request_id_is_replaced(client: httpx.Client, given: str) -> None:
    response = client.get("/livez", headers={b"x-request-id": given.encode("latin-1")})
    assert re.fullmatch(r"[0-9a-f]{16}", response.headers["x-request-id"])


def test_requests_without_id_get_different_ids(client: httpx.Client) -> None:
    assert len({client.get("/livez").headers["x-request-id"] for _ in range(20)}) == 20


def test_server_timing_header_lists_the_spans_of_the_request(client: httpx.Client) -> None:
    header = client.post("/encode", json={"inputs": [ROW]}).headers["server-timing"]
    spans = {name: float(value) for name, value in re.findall(r"(\w+);dur=([\d.]+)", header)}
    assert list(spans) == ["parse", "queue", "compute", "write", "total"]
    assert 0 < spans["compute"] < spans["total"]
    assert sum(spans.values()) - spans["total"] <= spans["total"] + 0.01
    assert "total;dur=" in client.get("/nope").headers["server-timing"]


def test_request_writes_one_access_line_with_its_details(artifacts: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with running(create_app(Settings(artifacts=artifacts))) as client:
        client.post("/encode?model=ae", json={"inputs": [ROW] * 3}, headers={"x-request-id": "r1"})
        client.post("/encode", json={}, headers={"x-request-id": "r2"})
        client.get("/nope", headers={"x-request-id": "r3"})
    output = capfd.readouterr().out.splitlines()
    access_lines = [json.loads(line) for line in output if line.startswith("{")]
    lines = {line["request_id"]: line for line in access_lines if line.get("path") != "/livez"}
    assert set(lines) == {"r1", "r2", "r3"}
    accepted = lines["r1"]
    assert (accepted["level"], accepted["logger"], accepted["message"]) == ("info", "elbo.access", "request")
    assert (accepted["method"], accepted["path"], accepted["status"]) == ("POST", "/encode", 200)
    assert (accepted["model"], accepted["version"], accepted["rows"], accepted["client"]) == ("ae", 1, 3, "127.0.0.1")
    assert accepted["ms"] >= accepted["compute_ms"] > 0
    assert (lines["r2"]["status"], lines["r2"]["rows"]) == (422, 0)
    assert lines["r3"]["status"] == 404


def ended_request(request_id: str) -> RequestRecord:
    """Return the record of a request that has ended."""
    return RequestRecord(request_id, "GET", "/a", None)


def json_queue(write: Callable[[bytes], object], **options: Any) -> LogQueue:
    """Return a queue whose notice of lost lines is JSON."""
    return LogQueue(lambda lost: json.dumps({"lost": lost}).encode() + b"\n", write, **options)


def test_log_queue_keeps_the_lines_that_fit_and_counts_the_others_if_its_reader_is_blocked() -> None:
    may_write, writing = threading.Event(), threading.Event()
    written: list[dict[str, Any]] = []

    def write(lines: bytes) -> None:
        writing.set()
        assert may_write.wait(20)
        written.extend(map(json.loads, lines.splitlines()))

    lines = json_queue(write, max_bytes=40)
    lines.put(b'{"id": "first"}\n')
    assert writing.wait(20)
    for number in range(6):
        lines.put(b'{"id": %d}\n' % number)  # 10 bytes each, beside the 16 bytes of the first line
    assert not lines.flush(0.01)
    may_write.set()
    assert lines.flush(20)
    assert [line["id"] for line in written if "id" in line] == ["first", 0, 1]
    assert [line["lost"] for line in written if "lost" in line] == [4]
    assert lines.lost[0] == 4


def test_log_queue_counts_lost_lines_while_the_disk_is_full_and_writes_later_lines() -> None:
    written: list[dict[str, Any]] = []
    full = True

    def write(lines: bytes) -> None:
        if full:
            Path("/dev/full").write_bytes(lines)  # a full disk
        written.extend(map(json.loads, lines.splitlines()))

    lines = json_queue(write)
    for count in (3, 1):  # two writes that fail
        lines.put(b"{}\n" * count, count)
        assert lines.flush(20)
    full = False
    for name in ("after", "later"):
        lines.put(json.dumps({"id": name}).encode() + b"\n")
        assert lines.flush(20)
    assert written == [{"id": "after"}, {"lost": 4}, {"id": "later"}]


def test_log_queue_in_a_forked_process_writes_its_own_lines_only() -> None:
    reader, writer = os.pipe()
    lines = LogQueue(lambda lost: b"%d lost\n" % lost, LogOutput(writer).write)
    lines.put(b"parent\n")
    assert lines.flush(20)
    child = os.fork()
    if child == 0:
        lines.restart_after_fork()
        lines.put(b"child\n")
        os._exit(0 if lines.flush(20) and lines.lost[0] == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(writer)
    with os.fdopen(reader, "rb") as written:
        assert written.read() == b"parent\nchild\n"


def test_text_stream_writes_whole_lines_and_completes_the_last_line_at_the_end() -> None:
    written: list[bytes] = []
    stream = QueuedText(json_queue(written.append), 2)
    print("a\ud800", "b", sep=" ", end="", file=stream, flush=True)
    assert stream.lines.flush(20)
    assert written == []
    print("c\nd", end="", file=stream)
    stream.finish()
    assert stream.lines.flush(20)
    assert b"".join(written) == b"a\\ud800 bc\nd\n"


WRITER = """
import sys
from service.monitoring.log_output import LogOutput
print("ready", file=sys.stderr, flush=True)
sys.stdin.read()
for turn in range(50):
    LogOutput().write(b"".join([b"%s %d %d\\n" % (b"NAME" * 100, turn, line) for line in range(400)]))
"""


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_log_lines_stay_whole_if_workers_write_at_the_same_time(kind: str, tmp_path: Path) -> None:
    path, names, pipe = tmp_path / "log", ("abc", "xyz"), subprocess.PIPE
    with path.open("wb") as file:
        reader = subprocess.Popen(["cat"], stdin=pipe, stdout=file)
        output = reader.stdin if kind == "pipe" else file
        programs = [[sys.executable, "-c", WRITER.replace("NAME", name)] for name in names]
        workers = [PreloadedProcess(program, stdin=pipe, stdout=output, stderr=pipe) for program in programs]
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


def test_access_log_in_text_form_writes_key_value_pairs_and_a_disabled_log_writes_nothing() -> None:
    written: list[bytes] = []

    async def scenario() -> None:
        for form, enabled in (("text", True), ("text", False)):
            access_log = logs.AccessLog(form, enabled, json_queue(written.append))
            access_log.log(ended_request("r"))
            await access_log.close()

    asyncio.run(scenario())
    assert re.fullmatch(rb"\S+ \S+ INFO +request request_id=r method=GET path=/a .*\n", b"".join(written))


def test_access_log_shortens_long_paths_and_client_names_but_keeps_them_distinct() -> None:
    written: list[bytes] = []

    async def scenario() -> None:
        access_log = logs.AccessLog("json", True, json_queue(written.append))
        for end in "ab":
            access_log.log(RequestRecord("r", "GET", "/" + "p" * 60_000 + end, "c" * 60_000 + end))
        await access_log.close()

    asyncio.run(scenario())
    lines = [json.loads(line) for line in b"".join(written).splitlines()]
    for name, length in (("path", 1000), ("client", 100)):
        assert [len(line[name]) for line in lines] == [length, length]
        assert lines[0][name] != lines[1][name]


def log_record(**fields: Any) -> logging.LogRecord:
    record = logging.LogRecord("elbo.x", logging.INFO, "file", 1, "loaded %s", ("pca",), None)
    record.fields = fields
    return record


def test_json_formatter_writes_one_object_on_one_line() -> None:
    line = logs.Formatter("json").format(log_record(ms=1.5, path="/a\nb"))
    assert "\n" not in line
    fields = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", fields.pop("ts"))
    assert fields == {"level": "info", "logger": "elbo.x", "message": "loaded pca", "ms": 1.5, "path": "/a\nb"}


def test_json_formatter_writes_the_traceback_of_an_exception_on_the_same_line() -> None:
    try:
        raise ValueError("deep")
    except ValueError as error:
        record = log_record()
        record.exc_info = (ValueError, error, error.__traceback__)
    line = logs.Formatter("json").format(record)
    assert "\n" not in line
    assert "ValueError: deep" in json.loads(line)["exception"]


def test_text_formatter_writes_time_level_message_and_fields() -> None:
    assert re.fullmatch(
        r"\S+ \S+ INFO +loaded pca ms=1.5 path=/a", logs.Formatter("text").format(log_record(ms=1.5, path="/a"))
    )


def test_metrics_count_requests_by_endpoint_model_and_status_and_record_rows_and_times(client: httpx.Client) -> None:
    before = scrape(client)
    client.post("/reconstruct?model=pca", json={"inputs": [ROW] * 5})
    client.post("/reconstruct?model=pca", json={"inputs": [ROW[1:]]})
    client.post("/reconstruct?model=nobody", json={"inputs": [ROW]})
    client.get("/some/where")
    after = scrape(client)
    labels = {"endpoint": "/reconstruct", "model": "pca", "version": "1"}
    no_model = {"model": "", "version": ""}
    assert increase(before, after, "elbo_requests_total", **labels, status="200") == 1
    assert increase(before, after, "elbo_requests_total", **labels, status="422") == 1
    assert increase(before, after, "elbo_requests_total", endpoint="/reconstruct", **no_model, status="404") == 1
    assert increase(before, after, "elbo_requests_total", endpoint="other", **no_model, status="404") == 1
    assert increase(before, after, "elbo_rows_total", **labels) == 5
    assert increase(before, after, "elbo_problems_total", **labels, code="invalid_rows") == 1
    assert increase(before, after, "elbo_request_seconds_count", **labels, outcome="ok") == 1
    assert increase(before, after, "elbo_request_seconds_count", **labels, outcome="refused") == 1
    assert increase(before, after, "elbo_queue_seconds_count", **labels, outcome="ok") == 1
    assert increase(before, after, "elbo_compute_seconds_count", **labels, outcome="ok") == 1
    assert 0 < increase(before, after, "elbo_compute_seconds_sum", **labels, outcome="ok") < 1
    assert increase(before, after, "elbo_batch_rows_count", operation="reconstruct") == 1
    assert increase(before, after, "elbo_batch_rows_sum", operation="reconstruct") == 5


def test_loaded_models_are_exported_as_gauges(client: httpx.Client) -> None:
    samples = scrape(client)
    info = {dict(labels)["model"]: value for (name, labels), value in samples.items() if name == "elbo_model_info"}
    assert info == {"ae": 1, "hosts": 1, "pca": 1, "vae": 1}
    assert samples["elbo_pending_rows", frozenset()] == 0
    assert samples["elbo_model_load_failures", frozenset()] == 0


def test_requests_for_unknown_models_and_paths_add_no_label_sets(client: httpx.Client) -> None:
    client.get("/livez")
    client.get("/nope")
    client.post("/encode?model=x", json={})
    before = set(scrape(client))
    for i in range(20):
        client.get(f"/nope/{i}")
        client.post(f"/encode?model=x{i}", json={})
    assert set(scrape(client)) == before


def test_two_applications_in_one_process_count_requests_separately(app: FastAPI, artifacts: Path) -> None:
    other = create_app(Settings(artifacts=artifacts))
    with running(other) as client:
        label_sets = {key for key in scrape(client) if key[0] == "elbo_requests_total"}
        assert len(label_sets) == 1  # GET /livez from `running`; GET /metrics is counted after its response
    assert other.state.service.metrics.registry is not app.state.service.metrics.registry


FORGED_PATHS = [
    "/x\n2026-01-01 00:00:00.000 INFO    listening on http://0.0.0.0:1",
    "/x\r2026-01-01 00:00:00.000 INFO    forged",
    "/x\x1b[2J\x1b[1;31m",
    "/x\x00\x07\x08",
    "/x\x7f\x9b31m",  # DEL, and the one-character form of ESC [
    "/x\u2028forged\u2029\x85",
    "/x\u202egnp.exe",  # text after this character is shown from right to left
    "/x status=200 client=10.0.0.1",
    '/x" status=200 "',
    "/x\\n\t",
]


@pytest.mark.parametrize("path", FORGED_PATHS)
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_path_of_a_request_cannot_forge_a_log_line_or_a_field(
    artifacts: Path, capfd: pytest.CaptureFixture[str], log_format: str, path: str
) -> None:
    settings = Settings(artifacts=artifacts, log_format=log_format, backend="torchscript")
    with running(create_app(settings)) as client:
        capfd.readouterr()
        client.get(quote(path), headers={"x-request-id": "forged"})
    output = capfd.readouterr().out
    assert all(char.isprintable() for char in output.replace("\n", ""))
    (line,) = [line for line in output.splitlines() if "forged" in line]
    if log_format == "json":
        assert json.loads(line)["path"] == path
        return
    value = re.search(r' path=("(?:\\.|[^"\\])*"|\S+)', line)
    assert value
    assert (ast.literal_eval(value[1]) if value[1].startswith('"') else value[1]) == path
    others = line.replace(value[0], "").partition(" request ")[2].split(" ")
    assert re.fullmatch(r"request_id=forged method=GET status=404 client=127.0.0.1 ms=[\d.]+", " ".join(others))


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_message_and_traceback_with_control_characters_cannot_forge_a_log_line(log_format: str) -> None:
    record = logging.LogRecord("elbo.x", logging.ERROR, "file", 1, "failed: %s", ("a\nb\x1b\ud800",), None)
    try:
        raise ValueError("deep\n2026-01-01 INFO forged\x1b[2J")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    first, *others = logs.Formatter(log_format).format(record).split("\n")
    if log_format == "json":
        assert others == []
        assert json.loads(first)["message"] == "failed: a\nb\x1b\ud800"
        return
    assert first.endswith(r"failed: a\nb\x1b\ud800")
    assert others[-1] == r"    2026-01-01 INFO forged\x1b[2J"
    assert all(line.startswith("    ") and line.isprintable() for line in others)


def test_group_with_control_characters_is_escaped_in_metrics(client: httpx.Client) -> None:
    record = {f"pixel[{row},{column}]": 0.5 for row in range(8) for column in range(8)}
    body = {"records": [{**record, "pixel[0,0]": 1e6, "host": 'web\n# EOF\x00\x1b"\x85'}]}
    assert client.post("/anomaly?model=pca", json=body).json()["anomalies"] == 1
    text = client.get("/metrics").text
    assert all(line.isprintable() for line in text.split("\n"))
    assert {
        labels["group"] for name, labels in map(parsed_labels, scrape(client)) if name == "elbo_anomalies_total"
    } >= {r'web\n# EOF\x00\x1b"\x85'}


def parsed_labels(sample: tuple[str, frozenset[tuple[str, str]]]) -> tuple[str, dict[str, str]]:
    return sample[0], dict(sample[1])
