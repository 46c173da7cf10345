"""Equal requests get equal responses.

Responses are bit-exact if each request runs alone. If requests share batches, the numbers agree within 1e-6, and the
numbers of /anomaly within a relative error of 1e-4. Samples with a seed are always bit-exact.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.app import create_app
from service.settings import Settings
from tests.plain_http import NO_AUTHORITIES
from tests.service.running import running

PATHS = ["/encode", "/reconstruct", "/anomaly", "/interpolate", "/sample"]


def random_body(rng: np.random.Generator, digits: np.ndarray, path: str) -> dict[str, Any]:
    def random_rows(n: int) -> list[list[float]]:
        rows: list[list[float]] = digits[rng.integers(0, len(digits), n)].tolist()
        return rows

    if path == "/sample":
        return {"n": int(rng.integers(1, 30)), "seed": int(rng.integers(0, 2**53))}
    if path == "/interpolate":
        start, end = random_rows(2)
        return {"start": {"input": start}, "end": {"input": end}, "steps": int(rng.integers(2, 20)), "method": "slerp"}
    return {"inputs": random_rows(int(rng.choice([1, 1, 1, 2, 7, 40])))}


@pytest.fixture(scope="module")
def small_batches(artifacts: Path) -> Iterator[httpx.Client]:
    """Return a client of a service whose batches are so small that it splits large requests and merges small ones."""
    with running(create_app(Settings(artifacts=artifacts, max_batch_rows=32))) as client:
        yield client


def numbers(value: Any) -> list[float]:
    """Return every number in a response, in order."""
    if isinstance(value, dict):
        return [number for inner in value.values() for number in numbers(inner)]
    if isinstance(value, list):
        return [number for inner in value for number in numbers(inner)]
    return [float(value)] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("model", ["pca", "ae", "vae"])
def test_repeated_request_gives_the_same_bytes(client: httpx.Client, digits: np.ndarray, path: str, model: str) -> None:
    body = random_body(np.random.default_rng(3), digits, path)
    first = client.post(path, json=body, params={"model": model})
    assert first.status_code == 200
    assert {client.post(path, json=body, params={"model": model}).content for _ in range(5)} == {first.content}


def test_concurrent_requests_get_the_same_responses_as_sequential_requests(
    small_batches: httpx.Client, digits: np.ndarray
) -> None:
    rng = np.random.default_rng(0)
    requests = []
    for _ in range(200):
        path = PATHS[rng.integers(len(PATHS))]
        requests.append((path, str(rng.choice(["pca", "vae"])), random_body(rng, digits, path)))

    def send(request: tuple[str, str, dict[str, Any]]) -> httpx.Response:
        path, model, body = request
        return small_batches.post(path, json=body, params={"model": model})

    alone = [send(request) for request in requests]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(send, requests))
    for (path, _, _), first, second in zip(requests, alone, together, strict=True):
        assert first.status_code == second.status_code == 200
        if path == "/sample":
            assert first.content == second.content
            continue
        a, b = np.array(numbers(first.json())), np.array(numbers(second.json()))
        if path == "/anomaly":  # scores are large, so compare their relative errors
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_concurrent_requests_share_batches(small_batches: httpx.Client, digits: np.ndarray) -> None:
    async def send_all() -> None:
        async with httpx.AsyncClient(verify=NO_AUTHORITIES, base_url=small_batches.base_url, timeout=30) as client:
            body = {"inputs": digits[:1].tolist()}
            await asyncio.gather(*(client.post("/encode", json=body) for _ in range(60)))

    asyncio.run(send_all())
    text = small_batches.get("/metrics").text
    found = {
        line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("elbo_batch_rows")
    }
    assert found['elbo_batch_rows_sum{operation="encode"}'] > found['elbo_batch_rows_count{operation="encode"}']
