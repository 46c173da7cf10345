"""Admission control: which requests are refused, when, and with which response."""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import torch

from models.artifact import Artifact
from service.errors import DeadlineExceeded, Overloaded
from service.http.admission import WORK_SLOTS, AdmissionControl
from service.inference.backend_selection import select_backend
from service.inference.batch_queue import BatchResult
from service.inference.batcher import Batcher
from service.inference.operations import Operation, reconstruct
from service.settings import Settings
from tests.plain_http import NO_AUTHORITIES
from tests.service.batching import BareModel, random_rows, running_batcher
from tests.service.gate import Gate
from tests.service.process import ServerProcess, server_starter
from tests.service.serving import BODY, REQUEST, ROWS, serving, until

pytestmark = pytest.mark.slow

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Response = tuple[int, dict[str, str], bytes]  # status, headers, body


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    with server_starter() as start_server:
        yield start_server


async def connect(port: int) -> Connection:
    return await asyncio.open_connection("127.0.0.1", port)


async def read_response(reader: asyncio.StreamReader) -> Response:
    status = int((await reader.readline()).split()[1])
    headers = {}
    while line := (await reader.readline()).decode().strip():
        name, _, value = line.partition(": ")
        headers[name.lower()] = value
    return status, headers, await reader.readexactly(int(headers["content-length"]))


async def send_rounds(port: int, request: bytes, clients: int, rounds: int) -> list[tuple[Response, float]]:
    """Send `request` on `clients` connections at once, `rounds` times; return each response and its time in seconds."""
    connections = [await connect(port) for _ in range(clients)]

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[Response, float]:
        sent = perf_counter()
        writer.write(request)
        return await read_response(reader), perf_counter() - sent

    timed = [
        pair for _ in range(rounds) for pair in await asyncio.gather(*[send(*connection) for connection in connections])
    ]
    for _, writer in connections:
        writer.close()
    return timed


def admission_for(batcher: Batcher, max_rows: int = 1000, max_wait: float = 3600) -> AdmissionControl:
    return AdmissionControl(batcher, max_rows=max_rows, max_wait=max_wait, max_held_bytes=2**20)


async def run_if_admitted(
    admission: AdmissionControl, batcher: Batcher, model: BareModel, operation: Operation, x: np.ndarray
) -> BatchResult:
    admission.check(rows=len(x), is_queued=True)
    return await batcher.run(model, operation, x)


def test_request_refused_because_the_queue_is_full_gets_a_retry_after_header(vae: Artifact) -> None:
    model = BareModel(select_backend(vae, requested="torchscript").backend)
    operation = reconstruct(gaps=False)

    async def scenario() -> None:
        async with running_batcher() as batcher:
            admission = admission_for(batcher, max_rows=10)
            gate = Gate()
            held = await gate.hold(batcher, model, random_rows(1))
            waiting = asyncio.create_task(run_if_admitted(admission, batcher, model, operation, random_rows(9)))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded) as caught:
                await run_if_admitted(admission, batcher, model, operation, random_rows(1))
            assert int(caught.value.headers["Retry-After"]) >= 1
            gate.open.set()
            await asyncio.gather(held, waiting)
            result = await run_if_admitted(admission, batcher, model, operation, random_rows(10))
            assert len(result.outputs[0]) == 10

    asyncio.run(scenario())


