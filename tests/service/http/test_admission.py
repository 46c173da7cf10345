"""The line at the admission: whoever would wait too long in it is turned away at once, at the head of the request."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import httpx
import numpy as np
import pytest
import torch

from models.artifact import Artifact
from service.http.admission import TOGETHER
from service.settings import Settings
from tests.service.gate import Gate
from tests.service.http.test_queue import BODY, REQUEST, ROWS, serving, until
from tests.service.process import ServerProcess, server_starter

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
HttpResponse = tuple[int, dict[str, str], bytes]


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    with server_starter() as begin:
        yield begin


async def answer_of(reader: asyncio.StreamReader) -> HttpResponse:
    """Status, headers and body."""
    status = int((await reader.readline()).split()[1])
    headers = {}
    while line := (await reader.readline()).decode().strip():
        name, _, value = line.partition(": ")
        headers[name.lower()] = value
    return status, headers, await reader.readexactly(int(headers["content-length"]))


async def rounds(port: int, request: bytes, clients: int, times: int) -> list[tuple[HttpResponse, float]]:
    """Answers to `clients` that ask all at once, `times` times, and the seconds that each took."""
    streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(clients)]

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[HttpResponse, float]:
        sent = perf_counter()
        writer.write(request)
        return await answer_of(reader), perf_counter() - sent

    seen = [pair for _ in range(times) for pair in await asyncio.gather(*[ask(*each) for each in streams])]
    for _, writer in streams:
        writer.close()
    return seen


def test_a_flood_is_turned_away_at_once_and_who_is_let_in_is_answered(
    start: Callable[..., ServerProcess], artifacts: Path, vae: Artifact
) -> None:
    process = start(artifacts, QUEUE_SECONDS=0.001)
    request = REQUEST.replace(b"/encode", b"/reconstruct?model=vae")
    with torch.inference_mode():
        expected = vae.module(torch.from_numpy(ROWS)).numpy()
    seen = asyncio.run(rounds(process.port, request, 6 * TOGETHER, 8))
    refused = [(answer, seconds) for answer, seconds in seen if answer[0] == 429]
    assert {answer[0] for answer, _ in seen} == {200, 429}
    assert len(refused) < len(seen) - 8 * TOGETHER / 2  # work goes on meanwhile
    for (status, headers, body), _ in seen:
        told = json.loads(body)
        if status == 200:
            np.testing.assert_allclose(told["outputs"], expected, atol=1e-5)
        else:
            assert (told["code"], told["request_id"]) == ("overloaded", headers["x-request-id"])
            assert int(headers["retry-after"]) >= 1
            assert headers["content-type"] == "application/problem+json"
    assert max(seconds for _, seconds in refused) < 2
    with process.client() as client:
        assert client.post("/encode", content=BODY).status_code == 200
        text = client.get("/metrics").text
    assert "elbo_pending_rows 0.0" in text
    problems = re.findall(r'^elbo_problems_total\{code="overloaded".*\} (\S+)$', text, re.MULTILINE)
    assert sum(map(float, problems)) == len(refused)
    assert process.stop() == 0


async def connected(port: int) -> Streams:
    return await asyncio.open_connection("127.0.0.1", port)


def test_who_is_turned_away_hears_of_it_before_the_body_and_may_ask_again(artifacts: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=artifacts, max_rows=3, queue_rows=3)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), np.repeat(ROWS, 3, axis=0))
            reader, writer = await connected(port)
            for _ in range(2):
                writer.write(REQUEST[:-40].replace(b"Host", b'X-Request-Id: a"b\r\nHost'))
                status, headers, body = await answer_of(reader)
                assert (status, headers["x-request-id"]) == (429, 'a"b')
                assert json.loads(body)["request_id"] == 'a"b'
                writer.write(REQUEST[-40:])
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                assert (await client.get("/readyz")).status_code == 200
                assert (await client.get("/encode")).status_code == 405
            gate.open.set()
            await held
            writer.write(REQUEST)
            assert (await answer_of(reader))[0] == 200
            writer.close()
            assert service.admission.waiting == 0

    asyncio.run(scenario())


def test_a_full_queue_holds_a_stream_back_instead_of_turning_it_away(artifacts: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=artifacts, max_rows=3, queue_rows=3)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), np.repeat(ROWS, 3, axis=0))
            kind = "application/x-ndjson"
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                line = json.dumps(ROWS[0].tolist()).encode() + b"\n"
                post = client.post("/anomaly", content=line, headers={"content-type": kind, "accept": kind})
                stream = asyncio.create_task(post)
                await asyncio.sleep(0.2)
                gate.open.set()
                await held
                answer = await stream
            assert answer.status_code == 200
            assert json.loads(answer.text.splitlines()[-1])["rows"] == 1

    asyncio.run(scenario())


def test_a_deadline_that_passes_in_the_line_is_a_504_and_the_others_keep_their_places(artifacts: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=artifacts)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), ROWS)
            streams = [await connected(port) for _ in range(TOGETHER + 3)]
            for _, writer in streams:
                writer.write(REQUEST)
            await until(lambda: service.admission.waiting == len(streams))
            assert service.batcher.pending_rows == 1 + TOGETHER
            reader, writer = await connected(port)
            writer.write(REQUEST.replace(b"Host", b"X-Request-Timeout: 0.1\r\nHost"))
            status, _, body = await answer_of(reader)
            assert (status, json.loads(body)["code"]) == (504, "deadline_exceeded")
            writer.close()
            gate.open.set()
            await held
            for reader, writer in streams:
                assert (await answer_of(reader))[0] == 200
                writer.close()
            assert service.admission.waiting == 0

    asyncio.run(scenario())


def test_bodies_that_do_not_come_stand_in_nobodys_way(artifacts: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=artifacts, queue_seconds=0.001)) as (service, port):
            slow = [await connected(port) for _ in range(2 * TOGETHER)]
            for _, writer in slow:
                writer.write(REQUEST[:-10])
            answered = await rounds(port, REQUEST, 1, 2000)
            assert {status for (status, _, _), _ in answered} == {200}
            assert service.admission.waiting == 0
            for _, writer in slow:
                writer.close()

    asyncio.run(scenario())
