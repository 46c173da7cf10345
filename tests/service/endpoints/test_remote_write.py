"""Prometheus remote write: what it requires of receivers, and invalid, repeated and reordered samples."""

import math
import re
import shutil
import struct
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cramjam
import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from service.anomaly import alignment as alignment_module
from service.anomaly.alignment import SampleAligner
from service.anomaly.series_mapping import MappingError, read_mappings
from service.app import create_app
from service.codec import remote_write
from service.codec.budget import NO_LIMIT
from service.codec.feature_names import FeatureSelectors
from service.codec.remote_write import METRIC_NAME_LABEL, STALE_BITS, Series
from service.endpoints import remote_write as endpoint
from service.errors import BodyTooLarge, InvalidEncoding, InvalidProtobuf, NotReady
from service.inference.batcher import Batcher
from service.settings import Settings
from tests.service.hosts import HOST_FEATURES, as_inputs, host_rows, post_anomaly
from tests.service.running import running
from tests.service.scrape import scrape
from tests.waiting import wait_until

HEADERS = {
    "content-type": "application/x-protobuf",
    "content-encoding": "snappy",
    "x-prometheus-remote-write-version": "0.1.0",
}
STALE_NAN = struct.unpack("<d", struct.pack("<Q", STALE_BITS))[0]
START = 1_700_000_000_000
MAPPING = """
[hosts]
group = ["cluster", "instance"]
wait_seconds = 0.5
[hosts.features]
cpu = 'cpu_busy{mode="all"}'
"memory/used" = "memory_used"
"""


@pytest.fixture(scope="module")
def app(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    mapping = tmp_path_factory.mktemp("mapping") / "map.toml"
    mapping.write_text(MAPPING)
    options = {"log_level": "warning", "backend": "torchscript", "default_model": "hosts"}
    return create_app(Settings(artifacts=artifacts, remote_write=mapping, max_body_bytes=2**20, **options))  # type: ignore[arg-type] # options of several types


@pytest.fixture(scope="module")
def hosts(app: FastAPI) -> Iterator[httpx.Client]:
    with running(app) as client:
        yield client


def labels(name: str, **more: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({METRIC_NAME_LABEL: name, "cluster": "c", "instance": "a", **more}.items()))


def series(found: list[list[float]], instance: str = "a", first: int = START) -> list[Series]:
    """Return the four series of one host: row i of `found` holds their values i seconds after `first`."""
    names = [("cpu_busy", {"mode": "all"}), ("memory_used", {}), ("disk~io", {}), ("load", {})]
    return [
        (labels(name, instance=instance, **more), [(first + 1000 * i, row[j]) for i, row in enumerate(found)])
        for j, (name, more) in enumerate(names)
    ]


def send(client: httpx.Client, found: list[Series], **headers: str) -> httpx.Response:
    return client.post("/api/v1/write", content=remote_write.dumps(found), headers=HEADERS | headers)


def value(client: httpx.Client, name: str, **more: str) -> float:
    labels = {"model": "hosts", "version": "1", **more}
    return scrape(client).get((name, frozenset(labels.items())), 0.0)


def loads(body: bytes, max_bytes: int) -> list[Series]:
    """Return all series of a request body."""
    reader = remote_write.SeriesReader(body, max_bytes, NO_LIMIT)
    found = []
    while reader.has_more:
        found += reader.read()
    return found


def test_message_encoded_by_hand_is_decoded() -> None:
    """The bytes follow prompb/types.proto: fields 1 and 2, with wire types 2 (length), 1 (fixed 64) and 0 (varint)."""
    label = b"\x0a\x08__name__\x12\x02up"
    sample = b"\x09" + struct.pack("<d", 1.5) + b"\x10\xe8\x07"
    exemplar = b"\x1a\x02\x10\x01"  # a field that the receiver ignores
    one = b"\x0a" + bytes([len(label)]) + label + b"\x12" + bytes([len(sample)]) + sample + exemplar
    body = bytes(cramjam.snappy.compress_raw(b"\x0a" + bytes([len(one)]) + one))
    assert loads(body, 1000) == [((("__name__", "up"),), [(1000, 1.5)])]


@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.text(max_size=8), st.text(max_size=8)), max_size=4).map(tuple),
            st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False)), max_size=4),
        ),
        max_size=4,
    )
)
def test_series_are_the_same_after_encoding_and_decoding(found: list[Series]) -> None:
    with_samples = [(labels, samples) for labels, samples in found if samples]
    assert loads(remote_write.dumps(found), 2**20) == with_samples


