"""Refusals of requests whose heads were refused before, and answers that are delayed."""

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from service.http import repeated_refusals
from service.http.repeated_refusals import DelayedAnswers, RefusedHeads, delay_of
from service.settings import Settings
from tests.service.gate import Gate
from tests.service.serving import BODY, REQUEST, ROWS, serving

HEADERS = [(b"host", b"here"), (b"content-length", b"4")]
HEAD = b"POST /encode HTTP/1.1\r\nHost: here\r\nContent-Length: 4\r\n\r\n"


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Return the head and the body of the next response."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return head, await reader.readexactly(length)


def test_head_of_a_refused_request_is_found_with_every_body_of_its_length() -> None:
    heads = RefusedHeads()
    heads.remember(HEAD + b"abcd", "/api/encode", "/encode", HEADERS)
    found = heads.find(HEAD + b"wxyz")
    assert found is not None
    assert (found.path, found.endpoint, found.body_bytes) == ("/api/encode", "/encode", 4)


@pytest.mark.parametrize(
    "read", [HEAD + b"abc", HEAD + b"abcde", HEAD, HEAD[:-2], HEAD.replace(b"here", b"HERE") + b"abcd"]
)
def test_read_that_is_not_one_whole_request_with_a_refused_head_is_not_found(read: bytes) -> None:
    heads = RefusedHeads()
    heads.remember(HEAD + b"abcd", "/encode", "/encode", HEADERS)
    assert heads.find(read) is None


@pytest.mark.parametrize(
    ("data", "headers"),
    [
        (HEAD + b"abcd" + HEAD, HEADERS),
        (HEAD + b"ab", HEADERS),
        (b"\r\n" + HEAD + b"abcd", HEADERS),
        (HEAD.replace(b"here\r\n", b"here\n") + b"abcd", HEADERS),
        (HEAD + b"abcd", [*HEADERS, (b"content-length", b"4")]),
        (HEAD + b"abcd", [*HEADERS, (b"connection", b"close")]),
        (HEAD + b"abcd", [*HEADERS, (b"x-request-id", b"mine")]),
        (HEAD + b"abcd", [*HEADERS, (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]),
        (HEAD + b"abcd", [*HEADERS, (b"expect", b"100-continue")]),
        (HEAD + b"abcd", [(b"transfer-encoding", b"chunked")]),
    ],
)
def test_head_is_not_remembered_if_more_than_the_head_matters(data: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    heads = RefusedHeads()
    heads.remember(data, "/encode", "/encode", headers)
    assert not heads


def test_oldest_head_is_forgotten_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated_refusals, "MAX_HEADS", 2)
    heads = RefusedHeads()
    reads = [HEAD.replace(b"here", name) + b"abcd" for name in (b"a", b"b", b"c")]
    for read in reads:
        heads.remember(read, "/encode", "/encode", HEADERS)
    assert [heads.find(read) is not None for read in reads] == [False, True, True]


def test_answers_are_delayed_twice_as_long_each_time_up_to_a_limit() -> None:
    held = [delay_of(number) for number in range(40)]
    assert held[0] == 0
    assert held[1] == repeated_refusals.DELAY_SECONDS[0]
    assert all(late == min(2 * early, repeated_refusals.DELAY_SECONDS[1]) for early, late in pairwise(held[1:]))
    assert held[-1] == repeated_refusals.DELAY_SECONDS[1]


def test_answer_is_sent_at_once_if_too_many_others_are_delayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated_refusals, "MAX_DELAYED", 1)

    async def scenario() -> None:
        answers = DelayedAnswers()
        sent: list[int] = []
        first = answers.delay(3, lambda: sent.append(1))
        assert first is not None
        assert answers.delay(3, lambda: sent.append(2)) is None
        answers.release(first)
        again = answers.delay(1, lambda: sent.append(3))
        assert again is not None
        await asyncio.sleep(0.05)
        assert sent == [3]

    asyncio.run(scenario())


@pytest.mark.slow
def test_connection_that_is_refused_again_and_again_gets_every_answer_later_and_is_served_when_there_is_room(
    vae_only: Path,
) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=vae_only, max_rows=3, queue_rows=3)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), np.repeat(ROWS, 3, axis=0))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            seconds, ids = [], set()
            for _ in range(10):
                started = perf_counter()
                writer.write(REQUEST)
                head, body = await read_answer(reader)
                seconds.append(perf_counter() - started)
                assert head.startswith(b"HTTP/1.1 429 ")
                content = json.loads(body)
                assert content["code"] == "overloaded"
                assert f"x-request-id: {content['request_id']}".encode() in head
                ids.add(content["request_id"])
            assert len(ids) == 10
            assert all(measured >= delay_of(number) for number, measured in enumerate(seconds))
            writer.write(REQUEST + REQUEST)  # the second request does not wait for the answer that is held
            for _ in range(2):
                head, _ = await read_answer(reader)
                assert head.startswith(b"HTTP/1.1 429 ")
            labels = {"endpoint": "/encode", "model": "", "version": "", "status": "429"}
            assert service.metrics.registry.get_sample_value("elbo_requests_total", labels) == 12
            gate.open.set()
            await held
            writer.write(REQUEST)
            head, body = await read_answer(reader)
            assert head.startswith(b"HTTP/1.1 200 ")
            assert len(json.loads(body)["latents"]) == len(ROWS) == len(json.loads(BODY)["inputs"])
            writer.close()

    asyncio.run(scenario())


@pytest.mark.slow
def test_delayed_answer_is_sent_when_the_client_ends_its_side_of_the_connection(
    vae_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeated_refusals, "DELAY_SECONDS", (60.0, 60.0))
    delay_of.cache_clear()

    async def scenario() -> None:
        async with serving(Settings(artifacts=vae_only, max_rows=3, queue_rows=3)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), np.repeat(ROWS, 3, axis=0))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(REQUEST)
            await read_answer(reader)
            writer.write(REQUEST)
            await asyncio.sleep(0.1)
            writer.write_eof()
            head, _ = await asyncio.wait_for(read_answer(reader), 10)
            assert head.startswith(b"HTTP/1.1 429 ")
            gate.open.set()
            await held
            writer.close()

    try:
        asyncio.run(scenario())
    finally:
        delay_of.cache_clear()
