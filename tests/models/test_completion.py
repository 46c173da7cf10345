"""Models that complete rows: what they estimate and draw is compared with closed forms, computed by NumPy."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import t as student_t

from models import artifact
from models.completion import KEPT_STEPS, Chains, CompletingNetwork, CompletingPCA, t_quantile
from models.likelihood import GaussianLikelihood
from models.observation import Observation
from models.pca import PCA
from models.pipeline import Pipeline
from models.prior import gaussian_prior
from models.scaling import Scaling
from models.vae import VAE
from tests.models.builders import D, K, batch, pipeline
from tests.models.publishing import publish
from training.fitting.completion import widths_by_share, with_completion
from training.fitting.pca import fit_pca

Doubles = npt.NDArray[np.float64]
GAPS = ((0, 1), (1, 0), (1, 3), (2, 4), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4))  # row 3 has no value at all


def conditional(model: CompletingPCA, row: torch.Tensor) -> tuple[Doubles, Doubles]:
    """Return the mean and the covariance of the missing values of `row` [D], in raw units.

    The covariance of all values is C = W W' + s2 I (Tipping & Bishop 1999), and its blocks give the conditional one.
    """
    core = model.core
    v, s2 = core.components.double().numpy(), float(core.noise_variance)
    scale, shift = model.scaling.scale.double().numpy(), model.scaling.shift.double().numpy()
    covariance = v.T @ np.diag(core.eigenvalues.double().numpy() - s2) @ v + s2 * np.eye(len(scale))
    covariance, mean = covariance * np.outer(scale, scale), core.mean.double().numpy() * scale + shift
    x = row.double().numpy()
    m, o = np.isnan(x), ~np.isnan(x)
    gain = covariance[np.ix_(m, o)] @ np.linalg.inv(covariance[np.ix_(o, o)])
    return mean[m] + gain @ (x[o] - mean[o]), covariance[np.ix_(m, m)] - gain @ covariance[np.ix_(o, m)]


def pca(kind: str = "pca") -> CompletingPCA:
    model = pipeline(kind)
    assert isinstance(model, CompletingPCA)
    return model


def test_impute_of_pca_for_rows_with_gaps_gives_the_conditional_gaussian() -> None:
    model, (x, _, _) = pca(), batch(gaps=GAPS)
    mean, deviation, low, high = artifact.script(model).impute(x)
    for index, row in enumerate(x):
        expected, covariance = conditional(model, row)
        missing = row.isnan()
        np.testing.assert_allclose(mean[index][missing], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(deviation[index][missing], np.sqrt(np.diag(covariance)), rtol=1e-6)
        quantile = 1.6448536269514722 * np.sqrt(np.diag(covariance))
        np.testing.assert_allclose(low[index][missing], expected - quantile, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(high[index][missing], expected + quantile, rtol=1e-6, atol=1e-6)
        known = ~missing
        for values in (mean, low, high):
            assert torch.equal(values[index][known], row[known])
        assert not deviation[index][known].any()


def test_impute_of_pca_with_nearly_no_noise_still_gives_the_conditional_gaussian() -> None:
    model = pca()
    model.core = PCA(model.core.mean, model.core.components, torch.tensor([3.0, 2.0]), torch.tensor(3e-6))
    row = batch(1, [(0, 2), (0, 4)])[0]
    mean, deviation, _, _ = model.impute(row)
    expected, covariance = conditional(model, row[0])
    np.testing.assert_allclose(mean[0][[2, 4]], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(deviation[0][[2, 4]], np.sqrt(np.diag(covariance)), rtol=1e-5)


def test_impute_of_pca_gives_the_same_values_if_the_scaling_fills_gaps() -> None:
    plain, imputing, (x, _, _) = pca(), pca("pca-imputing"), batch(gaps=GAPS)
    imputing.core = plain.core
    imputing.scaling.shift, imputing.scaling.scale = plain.scaling.shift, plain.scaling.scale
    for expected, found in zip(plain.impute(x), imputing.impute(x), strict=True):
        assert torch.equal(found, expected)


def fitted_pca(rows: torch.Tensor, latents: int) -> CompletingPCA:
    """Return a pipeline with the PCA of rows [N, D], whose model units are the raw units."""
    width, parts = rows.shape[1], pca()
    scaling = Scaling(torch.zeros(width), torch.ones(width))
    infinite = torch.full((width,), torch.inf)
    observation = Observation(torch.zeros(width), -infinite, infinite, torch.zeros(width, dtype=torch.bool))
    core, prior = fit_pca(rows, latents).float(), gaussian_prior(torch.ones(latents))
    pipeline = Pipeline(scaling, core, prior, parts.calibration, None, observation)
    model = with_completion(pipeline, rows[:1], rows[:1], seed=0, fit_rows=len(rows))
    assert isinstance(model, CompletingPCA)
    return model.eval()


@pytest.mark.parametrize("rows", [12, 40])
def test_intervals_of_pca_with_few_fit_rows_and_hardly_any_noise_are_those_of_a_regression(rows: int) -> None:
    """The last column is a sum of the others plus noise, so all latents but the noise are the other columns."""
    random = torch.Generator().manual_seed(rows)
    others = torch.randn(rows + 20, 4, generator=random).double()
    last = others.sum(dim=1, keepdim=True) + 0.01 * torch.randn(rows + 20, 1, generator=random)
    x = torch.cat((others, last), dim=1)
    given, new = x[:rows].numpy(), x[rows:].numpy()
    design, inputs = (np.column_stack((np.ones(len(part)), part[:, :4])) for part in (given, new))
    coefficients, squares, _, _ = np.linalg.lstsq(design, given[:, 4], rcond=None)
    freedom = rows - 5
    leverage = np.einsum("ni,ij,nj->n", inputs, np.linalg.inv(design.T @ design), inputs)
    margin = student_t.ppf(0.95, freedom) * np.sqrt(squares[0] / freedom * (1.0 + leverage))
    gaps = torch.cat((x[rows:, :4], torch.full((20, 1), torch.nan)), dim=1).float()
    mean, _, low, high = artifact.script(fitted_pca(x[:rows].float(), latents=4)).impute(gaps)
    np.testing.assert_allclose(mean[:, 4], inputs @ coefficients, atol=1e-3)
    np.testing.assert_allclose((high - low)[:, 4] / 2.0, margin, rtol=0.01)


def test_interval_of_pca_for_a_row_without_values_is_that_of_a_new_row() -> None:
    rows = 3.0 * torch.randn(10, 1, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, D) + torch.randn(10, D)
    _, deviation, low, high = fitted_pca(rows, latents=2).impute(torch.full((1, D), torch.nan))
    expected = student_t.ppf(0.95, 9) * np.sqrt(1.1) * deviation
    np.testing.assert_allclose((high - low) / 2.0, expected, rtol=1e-3)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_intervals_of_pca_that_few_rows_fitted_contain_90_percent_of_new_values(share: float) -> None:
    """Without their widening, they would contain 80 to 84 %."""
    random, inside, narrow = np.random.RandomState(0), [], []
    for _ in range(60):
        x = torch.from_numpy(random.standard_normal((240, 8)) @ random.standard_normal((8, 8))).float()
        model, test = fitted_pca(x[:30], latents=6), x[30:]
        taken = torch.from_numpy(random.uniform(size=test.shape) < share)
        taken[taken.all(dim=1), 0] = False
        mean, deviation, low, high = model.impute(torch.where(taken, torch.nan, test))
        inside.append(((low <= test) & (test <= high))[taken].double().mean())
        narrow.append(((test - mean).abs() <= 1.645 * deviation)[taken].double().mean())
    assert 0.88 < np.mean(inside) < 0.92
    assert np.mean(narrow) < 0.85


@pytest.mark.parametrize("freedom", [6, 20, 1000])
def test_t_quantile_gives_that_of_scipy(freedom: int) -> None:
    found = float(t_quantile(torch.tensor(1.0 / freedom).double()))
    assert found == pytest.approx(student_t.ppf(0.95, freedom), abs=1e-3 if freedom == 6 else 1e-5)


@pytest.mark.parametrize("gaps", [[1], [0, 3], [0, 1, 2, 4]], ids=str)
def test_complete_of_pca_maps_noise_to_the_conditional_gaussian(gaps: list[int]) -> None:
    """The draw is an affine function of the noise: at 0 it is the mean, and its matrix A has A A' = covariance."""
    model = pca()
    row = batch(1, [(0, gap) for gap in gaps])[0]
    noise = torch.cat((torch.zeros(1, K + D), torch.eye(K + D)))  # zero, and each unit vector
    row_noise = torch.cat((noise[:, K:], torch.full((K + D + 1, D), 9.0)), dim=1)  # the last D columns do not matter
    _, _, rows = artifact.script(model).complete(row, noise[:, :K], torch.zeros(K + D + 1), row_noise)
    known = ~row[0].isnan()
    assert torch.equal(rows[:, known], row[:, known].expand(K + D + 1, -1))
    drawn = rows[:, gaps].double().numpy()
    matrix = (drawn[1:] - drawn[0]).T  # [missing, K + D]
    mean, covariance = conditional(model, row[0])
    np.testing.assert_allclose(drawn[0], mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(matrix @ matrix.T, covariance, rtol=1e-6, atol=2e-6)


def test_complete_of_pca_without_row_noise_gives_what_its_latents_decode_to() -> None:
    model, (_, noise, choice) = pca(), batch()
    row = batch(1, [(0, 1), (0, 2)])[0]
    z, x_hat, _ = model.complete(row, noise, choice, torch.zeros(len(noise), 2 * D))
    decoded = model.decode(z)
    assert torch.allclose(x_hat[:, [1, 2]], decoded[:, [1, 2]], atol=1e-5)
    assert torch.equal(x_hat[:, [0, 3, 4]], row[:, [0, 3, 4]].expand(len(noise), -1))


@pytest.mark.parametrize("kind", ["pca", "vae"])
def test_imputed_values_are_within_bounds_and_whole_and_their_intervals_contain_them(kind: str) -> None:
    free = pca() if kind == "pca" else linear_vae(chains=20)[0]
    x, missing = batch(gaps=GAPS)[0], batch(gaps=GAPS)[0].isnan()
    expected, deviation, lowest, highest = free.impute(x)
    low, high = expected.median(dim=0).values, expected.amax(dim=0) + 1.0
    whole = torch.arange(D) % 2 == 0
    free.observation = Observation(torch.zeros(D), low.floor(), high.ceil(), whole)
    mean, same, first, last = artifact.script(free).impute(x)
    clamped = torch.minimum(torch.maximum(expected, low.floor()), high.ceil())
    assert torch.equal(mean, torch.where(missing, torch.where(whole, clamped.round(), clamped), x))
    assert torch.equal(same, deviation)
    assert torch.equal(first, torch.minimum(lowest, mean))
    assert torch.equal(last, torch.maximum(highest, mean))


def linear_vae(chains: int) -> tuple[CompletingNetwork, CompletingPCA]:
    """Return a VAE that is exactly the probabilistic PCA of the second model, with its posterior as the encoder."""
    model, width, latents = pca(), D, K
    core = model.core
    s2 = core.noise_variance
    loadings = (core.eigenvalues - s2).sqrt().unsqueeze(1) * core.components  # [K, D]
    precision = loadings @ loadings.T + s2 * torch.eye(latents)  # M; the components are orthogonal, so M is diagonal
    encoder, decoder = torch.nn.Linear(width, 2 * latents), torch.nn.Linear(latents, width)
    gain = torch.linalg.solve(precision, loadings)  # [K, D]
    encoder.weight.data = torch.cat((gain, torch.zeros(latents, width)))
    encoder.bias.data = torch.cat((-gain @ core.mean, (s2 / precision.diagonal()).log()))
    decoder.weight.data, decoder.bias.data = loadings.T, core.mean
    vae = VAE(encoder, decoder, GaussianLikelihood(s2.reshape(1))).eval()
    random = torch.Generator().manual_seed(2)
    candidates, noise, row_noise = (torch.randn(chains, size, generator=random) for size in (latents, latents, width))
    ones = torch.ones(width)
    parts = Chains(
        s2.sqrt() * ones,
        candidates,
        torch.rand(chains, generator=random),
        noise,
        row_noise,
        ones,
        -1.645 * ones,
        1.645 * ones,
    )
    prior = gaussian_prior(torch.ones(latents))
    completing = CompletingNetwork(model.scaling, vae, prior, model.calibration, chains=parts)
    return completing.eval().requires_grad_(False), model


def test_run_chains_returns_as_many_states_as_kept_steps_say() -> None:
    network, _ = linear_vae(chains=3)
    x, _, _ = batch()
    states = network._run_chains(x)
    assert states.shape == (len(x), KEPT_STEPS * 3, D)
    assert len(network.chains.state_places) == KEPT_STEPS * 3 - 1


@pytest.mark.parametrize("gaps", [[1], [0, 3], [0, 1, 2, 4], [0, 1, 2, 3, 4]], ids=str)
def test_chains_of_a_vae_whose_encoder_is_the_posterior_give_the_conditional_gaussian(gaps: list[int]) -> None:
    vae, exact = linear_vae(chains=8000)
    row = batch(1, [(0, gap) for gap in gaps])[0]
    expected, covariance = conditional(exact, row[0])
    mean, deviation, _, _ = vae.impute(row)
    spread = np.sqrt(np.diag(covariance))
    assert np.abs(mean[0, gaps].double().numpy() - expected).max() < 0.04 * spread.max()
    assert deviation[0, gaps].double().numpy() == pytest.approx(spread, rel=0.04)


def test_complete_of_a_vae_whose_encoder_is_the_posterior_draws_from_the_conditional_gaussian() -> None:
    vae, exact = linear_vae(chains=4000)
    vae.observation = Observation(  # the noise of the model, in raw units
        exact.core.noise_variance.sqrt() * exact.scaling.scale,
        torch.full((D,), -torch.inf), torch.full((D,), torch.inf), torch.zeros(D, dtype=torch.bool),
    )  # fmt: skip
    row, random = batch(1, [(0, 0), (0, 3)])[0], torch.Generator().manual_seed(3)
    noise = torch.randn(20_000, K, generator=random), torch.rand(20_000, generator=random)
    _, x_hat, rows = vae.complete(row, *noise, torch.randn(20_000, 2 * D, generator=random))
    expected, covariance = conditional(exact, row[0])
    drawn = rows[:, [0, 3]].double().numpy()
    assert np.abs(drawn.mean(axis=0) - expected).max() < 0.05 * np.sqrt(covariance.max())
    assert np.cov(drawn.T) == pytest.approx(covariance, rel=0.06, abs=0.03 * covariance.max())
    assert torch.equal(rows[:, [1, 2, 4]], row[:, [1, 2, 4]].expand(20_000, -1))
    assert torch.equal(x_hat[:, [1, 2, 4]], row[:, [1, 2, 4]].expand(20_000, -1))


@pytest.mark.parametrize("kind", ["pca", "ensemble", "vae-bernoulli"])
def test_loaded_artifact_imputes_like_the_model_whether_rows_come_together_or_alone(kind: str, tmp_path: Path) -> None:
    loaded, (x, noise, choice) = artifact.load(publish(tmp_path, kind)), batch(gaps=GAPS[:4])
    found = loaded.module.impute(x)
    for expected, array in zip(pipeline(kind).impute(x), found, strict=True):
        assert torch.allclose(array, expected, atol=1e-5)
    for index in range(len(x)):
        for together, alone in zip(found, loaded.module.impute(x[index : index + 1]), strict=True):
            assert torch.allclose(together[index], alone[0], rtol=1e-4, atol=1e-5)
    known = ~x.isnan()
    assert all(torch.equal(array[known], x[known]) for array in (found[0], found[2], found[3]))
    assert not any(array.isnan().any() for array in found)
    assert "impute.mean" in loaded.manifest.golden.outputs
    loaded.module.complete(x[1:2], noise, choice, torch.zeros(len(noise), 2 * D))


def test_intervals_cover_90_percent_of_new_values_at_every_share_although_the_model_is_wrong() -> None:
    """The rows have three times the noise that the encoder and the decoder expect, with heavy tails."""
    vae, exact = linear_vae(chains=4)
    random = np.random.RandomState(0)
    core, scaling = exact.core, exact.scaling
    z = random.standard_normal((3000, K)) * np.sqrt(core.eigenvalues.numpy())
    noise = 3 * float(core.noise_variance.sqrt()) * random.standard_t(5, (3000, D))
    u = torch.from_numpy(z @ core.components.numpy() + core.mean.numpy() + noise).float()
    rows = scaling.inverse(u)
    model = with_completion(vae, rows[:300], rows[300:1000], seed=0)
    test = rows[1000:]
    for share in (0.1, 0.2, 0.35, 0.5):
        taken = torch.from_numpy(random.uniform(size=(2000, D)) < share)
        taken[taken.all(dim=1), 0] = False
        _, _, low, high = model.impute(torch.where(taken, torch.nan, test))
        inside = ((low <= test) & (test <= high))[taken].double().mean()
        assert 0.87 < inside < 0.93, share  # 400 calibration rows determine an interval; of 10 % of D values, about 200
    untouched = vae.impute(torch.where(taken, torch.nan, test))  # without calibration
    assert ((untouched[2] <= test) & (test <= untouched[3]))[taken].double().mean() < 0.7


def test_shares_of_missing_values_that_are_equal_are_calibrated_as_one() -> None:
    """Each row of two columns misses half of its values, whatever the share that is taken out."""
    chains = linear_vae(chains=1)[0].chains
    chains.set_widths(*widths_by_share([0.5, 0.5, 0.5], [np.full(100, width) for width in (1.0, 1.0, 3.0)]))
    assert chains.width_of(torch.tensor([[True, False]])).tolist() == [[3.0]]
    chains.set_widths(*widths_by_share([0.5, 0.25], [np.full(100, width) for width in (3.0, 1.0)]))
    missing = torch.arange(8) < torch.tensor([[1], [2], [3], [4], [6]])  # [5, 8]
    assert chains.width_of(missing).flatten().tolist() == [1.0, 1.0, 2.0, 3.0, 3.0]
