"""Load test over real sockets: half of the clients disconnect at random moments."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.serving.checking_client import RowPool, send_with_disconnects
from models.artifact import Artifact
from tests.service.process import ServerProcess, server_starter
from tests.service.scrape import scrape, total
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    with server_starter() as start_server:
        yield start_server


@pytest.mark.parametrize("workers", [1, 2])
def test_server_under_random_disconnects_serves_the_remaining_clients_and_releases_all_rows(
    start: Callable[..., ServerProcess], vae_only: Path, vae: Artifact, digits: np.ndarray, workers: int
) -> None:
    process = start(vae_only, WORKERS=workers)
    for _ in range(workers - 1):  # `start` waits for the first worker
        process.wait_for_worker()
    x = digits[:64]
    with torch.inference_mode():
        pool = RowPool(x, vae.module(torch.from_numpy(x)).numpy())
    outcomes = asyncio.run(send_with_disconnects(process.port, pool, "vae", requests=400, concurrency=40, seed=2))
    assert (outcomes.wrong, outcomes.lost, dict(outcomes.statuses)) == (0, 0, {})
    assert outcomes.correct >= 200
    assert outcomes.correct + outcomes.disconnected == 400
    with process.client() as client:
        wait_until(lambda: total(scrape(client), "elbo_pending_rows") == 0)
        assert total(scrape(client), "elbo_pending_bytes") == 0
    assert process.stop() == 0
