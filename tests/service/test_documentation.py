"""docs/http.md misses nothing that the code lists, and says nothing that the code lacks."""

import re
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.core import Metric

from service.errors import ERRORS
from service.settings import Settings

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text()


def section(title: str) -> list[list[str]]:
    """The cells of the table in the section `title`, without its head."""
    part = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_setting_is_documented_as_it_is() -> None:
    expected = [
        [f"`ELBO_{name.upper()}`", f"`{field.default}`", field.description]
        for name, field in Settings.model_fields.items()
    ]
    assert section("Settings") == expected


def test_every_error_code_is_documented_with_its_status() -> None:
    found = {(int(status), code.strip("`")) for status, code, _ in section("Errors")}
    assert found == {(error.status, error.code) for error in ERRORS}


def test_every_metric_is_documented_with_its_labels(app: FastAPI, client: httpx.Client) -> None:
    client.post("/sample")
    metrics = app.state.service.metrics
    names = {name.strip("`").removesuffix("_total"): labels for name, labels, _ in section("Metrics")}
    families: list[Metric] = list(metrics.registry.collect())
    assert set(names) == {family.name for family in families}
    for family in families:
        labels = {label for sample in family.samples for label in sample.labels if label != "le"}
        if family.samples:
            assert labels == set(filter(None, re.split(r",\s*", names[family.name]))), family.name


def test_every_path_is_documented(app: FastAPI) -> None:
    documented = {path for row in section("Endpoints") for path in re.findall(r"`(?:POST|GET) (/[^`]*)`", row[0])}
    assert documented == {*app.openapi()["paths"], "/docs", "/openapi.json"}


@pytest.mark.parametrize("path", ["/encode", "/decode", "/reconstruct", "/sample", "/interpolate", "/anomaly"])
def test_every_field_of_a_body_and_an_answer_is_documented(app: FastAPI, path: str) -> None:
    schemas = app.openapi()["components"]["schemas"]
    name = path[1:].capitalize()
    row = next(" ".join(row) for row in section("Endpoints") if f"`POST {path}`" in row[0])
    told = row + TEXT.split("## Verdicts")[1].split("## Errors")[0] if path == "/anomaly" else row
    fields = {*schemas[f"{name}Body"]["properties"], *schemas[f"{name}Answer"]["properties"]} - {"model", "version"}
    assert {field for field in fields if f"`{field}`" not in told and f'"{field}"' not in told} == set()
