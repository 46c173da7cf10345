"""API keys of direct requests: the responses, limits and counts are those of a task."""

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.access.control import GrantedKey
from service.access.key_file import ApiKey, hash_of
from service.access.limits import KeyLimits
from service.errors import RateLimited
from service.settings import Settings
from service.shared_memory import SharedCounters
from tests.service.access.keys import KeySet
from tests.service.direct_requests import Recorder, as_json, for_task, recording, request, rows, without_times
from tests.service.gate import Gate
from tests.service.scrape import scrape, total
from tests.service.serving import serving, until

pytestmark = pytest.mark.slow
ONE_ROW = as_json(rows(1))
ANOMALY = "/anomaly?model=hosts", as_json(rows(1, 4))


@pytest.fixture
def keys(tmp_path: Path) -> KeySet:
    found = KeySet(tmp_path / "keys.toml")
    found.add("infer", "infer")
    found.add("sender", "infer", "write")
    found.add("metrics", "metrics")
    found.add("few", "infer", requests_per_second=0.001, burst=4)
    found.add("polite", "infer", requests_per_second=1000, concurrent_requests=2)
    return found


def options(artifacts: Path, keys: KeySet, **others: Any) -> Settings:
    return Settings(
        artifacts=artifacts,
        default_model="pca",
        api_keys_file=keys.path,
        poll_seconds=0.05,
        log_level="error",
        backend="torchscript",
        **others,
    )


@pytest.fixture
def server(artifacts: Path, keys: KeySet) -> Iterator[Recorder]:
    with recording(options(artifacts, keys)) as found:
        yield found


def with_key(keys: KeySet, name: str, path: str = "/reconstruct", body: bytes = ONE_ROW) -> bytes:
    return request(path, body, f"X-API-Key: {keys.values[name]}")


def status(response: bytes) -> int:
    return int(response.split(b" ")[1])


def wait_for_status(server: Recorder, whole: bytes, expected: int) -> None:
    deadline = time.monotonic() + 20
    while status(server.send(whole)) != expected:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["infer", "polite"])
@pytest.mark.parametrize(("path", "body"), [("/reconstruct", ONE_ROW), ANOMALY])
def test_direct_request_with_a_key_gets_the_response_of_a_task(
    server: Recorder, keys: KeySet, name: str, path: str, body: bytes
) -> None:
    whole = with_key(keys, name, path, body)
    by_task = server.send(for_task(whole))
    assert server.answered == []
    found = []
    for _ in range(2):  # the head is unknown, then known
        time.sleep(0.02)  # the key may send a request each ms, so all 1,000 requests are left again
        found.append(server.send(whole))
    assert len(server.answered) == 2
    assert status(by_task) == 200
    assert (b"ratelimit" in by_task) == (name == "polite")
    assert without_times(found[0]) == without_times(found[1]) == without_times(by_task)


def test_known_head_is_refused_when_its_key_is_removed_or_loses_its_scope(server: Recorder, keys: KeySet) -> None:
    removed, changed, kept = (with_key(keys, name) for name in ("infer", "sender", "polite"))
    assert [status(server.send(whole)) for whole in (removed, removed, changed, changed, kept)] == [200] * 5
    keys.remove("infer")
    sha256 = hash_of(keys.values["sender"])
    text = keys.path.read_text()
    line = next(line for line in text.splitlines() if sha256 in line)
    keys.path.write_text(text.replace(line, f'sender = {{sha256 = "{sha256}", scopes = ["metrics"]}}'))
    wait_for_status(server, removed, 401)
    wait_for_status(server, changed, 403)
    server.answered.clear()
    assert status(server.send(kept)) == 200
    assert server.answered == ["/reconstruct"]


def test_known_head_has_the_new_limits_of_its_key_when_the_file_changes(server: Recorder, keys: KeySet) -> None:
    whole = with_key(keys, "infer")
    assert status(server.send(whole)) == 200
    text = keys.path.read_text()
    keys.path.write_text(text.replace('scopes = ["infer"]}', 'scopes = ["infer"], requests_per_second = 0.001}', 1))
    wait_for_status(server, whole, 429)


