"""A storm over real sockets: half of the clients leave at random moments, and nobody else notices."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.serving.client import Pool, storm
from models.artifact import Artifact
from tests.service.process import Process, starter, wait_until
from tests.service.server.test_supervisor import both_ready, counted


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    with starter() as begin:
        yield begin


@pytest.mark.parametrize("count", [1, 2])
def test_every_answer_to_those_who_stay_is_right_and_nothing_is_left_behind(
    start: Callable[..., Process], artifacts: Path, vae: Artifact, digits: np.ndarray, count: int
) -> None:
    process = start(artifacts, WORKERS=count)
    if count > 1:
        both_ready(process)
    x = digits[:64]
    with torch.inference_mode():
        pool = Pool(x, vae.module(torch.from_numpy(x)).numpy())
    seen = asyncio.run(storm(process.port, pool, "vae", requests=400, together=40, seed=2))
    assert (seen.wrong, seen.lost, dict(seen.statuses)) == (0, 0, {})
    assert seen.right >= 200
    assert seen.right + seen.left == 400
    wait_until(lambda: counted(process, "elbo_pending_rows") == 0)
    assert counted(process, "elbo_pending_bytes") == 0
    assert process.end() == 0
