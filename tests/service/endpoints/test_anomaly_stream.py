"""NDJSON in, NDJSON out, over real sockets: order, errors, memory, back-pressure, and clients that misbehave."""

import gzip
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.codec.ndjson import LineSplitter
from service.codec.row_errors import MalformedRow
from service.endpoints.anomaly_stream import MAX_LINE_BYTES
from service.settings import Settings
from tests.service.hosts import HOST_FEATURES, as_ndjson, host_records, host_rows
from tests.service.running import running

NDJSON = "application/x-ndjson"
HEADERS = {"content-type": NDJSON, "accept": NDJSON}


@pytest.fixture(scope="module")
def streaming_app(artifacts: Path) -> FastAPI:
    options = {"default_model": "hosts", "log_level": "error", "backend": "torchscript"}
    return create_app(Settings(artifacts=artifacts, request_timeout=3, **options))  # type: ignore[arg-type] # options of several types


@pytest.fixture(scope="module")
def hosts(streaming_app: FastAPI) -> Iterator[httpx.Client]:
    with running(streaming_app) as client:
        yield client


def told(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == NDJSON
    return [json.loads(line) for line in response.text.splitlines()]


def connect(client: httpx.Client, query: str = "explain=0") -> socket.socket:
    """A connection on which a stream's head has been sent."""
    connection = socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=20)
    head = f"POST /anomaly?{query} HTTP/1.1\r\nHost: x\r\nContent-Type: {NDJSON}\r\nAccept: {NDJSON}\r\n"
    connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
    return connection


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


def test_a_line_in_gives_a_line_out_and_the_counts_come_last(hosts: httpx.Client) -> None:
    found: list[Any] = host_records(host_rows(2000))
    found[7] = {"cpu": "x"}
    found[1500] = 12
    body = "\n".join(map(json.dumps, found)).encode() + b"\n"
    *lines, last = told(hosts.post("/anomaly", content=body, headers=HEADERS))
    assert [line["row"] for line in lines] == list(range(2000))
    assert [line["row"] for line in lines if "detail" in line] == [7, 1500]
    assert lines[1500]["pointer"] == "/1500"
    whole = hosts.post("/anomaly", content=body, headers={"content-type": NDJSON}).json()
    assert last == {key: whole[key] for key in ("model", "version", "rows", "anomalies", "failed", "unknown_fields")}
    judged = [line for line in lines if "score" in line]
    assert [line.keys() for line in judged] == [result.keys() for result in whole["results"]]
    for name in ("row", "score", "p_value", "severity", "is_anomaly"):
        assert [line[name] for line in judged] == pytest.approx([result[name] for result in whole["results"]], rel=1e-5)


def test_a_stream_of_bad_lines_alone_is_answered_line_by_line(hosts: httpx.Client) -> None:
    *lines, last = told(hosts.post("/anomaly", content=b"{\nnull\n\xff\n", headers=HEADERS))
    assert [line["row"] for line in lines] == [0, 1, 2]
    assert (last["rows"], last["failed"]) == (3, 3)


def test_detail_none_leaves_the_counts_alone(hosts: httpx.Client) -> None:
    body, _ = as_ndjson(host_rows(300))
    (last,) = told(hosts.post("/anomaly?detail=none", content=body, headers=HEADERS))
    assert last["rows"] == 300