def test_direct_requests_and_tasks_draw_on_one_limit_and_each_request_counts_once(
    server: Recorder, keys: KeySet
) -> None:
    usual = with_key(keys, "few")
    overflow = with_key(keys, "few", body=as_json(3e38 * rows(1)))  # the model overflows, so that a task reports it
    found = [server.send(whole) for whole in (usual, overflow, for_task(usual), usual, usual, for_task(usual))]
    assert [status(response) for response in found] == [200, 422, 200, 200, 429, 429]
    left = [re.findall(rb'"requests";r=([0-9]+)', response) for response in found]
    assert left == [[b"3"], [b"2"], [b"1"], [b"0"], [b"0"], [b"0"]]


@pytest.mark.parametrize(("name", "live"), [("infer", False), ("sender", True)])
def test_rows_of_a_direct_request_are_live_traffic_only_with_the_scope_write(
    server: Recorder, keys: KeySet, name: str, live: bool
) -> None:
    for _ in range(2):
        assert status(server.send(with_key(keys, name, *ANOMALY))) == 200
    assert server.answered == ["/anomaly"] * 2
    server.client.headers.update(keys.headers("metrics"))
    samples = scrape(server.client)
    counted = total(samples, "elbo_scored_rows_total"), total(samples, "elbo_unobserved_rows_total")
    assert counted == ((2, 0) if live else (0, 2))
    labels = {"endpoint": "/anomaly", "status": "200", "key": name}
    requests = [
        value
        for (sample, found), value in samples.items()
        if sample == "elbo_requests_total" and labels.items() <= dict(found).items()
    ]
    assert requests == [2]


def test_live_traffic_without_the_scope_write_is_refused(server: Recorder, keys: KeySet) -> None:
    assert status(server.send(with_key(keys, "infer", "/anomaly?observe=true"))) == 403
    assert status(server.send(with_key(keys, "sender", "/anomaly?observe=true"))) == 200


def test_requests_that_wait_or_are_abandoned_count_for_the_limit_until_they_end(artifacts: Path, keys: KeySet) -> None:
    async def scenario() -> None:
        async with serving(options(artifacts, keys)) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), rows(1))
            whole = with_key(keys, "polite")
            writers = []
            for count in (2, 3):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(whole)
                await until(lambda count=count: service.batcher.pending_rows == count)  # type: ignore[misc]
                writers.append(writer)

            async def status_of_another() -> int:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(whole)
                line = await reader.readuntil(b"\r\n")
                writer.close()
                return status(line)

            assert await status_of_another() == 429
            writers[0].close()
            await until(lambda: service.batcher.pending_rows == 2)
            gate.open.set()
            await held
            assert await status_of_another() == 200
            writers[1].close()

    asyncio.run(scenario())


def test_request_that_is_refused_for_the_queue_with_a_known_head_needs_a_valid_key(
    artifacts: Path, keys: KeySet
) -> None:
    async def scenario() -> None:
        settings = options(artifacts, keys, max_rows=3, queue_rows=3)
        async with serving(settings) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), rows(3))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)

            async def next_status() -> int:
                writer.write(with_key(keys, "infer"))
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length[15:]))
                return status(head)

            assert [await next_status() for _ in range(5)] == [429] * 5  # the third is not parsed any more
            labels = {"endpoint": "/reconstruct", "model": "", "version": "", "status": "429", "key": "infer"}
            assert service.metrics.registry.get_sample_value("elbo_requests_total", labels) == 5
            keys.remove("infer")
            async with asyncio.timeout(20):
                while await next_status() != 401:
                    await asyncio.sleep(0.02)
            gate.open.set()
            await held
            writer.close()

    asyncio.run(scenario())


def test_request_that_is_undone_leaves_no_trace_in_the_limits() -> None:
    definition = ApiKey(
        sha256="0" * 64, scopes=frozenset({"infer"}), requests_per_second=0.001, burst=2, concurrent_requests=1
    )
    key = GrantedKey("few", definition, KeyLimits("few", definition, SharedCounters()))
    key.enter()
    key.undo_enter()
    for count in (1, 0):
        key.enter()
        assert b'"requests";r=%d;' % count in key.headers()[1][1]
        assert b'"concurrent";r=0' in key.headers()[1][1]
        key.exit(0)
    with pytest.raises(RateLimited):
        key.enter()
