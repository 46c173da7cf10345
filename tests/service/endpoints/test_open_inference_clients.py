"""Triton's HTTP clients and KServe's REST client work unchanged: each runs in a process of its own."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from models.artifact import Artifact
from service.app import create_app
from service.settings import Settings
from tests.conftest import require
from tests.data import ROOT
from tests.models import conditional
from tests.models.publishing import publish_conditional
from tests.service.running import post, running

pytestmark = pytest.mark.slow

PYTHON = ROOT / ".venv-clients" / "bin" / "python"
PROGRAMS = ROOT / "tests" / "service" / "protocol_clients"


@pytest.fixture(scope="module")
def client(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield a client of a server of vae@1 and of kinds@1, which knows the conditions a and b."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(artifacts / "vae", root / "vae")
    publish_conditional(root, "kinds")
    with running(create_app(Settings(artifacts=root, log_level="warning", backend="torchscript"))) as found:
        yield found


def run_client(program: str, client: httpx.Client, rows: np.ndarray) -> dict[str, Any]:
    """Return what `program` prints, a JSON object."""
    require(PYTHON.exists(), "no .venv-clients: make test installs it")
    server = f"{client.base_url.host}:{client.base_url.port}"
    command = [str(PYTHON), str(PROGRAMS / program), server, json.dumps(rows.tolist())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("program", ["triton_sync.py", "triton_asyncio.py", "kserve_client.py"])
def test_unchanged_client_gets_the_values_of_the_model(
    client: httpx.Client, vae: Artifact, digits: np.ndarray, program: str
) -> None:
    rows = digits[:4]
    found = run_client(program, client, rows)
    assert (found["live"], found["ready"], found["model_ready"]) == (True, True, [True, True, False])
    with torch.inference_mode():
        mean, score = (vae.module.encode(torch.from_numpy(rows))[0], vae.module.score(torch.from_numpy(rows))[0])
        decoded = vae.module.decode(torch.zeros(1, 16))
    for form in ("binary", "json"):
        np.testing.assert_allclose(found[form]["mean"], mean, atol=1e-5)
        np.testing.assert_allclose(found[form]["score"], score, rtol=1e-4)
        assert [type(value) for value in found[form]["is_anomaly"]] == [bool] * 4
        assert found[form]["id"] == "7"
    np.testing.assert_allclose(found["decode"], decoded, atol=1e-5)
    kinds = conditional.conditional("vae")
    with torch.inference_mode():
        levels = torch.stack([conditional.condition(None, 0), conditional.condition(None, 1)])
        expected = kinds.decode(torch.cat((torch.zeros(2, conditional.L), levels), dim=1))
    for form in ("binary", "json"):
        np.testing.assert_allclose(found["conditions"][form], expected, atol=1e-5)
    np.testing.assert_allclose(found["conditions"]["parameter"], expected[[1, 1]], atol=1e-5)
    drawn = post(client, "/sample", {"n": 2, "seed": 5}, params={"model": "vae"})
    np.testing.assert_allclose(found["sample"], drawn["outputs"], atol=1e-6)
    status, message = found["error"]
    assert status in ("422", "422 Unprocessable Entity")
    assert "vae takes the input x, got z" in message
    if program.startswith("triton"):
        assert found["server"]["name"] == "elbo"
        assert found["model"]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 64]}]
        assert found["version"] == "vae"
    if program == "triton_sync.py":
        for form in ("binary", "json"):
            np.testing.assert_allclose(found[f"{form}_async"], mean, atol=1e-5)
            assert found[f"{form}_outputs"] == [each["name"] for each in found["model"]["outputs"]]
