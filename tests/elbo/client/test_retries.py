"""Which failures are repeated: safe requests after refusals and broken connections, unsafe requests never once sent.

A scripted server counts the requests that reach it. The last tests use a real server.
"""

import asyncio
import contextlib
import io
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, NoReturn

import httpx
import numpy as np
import pytest

from elbo.client import (
    AsyncClient,
    BadRequest,
    Client,
    ConnectionFailed,
    ConnectTimedOut,
    ElboHTTPError,
    InvalidReply,
    NotAuthorised,
    NotReady,
    Retries,
    ServerError,
    ServerTimedOut,
    TimedOut,
    TooManyRequests,
)
from elbo.client.retries import Attempts, parse_retry_after
from service.app import create_app
from service.settings import Settings
from tests.elbo.client.scripted import (
    Answer,
    ScriptedServer,
    hang_up,
    respond,
    respond_raw,
    scripted,
    wait,
)
from tests.plain_http import NO_AUTHORITIES
from tests.ports import free_port
from tests.service.access.keys import one_key_per_scope
from tests.service.gate import Gate
from tests.service.process import ServerProcess, server_starter
from tests.service.running import running
from tests.service.serving import ROWS, serving

FAST = Retries(first_seconds=0.01)
MODELS = respond("200 OK", b'{"default": null, "models": [], "failures": []}')
COUNTS = respond("200 OK", b'{"model": "a", "version": 1, "rows": 1, "anomalies": 0, "failed": 0, "unknown_fields": 0}')
BUSY = respond("429 Too Many Requests", b'{"code": "overloaded", "detail": "busy"}', "Retry-After: 1")
BAD_GATEWAY = respond("502 Bad Gateway", b"<html>nginx</html>")
NOT_READY = respond("503 Service Unavailable", b'{"code": "not_ready", "detail": "no model"}')
CUT_OFF = respond_raw(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + b'{"models": [')
CUT_CHUNK = respond_raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n" + b'{"models": [')
Caller = Callable[..., Any]


@pytest.fixture(params=["sync", "async", "sync over httpx"])
def call(request: pytest.FixtureRequest) -> Caller:
    """Return a function that calls one method of a client of an address."""

    def run(address: str, method: str, /, *arguments: Any, client: dict[str, Any] | None = None, **options: Any) -> Any:
        settings = {"retries": FAST, "timeout": 20.0, **(client or {})}
        if request.param == "async":

            async def call_async() -> Any:
                async with AsyncClient(address, **settings) as elbo:
                    return await getattr(elbo, method)(*arguments, **options)

            return asyncio.run(call_async())
        transport = httpx.HTTPTransport() if request.param == "sync over httpx" else None
        with Client(address, transport=transport, **settings) as elbo:
            return getattr(elbo, method)(*arguments, **options)

    return run


def test_requests_of_one_call_share_one_deadline(call: Caller) -> None:
    content = io.BytesIO()
    np.save(content, np.zeros((1, 3), np.float32))
    answer = respond("200 OK", content.getvalue(), "Elbo-Model: a@1", "Content-Type: application/x-npy")

    def late(connection: socket.socket) -> bool:
        time.sleep(0.7)
        return answer(connection)

    options = {"timeout": 1.0, "chunk_rows": 1, "retries": Retries(attempts=1)}
    with scripted(answer) as server:
        assert call(server.address, "decode", np.zeros((3, 2)), client=options).outputs.shape == (3, 3)
    with scripted(late) as server, pytest.raises(TimedOut):  # though each request alone takes less than 1 s
        call(server.address, "decode", np.zeros((3, 2)), client=options)


def test_time_out_says_whether_the_request_may_have_arrived() -> None:
    cases: list[tuple[type[httpx.TransportError], type[TimedOut], bool]] = [
        (httpx.ConnectTimeout, ConnectTimedOut, False), (httpx.PoolTimeout, TimedOut, False),
        (httpx.ReadTimeout, TimedOut, True), (httpx.WriteTimeout, TimedOut, True),
    ]  # fmt: skip
    for failure, kind, sent in cases:
        attempts = Attempts(Retries(attempts=1), True, 5.0, "http://example.org")
        with pytest.raises(TimedOut) as caught:
            attempts.wait_after_failure(failure("slow"))
        assert type(caught.value) is kind
        assert caught.value.sent is sent
    assert issubclass(ConnectTimedOut, ConnectionFailed)


