"""Fit what an adopted network lacks: the statistics of its score, its prior, its noise and its explanation."""

from typing import Any, Literal

import torch
from torch import Tensor

from models.adopted import Adopted, AdoptedReconstruction, AdoptedReconstructionWithCode
from models.calibration import Calibration
from models.core import Core
from models.observation import Observation, no_observation_noise
from models.pipeline import Pipeline
from models.prior import Prior, gaussian_prior
from models.scaling import Scaling
from models.whitening import Whitening
from training.adoption.inspection import Functions
from training.data.moments import compute_moments
from training.errors import AdoptionError
from training.fitting.explanation import fit_explanation
from training.fitting.observation import fit_observation
from training.fitting.prepared_data import MAX_COVARIANCE_FEATURES, PreparedData
from training.fitting.prior import fit_prior
from training.fitting.score_statistics import (
    LATENT_NOISE,
    MIN_VARIANCE,
    ORDINARY_PERCENT,
    OUTLIER_FACTOR,
    fit_calibration,
)
from training.fitting.whitening import fit_whitening

BATCH = 4096  # rows per forward pass; limits the memory
PriorOption = Literal["standard"] | Prior | None


class _RawCore(Core):
    """A core with its scaling: it takes and returns rows in raw units."""

    def __init__(self, core: Core, scaling: Scaling) -> None:
        super().__init__()
        self.core, self.scaling = core, scaling

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents [B, K] of x [B, D], and their standard deviations [B, K]."""
        return self.core.encode(self.scaling(x))

    def decode(self, z: Tensor) -> Tensor:
        """Return the rows [B, D] for latents z [B, K]."""
        return self.scaling.inverse(self.core.decode(z))


def build_pipeline(
    functions: Functions,
    network: Any,
    scaling: Scaling,
    data: PreparedData,
    prior: PriorOption,
    seed: int,
    *,
    trained_on_fit_rows: bool,
) -> Pipeline:
    """Return the pipeline of an adopted network.

    The statistics of the score come from rows that did not train the network: from the held-out rows, and also from the
    fit rows if these did not train it. The calibration comes from rows that nothing else used.

    Args:
        functions: the functions of the user's module.
        network: the compiled functions.
        scaling: converts raw units to the units of the network.
        data: the rows, in raw units.
        prior: the prior over the latents: None to fit it, "standard" for N(0, I), or the prior itself.
        seed: seed of the fit of the prior.
        trained_on_fit_rows: whether the fit rows may have trained the network.

    Raises:
        AdoptionError: a score is not finite.
    """
    with torch.no_grad():
        held_out, sample, calibration = (_scaled(scaling, x) for x in (data.held_out, data.sample, data.calibration))
    core = _with_whitening(functions, network, held_out if trained_on_fit_rows else torch.cat((held_out, sample)))
    for rows in (sample, held_out):
        _require_finite(core, rows)
    fitted, observation = _prior_and_noise(functions, core, scaling, data, (sample, held_out), prior, seed)
    scores = fit_calibration(core, calibration)
    if not bool(scores.scores.isfinite().all()):
        raise AdoptionError(
            "the score of a calibration row is not finite: check the rows for extreme values, and the scaler"
        )
    moments = compute_moments(
        (part.numpy() for part in sample.split(BATCH)), with_covariance=sample.shape[1] <= MAX_COVARIANCE_FEATURES
    )
    identity = Scaling(torch.zeros(sample.shape[1]), torch.ones(sample.shape[1]))
    explanation = fit_explanation(moments, identity, data.images)
    return Pipeline(scaling, core, fitted, Calibration(scores.scores), explanation, observation).eval()


def _scaled(scaling: Scaling, x: Tensor) -> Tensor:
    """Return rows x [N, D] in model units. Raises AdoptionError if a value is not finite."""
    u = torch.cat([scaling(part) for part in x.split(BATCH)])
    if not bool(u.isfinite().all()):
        raise AdoptionError("the scaler gives values that are not finite for some of the rows given: check these rows")
    return u


def _require_finite(core: Core, u: Tensor) -> None:
    """Raise AdoptionError if the network gives latents or reconstructions of rows u [N, D] that are not finite."""
    with torch.no_grad():
        for part in u.split(BATCH):
            code = core.encode(part)[0]
            if not bool(code.isfinite().all()) or not bool(core.decode(code).isfinite().all()):
                raise AdoptionError(
                    "the network gives values that are not finite for some of the rows given: check the rows for "
                    "extreme values, and the scaler"
                )


def _prior_and_noise(
    functions: Functions,
    core: Core,
    scaling: Scaling,
    data: PreparedData,
    rows: tuple[Tensor, Tensor],
    prior: PriorOption,
    seed: int,
) -> tuple[Prior, Observation]:
    """Return the prior, and the noise of rows around decoded rows. `rows` are fit rows and held-out rows, scaled."""
    width = data.table.x.width
    if functions.encode is None:
        return gaussian_prior(torch.ones(1)), no_observation_noise(width)
    if isinstance(prior, Prior):
        fitted = prior
    elif prior == "standard":
        fitted = gaussian_prior(torch.ones(functions.latents))
    else:
        with_spread = functions.spread is not None and not data.images
        fitted = fit_prior(core, *rows, seed, with_spread=with_spread)
    identity = Scaling(torch.zeros(width), torch.ones(width))
    return fitted, fit_observation(_RawCore(core, scaling), fitted, identity, data)


def _with_whitening(functions: Functions, network: Any, u: Tensor) -> Core:
    """Return the core, with the whitening fitted to rows u [N, D] in model units that did not train the network."""
    has_decoder, latents = functions.encode is not None, functions.latents
    codes, residuals = [], []
    with torch.no_grad():
        for part in u.split(BATCH):
            if has_decoder:
                code = network.encode(part)[0]
                x_hat = network.decode(code)
            else:
                found = network.reconstruct(part)
                x_hat, code = found if latents else (found, part[:, :0])
            codes.append(code)
            residuals.append(part - x_hat)
    whitening = _whitening(torch.cat(codes).double(), torch.cat(residuals).double(), u.double())
    if has_decoder:
        return Adopted(network, whitening, latents)
    if latents:
        return AdoptedReconstructionWithCode(network, whitening, latents)
    return AdoptedReconstruction(network, whitening)


def _whitening(codes: Tensor, residuals: Tensor, u: Tensor) -> Whitening:
    """Return the whitening of the joint vectors of latents [N, K] and residuals [N, D] of rows u [N, D].

    `training.fitting.score_statistics` fits it in the same way, except that features may have different units here: the
    usual variance of a residual is that of its feature.
    """
    variance = u.var(dim=0, correction=0)
    varies = variance > MIN_VARIANCE * variance.max().clamp(min=1e-30)
    usual = torch.where(varies, variance, variance[varies].mean().nan_to_num(1.0))  # [D]
    squared = (residuals.square() / usual).sum(dim=1)  # [N]
    largest_ordinary = squared.kthvalue(-(-len(u) * ORDINARY_PERCENT // 100)).values
    kept = squared <= OUTLIER_FACTOR * largest_ordinary
    codes, residuals = codes[kept], residuals[kept]
    latents = codes.shape[1]
    expected, noise = usual, torch.zeros(latents + len(usual), dtype=torch.float64)
    if latents:
        of_code = codes.var(dim=0, correction=0).mean().clamp(min=MIN_VARIANCE)
        expected = torch.cat((of_code.expand(latents), usual))
        noise[:latents] = LATENT_NOISE
    return fit_whitening(torch.cat((codes, residuals), dim=1), expected, False, noise)
