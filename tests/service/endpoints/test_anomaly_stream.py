"""Streamed anomaly scoring over real sockets: order, errors, memory, backpressure and misbehaving clients."""

import asyncio
import gzip
import json
import re
import socket
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.anomaly.group_state import Transaction
from service.app import create_app
from service.codec.budget import MAX_ROW_BYTES, NoLimit
from service.codec.ndjson import LineSplitter
from service.codec.row_errors import MalformedRow
from service.endpoints.context import ServiceContext
from service.settings import Settings
from tests.plain_http import NO_AUTHORITIES
from tests.service.groups import settings_of
from tests.service.hosts import HOST_FEATURES, as_ndjson, host_records, host_rows
from tests.service.running import running
from tests.service.serving import serving, until

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


def response_lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == NDJSON
    return [json.loads(line) for line in response.text.splitlines()]


def connect(client: httpx.Client, query: str = "explain=0") -> socket.socket:
    """Return a connection on which the headers of a streaming request have been sent."""
    connection = socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=20)
    head = f"POST /anomaly?{query} HTTP/1.1\r\nHost: x\r\nContent-Type: {NDJSON}\r\nAccept: {NDJSON}\r\n"
    connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
    return connection


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


def test_stream_responds_with_one_line_per_row_and_ends_with_the_counts(hosts: httpx.Client) -> None:
    records: list[Any] = host_records(host_rows(2000))
    records[7] = {"cpu": "x"}
    records[1500] = 12
    body = "\n".join(map(json.dumps, records)).encode() + b"\n"
    *lines, last = response_lines(hosts.post("/anomaly", content=body, headers=HEADERS))
    assert [line["row"] for line in lines] == list(range(2000))
    assert [line["row"] for line in lines if "detail" in line] == [7, 1500]
    assert lines[1500]["pointer"] == "/1500"
    whole = hosts.post("/anomaly", content=body, headers={"content-type": NDJSON}).json()
    assert last == {key: whole[key] for key in ("model", "version", "rows", "anomalies", "failed", "unknown_fields")}
    scored = [line for line in lines if "score" in line]
    assert [line.keys() for line in scored] == [result.keys() for result in whole["results"]]
    for name in ("row", "score", "p_value", "severity", "is_anomaly"):
        assert [line[name] for line in scored] == pytest.approx([result[name] for result in whole["results"]], rel=1e-5)


def test_stream_of_invalid_lines_responds_with_one_error_per_line(hosts: httpx.Client) -> None:
    *lines, last = response_lines(hosts.post("/anomaly", content=b"{\nnull\n\xff\n", headers=HEADERS))
    assert [line["row"] for line in lines] == [0, 1, 2]
    assert (last["rows"], last["failed"]) == (3, 3)


def test_stream_responds_with_only_the_counts_if_detail_is_none(hosts: httpx.Client) -> None:
    body, _ = as_ndjson(host_rows(300))
    (last,) = response_lines(hosts.post("/anomaly?detail=none", content=body, headers=HEADERS))
    assert last["rows"] == 300


