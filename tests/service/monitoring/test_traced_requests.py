"""Requests to a server process are traced: a real OTLP collector gets their spans."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.monitoring.metrics import LATENCY_BOUNDS
from tests.service.monitoring.collector import Collector, attributes, collector
from tests.service.process import ServerProcess, server_starter
from tests.waiting import wait_until

pytestmark = pytest.mark.slow
SPAN = "b7ad6b7169203331"
STEPS = {"parse", "queue", "compute", "write"}
ROWS = {"inputs": [[0.1, 110.0, 0.6, -1.0]]}


@pytest.fixture(scope="module")
def traces() -> Iterator[Collector]:
    with collector() as found:
        yield found


@pytest.fixture(scope="module")
def server(artifacts: Path, traces: Collector) -> Iterator[ServerProcess]:
    """Yield a server that traces only the requests whose client asks for it."""
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": traces.url,
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_SERVICE_NAME": "scores",
        "OTEL_RESOURCE_ATTRIBUTES": "region=north",
    }
    with server_starter() as start:
        yield start(artifacts, environment=environment, LOG_FORMAT="json", DEFAULT_MODEL="hosts")


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with server.client() as found:
        yield found


def trace_id(number: int) -> str:
    return f"{number:032x}"


def header(number: int, flag: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{trace_id(number)}-{SPAN}-{flag}"}


def spans_of(traces: Collector, number: int) -> dict[str, Any]:
    """Return the spans of a trace by name, once all of them have arrived."""
    wait_until(lambda: any(each.kind == 2 for each in traces.of_trace(trace_id(number)).values()))
    return traces.of_trace(trace_id(number))


@pytest.mark.parametrize("is_direct", [True, False])
@pytest.mark.parametrize("path", ["/anomaly", "/reconstruct", "/v2/models/hosts/infer"])
def test_traced_request_has_a_span_with_one_for_each_step(
    client: httpx.Client, traces: Collector, path: str, is_direct: bool
) -> None:
    number = 2 * len(path) + is_direct
    # A request with an option in the body is answered by a task.
    body: Any = ROWS if is_direct else {**ROWS, "explain": 1} if path == "/anomaly" else ROWS
    if path.startswith("/v2"):
        body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": ROWS["inputs"]}]}
    extra = {} if is_direct else {"Origin": "http://127.0.0.1"}
    response = client.post(path, json=body, headers={**header(number), **extra})
    assert response.status_code == 200, response.text
    timing = {
        name: float(value)
        for name, value in (part.strip().split(";dur=") for part in response.headers["server-timing"].split(","))
    }
    found = spans_of(traces, number)
    route = path.replace("hosts", "{name}")
    root = found.pop(f"POST {route}")
    assert set(found) == STEPS
    assert root.parent_span_id.hex() == SPAN
    assert (root.kind, root.status.code) == (2, 0)
    for name, span in found.items():
        assert span.parent_span_id == root.span_id
        seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        assert seconds == pytest.approx(timing[name] / 1e3, abs=2e-6)
        assert root.start_time_unix_nano - 2e3 <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano + 2e3
    known = attributes(root)
    assert (known["http.route"], known["url.path"], known["http.response.status_code"]) == (route, path, 200)
    assert (known["elbo.model"], known["elbo.version"], known["elbo.rows"]) == ("hosts", 1, 1)
    assert known["elbo.request_id"] == response.headers["x-request-id"]


def test_steps_of_a_direct_request_follow_each_other(client: httpx.Client, traces: Collector) -> None:
    client.post("/anomaly", json=ROWS, headers=header(101))
    found = spans_of(traces, 101)
    ends = [found[name].end_time_unix_nano for name in ("parse", "queue", "compute", "write")]
    starts = [found[name].start_time_unix_nano for name in ("parse", "queue", "compute", "write")]
    assert ends == sorted(ends)
    assert all(end <= start + 2e3 for end, start in zip(ends, starts[1:], strict=False))


def test_request_that_the_client_does_not_sample_is_logged_with_its_trace_but_not_sent(
    server: ServerProcess, client: httpx.Client, traces: Collector
) -> None:
    client.post("/anomaly", json=ROWS, headers=header(201, "00"))
    line = server.wait_for_log("request", trace_id=trace_id(201))
    assert (line["path"], line["status"]) == ("/anomaly", 200)
    client.post("/anomaly", json=ROWS, headers=header(202))
    spans_of(traces, 202)  # it came later, and has arrived
    assert traces.of_trace(trace_id(201)) == {}


def test_error_is_in_the_span_of_its_request(client: httpx.Client, traces: Collector) -> None:
    assert client.post("/anomaly", json={"inputs": [[1]]}, headers=header(301)).status_code == 422
    (span,) = spans_of(traces, 301).values()
    assert (attributes(span)["error.type"], attributes(span)["http.response.status_code"]) == ("invalid_rows", 422)
    assert span.status.code == 0  # a mistake of the client is no failure of the server


def test_resource_has_the_name_and_the_attributes_of_the_environment(client: httpx.Client, traces: Collector) -> None:
    client.get("/livez", headers=header(401))
    assert set(spans_of(traces, 401)) == {"GET /livez"}
    resource = traces.resources[-1]
    assert (resource["service.name"], resource["region"]) == ("scores", "north")


def test_open_metrics_have_the_trace_of_a_slow_request_as_exemplar(client: httpx.Client, traces: Collector) -> None:
    response = client.post("/encode", json={"inputs": np.zeros((50, 4)).tolist()}, headers=header(501))
    assert response.status_code == 200
    spans_of(traces, 501)
    accept = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
    scraped = client.get("/metrics", headers=accept)
    assert scraped.headers["content-type"].startswith("application/openmetrics-text")
    assert scraped.text.endswith("# EOF\n")
    (line,) = (each for each in scraped.text.splitlines() if trace_id(501) in each)
    assert line.startswith('elbo_request_seconds_bucket{endpoint="/encode"')
    seconds = float(line.split("} ")[-1].split()[0])
    bound = float(line.split('le="')[1].split('"')[0])
    assert bound == min(each for each in LATENCY_BOUNDS if each >= seconds)
    plain = client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert trace_id(501) not in plain.text


def test_server_answers_while_the_collector_does_not_and_counts_lost_spans(
    client: httpx.Client, traces: Collector
) -> None:
    traces.gate.clear()
    try:
        for number in range(600, 620):
            assert client.post("/anomaly", json=ROWS, headers=header(number), timeout=5).status_code == 200
    finally:
        traces.status = 400  # which is not tried again
        traces.gate.set()
    try:
        wait_until(lambda: lost(client) > 0)
    finally:
        traces.status = 200


def lost(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith('elbo_spans_total{outcome="export_failed"}')
    )


def test_server_that_stops_sends_the_last_spans(artifacts: Path) -> None:
    with collector() as traces, server_starter() as start:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": traces.url, "OTEL_BSP_SCHEDULE_DELAY": "60000"}
        server = start(artifacts, environment=environment, DEFAULT_MODEL="hosts")
        with server.client() as client:
            assert client.post("/anomaly", json=ROWS).status_code == 200
        assert traces.spans == []
        assert server.stop() == 0
        server.wait_for_log("request", path="/anomaly")
        assert json.dumps(server.lines[-1]["trace_id"]) in {json.dumps(span.trace_id.hex()) for span in traces.spans}
