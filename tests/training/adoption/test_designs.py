"""Autoencoders in the styles of five public implementations are adopted, served, and give the results of the module."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from scipy.stats import betabinom
from torch import Tensor, nn

from models import artifact
from models.manifest import read_manifest
from service.app import create_app
from service.endpoints.examples import EXAMPLES
from service.settings import Settings
from tests.data import ROOT
from tests.preloaded import run_preloaded
from tests.service.openapi import SPECS, content, validate
from tests.service.running import post, running
from tests.training.adoption.designs import DESIGNS, WITHOUT_LATENTS, digits, trained
from training.adoption.adopt import adopt

pytestmark = pytest.mark.slow

Trained = dict[str, nn.Module]
WITH_LATENTS = [name for name in DESIGNS if name not in WITHOUT_LATENTS]
OF_LATENTS = {
    "/encode": {"inputs": [[0.0] * 64]},
    "/decode": {"latents": [[0.0] * 8]},
    "/sample": {"n": 1},
    "/interpolate": {"start": {"input": [0.0] * 64}, "end": {"input": [0.1] * 64}},
    "/edit": {"input": [0.0] * 64, "direction": "3"},
    "/neighbours": {"inputs": [[0.0] * 64]},
}


@pytest.fixture(scope="module")
def modules() -> Trained:
    """Return the trained modules by name, in training mode."""
    fit, _, _ = digits()
    return {name: trained(design, fit) for name, design in DESIGNS.items()}


@pytest.fixture(scope="module")
def root(modules: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an artifact folder with the adopted modules."""
    folder = tmp_path_factory.mktemp("artifacts")
    fit, calibration, _ = digits()
    for name, module in modules.items():
        adopt(module, calibration, name=name, artifacts=folder, fit_rows=fit, shape=(8, 8))
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[httpx.Client]:
    with running(create_app(Settings(artifacts=root, default_model="tuples", log_level="warning"))) as client:
        yield client


def path_of(root: Path, name: str) -> Path:
    return root / name / "1" / "model.pt"


def expected_reconstruction(modules: Trained, name: str, x: Tensor) -> Tensor:
    """Return what the user's module reconstructs, by code that does not belong to the adoption."""
    module, design = modules[name].eval(), DESIGNS[name]
    with torch.no_grad():
        found = design.reconstruct(module, x.reshape(-1, *design.shape)).reshape(len(x), -1)
    module.train()
    return found


