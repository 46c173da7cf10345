"""Clients that send without end, that do not read their responses, or that send and read very slowly."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import require
from tests.service.process import ServerProcess, background_threads, server_starter
from tests.service.raw_http import read_response, read_to_end, request_head
from tests.service.scrape import scrape, total
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

TIMEOUT = 2.0  # seconds; ELBO_REQUEST_TIMEOUT of the server
MIB = 2**20
MAX_BODY = 64 * MIB
HELD = 4 * MAX_BODY
LARGE_SAMPLE = b'{"n": 10000, "seed": 1}'  # the response has 9 MB
CHUNKED = request_head("/encode", "Transfer-Encoding: chunked")
EARLY = request_head("/no/such/path", "Transfer-Encoding: chunked")
NDJSON = (
    b"POST /anomaly?model=hosts HTTP/1.1\r\nHost: elbo\r\nContent-Type: application/x-ndjson\r\n"
    b"Accept: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
)

# What a client sends first, and what it then repeats
ENDLESS = {
    "trailer of one line": (CHUNKED + b"1\r\n{\r\n0\r\nx: ", b"y" * 60_000),
    "trailer name": (CHUNKED + b"1\r\n{\r\n0\r\nx", b"y" * 60_000),
    "trailer of many lines": (CHUNKED + b"1\r\n{\r\n0\r\n", b"x: y\r\n" * 10_000),
    "trailer after the response": (EARLY + b"1\r\n{\r\n0\r\n", b"x: y\r\n" * 10_000),
    "trailer of a stream": (NDJSON + b"1\r\n \r\n0\r\nx: ", b"y" * 60_000),
    "chunk extension": (CHUNKED + b"1;", b"x" * 60_000),
    "chunk extensions": (CHUNKED, (b"1;" + b"x" * 1000 + b"\r\n \r\n") * 60),
    "chunk extensions of a stream": (NDJSON, (b"1;" + b"x" * 1000 + b"\r\n \r\n") * 60),
    "chunk extension after the response": (EARLY + b"1;", b"x" * 60_000),
    "chunks of one byte": (CHUNKED, b"1\r\n \r\n" * 10_000),
    "chunks of one byte after the response": (EARLY, b"1\r\n \r\n" * 10_000),
    "chunk size of many zeros": (CHUNKED, b"0" * 60_000),
    "empty lines": (b"", b"\r\n" * 30_000),
    "head of one line": (b"GET /livez HTTP/1.1\r\nHost: elbo\r\nx: ", b"y" * 60_000),
    "head of many lines": (b"GET /livez HTTP/1.1\r\nHost: elbo\r\n", b"x:y\r\n" * 10_000),
    "target": (b"GET /", b"x" * 60_000),
}


@pytest.fixture(scope="module")
def server(artifacts: Path) -> Iterator[ServerProcess]:
    with server_starter() as start_server:
        process = start_server(
            artifacts, MAX_BODY_BYTES=MAX_BODY, HELD_BYTES=HELD, REQUEST_TIMEOUT=TIMEOUT, DEFAULT_MODEL="pca"
        )
        yield process
        assert process.stop() == 0
        assert process.stderr() == ""


def memory(server: ServerProcess) -> int:
    """Return the memory of the server in bytes."""
    status = Path(f"/proc/{server.popen.pid}/status")
    require(status.is_file(), "the test reads /proc")
    return 1024 * int(status.read_text().partition("VmRSS:")[2].split()[0])


def connect_with_small_buffer(server: ServerProcess) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", server.port))
    return connection


def close_all(connections: list[socket.socket]) -> None:
    for connection in connections:
        connection.close()


def sample(body: bytes) -> bytes:
    return request_head("/sample", f"Content-Length: {len(body)}") + body


@pytest.mark.alone
@pytest.mark.parametrize(("start", "piece"), ENDLESS.values(), ids=[name.replace(" ", "-") for name in ENDLESS])
def test_connection_is_closed_if_the_client_sends_too_many_bytes_that_belong_to_no_body(
    server: ServerProcess, start: bytes, piece: bytes
) -> None:
    before = memory(server)
    with server.connect() as connection, server.client() as client:
        connection.sendall(start)
        with pytest.raises(ConnectionError):
            connection.sendall(piece * (64 * MIB // len(piece)))
        assert client.get("/livez").status_code == 200
    assert memory(server) - before < 16 * MIB


def test_request_with_too_many_headers_gets_400(server: ServerProcess) -> None:
    for count, status in ((200, b"200"), (300, b"400")):
        with server.connect() as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: elbo\r\n" + b"x: y\r\n" * count + b"\r\n")
            assert read_response(connection)[9:12] == status


@pytest.mark.alone
@pytest.mark.parametrize("repeats", [1, 4], ids=["one-request", "pipelined"])
def test_server_answers_small_requests_in_bounded_memory_while_many_clients_do_not_read_large_responses(
    server: ServerProcess, repeats: int
) -> None:
    with server.client() as client:
        client.post("/sample", content=LARGE_SAMPLE, headers={"content-type": "application/json"})
        before, peak = memory(server), 0
        connections = [connect_with_small_buffer(server) for _ in range(60)]
        for connection in connections:
            connection.sendall(sample(LARGE_SAMPLE) * repeats)
            wait_until(lambda: client.post("/sample", json={"n": 1}).status_code == 200)
            unread = total(scrape(client), "elbo_unread_bytes")
            assert unread <= HELD / 4
            peak = max(peak, memory(server))
            time.sleep(0.05)
        assert peak - before < 3 * MAX_BODY
        wait_until(lambda: total(scrape(client), "elbo_unread_bytes") == 0, seconds=10 * TIMEOUT)
        assert 'elbo_connections_closed_total{reason="unread_response"}' in client.get("/metrics").text
    close_all(connections)


@pytest.mark.alone
def test_large_response_waits_until_the_client_that_fills_the_memory_counts_as_slow(pca_only: Path) -> None:
    """One such response fits, but not two. A client counts as slow when it has read nothing for one second."""
    with server_starter() as start_server:
        server = start_server(pca_only, MAX_BODY_BYTES=MIB, HELD_BYTES=MIB)
        with connect_with_small_buffer(server) as first, server.client() as client:
            first.sendall(sample(LARGE_SAMPLE))
            assert first.recv(1) == b"H"
            assert client.post("/sample", json={"n": 1}).status_code == 200
            accepted = client.post("/sample", content=LARGE_SAMPLE, headers={"content-type": "application/json"})
            assert accepted.status_code == 200  # `first` has read nothing for more than a second, and is dropped
            with suppress(ConnectionError):
                assert len(read_to_end(first)) < len(accepted.content)


@pytest.mark.alone
def test_client_that_reads_one_byte_at_a_time_is_dropped_after_the_request_timeout(server: ServerProcess) -> None:
    with connect_with_small_buffer(server) as connection:
        connection.sendall(sample(LARGE_SAMPLE))
        assert connection.recv(1) == b"H"
        started = time.monotonic()
        with server.client() as client:
            while total(scrape(client), "elbo_unread_bytes") and time.monotonic() - started < 10 * TIMEOUT:
                connection.recv(1)
                time.sleep(0.05)
    assert TIMEOUT / 2 < time.monotonic() - started < 5 * TIMEOUT


@pytest.mark.alone
def test_next_request_starts_when_the_client_has_read_the_last_large_response(server: ServerProcess) -> None:
    def requests() -> float:
        with server.client() as client:
            text = client.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith('elbo_requests_total{endpoint="/sample"')]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = requests()
    with connect_with_small_buffer(server) as connection:
        connection.sendall(sample(LARGE_SAMPLE) * 2)
        time.sleep(0.1)
        connection.sendall(sample(LARGE_SAMPLE))
        wait_until(lambda: requests() == before + 1)
        time.sleep(0.3)
        assert requests() == before + 1
        bodies = []
        stream = connection.makefile("rb")
        for _ in range(3):
            length = 0
            while (line := stream.readline()) != b"\r\n":
                length = int(line[15:]) if line.lower().startswith(b"content-length:") else length
            bodies.append(stream.read(length))
    assert len({len(body) for body in bodies}) == 1
    assert len(json.loads(bodies[2])["outputs"]) == 10_000
    assert requests() == before + 3


@pytest.mark.alone
def test_pipelined_requests_are_all_answered_in_order_and_in_bounded_memory(server: ServerProcess) -> None:
    count = 20_000
    before, peak = memory(server), 0
    with server.connect() as connection:
        lines = b"".join([b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Request-Id: %d\r\n\r\n" % n for n in range(count)])
        sender = threading.Thread(target=connection.sendall, args=(lines,))
        sender.start()
        stream = connection.makefile("rb")
        ids: list[int] = []
        while len(ids) < count:
            line = stream.readline()
            assert line
            if line.lower().startswith(b"x-request-id: "):
                ids.append(int(line[14:]))
                if len(ids) % 1000 == 0:
                    peak = max(peak, memory(server))
        sender.join()
    assert ids == list(range(count))
    assert peak - before < 16 * MIB


@pytest.mark.alone
def test_pipelined_requests_of_clients_that_do_not_read_take_bounded_memory(server: ServerProcess) -> None:
    before = memory(server)
    requests = b"GET /models HTTP/1.1\r\nHost: elbo\r\n\r\n" * 5000
    connections = [connect_with_small_buffer(server) for _ in range(100)]
    for connection in connections:
        connection.setblocking(False)
        with suppress(BlockingIOError, ConnectionError):
            connection.send(requests)
    time.sleep(0.5)
    assert memory(server) - before < HELD / 4 + 48 * MIB  # unread responses, and the bytes of unparsed requests
    with server.client() as client:
        assert client.post("/sample", json={"n": 1}).status_code == 200
        wait_until(lambda: total(scrape(client), "elbo_unread_bytes") == 0, seconds=20 * TIMEOUT)
    close_all(connections)


@pytest.mark.parametrize(
    "head",
    [
        request_head("/no/such/path", "Content-Length: 100000"),
        request_head("/encode?model=missing", "Content-Length: 100000"),
        request_head("/livez", "Content-Length: 100000"),
        request_head("/encode", f"Content-Length: {2 * MAX_BODY}"),
        request_head("/no/such/path", "Transfer-Encoding: chunked") + b"fffff\r\n",
        b"GET /livez HTTP/1.1\r\nHost: elbo\r\nContent-Length: 100000\r\n\r\n",
    ],
    ids=["404", "missing-model", "405", "413", "chunked", "GET"],
)
def test_connection_is_closed_after_the_timeout_if_an_answered_request_still_arrives_byte_by_byte(
    server: ServerProcess, head: bytes
) -> None:
    with server.connect() as connection:
        started = time.monotonic()
        connection.sendall(head)
        with suppress(ConnectionError):
            while time.monotonic() - started < 10 * TIMEOUT:
                connection.sendall(b"x")
                time.sleep(0.05)
    assert time.monotonic() - started < 4 * TIMEOUT


@pytest.mark.alone
def test_stream_stops_computing_while_its_client_does_not_read(server: ServerProcess) -> None:
    row = b'{"cpu [%]": 1, "memory/used [MB]": 2, "disk~io": 3, "load": 4}\n'
    chunk = b"%x\r\n%b\r\n" % (1000 * len(row), row * 1000)
    before = memory(server)
    with connect_with_small_buffer(server) as connection:

        def send(stop: threading.Event) -> None:
            with suppress(OSError):
                connection.sendall(NDJSON)
                while not stop.is_set():
                    connection.sendall(chunk)

        with background_threads(send), server.client() as client:
            wait_until(lambda: total(scrape(client), "elbo_unread_bytes") > 0)
            time.sleep(TIMEOUT / 2)
            assert memory(server) - before < 32 * MIB
            wait_until(lambda: total(scrape(client), "elbo_unread_bytes") == 0, seconds=5 * TIMEOUT)
