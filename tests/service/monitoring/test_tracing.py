"""The sampling of requests, and the queue of their spans."""

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from service.monitoring.request_record import RequestRecord
from service.monitoring.tracing import (
    EXPORT_FAILED,
    EXPORTED,
    QUEUE_FULL,
    SPANS_PER_REQUEST,
    Sampler,
    Tracer,
    TracingError,
    read_traceparent,
    sampler_of,
    tracer_of,
)
from tests.waiting import wait_until

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ALWAYS = Sampler(2**64, follows_parent=True)


def record(traceparent: str = "", compute: float = 0.002) -> RequestRecord:
    found = RequestRecord("id", "POST", "/anomaly", "127.0.0.1", endpoint="/anomaly", status=200)
    found.traceparent = traceparent.encode()
    found.compute = compute
    return found


def tracer(sampler: Sampler = ALWAYS, export: Any = None, **options: Any) -> tuple[Tracer, Counter[str], list[Any]]:
    """Return a tracer whose spans are the requests themselves, its counts, and what it has exported."""
    counts: Counter[str] = Counter()
    sent: list[Any] = []

    def keep(spans: Sequence[Any]) -> bool:
        sent.extend(spans)
        return True

    def count(outcome: str, spans: int) -> None:
        counts[outcome] += spans

    made = Tracer(sampler, export or keep, lambda request, _: [request], count, **{"delay": 0.01, **options})
    return made, counts, sent


@pytest.mark.parametrize(
    ("header", "is_sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", True),
    ],
)
def test_traceparent_that_is_valid_gives_its_ids_and_its_flag(header: str, is_sampled: bool) -> None:
    parent = read_traceparent(header.encode())
    assert parent == (int(TRACE, 16), int(SPAN, 16), is_sampled)


@pytest.mark.parametrize(
    "header",
    [
        "", "00", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01-more", f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}-1", f"00-{TRACE}-{SPAN}",
        f"cc-{TRACE}-{SPAN}-01-{'x' * 600}",
    ],
)  # fmt: skip
def test_traceparent_that_is_not_valid_is_ignored(header: str) -> None:
    assert read_traceparent(header.encode()) is None


