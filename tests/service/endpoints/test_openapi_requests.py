"""Requests that schemathesis makes from openapi.json: requests that fit the document, and requests that break it.

No response may have status 5xx or differ from the document. A request that breaks the document must be refused. A
request that fits the document must be accepted, unless it breaks one of the RULES, which OpenAPI cannot express.
`make fuzz` sets ELBO_TEST_EXAMPLES to a larger number of requests per endpoint.
"""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cramjam
import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode, Response
from schemathesis.checks import CheckContext
from schemathesis.openapi import media_type
from schemathesis.schemas import BaseSchema

from service.app import create_app
from service.codec import ndjson, npy, open_inference, safetensors
from service.settings import Settings
from tests.service.hosts import HOST_FEATURES
from tests.service.running import running

MAX_ROWS = 50
EXAMPLES = int(os.environ.get("ELBO_TEST_EXAMPLES", "20"))
RULES = (
    "is given twice",  # once in the body, once in the query
    "give only one of",
    "expected one of the fields",
    "needs either input or latent",
    "half_life is in seconds, and inputs have no timestamps",
    "only a VAE has the prior N(0, I)",
    "have their own times and groups",
    "the field verdict is missing",  # it may stand in the body or in the query
    "knows no labels",  # the model was trained on rows without labels
    "a response may have at most",  # n neighbours of each row
    "knows no condition of a row",
    "is not a feature of the model",
    "every value of the row is missing",
    "nothing is left to draw",
    "with given values come from",  # samples with given values have no other prior
    "samples near a point have no given values",
    "spread says how far",
    "should be Unix time in s",  # the schema allows any text as a time
    "before it starts",
    "no row has a time",  # which column has the times is an option
)
VALUES = {"model": ["hosts", "hosts@1"], "reference": ["hosts", "hosts@1"], "name": ["hosts"], "version": ["1"]}
WIDTHS = {"inputs": len(HOST_FEATURES), "input": len(HOST_FEATURES), "latents": 2, "latent": 2}