def test_series_of_a_megabyte_is_read_in_parts_with_the_same_labels_and_samples() -> None:
    labels = (("__name__", "up"), ("instance", "a" * 40_000))
    samples = [(moment, moment / 7) for moment in range(60_000)]
    found = loads(remote_write.dumps([(labels, samples), ((("__name__", "down"),), [(1, 2.0)])]), 2**22)
    assert len(found) > 2
    assert {labels for labels, _ in found[:-1]} == {labels}
    assert [sample for _, part in found[:-1] for sample in part] == samples
    assert found[-1] == ((("__name__", "down"),), [(1, 2.0)])


def field(number: int, value: bytes) -> bytes:
    """Return a field of a protobuf message."""
    length = len(value)
    size = bytearray()
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *size, length]) + value


EMPTY_SAMPLE = field(2, b"")
HOSTILE = {
    "empty series": field(1, b"") * 2**20,
    "series of one empty sample": field(1, EMPTY_SAMPLE) * 2**19,
    "empty labels of one series": field(1, field(1, b"") * 2**20 + EMPTY_SAMPLE),
    "empty samples of one series": field(1, EMPTY_SAMPLE * 2**20),
    "300 empty labels per series": field(1, field(1, b"") * 300 + EMPTY_SAMPLE) * 2**12,
    "exemplars of one series": field(1, field(3, b"") * 2**20),
    "numbers that no version of the protocol has": b"\x18\x00" * 2**20,
    "a label of 500 KB": field(1, field(1, field(2, b"x" * 500_000)) + EMPTY_SAMPLE),
    "a label of 70 KB": field(1, field(1, field(2, b"x" * 70_000)) + EMPTY_SAMPLE),
    "two labels of 40 KB": field(1, field(1, field(2, b"x" * 40_000)) * 2 + EMPTY_SAMPLE),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_small_request_with_many_objects_or_long_labels_is_refused(artifacts: Path, attack: str) -> None:
    settings = Settings(artifacts=artifacts, default_model="hosts", log_level="error", backend="torchscript")
    body = bytes(cramjam.snappy.compress_raw(HOSTILE[attack]))
    with running(create_app(settings)) as client:
        response = client.post("/api/v1/write", content=body, headers=HEADERS)
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


def test_request_whose_samples_form_more_rows_than_allowed_is_refused(artifacts: Path) -> None:
    settings = Settings(
        artifacts=artifacts, default_model="hosts", log_level="error", backend="torchscript", max_rows=100
    )
    labels = (("__name__", "load"), ("instance", "a"))
    with running(create_app(settings)) as client:
        for first, count, status in ((0, 100, 204), (1000, 101, 413), (0, 100, 204)):
            samples = [(START + first + index, 1.0) for index in range(count)]
            body = remote_write.dumps([(labels, samples)])
            assert client.post("/api/v1/write", content=body, headers=HEADERS).status_code == status


def test_label_sets_that_stay_in_memory_take_a_bounded_number_of_bytes() -> None:
    aligner = new_aligner()
    tracemalloc.start()
    try:
        for number in range(3000):  # 150 MB
            labels = (("__name__", f"m{number}"), ("text", f"{number:050000}"))
            aligner.add([(labels, [(1, 1.0)])], 0.0)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 80 * 2**20
    assert aligner.outcomes["unknown"] == 3000


def test_long_group_names_and_long_names_of_unknown_metrics_are_shortened() -> None:
    aligner = new_aligner()
    for end in "ab":
        name = "x" * 50_000 + end
        aligner.add([((("__name__", "load"), ("instance", name)), [(1, 1.0)])], 0.0)
        aligner.add([((("__name__", name),), [(1, 1.0)])], 0.0)
    groups = [row.group for row in aligner.pop_ready(0.0, flush=True)]
    assert len(set(groups)) == 2
    assert max(map(len, groups)) == 128
    assert max(map(len, aligner.unknown_metrics)) == 200


def test_earliest_rows_are_returned_first_and_rows_above_the_limit_by_the_next_call() -> None:
    aligner = new_aligner()
    for moment in (3, 1, 2):
        aligner.add([((("__name__", "load"), ("instance", "a")), [(moment, 1.0)])], 0.0)
    popped = [[row.milliseconds for row in aligner.pop_ready(0.0, flush=True, limit=2)] for _ in range(3)]
    assert popped == [[1, 2], [3], []]


@given(st.binary(max_size=60))
def test_random_bytes_are_decoded_or_raise_a_service_error(body: bytes) -> None:
    for content in (body, bytes(cramjam.snappy.compress_raw(body))):
        with suppress(InvalidEncoding, InvalidProtobuf, BodyTooLarge):
            for found, samples in loads(content, 2**16):
                assert all(type(name) is str for pair in found for name in pair)
                assert all(type(moment) is int for moment, _ in samples)


def test_rows_from_samples_are_scored_like_posted_rows(hosts: httpx.Client) -> None:
    before, scored = value(hosts, "elbo_p_value_sum"), value(hosts, "elbo_scored_rows_total")
    response = send(hosts, series(host_rows(40)))
    assert (response.status_code, response.content) == (204, b"")
    assert "content-length" not in response.headers
    assert value(hosts, "elbo_scored_rows_total") - scored == 40
    summed = value(hosts, "elbo_p_value_sum") - before
    expected = sum(result["p_value"] for result in post_anomaly(hosts, as_inputs(host_rows(40)))["results"])
    assert summed == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"content-type": "application/x-protobuf;proto=io.prometheus.write.v2.Request"}, None, 415),
        ({"content-type": "application/x-protobuf; proto=prometheus.WriteRequest"}, None, 204),
        ({"content-type": "application/json"}, None, 415),
        ({"content-encoding": "gzip"}, None, 415),
        ({"content-encoding": ""}, None, 415),
        ({}, b"\xff" * 20, 422),
        ({}, b"", 422),
        ({}, bytes(cramjam.snappy.compress_raw(b"\x0a\x50abc")), 422),
        ({}, bytes(cramjam.snappy.compress_raw(bytes(2**21))), 413),
        ({}, bytes(2**20 + 1), 413),
    ],
)
def test_invalid_request_gets_a_4xx_status_that_prometheus_does_not_retry(
    hosts: httpx.Client, headers: dict[str, str], content: bytes | None, status: int
) -> None:
    body = remote_write.dumps([]) if content is None else content
    response = hosts.post("/api/v1/write", content=body, headers=HEADERS | headers)
    assert response.status_code == status, response.text