def test_truncated_gzip_stream_is_scored_up_to_the_truncation(hosts: httpx.Client) -> None:
    body, _ = as_ndjson(host_rows(3000))
    packed = gzip.compress(body)
    headers = HEADERS | {"content-encoding": "gzip"}
    assert response_lines(hosts.post("/anomaly", content=packed, headers=headers))[-1]["rows"] == 3000
    *lines, last = response_lines(hosts.post("/anomaly", content=packed[: len(packed) // 2], headers=headers))
    assert last["code"] == "invalid_encoding"
    assert lines[0]["row"] == 0


@pytest.mark.parametrize("field", ["fdr=0.1", "half_life=3", "half_life_rows=3", "alpha=2", "colour=red"])
def test_option_that_a_stream_does_not_support_gives_422(hosts: httpx.Client, field: str) -> None:
    response = hosts.post(f"/anomaly?{field}", content=b"{}", headers=HEADERS)
    assert response.status_code == 422
    assert response.json()["pointer"] == f"/{field.partition('=')[0]}"


def test_row_gets_its_response_before_the_next_row_is_sent(hosts: httpx.Client) -> None:
    with connect(hosts) as connection, connection.makefile("rb") as response:
        line = json.dumps(host_records(host_rows(1))[0]).encode() + b"\n"
        for row in range(3):
            connection.sendall(chunk(line))
            while b'"row"' not in (got := response.readline()):
                assert got
            assert json.loads(got)["row"] == row
        connection.sendall(b"0\r\n\r\n")
        while b'"rows":3' not in (got := response.readline()):
            assert got


def test_memory_of_a_stream_does_not_grow_with_the_number_of_rows(hosts: httpx.Client) -> None:
    line = json.dumps(host_records(host_rows(1))[0]).encode() + b"\n"

    def peak(count: int) -> int:
        """Return the peak memory in bytes during a stream of `count` rows. The client stores no rows."""
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


def test_server_stops_reading_if_the_client_does_not_read_the_responses(
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
        assert sent < 64 * 2**20  # socket buffers hold less than 64 MiB, so the server stopped reading
        assert hosts.post("/anomaly", json={"inputs": host_rows(1)}).status_code == 200
        held = streaming_app.state.service.admission.body_bytes.amount
        assert held <= 2**20
    deadline = time.monotonic() + 15
    while streaming_app.state.service.admission.body_bytes.amount and time.monotonic() < deadline:
        time.sleep(0.05)
    assert streaming_app.state.service.admission.body_bytes.amount == 0


def test_disconnected_client_ends_the_stream(streaming_app: FastAPI, hosts: httpx.Client) -> None:
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


def test_client_that_stops_sending_gets_body_too_slow(hosts: httpx.Client) -> None:
    with connect(hosts) as connection:
        connection.sendall(chunk(b'{"cpu": 1'))
        connection.settimeout(20)
        response = b""
        while got := connection.recv(4096):
            response += got
            if b"body_too_slow" in response:
                break
        assert b"body_too_slow" in response


def test_concurrent_streams_get_their_own_responses(hosts: httpx.Client) -> None:
    rows: dict[int, int] = {}

    def stream(count: int) -> None:
        with httpx.Client(verify=NO_AUTHORITIES, base_url=hosts.base_url, timeout=30) as client:
            body, _ = as_ndjson(host_rows(count))
            *_, last = response_lines(client.post("/anomaly", content=body, headers=HEADERS))
            rows[count] = last["rows"]

    threads = [threading.Thread(target=stream, args=(100 + number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows == {100 + number: 100 + number for number in range(8)}


def test_line_longer_than_the_limit_is_an_error_and_other_lines_are_scored(hosts: httpx.Client) -> None:
    good = json.dumps(dict.fromkeys(HOST_FEATURES, 1.0)).encode() + b"\n"
    body = good + b'{"cpu": ' + b"1" * (4 * MAX_ROW_BYTES) + b"}\n" + good
    *lines, last = response_lines(hosts.post("/anomaly", content=body, headers=HEADERS))
    assert [("detail" in line) for line in lines] == [False, True, False]
    assert lines[1]["detail"] == f"the line is too long: expected at most {MAX_ROW_BYTES} bytes"
    assert last["rows"] == 3


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_line_splitter_gives_the_same_lines_for_pieces_of_any_size(size: int) -> None:
    body = b'{"a": 1}\n\n[1, 2]\r\n' + b"9" * 30 + b"\nnull\n3"
    splitter = LineSplitter(NoLimit(max_row_bytes=20))
    lines: list[object] = []
    for start in range(0, len(body), size):
        lines += splitter.feed(body[start : start + size])
        assert len(splitter._rest) <= 20 + size
    lines += splitter.finish()
    too_long = lines.pop(2)
    assert isinstance(too_long, MalformedRow)
    assert lines == [{"a": 1}, [1, 2], None, 3]


def test_time_to_split_a_long_line_is_proportional_to_the_number_of_its_pieces() -> None:
    splitter = LineSplitter(NoLimit(max_row_bytes=2**20))
    started = time.thread_time()
    for _ in range(2**20 // 64 - 1):
        assert list(splitter.feed(b"9" * 64)) == []
    assert time.thread_time() - started < 2  # s; about 0.01 s, and about 9 s if every piece copies the line
    assert len(list(splitter.feed(b"\n"))) == 1
    assert not splitter.has_incomplete_line


def group_lines(first: int, last: int) -> bytes:
    """Return the lines of the rows `first` to `last` - 1 of a group."""
    rows = [
        {"ts": 1_750_000_000 + 600 * row, "host": "web-0", "cpu": row % 7, "mem": 0, "disk": 0, "note": 400 * "x"}
        for row in range(first, last)
    ]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


GROUP_HEAD = (
    f"POST /anomaly?model=windows&explain=0&impute=true HTTP/1.1\r\nHost: x\r\nContent-Type: {NDJSON}\r\n"
    f"Accept: {NDJSON}\r\nTransfer-Encoding: chunked\r\n\r\n"
).encode()


@asynccontextmanager
async def stream_that_waits(
    settings: Settings,
) -> AsyncIterator[tuple[ServiceContext, Transaction, asyncio.StreamReader, asyncio.StreamWriter]]:
    """Yield a stream whose first five rows wait for their group. The yielded transaction locks the group."""
    async with serving(settings) as (service, port):
        memory = await service.groups.of(service.find("windows"))
        transaction = await memory.file.begin(["web-0"], time.perf_counter() + 60)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GROUP_HEAD + chunk(group_lines(0, 5)))
        await until(lambda: service.admission.body_bytes.amount > 0)
        await asyncio.sleep(0.05)
        assert service.admission.body_bytes.amount > 0  # the rows wait
        yield service, transaction, reader, writer
        writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("more_rows", [0, 20])
def test_stream_whose_rows_wait_for_a_group_ends_and_changes_nothing_if_the_client_disconnects(
    group_models: Path, tmp_path: Path, more_rows: int
) -> None:
    async def check() -> None:
        async with stream_that_waits(settings_of(group_models, tmp_path)) as (service, transaction, _, writer):
            if more_rows:  # a part of the body that arrives meanwhile does not hide the disconnect
                writer.write(chunk(group_lines(5, 5 + more_rows)))
                await writer.drain()
                await asyncio.sleep(0.05)
            writer.close()
            await until(lambda: service.admission.body_bytes.amount == 0)
            transaction.end()
            memory = await service.groups.of(service.find("windows"))
            assert memory.file.is_idle
            assert not memory.file.has_slot("web-0")
            text = service.metrics.exposition(service.registry.catalogue).decode()
            assert re.search(r'elbo_requests_total{[^}]*endpoint="/anomaly:stream"[^}]*status="499"[^}]*} 1.0', text)

    asyncio.run(check())


@pytest.mark.slow
def test_rows_that_arrive_while_earlier_rows_wait_for_their_group_are_all_scored_in_order(
    group_models: Path, tmp_path: Path
) -> None:
    rows = 2000  # far more bytes than the server receives while rows wait

    async def check() -> None:
        async with stream_that_waits(settings_of(group_models, tmp_path)) as (_, transaction, reader, writer):
            for first in range(5, rows, 105):
                writer.write(chunk(group_lines(first, first + 105)))
            writer.write(b"0\r\n\r\n")
            await asyncio.sleep(0.2)
            transaction.end()
            lines: list[dict[str, Any]] = []
            while not lines or "rows" not in lines[-1]:
                line = await asyncio.wait_for(reader.readline(), 20)
                assert line
                if line.startswith(b"{"):
                    lines.append(json.loads(line))
            assert [line["row"] for line in lines[:-1]] == list(range(rows))
            assert [line["window_rows"] for line in lines[:8]] == [1, 2, 3, 4, 5, 6, 6, 6]

    asyncio.run(check())
