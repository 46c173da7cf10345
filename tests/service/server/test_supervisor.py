"""Several worker processes at one address: who is killed is replaced, who is told to stop loses nothing."""

import itertools
import os
import select
import signal
import socket
import subprocess
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
from service.server import fd_passing
from tests.conftest import require
from tests.data import ROOT
from tests.service.process import ServerProcess, background_threads, server_starter
from tests.service.raw_http import read_response, request_head
from tests.waiting import wait_until

BODY = b'{"inputs": [[' + b", ".join([b"0.5"] * 64) + b"]]}"


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    require(Path("/proc/self/task").is_dir(), "this looks into /proc")
    with server_starter() as begin:
        yield begin


def workers(process: ServerProcess) -> list[int]:
    pid = process.popen.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def sockets(pid: int) -> int:
    found = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found += str(entry.readlink()).startswith("socket:")
    return found


class Load:
    """What clients, each with a connection of its own, were answered."""

    def __init__(self, process: ServerProcess) -> None:
        self.right = 0
        self.wrong: list[str] = []
        self._process = process

    def ask(self, seed: int, stop: threading.Event) -> None:
        """Be one of the clients."""
        rng = np.random.default_rng(seed)
        with self._process.client() as client:
            for number in itertools.count():
                if stop.is_set():
                    return
                rows = rng.random((rng.integers(1, 20), 64)).round(3).tolist()
                try:
                    answer = client.post(
                        "/reconstruct", json={"inputs": rows}, headers={"x-request-id": f"{seed}-{number}"}
                    )
                    if answer.status_code != 200 or len(answer.json()["outputs"]) != len(rows):
                        self.wrong.append(answer.text)
                    self.right += 1
                except httpx.ConnectError:  # refused before it was asked: nothing is lost
                    time.sleep(0.01)
                except httpx.TransportError as error:
                    self.wrong.append(repr(error))


@contextmanager
def loaded(process: ServerProcess, clients: int) -> Iterator[Load]:
    load = Load(process)
    with background_threads(*(partial(load.ask, seed) for seed in range(clients))):
        yield load


def test_connections_that_come_together_are_taken_together() -> None:
    """However busy a worker is: it would serve one each time its event loop comes round."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    pairs = [socket.socketpair() for _ in range(100)]
    for _, passed in pairs:
        fd_passing.pass_on(ours, passed)
    ours.send(fd_passing.DRAIN)
    ours.shutdown(socket.SHUT_WR)
    heard = fd_passing.received(theirs)
    assert heard is not None
    letters, connections = heard
    assert letters == 100 * fd_passing.CONNECTION + fd_passing.DRAIN
    for number, ((kept, _), taken) in enumerate(zip(pairs, connections, strict=True)):
        taken.sendall(b"%d" % number)
        assert kept.recv(8) == b"%d" % number
        kept.close()
        taken.close()
    assert fd_passing.received(theirs) is None
    ours.close()
    theirs.close()


def test_connections_are_shared_evenly_and_any_worker_tells_the_sum(
    start: Callable[..., ServerProcess], artifacts: Path
) -> None:
    process = start(artifacts, WORKERS=2)
    process.wait_for_worker()
    before = [sockets(pid) for pid in workers(process)]
    clients = [process.client() for _ in range(10)]
    for number, client in enumerate(clients, 1):
        assert client.post("/encode", content=BODY, headers={"content-type": "application/json"}).status_code == 200
        text = client.get("/metrics").text
        assert f'elbo_rows_total{{endpoint="/encode",model="vae",version="1"}} {number}.0' in text
    opened = [sockets(pid) - number for pid, number in zip(workers(process), before, strict=True)]
    assert opened == [5, 5]
    for client in clients:
        client.close()
    assert process.stop() == 0


def test_a_killed_worker_is_replaced_its_clients_hear_of_it_and_no_count_falls(
    start: Callable[..., ServerProcess], artifacts: Path
) -> None:
    process = start(artifacts, WORKERS=2)
    process.wait_for_worker()
    with loaded(process, 4) as load:
        halves = [process.connect() for _ in range(2)]  # one for each worker
        for half in halves:
            half.sendall(request_head("/encode", f"Content-Length: {len(BODY)}") + BODY[:20])
        wait_until(lambda: load.right > 20)
        before, victim = process.metric_total("elbo_requests_total"), workers(process)[0]
        os.kill(victim, signal.SIGKILL)
        (lost,) = select.select(halves, [], [], 5)[0]
        with suppress(ConnectionError):
            assert lost.recv(1) == b""
        assert process.wait_for_log("it is replaced", pid=victim)["level"] == "error"
        assert process.metric_total("elbo_requests_total") > before
        process.wait_for_log("is ready", level="info")
        assert victim not in workers(process)
        assert len(workers(process)) == 2
        seen = load.right
        wait_until(lambda: load.right > seen + 20)
    assert len(load.wrong) <= 4  # at most the one that each client had under way
    assert process.metric_total("elbo_worker_restarts_total") == 1
    assert process.metric_total("elbo_requests_total") > before
    halves.remove(lost)
    halves[0].sendall(BODY[20:])
    assert read_response(halves[0]).startswith(b"HTTP/1.1 200")
    for half in (lost, *halves):
        half.close()
    assert process.stop() == 0


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("delay", [0, 0.5])
def test_sigterm_under_load_loses_no_request(
    start: Callable[..., ServerProcess], artifacts: Path, count: int, delay: float
) -> None:
    process = start(artifacts, WORKERS=count, DRAIN_SECONDS=delay)
    with loaded(process, 6) as load:
        wait_until(lambda: load.right > 30)
        assert process.stop() == 0
    assert load.wrong == []


LATE = """
import select, signal
from service import settings
from service.monitoring import logs
from service.server import run, supervisor

