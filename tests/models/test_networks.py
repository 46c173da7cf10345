"""The networks: outputs compared with numpy, shapes, gradients, and the scripted and frozen forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import artifact
from models.calibration import Calibration
from models.likelihood import BernoulliLikelihood
from models.networks import conv_decoder, conv_encoder, mlp
from models.pipeline import Pipeline
from models.prior import gaussian_prior
from models.scaling import Scaling
from models.vae import VAE
from tests.models.builders import manifest

SHAPES = [(8, 8), (28, 28), (7, 9), (2, 2), (2, 5), (8, 8, 1), (6, 5, 3), (3, 3, 2), (9, 4, 4)]
K = 3


def filters(layer: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    assert layer.bias is not None
    return layer.weight.detach().numpy(), layer.bias.detach().numpy()


def convolved(image: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Convolve `image` [H, W, C] with filters `weight` [F, C, 3, 3], stride 2 and zero padding; return [h, w, F]."""
    height, width, _ = image.shape
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    out = np.empty(((height + 1) // 2, (width + 1) // 2, len(weight)))
    for i, j, f in np.ndindex(*out.shape):
        patch = padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]  # [3, 3, C]
        out[i, j, f] = (patch * weight[f].transpose(1, 2, 0)).sum() + bias[f]
    return out


def transposed_convolved(
    image: np.ndarray, weight: np.ndarray, bias: np.ndarray, height: int, width: int
) -> np.ndarray:
    """Apply the transpose of `convolved` to `image` [h, w, F]; return an image [height, width, C]."""
    out = np.zeros((height + 2, width + 2, weight.shape[1]))
    for i, j, f in np.ndindex(*image.shape):
        out[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] += image[i, j, f] * weight[f].transpose(1, 2, 0)
    return np.asarray(out[1:-1, 1:-1] + bias)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [(), (4,)])
@pytest.mark.parametrize("dense", [(), (9, 7)])
def test_encoder_and_decoder_outputs_have_the_requested_widths(
    shape: tuple[int, ...], channels: tuple[int, ...], dense: tuple[int, ...]
) -> None:
    x = torch.randn(5, int(np.prod(shape)))
    latents = conv_encoder(shape, channels, K, dense=dense)(x)
    assert latents.shape == (5, K)
    assert conv_decoder(shape, channels, K, dense=dense)(latents).shape == x.shape


