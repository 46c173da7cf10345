"""Small bodies that cause much work are refused soon and with little memory, while other clients are served."""

import gzip
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter, sleep

import httpx
import pytest

from service.codec.budget import ROW_BYTES
from service.codec.compression import FREE_MEMBERS
from tests.service.hosts import HOST_FEATURES, JSON, NDJSON
from tests.service.process import ServerProcess, background_threads, server_starter

pytestmark = pytest.mark.slow

CSV = "text/csv"
MAX_BODY = 8 * 2**20
MAX_ROWS = 2000
HEADER = ",".join(HOST_FEATURES).encode() + b"\n"
NUMBERS = b"[%b]," % b",".join([b"1"] * len(HOST_FEATURES))
STALL_SECONDS = 1.0  # the machine may have other work; benchmarks/serving/hostile_requests.py measures 50 ms


def filled(piece: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """Return a body of almost MAX_BODY bytes."""
    return before + piece * ((MAX_BODY - 1000) // len(piece)) + after


def keys(count: int) -> bytes:
    return b",".join(b'"k%d":1' % index for index in range(count))


# For each attack: the Content-Type, the body before compression, the expected code.
ATTACKS: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "CSV of lines that do not fit": (CSV, lambda: filled(b"x\n", HEADER), "too_many_rows"),
    "CSV of blank lines": (CSV, lambda: filled(b"\n", HEADER), "invalid_field"),
    "CSV of lines of commas": (CSV, lambda: filled(b",,,\n", HEADER, b"1,1,1,1\n"), "too_many_rows"),
    "CSV of old line ends": (CSV, lambda: filled(b"x\r", HEADER), "too_many_rows"),
    "CSV in one line": (CSV, lambda: filled(b"1,", HEADER), "invalid_rows"),
    "CSV with a header of many columns": (CSV, lambda: filled(b"a,"), "invalid_csv"),
    "CSV of open quotations": (CSV, lambda: filled(b'"a\n', HEADER), "too_many_rows"),
    "CSV that is not UTF-8": (CSV, lambda: filled(b"\xff" * 50_000 + b"\n", HEADER), "invalid_rows"),
    "CSV of booleans": (CSV, lambda: filled(b"yes,1,1,1\n", HEADER), "too_many_rows"),
    "NDJSON of invalid lines": (NDJSON, lambda: filled(b"x\n"), "too_many_rows"),
    "NDJSON of nulls": (NDJSON, lambda: filled(b"0\n"), "too_many_rows"),
    "NDJSON of blank lines": (NDJSON, lambda: filled(b" \n"), "invalid_field"),
    "NDJSON of lists in lines": (NDJSON, lambda: filled(b"[" + b"[]," * 300_000 + b"[]]\n"), "invalid_rows"),
    "empty lists": (JSON, lambda: filled(b"[],", b'{"inputs":[', b"[]]}"), "too_many_rows"),
    "empty objects": (JSON, lambda: filled(b"{},", b'{"records":[', b"{}]}"), "too_many_rows"),
    "lists in a row": (JSON, lambda: filled(b"[],", b'{"inputs":[[', b"[]]]}"), "body_too_large"),
    "lists in another field": (JSON, lambda: filled(b"[],", b'{"x":[', b"[]]}"), "too_many_rows"),
    "lists in a document that is a list": (JSON, lambda: filled(b"[],", b"[", b"[]]"), "invalid_json"),
    "metrics": (JSON, lambda: filled(b"{},", b'{"metrics":[', b"{}]}"), "too_many_rows"),
    "numbers in place of rows": (JSON, lambda: filled(b"1,", b'{"inputs":[', b"1]}"), "body_too_large"),
    "many rows of numbers": (JSON, lambda: filled(NUMBERS, b'{"inputs":[', b"[1]]}"), "too_many_rows"),
    "many fields": (JSON, lambda: b"{%b}" % keys(600_000), "body_too_large"),
    "some fields": (JSON, lambda: b"{%b}" % keys(40_000), "invalid_field"),
    "many keys in a record": (JSON, lambda: b'{"records":[{%b}]}' % keys(600_000), "body_too_large"),
    "some keys in a record": (JSON, lambda: b'{"records":[{%b}]}' % keys(40_000), "invalid_rows"),
    "duplicate keys": (JSON, lambda: filled(b'{"a":1,"a":1},', b'{"records":[', b"{}]}"), "too_many_rows"),
    "a long string": (JSON, lambda: filled(b"x", b'{"records":[{"a":"', b'"}]}'), "body_too_large"),
    "a string of escapes": (JSON, lambda: filled(rb"\"", b'{"records":[{"a":"', b'"}]}'), "body_too_large"),
    "numbers that are not finite": (JSON, lambda: filled(b"[NaN],", b'{"inputs":[', b"[1]]}"), "too_many_rows"),
    "deep lists": (JSON, lambda: filled(b"[", b'{"inputs":'), "body_too_large"),
    "white space": (JSON, lambda: filled(b" ", b'{"inputs":[[1],', b"[1]]}"), "body_too_large"),
    "white space alone": (JSON, lambda: filled(b" "), "body_too_large"),
    "an unknown field of a long name": (JSON, lambda: b'{"%b":1}' % (b"x" * 10**6), "invalid_field"),
    "text of Telegraf": ("text/plain", lambda: filled(b"[],", b'{"metrics":[', b"[]]}"), "too_many_rows"),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(artifacts: Path) -> Iterator[ServerProcess]:
    with server_starter() as start:
        yield start(artifacts, MAX_BODY_BYTES=MAX_BODY, MAX_ROWS=MAX_ROWS, DEFAULT_MODEL="hosts")


def peak_memory(server: ServerProcess) -> int:
    """Return the largest resident memory of the server since `reset_peak_memory`, in bytes."""
    text = Path(f"/proc/{server.popen.pid}/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


def reset_peak_memory(server: ServerProcess) -> None:
    Path(f"/proc/{server.popen.pid}/clear_refs").write_text("5")


def post_while_others_are_served(server: ServerProcess, body: bytes, headers: dict[str, str]) -> httpx.Response:
    """Send a request. Assert that the server has neither used much memory nor kept other clients waiting."""
    waits = [0.0]

    def ask_livez(stop: threading.Event) -> None:
        with server.client() as client:
            while not stop.is_set():
                started = perf_counter()
                client.get("/livez")
                waits.append(perf_counter() - started)
                sleep(0.01)

    reset_peak_memory(server)
    memory = peak_memory(server)
    with background_threads(ask_livez), server.client() as client:
        response = client.post("/anomaly", content=body, headers=headers)
    assert peak_memory(server) - memory < 3 * MAX_BODY + MAX_ROWS * ROW_BYTES
    assert max(waits) < STALL_SECONDS
    return response


@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("attack", ATTACKS)
def test_costly_body_is_refused_while_others_are_served(
    server: ServerProcess, attack: str, is_compressed: bool
) -> None:
    content_type, make, code = ATTACKS[attack]
    body, headers = make(), {"content-type": content_type}
    if is_compressed:
        body, headers = gzip.compress(body, 1), {**headers, "content-encoding": "gzip"}
    response = post_while_others_are_served(server, body, headers)
    assert response.json()["code"] == code, response.text[:500]
    assert len(response.content) < 5000


@pytest.mark.parametrize("member", [b"", b"\n", b'{"cpu": 1}\n'])
@pytest.mark.parametrize("accept", ["application/json", NDJSON])
def test_gzip_body_of_many_small_members_is_refused_while_others_are_served(
    server: ServerProcess, member: bytes, accept: str
) -> None:
    body = gzip.compress(member) * 250_000
    headers = {"content-type": NDJSON, "content-encoding": "gzip", "accept": accept}
    response = post_while_others_are_served(server, body, headers)
    problem = response.json() if accept == "application/json" else httpx.Response(
        200, content=response.text.splitlines()[-1]
    ).json()  # fmt: skip
    assert problem["code"] == "invalid_encoding", response.text[:500]
    assert str(FREE_MEMBERS) in problem["expected"]


def test_stream_of_invalid_lines_is_answered_while_others_are_served(server: ServerProcess) -> None:
    headers = {"content-type": NDJSON, "accept": NDJSON}
    response = post_while_others_are_served(server, b"x\n" * 10_000, headers)
    assert len(response.text.splitlines()) == 10_001


def test_memory_of_refused_bodies_is_freed(server: ServerProcess) -> None:
    body = gzip.compress(filled(b"[],", b'{"inputs":[', b"[]]}"))
    headers = {"content-type": JSON, "content-encoding": "gzip"}
    with server.client() as client:
        client.post("/anomaly", content=body, headers=headers)
        reset_peak_memory(server)
        memory = peak_memory(server)
        for _ in range(10):
            assert client.post("/anomaly", content=body, headers=headers).status_code == 413
    assert peak_memory(server) - memory < 3 * MAX_BODY
    assert server.metric_total("elbo_pending_bytes") == 0


def test_request_whose_deadline_passes_while_its_body_is_read_gets_504(server: ServerProcess) -> None:
    record = b'{"records":[%b{}]}' % (b'{"cpu":1,"a":"%b"},' % (b"x" * 4000) * (MAX_ROWS - 100))
    with server.client() as client:
        response = client.post("/anomaly", content=record, headers={"content-type": JSON, "x-request-timeout": "0.02"})
    assert response.json()["code"] == "deadline_exceeded"
