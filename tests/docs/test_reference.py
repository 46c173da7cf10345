"""The generated reference lists everything that the code defines."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.core import Metric

import elbo
from docs import generate
from elbo import cli
from service.app import create_app
from service.errors import ERRORS
from service.settings import Settings
from tests.data import ROOT
from tests.docs.snippets import BLOCK
from tests.service.running import running
from training.config import TrainConfig

PAGES = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the OpenAPI document of a service."""
    return create_app(Settings(artifacts=tmp_path_factory.mktemp("artifacts"))).openapi()


def rows(table: str) -> list[list[str]]:
    """Return the cells of a Markdown table, without its header."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines[2:]]


def built(page: str) -> str:
    return generate.on_page_markdown((PAGES / f"{page}.md").read_text())


@pytest.mark.parametrize("name", generate.TABLES)
def test_every_generated_table_is_on_exactly_one_page_of_the_reference(name: str) -> None:
    pages = [path for path in PAGES.glob("*.md") if f"<!-- generated: {name} -->" in path.read_text()]
    assert len(pages) == 1
    assert "<!-- generated" not in built(pages[0].stem)


def test_build_fails_if_a_page_has_the_marker_of_an_unknown_table() -> None:
    with pytest.raises(KeyError, match="secrets"):
        generate.on_page_markdown("<!-- generated: secrets -->")


def test_every_setting_is_listed_with_its_default_and_description() -> None:
    found = {row[0]: row for row in rows(generate.settings())}
    assert set(found) == {f"`ELBO_{name.upper()}`" for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        _, default, allowed, meaning = found[f"`ELBO_{name.upper()}`"]
        assert default == (f"`{field.default}`" if field.default not in ("", None) else "none")
        assert allowed
        assert meaning.replace("&lt;", "<") == " ".join(str(field.description).split())


def test_bounds_and_choices_of_settings_are_listed() -> None:
    found = {row[0]: row[2] for row in rows(generate.settings())}
    assert found["`ELBO_PORT`"] == "≥ 0, ≤ 65535"
    assert found["`ELBO_LOG_FORMAT`"] == "`auto`, `json`, `text`"


def test_every_error_code_is_listed_with_its_status_and_meaning() -> None:
    found = {(int(status), code.strip("`")): when for status, code, _, when in rows(generate.errors())}
    assert set(found) == {(error.status, error.code) for error in ERRORS}
    assert all(found.values())


def test_every_metric_is_listed_with_the_name_and_the_labels_that_prometheus_scrapes(demonstration: Path) -> None:
    app = create_app(Settings(artifacts=demonstration, log_level="warning"))
    with running(app) as client:
        client.post("/sample", json={})
    found = {name.strip("`"): (kind, labels) for name, kind, labels, _ in rows(generate.metrics())}
    families: list[Metric] = list(app.state.service.metrics.registry.collect())
    suffixes = {"counter": "_total"}
    assert set(found) == {family.name + suffixes.get(family.type, "") for family in families}
    for family in families:
        kind, labels = found[family.name + suffixes.get(family.type, "")]
        assert kind == family.type
        scraped = {label for sample in family.samples for label in sample.labels if label != "le"}
        if family.samples:
            assert scraped == set(re.findall(r"`(\w+)`", labels)), family.name


def test_every_label_with_fixed_values_is_explained() -> None:
    page = built("metrics")
    for value in (
        "ok",
        "refused",
        "shed",
        "abandoned",
        "failed",
        "used",
        "late",
        "sent",
        "retried",
        "normal",
        "incident",
    ):
        assert f"`{value}`" in page


def sections() -> dict[str, str]:
    """Return the section of each endpoint, by method and path."""
    parts = re.split(r"^### ", generate.endpoints(), flags=re.MULTILINE)[1:]
    return {part.split("\n")[0]: part for part in parts}


def test_every_endpoint_is_listed(document: dict[str, Any]) -> None:
    expected = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert set(sections()) == expected
    page = built("http")
    assert "`/docs`" in page
    assert "`/openapi.json`" in page


@pytest.mark.parametrize(
    "path", ["/encode", "/decode", "/reconstruct", "/sample", "/interpolate", "/anomaly", "/feedback"]
)
def test_every_field_of_request_and_response_is_listed(document: dict[str, Any], path: str) -> None:
    operation = document["paths"][path]["post"]
    contents = operation["requestBody"]["content"], operation["responses"]["200"]["content"]
    section = sections()[f"POST {path}"]
    listed = {row[0].strip("`") for row in rows(section) if len(row) == 4}
    for content in contents:
        schema = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
        assert set(document["components"]["schemas"][schema]["properties"]) <= listed
        assert all(f"`{media_type}`" in section for media_type in content)


def test_every_object_that_a_field_refers_to_is_listed() -> None:
    page = built("http")
    headings = {heading.lower() for heading in re.findall(r"^### (\w+)$", page, re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", page)) <= headings


def test_every_command_and_every_training_option_is_listed() -> None:
    text = " ".join(generate.commands().split())
    for command in cli.app.registered_commands:
        name = command.name or getattr(command.callback, "__name__", "")
        assert f"## elbo {name} " in text
    for name in ("add", "list", "remove"):
        assert f"## elbo key {name} " in text
    for option in TrainConfig.model_fields:
        assert f"--{option.replace('_', '-')} " in text


def test_help_fits_the_width_of_the_page() -> None:
    assert max(map(len, generate.commands().splitlines())) <= generate.HELP_COLUMNS + 1


def test_every_module_and_public_name_of_the_python_reference_exists() -> None:
    listed = re.findall(r"^::: ([\w.]+)$", (PAGES / "python.md").read_text(), re.MULTILINE)
    names = {f"elbo.{name}" for name in elbo.__all__} - {"elbo.client", "elbo.pyod", "elbo.sklearn"}
    modules = [each for each in listed if each not in names]
    assert len(modules) >= 5
    for module in modules:
        path = Path(ROOT, *module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
    assert names - {"elbo.__version__", "elbo.ElboError"} <= set(listed)


def test_example_of_a_verdict_has_only_fields_that_the_schema_defines(document: dict[str, Any]) -> None:
    page = (PAGES / "http.md").read_text()
    (example,) = (
        json.loads(code) for language, code in BLOCK.findall(page) if language == "json" and '"results"' in code
    )
    content = document["paths"]["/anomaly"]["post"]["responses"]["200"]["content"]
    unknown = unknown_fields(example, content["application/json"]["schema"], document["components"]["schemas"])
    assert unknown == []


def unknown_fields(value: Any, schema: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """Return the keys of `value` and of its nested objects that the schema does not define."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rsplit("/", 1)[-1]]
    for part in schema.get("anyOf", ()):
        if part.get("type") != "null":
            return unknown_fields(value, part, schemas)
    if isinstance(value, list):
        return [name for item in value for name in unknown_fields(item, schema["items"], schemas)]
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        inner = [
            name for key in value.keys() & known.keys() for name in unknown_fields(value[key], known[key], schemas)
        ]
        return sorted(value.keys() - known.keys()) + inner
    return []
