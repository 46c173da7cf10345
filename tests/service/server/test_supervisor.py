"""Several workers at one address: a killed worker is replaced, and stopping the server loses no request."""

import itertools
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest

from models.artifact import Artifact
from service.inference.trial import KEEPER_PROCESS_NAME
from service.server import fd_passing
from tests.conftest import require
from tests.data import ROOT
from tests.preloaded import run_preloaded
from tests.service.process import ServerProcess, background_threads, server_starter
from tests.service.raw_http import read_response, request_head
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

BODY = b'{"inputs": [[' + b", ".join([b"0.5"] * 64) + b"]]}"


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    require(Path("/proc/self/task").is_dir(), "the test reads /proc")
    with server_starter() as start_server:
        yield start_server


def worker_pids(process: ServerProcess) -> list[int]:
    pid = process.popen.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if Path(f"/proc/{child}/comm").read_text() != f"{KEEPER_PROCESS_NAME}\n"]


def count_open_sockets(pid: int) -> int:
    sockets = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            sockets += str(entry.readlink()).startswith("socket:")
    return sockets


class Load:
    """Sends requests from several clients without a pause, counts the responses and collects the failures."""

    def __init__(self, process: ServerProcess) -> None:
        self.correct = 0
        self.failures: list[str] = []
        self._process = process

    def run_client(self, seed: int, stop: threading.Event) -> None:
        """Send requests on one connection until `stop` is set."""
        rng = np.random.default_rng(seed)
        with self._process.client() as client:
            for number in itertools.count():
                if stop.is_set():
                    return
                rows = rng.random((rng.integers(1, 20), 64)).round(3).tolist()
                try:
                    response = client.post(
                        "/reconstruct", json={"inputs": rows}, headers={"x-request-id": f"{seed}-{number}"}
                    )
                    if response.status_code != 200 or len(response.json()["outputs"]) != len(rows):
                        self.failures.append(response.text)
                    self.correct += 1
                except httpx.ConnectError:  # refused before the request was sent, so no request is lost
                    time.sleep(0.01)
                except httpx.TransportError as error:
                    self.failures.append(repr(error))


@contextmanager
def under_load(process: ServerProcess, clients: int) -> Iterator[Load]:
    load = Load(process)
    with background_threads(*(partial(load.run_client, seed) for seed in range(clients))):
        yield load


def test_receive_returns_all_connections_that_were_sent() -> None:
    control, control_of_worker = socket.socketpair()
    control_of_worker.setblocking(False)
    pairs = [socket.socketpair() for _ in range(100)]
    for _, connection in pairs:
        fd_passing.send_connection(control, connection)
    control.send(fd_passing.DRAIN)
    control.shutdown(socket.SHUT_WR)
    received = fd_passing.receive(control_of_worker)
    assert received is not None
    assert received.messages == 100 * fd_passing.CONNECTION + fd_passing.DRAIN
    for number, ((peer, _), connection) in enumerate(zip(pairs, received.connections, strict=True)):
        connection.sendall(b"%d" % number)
        assert peer.recv(8) == b"%d" % number
        peer.close()
        connection.close()
    assert fd_passing.receive(control_of_worker) is None
    control.close()
    control_of_worker.close()


def test_listener_that_is_about_to_close_keeps_the_connections_it_has_and_gets_no_new_ones() -> None:
    require(sys.platform == "linux", "only Linux can filter the packets of a listener")
    listener = socket.create_server(("127.0.0.1", 0))
    earlier = socket.create_connection(listener.getsockname(), timeout=5)
    fd_passing.stop_new_connections(listener)
    with pytest.raises(TimeoutError):
        socket.create_connection(listener.getsockname(), timeout=0.2)
    listener.setblocking(False)
    (accepted,) = fd_passing.accept_pending(listener)
    earlier.sendall(b"request")
    assert accepted.recv(7) == b"request"
    accepted.sendall(b"response")
    assert earlier.recv(8) == b"response"
    address = listener.getsockname()
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)
    earlier.close()
    accepted.close()


