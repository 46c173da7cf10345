"""Requests that wait: those whose client leaves are dropped, and those that do not fit are refused."""

import asyncio
from pathlib import Path
from time import perf_counter

import httpx
import numpy as np
import pytest

from service.errors import DeadlineExceeded
from service.settings import Settings
from tests.service.gate import Gate
from tests.service.serving import BODY, REQUEST, ROWS, serving, until


def test_who_leaves_the_queue_is_dropped_before_it_costs_anything(artifacts: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=artifacts)) as (service, port):

            def counted(status: str) -> float:
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
            await until(lambda: counted("499") == 4)
            assert service.batcher.pending_rows == 3
            gate.open.set()
            for reader, writer in connections[4:]:
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")
                writer.close()
            await held
            batches = service.metrics.registry.get_sample_value("elbo_batch_rows_sum", {"operation": "encode"})
            assert batches == 2
            assert counted("200") == 2

    asyncio.run(scenario())


def test_what_does_not_fit_into_the_queue_is_told_when_to_come_back(artifacts: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=artifacts, max_rows=3, queue_rows=3)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), np.repeat(ROWS, 3, axis=0))
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                refused = await client.post("/encode", json={"inputs": ROWS.tolist()})
                gate.open.set()
                await held
                answered = await client.post("/encode", json={"inputs": ROWS.tolist()})
        assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert answered.status_code == 200

    asyncio.run(scenario())


def test_a_deadline_that_passes_in_the_queue_is_a_504_at_once_and_costs_nothing(artifacts: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=artifacts, request_timeout=20)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), ROWS)
            url = f"http://127.0.0.1:{port}/encode"
            async with httpx.AsyncClient(timeout=20) as client:
                json_body = {"inputs": ROWS.tolist()}
                late = await client.post(url, json=json_body, headers={"x-request-timeout": "0.05"})
                assert not gate.open.is_set()
                assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
                assert service.batcher.pending_rows == 1
                refused = await client.post(url, json=json_body, headers={"x-request-timeout": "soon"})
                assert (refused.status_code, refused.json()["code"]) == (422, "invalid_field")
                gate.open.set()
                await held
                assert (await client.post(url, json=json_body)).status_code == 200
            batches = service.metrics.registry.get_sample_value("elbo_batch_rows_sum", {"operation": "encode"})
            assert batches == 1

    asyncio.run(scenario())


def test_a_deadline_that_passes_in_the_model_is_a_504_too(artifacts: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=artifacts)) as (service, _):
            gate = Gate()
            with pytest.raises(DeadlineExceeded):
                await service.batcher.run(service.find(None), gate.operation, ROWS, deadline=perf_counter() + 0.05)
            gate.open.set()

    asyncio.run(scenario())


def test_a_body_that_does_not_come_costs_its_connection_and_nothing_else(artifacts: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=artifacts, request_timeout=0.2)) as (service, port):
            slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
            for _, writer in slow:
                writer.write(REQUEST[:-10])
            async with httpx.AsyncClient(timeout=20) as client:
                answer = await client.post(f"http://127.0.0.1:{port}/encode", json={"inputs": ROWS.tolist()})
            assert answer.status_code == 200
            for reader, writer in slow:
                assert b"408" in await reader.readline()
                assert b"body_too_slow" in await reader.read()  # to the end: the connection is closed
                writer.close()
            assert service.admission.body_bytes.amount == 0

    asyncio.run(scenario())


def test_bodies_beyond_what_may_be_held_are_refused_until_others_have_gone(artifacts: Path) -> None:
    async def scenario() -> None:
        size = 2 * len(BODY)
        settings = Settings(artifacts=artifacts, max_body_bytes=max(size, 1024), held_bytes=max(size, 1024))
        room = settings.held_bytes // len(BODY)
        async with serving(settings) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), ROWS)
            url = f"http://127.0.0.1:{port}/encode"
            async with httpx.AsyncClient(timeout=20) as client:
                tasks = [asyncio.create_task(client.post(url, content=BODY)) for _ in range(room)]
                await until(lambda: service.batcher.pending_rows == 1 + room)
                refused = await client.post(url, content=BODY)
                assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
                assert int(refused.headers["retry-after"]) >= 1
                gate.open.set()
                await held
                assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200] * room
            assert service.admission.body_bytes.amount == 0

    asyncio.run(scenario())
