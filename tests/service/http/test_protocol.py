"""One HTTP connection over a socket: upgrades, HTTP/1.0, clients that make no progress, and early responses."""

import asyncio
import http.client
import json
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from service.http import protocol
from service.settings import Settings
from tests.conftest import require
from tests.service.process import ServerProcess, server_starter
from tests.service.raw_http import read_to_end
from tests.service.serving import serving
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

TIMEOUT = 1.0  # seconds; ELBO_REQUEST_TIMEOUT of the server
MAX_BODY = 2**20
JSON_TYPE = "Content-Type: application/json"
NDJSON = ["Content-Type: application/x-ndjson", "Accept: application/x-ndjson"]
SAMPLE = b'{"n": 1, "seed": 7}'
# The offers of Java's HttpClient and of curl --http2, of a browser, and of a client that sends its options in two lines
JAVA = ["Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA"]
OFFERS = [
    [*JAVA, "Upgrade: h2c", "User-Agent: Java-http-client/17.0.15"],
    ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAA"],
    ["Upgrade: TLS/1.2, h2c", "Connection: keep-alive", "connection: upgrade"],
]


@pytest.fixture(scope="module")
def server(artifacts: Path) -> Iterator[ServerProcess]:
    """Yield a server for the tests that do not change its state."""
    with server_starter() as start_server:
        process = start_server(artifacts, MAX_BODY_BYTES=MAX_BODY, REQUEST_TIMEOUT=TIMEOUT, DEFAULT_MODEL="pca")
        yield process
        assert process.stop() == 0
        assert process.stderr() == ""


def post(path: str, body: bytes, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: elbo", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def read_responses(connection: socket.socket, count: int) -> list[tuple[int, bytes]]:
    """Return the status and the body of `count` responses with a Content-Length, and assert that nothing follows."""
    stream = connection.makefile("rb")
    responses = []
    for _ in range(count):
        status = int(stream.readline().split()[1])
        headers = http.client.parse_headers(stream)
        responses.append((status, stream.read(int(headers["content-length"]))))
    connection.settimeout(0.2)
    with pytest.raises(TimeoutError):
        connection.recv(1)
    return responses


# Upgrades


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("piece", [1_000_000, 50])
def test_body_of_a_request_that_offers_an_upgrade_is_read(server: ServerProcess, offer: list[str], piece: int) -> None:
    request = post("/sample", SAMPLE, JSON_TYPE, *offer)
    with server.client() as client, server.connect() as connection:
        expected = client.post("/sample", json={"n": 1, "seed": 7}).json()
        for start in range(0, len(request), piece):
            connection.sendall(request[start : start + piece])
            time.sleep(0.02)
        ((status, content),) = read_responses(connection, 1)
    assert (status, json.loads(content)) == (200, expected)


def test_requests_that_offer_an_upgrade_are_answered_in_order_if_they_are_pipelined(server: ServerProcess) -> None:
    bodies = [b'{"n": 1, "seed": %d}' % seed for seed in range(20)]
    offers = [OFFERS[0] if seed % 3 else [] for seed in range(20)]
    with server.connect() as connection:
        pairs = zip(bodies, offers, strict=True)
        connection.sendall(b"".join([post("/sample", body, JSON_TYPE, *offer) for body, offer in pairs]))
        responses = read_responses(connection, 20)
    assert [json.loads(content)["seed"] for _, content in responses] == list(range(20))


def test_chunked_body_of_a_request_that_offers_an_upgrade_is_read(server: ServerProcess) -> None:
    head = ["POST /sample HTTP/1.1", "Host: elbo", JSON_TYPE, "Transfer-Encoding: chunked", *OFFERS[0], "", ""]
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SAMPLE), SAMPLE)
    with server.connect() as connection:
        connection.sendall("\r\n".join(head).encode() + chunks)
        ((status, content),) = read_responses(connection, 1)
    assert (status, json.loads(content)["seed"]) == (200, 7)