class Late(supervisor.Supervisor):
    def _listen(self):
        super()._listen()
        signal.raise_signal(signal.SIGTERM)

    def _let_go(self):
        loading = [worker.channel for worker in self._workers.values() if not worker.ready]
        assert loading and select.select(loading, [], [], 60)[0] == loading
        super()._let_go()

options = settings.Settings()
logs.configure(options.log_level, options.log_format)
Late(options, run._bind(options.host, options.port)).run()
"""


def test_a_worker_that_becomes_ready_while_the_rest_ends_is_no_failure(artifacts: Path) -> None:
    """It is killed as one that still loads, and only then it is read that it was ready."""
    environment = os.environ | {
        "ELBO_PORT": "0", "ELBO_WORKERS": "2", "ELBO_DRAIN_SECONDS": "0", "ELBO_ARTIFACTS": str(artifacts),
    }  # fmt: skip
    command = [sys.executable, "-c", LATE]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended
    assert "worker 1 is ready" in ended.stdout


def test_while_it_drains_it_is_not_ready_and_serves_on(start: Callable[..., ServerProcess], artifacts: Path) -> None:
    process = start(artifacts, WORKERS=2, DRAIN_SECONDS=1)
    process.wait_for_worker()
    process.popen.send_signal(signal.SIGTERM)
    process.wait_for_log("stopping")
    for _ in range(2):
        with process.client() as client:
            wait_until(lambda: client.get("/readyz").status_code == 503)
            answer = client.post("/encode", content=BODY, headers={"content-type": "application/json"})
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    assert process.popen.wait(20) == 0


def test_what_keeps_the_workers_from_starting_ends_the_server(artifacts: Path) -> None:
    environment = os.environ | {
        "ELBO_PORT": "0", "ELBO_WORKERS": "2", "ELBO_DEVICE": "cuda", "ELBO_ARTIFACTS": str(artifacts),
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-m", "service"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "cuda was asked for" in ended.stderr


def test_workers_end_when_their_supervisor_is_killed(start: Callable[..., ServerProcess], artifacts: Path) -> None:
    process = start(artifacts, WORKERS=2)
    process.wait_for_worker()
    orphans = workers(process)
    assert len(orphans) == 2
    process.stop(signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{pid}/fd").is_dir() and alive(pid) for pid in orphans))


def alive(pid: int) -> bool:
    """Whether it runs: an orphan may be left as a zombie where nobody reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_answers_of_workers_are_those_of_the_module(
    start: Callable[..., ServerProcess], artifacts: Path, vae: Artifact, digits: np.ndarray
) -> None:
    import torch

    process = start(artifacts, WORKERS=2, BACKEND="torchscript")
    process.wait_for_worker()
    with torch.inference_mode():
        expected = vae.module(torch.from_numpy(digits[:3])).numpy()
    for _ in range(4):
        with process.client() as client:
            answer = client.post("/reconstruct?model=vae", json={"inputs": digits[:3].tolist()})
            np.testing.assert_allclose(answer.json()["outputs"], expected, atol=1e-6)
    assert process.stop() == 0
