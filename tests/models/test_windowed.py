"""The module of a model with a window: the same in eager mode, in TorchScript, and in the artifact."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models import artifact
from models.manifest import Window
from models.windows import summarise, take_windows
from service.inference import operations
from service.inference.backend_selection import select_backend
from tests.models.builders import B, D, pipeline
from tests.models.publishing import publish, publish_windowed
from tests.models.windows import CORES, SCALES, N, V, windowed, windows

KINDS = [*CORES, *(f"{kind}-imputing" for kind in CORES)]


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_frozen_modules_give_the_outputs_of_the_eager_module(kind: str) -> None:
    model, inputs = windowed(kind), windows(gaps=kind.endswith("imputing"))
    expected = artifact.compute_outputs(model, *inputs)
    for module in (artifact.script(model), artifact.freeze(artifact.script(model))):
        for name, output in artifact.compute_outputs(module, *inputs).items():
            torch.testing.assert_close(output, expected[name], equal_nan=True, msg=f"{name} of {kind}")


def test_models_compile_in_any_order_with_and_without_a_window() -> None:
    for model in (windowed("ae", seed=1), pipeline("ae"), windowed("ae", seed=2), pipeline("pca"), windowed("pca")):
        module = artifact.script(model)
        assert module.observe(torch.zeros(1, D), torch.zeros(1, D)).shape == (1, D)


@pytest.mark.parametrize("kind", CORES)
def test_outputs_are_rows_and_the_parts_sum_to_the_score(kind: str) -> None:
    model, (x, noise, _) = windowed(kind), windows()
    score, parts, contribution, expected = model.score(x)
    assert score.shape == (B,)
    torch.testing.assert_close(parts.sum(dim=1), score)
    assert contribution.shape == expected.shape == model(x).shape == model.decode(noise).shape == (B, D)
    assert (contribution >= 0).all()


@pytest.mark.parametrize("kind", CORES)
def test_contribution_of_a_feature_is_the_largest_of_its_summaries(kind: str) -> None:
    model, (x, _, _) = windowed(kind), windows()
    of_summaries = model.pipeline.score(model.summarise(x))[2]  # [B, V]
    expected = torch.stack([of_summaries[:, feature::D].amax(dim=1) for feature in range(D)], dim=1)
    torch.testing.assert_close(model.score(x)[2], expected)


def test_score_of_a_table_by_its_summaries_equals_the_score_of_its_windows() -> None:
    model = windowed("pca")
    rows = np.random.RandomState(0).standard_normal((40, D)).astype(np.float32)
    earlier = np.arange(40)
    u = model.scaling(torch.from_numpy(rows)).numpy()
    by_table = model.score_summaries(torch.from_numpy(summarise(u, earlier, SCALES)))
    by_window = model.score(torch.from_numpy(take_windows(rows, np.arange(40), earlier, N)))
    for found, expected in zip(by_table, by_window, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def cauchy(squares: Tensor) -> Tensor:
    """Return minus the log-likelihood ratio to the mode of independent Cauchy coordinates with these squares."""
    mode = torch.distributions.Cauchy(0.0, 1.0)
    surprise: Tensor = mode.log_prob(torch.tensor(0.0)) - mode.log_prob(squares.sqrt())
    return surprise


def test_scores_are_the_log_likelihood_of_independent_cauchy_coordinates() -> None:
    x = torch.randn(B, V)
    pca: Any = windowed("pca").pipeline.core
    torch.testing.assert_close(pca.score(x)[0], cauchy(pca.axes(x).square()).sum(dim=1))
    ae: Any = windowed("ae").pipeline.core
    code = ae.encoder(x)
    whitened = ae.whitening(torch.cat((code, x - ae.decoder(code)), dim=1))
    torch.testing.assert_close(ae.score(x)[0], cauchy(whitened.square()).sum(dim=1))
    vae: Any = windowed("vae").pipeline.core
    mean, log_variance = vae.posterior(x)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    terms = torch.cat((kl, (x - vae.decode(mean)).square()), dim=1) / vae.usual
    torch.testing.assert_close(vae.score(x)[0], cauchy(terms).sum(dim=1))
    both: Any = windowed("ensemble").pipeline.core
    scores = torch.stack((both.network.score(x)[0], both.pca.score(x)[0]), dim=1)
    torch.testing.assert_close(both.score(x)[0], ((scores - both.centre) / both.spread).sum(dim=1))


def test_rows_that_are_not_there_do_not_count() -> None:
    model, (x, _, _) = windowed("pca"), windows()
    short = x.clone()
    short[:, :-4] = torch.nan
    by_hand = torch.cat(
        [
            model.scaling(short[:, -1]),
            *(model.scaling(short[:, -min(4, scale) :]).mean(dim=1) for scale in SCALES),
            *(model.scaling(short[:, -min(4, scale) :]).std(dim=1, correction=0) for scale in SCALES),
        ],
        dim=1,
    )
    torch.testing.assert_close(model.summarise(short), by_hand, rtol=1e-4, atol=1e-5)


def test_missing_value_counts_as_its_replacement_before_the_summaries() -> None:
    model, (x, _, _) = windowed("pca-imputing"), windows()
    gap, filled = x.clone(), x.clone()
    gap[:, -2, 1] = torch.nan
    filled[:, -2, 1] = model.scaling.fill[1]  # type: ignore[index]
    for found, expected in zip(model.score(gap), model.score(filled), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_artifact_loads_with_its_window_and_answers_as_before(tmp_path: Path, kind: str) -> None:
    loaded = artifact.load(publish_windowed(tmp_path, kind))
    assert loaded.manifest.window == Window(rows=N, scales=list(SCALES))
    x, _, _ = windows(gaps=kind.endswith("imputing"))
    torch.testing.assert_close(loaded.module.score(x), windowed(kind).score(x))
    assert torch.equal(loaded.calibration["scores"], windowed(kind).pipeline.calibration.scores)
    z = loaded.module.summarise(x)
    torch.testing.assert_close(loaded.module.score_summaries(z), loaded.module.score(x))


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_twin_gives_the_golden_answers_and_reconstructs_the_newest_rows(tmp_path: Path, kind: str) -> None:
    loaded = artifact.load(publish_windowed(tmp_path, kind))
    selection = select_backend(loaded, requested="onnx")
    assert selection.backend.name == "onnx"
    x = windows(gaps=kind.endswith("imputing"))[0]
    has_gaps = kind.endswith("imputing")
    x_hat, errors = selection.backend.run(operations.reconstruct(has_gaps), (x.numpy(),))
    np.testing.assert_allclose(x_hat, loaded.module(x), rtol=1e-4, atol=1e-4)
    expected = np.nanmean((x_hat.astype(np.float64) - x[:, -1].numpy()) ** 2, axis=1)
    np.testing.assert_allclose(errors, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["pca", "ae", "vae-gaussian", "ensemble"])
def test_manifest_of_a_model_without_a_window_does_not_name_the_field(tmp_path: Path, kind: str) -> None:
    with zipfile.ZipFile(publish(tmp_path, kind)) as archive:
        member = next(name for name in archive.namelist() if name.endswith("manifest.json"))
        assert "window" not in json.loads(archive.read(member))
