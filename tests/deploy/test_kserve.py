"""The objects of KServe in deploy/kserve: KServe's client knows their fields, and the server has their probes."""

import json
import subprocess
from typing import Any

import pytest
import yaml

from service.access.scopes import ROUTES
from service.settings import Settings
from tests.conftest import require
from tests.data import ROOT

PYTHON = ROOT / ".venv-clients" / "bin" / "python"
OBJECTS: list[dict[str, Any]] = list(yaml.safe_load_all((ROOT / "deploy" / "kserve" / "elbo.yaml").read_text()))
RUNTIME, SERVICE = OBJECTS
CONTAINER = RUNTIME["spec"]["containers"][0]


def unknown_to_kserve(objects: list[dict[str, Any]]) -> list[str]:
    """Return the fields of `objects` that the models of KServe's client do not have, or that have another type."""
    require(PYTHON.exists(), "no .venv-clients: make test installs it")
    command = [str(PYTHON), str(ROOT / "tests" / "deploy" / "kserve_objects.py")]
    result = subprocess.run(command, input=json.dumps(objects), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found: list[str] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_client_of_kserve_knows_every_field_of_the_objects() -> None:
    wrong = json.loads(json.dumps(SERVICE).replace("storageUri", "storageUrl"))
    place = "V1beta1InferenceService/spec/predictor/model/storageUrl"
    assert unknown_to_kserve([*OBJECTS, wrong]) == [place]


def test_runtime_is_the_one_that_the_service_asks_for() -> None:
    model = SERVICE["spec"]["predictor"]["model"]
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    formats = [(each["name"], each["version"]) for each in RUNTIME["spec"]["supportedModelFormats"]]
    assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
    assert model["protocolVersion"] in RUNTIME["spec"]["protocolVersions"]


def test_probes_and_settings_of_the_runtime_exist_in_the_server() -> None:
    environment = {each["name"]: each["value"] for each in CONTAINER["env"]}
    assert {name.removeprefix("ELBO_").lower() for name in environment} <= set(Settings.model_fields)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert ROUTES[CONTAINER[probe]["httpGet"]["path"]] is None  # open: KServe probes without a key
        assert str(CONTAINER[probe]["httpGet"]["port"]) == environment["ELBO_PORT"]