@pytest.mark.alone
def test_request_is_refused_if_it_would_wait_too_long_and_accepted_if_the_batcher_is_idle(
    vae: Artifact,
) -> None:
    model = BareModel(select_backend(vae, requested="torchscript").backend)

    def sleep_per_row(_: Any, x: torch.Tensor) -> tuple[torch.Tensor]:
        time.sleep(0.02 * len(x))
        return (x,)

    operation = Operation("slow", sleep_per_row)

    async def scenario() -> None:
        async with running_batcher(max_batch_rows=1) as batcher:
            admission = admission_for(batcher, max_wait=0.1)

            def run(x: np.ndarray) -> Awaitable[BatchResult]:
                return run_if_admitted(admission, batcher, model, operation, x)

            unmeasured = await asyncio.gather(*[run(random_rows(1)) for _ in range(30)])
            assert len(unmeasured) == 30  # every request is accepted until a rate is measured
            large = await run(random_rows(20, seed=1))  # takes 0.4 s
            np.testing.assert_array_equal(large.outputs[0], random_rows(20, seed=1))
            inputs = [random_rows(1, seed=seed) for seed in range(30)]
            results = await asyncio.gather(*[run(x) for x in inputs], return_exceptions=True)
            accepted = [index for index, result in enumerate(results) if not isinstance(result, Overloaded)]
            assert accepted == list(range(len(accepted)))  # in order of arrival
            # At 50 rows per second and a maximum wait of 0.1 s, about 5 rows may wait while one runs.
            assert 1 < len(accepted) <= 7
            for index in accepted:
                result = results[index]
                assert not isinstance(result, BaseException)
                np.testing.assert_array_equal(result.outputs[0], inputs[index])
            refused = results[-1]
            assert isinstance(refused, Overloaded)
            assert int(refused.headers["Retry-After"]) >= 1
            assert batcher.pending_rows == 0
            await run(random_rows(1))

    asyncio.run(scenario())


def test_ticket_counts_once_if_it_is_acquired_or_released_twice() -> None:
    async def scenario() -> None:
        async with running_batcher() as batcher:
            admission = admission_for(batcher)
            ticket = admission.ticket()
            ticket.acquire()
            ticket.acquire()
            await ticket.start(perf_counter() + 1)
            assert admission.requests.amount == 1
            for _ in range(2):
                ticket.release()
                assert admission.requests.amount == 0
            ticket.acquire()  # happens if the rest of a body arrives after the response was sent
            assert admission.requests.amount == 0
            tickets = [admission.ticket() for _ in range(WORK_SLOTS)]
            for each in tickets:
                await each.start(perf_counter() + 1)
            assert admission.work_slots.locked()

    asyncio.run(scenario())


@pytest.mark.parametrize(("rows", "is_refused"), [(9, False), (10, True)])
def test_large_requests_leave_a_quarter_of_the_queue_to_small_requests(
    vae: Artifact, rows: int, is_refused: bool
) -> None:
    """The queue has room for 100 rows, and 75 are pending. A request is large if it exceeds a batch: 9 rows."""
    model = BareModel(select_backend(vae, requested="torchscript").backend)

    async def scenario() -> None:
        async with running_batcher(max_batch_rows=9) as batcher:
            admission = admission_for(batcher, max_rows=100)
            gate = Gate()
            held = await gate.hold(batcher, model, random_rows(1))
            large = asyncio.create_task(batcher.run(model, reconstruct(gaps=False), random_rows(74)))
            await asyncio.sleep(0)
            assert batcher.pending_rows == 75
            assert (admission.refusal(rows=rows, is_queued=True) is not None) == is_refused
            gate.open.set()
            await asyncio.gather(held, large)

    asyncio.run(scenario())


def test_large_requests_take_neither_work_slots_nor_queue_places_from_small_requests() -> None:
    async def scenario() -> None:
        async with running_batcher() as batcher:
            admission = admission_for(batcher)
            tickets = [admission.ticket() for _ in range(WORK_SLOTS)]
            for ticket in tickets:
                ticket.acquire()
                await ticket.start(perf_counter() + 1)
                ticket.mark_large()
                ticket.mark_large()
            assert not admission.work_slots.locked()
            assert (admission.requests.amount, admission.large_requests.amount) == (0, WORK_SLOTS)
            for ticket in tickets:
                ticket.release()
                ticket.release()
            assert (admission.requests.amount, admission.large_requests.amount) == (0, 0)

    asyncio.run(scenario())


