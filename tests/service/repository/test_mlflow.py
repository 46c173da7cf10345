"""The model registry of MLflow: a real server of MLflow with a database and artifacts below tmp_path."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from models.artifact import load
from models.keys import create_key, read_private_key
from models.signatures import sign
from tests.conftest import require
from tests.data import ROOT
from tests.models.builders import D
from tests.models.publishing import publish
from tests.plain_http import NO_AUTHORITIES
from tests.ports import free_port
from tests.service.repository.folders import files_in
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

PYTHON = ROOT / ".venv-remote" / "bin" / "python"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a server of MLflow. The variables of MLflow name it."""
    servers = list((ROOT / ".venv-remote").glob("lib/*/site-packages/mlflow/server"))
    require(servers, "no MLflow in .venv-remote: remove its file .ready, then make test installs MLflow")
    folder = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        str(PYTHON), "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, (folder / "log").open("wb") as log:
        patch.setenv("MLFLOW_TRACKING_URI", url)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(
                lambda: httpx.get(f"{url}/health", verify=NO_AUTHORITIES).status_code == 200,
                seconds=300,
                ignore=httpx.TransportError,
            )
            yield url
        finally:
            os.killpg(process.pid, 15)
            process.wait()


@pytest.mark.usefixtures("server")
def test_registry_without_an_address_is_refused() -> None:
    command = [str(PYTHON), "-m", "elbo", "push", "mlflow:", "web"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert "set MLFLOW_TRACKING_URI" in result.stderr


def registered(server: str) -> list[dict[str, Any]]:
    """Return what the REST API of the server says about the versions of `web`, oldest first."""
    found = httpx.get(
        f"{server}/api/2.0/mlflow/model-versions/search", verify=NO_AUTHORITIES, params={"filter": "name = 'web'"}
    ).json()
    return sorted(found["model_versions"], key=lambda each: int(each["version"]))


def test_versions_are_registered_loaded_by_mlflow_and_pulled(server: str, tmp_path: Path) -> None:
    own = tmp_path / "own"
    first = publish(own, name="web")
    path = publish(own, name="web", kind="ae")
    create_key(tmp_path / "release.key", "release")
    create_key(tmp_path / "second.key", "second")
    sign(path, read_private_key(tmp_path / "release.key"))
    shutil.copytree(first.parent, tmp_path / "signed/web/1")
    sign(tmp_path / "signed/web/1/model.pt", read_private_key(tmp_path / "release.key"))
    publish(tmp_path / "other", name="web", kind="vae-gaussian")
    rows = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    command = [str(PYTHON), "-m", "tests.service.repository.mlflow_steps", str(tmp_path), json.dumps(rows.tolist())]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["pushed"] == ["copied web@2", "copied web@1"]
    assert found["again"] == ["present web@2"]
    assert found["conflict"] == found["late conflict"] == "copy_conflict"
    assert found["signed"] == [["present web@1"], ["signature web@1"]]
    assert found["after a push that ended half-way"] == ["copied web@1", "signature web@1", "copied web@1"]
    signatures = [(tmp_path / each / "web/1/model.pt.sig").read_bytes() for each in ("signed", "between", "after")]
    assert signatures[0] == signatures[1] == signatures[2] != (tmp_path / "pulled/web/1/model.pt.sig").read_bytes()
    versions = registered(server)
    tags = [{tag["key"]: tag["value"] for tag in version["tags"]} for version in versions]
    assert [each["elbo.version"] for each in tags] == ["2", "1"]  # MLflow numbers the versions by itself
    files = ("web/1/model.pt", "web/1/model.pt.sig", "web/2/model.pt", "web/2/model.pt.sig")
    assert files_in(tmp_path / "pulled") == list(files)
    assert (tmp_path / "pulled/web/2/model.pt").read_bytes() == path.read_bytes()
    module = load(path).module
    with torch.inference_mode():
        score = module.score(rows)[0]
        p_value = module.p_value(score)
    np.testing.assert_allclose(found["predicted"]["score"], score, rtol=1e-4)
    np.testing.assert_allclose(found["predicted"]["p_value"], p_value, atol=1e-6)
    assert [type(each) for each in found["predicted"]["is_anomaly"]] == [bool] * 5
