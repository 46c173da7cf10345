"""Conditional models: the same in eager mode, in TorchScript and in ONNX, and equal to their definition."""

import numpy as np
import onnxruntime
import pytest
import torch
from scipy.stats import norm

from models import artifact
from models.conditional import ConditionalAutoencoder, ConditionalVAE, LevelCorrection
from models.manifest import Conditions
from tests.models.conditional import KINDS, LEVELS, B, C, D, L, batch, condition, conditional
from training.publishing.onnx_export import export


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_frozen_modules_give_the_outputs_of_the_eager_module(kind: str) -> None:
    model, inputs = conditional(kind), batch()
    expected = artifact.compute_outputs(model, *inputs)
    for module in (artifact.script(model), artifact.freeze(artifact.script(model))):
        for name, output in artifact.compute_outputs(module, *inputs).items():
            torch.testing.assert_close(output, expected[name], equal_nan=True, msg=f"{name} of {kind}")


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_twin_of_a_conditional_model_gives_the_outputs_of_the_module(kind: str) -> None:
    model, (x, noise, _) = conditional(kind), batch()
    weights = {name: tensor.contiguous().numpy() for name, tensor in model.state_dict().items()}

    def run(method: str, rows: torch.Tensor) -> list[np.ndarray]:
        graph = twin[method]
        options = onnxruntime.SessionOptions()
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(weights[name]) for name in graph.weights]
        options.add_external_initializers(list(graph.weights), values)
        session = onnxruntime.InferenceSession(graph.onnx, options, providers=["CPUExecutionProvider"])
        return list(session.run(None, {"rows": rows.numpy()}))

    twin = export(model, x[:3], noise[:3])
    expected = {
        "encode": model.encode(x),
        "decode": (model.decode(noise),),
        "score": model.score(x),
        "reconstruct": (model(x), (model(x) - x[:, :D]).square().mean(dim=1)),
    }
    for method, outputs in expected.items():
        for found, output in zip(run(method, noise if method == "decode" else x), outputs, strict=True):
            np.testing.assert_allclose(found, output.numpy(), rtol=1e-4, atol=1e-5, err_msg=method)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_a_row_end_with_its_condition_and_decode_to_its_reconstruction(kind: str) -> None:
    model, (x, _, _) = conditional(kind), batch()
    mean, std = model.encode(x)
    assert mean.shape == std.shape == (B, L + C)
    assert torch.equal(mean[:, L:], x[:, D:])
    assert not std[:, L:].any()
    torch.testing.assert_close(model.decode(mean), model(x))
    assert model(x).shape == (B, D)


@pytest.mark.parametrize("kind", KINDS)
def test_reconstruction_and_score_depend_on_the_condition(kind: str) -> None:
    model, x = conditional(kind), torch.randn(1, D)
    outputs = [model.score(torch.cat((x, condition(level, 0).unsqueeze(0)), dim=1)) for level in range(LEVELS[0])]
    assert len({round(float(score), 4) for score, *_ in outputs}) == LEVELS[0]
    for score, parts, contribution, expected in outputs:
        torch.testing.assert_close(parts.sum(dim=1), score)
        assert contribution.shape == expected.shape == (1, D)


