"""The limit on open connections, and how workers share connections."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from service.inference.trial import KEEPER_PROCESS_NAME
from tests.conftest import require
from tests.service.process import ServerProcess, server_starter
from tests.service.raw_http import read_response, request_head
from tests.service.scrape import scrape, total
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.alone]

FILES = 256  # limit on open files of the servers
LIVEZ = b"GET /livez HTTP/1.1\r\nHost: elbo\r\n\r\n"
STRANGERS = {
    "silent": b"",
    "half a head": LIVEZ[:-4],
    "idle": LIVEZ,
    "half a body": request_head("/encode", "Content-Length: 100") + b"{",
    "refused body": request_head("/no/such/path", "Content-Length: 100"),
    "unread response": request_head("/sample", "Content-Length: 11") + b'{"n": 1000}',
}


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    with server_starter() as start_server:
        yield start_server


def start_with_few_files(
    start: Callable[..., ServerProcess], artifacts: Path, files: int = FILES, **settings: object
) -> ServerProcess:
    limit = ["prlimit", f"--nofile={files}"]
    require(subprocess.run([*limit, "true"], check=False).returncode == 0, "the test needs prlimit of util-linux")
    return start(artifacts, prefix=limit, **settings)


def open_files(pid: int) -> int:
    descriptors = Path(f"/proc/{pid}/fd")
    require(descriptors.is_dir(), "the test reads /proc")
    return len(list(descriptors.iterdir()))


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def connect_strangers(process: ServerProcess, sent: bytes, count: int) -> list[socket.socket]:
    connections = []
    for _ in range(count):
        with suppress(OSError):
            connections.append(process.connect())
            connections[-1].sendall(sent)
    return connections


@pytest.mark.parametrize("sent", STRANGERS.values(), ids=[name.replace(" ", "-") for name in STRANGERS])
def test_server_answers_and_logs_one_error_if_strangers_open_too_many_connections(
    start: Callable[..., ServerProcess], pca_only: Path, sent: bytes
) -> None:
    process = start_with_few_files(start, pca_only)
    strangers = connect_strangers(process, sent, 2 * FILES)
    time.sleep(1.1)  # until a request whose body does not arrive counts as slow
    for _ in range(20):
        with process.client() as client:
            assert client.get("/livez").status_code == 200
            assert client.post("/sample", json={"n": 1}).status_code == 200
            assert total(scrape(client), "elbo_connections") <= FILES - 100
    assert open_files(process.popen.pid) < FILES - 20
    line = process.wait_for_log("reached its limit of 156 open connections (ELBO_MAX_CONNECTIONS)")
    assert line["level"] == "error"
    assert "ulimit -n" in line["message"]
    for connection in strangers:
        connection.close()
    assert process.stop() == 0
    process.wait_for_log("Finished server process")
    errors = [line for line in process.lines if line["level"] == "error"]
    assert len(errors) == 1, errors


def test_new_connection_waits_without_load_until_another_connection_may_be_closed(
    start: Callable[..., ServerProcess], pca_only: Path
) -> None:
    """No open connection may be closed at first: a body that has begun to arrive counts as slow after a second."""
    process = start(pca_only, MAX_CONNECTIONS=4)
    strangers = connect_strangers(process, STRANGERS["half a body"], 4)
    time.sleep(0.1)
    before = cpu_seconds(process.popen.pid)
    with process.connect() as connection:
        connection.sendall(LIVEZ)
        started = time.monotonic()
        assert read_response(connection).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - started > 0.2
    assert cpu_seconds(process.popen.pid) - before < 0.5
    for stranger in strangers:
        stranger.close()


def test_idle_connections_are_closed_before_those_that_are_used(
    start: Callable[..., ServerProcess], pca_only: Path
) -> None:
    process = start(pca_only, MAX_CONNECTIONS=50)
    strangers: list[socket.socket] = []
    with process.client() as client:
        assert client.get("/livez").status_code == 200
        with process.connect() as used:
            for _ in range(10):
                strangers += connect_strangers(process, LIVEZ, 10)
                time.sleep(0.1)
                used.sendall(LIVEZ)
                assert read_response(used).startswith(b"HTTP/1.1 200")
        assert total(scrape(client), "elbo_connections") <= 50
    for stranger in strangers:
        stranger.close()


def test_server_warns_if_it_may_open_fewer_files_than_max_connections_needs(
    start: Callable[..., ServerProcess], pca_only: Path
) -> None:
    process = start_with_few_files(start, pca_only, MAX_CONNECTIONS=1000)
    warnings = [line["message"] for line in process.lines if line["level"] == "warning"]
    assert any("ELBO_MAX_CONNECTIONS is 1000, but only 256 files may be open" in message for message in warnings)
    assert any("ulimit -n" in message and "1100" in message for message in warnings)


def test_server_accepts_again_after_it_had_no_free_file(start: Callable[..., ServerProcess], pca_only: Path) -> None:
    """The limit on open files is lowered while the server runs, below the files that it has open."""
    process = start_with_few_files(start, pca_only)
    pid = process.popen.pid
    with process.client() as client:
        assert client.get("/livez").status_code == 200
        subprocess.run(["prlimit", f"--pid={pid}", f"--nofile={open_files(pid)}:{FILES}"], check=True)
        before = cpu_seconds(pid)
        waiting = connect_strangers(process, LIVEZ, 20)
        assert process.wait_for_log("cannot accept connections (Too many open files)")["level"] == "error"
        time.sleep(1)
        assert cpu_seconds(pid) - before < 0.5
        subprocess.run(["prlimit", f"--pid={pid}", f"--nofile={FILES}:{FILES}"], check=True)
        for connection in waiting:
            assert read_response(connection).startswith(b"HTTP/1.1 200")
            connection.close()
    assert process.stop() == 0


def test_no_worker_exceeds_the_limit_on_connections(start: Callable[..., ServerProcess], pca_only: Path) -> None:
    process = start_with_few_files(start, pca_only, WORKERS=2)
    process.wait_for_worker()
    strangers = connect_strangers(process, b"", 3 * FILES)
    for _ in range(20):
        with process.client() as client:
            assert client.get("/livez").status_code == 200
    for pid in worker_pids(process):
        assert open_files(pid) < FILES - 20
    for stranger in strangers:
        stranger.close()
    assert process.stop() == 0


def test_workers_share_the_connections_equally_after_one_was_replaced(
    start: Callable[..., ServerProcess], pca_only: Path
) -> None:
    process = start(pca_only, WORKERS=2)
    process.wait_for_worker()
    clients = [process.client() for _ in range(12)]

    def send_requests() -> None:
        for client in clients:
            with suppress(Exception):  # the connection of a killed worker
                client.get("/livez")

    send_requests()
    os.kill(worker_pids(process)[0], signal.SIGKILL)
    process.wait_for_log("it is replaced")
    send_requests()
    send_requests()  # every client now has a connection to the worker that was not killed
    process.wait_for_log("is ready")

    def connections() -> list[int]:
        send_requests()
        return sorted(sockets_to_clients(pid, process.port) for pid in worker_pids(process))

    wait_until(lambda: connections() == [6, 6])
    assert all(client.get("/livez").status_code == 200 for client in clients)
    for client in clients:
        client.close()
    assert process.stop() == 0


def worker_pids(process: ServerProcess) -> list[int]:
    pid = process.popen.pid
    children = Path(f"/proc/{pid}/task/{pid}/children")
    require(children.is_file(), "the test reads /proc")
    names = {child: Path(f"/proc/{child}/comm").read_text().strip() for child in children.read_text().split()}
    return [int(child) for child, name in names.items() if name != KEEPER_PROCESS_NAME]  # without the trial process


def sockets_to_clients(pid: int, port: int) -> int:
    """Return how many open connections of the server's port the process has."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {line[9] for line in lines if line[3] == "01" and int(line[1].rpartition(":")[2], 16) == port}
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            count += str(entry.readlink()).removeprefix("socket:[").removesuffix("]") in inodes
    return count
