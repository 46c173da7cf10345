"""Ways to the server: HTTPS, a proxy from the environment, a path before the endpoints, many threads."""

import asyncio
import gc
import shutil
import socket
import ssl
import subprocess
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from elbo.client import AsyncClient, Client, ConnectionFailed, Retries
from elbo.client import connections as connections_module
from elbo.client.connections import AsyncSocketTransport, Origin, SocketTransport
from elbo.client.settings import proxy_of, ssl_context_of
from tests.conftest import require
from tests.elbo.client.scripted import respond, scripted
from tests.service.hosts import host_rows
from tests.service.process import ServerProcess, server_starter
from tests.service.running import post

pytestmark = pytest.mark.slow
ROWS = np.array(host_rows(40), np.float32)
MODELS = respond("200 OK", b'{"default": null, "models": [], "failures": []}')


@pytest.fixture(scope="module")
def https(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, ssl.SSLContext]]:
    """Yield a server with a certificate, and the context that trusts the certificate."""
    require(shutil.which("openssl"), "the test needs the program openssl")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "server.pem", folder / "server.key"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=server"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    with server_starter() as start:
        server = start(models, TLS_CERTIFICATE=certificate, TLS_KEY=key, DEFAULT_MODEL="hosts")
        yield server, ssl.create_default_context(cafile=str(certificate))


def test_calls_and_streams_work_over_https(https: tuple[ServerProcess, ssl.SSLContext]) -> None:
    server, context = https
    address, rows = f"https://127.0.0.1:{server.port}", host_rows(3000)

    async def scenario() -> tuple[Any, int]:
        async with AsyncClient(address, verify=context) as elbo:
            stream = elbo.anomaly_stream(rows, observe=False)
            return (await elbo.encode(ROWS)).latents, len([each async for each in stream])

    latents, count = asyncio.run(scenario())
    with Client(address, verify=context) as elbo:
        assert np.allclose(elbo.encode(ROWS).latents, latents, atol=1e-6)
        assert [each.row for each in elbo.anomaly_stream(rows, observe=False)] == list(range(3000))
    assert count == 3000


def test_response_of_several_tls_records_arrives_whole(https: tuple[ServerProcess, ssl.SSLContext]) -> None:
    """A record has at most 16 KiB, and asyncio reads the records that have arrived into one buffer."""
    server, context = https
    address, rows = f"https://127.0.0.1:{server.port}", host_rows(8000)

    async def scenario() -> list[Any]:
        async with AsyncClient(address, verify=context) as elbo:
            return [(await elbo.encode(rows)).latents for _ in range(10)]

    with Client(address, verify=context) as elbo:
        expected = elbo.encode(rows).latents
    assert expected.nbytes > 60_000
    for latents in asyncio.run(scenario()):
        np.testing.assert_allclose(latents, expected, atol=1e-6)


def test_server_whose_certificate_is_not_trusted_gets_no_request(https: tuple[ServerProcess, ssl.SSLContext]) -> None:
    server, _ = https
    with Client(f"https://127.0.0.1:{server.port}", key="secret", retries=Retries(attempts=1)) as elbo:
        with pytest.raises(ConnectionFailed, match="certificate verify failed") as raised:
            elbo.encode(ROWS)
        assert raised.value.sent is False


def test_scheme_in_capitals_is_https_and_verified_as_the_client_says() -> None:
    context = ssl.create_default_context()
    for scheme in ("https", "HTTPS"):
        assert ssl_context_of(f"{scheme}://127.0.0.1", context, None, True) is context
    assert ssl_context_of("http://127.0.0.1", context, None, True) is None


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_proxy_of_the_environment_gets_the_requests(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    async def scenario(**options: Any) -> None:
        async with AsyncClient("http://elbo.invalid:8000", **options) as elbo:
            await elbo.models()

    def call(**options: Any) -> None:
        with Client("http://elbo.invalid:8000", **options) as elbo:
            elbo.models()

    with scripted(MODELS) as proxy:
        monkeypatch.setenv("http_proxy", proxy.address)
        monkeypatch.delenv("no_proxy", raising=False)
        asyncio.run(scenario()) if kind == "async" else call()
        assert proxy.received[0].startswith(b"GET http://elbo.invalid:8000/models HTTP/1.1\r\n")
        with pytest.raises(ConnectionFailed):
            call(trust_env=False, retries=Retries(attempts=1))
        monkeypatch.setenv("no_proxy", "elbo.invalid")
        with pytest.raises(ConnectionFailed):
            call(retries=Retries(attempts=1))
        assert len(proxy.received) == 1


def test_proxy_without_a_scheme_is_an_http_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "proxy.invalid:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    assert proxy_of("https://elbo.invalid", True) == "http://proxy.invalid:3128"


def test_path_of_the_address_comes_before_the_endpoints() -> None:
    with scripted(MODELS) as server, Client(f"{server.address}/tools/elbo/", headers={"X-Team": "a"}) as elbo:
        elbo.models()
        head = server.received[0].lower()
        assert head.startswith(b"get /tools/elbo/models http/1.1\r\n")
        assert b"x-team: a\r\n" in head


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "ftp://elbo", "http://", ""])
def test_address_that_is_not_http_is_refused_at_once(address: str) -> None:
    with pytest.raises(ValueError, match="expected an address such as"):
        Client(address)


