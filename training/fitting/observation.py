"""Fit the observation noise: how rows scatter around the decoder's output."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.conditional import ConditionalPrior
from models.core import Core
from models.levels import MixedObservation
from models.likelihood import BernoulliLikelihood, GaussianLikelihood
from models.observation import BernoulliObservation, Observation
from models.pca import PCA
from models.prior import Prior
from models.scaling import Scaling
from models.vae import VAE
from training.config import read_bounds
from training.errors import FitError
from training.fitting.prepared_data import PreparedData
from training.fitting.prior import covariance_of
from training.random_streams import VALIDATION, random_stream

MAX_FULL_WIDTH = 512  # for more features, the noise of different features is independent
PRIOR_ROWS = 4096  # number of decoded samples from which the variance of the decoder's output is estimated
MAX_VALUE = torch.finfo(torch.float32).max  # of a bound
ROUNDING_VARIANCE = 1.0 / 12.0  # variance that rounding to whole numbers adds (Sheppard 1898)


def fit_observation(core: Core, prior: Prior, scaling: Scaling, data: PreparedData) -> Observation:
    """Return the observation noise of `core`.

    A VAE has the noise of its likelihood. PCA has the covariance that its latents leave unexplained: samples then have
    the covariance of the fit rows. An autoencoder has no likelihood. Its noise has the correlations of the residuals of
    held-out rows, and the variances that the decoded samples lack: each feature of the samples then has the variance of
    the fit rows.
    """
    return _observation(core, _noise_covariance(core, prior, scaling, data), scaling, data)


def check_bounds(bounds: Sequence[str], data: PreparedData) -> None:
    """Check that `set_bounds` will accept the option --bounds. Call this before the training.

    Raises:
        FitError: no value is within the bounds of a column.
    """
    if bounds:  # a model with a window has none
        low, high, whole = _limits(data)
        set_bounds(Observation(torch.zeros_like(low), low, high, whole), bounds, data.table.names)


def set_bounds(observation: Observation, bounds: Sequence[str], names: Sequence[str]) -> None:
    """Set the bounds of `observation` to those of the option --bounds. An infinite end stays as it is.

    The bounds of a column of whole numbers become whole numbers, because values are rounded after they are clamped.

    Args:
        names: the names of the features.

    Raises:
        FitError: no value is within the bounds of a column.
    """
    for entry in bounds:
        name, low, high = read_bounds(entry)
        column = names.index(name)
        is_whole = bool(observation.whole[column])
        first, last = float(observation.low[column]), float(observation.high[column])
        if low > -math.inf:
            first = max(float(math.ceil(low)) if is_whole else low, -MAX_VALUE)
        if high < math.inf:
            last = min(float(math.floor(high)) if is_whole else high, MAX_VALUE)
        if first > last:
            kind = "whole number" if is_whole else "value"
            raise FitError(
                f"--bounds {entry} and the range of the training rows leave no {kind} for {name}: "
                f"the smallest would be {first:g} and the largest {last:g}; give both ends, or other ends"
            )
        observation.low[column], observation.high[column] = first, last


def fit_row_observation(
    core: Core, prior: Prior, scaling: Scaling, data: PreparedData, row_scaling: Scaling
) -> Observation:
    """Return the noise of the newest rows of windows, for `core`, a model of their summaries.

    Args:
        scaling: converts summaries to the units of `core`.
        data: the summaries, with their windows.
        row_scaling: converts rows from raw units to the units of `core`, [D].
    """
    width = len(row_scaling.shift)
    covariance = _noise_covariance(core, prior, scaling, data)  # [V, V] or [V]
    covariance = covariance[:width, :width] if covariance.dim() == 2 else covariance[:width]
    return _observation(core, covariance, row_scaling, data.rows)


def _observation(core: Core, covariance: Tensor, scaling: Scaling, data: PreparedData) -> Observation:
    """Return the noise with `covariance` [D, D], or with these variances [D], in model units, for rows like `data`."""
    if isinstance(core, VAE) and isinstance(core.likelihood, BernoulliLikelihood):
        return BernoulliObservation(scaling.shift, scaling.shift + scaling.scale)
    scale = scaling.scale.double()
    if covariance.dim() == 2:
        values, vectors = torch.linalg.eigh(covariance)
        factor = scale.unsqueeze(1) * vectors * values.clamp(min=0.0).sqrt()
        variance = factor.square().sum(dim=1)
    else:
        factor = scale * covariance.sqrt()
        variance = factor.square()
    low, high, whole = _limits(data)
    kept = (1.0 - ROUNDING_VARIANCE / variance.clamp(min=1e-30)).clamp(min=0.0).sqrt()
    kept = torch.where(whole, kept, 1.0)
    factor = factor * (kept.unsqueeze(1) if factor.dim() == 2 else kept)
    if data.category_sizes:
        return MixedObservation(data.category_sizes, factor.float(), low, high, whole)
    return Observation(factor.float(), low, high, whole)


def _limits(data: PreparedData) -> tuple[Tensor, Tensor, Tensor]:
    """Return the smallest and the largest value of each column, and whether its values are whole numbers, [D] each."""
    whole = ((data.sample == data.sample.round()) | data.sample.isnan()).all(dim=0)
    return data.moments.low.float(), data.moments.high.float(), whole


def _noise_covariance(core: Core, prior: Prior, scaling: Scaling, data: PreparedData) -> Tensor:
    """Return the covariance [D, D] or the variances [D] of the noise in model units, float64."""
    width = data.table.x.width
    if isinstance(core, VAE):
        if isinstance(core.likelihood, BernoulliLikelihood):
            return torch.zeros(width)  # the draw of a Bernoulli needs no noise
        assert isinstance(core.likelihood, GaussianLikelihood)
        log_variance = core.likelihood.log_variance.detach().clamp(core.likelihood.low, core.likelihood.high)
        numbers = width - sum(data.category_sizes)
        variance = log_variance.double().exp().expand(numbers)
        return torch.cat((variance, torch.zeros(width - numbers).double()))
    moments = data.scaled_moments(scaling)
    if isinstance(core, PCA):
        components = core.components.double()  # [K, D]
        spread = covariance_of(prior) @ components  # [K, D]
        if moments.covariance is None or width > MAX_FULL_WIDTH:
            return (moments.variance - (components * spread).sum(dim=0)).clamp(min=0.0)
        return moments.covariance - components.T @ spread
    random = random_stream(0, VALIDATION)
    with torch.no_grad():
        noise = torch.randn(PRIOR_ROWS, prior.means.shape[1], generator=random)
        choice = torch.rand(PRIOR_ROWS, generator=random)
        u, condition, of_draws = scaling(data.held_out), torch.empty(len(data.held_out), 0), torch.empty(PRIOR_ROWS, 0)
        if data.conditions is not None and isinstance(prior, ConditionalPrior):
            condition = torch.from_numpy(data.conditions.one_hot(data.split.held_out))  # [M, C]
            drawn = torch.randint(len(data.split.fit), (PRIOR_ROWS,), generator=random).numpy()
            of_draws = torch.from_numpy(data.conditions.one_hot(data.split.fit[drawn]))  # [PRIOR_ROWS, C]
            choice = choice + prior.number(of_draws)
        decoded = core.decode(torch.cat((prior(noise, choice), of_draws), dim=1)).double()
        latents = core.encode(torch.cat((u, condition), dim=1))[0]
        residual = (u - core.decode(torch.cat((latents, condition), dim=1))).double()  # [M, D]
    lacking = (moments.variance - decoded.var(dim=0)).clamp(min=0.0)  # [D]
    if width > MAX_FULL_WIDTH or len(residual) < 2:
        return lacking
    correlation = torch.corrcoef(residual.T).reshape(width, width).nan_to_num(0.0)
    correlation.fill_diagonal_(1.0)
    return correlation * torch.outer(lacking.sqrt(), lacking.sqrt())
