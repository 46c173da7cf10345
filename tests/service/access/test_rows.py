"""Keys and rows: which rows are live traffic, limits on rows and streams, and requests that the protocol refuses."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.app import create_app
from service.settings import Settings
from tests.plain_http import NO_AUTHORITIES
from tests.service.access.keys import KeySet, one_key_per_scope
from tests.service.gate import Gate
from tests.service.running import running
from tests.service.scrape import scrape, total
from tests.service.serving import REQUEST, ROWS, serving

ROW = [0.5] * 64


@pytest.fixture
def keys(tmp_path: Path) -> KeySet:
    found = one_key_per_scope(tmp_path / "keys.toml")
    found.add("sender", "infer", "write")
    return found


@pytest.fixture
def client(artifacts: Path, keys: KeySet) -> Iterator[httpx.Client]:
    options = Settings(artifacts=artifacts, api_keys_file=keys.path, poll_seconds=0.05, log_level="error")
    with running(create_app(options)) as client:
        yield client


def live_rows(client: httpx.Client, keys: KeySet) -> tuple[float, float]:
    """Return how many rows were live traffic, and how many were not."""
    with httpx.Client(verify=NO_AUTHORITIES, base_url=client.base_url, headers=keys.headers("metrics")) as reader:
        samples = scrape(reader)
    return total(samples, "elbo_scored_rows_total"), total(samples, "elbo_unobserved_rows_total")


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("key", "observe", "status", "live"),
    [
        ("infer", None, 200, False),
        ("infer", "false", 200, False),
        ("infer", "true", 403, False),
        ("write", None, 403, False),  # scoring needs the scope infer
        ("sender", None, 200, True),
        ("sender", "true", 200, True),
        ("sender", "false", 200, False),
        ("admin", None, 200, True),
    ],
)
def test_rows_are_live_traffic_only_with_the_scope_write(
    client: httpx.Client, keys: KeySet, key: str, observe: str | None, status: int, live: bool, is_stream: bool
) -> None:
    before = live_rows(client, keys)
    parameters = {"model": "vae"} | ({} if observe is None else {"observe": observe})
    headers = keys.headers(key)
    if is_stream:
        headers |= {"Content-Type": "application/x-ndjson", "Accept": "application/x-ndjson"}
        body = json.dumps({f"pixel[{i},{j}]": 0.5 for i in range(8) for j in range(8)}).encode()
    else:
        headers |= {"Content-Type": "application/json"}
        body = json.dumps({"inputs": [ROW]}).encode()
    response = client.post("/anomaly", params=parameters, content=body, headers=headers)
    assert response.status_code == status, response.text
    after = live_rows(client, keys)
    accepted = status == 200
    assert (after[0] - before[0], after[1] - before[1]) == (accepted and live, accepted and not live)


def test_observe_in_the_body_needs_the_scope_write(client: httpx.Client, keys: KeySet) -> None:
    body = {"inputs": [ROW], "observe": True}
    assert client.post("/anomaly", json=body, headers=keys.headers("infer")).status_code == 403
    assert client.post("/anomaly", json=body, headers=keys.headers("sender")).status_code == 200


def test_request_that_exceeds_the_limit_on_rows_delays_the_next_request(client: httpx.Client, keys: KeySet) -> None:
    keys.add("slow", "infer", rows_per_second=10)
    wait_for_status(client, keys, "slow", 200)
    accepted = client.post("/encode", json={"inputs": [ROW] * 100}, headers=keys.headers("slow"))
    refused = client.post("/encode", json={"inputs": [ROW]}, headers=keys.headers("slow"))
    assert (accepted.status_code, refused.status_code) == (200, 429)
    assert refused.json()["code"] == "rate_limited"
    assert 5 <= int(refused.headers["retry-after"]) <= 9
    assert "ratelimit" not in refused.headers  # the headers cannot describe rows


def wait_for_status(client: httpx.Client, keys: KeySet, name: str, status: int) -> None:
    deadline = time.monotonic() + 20
    while client.get("/models", headers=keys.headers(name)).status_code != status:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stream(client: httpx.Client, keys: KeySet, name: str, pieces: Iterator[bytes]) -> list[dict[str, object]]:
    """Send `pieces` as the body of a stream, and return the lines of the response."""
    headers = keys.headers(name) | {"Content-Type": "application/x-ndjson", "Accept": "application/x-ndjson"}
    response = client.post("/anomaly?model=vae&explain=0", content=pieces, headers=headers)
    assert response.status_code == 200
    return [json.loads(line) for line in response.text.splitlines()]


NDJSON_ROW = json.dumps({f"pixel[{i},{j}]": 0.5 for i in range(8) for j in range(8)}).encode() + b"\n"


def test_stream_waits_for_the_limit_on_rows(client: httpx.Client, keys: KeySet) -> None:
    keys.add("slow", "infer", rows_per_second=40)
    wait_for_status(client, keys, "slow", 200)

    def pieces() -> Iterator[bytes]:
        for _ in range(4):
            yield NDJSON_ROW * 40
            time.sleep(0.05)

    started = time.monotonic()
    lines = stream(client, keys, "slow", pieces())
    assert len(lines) == 4 * 40 + 1
    assert lines[-1]["rows"] == 160
    assert time.monotonic() - started > 2  # 160 rows, of which 40 may come at once, at 40 rows per second


def test_stream_ends_when_its_key_is_removed(client: httpx.Client, keys: KeySet) -> None:
    def pieces() -> Iterator[bytes]:
        for number in range(100):
            yield NDJSON_ROW
            time.sleep(0.05)
            if number == 10:
                keys.remove("sender")

    lines = stream(client, keys, "sender", pieces())
    assert 10 < len(lines) < 100
    assert lines[-1]["code"] == "unauthorized"


def test_requests_in_progress_count_for_the_limit_until_they_end(artifacts: Path, keys: KeySet) -> None:
    keys.add("narrow", "infer", concurrent_requests=2)
    request = REQUEST.replace(b"\r\n", b"\r\nX-API-Key: " + keys.values["narrow"].encode() + b"\r\n", 1)

    async def scenario() -> None:
        settings = Settings(artifacts=artifacts, api_keys_file=keys.path, log_level="error")
        async with serving(settings) as (service, port):

            async def send() -> bytes:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request)
                status = (await reader.readline()).split()[1]
                writer.close()
                return status

            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), ROWS)
            waiting = [asyncio.create_task(send()) for _ in range(2)]
            async with asyncio.timeout(20):
                while service.batcher.pending_rows < 3:
                    await asyncio.sleep(0.01)
            assert await send() == b"429"
            gate.open.set()
            await held
            assert await asyncio.gather(*waiting) == [b"200", b"200"]
            # A client that goes away while its request waits gives its place back.
            assert [await send() for _ in range(3)] == [b"200"] * 3

    asyncio.run(scenario())


@pytest.mark.parametrize(("key", "status"), [(None, b"401"), ("metrics", b"403"), ("infer", b"429")])
def test_full_queue_is_shown_only_to_keys_that_may_use_it(
    artifacts: Path, keys: KeySet, key: str | None, status: bytes
) -> None:
    """The protocol refuses these requests before they get a task."""
    line = b"X-API-Key: " + keys.values[key].encode() + b"\r\n" if key else b""
    request = REQUEST.replace(b"\r\n", b"\r\n" + line, 1)

    async def scenario() -> None:
        settings = Settings(artifacts=artifacts, api_keys_file=keys.path, max_rows=1, queue_rows=1, log_level="error")
        async with serving(settings) as (service, port):
            gate = Gate()
            held = await gate.hold(service.batcher, service.find(None), ROWS)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            assert (await reader.readline()).split()[1] == status
            answer = await reader.read(65536)
            assert (b"overloaded" in answer) == (key == "infer")
            assert (b"pending" in answer) == (key == "infer")
            writer.close()
            gate.open.set()
            await held
            labels = {"endpoint": "/encode", "status": status.decode(), "key": key or "", "model": "", "version": ""}
            assert service.metrics.registry.get_sample_value("elbo_requests_total", labels) == 1

    asyncio.run(scenario())
