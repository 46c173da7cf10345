"""The OpenAPI document: it matches the responses, its examples work, and /docs needs no network."""

import re
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest

from service.endpoints.examples import EXAMPLES, TEXTS
from tests.service.openapi import SPECS, content, validate

POSTS = list(SPECS)


@pytest.fixture(scope="module")
def document(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def test_document_lists_every_endpoint(document: dict[str, Any]) -> None:
    of_model = {f"/models/{{reference}}/{name}" for name in ("held-out", "calibration", "card", "peers")}
    gets = of_model | {"/models", "/models/{reference}", "/livez", "/readyz", "/metrics", "/", "/docs"}
    others = {"/api/v1/write", "/backtest", "/feedback", "/edit", "/neighbours"}
    version = "/v2/models/{name}/versions/{version}"
    protocol = {"/v2", "/v2/health/live", "/v2/health/ready"} | {
        f"{model}{end}" for model in ("/v2/models/{name}", version) for end in ("", "/ready", "/infer")
    }
    assert set(document["paths"]) == {*POSTS, *gets, *others, *protocol}
    assert set(document["paths"]["/api/v1/write"]) == {"post"}
    for path in POSTS:
        assert list(document["paths"][path]) == ["post"]


def test_document_is_valid_openapi(document: dict[str, Any]) -> None:
    from openapi_spec_validator import OpenAPIV31SpecValidator

    assert document["openapi"].startswith("3.1.")
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []


def test_every_parameter_in_a_path_is_declared_and_required(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for operation in operations.values():
            declared = [parameter for parameter in operation.get("parameters", ()) if parameter["in"] == "path"]
            assert [parameter["name"] for parameter in declared] == re.findall(r"\{(\w+)\}", path), path
            assert all(parameter["required"] for parameter in declared)


OPTIONS = {
    "/encode": {"sample", "seed"},
    "/decode": set(),
    "/reconstruct": set(),
    "/sample": {"n", "noise", "prior", "seed", "spread", "temperature"},
    "/interpolate": {"steps", "method"},
    "/impute": set(),
    "/anomaly": {
        "alpha", "fdr", "explain", "extrapolated", "impute", "half_life", "half_life_rows", "time", "group", "detail",
        "observe",
    },
}  # fmt: skip
VALUES: dict[str, Any] = {"boolean": True, "integer": 2, "number": 0.5, "string": "x"}


@pytest.mark.parametrize("path", POSTS)
def test_every_option_is_declared_as_an_optional_query_parameter(document: dict[str, Any], path: str) -> None:
    parameters = document["paths"][path]["post"]["parameters"]
    assert {parameter["name"] for parameter in parameters} == {"model"} | OPTIONS[path]
    for parameter in parameters:
        assert (parameter["in"], parameter["required"]) == ("query", False)
        assert parameter["description"]
        assert "default" not in parameter["schema"]  # a client would send it, even if the body has the field


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in POSTS for name in sorted(OPTIONS[path])])
def test_declared_option_works_in_the_query(
    client: httpx.Client, document: dict[str, Any], path: str, name: str
) -> None:
    (schema,) = (p["schema"] for p in document["paths"][path]["post"]["parameters"] if p["name"] == name)
    value = schema["enum"][0] if "enum" in schema else VALUES[schema["type"]]
    examples = content(document, path)["application/json"]["examples"]
    # `half_life` needs timestamps, which only records have, and `spread` needs a point.
    example = examples[{"half_life": "records", "spread": "near"}.get(name, next(iter(examples)))]["value"]
    rest = {key: field for key, field in example.items() if key != name}
    text = str(value).lower() if isinstance(value, bool) else value
    response = client.post(path, json=rest, params={"model": "vae", name: text})
    assert response.status_code == 200, response.text


def test_body_is_required_only_if_the_request_needs_rows(document: dict[str, Any], client: httpx.Client) -> None:
    required = {path: document["paths"][path]["post"]["requestBody"]["required"] for path in POSTS}
    assert required == {path: path != "/sample" for path in POSTS}
    assert client.post("/sample", params={"n": 2}).status_code == 200


@pytest.mark.parametrize("path", POSTS)
def test_every_body_has_at_least_three_examples_with_summaries(document: dict[str, Any], path: str) -> None:
    examples = content(document, path)["application/json"]["examples"]
    assert len(examples) >= 3
    assert all(example["summary"] for example in examples.values())


