"""Requests that wait: those whose client leaves are dropped, and those that do not fit are refused."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import uvicorn

from service.api import Service
from service.app import create_app
from service.settings import Settings
from tests.service.gate import Gate

ROWS = np.full((1, 64), 0.5, np.float32)
BODY = json.dumps({"inputs": ROWS.tolist()}).encode()
REQUEST = b"POST /encode HTTP/1.1\r\nHost: elbo\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[tuple[Service, int]]:
    """The service and its port, in this event loop."""
    app = create_app(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    task = asyncio.create_task(server.serve([listener]))
    await until(lambda: server.started)
    try:
        yield app.state.service, listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_who_leaves_the_queue_is_dropped_before_it_costs_anything(artifacts: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=artifacts)) as (service, port):

            def counted(status: str) -> float:
                labels = {"endpoint": "/encode", "model": "vae", "status": status}
                return service.telemetry.registry.get_sample_value("elbo_requests_total", labels) or 0.0

            gate = Gate()
            held = await gate.hold(service.engine, service.find(None), ROWS)
            connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(6)]
            for _, writer in connections:
                writer.write(REQUEST)
            await until(lambda: service.engine.pending_rows == 7)
            for _, writer in connections[:4]:
                writer.close()
            await until(lambda: counted("499") == 4)
            assert service.engine.pending_rows == 3
            gate.open.set()
            for reader, writer in connections[4:]:
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")
                writer.close()
            await held
            batches = service.telemetry.registry.get_sample_value("elbo_batch_rows_sum", {"operation": "encode"})
            assert batches == 2
            assert counted("200") == 2

    asyncio.run(scenario())


def test_what_does_not_fit_into_the_queue_is_told_when_to_come_back(artifacts: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=artifacts, max_rows=3, queue_rows=3)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.engine, service.find(None), np.repeat(ROWS, 3, axis=0))
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                refused = await client.post("/encode", json={"inputs": ROWS.tolist()})
                gate.open.set()
                await held
                answered = await client.post("/encode", json={"inputs": ROWS.tolist()})
        assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert answered.status_code == 200

    asyncio.run(scenario())
