"""The ONNX twin, the copy of the networks for ONNX Runtime, agrees with TorchScript and contains no weights.

The export is deterministic.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from models import artifact
from models.calibration import Calibration
from models.likelihood import BernoulliLikelihood, GaussianLikelihood
from models.networks import conv_decoder, conv_encoder
from models.pipeline import Pipeline
from models.prior import gaussian_prior
from models.scaling import Scaling
from models.vae import VAE
from service.inference.backends import OnnxModule
from tests.models.builders import CORES, batch, pipeline
from tests.models.publishing import publish_twin
from training.publishing.onnx_export import export

pytestmark = pytest.mark.slow

GAPS = ((0, 1), (0, 3))  # row and column of each missing value
SHAPE = (7, 6, 3)  # odd height, even width, RGB
WIDTH = 7 * 6 * 3


def convolutional_vae(last_layer: Callable[[], nn.Module] | None) -> Pipeline:
    """Return a VAE for images: Gaussian with `last_layer` at the end of the decoder, or Bernoulli if that is None."""
    torch.manual_seed(0)
    encoder, decoder = conv_encoder(SHAPE, (4, 8), 6, "relu", (10,)), conv_decoder(SHAPE, (4, 8), 3, "tanh", (10,))
    likelihood = GaussianLikelihood(torch.tensor([0.1])) if last_layer else BernoulliLikelihood()
    core = VAE(encoder, nn.Sequential(*decoder, last_layer()) if last_layer else decoder, likelihood)
    scaling = Scaling(torch.zeros(WIDTH), torch.full((WIDTH,), 255.0))
    model = Pipeline(scaling, core, gaussian_prior(torch.ones(3)), Calibration(torch.rand(50)))
    return model.eval().requires_grad_(False)


def assert_twin_agrees(model: Pipeline, rows: Callable[[int], tuple[torch.Tensor, ...]]) -> None:
    """Assert that a twin exported with 3 example rows agrees with TorchScript on 1, 2 and 33 rows."""
    x, z, _ = rows(3)
    module = artifact.freeze(artifact.script(model))
    twin = OnnxModule(artifact.Twin(export(model, x, z), model.state_dict()), module, 1)
    for count in (1, 2, 33):
        inputs = rows(count)
        expected = artifact.compute_outputs(module, *inputs)
        for name, output in artifact.compute_outputs(twin, *inputs).items():
            scale = max(1.0, float(expected[name].nan_to_num().abs().max()))
            torch.testing.assert_close(output, expected[name], rtol=0, atol=3e-6 * scale, equal_nan=True, msg=name)


@pytest.mark.parametrize("kind", CORES)
@pytest.mark.parametrize("size", [1.0, 1e6], ids=["usual", "extreme"])
def test_twin_agrees_with_torchscript_for_usual_and_extreme_values(kind: str, size: float) -> None:
    def rows(count: int) -> tuple[torch.Tensor, ...]:
        x, noise, choice = batch(count)
        return size * x, noise, choice

    assert_twin_agrees(pipeline(kind), rows)


@pytest.mark.parametrize("kind", ["pca-imputing", "ae-imputing", "vae-per-feature-imputing"])
def test_twin_agrees_with_torchscript_on_rows_with_missing_values(kind: str) -> None:
    assert_twin_agrees(pipeline(kind), lambda count: batch(count, gaps=GAPS))


@pytest.mark.parametrize("last_layer", [None, nn.Sigmoid], ids=["bernoulli", "sigmoid"])
def test_twin_of_a_convolutional_vae_agrees_with_torchscript(last_layer: Callable[[], nn.Module] | None) -> None:
    def rows(count: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(count)
        x = torch.randint(0, 256, (count, WIDTH), generator=generator).float()
        return x, torch.randn(count, 3, generator=generator), torch.rand(count, generator=generator)

    assert_twin_agrees(convolutional_vae(last_layer), rows)


def test_twin_and_torchscript_give_finite_scores_for_extreme_logits() -> None:
    model = pipeline("vae-bernoulli")
    assert isinstance(model.core, VAE)
    model.core.decoder[-1].bias.copy_(torch.tensor([300.0, -300.0, 40.0, -40.0, 0.0]))  # type: ignore[index] # a Sequential, typed as a Module
    assert_twin_agrees(model, batch)
    x, _, _ = batch()
    assert bool(model.score(x)[0].isfinite().all())


def test_twin_refers_to_the_weights_by_name_and_contains_no_weights() -> None:
    model, (x, z, _) = pipeline("ae"), batch()
    weights = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    for graph in export(model, x, z).values():
        initialisers = onnx.load_from_string(graph.onnx).graph.initializer
        assert {tensor.name: tuple(tensor.dims) for tensor in initialisers}.items() <= weights.items()
        assert [tensor.name for tensor in initialisers] == list(graph.weights)
        assert not any(tensor.raw_data or tensor.float_data for tensor in initialisers)
        assert graph.weights


@pytest.mark.parametrize("kind", ["vae-gaussian", "vae-per-feature", "vae-bernoulli"])
def test_graphs_of_a_vae_do_not_compute_the_row_width_at_run_time(kind: str) -> None:
    """The width of a row is known at export. Computing the width at run time would take ten nodes."""
    model, (x, z, _) = pipeline(kind), batch()
    for graph in export(model, x, z).values():
        operators = [node.op_type for node in onnx.load_from_string(graph.onnx).graph.node]
        assert "Gemm" in operators
        assert "Shape" not in operators


def test_export_of_the_same_model_gives_the_same_bytes() -> None:
    x, z, _ = batch()
    assert export(pipeline("ae"), x, z) == export(pipeline("ae"), x, z)


def test_export_does_not_change_the_model() -> None:
    model, (x, z, choice) = pipeline("vae-gaussian"), batch()
    before = artifact.compute_outputs(model, x, z, choice)
    export(model, x, z)
    after = artifact.compute_outputs(model, x, z, choice)
    for name, output in before.items():
        np.testing.assert_array_equal(after[name].numpy(), output.numpy())


def test_twin_loaded_from_a_published_artifact_equals_the_exported_twin(tmp_path: Path) -> None:
    path = publish_twin(tmp_path, "ae")
    loaded = artifact.load(path).twin
    assert loaded is not None
    x, z, _ = batch()
    assert loaded.graphs == export(pipeline("ae"), x, z)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