def test_requests_with_many_rows_take_turns_in_order_of_arrival() -> None:
    async def scenario() -> None:
        async with running_batcher() as batcher:
            admission = admission_for(batcher)
            order: list[int] = []

            async def compute(number: int) -> None:
                ticket = admission.ticket()
                await ticket.take_turn(9, perf_counter() + 10)
                await ticket.take_turn(9, perf_counter() + 10)  # does nothing
                order.append(number)
                await asyncio.sleep(0)
                order.append(number)
                ticket.release()

            await asyncio.gather(*map(compute, range(4)))
            assert order == [0, 0, 1, 1, 2, 2, 3, 3]
            assert not admission.turn.locked()

    asyncio.run(scenario())


def test_rows_that_wait_for_their_turn_count_as_pending() -> None:
    """The queue has room for 100 rows, of which requests with many rows may take 75."""

    async def scenario() -> None:
        async with running_batcher(max_batch_rows=8) as batcher:
            admission = admission_for(batcher, max_rows=100)
            first, second, third = (admission.ticket() for _ in range(3))
            await first.take_turn(70, perf_counter() + 10)
            with pytest.raises(Overloaded, match="too many rows are pending"):
                await second.take_turn(70, perf_counter() + 10)  # the batcher will soon have 70 rows of the first
            first.check(70)
            turn = asyncio.create_task(second.take_turn(70, perf_counter() + 10))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded, match="too many rows are pending"):
                await third.take_turn(9, perf_counter() + 10)
            assert admission.refusal(rows=8, is_queued=True) is None
            first.check(70)  # has the turn, so the rows behind it do not count against it
            with pytest.raises(Overloaded, match="too many rows are pending"):
                third.check(9)
            first.release()
            await turn
            second.release()
            await third.take_turn(75, perf_counter() + 10)

    asyncio.run(scenario())


def test_rows_of_later_parts_of_a_request_count_as_pending_until_their_part_runs() -> None:
    """The queue has room for 100 rows. A request of 70 rows runs in parts of 20, 30 and 20 rows, as a backtest does."""

    async def scenario() -> None:
        async with running_batcher(max_batch_rows=8) as batcher:
            admission = admission_for(batcher, max_rows=100)
            ticket = admission.ticket()
            await ticket.take_turn(70, perf_counter() + 10)
            for part, pending in ((20, 50), (30, 20), (20, 0)):
                ticket.check(part)
                room = 75 - pending  # requests of more rows than a batch may take 75 rows
                assert admission.refusal(rows=room, is_queued=True) is None
                assert pending == 0 or admission.refusal(rows=room + 1, is_queued=True) is not None
            ticket.release()
            assert admission.refusal(rows=75, is_queued=True) is None

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["cancelled", "timed out"])
def test_request_that_ends_while_it_waits_for_its_turn_leaves_the_turn_to_the_next(end: str) -> None:
    async def scenario() -> None:
        async with running_batcher() as batcher:
            admission = admission_for(batcher)
            first, second, third = (admission.ticket() for _ in range(3))
            await first.take_turn(9, perf_counter() + 10)
            turn = asyncio.create_task(second.take_turn(9, perf_counter() + (10 if end == "cancelled" else 0.01)))
            await asyncio.sleep(0)
            if end == "cancelled":
                turn.cancel()
            with pytest.raises(asyncio.CancelledError if end == "cancelled" else DeadlineExceeded):
                await turn
            first.release()
            second.release()
            await third.take_turn(9, perf_counter() + 10)
            third.release()
            assert (admission.large_requests.amount, admission.turn.locked()) == (0, False)

    asyncio.run(scenario())


