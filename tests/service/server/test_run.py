"""`python -m service` as a process: start, signals, hot reload, and clients that disconnect, stall or send too much."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from service.settings import Settings
from tests.conftest import require
from tests.data import ROOT
from tests.plain_http import NO_AUTHORITIES
from tests.ports import free_port
from tests.preloaded import PreloadedProcess, run_preloaded
from tests.service.access.keys import one_key_per_scope
from tests.service.process import ServerProcess, background_threads, server_starter
from tests.service.raw_http import read_response, request_head
from tests.service.scrape import scrape, total
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

ROW = [0.5] * 64
FILE_LIMIT = 16_384  # bytes


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    with server_starter() as start_server:
        yield start_server


@pytest.fixture(scope="module")
def server(artifacts: Path) -> Iterator[ServerProcess]:
    """Yield a server for the tests that do not change its state."""
    with server_starter() as start_server:
        process = start_server(artifacts, MAX_BODY_BYTES=2**20)
        yield process
        assert process.stop() == 0
        assert process.stderr() == ""


def test_server_drains_after_sigterm_and_then_finishes_the_requests_in_progress(
    start: Callable[..., ServerProcess], vae_only: Path
) -> None:
    process = start(vae_only, DRAIN_SECONDS=1)
    body = json.dumps({"inputs": [ROW]}).encode()
    with process.client() as client, process.connect() as slow:
        slow.sendall(request_head("/encode", f"Content-Length: {len(body)}") + body[:10])
        process.popen.send_signal(signal.SIGTERM)
        process.wait_for_log("stopping")
        assert client.get("/readyz").status_code == 503
        with process.client() as new_client:
            assert new_client.post("/encode", json={"inputs": [ROW]}).status_code == 200
        process.wait_for_log("Waiting for connections to close")
        with pytest.raises(ConnectionError):
            process.connect()
        slow.sendall(body[10:])
        assert read_response(slow).startswith(b"HTTP/1.1 200")
    assert process.popen.wait(20) == 0


def test_response_to_a_request_that_began_before_sigterm_announces_that_the_connection_closes(
    start: Callable[..., ServerProcess], vae_only: Path
) -> None:
    process = start(vae_only)
    body = json.dumps({"inputs": [ROW]}).encode()
    with process.connect() as connection:
        connection.sendall(request_head("/encode", f"Content-Length: {len(body)}") + body[:10])
        wait_until(lambda: process.metric_total("elbo_pending_bytes") > 0)
        process.popen.send_signal(signal.SIGTERM)
        process.wait_for_log("Shutting down")
        connection.sendall(body[10:])
        head, _, _ = read_response(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in head
    assert process.popen.wait(20) == 0


@pytest.mark.parametrize("sent", [0, 20])
def test_first_request_of_a_connection_is_served_if_it_arrives_while_the_server_stops(
    start: Callable[..., ServerProcess], vae_only: Path, sent: int
) -> None:
    process = start(vae_only)
    body = json.dumps({"inputs": [ROW]}).encode()
    request = request_head("/encode", f"Content-Length: {len(body)}") + body
    with process.connect() as connection:
        connection.sendall(request[:sent])
        time.sleep(0.1)
        process.popen.send_signal(signal.SIGTERM)
        process.wait_for_log("Waiting for connections to close")
        connection.sendall(request[sent:])
        assert read_response(connection).startswith(b"HTTP/1.1 200")
    assert process.popen.wait(20) == 0


def test_server_stops_within_seconds_if_a_client_connects_and_sends_nothing(
    start: Callable[..., ServerProcess], vae_only: Path
) -> None:
    process = start(vae_only)
    with process.connect():
        process.popen.send_signal(signal.SIGTERM)
        assert process.popen.wait(10) == 0


def test_server_exits_with_a_one_line_error_if_the_port_is_in_use(vae_only: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other_server:
        port = other_server.getsockname()[1]
        environment = os.environ | {"ELBO_PORT": str(port), "ELBO_ARTIFACTS": str(vae_only)}
        result = run_preloaded([sys.executable, "-m", "service"], cwd=ROOT, env=environment, text=True)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in result.stderr
    assert "ELBO_PORT" in result.stderr


@pytest.mark.parametrize("below", ["", "models"])
def test_server_exits_with_a_one_line_error_if_the_artifact_folder_is_a_file(below: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.touch()
    command = [sys.executable, "-m", "elbo", "serve", "--artifacts", str(path / below), "--port", "0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    expected = f"elbo: error: {path} is not a folder: give the artifact folder, which contains NAME/VERSION/model.pt"
    assert result.stderr == f"{expected}, with --artifacts or ELBO_ARTIFACTS\n"


@pytest.mark.parametrize(("name", "value"), [("ELBO_PORT", "http"), ("ELBO_DEVICE", "tpu"), ("ELBO_QUEUE_ROWS", "5")])
def test_server_exits_with_a_one_line_error_if_a_setting_is_invalid(name: str, value: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "service"], cwd=ROOT, env=os.environ | {name: value}, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"elbo: {name}: ")
    assert f"got '{value}'" in result.stderr


SERVICE_LINK = "tcp://10.96.12.3:80"  # the value that Kubernetes gives ELBO_PORT for a Service named elbo


def health_check(address: str, **variables: str) -> int:
    """Run the health check of the Dockerfile for a server at `address`, and return its exit status."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    command = json.loads(next(line for line in lines if line.startswith("HEALTHCHECK")).partition("CMD ")[2])
    assert command[0] == "python"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ELBO_")}
    environment |= {"ELBO_HOST": address, **variables}
    return subprocess.run([sys.executable, *command[1:]], cwd=ROOT, env=environment, capture_output=True).returncode


