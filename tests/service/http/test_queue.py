"""Requests in the queue: disconnected clients, deadlines, slow bodies, and requests that do not fit."""

import asyncio
from pathlib import Path
from time import perf_counter

import httpx
import numpy as np
import pytest

from service.errors import DeadlineExceeded
from service.settings import Settings
from tests.plain_http import NO_AUTHORITIES
from tests.service.gate import Gate
from tests.service.serving import BODY, REQUEST, ROWS, serving, until

pytestmark = pytest.mark.slow


def test_request_of_a_disconnected_client_is_dropped_from_the_queue_before_it_runs(vae_only: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=vae_only)) as (service, port):

            def requests_with(status: str) -> float:
                labels = {"endpoint": "/encode", "model": "vae", "version": "1", "status": status}
                return service.metrics.registry.get_sample_value("elbo_requests_total", labels) or 0.0

            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), ROWS)
            connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(6)]
            for _, writer in connections:
                writer.write(REQUEST)
            await until(lambda: service.batcher.pending_rows == 7)
            for _, writer in connections[:4]:
                writer.close()
            await until(lambda: requests_with("499") == 4)
            assert service.batcher.pending_rows == 3
            gate.open.set()
            for reader, writer in connections[4:]:
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")
                writer.close()
            await held
            encoded_rows = service.metrics.registry.get_sample_value("elbo_batch_rows_sum", {"operation": "encode"})
            assert encoded_rows == 2
            assert requests_with("200") == 2

    asyncio.run(scenario())


def test_request_gets_429_with_a_retry_after_if_the_queue_is_full(vae_only: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=vae_only, max_rows=3, queue_rows=3)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), np.repeat(ROWS, 3, axis=0))
            async with httpx.AsyncClient(
                verify=NO_AUTHORITIES, base_url=f"http://127.0.0.1:{port}", timeout=20
            ) as client:
                refused = await client.post("/encode", json={"inputs": ROWS.tolist()})
                gate.open.set()
                await held
                accepted = await client.post("/encode", json={"inputs": ROWS.tolist()})
        assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert accepted.status_code == 200

    asyncio.run(scenario())


def test_request_gets_504_at_once_and_never_runs_if_its_deadline_passes_in_the_queue(vae_only: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=vae_only, request_timeout=20)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), ROWS)
            url = f"http://127.0.0.1:{port}/encode"
            async with httpx.AsyncClient(verify=NO_AUTHORITIES, timeout=20) as client:
                json_body = {"inputs": ROWS.tolist()}
                timed_out = await client.post(url, json=json_body, headers={"x-request-timeout": "0.05"})
                assert not gate.open.is_set()
                assert (timed_out.status_code, timed_out.json()["code"]) == (504, "deadline_exceeded")
                assert service.batcher.pending_rows == 1
                refused = await client.post(url, json=json_body, headers={"x-request-timeout": "soon"})
                assert (refused.status_code, refused.json()["code"]) == (422, "invalid_field")
                gate.open.set()
                await held
                assert (await client.post(url, json=json_body)).status_code == 200
            encoded_rows = service.metrics.registry.get_sample_value("elbo_batch_rows_sum", {"operation": "encode"})
            assert encoded_rows == 1

    asyncio.run(scenario())


def test_job_raises_deadline_exceeded_if_its_deadline_passes_while_the_model_runs(vae_only: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=vae_only)) as (service, _):
            gate = Gate()
            with pytest.raises(DeadlineExceeded):
                await service.batcher.run(service.find(None), gate.operation, ROWS, deadline=perf_counter() + 0.05)
            gate.open.set()

    asyncio.run(scenario())


def test_only_the_connection_whose_body_does_not_arrive_gets_408_and_is_closed(vae_only: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=vae_only, request_timeout=1.0)) as (service, port):
            slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
            for _, writer in slow:
                writer.write(REQUEST[:-10])
            async with httpx.AsyncClient(verify=NO_AUTHORITIES, timeout=20) as client:
                response = await client.post(f"http://127.0.0.1:{port}/encode", json={"inputs": ROWS.tolist()})
            assert response.status_code == 200
            for reader, writer in slow:
                assert b"408" in await reader.readline()
                assert b"body_too_slow" in await reader.read()  # read() ends because the server closes the connection
                writer.close()
            assert service.admission.body_bytes.amount == 0

    asyncio.run(scenario())


def test_body_is_refused_while_other_bodies_fill_the_limit_on_held_bytes(vae_only: Path) -> None:
    async def scenario() -> None:
        size = 2 * len(BODY)
        settings = Settings(artifacts=vae_only, max_body_bytes=max(size, 1024), held_bytes=max(size, 1024))
        capacity = settings.held_bytes // len(BODY)
        async with serving(settings) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), ROWS)
            url = f"http://127.0.0.1:{port}/encode"
            async with httpx.AsyncClient(
                verify=NO_AUTHORITIES, timeout=20, headers={"content-type": "application/json"}
            ) as client:
                tasks = [asyncio.create_task(client.post(url, content=BODY)) for _ in range(capacity)]
                await until(lambda: service.batcher.pending_rows == 1 + capacity)
                refused = await client.post(url, content=BODY)
                assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
                assert int(refused.headers["retry-after"]) >= 1
                gate.open.set()
                await held
                assert [response.status_code for response in await asyncio.gather(*tasks)] == [200] * capacity
            assert service.admission.body_bytes.amount == 0

    asyncio.run(scenario())


def test_request_that_is_refused_before_its_handler_runs_frees_its_place_in_the_queue(vae_only: Path) -> None:
    """3,000 such requests once made the server refuse all others with 429 until it was restarted."""

    async def scenario() -> None:
        async with serving(Settings(artifacts=vae_only)) as (service, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(3):
                writer.write(REQUEST.replace(b"Host: elbo\r\n", b""))
                assert (await reader.readline()).startswith(b"HTTP/1.1 400")
                await reader.read(65536)
                writer.close()
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            await until(lambda: service.admission.requests.amount == 0)

    asyncio.run(scenario())
