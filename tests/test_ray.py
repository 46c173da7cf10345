"""Elbo on Ray: a cluster of two nodes on this machine, in a process of the environment .venv-ray."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from models.artifact import load
from models.manifest import read_manifest
from tests.commands import in_process, train_hosts, two_factor_rows, write
from tests.conftest import require
from tests.data import ROOT
from tests.hosts_table import write_hosts
from tests.ray_programs.trials import GROUPS, TRIALS
from training.groups import run_groups, train_here
from training.sweep import Sweep, train_locally
from training.train import read

pytestmark = pytest.mark.slow

PYTHON = ROOT / ".venv-ray" / "bin" / "python"
PROGRAMS = ROOT / "tests" / "ray_programs"
# Other tests use the same cores. Ray's own settings give its workers the lowest share of them, kill a worker that does
# not start in 60 s, and a proxy that is not ready in 5 s.
RAY_SETTINGS = {
    "RAY_worker_niceness": "0",
    "RAY_worker_register_timeout_seconds": "200",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with hosts@1, a PCA with two latents."""
    return train_hosts(tmp_path_factory.mktemp("artifacts"))


def run(program: str, *arguments: object) -> dict[str, Any]:
    """Run a program of `tests/ray_programs` in .venv-ray. Return the JSON object in its last line."""
    require(PYTHON.exists(), "no .venv-ray: make test installs it")
    command = [str(PYTHON), "-m", f"tests.ray_programs.{program}", *map(str, arguments)]
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # `make coverage` sets the variable
    environment = os.environ | RAY_SETTINGS | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=560)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_scores_and_models_on_ray_are_those_of_this_machine_although_a_node_is_killed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = two_factor_rows(200_000, seed=1)
    rows[123_456, 1] = np.inf
    data = tmp_path / "rows.npy"
    np.save(data, rows)
    table = write(tmp_path / "table.csv", two_factor_rows(300, seed=2))
    hosts = write_hosts(tmp_path / "hosts.csv", {"a": 100, "b": 100, "c": 100, "short": 6})
    for engine in ("on_ray", "locally"):
        (tmp_path / engine).mkdir()
    artifact = root / "hosts" / "1" / "model.pt"
    found = run("lose_a_node", artifact, data, tmp_path / "ray", table, tmp_path / "on_ray", hosts)
    assert (found["parts"], found["rows"], found["faulty"], found["nodes"]) == (100, 200_000, 1, 1)
    assert 4 <= found["finished_at_kill"] < 100
    assert found["usage_statistics"] == "0"
    assert "the process died 4 times (WorkerCrashedError" in found["poison"]
    options = ["--part-rows", "2000", "--artifacts", str(root)]
    assert in_process(capsys, "score", "hosts", str(data), str(tmp_path / "local"), *options)[0] == 2
    files = sorted(path.name for path in (tmp_path / "local").iterdir())
    assert sorted(path.name for path in (tmp_path / "ray").iterdir()) == files
    for name in files:
        assert pl.read_parquet(tmp_path / "ray" / name).equals(pl.read_parquet(tmp_path / "local" / name)), name
    faults = [(tmp_path / f"{engine}.faults.ndjson").read_text() for engine in ("ray", "local")]
    assert faults[0] == faults[1]
    trained = train_locally(Sweep(table, 0, tmp_path / "locally"), TRIALS, lambda result: None)  # noqa: ARG005
    expected = [{name: values.tolist() for name, values in each.measures.items()} for each in trained]
    assert found["sweep"] == expected
    assert [sorted(each) for each in expected] == [["detection", "log_likelihood", "reconstruction_error"]] * 2 + [[]]
    names = ["0000.pt", "0001.pt"]
    assert [sorted(path.name for path in (tmp_path / each).glob("*.pt")) for each in ("on_ray", "locally")] == [
        names
    ] * 2
    groups = run_groups(GROUPS, read(hosts, GROUPS), tmp_path / "locally" / "groups", train_here)
    assert found["groups"] == [[each.trained.name, each.state, each.trained.means] for each in groups]
    assert [each.state for each in groups] == ["published"] * 3 + ["failed"]
    assert found["killed"]
    manifests = [
        read_manifest(tmp_path / each / "groups" / f"hosts-{group}" / "1" / "model.pt")
        for group in "abc"
        for each in ("on_ray", "locally")
    ]
    assert [each.weights_sha256 for each in manifests[::2]] == [each.weights_sha256 for each in manifests[1::2]]


def test_replicas_of_ray_serve_answer_as_the_service_does(root: Path, tmp_path: Path) -> None:
    rows = two_factor_rows(8, seed=3).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    found = run("serve_models", root, tmp_path / "rows.npy")
    with torch.inference_mode():
        module = load(root / "hosts" / "1" / "model.pt").module
        mean, score = module.encode(torch.from_numpy(rows))[0], module.score(torch.from_numpy(rows))[0]
    assert (found["ready"], found["models"], found["error"]) == (200, ["hosts"], "invalid_rows")
    for form in ("json", "npy"):
        np.testing.assert_allclose(found[form], mean.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["anomaly"], score.numpy(), rtol=1e-4)
    assert found["replicas"] == {"RUNNING": 2}
    assert found["refused"] == ["ELBO_ARTIFACTS", "ELBO_STATE"]
    # Two replicas with a mean wait of 0.4 s: eight have 0.1 s. 70 requests: five replicas have at most 16 each.
    assert (found["idle"], found["waiting"], found["busy"]) == (1, 8, 5)