def test_score_and_weight_of_a_conditional_vae_are_the_densities_of_its_definition() -> None:
    model, (x, noise, _) = conditional("vae"), batch()
    core = model.core
    assert isinstance(core, ConditionalVAE)
    x = torch.cat((x[:, :D], torch.stack([condition(1, 1)] * B)), dim=1)  # with all levels, the correction is 0
    u = torch.cat((model.scaling(x[:, :D]), x[:, D:]), dim=1)
    mean, log_variance = (part.double().numpy() for part in core.encoder(u).split(L, dim=1))
    std = np.exp(log_variance / 2)

    def decode(z: np.ndarray) -> np.ndarray:
        inputs = torch.cat((torch.from_numpy(z).float(), x[:, D:]), dim=1)
        return np.asarray(core.decoder(inputs).double().numpy())

    rows, deviation = u[:, :D].double().numpy(), np.sqrt(0.3)
    kl = (norm.logpdf(mean, mean, std) - norm.logpdf(mean, 0, 1)).sum(axis=1) + ((std**2 - 1) / 2).sum(axis=1)
    nll = -norm.logpdf(rows, decode(mean), deviation).sum(axis=1)
    score, parts, _, _ = model.score(x)
    np.testing.assert_allclose(parts.numpy(), np.column_stack((kl, nll, np.zeros(B))), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(score.numpy(), kl + nll, rtol=1e-4)
    z = mean + std * noise[:, :L].double().numpy()
    weight = norm.logpdf(rows, decode(z), deviation).sum(axis=1)
    weight += norm.logpdf(z).sum(axis=1) - norm.logpdf(z, mean, std).sum(axis=1)
    np.testing.assert_allclose(model.log_weight(x, noise).numpy(), weight, rtol=1e-4)


def test_score_of_a_conditional_autoencoder_is_the_distance_of_latents_and_residual() -> None:
    model, (x, _, _) = conditional("ae"), batch()
    x = torch.cat((x[:, :D], torch.stack([condition(2, 0)] * B)), dim=1)
    latents = model.encode(x)[0][:, :L].double()
    residual = ((x[:, :D] - model(x)) / model.scaling.scale).double()  # in model units
    assert isinstance(model.core, ConditionalAutoencoder)
    whitening = model.core.whitening
    factor = whitening.factor.double().numpy()
    joint = torch.cat((latents, residual), dim=1).numpy()
    centred = joint - whitening.mean.double().numpy()
    expected = np.einsum("bi,ij,bj->b", centred, factor.T @ factor, centred)
    np.testing.assert_allclose(model.score(x)[0].numpy(), expected, rtol=1e-3)


def test_draw_uses_the_mixture_of_all_conditions_if_a_condition_has_no_mixture_of_its_own() -> None:
    model = conditional("vae")
    asked = [condition(0, 0), condition(1, 0), condition(0, None), condition(None, None), condition(2, 1)]
    noise = torch.cat((torch.randn(5, L), torch.stack(asked)), dim=1)
    drawn = model.draw(noise, torch.full((5,), 0.999))
    assert torch.equal(drawn[:, L:], noise[:, L:])
    centres = torch.tensor([[100.0, -100.0], *[[1.0, 1.0]] * 4])
    torch.testing.assert_close(drawn[:, :L], centres + 0.1 * noise[:, :L])


def test_gaussians_of_a_mixture_are_drawn_as_often_as_their_weights_say() -> None:
    model = conditional("vae")
    choice = torch.linspace(0, 0.9999, 1000)
    noise = torch.zeros(1000, L + C)
    means = model.draw(noise, choice)[:, 0]
    assert float((means < 0.5).float().mean()) == pytest.approx(0.5, abs=0.002)


def test_correction_of_scores_is_linear_between_knots_and_zero_for_rows_with_all_levels() -> None:
    knots, slopes = torch.tensor([[0.0, 1.0, 3.0]]).repeat(3, 1), torch.tensor([[1.0, -0.5, -0.5]]).repeat(3, 1)
    correction = LevelCorrection(LEVELS, knots, slopes, torch.tensor([10.0, 20.0, 30.0]))
    score = torch.tensor([-5.0, 0.5, 2.0, 7.0, torch.inf])
    shape = [0.0, 0.5, 1.5, 2.0, 2.0]
    for levels, start in (((None, None), 10.0), ((0, None), 20.0), ((None, 1), 30.0)):
        found = correction(score, condition(*levels).repeat(5, 1))
        torch.testing.assert_close(found, start + torch.tensor(shape))
    assert not correction(score, condition(2, 1).repeat(5, 1)).any()


KIND = {"name": "kind", "levels": ["a", "b"]}
GOOD: dict[str, object] = {"columns": [KIND], "combinations": [[0], [1]], "shares": [0.25, 0.75]}


@pytest.mark.parametrize(
    "change",
    [
        {"columns": []},
        {"columns": [{"name": "kind", "levels": ["a"]}]},
        {"columns": [{"name": "kind", "levels": ["a", "a"]}]},
        {"columns": [{"name": "kind", "levels": ["a", "\n"]}]},
        {"columns": [{"name": "kind", "levels": [str(i) for i in range(101)]}]},
        {"columns": [KIND, KIND], "combinations": [[0, 0], [1, 1]]},
        {"combinations": [[0], [2]]},
        {"combinations": [[0, 1], [1, 1]]},
        {"combinations": [[0], [-1]]},
        {"shares": [0.5]},
        {"shares": [0.5, 0.6]},
        {"shares": [float("nan"), 1.0]},
    ],
)
def test_manifest_refuses_conditions_that_contradict_themselves(change: dict[str, object]) -> None:
    assert Conditions.model_validate(GOOD).width == 2
    with pytest.raises(ValueError, match=r"\S"):
        Conditions.model_validate(GOOD | change)