@pytest.mark.parametrize("name", DESIGNS)
def test_reconstruction_of_the_artifact_equals_that_of_the_module_on_fresh_rows(
    modules: Trained, root: Path, name: str
) -> None:
    _, _, fresh = digits()
    module = artifact.load(path_of(root, name)).module
    expected = expected_reconstruction(modules, name, fresh)
    for count in (1, 2, 7, len(fresh)):
        with torch.inference_mode():
            found = module(fresh[:count])
        assert float((found - expected[:count]).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("name", WITH_LATENTS)
def test_latents_of_the_artifact_equal_those_of_the_module(modules: Trained, root: Path, name: str) -> None:
    _, _, fresh = digits()
    module = modules[name].eval()
    encoder: Any = module.encoder if name == "submodules" else module.encode
    with torch.no_grad():
        given = encoder(fresh.reshape(-1, *DESIGNS[name].shape))
        mean, std = artifact.load(path_of(root, name)).module.encode(fresh)
    module.train()
    if name == "submodules":
        expected, deviation = given, torch.zeros_like(given)
    else:
        expected, log_variance = given.values() if isinstance(given, dict) else given
        deviation = torch.exp(0.5 * log_variance)
    assert float((mean - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    assert float((std - deviation).abs().max()) <= 1e-6 * max(float(deviation.abs().max()), 1e-6)


@pytest.mark.parametrize("name", DESIGNS)
def test_number_of_false_alarms_on_fresh_rows_agrees_with_the_beta_binomial_distribution(root: Path, name: str) -> None:
    _, _, fresh = digits()
    loaded = artifact.load(path_of(root, name))
    count = loaded.manifest.calibration.rows
    assert count == 300  # two thirds of the calibration rows
    with torch.inference_mode():
        p = loaded.module.p_value(loaded.module.score(fresh)[0])
    for alpha in (0.1, 0.05, 0.02):
        allowed = int(alpha * (count + 1))
        low, high = betabinom(len(fresh), allowed, count + 1 - allowed).interval(0.999)
        assert low <= int((p <= alpha).sum()) <= high, alpha


@pytest.mark.parametrize("name", DESIGNS)
def test_rows_of_noise_are_anomalies(root: Path, name: str) -> None:
    loaded = artifact.load(path_of(root, name))
    noise = torch.rand(200, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        p = loaded.module.p_value(loaded.module.score(noise)[0])
    assert float((p <= 0.05).float().mean()) > 0.95


@pytest.mark.parametrize("name", DESIGNS)
def test_artifact_has_a_twin_and_says_what_it_is(root: Path, name: str) -> None:
    loaded = artifact.load(path_of(root, name))
    assert loaded.twin is not None
    manifest = loaded.manifest
    assert manifest.kind == "adopted"
    assert manifest.only_reconstructs == (name in WITHOUT_LATENTS)
    assert manifest.adoption is not None
    assert manifest.adoption.spread == ("log_variance" if name in ("tuples", "dicts") else None)
    card = loaded.exhibits[artifact.CARD].decode()
    assert "it was trained elsewhere" in card
    assert "elbo train" not in card


def test_adoption_leaves_the_module_as_it_was(modules: Trained, tmp_path: Path) -> None:
    module = modules["dicts"]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    _, calibration, _ = digits()
    adopt(module, calibration.reshape(-1, 1, 8, 8), name="again", artifacts=tmp_path)
    assert all(part.training for part in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_artifact_runs_where_neither_the_class_of_the_user_nor_the_training_exists(root: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import torch; from models.artifact import load\n"
        "for path in sys.argv[1:]: load(Path(path)).module.score(torch.rand(3, 64))\n"
        "assert not [name for name in sys.modules if name.startswith(('tests', 'training'))]"
    )
    paths = [str(path_of(root, name)) for name in DESIGNS]
    done = run_preloaded([sys.executable, "-c", code, *paths], cwd=ROOT, text=True)
    assert done.stderr == ""


def test_nothing_of_the_users_code_is_in_the_artifact(root: Path) -> None:
    for name in DESIGNS:
        content = path_of(root, name).read_bytes()
        for word in (b"designs", b"reparameterize", b"rnn1.", str(ROOT).encode()):
            assert word not in content, (name, word)


# The checks of the HTTP contract that run on every kind of model


CASES = [(path, example) for path, spec in SPECS.items() for example in EXAMPLES[spec.schema]]


@pytest.fixture(scope="module")
def document(server: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/openapi.json").json()
    return found


def expected_status(path: str, example: str, name: str) -> int:
    """Return the status of the response to an example of the OpenAPI document."""
    if path in OF_LATENTS and name in WITHOUT_LATENTS:
        return 409
    if example == "standard" and name == "submodules":
        return 422  # it is no VAE
    return 200


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize(("path", "example"), CASES)
def test_response_to_every_example_matches_the_schema(
    server: httpx.Client, document: dict[str, Any], path: str, example: str, name: str
) -> None:
    body = content(document, path)["application/json"]["examples"][example]["value"]
    body = with_latents(body, read_latents(server, name))
    response = server.post(path, json=body, params={"model": name})
    status = expected_status(path, example, name)
    assert response.status_code == status, response.text
    kind = "application/json" if status == 200 else "application/problem+json"
    schema = document["paths"][path]["post"]["responses"][str(status)]["content"][kind]["schema"]
    validate(document, response.json(), schema)


def with_latents(body: Any, count: int) -> Any:
    """Return an example with latent vectors of `count` numbers."""
    if isinstance(body, list):
        return [with_latents(each, count) for each in body]
    if not isinstance(body, dict):
        return body
    found = {name: with_latents(value, count) for name, value in body.items()}
    if "latent" in found:
        found["latent"] = [0.1] * count
    if "latents" in found:
        found["latents"] = [[0.1] * count for _ in found["latents"]]
    return found


def read_latents(server: httpx.Client, name: str) -> int:
    return int(server.get(f"/models/{name}").json()["latents"])


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("path", ["/models/{}", "/models/{}/held-out", "/models/{}/calibration"])
def test_get_response_matches_its_schema(server: httpx.Client, document: dict[str, Any], path: str, name: str) -> None:
    operation = document["paths"][path.replace("{}", "{reference}")]["get"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    response = server.get(path.format(name))
    assert response.status_code == 200, response.text
    validate(document, response.json(), schema)


@pytest.mark.parametrize("name", WITHOUT_LATENTS)
@pytest.mark.parametrize("path", OF_LATENTS)
def test_endpoint_that_needs_latents_answers_409_for_a_model_that_only_reconstructs(
    server: httpx.Client, name: str, path: str
) -> None:
    response = server.post(path, json=OF_LATENTS[path], params={"model": name})
    problem = response.json()
    assert (response.status_code, problem["code"]) == (409, "not_supported")
    assert "has no latents" in problem["detail"]
    assert "without an encoder and a decoder" in problem["detail"]
    assert "encode=" in problem["hint"]


@pytest.mark.parametrize("name", DESIGNS)
def test_service_gives_the_numbers_of_the_module(server: httpx.Client, modules: Trained, root: Path, name: str) -> None:
    _, _, fresh = digits()
    rows = fresh[:7]
    found = post(server, "/reconstruct", {"inputs": rows.tolist()}, params={"model": name})["outputs"]
    np.testing.assert_allclose(found, expected_reconstruction(modules, name, rows), atol=2e-6)
    verdicts = post(server, "/anomaly", {"inputs": rows.tolist()}, params={"model": name})
    with torch.inference_mode():
        scores = artifact.load(path_of(root, name)).module.score(rows)[0]
    np.testing.assert_allclose([each["score"] for each in verdicts["results"]], scores, rtol=1e-3)


REPEATED = [
    (path, name)
    for path in ("/encode", "/reconstruct", "/anomaly", "/sample")
    for name in (WITH_LATENTS if path in OF_LATENTS else DESIGNS)
]


@pytest.mark.parametrize(("path", "name"), REPEATED)
def test_repeated_request_gives_the_same_bytes(server: httpx.Client, path: str, name: str) -> None:
    body = {"n": 4, "seed": 3} if path == "/sample" else {"inputs": digits()[2][:5].tolist()}
    first = server.post(path, json=body, params={"model": name})
    assert first.status_code == 200
    assert {server.post(path, json=body, params={"model": name}).content for _ in range(3)} == {first.content}


def test_samples_of_an_adopted_vae_resemble_the_rows(server: httpx.Client, root: Path) -> None:
    rows = np.array(post(server, "/sample", {"n": 400, "seed": 1}, params={"model": "tuples"})["outputs"])
    manifest = read_manifest(path_of(root, "tuples"))
    mean = np.array([feature.mean for feature in manifest.features])
    error = np.abs(rows.mean(axis=0) - mean).max()
    assert error < 0.1  # pixels are in [0, 1]
