"""Direct requests: their responses equal those of a task, and unusual ones still get their errors."""

import asyncio
import json
import re
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.codec import npy
from service.endpoints.direct import FEW_FEATURES, MAX_IN_PROGRESS, MAX_OBJECTS, MAX_ROUTE_BYTES, MAX_ROUTES
from service.http.direct import Content, DirectRequest
from service.settings import Settings
from tests.service.direct_requests import (
    JSON_TYPE,
    NPY_TYPE,
    Recorder,
    as_json,
    for_task,
    infer,
    recording,
    request,
    rows,
    without_times,
)
from tests.service.gate import Gate
from tests.service.scrape import scrape, total
from tests.service.serving import serving, until
from tests.training.reporters import RecordingReporter
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Table
from training.train import train

WIDE = FEW_FEATURES + 8


@pytest.fixture(scope="module")
def server(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorder]:
    """Yield a server of the models of `artifacts`, and of `wide`, a PCA of a table with WIDE columns."""
    root = tmp_path_factory.mktemp("direct")
    shutil.copytree(artifacts, root, dirs_exist_ok=True)
    names = [f"m{index}" for index in range(WIDE)]
    x = RowStore(rows(500, WIDE))
    table = Table(x, (WIDE,), names, [None] * WIDE, None, None, "made up", missing=np.zeros(WIDE, np.int64))
    train(TrainConfig(model="pca", name="wide", latents=2), table, root, RecordingReporter())
    settings = Settings(artifacts=root, default_model="vae", log_level="warning", backend="torchscript", max_rows=300)
    with recording(settings) as found:
        yield found


USUAL = {
    "one row": request("/reconstruct", as_json(rows(1))),
    "several rows": request("/reconstruct?model=ae", as_json(rows(3))),
    "body of more than FEW_BYTES": request("/reconstruct?model=pca", as_json(rows(20))),
    "npy": request("/reconstruct", npy.dumps(rows(2)), content_type=NPY_TYPE, accept=NPY_TYPE),
    "npy, answered in JSON": request("/encode?model=hosts", npy.dumps(rows(2, 4)), content_type=NPY_TYPE),
    "encode": request("/encode?model=hosts", as_json(rows(2, 4))),
    "decode": request("/decode?model=hosts", as_json(rows(2, 2), "latents")),
    "request id": request("/reconstruct", as_json(rows(1)), "X-Request-Id: abc"),
    "anomaly": request("/anomaly?model=hosts", as_json(rows(1, 4))),
    "anomalies": request("/anomaly?model=hosts&explain=9&alpha=0.2", as_json(100 * rows(7, 4))),
    "anomaly, many features": request("/anomaly?model=wide", as_json(rows(1, WIDE))),
    "anomalies, many features": request("/anomaly?model=wide&explain=2&alpha=0.2", as_json(9 * rows(7, WIDE))),
    "no explanation, many features": request("/anomaly?model=wide&explain=0", as_json(rows(2, WIDE))),
    "no explanation": request("/anomaly?model=hosts&explain=0&observe=false", as_json(rows(2, 4))),
    "protocol, latents of rows": infer("vae", rows(3), "mean"),
    "protocol, outputs in another order": infer("vae/versions/1", rows(2), "std", "mean", id="abc"),
    "protocol, rows": infer("ae", rows(9), "x_hat", "error"),
    "protocol, many rows": infer("hosts", rows(200, 4), "error"),
    "protocol, latents": infer("hosts:decode", rows(2, 2), "x_hat", name="z"),
    "extrapolated": request("/anomaly?model=hosts&alpha=1e-9&extrapolated=true", as_json(9 * rows(2, 4))),
}


@pytest.mark.parametrize("name", USUAL)
def test_direct_request_gets_the_response_of_a_task(server: Recorder, name: str) -> None:
    whole = USUAL[name]
    server.answered.clear()
    by_task = server.send(for_task(whole))
    assert by_task.startswith(b"HTTP/1.1 200 OK")
    assert server.answered == []
    first, again = server.send(whole), server.send(whole)  # the head is unknown, then known
    assert len(server.answered) == 2
    assert without_times(first) == without_times(again) == without_times(by_task)