def test_server_and_health_check_use_the_default_port_if_kubernetes_has_set_the_port_variable(
    start: Callable[..., ServerProcess], vae_only: Path
) -> None:
    address = "127.0.0.77"  # port 8000 of 127.0.0.1 may be in use
    variables = {"SERVICE_HOST": "10.96.12.3", "SERVICE_PORT": "80", "SERVICE_PORT_HTTP": "80"}
    variables |= {"PORT_80_TCP": SERVICE_LINK, "BACKEND": "torchscript"}
    process = start(vae_only, PORT=SERVICE_LINK, HOST=address, **variables)
    assert process.port == 8000
    (warning,) = [line for line in process.lines if line["level"] == "warning"]
    assert f"ignored ELBO_PORT={SERVICE_LINK}" in warning["message"]
    assert "enableServiceLinks: false" in warning["message"]
    assert health_check(address, ELBO_PORT=SERVICE_LINK) == 0
    assert health_check(address) == 0
    assert health_check(address, ELBO_PORT="8000") == 0
    assert health_check(address, ELBO_PORT="9") != 0
    assert process.stop() == 0


@pytest.mark.parametrize("value", ["udp://10.0.0.1:53", "TCP://[fd00::1]:80", "sctp://10.0.0.1:1"])
def test_port_variable_of_kubernetes_is_ignored_for_every_protocol(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ELBO_PORT", value)
    assert Settings().port == 8000
    assert Settings().ignored_variables() == {"ELBO_PORT": value}
    assert Settings(port=9000).port == 9000
    assert Settings(port=9000).ignored_variables() == {}


def test_model_is_served_from_its_publication_until_its_removal(
    start: Callable[..., ServerProcess], artifacts: Path, tmp_path: Path
) -> None:
    process = start(tmp_path / "models")
    with process.client() as client:
        assert client.get("/readyz").status_code == 503
        shutil.copytree(artifacts / "pca", tmp_path / "models" / "digits")
        process.wait_for_log("serving digits@1")
        assert client.get("/readyz").status_code == 200
        assert client.post("/sample").json()["version"] == 1
        (tmp_path / "models" / "digits" / "2").mkdir()
        (tmp_path / "models" / "digits" / "2" / "model.pt").write_bytes(b"PK nonsense")
        process.wait_for_log("failed to load digits@2")
        assert client.post("/sample").json()["version"] == 1
        wait_until(lambda: [failure["version"] for failure in client.get("/models").json()["failures"]] == [2])
        shutil.copytree(artifacts / "pca" / "1", tmp_path / "models" / "digits" / "3")
        process.wait_for_log("serving digits@3")
        assert client.post("/sample").json()["version"] == 3
        shutil.rmtree(tmp_path / "models" / "digits")
        process.wait_for_log("no longer serving digits@3")
        assert client.get("/readyz").status_code == 503


def without_access_to_all_files() -> list[str]:
    """Return a command prefix without root's power to read every file. Other users do not have that power."""
    if os.geteuid() != 0:
        return []
    require(shutil.which("setpriv"), "setpriv, which takes root's power to read every file away, is not installed")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def test_folder_without_read_permission_affects_only_its_model(
    start: Callable[..., ServerProcess], artifacts: Path, tmp_path: Path
) -> None:
    shutil.copytree(artifacts / "pca", tmp_path / "pca")
    shutil.copytree(artifacts / "pca", tmp_path / "private")
    (tmp_path / "private").chmod(0)
    process = start(tmp_path, prefix=without_access_to_all_files())
    with process.client() as client:
        (failure,) = client.get("/models").json()["failures"]
        assert (failure["name"], failure["version"], failure["code"]) == ("private", None, "artifact_unreadable")
        assert "Permission denied" in failure["detail"]
        shutil.copytree(artifacts / "ae", tmp_path / "ae")
        process.wait_for_log("serving ae@1")
        (tmp_path / "private").chmod(0o755)
        process.wait_for_log("serving private@1")
        assert client.get("/models").json()["failures"] == []
        file = tmp_path / "pca" / "1" / "model.pt"
        shutil.copytree(artifacts / "pca" / "1", tmp_path / "pca" / "2")
        (tmp_path / "pca" / "2" / "model.pt").chmod(0)
        process.wait_for_log("failed to load pca@2")
        assert client.post("/sample?model=pca").json()["version"] == 1
        file.chmod(0)
        (tmp_path / "pca" / "2" / "model.pt").chmod(0o644)  # the server notices although the file has not changed
        process.wait_for_log("serving pca@2")
    assert process.stop() == 0
    errors = [line["message"] for line in process.lines if line["level"] == "error"]
    assert [message.partition(":")[0] for message in errors] == ["failed to load private", "failed to load pca@2"]


def test_server_stays_ready_while_the_artifact_folder_is_missing(
    start: Callable[..., ServerProcess], artifacts: Path, tmp_path: Path
) -> None:
    root = tmp_path / "models"
    shutil.copytree(artifacts / "pca", root / "pca")
    process = start(root)
    with process.client() as client:
        root.rename(tmp_path / "away")
        process.wait_for_log("cannot read the artifact folder")
        assert client.get("/readyz").status_code == 200
        assert client.post("/sample").json()["model"] == "pca"
        assert process.metric_total("elbo_model_load_failures") == 1
        (tmp_path / "away").rename(root)
        process.wait_for_log("resolved: cannot read the artifact folder")
        assert client.get("/models").json()["failures"] == []


def test_recalibrated_model_is_served_without_a_restart(
    start: Callable[..., ServerProcess], artifacts: Path, tmp_path: Path
) -> None:
    shutil.copytree(artifacts / "hosts", tmp_path / "models" / "hosts")
    process = start(tmp_path / "models")
    rows = 0.5 + np.random.RandomState(3).standard_normal((150, 4)) * [1, 20, 1, 3] + [0, 100, 0, 0]
    recent = tmp_path / "recent.csv"
    np.savetxt(recent, rows, delimiter=",", header="cpu [%],memory/used [MB],disk~io,load", comments="")
    folders = ["--artifacts", str(tmp_path / "models"), "--runs", str(tmp_path / "runs")]
    with process.client() as client:
        old = client.post("/anomaly", json={"inputs": rows[:5].tolist()}).json()
        command = [sys.executable, "-m", "elbo", "calibrate", "hosts", str(recent), "--force", *folders]
        assert run_preloaded(command, cwd=ROOT).returncode == 0
        process.wait_for_log("serving hosts@2")
        new = client.post("/anomaly", json={"inputs": rows[:5].tolist()}).json()
        assert (old["version"], old["calibration"]["rows"]) == (1, 80)
        assert (new["version"], new["calibration"]["rows"]) == (2, 150)
        for before, after in zip(old["results"], new["results"], strict=True):
            assert after["score"] == pytest.approx(before["score"], rel=1e-5)
            assert after["features"][0]["name"] == before["features"][0]["name"]
        detail = client.get("/models/hosts").json()
        assert detail["calibration"] == {"rows": 150, "floor": 1 / 151}
        assert detail["recalibration"]["parent"] == "hosts@1"
        assert detail["recalibration"]["source"] == str(recent)
        assert client.get("/models/hosts@1").json()["recalibration"] is None
        assert client.post("/anomaly?model=hosts@1", json={"inputs": rows[:5].tolist()}).json() == old


def test_no_request_fails_while_versions_are_published_and_removed(
    start: Callable[..., ServerProcess], artifacts: Path, tmp_path: Path
) -> None:
    shutil.copytree(artifacts / "pca", tmp_path / "pca")
    process = start(tmp_path)
    statuses: list[int] = []

    def send_requests(stop: threading.Event) -> None:
        with process.client() as client:
            while not stop.is_set():
                statuses.append(client.post("/reconstruct", json={"inputs": [ROW]}).status_code)

    with background_threads(send_requests, send_requests, send_requests):
        for version in range(2, 6):
            shutil.copytree(artifacts / "pca" / "1", tmp_path / "pca" / str(version))
            process.wait_for_log(f"serving pca@{version}")
            shutil.rmtree(tmp_path / "pca" / str(version - 1))
            process.wait_for_log(f"no longer serving pca@{version - 1}")
    assert len(statuses) > 20
    assert set(statuses) == {200}
    assert process.stop(signal.SIGINT) == 0


def test_request_is_logged_with_status_499_if_the_client_disconnects_while_it_sends_the_body(
    server: ServerProcess,
) -> None:
    with server.connect() as connection:
        connection.sendall(request_head("/encode", "Content-Length: 1000", "X-Request-Id: half") + b'{"inputs": [[')
        time.sleep(0.05)
    assert server.wait_for_log("request", request_id="half")["status"] == 499


def test_client_that_disconnects_in_the_middle_of_a_stream_causes_no_error_in_the_log(server: ServerProcess) -> None:
    types = "Content-Type: application/x-ndjson\r\nAccept: application/x-ndjson\r\nX-Request-Id: gone"
    head = f"POST /anomaly HTTP/1.1\r\nHost: elbo\r\n{types}\r\nContent-Length: 100000\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.encode() + json.dumps(ROW).encode() + b"\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    server.wait_for_log("request", request_id="gone")
    assert [line for line in server.lines if line["level"] == "error"] == []


def test_stalled_clients_do_not_delay_other_requests(server: ServerProcess) -> None:
    stalled = [server.connect() for _ in range(50)]
    for connection in stalled:
        connection.sendall(request_head("/encode", "Content-Length: 100000") + b'{"inputs"')
    with server.client() as client:
        started = time.perf_counter()
        for _ in range(20):
            assert client.post("/encode", json={"inputs": [ROW]}).status_code == 200
        assert time.perf_counter() - started < 5
    for connection in stalled:
        connection.close()


def test_connection_is_closed_after_the_request_timeout_if_the_request_head_is_incomplete(
    start: Callable[..., ServerProcess], vae_only: Path
) -> None:
    process = start(vae_only, REQUEST_TIMEOUT=0.5)
    with process.connect() as silent, process.connect() as slow, process.client() as client:
        slow.sendall(b"POST /encode HTTP/1.1\r\nHost: el")
        assert client.post("/encode", json={"inputs": [ROW]}).status_code == 200
        assert silent.recv(1) == slow.recv(1) == b""
        assert client.get("/livez").status_code == 200
    assert process.stop() == 0


def test_connection_is_closed_if_the_request_head_does_not_end(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(b"POST /encode HTTP/1.1\r\n")
        lines = (b"x-name: " + b"v" * 4096 + b"\r\n") * 20_000  # more than the socket buffers of the system hold
        with pytest.raises(ConnectionError):
            connection.sendall(lines)
    with server.client() as client:
        assert client.get("/livez", headers={"x-long": "v" * 30_000}).status_code == 200


def test_request_is_refused_before_the_body_is_sent_if_the_content_length_is_too_large(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(request_head("/encode", "Content-Length: 9999999999", "Expect: 100-continue"))
        response = read_response(connection)
    assert response.startswith(b"HTTP/1.1 413")
    assert b"body_too_large" in response


def test_client_gets_413_and_the_end_of_the_connection_if_its_request_body_does_not_end(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(request_head("/encode", "Transfer-Encoding: chunked"))
        chunk = b"10000\r\n" + b" " * 2**16 + b"\r\n"
        for _ in range(100):
            connection.sendall(chunk)
        assert read_response(connection).startswith(b"HTTP/1.1 413")
        assert connection.recv(1) == b""


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_response_does_not_depend_on_the_chunk_size_of_the_request_body(server: ServerProcess, size: int) -> None:
    body = b'{"inputs": [[%s]]}' % b", ".join([b"%.15f" % value for value in ROW])
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    with server.connect() as connection, server.client() as client:
        connection.sendall(request_head("/encode", "Transfer-Encoding: chunked"))
        connection.sendall(b"".join([b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks]) + b"0\r\n\r\n")
        response = read_response(connection)
        whole = client.post("/encode", content=body, headers={"content-type": "application/json"})
    assert response.startswith(b"HTTP/1.1 200")
    assert response.endswith(whole.content)


@pytest.mark.parametrize(
    "garbage", [b"\x00" * 100, b"GET /\r\n\r\n", b"POST /encode HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00"]
)
def test_server_survives_bytes_that_are_not_http(server: ServerProcess, garbage: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(garbage)
        with contextlib.suppress(ConnectionError):
            connection.recv(1000)
    with server.client() as client:
        assert client.get("/livez").status_code == 200


def test_registry_loads_every_artifact_if_the_model_classes_and_training_are_absent(
    artifacts: Path, tmp_path: Path
) -> None:
    """The test runs on a copy of `service` and of the modules of `models` that define the artifact contract."""
    shutil.copytree(ROOT / "service", tmp_path / "service", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "models").mkdir()
    contract = "__init__ errors columns pixels manifest versions artifact staging keys signatures trial inspection"
    in_time = "timestamps baseline feature_baseline season silences policy_rules explanation onset windows categories"
    checks = "allowed_code archive_check code_check onnx_check pickle_check"
    for module in f"{contract} {in_time} {checks}".split():
        shutil.copy(ROOT / "models" / f"{module}.py", tmp_path / "models")
    code = (
        "import asyncio, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from service.inference.model_loader import ModelLoader\n"
        "from service.inference.registry import ModelRegistry\n"
        f"repo = ModelRegistry(Path({str(artifacts)!r}), ModelLoader(), default_model='vae', keep_versions=1)\n"
        "repo.refresh()\n"
        "print(sorted(repo.catalogue.models), [f.detail for f in repo.catalogue.failures])\n"
        "assert not [name for name in sys.modules if name.startswith('training')]\n"
        "assert sys.modules['models'].__file__.startswith(str(Path.cwd()))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "['ae', 'hosts', 'pca', 'vae'] []\n"


@pytest.mark.alone
def test_large_bodies_do_not_delay_small_requests(server: ServerProcess) -> None:
    rows = np.random.default_rng(0).random((1500, 64)).round(4).tolist()
    large = json.dumps({"inputs": rows}).encode()

    def send_large_bodies(stop: threading.Event) -> None:
        with server.client() as client:
            while not stop.is_set():
                client.post("/reconstruct", content=large, headers={"content-type": "application/json"})

    durations = []
    with background_threads(send_large_bodies), server.client() as client:
        for _ in range(30):
            started = time.perf_counter()
            assert client.get("/livez").status_code == 200
            durations.append(time.perf_counter() - started)
    assert sorted(durations)[15] < 0.25


@pytest.mark.parametrize("workers", [1, 2])
def test_sighup_loads_new_artifacts_at_once_and_loses_no_request(
    start: Callable[..., ServerProcess], artifacts: Path, tmp_path: Path, workers: int
) -> None:
    folder = tmp_path / "artifacts"
    shutil.copytree(artifacts / "hosts", folder / "hosts")
    process = start(folder, WORKERS=workers, POLL_SECONDS=3600)
    if workers > 1:
        process.wait_for_worker()
    statuses: list[int] = []

    def send(stop: threading.Event) -> None:
        with process.client() as client:
            while not stop.is_set():
                statuses.append(client.get("/models/hosts").status_code)

    with background_threads(send):
        shutil.copytree(artifacts / "pca", folder / "pca")
        process.popen.send_signal(signal.SIGHUP)
        for _ in range(workers):
            process.wait_for_log("serving pca@1")
        for _ in range(5):
            process.popen.send_signal(signal.SIGHUP)
            process.wait_for_log("reloaded")
    assert set(statuses) == {200}
    assert process.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_sighup_makes_all_workers_read_the_file_of_keys_again(
    start: Callable[..., ServerProcess], tmp_path: Path, workers: int
) -> None:
    keys = one_key_per_scope(tmp_path / "keys.toml")
    process = start(tmp_path / "none", WORKERS=workers, POLL_SECONDS=3600, API_KEYS_FILE=keys.path)
    if workers > 1:
        process.wait_for_worker()
    keys.add("late", "admin")
    with process.client() as client:
        assert client.get("/models", headers=keys.headers("late")).status_code == 401
    process.popen.send_signal(signal.SIGHUP)
    for _ in range(workers):
        process.wait_for_log("reloaded")
    for _ in range(4 * workers):
        with process.client() as client:
            assert client.get("/models", headers=keys.headers("late")).status_code == 200


# A server with a library that logs, warns and prints, and whose threads die: 20 times, 5 KB each.
NOISY_SERVER = """
import logging, sys, threading, warnings
from service.server import worker
from service.__main__ import main

create_app = worker.create_app

def create_noisy_app(*arguments):
    app = create_app(*arguments)
    for _ in range(20):
        logging.getLogger("a.library").error("x" * 5000)
        warnings.warn("x" * 5000)
        print("x" * 5000, file=sys.stderr, flush=True)
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    return app

worker.create_app = create_noisy_app
main()
"""


def fill(descriptor: int) -> None:
    """Write to a pipe until it takes nothing more."""
    os.set_blocking(descriptor, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(descriptor, b"x" * select.PIPE_BUF):
            pass
    os.set_blocking(descriptor, True)


class UnwritableLog:
    """A standard output of a server that cannot be written.

    Args:
        kind: "closed", "full" (a full disk), "reader gone" (a pipe without a reader) or "blocked" (a pipe that nobody
            reads).
    """

    def __init__(self, kind: str) -> None:
        self.shell = ["sh", "-c", 'exec "$@" >&-', "sh"] if kind == "closed" else []
        reader, writer = os.pipe()
        if kind == "full":
            os.close(writer)
            writer = os.open("/dev/full", os.O_WRONLY)
        if kind == "reader gone":
            os.close(reader)
            reader = os.dup(writer)
        if kind == "blocked":
            fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
        self.descriptor = writer
        self._descriptors = (reader, writer)

    def close(self) -> None:
        """Close both ends."""
        for descriptor in self._descriptors:
            os.close(descriptor)


def test_server_replaces_closed_standard_output_and_error_by_the_null_device(artifacts: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shell = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh"]
    options = ["--port", str(port), "--artifacts", str(artifacts)]
    process = subprocess.Popen([*shell, sys.executable, "-m", "elbo", "serve", *options], cwd=ROOT)
    try:
        with httpx.Client(verify=NO_AUTHORITIES, base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            wait_until(lambda: client.get("/readyz").status_code == 200, ignore=httpx.TransportError)
        descriptors = Path(f"/proc/{process.pid}/fd")
        assert [str((descriptors / number).readlink()) for number in ("1", "2")] == [os.devnull, os.devnull]
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize(
    ("kind", "workers"), [("closed", 1), ("closed", 2), ("full", 1), ("full", 2), ("reader gone", 1), ("blocked", 1)]
)
def test_server_counts_lost_log_lines_and_stops_in_order_if_its_log_cannot_be_written(
    vae_only: Path, tmp_path: Path, kind: str, workers: int
) -> None:
    port = free_port()
    log = UnwritableLog(kind)
    variables = {
        "PORT": port,
        "ARTIFACTS": vae_only,
        "WORKERS": workers,
        "LOG_FORMAT": "text",
        "BACKEND": "torchscript",
    }
    with (tmp_path / "stderr").open("wb") as stderr:
        process = PreloadedProcess(
            [*log.shell, sys.executable, "-m", "service"],
            cwd=ROOT,
            env=os.environ | {f"ELBO_{key}": str(value) for key, value in variables.items()},
            stdout=log.descriptor,
            stderr=stderr,
        )
    try:
        with httpx.Client(verify=NO_AUTHORITIES, base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            wait_until(lambda: client.get("/readyz").status_code == 200, ignore=httpx.TransportError)
            for _ in range(100):
                assert client.post("/sample", json={"n": 1}).status_code == 200
            if kind != "blocked":  # these lines are kept until the reader continues or the server stops
                wait_until(lambda: total(scrape(client), "elbo_log_lines_lost_total") > 100)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        log.close()
    assert (tmp_path / "stderr").read_text() == ""


@pytest.mark.parametrize("workers", [1, 2])
def test_server_answers_and_stops_if_the_reader_of_both_its_streams_is_blocked(vae_only: Path, workers: int) -> None:
    port = free_port()
    log = UnwritableLog("blocked")
    fill(log.descriptor)
    variables = {"PORT": port, "ARTIFACTS": vae_only, "WORKERS": workers, "BACKEND": "torchscript"}
    process = PreloadedProcess(
        [sys.executable, "-c", NOISY_SERVER],
        cwd=ROOT,
        env=os.environ | {f"ELBO_{key}": str(value) for key, value in variables.items()},
        stdout=log.descriptor,
        stderr=log.descriptor,
    )
    try:
        with httpx.Client(verify=NO_AUTHORITIES, base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            wait_until(lambda: client.get("/readyz").status_code == 200, ignore=httpx.TransportError)
            for _ in range(60):
                with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                    connection.sendall(request_head("/anomaly", "Transfer-Encoding: chunked") + b"not a size\r\n")
                    read_response(connection)
            started = time.perf_counter()
            assert client.get("/livez").status_code == 200  # it would wait for ever for the reader
            assert time.perf_counter() - started < 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        log.close()


def test_failed_start_ends_if_the_reader_of_standard_error_is_blocked(tmp_path: Path) -> None:
    log = UnwritableLog("blocked")
    fill(log.descriptor)
    with socket.create_server(("127.0.0.1", 0)) as used:
        variables = {"PORT": used.getsockname()[1], "ARTIFACTS": tmp_path}
        process = PreloadedProcess(
            [sys.executable, "-m", "service"],
            cwd=ROOT,
            env=os.environ | {f"ELBO_{key}": str(value) for key, value in variables.items()},
            stdout=log.descriptor,
            stderr=log.descriptor,
        )
        try:
            assert process.wait(30) == 1
        finally:
            process.kill()
            process.wait()
            log.close()


def test_log_continues_with_the_number_of_lost_lines_when_the_disk_has_room_again(
    vae_only: Path, tmp_path: Path
) -> None:
    """A size limit of the log file stands in for the full disk: writes beyond it fail until the file is emptied."""
    port = free_port()
    variables = {"PORT": port, "ARTIFACTS": vae_only, "BACKEND": "torchscript"}
    path = tmp_path / "log"
    with path.open("ab") as log:
        process = subprocess.Popen(
            ["prlimit", f"--fsize={FILE_LIMIT}", sys.executable, "-m", "service"],
            cwd=ROOT,
            env=os.environ | {f"ELBO_{key}": str(value) for key, value in variables.items()},
            stdout=log,
            stderr=subprocess.DEVNULL,
        )
    try:
        with httpx.Client(verify=NO_AUTHORITIES, base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            wait_until(lambda: client.get("/readyz").status_code == 200, ignore=httpx.TransportError)
            while path.stat().st_size < FILE_LIMIT:
                client.get("/livez")
            client.get("/livez")
            wait_until(lambda: total(scrape(client), "elbo_log_lines_lost_total") > 0)
            os.truncate(path, 0)
            client.get("/livez", headers={"x-request-id": "after"})
            wait_until(lambda: "after" in path.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    assert sum(line.get("lost", 0) for line in lines) > 0
    assert "Application shutdown complete." in [line["message"] for line in lines]