def test_workers_get_equally_many_connections_and_export_the_sums_over_all_workers(
    start: Callable[..., ServerProcess], vae_only: Path
) -> None:
    process = start(vae_only, WORKERS=2)
    process.wait_for_worker()
    before = [count_open_sockets(pid) for pid in worker_pids(process)]
    clients = [process.client() for _ in range(10)]
    for number, client in enumerate(clients, 1):
        assert client.post("/encode", content=BODY, headers={"content-type": "application/json"}).status_code == 200
        text = client.get("/metrics").text
        assert f'elbo_rows_total{{endpoint="/encode",model="vae",version="1"}} {number}.0' in text
    opened = [count_open_sockets(pid) - number for pid, number in zip(worker_pids(process), before, strict=True)]
    assert opened == [5, 5]
    for client in clients:
        client.close()
    assert process.stop() == 0


def test_killed_worker_is_replaced_and_loses_its_connections_but_not_its_counts(
    start: Callable[..., ServerProcess], vae_only: Path
) -> None:
    process = start(vae_only, WORKERS=2)
    process.wait_for_worker()
    with under_load(process, 4) as load:
        half_sent = [process.connect() for _ in range(6)]  # at least one connection per worker
        for connection in half_sent:
            connection.sendall(request_head("/encode", f"Content-Length: {len(BODY)}") + BODY[:20])
        wait_until(lambda: load.correct > 20)
        before, victim = process.metric_total("elbo_requests_total"), worker_pids(process)[0]
        os.kill(victim, signal.SIGKILL)
        assert select.select(half_sent, [], [], 5)[0]
        assert process.wait_for_log("it is replaced", pid=victim)["level"] == "error"
        assert process.metric_total("elbo_requests_total") > before
        process.wait_for_log("is ready", level="info")
        assert victim not in worker_pids(process)
        assert len(worker_pids(process)) == 2
        correct_before = load.correct
        wait_until(lambda: load.correct > correct_before + 20)
    assert len(load.failures) <= 4  # each of the 4 clients loses at most one request
    assert process.metric_total("elbo_worker_restarts_total") == 1
    assert process.metric_total("elbo_requests_total") > before
    lost = select.select(half_sent, [], [], 0)[0]
    for connection in lost:
        with suppress(ConnectionError):
            assert connection.recv(1) == b""
    kept = next(connection for connection in half_sent if connection not in lost)
    kept.sendall(BODY[20:])
    assert read_response(kept).startswith(b"HTTP/1.1 200")
    for connection in half_sent:
        connection.close()
    assert process.stop() == 0


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("delay", [0, 0.5])
def test_sigterm_under_load_loses_no_request(
    start: Callable[..., ServerProcess], vae_only: Path, count: int, delay: float
) -> None:
    process = start(vae_only, WORKERS=count, DRAIN_SECONDS=delay)
    with under_load(process, 6) as load:
        wait_until(lambda: load.correct > 30)
        assert process.stop() == 0
    assert load.failures == []


STOP_WHILE_LOADING = """
import select, signal
from service import settings
from service.monitoring import logs
from service.server import run, supervisor

class StoppingSupervisor(supervisor.Supervisor):
    def _enter_serving(self):
        super()._enter_serving()
        signal.raise_signal(signal.SIGTERM)

    def _enter_stopping(self):
        workers = self._workers.values()
        loading = [worker.control for worker in workers if worker.state is supervisor.WorkerState.LOADING]
        assert loading and select.select(loading, [], [], 60)[0] == loading
        super()._enter_stopping()

options = settings.Settings()
logs.configure(options.log_level, options.log_format)
StoppingSupervisor(options, run.bind(options.host, options.port)).run()
"""


def test_server_exits_without_an_error_if_a_worker_becomes_ready_while_the_server_stops(vae_only: Path) -> None:
    """The worker has sent READY, but the supervisor reads this message only after it has killed the worker."""
    environment = os.environ | {
        "ELBO_PORT": "0", "ELBO_WORKERS": "2", "ELBO_DRAIN_SECONDS": "0", "ELBO_ARTIFACTS": str(vae_only),
    }  # fmt: skip
    command = [sys.executable, "-c", STOP_WHILE_LOADING]
    result = run_preloaded(command, cwd=ROOT, env=environment, text=True)
    assert result.returncode == 0, result
    assert "worker 1 is ready" in result.stdout