CASES = [(path, name) for path, spec in SPECS.items() for name in EXAMPLES[spec.schema]]


@pytest.mark.parametrize("model", ["pca", "ae", "vae"])
@pytest.mark.parametrize(("path", "name"), CASES)
def test_response_to_every_example_matches_the_schema(
    client: httpx.Client, document: dict[str, Any], path: str, name: str, model: str
) -> None:
    body = content(document, path)["application/json"]
    value = body["examples"][name]["value"]
    validate(document, value, body["schema"])
    response = client.post(path, json=value, params={"model": model})
    status, media_type = (200, "application/json")
    if name == "standard" and model != "vae":
        status, media_type = 422, "application/problem+json"  # only a VAE has the standard prior
    assert response.status_code == status, response.text
    responses = document["paths"][path]["post"]["responses"]
    validate(document, response.json(), responses[str(status)]["content"][media_type]["schema"])


@pytest.mark.parametrize(
    "path",
    [
        "/models", "/models/vae", "/models/vae/held-out", "/models/vae/calibration", "/livez", "/readyz",
        "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/vae", "/v2/models/vae/ready",
        "/v2/models/vae/versions/1", "/v2/models/vae/versions/1/ready",
    ],
)  # fmt: skip
def test_get_response_matches_its_schema(client: httpx.Client, document: dict[str, Any], path: str) -> None:
    name = "{name}" if path.startswith("/v2") else "{reference}"
    template = path.replace("vae", name).replace("versions/1", "versions/{version}")
    schema = document["paths"][template]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    response = client.get(path)
    assert response.status_code == 200
    validate(document, response.json(), schema)


@pytest.mark.parametrize("path", POSTS)
def test_problem_matches_its_schema(client: httpx.Client, document: dict[str, Any], path: str) -> None:
    responses = document["paths"][path]["post"]["responses"]
    conflict = set() if path in ("/reconstruct", "/anomaly") else {"409"}
    assert set(responses) == {"200", "404", "406", "408", *conflict, "413", "415", "422", "429", "500", "503", "504"}
    problem = client.post(path, json={"nonsense": 1}).json()
    validate(document, problem, responses["422"]["content"]["application/problem+json"]["schema"])


@pytest.mark.parametrize("media_type", sorted(TEXTS))
def test_every_text_example_is_scored(client: httpx.Client, document: dict[str, Any], media_type: str) -> None:
    example = content(document, "/anomaly")[media_type]["example"]
    response = client.post("/anomaly", content=example, headers={"content-type": media_type})
    assert response.status_code == 200, response.text
    assert response.json()["failed"] == 0


def test_binary_formats_are_documented_for_the_endpoints_that_support_them(document: dict[str, Any]) -> None:
    accepting_npy = {path for path in POSTS if "application/x-npy" in content(document, path)}
    assert accepting_npy == {"/encode", "/decode", "/reconstruct", "/impute", "/anomaly"}
    for path in POSTS:
        responses = document["paths"][path]["post"]["responses"]["200"]["content"]
        pictures = path not in ("/encode", "/anomaly")
        stream = {"application/x-ndjson"} if path == "/anomaly" else set()
        assert set(responses) == {"application/json", "application/x-npy", "application/x-safetensors"} | stream | (
            {"image/png"} if pictures else set()
        )


def test_every_body_field_has_a_description(document: dict[str, Any]) -> None:
    for path in POSTS:
        reference = content(document, path)["application/json"]["schema"]["$ref"]
        fields = document["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
        described = {name for name, field in fields.items() if "description" in field}
        assert described | {"start", "end"} >= set(fields)


@pytest.mark.parametrize("page", ["/docs", "/"])
def test_page_loads_only_files_of_this_server(client: httpx.Client, page: str) -> None:
    html = client.get(page).text
    assert not re.search(r"(src|href)\s*=\s*[\"'](https?:)?//", html)
    links = re.findall(r"(?:src|href)=[\"']((?:/?|\./)static/[^\"']+)[\"']", html)
    assert links
    for link in links:
        assert client.get(urljoin(page, link)).status_code == 200


def test_content_security_policy_of_the_explorer_forbids_inline_code(client: httpx.Client) -> None:
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"} <= set(
        policy.split("; ")
    )
    assert "unsafe" not in policy
    assert not re.search(r"<style|<script(?![^>]*\ssrc=)|\son\w+=|\sstyle=", response.text)
