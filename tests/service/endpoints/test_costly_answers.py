"""Many small requests for large answers arrive at once, while other clients are served."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter, sleep

import numpy as np
import pytest

from tests.service.process import ServerProcess, background_threads, server_starter
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Table
from training.train import train

pytestmark = [pytest.mark.slow, pytest.mark.alone]

REQUESTS = 60
SCRAPES = 250  # a scrape takes about 3 ms
ROWS = 10_000  # as in REQUEST
FEATURES = 1000
STALL_SECONDS = 1.0  # earlier releases stalled for several; benchmarks/serving/hostile_requests.py measures it


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Yield a server whose queue has room for one request of ROWS rows, and for small requests."""
    root = tmp_path_factory.mktemp("artifacts")
    x = np.random.default_rng(0).normal(size=(400, FEATURES)).astype(np.float32)
    names = [f"x{index}" for index in range(FEATURES)]
    missing = np.zeros(FEATURES, np.int64)
    table = Table(RowStore(x), (FEATURES,), names, [None] * FEATURES, None, None, "made up", missing=missing)
    train(TrainConfig(model="pca", name="wide", latents=2), table, root, RecordingReporter())
    with server_starter() as start:
        yield start(root, QUEUE_ROWS=2 * ROWS, DEFAULT_MODEL="wide")


REQUEST = (
    b"POST /sample HTTP/1.1\r\nHost: elbo\r\nContent-Type: application/json\r\nAccept: application/x-npy\r\n"
    b'Connection: close\r\nContent-Length: 20\r\n\r\n{"n":10000,"seed":3}'
)


SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: elbo\r\nConnection: close\r\n\r\n"


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Return the status and the content of the answer on `connection`."""
    response = b"".join(iter(lambda: connection.recv(2**20), b""))
    connection.close()
    return int(response.split()[1]), response.partition(b"\r\n\r\n")[2]


def answers_while_livez_is_served(server: ServerProcess, request: bytes, count: int) -> list[tuple[int, bytes]]:
    """Send `request` `count` times at once, and return the answers.

    Meanwhile, another client asks for /livez and scores single rows. Assert that it never waits long for /livez, and
    that none of its rows is refused.
    """
    waits: list[float] = []
    statuses: list[int] = []
    row = {"inputs": [[0.0] * FEATURES]}

    def ask_livez(stop: threading.Event) -> None:
        with server.client() as client:
            while not stop.is_set():
                started = perf_counter()
                client.get("/livez")
                waits.append(perf_counter() - started)
                statuses.append(client.post("/anomaly", json=row).status_code)
                sleep(0.01)

    with background_threads(ask_livez), ThreadPoolExecutor(count) as clients:
        connections = [server.connect() for _ in range(count)]
        sleep(0.2)
        for connection in connections:
            connection.sendall(request)
        answers = list(clients.map(read_answer, connections))
    assert max(waits) < STALL_SECONDS
    assert set(statuses) == {200}
    return answers


def test_livez_answers_while_many_clients_ask_for_as_many_samples_as_possible(server: ServerProcess) -> None:
    connection = server.connect()
    connection.sendall(REQUEST)
    _, alone = read_answer(connection)
    answers = answers_while_livez_is_served(server, REQUEST, REQUESTS)
    assert {status for status, _ in answers} == {200, 429}
    assert {content for status, content in answers if status == 200} == {alone}


def test_livez_answers_while_many_clients_scrape_the_metrics(server: ServerProcess) -> None:
    answers = answers_while_livez_is_served(server, SCRAPE, SCRAPES)
    assert all(status == 200 and b"elbo_model_info{" in content for status, content in answers)