REPORT_SHARED_ARRAYS = """
import os, time
from service import settings
from service.server import run, supervisor

fork = os.fork

def fork_and_wait_in_the_parent():
    pid = fork()
    if pid:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid

class ReportingSupervisor(supervisor.Supervisor):
    def _run_worker_and_exit(self, index, control):
        print(index, *self._segments[index].entries(), flush=True)
        os._exit(1)

os.fork = fork_and_wait_in_the_parent
options = settings.Settings()
ReportingSupervisor(options, run.bind(options.host, options.port)).run()
"""


def test_supervisor_adds_its_array_to_the_segment_of_a_worker_before_the_worker_starts() -> None:
    """Two processes that add arrays to one segment at the same time overwrite each other."""
    environment = os.environ | {"ELBO_PORT": "0", "ELBO_WORKERS": "2"}
    command = [sys.executable, "-c", REPORT_SHARED_ARRAYS]
    result = run_preloaded(command, cwd=ROOT, env=environment, text=True)
    assert result.stdout.splitlines() == [f"0 {fd_passing.CLOSED_CONNECTIONS}"], result


def test_new_worker_does_not_serve_while_the_artifact_folder_is_missing(
    start: Callable[..., ServerProcess], artifacts: Path, tmp_path: Path
) -> None:
    folder, aside = tmp_path / "artifacts", tmp_path / "aside"
    shutil.copytree(artifacts / "hosts", folder / "hosts")
    process = start(folder, WORKERS=2)
    process.wait_for_worker()
    folder.rename(aside)
    process.wait_for_log("cannot read the artifact folder")
    pids = [line["pid"] for line in process.lines if "is ready" in line["message"]]
    os.kill(pids[-1], signal.SIGKILL)
    process.wait_for_log("ended: killed by SIGKILL")
    process.wait_for_log("ended: exit code 1")  # its replacement
    for _ in range(20):
        with process.client() as client:
            assert client.get("/readyz").status_code == 200
            assert client.get("/models/hosts").status_code == 200
    assert "restore the artifact folder" in process.stderr()
    aside.rename(folder)
    process.wait_for_log("is ready")
    with process.client() as client:
        assert client.get("/readyz").status_code == 200
    assert process.stop() == 0


def test_worker_reports_that_it_is_not_ready_but_keeps_serving_while_it_drains(
    start: Callable[..., ServerProcess], vae_only: Path
) -> None:
    process = start(vae_only, WORKERS=2, DRAIN_SECONDS=1)
    process.wait_for_worker()
    process.popen.send_signal(signal.SIGTERM)
    process.wait_for_log("stopping")
    for _ in range(2):
        with process.client() as client:
            wait_until(lambda: client.get("/readyz").status_code == 503)
            response = client.post("/encode", content=BODY, headers={"content-type": "application/json"})
            assert (response.status_code, response.headers["connection"]) == (200, "close")
    assert process.popen.wait(20) == 0


def test_server_exits_with_an_error_if_the_first_worker_cannot_start(vae_only: Path) -> None:
    environment = os.environ | {
        "ELBO_PORT": "0", "ELBO_WORKERS": "2", "ELBO_DEVICE": "cuda", "ELBO_ARTIFACTS": str(vae_only),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-m", "service"]
    result = run_preloaded(command, cwd=ROOT, env=environment, text=True)
    assert result.returncode == 1
    assert "cuda was requested" in result.stderr


def test_workers_end_after_their_supervisor_is_killed(start: Callable[..., ServerProcess], vae_only: Path) -> None:
    process = start(vae_only, WORKERS=2)
    process.wait_for_worker()
    orphans = worker_pids(process)
    assert len(orphans) == 2
    process.stop(signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}/fd").is_dir() and is_alive(pid) for pid in orphans))


def is_alive(pid: int) -> bool:
    """Return whether a process runs. A zombie has ended, but remains in /proc if PID 1 does not reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_worker_reconstructs_rows_as_the_pytorch_module_does(
    start: Callable[..., ServerProcess], vae_only: Path, vae: Artifact, digits: np.ndarray
) -> None:
    import torch

    process = start(vae_only, WORKERS=2, BACKEND="torchscript")
    process.wait_for_worker()
    with torch.inference_mode():
        expected = vae.module(torch.from_numpy(digits[:3])).numpy()
    for _ in range(4):
        with process.client() as client:
            response = client.post("/reconstruct?model=vae", json={"inputs": digits[:3].tolist()})
            np.testing.assert_allclose(response.json()["outputs"], expected, atol=1e-6)
    assert process.stop() == 0