def test_every_row_of_a_stream_is_scored_if_the_request_offers_an_upgrade(server: ServerProcess) -> None:
    rows = b"[1, 2, 3, 4]\n" * 3
    with server.connect() as connection:
        connection.sendall(post("/anomaly?model=hosts", rows, *NDJSON, *OFFERS[0][:-1], "Connection: close"))
        response = read_to_end(connection)
    assert b'"rows":3' in response


def test_curl_gets_the_seed_that_it_asked_for_if_it_offers_http_2(server: ServerProcess) -> None:
    version = subprocess.run(["curl", "--version"], capture_output=True, text=True).stdout
    require("HTTP2" in version, "the test needs a curl with HTTP/2")
    url = f"http://127.0.0.1:{server.port}/sample"
    command = ["curl", "--silent", "--http2", "--header", JSON_TYPE, "--data", SAMPLE.decode(), url]
    result = subprocess.run(command, capture_output=True, check=True)
    assert json.loads(result.stdout)["seed"] == 7


def test_connect_request_gets_400_and_nothing_after_it_is_a_request(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(b"CONNECT elbo:80 HTTP/1.1\r\nHost: elbo:80\r\n\r\n" + post("/sample", SAMPLE, JSON_TYPE))
        response = read_to_end(connection)
    assert response.startswith(b"HTTP/1.1 400")
    assert response.count(b"HTTP/1.1") == 1


# HTTP/1.0


def test_stream_to_an_http_1_0_client_has_no_chunks_and_ends_with_the_connection(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(post("/anomaly?model=hosts", b"[1, 2, 3, 4]\n" * 3, *NDJSON, version="1.0"))
        head, _, content = read_to_end(connection).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    lines = [json.loads(line) for line in content.splitlines()]
    assert [line["row"] for line in lines[:-1]] == [0, 1, 2]
    assert lines[-1]["rows"] == 3


def test_http_1_0_client_gets_no_100_continue(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(post("/sample", SAMPLE, JSON_TYPE, "Expect: 100-continue", version="1.0"))
        response = read_to_end(connection)
    assert response.startswith(b"HTTP/1.1 200")
    assert json.loads(response.partition(b"\r\n\r\n")[2])["seed"] == 7


# Clients that make no progress


WAITS = {
    "for a body": [post("/sample", SAMPLE, JSON_TYPE)[: -len(SAMPLE)]],
    "for the rest of a body": [post("/sample", SAMPLE, JSON_TYPE)[:-1]],
    "for the body after 100 Continue": [post("/sample", SAMPLE, "Expect: 100-continue")[: -len(SAMPLE)]],
    "for the first chunk": [b"POST /encode HTTP/1.1\r\nHost: elbo\r\nTransfer-Encoding: chunked\r\n\r\n"],
    "for the end of the trailer": [
        b"POST /encode HTTP/1.1\r\nHost: elbo\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nx: y\r\n"
    ],
    "for the first row of a stream": [post("/anomaly?model=hosts", b"[1]", *NDJSON)[:-3]],
    "for remote write": [
        post("/api/v1/write", b"0", "Content-Type: application/x-protobuf", "Content-Encoding: snappy")[:-1]
    ],
    "for a body that nobody reads": [post("/no/such/path", SAMPLE)[: -len(SAMPLE)]],
    "for the rest of a body that nobody reads": [post("/no/such/path", SAMPLE)[: -len(SAMPLE)], SAMPLE[:3]],
    "for the body of a GET request": [b"GET /livez HTTP/1.1\r\nHost: elbo\r\nContent-Length: 9\r\n\r\n", b"1"],
    "for a head": [],
    "for the rest of a head": [b"GET /livez HTTP/1.1\r\nHo"],
    "for a head after an empty line": [b"GET /livez HTTP/1.1\r\nHost: elbo\r\n\r\n", b"\r\n"],
    "for the rest of the second head": [b"GET /livez HTTP/1.1\r\nHost: elbo\r\n\r\n", b"GET /li"],
}


@pytest.mark.parametrize("pieces", WAITS.values(), ids=[name.replace(" ", "-") for name in WAITS])
def test_connection_is_closed_after_the_request_timeout_if_the_client_sends_nothing_more(
    server: ServerProcess, pieces: list[bytes]
) -> None:
    with server.connect() as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.1)
        started = time.monotonic()
        response = read_to_end(connection)
        assert TIMEOUT / 2 < time.monotonic() - started < 4 * TIMEOUT  # a stream that has begun to respond waits twice
    if pieces and pieces[0].startswith((b"POST /sample", b"POST /encode", b"POST /api")):
        assert b"HTTP/1.1 408" in response
        assert b"body_too_slow" in response
    wait_until(lambda: server.metric_total("elbo_pending_bytes") == 0)


def test_connection_is_closed_after_the_request_timeout_if_the_client_does_not_read(server: ServerProcess) -> None:
    connection = unread_response(server)
    before = open_sockets(server)
    wait_until(lambda: open_sockets(server) < before, seconds=5 * TIMEOUT)
    assert open_sockets(server) == before - 1
    with connection:
        head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
    stated = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length: "))
    assert len(body) < int(stated.partition(b": ")[2])  # the server gave up before the end of the response


def test_server_stops_after_the_request_timeout_if_a_client_does_not_read(artifacts: Path) -> None:
    with server_starter() as start_server:
        process = start_server(artifacts, REQUEST_TIMEOUT=TIMEOUT, DEFAULT_MODEL="pca")
        connection = unread_response(process)
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(10 * TIMEOUT) == 0
        connection.close()


def unread_response(server: ServerProcess) -> socket.socket:
    """Ask for a response that is larger than all buffers, read only its first byte, and return the connection."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(post("/sample", b'{"n": 10000, "seed": 1}', JSON_TYPE))
    assert connection.recv(1) == b"H"
    return connection


def open_sockets(server: ServerProcess) -> int:
    descriptors = Path(f"/proc/{server.popen.pid}/fd")
    require(descriptors.is_dir(), "the test reads /proc")
    count = 0
    for entry in descriptors.iterdir():
        with suppress(OSError):
            count += str(entry.readlink()).startswith("socket:")
    return count


def test_stream_ends_if_a_line_arrives_byte_by_byte_for_too_long(server: ServerProcess) -> None:
    head = ["POST /anomaly HTTP/1.1", "Host: elbo", *NDJSON, "Content-Length: 100000", "", ""]
    started = time.monotonic()
    with server.connect() as connection:
        connection.sendall("\r\n".join(head).encode())
        connection.settimeout(0.1)
        received = b""
        while b"body_too_slow" not in received and time.monotonic() - started < 10:
            connection.sendall(b" ")
            with suppress(TimeoutError):
                received += connection.recv(65536)
    assert b"a line had not arrived after 1 s" in received
    assert time.monotonic() - started >= TIMEOUT


# Clients that end their side of the connection, or send bytes that are not HTTP, before they have their responses


@pytest.mark.parametrize("count", [1, 3])
def test_client_that_sends_nothing_more_after_its_requests_gets_every_response(
    server: ServerProcess, count: int
) -> None:
    with server.connect() as connection:
        connection.sendall(post("/sample", SAMPLE, JSON_TYPE) * count)
        connection.shutdown(socket.SHUT_WR)
        received = read_to_end(connection)
    assert received.count(b"HTTP/1.1 200") == received.count(b'"seed":7') == count
    assert received.count(b"connection: close") <= 1  # 0 if the response began before the client ended its side


def test_client_that_sends_nothing_more_after_its_rows_gets_the_whole_stream(server: ServerProcess) -> None:
    rows = b"[%b]\n" % b",".join([b"0.1"] * 64) * 3000
    with server.connect() as connection:
        connection.sendall(post("/anomaly", rows, *NDJSON))
        connection.shutdown(socket.SHUT_WR)
        received = read_to_end(connection)
    assert b'"rows":3000' in received
    assert received.endswith(b"0\r\n\r\n")


def test_request_whose_body_is_cut_off_by_the_end_of_the_connection_gets_no_response(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(post("/sample", SAMPLE, JSON_TYPE)[:-1])
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection) == b""


@pytest.mark.parametrize("rest", [b"GARBAGE\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"X" * 100_000])
def test_requests_before_bytes_that_are_not_http_get_their_responses(server: ServerProcess, rest: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(post("/sample", SAMPLE, JSON_TYPE) * 2 + rest)
        received = read_to_end(connection)
    assert received.count(b"HTTP/1.1 ") == received.count(b'"seed":7') == 2


def test_stream_is_not_continued_by_another_response_if_a_chunk_of_the_request_is_malformed(
    server: ServerProcess,
) -> None:
    row = b"[%b]\n" % b",".join([b"0.1"] * 64)
    head = ["POST /anomaly HTTP/1.1", "Host: elbo", *NDJSON, "Transfer-Encoding: chunked", "", ""]
    with server.connect() as connection:
        connection.sendall("\r\n".join(head).encode() + b"%x\r\n%b\r\n" % (len(row), row))
        received = connection.recv(65536)
        connection.sendall(b"not a size\r\n")
        received += read_to_end(connection)
    assert received.count(b'"row":0') == 1
    assert received.count(b"HTTP/1.1 ") == 1


# Responses that are ready before the request has arrived


@pytest.mark.parametrize("megabytes", [2, 64, 100])
@pytest.mark.parametrize("path", ["/encode", "/anomaly", "/no/such/path"])
def test_http_client_gets_the_response_if_the_body_is_too_large(
    server: ServerProcess, path: str, megabytes: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", path, bytes(megabytes * 2**20))
    response = connection.getresponse()
    assert response.status == (404 if path == "/no/such/path" else 413)
    assert json.loads(response.read())["code"] in ("body_too_large", "not_found")
    connection.request("GET", "/livez")
    assert connection.getresponse().status == 200
    connection.close()


def test_urllib_gets_the_response_if_the_body_is_too_large(server: ServerProcess) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/encode", bytes(64 * 2**20))
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    assert caught.value.code == 413
    assert json.loads(caught.value.read())["code"] == "body_too_large"
    caught.value.close()


def test_http_client_gets_the_response_if_a_chunked_body_is_too_large(server: ServerProcess) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", "/encode", iter([bytes(2**20)] * 64), encode_chunked=True)
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["code"]) == (413, "body_too_large")
    connection.close()


def test_client_gets_400_if_it_sends_on_after_bytes_that_are_not_http(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(b"\x16\x03\x01" + bytes(8 * 2**20))
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection).startswith(b"HTTP/1.1 400")


def test_client_gets_400_if_its_head_is_too_large(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: elbo\r\n" + b"X-Name: value\r\n" * 30_000)
        assert read_to_end(connection).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(("limit", "value"), [("MAX_DISCARDED_BYTES", 2**20), ("MAX_DISCARDING_SECONDS", 0.3)])
@pytest.mark.parametrize("path", ["/encode", "/no/such/path"])
def test_client_is_disconnected_if_it_never_stops_sending(
    vae_only: Path, monkeypatch: pytest.MonkeyPatch, path: str, limit: str, value: float
) -> None:
    monkeypatch.setattr(protocol, limit, value)

    async def scenario() -> None:
        async with serving(Settings(artifacts=vae_only)) as (_, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"POST {path} HTTP/1.1\r\nHost: elbo\r\nContent-Length: 99999999999\r\n\r\n".encode())
            assert (await reader.readline()).split()[1] in (b"404", b"413")
            with pytest.raises(ConnectionError):
                await send_without_end(writer)

    async def send_without_end(writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(20):
            while True:
                writer.write(bytes(10_000))
                await writer.drain()
                await asyncio.sleep(0.001)

    asyncio.run(scenario())