def test_request_gets_a_503_if_the_model_is_missing_or_the_memory_is_full(artifacts: Path, tmp_path: Path) -> None:
    with running(create_app(Settings(artifacts=tmp_path, log_level="error"))) as client:
        assert send(client, series(host_rows(1))).status_code == 503
    app = create_app(Settings(artifacts=artifacts, default_model="hosts", log_level="error"))
    with running(app) as client:
        app.state.service.admission.max_held_bytes = 10
        response = send(client, series(host_rows(3)))
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")


@pytest.fixture(scope="module")
def hosts_only(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with the model `hosts` alone."""
    root = tmp_path_factory.mktemp("hosts-only")
    shutil.copytree(artifacts / "hosts", root / "hosts")
    return root


def scored(app: FastAPI) -> float:
    """Return how many rows of the model `hosts` have been scored."""
    found: float = app.state.service.metrics.anomalies._scored.sums().get(("hosts", "1"), [0.0])[0]
    return found


@pytest.mark.parametrize(("mapping", "status"), [("[later]", 503), ("[later]\n[hosts]\nwait_seconds = 0.5", 204)])
def test_mapped_model_that_is_not_served_gives_503_only_if_no_other_mapped_model_is(
    hosts_only: Path, tmp_path: Path, mapping: str, status: int
) -> None:
    (tmp_path / "map.toml").write_text(mapping)
    app = create_app(Settings(artifacts=hosts_only, remote_write=tmp_path / "map.toml", log_level="error"))
    with running(app) as client:
        response = send(client, series(host_rows(2)))
        assert response.status_code == status
        if status == 503:
            assert "later" in response.json()["detail"]
            assert response.headers["retry-after"] == "5"


def test_request_while_the_server_shuts_down_gets_503_and_adds_no_samples(hosts_only: Path) -> None:
    app = create_app(Settings(artifacts=hosts_only, log_level="error"))
    with running(app) as client:
        app.state.service.draining = True  # as SIGTERM does
        response = send(client, series(host_rows(2)))
    assert (response.status_code, response.json()["detail"]) == (503, "the server is shutting down")
    assert scored(app) == 0


def test_rows_that_cannot_be_scored_now_are_scored_later_and_once(
    hosts_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "map.toml").write_text(MAPPING)
    app = create_app(Settings(artifacts=hosts_only, remote_write=tmp_path / "map.toml", log_level="warning"))
    run, failures = Batcher.run, iter([NotReady("the model has just been removed")])

    async def run_or_fail(self: Batcher, *arguments: Any, **options: Any) -> Any:
        for failure in failures:
            raise failure
        return await run(self, *arguments, **options)

    with running(app) as client:
        monkeypatch.setattr(Batcher, "run", run_or_fail)
        assert send(client, series(host_rows(3))).status_code == 204
        wait_until(lambda: scored(app) == 3)
    assert scored(app) == 3
    assert "will retry: the model has just been removed" in caplog.text


def test_more_waiting_rows_than_allowed_give_503_and_are_not_lost(
    hosts_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "MAX_INCOMPLETE_ROWS", 5)
    monkeypatch.setattr(endpoint, "MAX_WAITING_ROWS", 5)
    (tmp_path / "map.toml").write_text(MAPPING.replace("0.5", "3600"))
    app = create_app(Settings(artifacts=hosts_only, remote_write=tmp_path / "map.toml", log_level="error"))
    with running(app) as client:
        accepted = send(client, series(host_rows(5))[:3])
        refused = send(client, series(host_rows(6))[:3])
    assert (accepted.status_code, refused.status_code) == (204, 503)
    assert "6 rows wait to be scored: expected at most 5" in refused.json()["detail"]
    assert scored(app) == 6  # when the server stops, it scores the waiting rows


def outcomes(client: httpx.Client) -> dict[str, float]:
    found = scrape(client).items()
    return {dict(key)["outcome"]: count for (name, key), count in found if name == "elbo_remote_samples_total"}


def test_samples_are_counted_by_outcome_and_rows_with_too_few_samples_as_unreadable(
    artifacts: Path, tmp_path: Path
) -> None:
    mapping = tmp_path / "map.toml"
    mapping.write_text(MAPPING)
    with running(create_app(Settings(artifacts=artifacts, remote_write=mapping, log_level="error"))) as client:
        for _ in range(3):
            assert send(client, series(host_rows(5))).status_code == 204
        assert value(client, "elbo_scored_rows_total") == 5
        assert outcomes(client) == {"used": 20, "duplicate": 40}
        send(client, [(labels(f"other_{i}"), [(START, 1.0)]) for i in range(7)])
        send(client, [(labels("load"), [(START + 99_000, STALE_NAN), (START + 99_000, math.nan)])])
        assert outcomes(client) == {"used": 20, "duplicate": 40, "unknown": 7, "stale": 1, "nan": 1}
        partial = series(host_rows(1), first=START + 500_000)
        send(client, partial[:3])  # without the sample of the last feature
        deadline = time.monotonic() + 10
        while value(client, "elbo_scored_rows_total") == 5 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert value(client, "elbo_missing_values_total", feature="load") == 1
        assert value(client, "elbo_scored_rows_total") == 6
        send(client, partial[:1] + series(host_rows(1), first=START + 600_000)[:1])
        deadline = time.monotonic() + 10
        while value(client, "elbo_unreadable_rows_total") == 0 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert value(client, "elbo_unreadable_rows_total") == 1  # one of four features is too few


def test_waiting_rows_are_scored_at_shutdown(artifacts: Path, tmp_path: Path) -> None:
    mapping = tmp_path / "map.toml"
    mapping.write_text(MAPPING.replace("0.5", "3600"))
    app = create_app(Settings(artifacts=artifacts, remote_write=mapping, log_level="error"))
    with running(app) as client:
        send(client, series(host_rows(2))[:3])
        assert scrape(client)["elbo_remote_waiting_rows", frozenset()] == 2
    assert app.state.service.metrics.anomalies._scored.sums()["hosts", "1"] == [2.0]


def new_aligner(wait: float = 10.0) -> SampleAligner:
    return SampleAligner(HOST_FEATURES, FeatureSelectors({name: name for name in HOST_FEATURES}), ["instance"], wait)


def samples(row: list[float], moment: int, instance: str = "a") -> list[Series]:
    return [
        (((METRIC_NAME_LABEL, name), ("instance", instance)), [(moment, number)])
        for name, number in zip(HOST_FEATURES, row, strict=True)
    ]


def test_samples_in_any_order_form_the_same_rows() -> None:
    rng = np.random.default_rng(0)
    found = host_rows(20)
    pieces = [one for i, row in enumerate(found) for one in samples(row, 1000 * i, "ab"[i % 2])]
    aligner, rows = new_aligner(), []
    for index in rng.permutation(len(pieces)):
        aligner.add([pieces[index]], 0.0)
        rows += aligner.pop_ready(0.0)
    assert sorted(row.milliseconds for row in rows) == [1000 * i for i in range(20)]
    for row in rows:
        index = row.milliseconds // 1000
        assert row.group == "ab"[index % 2]
        assert [row.values[name] for name in HOST_FEATURES] == found[index]
    assert aligner.pending_rows == 0


def test_second_series_for_a_feature_is_counted_as_ambiguous() -> None:
    aligner = new_aligner()
    extra = (((METRIC_NAME_LABEL, "load"), ("instance", "a"), ("device", "b")), [(5, 99.0)])
    aligner.add([*samples([1.0, 2.0, 3.0, 4.0], 5)[3:], extra, *samples([1.0, 2.0, 3.0, 4.0], 5)[:3]], 0.0)
    assert aligner.outcomes == {"used": 4, "ambiguous": 1}
    assert aligner.pop_ready(0.0)[0].values["load"] == 4.0


def test_memory_of_the_aligner_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_INCOMPLETE_ROWS", "MAX_SERIES", "MAX_GROUPS"):
        monkeypatch.setattr(alignment_module, name, 50)
    aligner, rows = new_aligner(wait=1e9), 0
    for i in range(2000):
        aligner.add(samples([1.0] * 4, i, f"host{i}")[: 1 + i % 4], 0.0)
        aligner.add([(((METRIC_NAME_LABEL, f"noise{i}"),), [(i, 1.0)])], 0.0)
        rows += len(aligner.pop_ready(0.0))
    assert len(aligner._incomplete) <= 50
    assert len(aligner._targets) <= 50
    assert len(aligner._completed_times) <= 51
    assert rows + aligner.pending_rows == 2000


def test_sample_older_than_the_remembered_times_is_counted_as_late() -> None:
    aligner = new_aligner()
    for i in range(1, 100):
        aligner.add(samples([1.0] * 4, 1000 * i), 0.0)
    assert len(aligner.pop_ready(0.0)) == 99
    aligner.add(samples([1.0] * 4, 0), 0.0)
    assert (aligner.outcomes["late"], aligner.pending_rows) == (4, 0)


def test_requeued_rows_come_before_newer_rows() -> None:
    aligner = new_aligner()
    aligner.add([*samples([1.0] * 4, 1), *samples([1.0] * 4, 2)], 0.0)
    rows = aligner.pop_ready(0.0)
    aligner.requeue(rows)
    aligner.add(samples([1.0] * 4, 3), 0.0)
    assert [row.milliseconds for row in aligner.pop_ready(0.0)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[hosts", "cannot be read as TOML"),
        ("", "expected one per model"),
        ("[hosts]\nalpha = 2", "hosts|alpha"),
        ("[hosts]\ncolour = 2", "colour"),
        ('[hosts]\ngroup = "a"', "group"),
    ],
)
def test_invalid_mapping_gives_an_error_with_file_and_field(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "map.toml"
    path.write_text(text)
    with pytest.raises(MappingError, match=words) as caught:
        read_mappings(path)
    assert str(path) in str(caught.value)
    with pytest.raises(MappingError, match="No such file"):
        read_mappings(tmp_path / "none.toml")


def test_anomalous_rows_are_logged_with_their_causes(hosts: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "elbo.receiver")
    send(hosts, series([[1e3, 1e5, 1e3, 1e3]], instance="ill", first=START + 10**9))
    (record,) = [record for record in caplog.records if record.message == "anomalous row"]
    fields: dict[str, Any] = record.fields  # type: ignore[attr-defined] # set by `extra`
    assert (fields["model"], fields["group"]) == ("hosts", "c,ill")
    assert fields["severity"] > 1
    assert set(fields["causes"]) < set(HOST_FEATURES)
    assert re.fullmatch(r"[\d.]+", str(fields["time"]))


@pytest.mark.parametrize(
    ("extra", "warnings"), [("alpha = 0.001", 1), ("alpha = 0.001\nextrapolated = true", 0), ("", 0)]
)
def test_server_warns_once_if_alpha_is_so_small_that_no_row_can_be_anomalous(
    artifacts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, extra: str, warnings: int
) -> None:
    mapping = tmp_path / "map.toml"
    mapping.write_text(MAPPING.replace("wait_seconds = 0.5", f"wait_seconds = 0.5\n{extra}"))
    with running(create_app(Settings(artifacts=artifacts, remote_write=mapping, log_level="warning"))) as client:
        for second in range(3):
            assert send(client, series([[1e3, 1e5, 1e3, 1e3]], first=START + 1000 * second)).status_code == 204
    found = [record.getMessage() for record in caplog.records if "can raise no alert" in record.getMessage()]
    assert len(found) == warnings
    assert all("hosts@1: alpha is 0.001" in message for message in found)