@pytest.mark.parametrize(
    ("name", "argument", "share", "follows_parent"),
    [
        ("", "", 1.0, True),
        ("always_on", "", 1.0, False),
        ("always_off", "", 0.0, False),
        ("parentbased_always_off", "", 0.0, True),
        ("traceidratio", "0.25", 0.25, False),
        ("parentbased_traceidratio", "0.01", 0.01, True),
        ("parentbased_traceidratio", "", 1.0, True),
    ],
)
def test_sampler_is_the_one_that_the_variables_name(
    name: str, argument: str, share: float, follows_parent: bool
) -> None:
    found = sampler_of({"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": argument})
    assert found == (round(share * 2**64), follows_parent)


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_TRACES_SAMPLER": "sometimes"},
        {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "1.5"},
        {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "nan"},
        {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "few"},
        {"OTEL_BSP_SCHEDULE_DELAY": "0"},
    ],
)
def test_variable_that_is_not_valid_is_an_error_that_names_it(variables: dict[str, str]) -> None:
    with pytest.raises(TracingError, match=f"^{list(variables)[-1]} should be"):
        tracer_of({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", **variables}, lambda *_: None)


@pytest.mark.parametrize("variables", [{}, {"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_tracing_is_off_without_an_endpoint_or_by_the_variables_of_opentelemetry(variables: dict[str, str]) -> None:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"} if variables else {}
    assert tracer_of({**endpoint, **variables}, lambda *_: None) is None


@pytest.mark.parametrize("header", ["", f"00-{'f' * 32}-{SPAN}-01"])
def test_share_of_sampled_requests_is_the_ratio(header: str) -> None:
    made, _, _ = tracer(Sampler(2**62, follows_parent=True), max_requests=10_000)
    sampled = sum(made.finish(record(header)) for _ in range(4000))
    made.close()
    if header:  # the parent decides
        assert sampled == 4000
    else:  # a quarter: the standard deviation is 27
        assert abs(sampled - 1000) < 6 * 27


def test_decision_of_the_client_is_followed_only_if_the_sampler_is_based_on_it() -> None:
    unsampled = f"00-{TRACE}-{SPAN}-00"
    followed, _, _ = tracer()
    assert not followed.finish(kept := record(unsampled))
    assert kept.trace_id == TRACE  # for the log, although no span is sent
    ignored, _, sent = tracer(ALWAYS._replace(follows_parent=False))
    assert ignored.finish(record(unsampled))
    ignored.close()
    assert [(each.trace_id, each.parent_id) for each in sent] == [(int(TRACE, 16), int(SPAN, 16))]


def test_request_without_a_traceparent_gets_a_new_trace_id() -> None:
    made, counts, sent = tracer()
    records = [record() for _ in range(20)]
    assert all(made.finish(each) for each in records)
    made.close()
    assert len({each.trace_id for each in records}) == 20
    assert [f"{each.trace_id:032x}" for each in sent] == [each.trace_id for each in records]
    assert {each.parent_id for each in sent} == {None}
    assert counts == {EXPORTED: 20}


def test_spans_beyond_the_queue_are_counted_as_lost_and_nobody_waits() -> None:
    gate, is_busy = threading.Event(), threading.Event()

    def export(_: Sequence[Any]) -> bool:
        is_busy.set()
        return gate.wait(20)

    made, counts, _ = tracer(export=export, max_requests=3, batch_requests=1)
    made.finish(record())
    assert is_busy.wait(20)  # the thread has taken the first request out of the queue
    for _ in range(3):
        made.finish(record())
    made.finish(record())
    made.finish(record(compute=0.0))
    assert counts == {QUEUE_FULL: 5 + 1}  # a request without steps has one span
    gate.set()
    made.close()
    assert counts == {QUEUE_FULL: 6, EXPORTED: 4}


@pytest.mark.parametrize("is_raised", [False, True])
def test_spans_that_the_collector_refuses_are_counted_as_lost_and_later_ones_are_sent(is_raised: bool) -> None:
    fails = [True]

    def export(_: Sequence[Any]) -> bool:
        if fails and is_raised:
            raise OSError("no collector")
        return not fails

    made, counts, _ = tracer(export=export)
    made.finish(record())
    wait_until(lambda: counts[EXPORT_FAILED] == 1)
    fails.clear()
    made.finish(record())
    wait_until(lambda: counts[EXPORTED] == 1)
    made.close()
    assert counts == {EXPORT_FAILED: 1, EXPORTED: 1}


def test_requests_that_end_while_a_batch_is_sent_wait_for_a_full_batch() -> None:
    sizes: list[int] = []
    arriving = iter(range(10))

    def export(spans: Sequence[Any]) -> bool:
        sizes.append(len(spans))
        for _ in range(3):  # requests end meanwhile
            if next(arriving, None) is not None:
                made.finish(record())
        return True

    made, _, _ = tracer(export=export, batch_requests=20, delay=60.0)
    for _ in range(20):
        made.finish(record())
    wait_until(lambda: sizes)
    wait_until(lambda: made.queued_requests == 3)
    assert sizes == [20]
    made.close()
    assert sizes[1] == 3


def test_requests_whose_spans_cannot_be_made_are_counted_and_the_others_are_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counts: Counter[str] = Counter()
    sent: list[Any] = []

    def make(request: Any, _offset: float) -> list[Any]:
        if request.record.path == "/broken":
            raise ValueError("broken")
        return [request] * SPANS_PER_REQUEST

    def export(spans: Sequence[Any]) -> bool:
        sent.extend(spans)
        return True

    def count(outcome: str, spans: int) -> None:
        counts[outcome] += spans

    made = Tracer(ALWAYS, export, make, count, delay=60.0)
    for path in ("/a", "/broken", "/b", "/broken"):
        found = record()
        found.path = path
        made.finish(found)
    made.close()
    assert counts == {EXPORTED: 2 * SPANS_PER_REQUEST, EXPORT_FAILED: 2 * SPANS_PER_REQUEST}
    assert [each.record.path for each in sent[::SPANS_PER_REQUEST]] == ["/a", "/b"]
    assert sum("failed to send spans" in each.message for each in caplog.records) == 1


def test_exporter_without_the_method_that_sends_bytes_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("opentelemetry.exporter.otlp.common.http._OTLPHTTPClient.export")
    with pytest.raises(TracingError, match="install the version that the extra tracing"):
        tracer_of({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, lambda *_: None)