UNUSUAL = {
    "boolean": request("/reconstruct", as_json(rows(1)).replace(b"[[", b"[[true, ", 1)),
    "text": request("/reconstruct", b'{"inputs": [["a"]]}'),
    "duplicate key": request("/reconstruct", as_json(rows(1))[:-1] + b', "inputs": [[1]]}'),
    "null": request("/anomaly?model=hosts", b'{"inputs": [[1, 2, 3, null]]}'),
    "NaN": request("/reconstruct", as_json(rows(1)).replace(b"[[", b"[[NaN, ", 1)),
    "beyond float32": request("/anomaly?model=hosts", b'{"inputs": [[1e39, 2, 3, 4]]}'),
    "overflow in the model": request("/anomaly?model=hosts", b'{"inputs": [[3e38, -3e38, 3e38, -3e38], [1, 2, 3, 4]]}'),
    "overflow in a model of many features": request("/anomaly?model=wide", as_json(3e38 * np.eye(1, WIDE))),
    "option that is not valid": request("/anomaly?model=wide&observe=maybe", as_json(rows(1, WIDE))),
    "wrong width": request("/reconstruct", as_json(rows(1, 63))),
    "other field": request("/anomaly?model=hosts", as_json(rows(1, 4))[:-1] + b', "explain": 1}'),
    "unknown option": request("/reconstruct?fast=1", as_json(rows(1))),
    "unknown model": request("/reconstruct?model=none", as_json(rows(1))),
    "false discovery rate": request("/anomaly?model=hosts&fdr=0.1", as_json(rows(3, 4))),
    "too many rows": request("/reconstruct", npy.dumps(rows(301)), content_type=NPY_TYPE, accept=NPY_TYPE),
    "npy of texts": request("/reconstruct", b"\x93NUMPY", content_type=NPY_TYPE),
    "no row": request("/reconstruct", b'{"inputs": []}'),
    "empty body": request("/reconstruct", b""),
    "picture": request("/reconstruct", as_json(rows(1)), accept="image/png"),
    "sampled latents": request("/encode?sample=true&seed=3", as_json(rows(1))),
    "protocol, score": infer("hosts", rows(1, 4), "score"),
    "protocol, score and latents": infer("hosts", rows(1, 4), "score", "mean"),
    "protocol, all outputs": infer("hosts", rows(1, 4)),
    "protocol, unknown output": infer("hosts", rows(1, 4), "y"),
    "protocol, other input": infer("hosts", rows(1, 4), "mean", name="y"),
    "protocol, other datatype": infer("hosts", rows(1, 4).astype("f8"), "mean", dtype="FP64"),
    "protocol, parameter": infer("hosts", rows(1, 4), "mean", parameters={"alpha": 0.1}),
    "protocol, other size": infer("hosts", rows(2, 4), "mean").replace(b": 32}", b": 28}", 1),
    "protocol, wrong width": infer("hosts", rows(2, 3), "mean"),
    "protocol, too many rows": infer("hosts", rows(301, 4), "mean"),
    "protocol, no row": infer("hosts", rows(0, 4), "mean"),
    "protocol, infinity": infer("hosts", np.inf * rows(1, 4), "mean"),
    "protocol, overflow in the model": infer("hosts", 3e38 * np.sign(rows(1, 4) - 0.5), "x_hat"),
    "protocol, samples": infer("hosts:sample", rows(1, 4), "x"),
    "protocol, unknown model": infer("none", rows(1, 4), "mean"),
    "protocol, unknown version": infer("hosts/versions/7", rows(1, 4), "mean"),
    "protocol, unknown method": infer("hosts:decode:decode", rows(1, 2), "x_hat", name="z"),
    "protocol, no dimension": infer("hosts", rows(1, 1), "x_hat", shape=[]),
    "protocol, one dimension": infer("hosts", rows(1, 4), "x_hat", shape=[4]),
    "protocol, huge shape": infer("hosts", rows(1, 4), "x_hat", shape=[2**60, 4]),
    "protocol, huge shape of the right size": infer("hosts", rows(1, 4), "x_hat", shape=[2**60]).replace(
        b'"binary_data_size": 16', b'"binary_data_size": %d' % 2**62, 1
    ),
    "protocol, one output in JSON": infer("hosts", rows(1, 4), "mean", "std").replace(b": true", b":false", 1),
    "protocol, length 0": infer("hosts", rows(1, 4), "mean").replace(b"Length: 1", b"Length: 0", 1),
    "protocol, length beyond the body": infer("hosts", rows(1, 4), "mean").replace(b"Length: 1", b"Length: 9", 1),
    "protocol, another length": infer("hosts", rows(1, 4), "mean").replace(
        b"Content-Length: 1", b"Content-Length: 2", 1
    ),
    "protocol, query": infer("hosts", rows(1, 4), "mean").replace(b"/infer", b"/infer?alpha=0.1", 1),
    "protocol, page of another site": infer("hosts", rows(1, 4), "mean").replace(
        b"Host: ", b"Origin: http://a\r\nHost: ", 1
    ),
    "protocol, as JSON": infer("hosts", rows(1, 4), "mean").replace(b"octet-stream", b"json", 1),
    "protocol, as text": infer("hosts", rows(1, 4), "mean").replace(b"application/octet-stream", b"text/plain", 1),
    "pixels of another range": request("/reconstruct", as_json(255 * rows(1))),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_request_in_one_read_gets_the_response_of_a_task(server: Recorder, name: str) -> None:
    whole = UNUSUAL[name]
    server.send(request("/reconstruct", as_json(rows(1))))  # the head of several of these requests is now known
    server.answered.clear()
    by_task = server.send(for_task(whole))
    in_one_read = server.send(whole)
    assert server.answered == []
    remove_id = rb'"request_id":"[^"]*"'
    assert re.sub(remove_id, b"", without_times(in_one_read)) == re.sub(remove_id, b"", without_times(by_task))


def test_requests_with_other_ids_share_a_route_and_each_gets_its_own_id_back(server: Recorder) -> None:
    found = [server.send(request("/encode?model=hosts", as_json(rows(1, 4)), f"X-Request-Id: {i}")) for i in range(3)]
    assert [re.findall(rb"x-request-id: ([^\r]*)", response) for response in found] == [[b"0"], [b"1"], [b"2"]]
    heads = server.protocol.keywords["direct"]

    def route(**headers: str) -> object:
        lines = {"host": "elbo", "content-type": JSON_TYPE, "content-length": "9", **headers}
        head = heads.read(b"/encode?model=hosts", [(name.encode(), value.encode()) for name, value in lines.items()])
        return head.route

    assert route(**{"x-request-id": "a"}) is route(**{"x-forwarded-for": "10.0.0.1", "content-length": "8"})
    others = [{"accept": NPY_TYPE}, {"content-type": NPY_TYPE}, {"x-request-timeout": "3"}, {"host": "other"}]
    assert len({id(route(**headers)) for headers in ({}, *others)}) == 5


def test_memory_for_routes_is_bounded(server: Recorder) -> None:
    heads = server.protocol.keywords["direct"]
    headers = [(b"content-type", JSON_TYPE.encode()), (b"content-length", b"9")]
    for number in range(MAX_ROUTES + 10):
        heads.read(b"/encode?model=hosts", [*headers, (b"host", b"elbo%d" % number)])
    assert 0 < len(heads.handler._routes) <= MAX_ROUTES
    before = len(heads.handler._routes)
    heads.read(b"/encode?model=hosts", [*headers, (b"host", b"e" * MAX_ROUTE_BYTES)])
    assert len(heads.handler._routes) == before


def test_pipelined_requests_in_one_read_get_their_responses_in_order(server: Recorder) -> None:
    counts = (1, 3, 2)
    pipelined = b"".join(request("/reconstruct?model=ae", as_json(rows(count))) for count in counts)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(pipelined)
        with connection.makefile("rb") as stream:
            found = []
            for _ in counts:
                head = b"".join(iter(stream.readline, b"\r\n"))
                assert head.startswith(b"HTTP/1.1 200 OK")
                found.append(json.loads(stream.read(int(re.findall(rb"content-length: ([0-9]+)", head)[0]))))
    assert [len(answer["outputs"]) for answer in found] == list(counts)


@pytest.mark.parametrize("is_known", [False, True])
def test_request_whose_body_arrives_in_pieces_is_direct(server: Recorder, is_known: bool) -> None:
    whole = request("/reconstruct?model=ae", as_json(rows(2)), f"X-Request-Id: {is_known}")
    if is_known:
        server.send(whole)
    server.answered.clear()
    assert server.send(whole[:-99], whole[-99:-5], whole[-5:]).startswith(b"HTTP/1.1 200 OK")
    assert server.answered == ["/reconstruct"]


@pytest.mark.parametrize("header", ["Transfer-Encoding: chunked", "Content-Length: 3", "Host: other", "Expect: x"])
def test_known_head_with_another_header_is_parsed(server: Recorder, header: str) -> None:
    whole = request("/reconstruct", as_json(rows(1)))
    server.send(whole)
    changed = request("/reconstruct", as_json(rows(1)), header)
    server.answered.clear()
    first, again = server.send(changed), server.send(changed)
    assert first.split(b" ")[1] == again.split(b" ")[1] == (b"200" if header.startswith("Expect") else b"400")
    assert server.answered == []


def test_direct_requests_count_in_the_metrics(server: Recorder) -> None:
    before = scrape(server.client)
    for _ in range(3):
        server.send(request("/anomaly?model=hosts", as_json(rows(2, 4))))
    after = scrape(server.client)
    grown = {
        name: total(after, name) - total(before, name)
        for name in ("elbo_requests_total", "elbo_rows_total", "elbo_scored_rows_total", "elbo_request_seconds_count")
    }
    assert grown["elbo_rows_total"] == grown["elbo_scored_rows_total"] == 6
    assert grown["elbo_requests_total"] == grown["elbo_request_seconds_count"] == 4  # one of them is the scrape
    assert total(after, "elbo_pending_rows") == total(after, "elbo_pending_bytes") == 0


@pytest.mark.parametrize("form", ["npy", "protocol"])
def test_direct_request_of_more_rows_than_a_request_may_have_gets_413(artifacts: Path, form: str) -> None:
    x = rows(101, 4)
    npy_request = request("/encode?model=hosts", npy.dumps(x), content_type=NPY_TYPE, accept=NPY_TYPE)
    whole = npy_request if form == "npy" else infer("hosts", x, "mean")
    settings = Settings(artifacts=artifacts, default_model="vae", log_level="warning", max_rows=100)
    with recording(settings) as server:
        assert server.send(whole).startswith(b"HTTP/1.1 413 ")
        assert server.answered == []


def test_json_objects_of_the_protocol_that_are_remembered_are_bounded(server: Recorder) -> None:
    found = [server.send(infer("hosts", rows(1, 4), "mean", id=f"{number:05}")) for number in range(MAX_OBJECTS + 5)]
    assert [re.findall(rb'"id":"([^"]*)"', each) for each in found] == [[b"%05d" % i] for i in range(len(found))]
    routes = server.protocol.keywords["direct"].handler._routes.values()
    plans = [route.plan for route in routes if route.protocol and route.plan and route.plan.name == "hosts"]
    assert len({id(plan._plans) for plan in plans}) == 1
    assert 1 < len(plans[0]._plans) <= MAX_OBJECTS


@asynccontextmanager
async def blocked(artifacts: Path) -> AsyncIterator[tuple[Any, int, Gate]]:
    """Yield the service, its port, and a gate that occupies the batcher until it opens."""
    settings = Settings(artifacts=artifacts, default_model="pca", log_level="warning", backend="torchscript")
    async with serving(settings) as (service, port):
        gate = Gate()
        held = await gate.hold(service.batcher, service.find(None), rows(1))
        yield service, port, gate
        gate.open.set()
        await held


async def open_request(port: int, whole: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(whole)
    return reader, writer


def test_client_that_disconnects_before_its_batch_leaves_no_rows_behind(artifacts: Path) -> None:
    async def scenario() -> None:
        async with blocked(artifacts) as (service, port, gate):
            _, writer = await open_request(port, request("/reconstruct", as_json(rows(5))))
            await until(lambda: service.batcher.pending_rows == 6)  # one of them is the gate's
            writer.close()
            await until(lambda: service.batcher.pending_rows == 1)
            assert service.admission.requests.amount == service.admission.body_bytes.amount == 0
            gate.open.set()
            await until(lambda: service.batcher.pending_rows == 0)
            assert service.admission.requests.amount == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("form", ["json", "protocol"])
def test_direct_request_whose_time_is_over_gets_504(
    artifacts: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered: list[str] = []
    write = DirectRequest.write

    def record(self: DirectRequest, head: bytes, content: Content) -> None:
        answered.append(self.head.path)
        write(self, head, content)

    monkeypatch.setattr(DirectRequest, "write", record)
    whole = infer("pca", rows(1), "x_hat") if form == "protocol" else request("/reconstruct", as_json(rows(1)))
    whole = whole.replace(b"Host: elbo", b"Host: elbo\r\nX-Request-Timeout: 0.05", 1)

    async def scenario() -> None:
        async with blocked(artifacts) as (service, port, _):
            reader, writer = await open_request(port, whole)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
            assert head.startswith(b"HTTP/1.1 504 ")
            assert len(answered) == 1
            assert (b"content-type: application/problem+json" in head) == (form == "json")
            size = int(re.findall(rb"content-length: ([0-9]+)", head)[0])
            answer = json.loads(await asyncio.wait_for(reader.readexactly(size), 20))
            assert list(answer) == ["error"] if form == "protocol" else answer["status"] == 504
            writer.close()
            await until(lambda: service.batcher.pending_rows == 1)

    asyncio.run(scenario())


def test_more_requests_than_may_be_in_progress_wait_and_are_answered(artifacts: Path) -> None:
    async def scenario() -> None:
        count = MAX_IN_PROGRESS + 10
        async with blocked(artifacts) as (service, port, gate):
            opened = [await open_request(port, request("/reconstruct", as_json(rows(1, seed=i)))) for i in range(count)]
            await until(lambda: service.admission.requests.amount == count)
            assert service.batcher.pending_rows == 1 + MAX_IN_PROGRESS
            opened.pop()[1].close()  # a client that waits for its turn
            await until(lambda: service.admission.requests.amount == count - 1)
            gate.open.set()
            for reader, writer in opened:
                assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), 20)).startswith(b"HTTP/1.1 200 ")
                writer.close()
            assert service.admission.requests.amount == service.admission.body_bytes.amount == 0

    asyncio.run(scenario())
