"""Many small requests for large answers arrive at once, while other clients are served."""

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

pytestmark = pytest.mark.slow

REQUESTS = 60
ROWS = 10_000  # as in REQUEST
FEATURES = 200
STALL_SECONDS = 0.25  # on a machine with other work; benchmarks/serving/hostile_requests.py measures 50 ms


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Yield a server whose queue has room for one request of ROWS rows."""
    root = tmp_path_factory.mktemp("artifacts")
    x = np.random.default_rng(0).normal(size=(400, FEATURES)).astype(np.float32)
    names = [f"x{index}" for index in range(FEATURES)]
    missing = np.zeros(FEATURES, np.int64)
    table = Table(RowStore(x), (FEATURES,), names, [None] * FEATURES, None, None, "made up", missing=missing)
    train(TrainConfig(model="pca", name="wide", latents=2), table, root, RecordingReporter())
    with server_starter() as start:
        yield start(root, QUEUE_ROWS=ROWS, DEFAULT_MODEL="wide")


REQUEST = (
    b"POST /sample HTTP/1.1\r\nHost: elbo\r\nContent-Type: application/json\r\nAccept: application/x-npy\r\n"
    b'Connection: close\r\nContent-Length: 20\r\n\r\n{"n":10000,"seed":3}'
)


def sample(server: ServerProcess) -> tuple[int, bytes]:
    """Return the status and the content of an answer to REQUEST."""
    with server.connect() as connection:  # creating 60 clients of httpx would delay the thread that asks for /livez
        connection.sendall(REQUEST)
        response = b"".join(iter(lambda: connection.recv(2**20), b""))
    return int(response.split()[1]), response.partition(b"\r\n\r\n")[2]


def test_livez_answers_while_many_clients_ask_for_as_many_samples_as_possible(server: ServerProcess) -> None:
    alone = sample(server)
    waits: list[float] = []

    def ask_livez(stop: threading.Event) -> None:
        with server.client() as client:
            while not stop.is_set():
                started = perf_counter()
                client.get("/livez")
                waits.append(perf_counter() - started)
                sleep(0.01)

    with background_threads(ask_livez), ThreadPoolExecutor(REQUESTS) as clients:
        sleep(0.2)
        responses = [future.result() for future in [clients.submit(sample, server) for _ in range(REQUESTS)]]
    assert max(waits) < STALL_SECONDS
    assert {status for status, _ in responses} == {200, 429}
    assert {content for status, content in responses if status == 200} == {alone[1]}
