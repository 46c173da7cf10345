"""A client generated from the OpenAPI document calls every endpoint, and /docs can try every endpoint."""

import importlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest

from service.codec import remote_write, safetensors
from tests.conftest import require
from tests.data import ROOT
from tests.service.scrape import scrape, total

pytestmark = pytest.mark.slow

PACKAGE = "generated_elbo_client"
GENERATOR = shutil.which("openapi-python-client", path=str(ROOT / ".venv-openapi" / "bin"))


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def generator_config(document: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the generator.

    The generator can send JSON, forms and octet streams. The configuration makes it send other types as octet streams.
    """
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    types = {name for operation in operations for name in operation.get("requestBody", {}).get("content", {})}
    overrides = dict.fromkeys(types - {"application/json"}, "application/octet-stream")
    return {"content_type_overrides": overrides, "post_hooks": []}


@pytest.fixture(scope="module")
def generated(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Yield the package of a client that is generated from the document of the running service."""
    require(GENERATOR, "no openapi-python-client: make test installs it into .venv-openapi")
    assert GENERATOR
    folder = tmp_path_factory.mktemp("generated")
    (folder / "openapi.json").write_text(json.dumps(document))
    (folder / "config.json").write_text(json.dumps(generator_config(document)))
    result = subprocess.run(
        [GENERATOR, "generate", "--path", "openapi.json", "--config", "config.json", "--meta", "none",
         "--output-path", PACKAGE, "--fail-on-warning"],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, "\n".join(line for line in result.stdout.splitlines() if line[:1].isupper())
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(PACKAGE)
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def api(generated: ModuleType, client: httpx.Client) -> Iterator[Any]:
    """Yield the generated client, connected to the running service."""
    with generated.Client(base_url=str(client.base_url)) as api:
        yield api


def call(api: Any, tag: str, operation: str, /, **arguments: Any) -> Any:
    """Call an operation by its module in the generated package; return the response with its parsed content."""
    module = importlib.import_module(f"{PACKAGE}.api.{tag}.{operation}")
    return module.sync_detailed(client=api, **arguments)


def body(name: str, **fields: Any) -> Any:
    """Return an instance of a schema in the generated package."""
    schema = getattr(importlib.import_module(f"{PACKAGE}.models"), name)
    return schema.from_dict(fields)


ROW = [0.5] * 64
LATENTS = [0.1] * 16
ENDS = {"start": {"input": ROW}, "end": {"latent": LATENTS}}
PROTOCOL = "open_inference_protocol"  # the tag as the generator writes it
INFERENCE = {
    "inputs": [{"name": "x", "shape": [1, 64], "datatype": "FP32", "data": [ROW]}],
    "outputs": [{"name": "mean"}, {"name": "score"}],
    "parameters": {"observe": False},
}
# For each operation id: its tag, the schema of its JSON body ("" without one), the fields of this body, and the other
# arguments of the call.
CALLS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "encode": ("models", "EncodeBody", {"inputs": [ROW]}, {"model": "vae"}),
    "decode": ("models", "DecodeBody", {"latents": [LATENTS]}, {"model": "vae@1"}),
    "reconstruct": ("models", "ReconstructBody", {"inputs": [ROW, ROW]}, {}),
    "sample": ("models", "SampleBody", {"n": 3, "seed": 7}, {"model": "vae"}),
    "interpolate": ("models", "InterpolateBody", ENDS, {"model": "vae"}),
    "edit": ("models", "EditBody", {"input": ROW, "direction": "7", "steps": 3}, {"model": "vae"}),
    "neighbours": ("models", "NeighboursBody", {"inputs": [ROW], "n": 2, "values": True}, {"model": "vae"}),
    "impute": ("models", "ImputeBody", {"inputs": [[*ROW[:-1], None]]}, {"model": "vae"}),
    "anomaly": ("models", "AnomalyBody", {"inputs": [ROW], "alpha": 0.01, "observe": False}, {"model": "vae"}),
    "models": ("service", "", {}, {}),
    "model": ("service", "", {}, {"reference": "vae"}),
    "held_out": ("service", "", {}, {"reference": "vae@1"}),
    "calibration": ("service", "", {}, {"reference": "vae"}),
    "card": ("service", "", {}, {"reference": "vae"}),
    "infer": (PROTOCOL, "InferenceBody", INFERENCE, {"name": "vae"}),
    "infer_version": (PROTOCOL, "InferenceBody", INFERENCE, {"name": "vae", "version": "1"}),
    "server_metadata": (PROTOCOL, "", {}, {}),
    "server_live": (PROTOCOL, "", {}, {}),
    "server_ready": (PROTOCOL, "", {}, {}),
    "model_metadata": (PROTOCOL, "", {}, {"name": "vae:decode"}),
    "version_metadata": (PROTOCOL, "", {}, {"name": "vae", "version": "1"}),
    "model_ready": (PROTOCOL, "", {}, {"name": "vae"}),
    "version_ready": (PROTOCOL, "", {}, {"name": "vae", "version": "1"}),
    "livez": ("service", "", {}, {}),
    "readyz": ("service", "", {}, {}),
    "metrics": ("service", "", {}, {}),
    "page": ("service", "", {}, {}),
    "docs": ("service", "", {}, {}),
}


def test_every_operation_of_the_document_is_called(document: dict[str, Any]) -> None:
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert {operation["operationId"] for operation in operations} == {*CALLS, "write", "feedback", "backtest", "peers"}


@pytest.mark.parametrize("operation", CALLS)
def test_generated_client_gets_the_response_of_every_endpoint(api: Any, operation: str) -> None:
    tag, schema, fields, arguments = CALLS[operation]
    if schema:
        arguments = {**arguments, "body": body(schema, **fields)}
    response = call(api, tag, operation, **arguments)
    assert response.status_code == 200, response.content
    if response.headers["content-type"] == "application/json":
        known = response.parsed.to_dict()
        assert known == {**known, **json.loads(response.content)}
        assert response.parsed.additional_properties == {}  # the document names every field


def test_generated_client_sends_feedback_and_reads_the_refusal(api: Any) -> None:
    fields = {"verdict": "normal", "group_name": "a", "since": "2025-04-09T08:00:00Z", "until": 1.8e9}
    response = call(api, "models", "feedback", body=body("FeedbackBody", **fields), model="vae")
    assert (response.status_code, response.parsed.code) == (409, "no_online_calibration")  # trained without times


def test_generated_client_asks_for_peers_and_reads_the_refusal(api: Any) -> None:
    response = call(api, "service", "peers", reference="vae", n=3, explain=1)
    assert (response.status_code, response.parsed.code) == (409, "not_supported")  # trained without groups


def test_generated_client_sends_a_history_and_reads_the_refusal(api: Any) -> None:
    record = dict.fromkeys("abcd", 1.0) | {"timestamp": 1_700_000_000}
    response = call(api, "models", "backtest", body=body("BacktestBody", records=[record]), model="vae")
    assert (response.status_code, response.parsed.code) == (422, "invalid_rows")  # the features are unknown


def test_generated_client_sends_remote_write(api: Any, generated: ModuleType) -> None:
    types = importlib.import_module(f"{generated.__name__}.types")
    content = remote_write.dumps([((("__name__", "up"),), [(1_700_000_000_000, 1.0)])])
    encoding = importlib.import_module(f"{generated.__name__}.models").WriteContentEncoding.SNAPPY
    response = call(api, "models", "write", body=types.File(payload=io.BytesIO(content)), content_encoding=encoding)
    assert response.status_code == 204, response.content


OPTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sample", {"n": 2, "seed": 7, "temperature": 0.5}, {"seed": 7}),
    ("encode", {"sample": True, "seed": 3}, {"seed": 3}),
    ("anomaly", {"alpha": 0.01, "explain": 1, "observe": False}, {"alpha": 0.01}),
    ("anomaly", {"fdr": 0.1, "detail": "none", "impute": True, "observe": False}, {"rows": 1}),
    ("anomaly", {"half_life_rows": 2.0, "time": "t", "group": "g", "observe": False}, {"rows": 1}),
]