@pytest.mark.parametrize("shape", [(8, 8), (9, 7), (28, 28), (13, 10, 3)])
def test_encoder_halves_the_sides_of_an_image_rounded_up_and_decoder_restores_them(shape: tuple[int, ...]) -> None:
    stages, sizes = (4, 5, 6), []
    x = torch.randn(2, int(np.prod(shape)))
    for layer in conv_encoder(shape, stages, K):
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            sizes.append(tuple(x.shape[2:]))
    halves = [tuple(-(-side // 2**n) for side in shape[:2]) for n in (1, 2, 3)]
    assert sizes == halves
    x, sizes = torch.randn(2, K), []
    for layer in conv_decoder(shape, stages, K):
        x = layer(x)
        if isinstance(layer, nn.ConvTranspose2d):
            sizes.append(tuple(x.shape[2:]))
    assert sizes == [halves[1], halves[0], tuple(shape[:2])]


@pytest.mark.parametrize("shape", [(5, 4), (6, 7, 3)])
def test_encoder_equals_the_numpy_convolution(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network, image = conv_encoder(shape, (4,), K, "relu"), np.random.default_rng(0).normal(size=shape)
    last = network[-1]
    assert isinstance(last, nn.Linear)
    hidden = np.maximum(convolved(image.reshape(*shape[:2], -1), *filters(network[1])), 0).transpose(2, 0, 1)
    expected = last.weight.detach().numpy() @ hidden.ravel() + last.bias.detach().numpy()
    latents = network(torch.from_numpy(image.astype(np.float32).reshape(1, -1)))
    np.testing.assert_allclose(latents[0].detach(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 4), (6, 7, 3)])
def test_decoder_equals_the_numpy_transposed_convolution(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network, latents = conv_decoder(shape, (4,), K, "tanh"), torch.randn(1, K)
    first = network[0]
    assert isinstance(first, nn.Linear)
    top = (first(latents).detach().numpy()[0]).reshape(4, -(-shape[0] // 2), -(-shape[1] // 2)).transpose(1, 2, 0)
    expected = transposed_convolved(np.tanh(top), *filters(network[3]), shape[0], shape[1])
    np.testing.assert_allclose(network(latents)[0].detach(), expected.ravel(), atol=1e-5)


def test_features_shift_by_one_if_the_image_shifts_by_the_stride() -> None:
    torch.manual_seed(0)
    features = conv_encoder((16, 16, 2), (4,), K)[:3]
    image = torch.zeros(16, 16, 2)
    image[4:8, 4:8] = torch.randn(4, 4, 2)
    original = features(image.reshape(1, -1))
    moved = features(image.roll((2, 4), (0, 1)).reshape(1, -1))
    assert torch.allclose(original.roll((1, 2), (2, 3)), moved, atol=1e-6)
    shuffled = features(image.reshape(1, -1)[:, torch.randperm(512)])
    assert not torch.allclose(original.sort().values, shuffled.sort().values, atol=1e-3)


@pytest.mark.parametrize("activation", ["silu", "relu", "tanh"])
def test_every_weight_has_a_nonzero_gradient(activation: str) -> None:
    torch.manual_seed(0)
    shape = (9, 6, 3)
    for network in (
        nn.Sequential(conv_encoder(shape, (4, 5), K, activation), conv_decoder(shape, (4, 5), K, activation)),
        mlp([162, 8, 162], activation),
    ):
        network(torch.randn(4, 162)).square().sum().backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        assert all(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients)


@pytest.mark.parametrize(("activation", "function"), [("silu", nn.SiLU()), ("relu", torch.relu), ("tanh", torch.tanh)])
def test_mlp_has_activations_between_layers_and_none_after_the_last_layer(activation: str, function: object) -> None:
    torch.manual_seed(0)
    network, x = mlp([4, 6, 2], activation), torch.randn(5, 4)
    first, _, last = network
    assert callable(function)
    assert torch.equal(network(x), last(function(first(x))))


def pipeline(shape: tuple[int, ...]) -> Pipeline:
    torch.manual_seed(0)
    features = int(np.prod(shape))
    networks = conv_encoder(shape, (4, 6), 2 * K), conv_decoder(shape, (4, 6), K)
    scaling = Scaling(torch.zeros(features), torch.ones(features))
    core = VAE(*networks, BernoulliLikelihood())
    return Pipeline(scaling, core, gaussian_prior(torch.ones(K)), Calibration(torch.rand(50))).eval()


def inputs(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.rand(6, int(np.prod(shape))), torch.randn(6, K), torch.rand(6)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_loaded_convolutional_artifact_gives_equal_outputs_on_every_device(device: str, tmp_path: Path) -> None:
    shape = (7, 5, 3)
    model, given = pipeline(shape), inputs(shape)
    eager, module = artifact.compute_outputs(model, *given), artifact.script(model)
    description = manifest("conv", artifact.weights_sha256(model), artifact.record_golden(module, *given))
    loaded = artifact.load(artifact.publish(module, description, tmp_path), device).module
    outputs = artifact.compute_outputs(loaded, *(part.to(device) for part in given))
    for name in eager:
        assert torch.allclose(outputs[name].cpu(), eager[name], rtol=1e-5, atol=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 8), (7, 5, 3)])
def test_convolutions_give_equal_outputs_whether_eager_scripted_or_frozen(shape: tuple[int, ...]) -> None:
    model, given = pipeline(shape), inputs(shape)
    scripted = artifact.script(model)
    eager = artifact.compute_outputs(model, *given)
    for other in (scripted, artifact.freeze(scripted)):
        for _ in range(3):
            outputs = artifact.compute_outputs(other, *given)
        for name in eager:
            assert torch.allclose(outputs[name], eager[name], rtol=1e-6, atol=1e-6), name