def test_request_after_the_deadline_of_its_call_is_not_sent() -> None:
    attempts = Attempts(Retries(), True, 5.0, "http://example.org", time.monotonic() - 0.1)
    with pytest.raises(TimedOut, match="took longer than 5 s, before all of its requests were sent") as caught:
        attempts.seconds_for_request()
    assert caught.value.sent is False


def test_retry_after_is_read_as_seconds_and_as_a_date() -> None:
    assert parse_retry_after("7") == 7.0
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert parse_retry_after(date) == pytest.approx(60, abs=2)
    assert parse_retry_after("Thu, 01 Jan 2015 00:00:00 GMT") == 0.0
    assert [parse_retry_after(text) for text in (None, "", "soon", "-1")] == [None] * 4


def test_waits_double_up_to_the_longest_and_never_end_before_the_server_asks() -> None:
    retries = Retries(first_seconds=0.1, most_seconds=1.0)
    for attempt, longest in [(1, 0.1), (2, 0.2), (3, 0.4), (4, 0.8), (5, 1.0), (9, 1.0)]:
        waits = [retries.wait(attempt, None) for _ in range(200)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
        assert len(set(waits)) > 100
    assert all(retries.wait(1, 3.0) >= 3.0 for _ in range(20))


@pytest.mark.parametrize("failure", [hang_up, CUT_OFF, CUT_CHUNK, NOT_READY, BAD_GATEWAY])
def test_safe_request_is_repeated_after_a_failure_that_may_pass(call: Caller, failure: Answer) -> None:
    with scripted(failure, failure, MODELS) as server:
        assert call(server.address, "models").models == ()
        assert len(server.received) == 3


def test_safe_request_is_repeated_after_the_time_that_the_server_asks_for(call: Caller) -> None:
    with scripted(BUSY, MODELS) as server:
        started = time.monotonic()
        call(server.address, "models")
        assert 1.0 <= time.monotonic() - started < 3.0
        assert len(server.received) == 2


def test_request_is_not_repeated_if_the_server_asks_for_more_time_than_is_left(call: Caller) -> None:
    busy = respond("429 Too Many Requests", b'{"code": "overloaded", "detail": "busy"}', "Retry-After: 60")
    with scripted(busy) as server:
        started = time.monotonic()
        with pytest.raises(TooManyRequests, match="busy") as raised:
            call(server.address, "models")
        assert time.monotonic() - started < 5
        assert (raised.value.retry_after, raised.value.status, raised.value.code) == (60, 429, "overloaded")
        assert len(server.received) == 1


@pytest.mark.parametrize("failure", [hang_up, CUT_OFF, CUT_CHUNK, NOT_READY, BAD_GATEWAY, BUSY])
@pytest.mark.parametrize("method", ["anomaly", "score", "feedback"])
def test_request_that_may_have_an_effect_reaches_the_server_once(call: Caller, failure: Answer, method: str) -> None:
    arguments = ["normal", [{"cpu": 1.0}]] if method == "feedback" else [[[1.0]]]
    with scripted(failure, COUNTS) as server:
        with pytest.raises((ConnectionFailed, ElboHTTPError)):
            call(server.address, method, *arguments)
        assert len(server.received) == 1


@pytest.mark.parametrize("failure", [hang_up, CUT_OFF, BUSY])
def test_rows_that_are_not_live_traffic_are_sent_again(call: Caller, failure: Answer) -> None:
    with scripted(failure, COUNTS) as server:
        assert call(server.address, "anomaly", [[1.0]], observe=False).rows == 1
        assert len(server.received) == 2


def test_request_with_an_effect_is_repeated_while_nothing_was_sent(call: Caller) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ConnectionFailed, match=r"attempt 4.*is the server running") as raised:
        call(address, "anomaly", [[1.0]])
    assert raised.value.sent is False


def test_message_says_that_a_request_with_an_effect_was_not_sent_again(call: Caller) -> None:
    with scripted(hang_up) as server, pytest.raises(ConnectionFailed, match="so it was not sent again") as raised:
        call(server.address, "anomaly", [[1.0]])
    assert raised.value.sent is True


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "409 Conflict", "422 Unprocessable", "500 No"])
def test_refusal_that_will_not_pass_is_not_repeated(call: Caller, status: str) -> None:
    with scripted(respond(status, b'{"code": "x", "detail": "no"}')) as server:
        with pytest.raises(ElboHTTPError) as raised:
            call(server.address, "models")
        assert raised.value.status == int(status[:3])
        assert len(server.received) == 1


