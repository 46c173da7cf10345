"""API keys in a server process: nothing that it writes contains the value of a key, and its workers agree."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.data import ROOT
from tests.plain_http import NO_AUTHORITIES
from tests.preloaded import PreloadedProcess
from tests.service.access.keys import KeySet, one_key_per_scope
from tests.service.process import ServerProcess, server_starter
from tests.service.raw_http import read_response
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow]

# A server whose handler of /models fails, so that its log has a traceback of a request with a key.
FAILING = """
from service.endpoints.information import InformationEndpoints
async def models(self, request):
    raise RuntimeError("the handler fails")
InformationEndpoints.models = models
from service.__main__ import main
main()
"""

PATHS = ("/models", "/metrics", "/models/vae/held-out", "/nope", "/openapi.json", "/docs", "/")


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    with server_starter() as start_server:
        yield start_server


@pytest.fixture
def keys(tmp_path: Path) -> KeySet:
    return one_key_per_scope(tmp_path / "keys.toml")


def raw(process: ServerProcess, head: str, body: bytes = b"") -> bytes:
    with process.connect() as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        connection.shutdown(1)
        return read_response(connection)


def test_value_of_a_key_is_in_nothing_that_the_server_writes(
    tmp_path: Path, keys: KeySet, start: Callable[..., ServerProcess]
) -> None:
    secret = keys.values["admin"]
    wrong = "elbo_" + 43 * "W"
    process = start(tmp_path / "none", prefix=["env"], API_KEYS_FILE=keys.path, LOG_LEVEL="debug")
    answers: list[bytes] = []
    with process.client() as client:
        for value in (secret, wrong):
            for headers in ({"Authorization": f"Bearer {value}"}, {"X-API-Key": value}):
                answers += [client.get(path, headers=headers).content for path in PATHS]
                answers.append(client.post("/encode", content=b"{", headers=headers).content)
                answers.append(client.post("/api/v1/write", content=b"x", headers=headers).content)
                answers.append(client.post("/anomaly?observe=maybe", json={}, headers=headers).content)
    for value in (secret, wrong):
        answers += [
            raw(process, f"GET /models HTTP/1.1\nHost: elbo\nX-API-Key: {value}\nX-API-Key: {value}"),
            raw(process, f"GET /models HTTP/1.1\nX-API-Key: {value}"),
            raw(process, f"GET /models HTTP/1.1\nHost: elbo\nX-API-Key {value}"),
            raw(process, f"GET /models HTTP/1.1\nHost: elbo\nTransfer-Encoding: x\nX-API-Key: {value}"),
            raw(process, f"GET /models HTTP/1.1\nHost: elbo\nX-Request-Timeout: soon\nX-API-Key: {value}"),
            raw(process, f"CONNECT x:1 HTTP/1.1\nHost: elbo\nX-API-Key: {value}"),
            raw(process, f"POST /encode HTTP/1.1\nHost: elbo\nX-API-Key: {value}\nContent-Length: 9", b"{"),
        ]
    keys.path.write_text(f"admin = {{sha256 = '{secret}', scopes = ['admin']}}\n{secret} = 1\n")
    process.wait_for_log("the API keys stay as they are")
    pid = str(process.popen.pid)
    seen = [Path("/proc", pid, "cmdline").read_bytes(), Path("/proc", pid, "environ").read_bytes()]
    assert process.stop() == 0
    assert len(answers) == 54
    written = b"".join([*answers, *seen, process.stderr().encode(), "".join(map(str, read_log(process))).encode()])
    assert b"admin" in written  # the name of the key is in the access log
    for value in (secret, wrong):
        assert value.encode() not in written
        assert value.encode()[8:40] not in written
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [keys.path]


def read_log(process: ServerProcess) -> list[dict[str, object]]:
    """Return all log lines of a process that has ended."""
    while line := process._unread_lines.get(timeout=20):
        process.lines.append(line)
    return [dict(line) for line in process.lines]


def test_traceback_of_a_request_names_the_key_without_its_value(tmp_path: Path, keys: KeySet) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ELBO_")}
    settings = {"ARTIFACTS": str(tmp_path / "none"), "PORT": "0", "API_KEYS_FILE": str(keys.path)}
    output = tmp_path / "log"
    with output.open("wb") as log:
        process = PreloadedProcess(
            [sys.executable, "-c", FAILING],
            cwd=ROOT,
            env=inherited | {f"ELBO_{name}": value for name, value in settings.items()},
            stdout=log,
            stderr=log,
        )
        try:
            wait_until(lambda: "listening on" in output.read_text(), 30)
            url = output.read_text().partition("listening on ")[2].partition('"')[0]
            assert httpx.get(f"{url}/models", verify=NO_AUTHORITIES, headers=keys.headers("infer")).status_code == 500
        finally:
            process.terminate()
            process.wait(20)
    text = output.read_text()
    assert "RuntimeError: the handler fails" in text
    assert '"key":"infer"' in text
    assert keys.values["infer"] not in text


def test_server_with_keys_writes_no_core_dump(
    tmp_path: Path, keys: KeySet, start: Callable[..., ServerProcess]
) -> None:
    """A core dump would contain the keys of the requests in progress."""
    process = start(tmp_path / "none", API_KEYS_FILE=keys.path)
    limits = Path("/proc", str(process.popen.pid), "limits").read_text()
    assert next(line.split()[4] for line in limits.splitlines() if line.startswith("Max core file size")) == "0"


def test_two_workers_share_the_limit_of_a_key_and_follow_the_file(
    tmp_path: Path, keys: KeySet, start: Callable[..., ServerProcess]
) -> None:
    keys.add("slow", "infer", requests_per_second=0.01, burst=6)
    process = start(tmp_path / "none", API_KEYS_FILE=keys.path, WORKERS=2)
    process.wait_for_worker()
    clients = [process.client() for _ in range(8)]  # the supervisor gives each worker four of the connections
    statuses = [client.get("/models", headers=keys.headers("slow")).status_code for _ in range(3) for client in clients]
    # Each worker may accept one request too many before it has seen the counts of the other.
    assert 6 <= statuses.count(200) <= 8
    assert statuses.count(429) == 24 - statuses.count(200)
    keys.remove("infer")
    wait_until(
        lambda: all(client.get("/models", headers=keys.headers("infer")).status_code == 401 for client in clients), 20
    )
    for client in clients:
        client.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_added_key_is_accepted_after_sighup_without_waiting_for_the_next_poll(
    tmp_path: Path, keys: KeySet, start: Callable[..., ServerProcess], workers: int
) -> None:
    process = start(tmp_path / "none", API_KEYS_FILE=keys.path, POLL_SECONDS=3600, WORKERS=workers)
    if workers > 1:
        process.wait_for_worker()
    keys.add("late", "infer")
    clients = [process.client() for _ in range(2 * workers)]
    assert {client.get("/models", headers=keys.headers("late")).status_code for client in clients} == {401}
    process.popen.send_signal(signal.SIGHUP)
    wait_until(
        lambda: all(client.get("/models", headers=keys.headers("late")).status_code == 200 for client in clients), 20
    )
    for client in clients:
        client.close()