def test_threads_share_a_client_and_get_their_own_results(address: str, plain: httpx.Client) -> None:
    latents = np.array(post(plain, "/encode?model=hosts", {"inputs": ROWS.tolist()})["latents"])
    with Client(address, "hosts") as elbo, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: elbo.encode(ROWS[number % 40][None]).latents, range(200)))
    assert np.allclose(np.concatenate(found), latents[np.arange(200) % 40], atol=1e-5)


def test_async_client_has_no_more_connections_than_allowed() -> None:
    async def scenario(address: str) -> None:
        async with AsyncClient(address, max_connections=3) as elbo:
            await asyncio.gather(*(elbo.models() for _ in range(20)))

    with scripted(MODELS) as server:
        asyncio.run(scenario(server.address))
        assert len(server.received) == 20
        assert len(server._connections) <= 3


@pytest.mark.parametrize("is_async", [False, True])
def test_connection_on_which_bytes_arrived_unasked_is_not_used_again(is_async: bool) -> None:
    def answer_and_say_more(connection: socket.socket) -> bool:
        MODELS(connection)
        time.sleep(0.05)  # the client has read the response
        connection.sendall(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        return True

    async def scenario(address: str) -> list[bool]:
        async with AsyncClient(address, retries=Retries(attempts=1)) as elbo:
            first = await elbo.models()
            await asyncio.sleep(0.2)
            return [first == await elbo.models()]

    with scripted(answer_and_say_more) as server:
        if is_async:
            assert asyncio.run(scenario(server.address)) == [True]
        else:
            with Client(server.address, retries=Retries(attempts=1)) as elbo:
                first = elbo.models()
                time.sleep(0.2)
                assert elbo.models() == first
        assert len(server._connections) == 2


def test_connection_of_a_cancelled_call_is_closed_and_the_next_call_gets_its_own_response() -> None:
    def answer_late(connection: socket.socket) -> bool:
        time.sleep(0.3)
        return respond("200 OK", b'{"default": "late", "models": []}')(connection)

    async def scenario(address: str) -> str | None:
        async with AsyncClient(address) as elbo:
            call = asyncio.create_task(elbo.models())
            await asyncio.sleep(0.1)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            return (await elbo.models()).default

    with scripted(answer_late, respond("200 OK", b'{"default": "next", "models": []}')) as server:
        assert asyncio.run(scenario(server.address)) == "next"
        assert len(server._connections) == 2


def test_async_client_works_in_a_second_event_loop() -> None:
    async def scenario() -> None:
        await elbo.models()

    with scripted(MODELS) as server:
        elbo = AsyncClient(server.address, timeout=5, retries=Retries(attempts=1))
        asyncio.run(scenario())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # a loop that has ended cannot close its connections
            asyncio.run(scenario())
            asyncio.run(elbo.aclose())
            gc.collect()
        assert len(server._connections) == 2


def test_connections_of_a_burst_are_closed_when_they_have_been_idle_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    with scripted(MODELS) as server:
        host, port = server.address.removeprefix("http://").split(":")
        transport, origin = SocketTransport(), Origin(host, int(port), False)
        head = b"GET /models HTTP/1.1\r\nhost: test\r\n\r\n"
        first, second = transport.connect(origin, 5), transport.connect(origin, 5)
        transport._idle.keep(origin, first)
        transport._idle.keep(origin, second)
        monkeypatch.setattr(connections_module, "IDLE_SECONDS", 0.1)
        time.sleep(0.2)
        transport._idle.keep(origin, transport.connect(origin, 5))
        assert first.socket.fileno() == second.socket.fileno() == -1
        assert transport.exchange(origin, head, b"", 5).status == 200
        transport.close()
        assert len(server._connections) == 3


def test_time_of_a_request_includes_its_wait_for_a_connection() -> None:
    async def scenario(port: int) -> float:
        context = ssl.create_default_context()
        transport = AsyncSocketTransport(context, max_connections=1)
        await transport._take_slot(None)
        asyncio.get_running_loop().call_later(0.8, transport._slots.release)
        started = time.monotonic()
        with pytest.raises(httpx.ConnectTimeout):  # the server accepts no TLS handshake
            await transport.exchange(Origin("127.0.0.1", port, True), b"", b"", 1.0)
        return time.monotonic() - started

    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert asyncio.run(scenario(listener.getsockname()[1])) < 1.6