def test_attempts_end_with_the_last_refusal(call: Caller) -> None:
    with scripted(NOT_READY) as server:
        with pytest.raises(NotReady, match="no model"):
            call(server.address, "models")
        assert len(server.received) == FAST.attempts


def test_response_of_a_proxy_is_an_error_with_the_code_unknown(call: Caller) -> None:
    with scripted(respond("504 Gateway Timeout", b"<html>nginx</html>")) as server:
        with pytest.raises(ServerTimedOut, match="not Elbo") as raised:
            call(server.address, "models")
        assert (raised.value.code, isinstance(raised.value, TimedOut)) == ("unknown", True)
    with scripted(respond("500 Oops", b"")) as server, pytest.raises(ServerError):
        call(server.address, "models")


def test_redirect_is_an_error_that_names_the_new_address(call: Caller) -> None:
    redirect = respond("301 Moved Permanently", b"", "Location: https://elbo.example.com/models")
    with (
        scripted(redirect) as server,
        pytest.raises(BadRequest, match=r"redirect to https://elbo\.example\.com/models"),
    ):
        call(server.address, "models")


@pytest.mark.parametrize("body", [b"<html>log in</html>", b"[]", b'{"models": 1}'])
def test_success_that_is_not_elbos_is_an_invalid_reply(call: Caller, body: bytes) -> None:
    with scripted(respond("200 OK", body)) as server, pytest.raises(InvalidReply):
        call(server.address, "models")


def test_slow_server_times_out_after_the_timeout_and_learns_it(call: Caller) -> None:
    with scripted(wait(20)) as server:
        started = time.monotonic()
        with pytest.raises(TimedOut, match=r"within 0\.5 s"):
            call(server.address, "models", timeout=0.5)
        assert time.monotonic() - started < 5
        assert len(server.received) == 1
        head = server.received[0].lower()
        assert 0.3 < float(head.partition(b"x-request-timeout: ")[2].partition(b"\r\n")[0]) <= 0.5


@pytest.mark.parametrize("call", ["sync", "async"], indirect=True)  # httpx's transport limits each read instead
def test_server_that_sends_a_byte_now_and_then_times_out(call: Caller) -> None:
    def trickle(connection: Any) -> bool:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(100):
            connection.sendall(b" ")
            time.sleep(0.05)
        return False

    with scripted(trickle) as server:
        started = time.monotonic()
        with pytest.raises(TimedOut):
            call(server.address, "models", timeout=0.5)
        assert time.monotonic() - started < 4


@pytest.mark.parametrize("call", ["sync", "async"], indirect=True)
def test_server_that_reads_slowly_times_out_once_for_sending_and_receiving(call: Caller) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def read_late() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                time.sleep(1.0)  # the client cannot send all of its request before
                while connection.recv(2**20):
                    pass

        thread = threading.Thread(target=read_late)
        thread.start()
        address, started = f"http://127.0.0.1:{listener.getsockname()[1]}", time.monotonic()
        with pytest.raises(TimedOut):
            call(address, "encode", np.zeros((2000, 5000), np.float32), timeout=1.5)
        assert time.monotonic() - started < 2.3
        thread.join()


