"""When a version is no longer served, its metric series end, and their memory is used again."""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from service.app import create_app
from service.inference.registry import Catalogue
from service.monitoring.metrics import Metrics
from service.monitoring.request_record import RequestRecord
from service.monitoring.unserved_series import ENDED_SECONDS, FREED_SECONDS, HIDDEN_SECONDS
from service.settings import Settings
from service.shared_memory import Segment, SharedCounters, SharedDecisions
from tests.service.running import post, running
from tests.service.scrape import scrape

Clock = list[float]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return a list with the present time in seconds, as `service.shared_memory` reads it. Tests change this time."""
    now = [1000.0]
    monkeypatch.setattr("service.shared_memory.monotonic", lambda: now[0])
    return now


def catalogue_of(*versions: int) -> Catalogue:
    """Return a catalogue with these versions of the model `m`."""
    models: dict[int, Any] = {
        version: SimpleNamespace(
            name="m",
            version=version,
            metric_labels=("m", str(version)),
            manifest=SimpleNamespace(weights_sha256=f"weights {version}", kind="ae"),
            load_seconds=0.0,
            warm_seconds=0.0,
        )
        for version in versions
    }
    return Catalogue({"m": models} if models else {})


def count_requests(metrics: Metrics, version: int, requests: int = 1) -> None:
    for _ in range(requests):
        record = RequestRecord("", "POST", "/encode", None)
        record.endpoint, record.model, record.version, record.status, record.rows = "/encode", "m", version, 200, 1
        metrics.count(record)
        metrics.anomalies.alarms.add(("m", str(version), "a host"))


def exported(metrics: Metrics, catalogue: Catalogue, version: int) -> float | None:
    """Return the exported number of requests of a version of `m`; None if there is no such series."""
    text = metrics.exposition(catalogue).decode()
    start = f'elbo_requests_total{{endpoint="/encode",model="m",status="200",version="{version}"}} '
    values = [line.removeprefix(start) for line in text.splitlines() if line.startswith(start)]
    assert len(values) == text.count(f'elbo_alarms_total{{group="a host",model="m",version="{version}"}} ')
    return float(values[0]) if values else None


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_series_of_a_removed_version_ends_after_its_last_numbers_could_be_scraped(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr("service.app.RENEWAL_SECONDS", 0.05)
    shutil.copytree(artifacts / "ae", tmp_path / "ae")
    settings = Settings(artifacts=tmp_path, poll_seconds=0.1, keep_versions=1, backend="torchscript")
    app = create_app(settings)
    entries = app.state.service.metrics.anomalies.alarms._counters.local.entries

    def rows(client: httpx.Client, version: int) -> float | None:
        labels = {"endpoint": "/encode", "model": "ae", "version": str(version)}
        return scrape(client).get(("elbo_rows_total", frozenset(labels.items())))

    with running(app) as client:
        post(client, "/encode", {"inputs": [[0.5] * 64] * 3})
        shutil.copytree(tmp_path / "ae" / "1", tmp_path / "ae" / "2")
        wait_for(lambda: client.get("/models").json()["models"][0]["version"] == 2)
        post(client, "/encode", {"inputs": [[0.5] * 64] * 2})
        assert (rows(client, 1), rows(client, 2)) == (3, 2)
        clock[0] += HIDDEN_SECONDS - 1
        assert (rows(client, 1), rows(client, 2)) == (3, 2)
        clock[0] += 2
        assert (rows(client, 1), rows(client, 2)) == (None, 2)
        clock[0] += ENDED_SECONDS - HIDDEN_SECONDS
        wait_for(lambda: not [key for key in entries() if "ae" in key and "1" in key])
        assert (rows(client, 1), rows(client, 2)) == (None, 2)
        post(client, "/encode", {"inputs": [[0.5] * 64] * 2})
        assert rows(client, 2) == 4


@pytest.mark.parametrize("seed", range(4))
def test_counter_never_falls_while_processes_drop_a_version_and_free_it_at_different_times(
    clock: Clock, seed: int
) -> None:
    rng = random.Random(seed)
    segments = [Segment(2**20) for _ in range(3)]
    processes = [Metrics(SharedCounters(segments, index)) for index in range(3)]
    dropped_at = [clock[0] + rng.uniform(0, 100) for _ in processes]
    values: list[float | None] = []
    for metrics in processes:
        metrics.free_unserved(catalogue_of(1, 2))
        count_requests(metrics, 1, rng.randrange(1, 5))
    while clock[0] < max(dropped_at) + FREED_SECONDS + 20:
        clock[0] += rng.uniform(0, 6)
        index = rng.randrange(3)
        catalogue = catalogue_of(2) if clock[0] > dropped_at[index] else catalogue_of(1, 2)
        count_requests(processes[index], 2 if clock[0] > dropped_at[index] else 1)
        if rng.random() < 0.5:
            processes[index].free_unserved(catalogue)
        values.append(exported(processes[index], catalogue, 1))
    end = values.index(None)
    shown = [value for value in values[:end] if value is not None]
    assert len(shown) == end > 10
    assert shown == sorted(shown)
    assert set(values[end:]) == {None}, "the series came back"
    assert exported(processes[0], catalogue_of(2), 2) is not None


def test_memory_stops_growing_while_a_thousand_versions_are_served_one_after_another(clock: Clock) -> None:
    segments = [Segment(2**18), Segment(2**18)]
    processes = [Metrics(SharedCounters(segments, index)) for index in range(2)]
    decisions = [SharedDecisions(SharedCounters(segments, index), "backend", ("a", "b")) for index in range(2)]
    sizes = []
    for version in range(1, 1001):
        clock[0] += 10
        for metrics, decision in zip(processes, decisions, strict=True):
            decision.record_choice(f"weights {version}", "b")
            metrics.free_unserved(catalogue_of(version))
            count_requests(metrics, version, 2)
        sizes.append(segments[0]._words[0])
    assert sizes[-1] == sizes[len(sizes) // 2], "the memory still grows"
    assert not any(segment._full for segment in segments)
    assert len(processes[0]._requests._local) < FREED_SECONDS / 10 + 5
    assert [exported(metrics, catalogue_of(1000), 1000) for metrics in processes] == [4, 4]
    assert decisions[0].choice("weights 1000") == "b"
    assert decisions[0].choice("weights 1") is None


def test_request_that_ends_after_its_version_was_freed_is_counted_until_the_next_freeing(clock: Clock) -> None:
    metrics = Metrics(SharedCounters())
    metrics.free_unserved(catalogue_of(1, 2))
    count_requests(metrics, 1)
    clock[0] += ENDED_SECONDS + 1
    metrics.free_unserved(catalogue_of(2))
    assert exported(metrics, catalogue_of(2), 1) is None
    count_requests(metrics, 1)  # a stream that took longer than ENDED_SECONDS
    metrics.free_unserved(catalogue_of(2))
    assert exported(metrics, catalogue_of(2), 1) == 1
    clock[0] += ENDED_SECONDS + 1
    metrics.free_unserved(catalogue_of(2))
    assert exported(metrics, catalogue_of(2), 1) is None
    assert [key for key in metrics._requests._counters.local.entries() if "1" in key[1:]] == []


def test_series_of_requests_without_a_model_never_ends(clock: Clock) -> None:
    metrics = Metrics(SharedCounters())
    series = 'elbo_requests_total{endpoint="other",model="",status="404",version=""} '
    for requests in range(1, 4):
        record = RequestRecord("", "GET", "/some/where", None)
        record.endpoint, record.status = "other", 404
        metrics.count(record)
        metrics.free_unserved(catalogue_of(1))
        clock[0] += ENDED_SECONDS + 1
        metrics.free_unserved(catalogue_of(1))
        assert f"{series}{float(requests)}" in metrics.exposition(catalogue_of(1)).decode()


def test_version_that_is_served_again_continues_its_counters_unless_they_were_freed(clock: Clock) -> None:
    metrics = Metrics(SharedCounters())
    for pause, expected in ((HIDDEN_SECONDS + 1, 5.0), (FREED_SECONDS + 1, 1.0)):
        metrics.free_unserved(catalogue_of(1))
        count_requests(metrics, 1, 4 if expected == 5 else 3)
        clock[0] += pause
        metrics.free_unserved(catalogue_of())
        metrics.free_unserved(catalogue_of(1))
        count_requests(metrics, 1)
        assert exported(metrics, catalogue_of(1), 1) == expected