@pytest.mark.parametrize(("operation", "options", "expected"), OPTIONS)
def test_generated_client_sends_options_in_the_query_if_the_body_is_not_json(
    api: Any, generated: ModuleType, operation: str, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    types = importlib.import_module(f"{generated.__name__}.types")
    if "detail" in options:
        detail = importlib.import_module(f"{generated.__name__}.models").AnomalyDetail
        options = {**options, "detail": detail.NONE}
    arguments = {}
    if operation != "sample":
        # Of several binary types, the generated client always sends the last one in the document.
        content = safetensors.dumps({"inputs": np.full((1, 64), 0.5, np.float32)}, {})
        arguments = {"body": types.File(payload=io.BytesIO(content))}
    response = call(api, "models", operation, model="vae", **arguments, **options)
    assert response.status_code == 200, response.content
    fields = json.loads(response.content)
    assert {name: fields[name] for name in expected} == expected


def test_generated_client_reads_the_error_of_an_unknown_model(api: Any) -> None:
    response = call(api, "service", "card", reference="nobody")
    assert (response.status_code, response.parsed.code) == (404, "model_not_found")


# /docs


def test_docs_try_every_kind_of_request_and_raise_no_alarm(client: httpx.Client) -> None:
    """Press "Try it out" and "Execute" as a visitor does, with the values that the page fills in."""
    from playwright.sync_api import expect

    from tests.service.explorer.browser import chromium

    before = scrape(client)
    with chromium() as browser:
        page = browser.new_page()
        page.goto(f"{client.base_url}/docs")
        for name, values in [
            ("anomaly", {}), ("sample", {}), ("encode", {}), ("model", {"reference": "vae"}),
            ("card", {"reference": "vae@1"}), ("livez", {}),
        ]:  # fmt: skip
            block = page.locator(f".opblock[id$='-{name}']")
            block.locator(".opblock-summary-control").click()
            block.get_by_role("button", name="Try it out").click()
            for parameter, value in values.items():
                block.get_by_placeholder(parameter).fill(value)
            block.get_by_role("button", name="Execute").click()
            status = block.locator(".live-responses-table .response-col_status").nth(1)
            expect(status).to_contain_text("200", timeout=30_000)  # ms; the page formats large responses slowly
            block.locator(".opblock-summary-control").click()
    after = scrape(client)
    for metric in ("elbo_scored_rows_total", "elbo_alarms_total", "elbo_p_value_count"):
        assert total(after, metric) == total(before, metric)
    assert total(after, "elbo_unobserved_rows_total") > total(before, "elbo_unobserved_rows_total")