def test_message_about_a_server_that_accepts_no_connection_does_not_advise_a_longer_timeout(
    call: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_connection(*_arguments: Any, **_options: Any) -> NoReturn:
        raise TimeoutError

    async def create_async_connection(*_arguments: Any, **_options: Any) -> NoReturn:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", create_connection)
    monkeypatch.setattr(asyncio.BaseEventLoop, "create_connection", create_async_connection)
    with pytest.raises(TimedOut, match=r"^no connection to http://10\.0\.0\.1:8000: .*attempt 4.*server running"):
        call("http://10.0.0.1:8000", "models")


@pytest.mark.parametrize("options", [{"key": "secret\n"}, {"headers": {"X-Team": "a\r\nb"}}])
def test_header_with_a_line_break_is_refused_when_the_client_is_created(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(key|X-Team|x-team).* contains a line break") as raised:
        Client("http://127.0.0.1:8000", **options)
    assert "secret" not in str(raised.value)


def test_connection_that_the_server_has_closed_is_not_used_again() -> None:
    """An unsafe request on a dead connection would fail, and could not be repeated."""

    def answer_and_close(connection: Any) -> bool:
        COUNTS(connection)
        return False

    with scripted(answer_and_close) as server, Client(server.address, retries=Retries(attempts=1)) as elbo:
        for _ in range(5):
            assert elbo.anomaly([[1.0]]).rows == 1
            time.sleep(0.05)  # the end of the connection arrives
        assert len(server.received) == 5

    async def scenario(server: ScriptedServer) -> None:
        async with AsyncClient(server.address, retries=Retries(attempts=1)) as elbo:
            for _ in range(5):
                assert (await elbo.anomaly([[1.0]])).rows == 1
                await asyncio.sleep(0.05)

    with scripted(answer_and_close) as server:
        asyncio.run(scenario(server))


def test_connection_is_kept_open_for_further_calls() -> None:
    with scripted(MODELS) as server, Client(server.address) as elbo:
        for _ in range(10):
            elbo.models()
        assert len(server._connections) == 1


# A real server


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    with server_starter() as start_server:
        yield start_server


@pytest.mark.slow
def test_full_queue_is_waited_for_and_a_row_that_counts_is_never_sent_again(models: Path) -> None:
    async def scenario() -> None:
        options = Settings(artifacts=models, default_model="digits", max_rows=3, queue_rows=3, log_level="error")
        async with serving(options) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), np.repeat(ROWS, 3, axis=0))
            address = f"http://127.0.0.1:{port}"
            try:
                async with (
                    AsyncClient(address, retries=FAST) as elbo,
                    httpx.AsyncClient(verify=NO_AUTHORITIES, base_url=address) as plain,
                ):
                    with pytest.raises(TooManyRequests, match="overloaded") as raised:
                        await elbo.anomaly(ROWS)
                    assert raised.value.retry_after is not None
                    assert await refused(plain) == 1
                    repeated = asyncio.create_task(elbo.encode(ROWS))
                    while await refused(plain) < 2:
                        await asyncio.sleep(0.02)
                    gate.open.set()
                    assert (await repeated).latents.shape == (1, 3)
            finally:
                gate.open.set()
                await held

    async def refused(plain: httpx.AsyncClient) -> float:
        lines = (await plain.get("/metrics")).text.splitlines()
        counts = [line for line in lines if line.startswith("elbo_requests_total{") and 'status="429"' in line]
        return sum(float(line.rpartition(" ")[2]) for line in counts)

    asyncio.run(scenario())


@pytest.mark.slow
def test_server_that_is_killed_while_it_has_a_request_is_an_error_that_says_so(
    models: Path, start: Callable[..., ServerProcess]
) -> None:
    server = start(models, DEFAULT_MODEL="digits")
    with Client(f"http://127.0.0.1:{server.port}", retries=FAST, timeout=60) as elbo:
        assert elbo.encode(ROWS).version == 1
        server.popen.send_signal(signal.SIGSTOP)  # the kernel receives the request, and nobody reads it
        with ThreadPoolExecutor(2) as pool:
            counted, computed = pool.submit(elbo.score, ROWS), pool.submit(elbo.encode, ROWS)
            time.sleep(0.3)
            server.popen.kill()
            with pytest.raises(ConnectionFailed, match="so it was not sent again") as raised:
                counted.result()
            assert raised.value.sent is True
            with pytest.raises(ConnectionFailed, match=rf"attempt {FAST.attempts}"):
                computed.result()


@pytest.mark.slow
def test_wrong_and_missing_keys_are_not_authorised_and_a_right_one_is(models: Path, tmp_path: Path) -> None:
    keys = one_key_per_scope(tmp_path / "keys.toml")
    app = create_app(Settings(artifacts=models, default_model="digits", api_keys_file=keys.path, log_level="error"))
    with running(app, app.state.protocol) as plain:
        address = str(plain.base_url)
        for key in (None, "wrong"):
            with Client(address, key=key) as elbo, pytest.raises(NotAuthorised) as raised:
                elbo.encode(ROWS)
            assert raised.value.status == 401
        with Client(address, key=keys.values["infer"]) as elbo:
            assert elbo.encode(ROWS).latents.shape == (1, 3)
            with pytest.raises(NotAuthorised) as raised:
                elbo.anomaly(ROWS, observe=True)
            assert raised.value.status == 403