def test_a_gzipped_stream_is_unpacked_as_it_comes(hosts: httpx.Client) -> None:
    body, _ = as_ndjson(host_rows(3000))
    packed = gzip.compress(body)
    headers = HEADERS | {"content-encoding": "gzip"}
    assert told(hosts.post("/anomaly", content=packed, headers=headers))[-1]["rows"] == 3000
    *lines, last = told(hosts.post("/anomaly", content=packed[: len(packed) // 2], headers=headers))
    assert last["code"] == "invalid_encoding"
    assert lines[0]["row"] == 0


@pytest.mark.parametrize("field", ["fdr=0.1", "half_life=3", "half_life_rows=3", "alpha=2", "colour=red"])
def test_what_a_stream_cannot_do_is_refused_before_it_begins(hosts: httpx.Client, field: str) -> None:
    response = hosts.post(f"/anomaly?{field}", content=b"{}", headers=HEADERS)
    assert response.status_code == 422
    assert response.json()["pointer"] == f"/{field.partition('=')[0]}"


def test_a_row_is_answered_while_the_stream_goes_on(hosts: httpx.Client) -> None:
    with connect(hosts) as connection, connection.makefile("rb") as answer:
        line = json.dumps(host_records(host_rows(1))[0]).encode() + b"\n"
        for row in range(3):
            connection.sendall(chunk(line))
            while b'"row"' not in (got := answer.readline()):
                assert got
            assert json.loads(got)["row"] == row
        connection.sendall(b"0\r\n\r\n")
        while b'"rows":3' not in (got := answer.readline()):
            assert got


def test_a_hundred_thousand_rows_take_no_more_memory_than_ten_thousand(hosts: httpx.Client) -> None:
    line = json.dumps(host_records(host_rows(1))[0]).encode() + b"\n"

    def peak(count: int) -> int:
        """Bytes at most during a stream of `count` rows, of which the client keeps nothing."""
        pieces = (line * 500 for _ in range(count // 500))
        tracemalloc.reset_peak()
        with hosts.stream("POST", "/anomaly?detail=none", content=pieces, headers=HEADERS) as response:
            last = [*response.iter_lines()][-1]
        assert json.loads(last)["rows"] == count
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    try:
        peak(2000)
        small, large = peak(10_000), peak(100_000)
    finally:
        tracemalloc.stop()
    assert large < small + 2**20


def test_a_client_that_does_not_read_is_not_read_from_and_harms_nobody(
    streaming_app: FastAPI, hosts: httpx.Client
) -> None:
    line = json.dumps(host_records(host_rows(1))[0]).encode() + b"\n"
    piece, sent = chunk(line * 200), 0
    with connect(hosts, "explain=4") as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(1.0)
        with suppress(TimeoutError, ConnectionError):
            while sent < 400 * 2**20:
                sent += connection.send(piece)
        assert sent < 64 * 2**20  # what fits between the two, far less than was to be sent
        assert hosts.post("/anomaly", json={"inputs": host_rows(1)}).status_code == 200
        held = streaming_app.state.service.admission.body_bytes.amount
        assert held <= 2**20
    deadline = time.monotonic() + 15
    while streaming_app.state.service.admission.body_bytes.amount and time.monotonic() < deadline:
        time.sleep(0.05)
    assert streaming_app.state.service.admission.body_bytes.amount == 0


def test_a_client_that_leaves_ends_the_work(streaming_app: FastAPI, hosts: httpx.Client) -> None:
    metrics = streaming_app.state.service.metrics
    before = sum(value for (value,) in metrics._requests.sums().values())
    connection = connect(hosts)
    connection.sendall(chunk(json.dumps(host_records(host_rows(1))[0]).encode() + b"\n"))
    assert b"200 OK" in connection.recv(4096)
    connection.close()
    deadline = time.monotonic() + 10
    while sum(value for (value,) in metrics._requests.sums().values()) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    problems = metrics._problems.sums()
    assert any(labels[0] == "/anomaly:stream" and labels[-1] == "client_gone" for labels in problems)
    assert streaming_app.state.service.batcher.pending_rows == 0


def test_a_client_that_falls_silent_is_told_so_and_let_go(hosts: httpx.Client) -> None:
    with connect(hosts) as connection:
        connection.sendall(chunk(b'{"cpu": 1'))
        connection.settimeout(20)
        answer = b""
        while got := connection.recv(4096):
            answer += got
            if b"body_too_slow" in answer:
                break
        assert b"body_too_slow" in answer


def test_many_streams_at_once_each_get_their_own(hosts: httpx.Client) -> None:
    found: dict[int, int] = {}

    def one(count: int) -> None:
        with httpx.Client(base_url=hosts.base_url, timeout=30) as client:
            found[count] = told(client.post("/anomaly", content=as_ndjson(host_rows(count))[0], headers=HEADERS))[-1][
                "rows"
            ]

    threads = [threading.Thread(target=one, args=(100 + number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {100 + number: 100 + number for number in range(8)}


def test_an_enormous_line_costs_itself_and_no_memory(hosts: httpx.Client) -> None:
    good = json.dumps(dict.fromkeys(HOST_FEATURES, 1.0)).encode() + b"\n"
    body = good + b'{"cpu": ' + b"1" * (4 * MAX_LINE_BYTES) + b"}\n" + good
    *lines, last = told(hosts.post("/anomaly", content=body, headers=HEADERS))
    assert [("detail" in line) for line in lines] == [False, True, False]
    assert lines[1]["detail"] == f"the line is too long: expected at most {MAX_LINE_BYTES} bytes"
    assert last["rows"] == 3


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_lines_are_the_same_however_they_are_cut(size: int) -> None:
    body = b'{"a": 1}\n\n[1, 2]\r\n' + b"9" * 30 + b"\nnull\n3"
    splitter, found = LineSplitter(20), []
    for start in range(0, len(body), size):
        found += splitter.feed(body[start : start + size])
        assert len(splitter._rest) <= 20 + size
    found += splitter.finish()
    long = found.pop(2)
    assert isinstance(long, MalformedRow)
    assert found == [{"a": 1}, [1, 2], None, 3]