def row_schemas(number: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the schema of one row in each field. The document cannot have it, because it depends on the model."""
    rows = {
        name: {"type": "array", "items": number, "minItems": width, "maxItems": width} for name, width in WIDTHS.items()
    }
    record = {"type": "object", "properties": dict.fromkeys(HOST_FEATURES, number), "required": HOST_FEATURES}
    tags = {"type": "object", "additionalProperties": {"type": "string"}}
    metric = {"type": "object", "properties": {"fields": record, "tags": tags}, "required": ["fields"]}
    some = {"type": "object", "properties": dict.fromkeys(HOST_FEATURES, number), "additionalProperties": False}
    return {**rows, "records": record, "metrics": metric, "given": some}


def npy_bytes(rows: list[list[float]]) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array(rows, np.float32))
    return content.getvalue()


def csv_bytes(rows: list[list[float]]) -> bytes:
    return "\n".join([",".join(HOST_FEATURES), *(",".join(map(str, row)) for row in rows)]).encode()


def ndjson_bytes(rows: list[list[float]]) -> bytes:
    return "\n".join(map(str, rows)).encode()


def telegraf_bytes(rows: list[list[float]]) -> bytes:
    metrics = [
        {
            "name": "host",
            "tags": {},
            "timestamp": 1_700_000_000 + i,
            "fields": dict(zip(HOST_FEATURES, row, strict=True)),
        }
        for i, row in enumerate(rows)
    ]
    return json.dumps({"metrics": metrics}).encode()


def rows_of(width: int) -> "st.SearchStrategy[list[list[float]]]":
    return st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=width, max_size=width), min_size=1, max_size=9)


ROWS = rows_of(len(HOST_FEATURES))
for name, strategy in {
    npy.MEDIA_TYPE: ROWS.map(npy_bytes),
    safetensors.MEDIA_TYPE: ROWS.map(lambda rows: safetensors.dumps({"inputs": np.array(rows, np.float32)}, {})),
    "text/csv": ROWS.map(csv_bytes),
    ndjson.MEDIA_TYPES[0]: ROWS.map(ndjson_bytes),
    "text/plain": ROWS.map(telegraf_bytes),
    "application/x-protobuf": st.just(bytes(cramjam.snappy.compress_raw(b""))),  # a WriteRequest without series
}.items():
    media_type(name, strategy)


def narrow(document: dict[str, Any], number: dict[str, Any]) -> dict[str, Any]:
    """Return the document with the schemas of the rows and the media types of the model `hosts`."""
    rows = row_schemas(number)
    for schema in document["components"]["schemas"].values():
        properties = schema.get("properties", {}) if schema.get("additionalProperties") is False else {}
        for name in rows.keys() & properties.keys():
            if name in ("input", "latent", "given"):
                properties[name] = rows[name]
            else:
                properties[name]["items"] = rows[name]
    for path, operations in document["paths"].items():
        content = operations.get("post", {}).get("requestBody", {}).get("content", {})
        for name in [*content]:
            is_array = name in (npy.MEDIA_TYPE, safetensors.MEDIA_TYPE)
            if name.startswith("image/") or name == open_inference.BINARY or (is_array and path == "/decode"):
                del content[name]
        parameters = [one for operation in operations.values() for one in operation.get("parameters", ())]
        for parameter in parameters:
            if parameter["name"] in VALUES:
                parameter["schema"] = {"enum": VALUES[parameter["name"]]}
    narrow_protocol(document, number)
    return document


def narrow_protocol(document: dict[str, Any], number: dict[str, Any]) -> None:
    """Give the schemas of the Open Inference Protocol the names, the shape and the parameters of the model `hosts`.

    The requests have no binary numbers, and so no length of the JSON object before these.
    """
    for path, operations in document["paths"].items():
        if path.endswith("/infer"):
            named = operations["post"]["parameters"]
            operations["post"]["parameters"] = [each for each in named if each["in"] == "path"]
    schemas = document["components"]["schemas"]
    width = len(HOST_FEATURES)
    tensor = schemas["InferenceInput"]
    tensor["properties"] |= {
        "name": {"const": "x"},
        "shape": {"const": [1, width]},
        "datatype": {"enum": ["FP16", "FP32", "INT32", "UINT8"]},
        "data": {"type": "array", "items": number, "minItems": width, "maxItems": width},
    }
    tensor["required"] = ["name", "shape", "datatype", "data"]
    schemas["RequestedOutput"]["properties"]["name"] = {"enum": ["x_hat", "mean", "std", "score", "p_value"]}
    flag = {"type": ["boolean", "null"]}
    flags = {"type": ["object", "null"], "properties": {"binary_data": flag}}
    schemas["RequestedOutput"]["properties"]["parameters"] = flags
    body = schemas["InferenceBody"]["properties"]
    body["inputs"] |= {"minItems": 1, "maxItems": 1}
    alpha = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    options = {"alpha": alpha, "observe": flag, "binary_data_output": flag}
    body["parameters"] = {"type": ["object", "null"], "properties": options, "additionalProperties": False}


@pytest.fixture(scope="module")
def server(artifacts: Path) -> Iterator[httpx.Client]:
    """Yield a client of a server whose default model is `hosts`."""
    options = Settings(
        artifacts=artifacts, default_model="hosts", log_level="error", backend="torchscript", max_rows=MAX_ROWS
    )
    with running(create_app(options)) as client:
        yield client


def read_api(client: httpx.Client, number: dict[str, Any]) -> BaseSchema:
    """Return the API of `client`. `number` is the schema of a number in a row."""
    schema = schemathesis.openapi.from_dict(narrow(client.get("/openapi.json").json(), number))
    schema.config.update(base_url=str(client.base_url))
    schema.config.checks.negative_data_rejection.expected_statuses.append("413")  # too many rows
    return schema


@schemathesis.check
def is_accepted_if_it_fits(_: CheckContext, response: Response, case: Case[Any]) -> None:
    """Fail if a request that fits the document is refused, except by one of RULES."""
    fits = case.meta is None or case.meta.generation.mode.is_positive
    if fits and response.status_code in (400, 406, 413, 415, 422):
        assert any(rule in response.text for rule in RULES), response.text


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_requests_made_from_the_openapi_document_get_the_responses_that_it_describes(
    server: httpx.Client, mode: GenerationMode
) -> None:
    # Numbers far from those in the training rows overflow in float32, which is an error of the request.
    bounds = {"minimum": -1e6, "maximum": 1e6} if mode.is_positive else {}
    found: Iterator[Any] = read_api(server, {"type": "number", **bounds}).get_all_operations()
    operations = [result.ok() for result in found]
    assert len(operations) > 15
    for operation in operations:

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Case[Any]) -> None:
            excluded = [schemathesis.checks.positive_data_acceptance]  # in its place: `is_accepted_if_it_fits`
            if any(value in (None, "null") for value in case.query.values()):  # means that the option is not given
                excluded.append(schemathesis.checks.negative_data_rejection)
            case.call_and_validate(excluded_checks=excluded)

        try:
            check()
        except Unsatisfiable:
            assert not mode.is_positive  # an endpoint without parameters has no invalid requests