class SteadyReader:
    """A client that reads a response at a given rate until it is dropped."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.dropped: list[str] = []

    def bytes_read_per_second(self, now: float) -> float:  # noqa: ARG002 - as a connection
        return self.rate

    def drop(self, reason: str) -> None:
        self.dropped.append(reason)


def test_turn_of_a_large_response_begins_when_clients_have_read_the_responses_before_it() -> None:
    """Unread responses may take 2**18 bytes."""

    async def scenario() -> None:
        async with running_batcher() as batcher:
            admission = admission_for(batcher)
            reader, ticket = SteadyReader(rate=1e6), admission.ticket()
            admission.unread.set(reader, 2**17)
            await admission.ticket().take_turn(9, perf_counter() + 10, 2**17)  # fits
            admission.turn.release()
            turn = asyncio.create_task(ticket.take_turn(9, perf_counter() + 10, 2**17 + 1))
            await asyncio.sleep(0.1)
            assert not turn.done()
            admission.unread.set(reader, 0)  # the client has read everything
            await turn
            assert reader.dropped == []
            ticket.release()
            assert not admission.turn.locked()

    asyncio.run(scenario())


@pytest.mark.parametrize(("rate", "is_refused"), [(1e6, True), (100.0, False)])
def test_large_response_that_finds_no_room_is_refused_unless_slow_clients_can_be_dropped(
    rate: float, is_refused: bool
) -> None:
    async def scenario() -> None:
        async with running_batcher() as batcher:
            admission = admission_for(batcher)
            reader, ticket = SteadyReader(rate), admission.ticket()
            admission.unread.set(reader, 2**18)
            turn = asyncio.create_task(ticket.take_turn(9, perf_counter() + 10, 2**18))
            if is_refused:
                with pytest.raises(Overloaded, match="responses that clients do not read take too much memory"):
                    await turn
            else:
                await turn
            assert reader.dropped == ([] if is_refused else ["unread_response"])
            assert admission.turn.locked() is not is_refused
            ticket.release()
            assert (admission.turn.locked(), admission.large_requests.amount) == (False, 0)

    asyncio.run(scenario())


@pytest.mark.alone
def test_flood_of_requests_gets_prompt_refusals_and_correct_responses(
    start: Callable[..., ServerProcess], vae_only: Path, vae: Artifact
) -> None:
    process = start(vae_only, QUEUE_SECONDS=0.001)
    rows = np.repeat(ROWS, 40, axis=0)  # large enough that the server cannot answer them as fast as they arrive
    body = orjson.dumps({"inputs": rows}, option=orjson.OPT_SERIALIZE_NUMPY)
    head = f"POST /reconstruct?model=vae HTTP/1.1\r\nHost: elbo\r\nContent-Length: {len(body)}\r\n"
    request = head.encode() + b"Content-Type: application/json\r\n\r\n" + body
    with torch.inference_mode():
        expected = vae.module(torch.from_numpy(rows)).numpy()
    timed = asyncio.run(send_rounds(process.port, request, clients=6 * WORK_SLOTS, rounds=8))
    refused = [(response, seconds) for response, seconds in timed if response[0] == 429]
    assert {response[0] for response, _ in timed} == {200, 429}
    assert len(refused) < len(timed) - 8 * WORK_SLOTS / 2  # refusals do not starve accepted requests
    for (status, headers, body), _ in timed:
        content = json.loads(body)
        if status == 200:
            np.testing.assert_allclose(content["outputs"], expected, atol=1e-5)
        else:
            assert (content["code"], content["request_id"]) == ("overloaded", headers["x-request-id"])
            assert int(headers["retry-after"]) >= 1
            assert headers["content-type"] == "application/problem+json"
    assert max(seconds for _, seconds in refused) < 2
    with process.client() as client:
        assert client.post("/encode", content=BODY, headers={"content-type": "application/json"}).status_code == 200
        text = client.get("/metrics").text
    assert "elbo_pending_rows 0.0" in text
    problems = re.findall(r'^elbo_problems_total\{code="overloaded".*\} (\S+)$', text, re.MULTILINE)
    assert sum(map(float, problems)) == len(refused)
    assert process.stop() == 0


def test_request_is_refused_before_its_body_arrives_if_the_queue_is_full_and_may_be_sent_again(vae_only: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=vae_only, max_rows=3, queue_rows=3)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), np.repeat(ROWS, 3, axis=0))
            reader, writer = await connect(port)
            for _ in range(2):
                writer.write(REQUEST[:-40].replace(b"Host", b'X-Request-Id: a"b\r\nHost'))
                status, headers, body = await read_response(reader)
                assert (status, headers["x-request-id"]) == (429, 'a"b')
                assert json.loads(body)["request_id"] == 'a"b'
                writer.write(REQUEST[-40:])
            async with httpx.AsyncClient(
                verify=NO_AUTHORITIES, base_url=f"http://127.0.0.1:{port}", timeout=20
            ) as client:
                assert (await client.get("/readyz")).status_code == 200
                assert (await client.get("/encode")).status_code == 405
            gate.open.set()
            await held
            writer.write(REQUEST)
            assert (await read_response(reader))[0] == 200
            writer.close()
            assert service.admission.requests.amount == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("content_type", "accept"),
    [
        ("application/x-ndjson", ["application/x-ndjson"]),
        ("application/jsonl; charset=utf-8", ["Application/JSONL"]),
        ("application/x-ndjson", ["text/html", "application/x-ndjson, */*;q=0.1"]),
    ],
)
def test_stream_of_rows_waits_instead_of_being_refused_if_the_queue_is_full(
    vae_only: Path, content_type: str, accept: list[str]
) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=vae_only, max_rows=3, queue_rows=3)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), np.repeat(ROWS, 3, axis=0))
            headers = [("content-type", content_type), *(("accept", line) for line in accept)]
            async with httpx.AsyncClient(
                verify=NO_AUTHORITIES, base_url=f"http://127.0.0.1:{port}", timeout=20
            ) as client:
                line = json.dumps(ROWS[0].tolist()).encode() + b"\n"
                stream = asyncio.create_task(client.post("/anomaly", content=line, headers=headers))
                await asyncio.sleep(0.2)
                gate.open.set()
                await held
                response = await stream
            assert response.status_code == 200
            assert json.loads(response.text.splitlines()[-1])["rows"] == 1

    asyncio.run(scenario())


def test_deadline_that_passes_in_the_queue_gives_504_only_to_its_own_request(vae_only: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=vae_only)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), ROWS)
            connections = [await connect(port) for _ in range(WORK_SLOTS + 3)]
            for _, writer in connections:
                writer.write(REQUEST)
            await until(lambda: service.admission.requests.amount == len(connections))
            assert service.batcher.pending_rows == 1 + WORK_SLOTS
            reader, writer = await connect(port)
            writer.write(REQUEST.replace(b"Host", b"X-Request-Timeout: 0.1\r\nHost"))
            status, _, body = await read_response(reader)
            assert (status, json.loads(body)["code"]) == (504, "deadline_exceeded")
            writer.close()
            gate.open.set()
            await held
            for reader, writer in connections:
                assert (await read_response(reader))[0] == 200
                writer.close()
            assert service.admission.requests.amount == 0

    asyncio.run(scenario())


@pytest.mark.alone
def test_incomplete_bodies_do_not_delay_complete_requests(vae_only: Path) -> None:
    async def scenario() -> None:
        async with serving(Settings(artifacts=vae_only, queue_seconds=0.001)) as (service, port):
            slow = [await connect(port) for _ in range(2 * WORK_SLOTS)]
            for _, writer in slow:
                writer.write(REQUEST[:-10])
            timed = await send_rounds(port, REQUEST, clients=1, rounds=2000)
            assert {status for (status, _, _), _ in timed} == {200}
            assert service.admission.requests.amount == 0
            for _, writer in slow:
                writer.close()

    asyncio.run(scenario())
