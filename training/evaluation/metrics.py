"""Metrics of a fitted model on held-out rows."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.core import Core
from models.likelihood import BernoulliLikelihood
from models.pca import PCA
from models.pipeline import Pipeline
from models.scaling import Scaling
from models.vae import VAE
from training.fitting.latents import count_active_latents
from training.fitting.losses import elbo_terms, for_losses
from training.random_streams import VALIDATION, random_stream

SAMPLES = 16  # posterior samples per row for the expectation in the ELBO
BOUND_SAMPLES = 100  # importance samples per row for the importance-weighted bound
BOUND_ROWS = 1_000  # the importance-weighted bound is averaged over at most this many rows
BATCH = 4096  # rows processed at once; limits the memory
BOUND_BATCH = 256  # rows processed at once to compute the bound

# Maps rows [B, D] and standard normal noise [B, K] to the log weights log p(x, z) - log q(z|x), [B], in nats.
LogWeight = Callable[[Tensor, Tensor], Tensor]


class Bound(NamedTuple):
    """The importance-weighted lower bound on log p(x), in nats, model units."""

    mean: float  # mean over rows
    standard_error: float  # standard error of `mean`
    elbo: float  # the ELBO: the bound from a single sample, averaged over rows and samples
    by_row: Tensor  # [N], the bound of each row


def held_out_metrics(
    pipeline: Pipeline,
    held_out: Tensor,
    centre: Tensor,
    baseline_pca: PCA | None,
    seed: int,
    row_scaling: Scaling | None = None,
    inputs: Tensor | None = None,
) -> dict[str, float]:
    """Return the metrics of a model on its held-out rows.

    Every model has three errors. Each is a mean square over the values that are present, in raw units squared:

    - `reconstruction_error`: the error of the model.
    - `baseline_error`: the error of predicting `centre` for every row.
    - `pca_error`: the error of `baseline_pca`, if given.

    PCA and VAEs also have a density, in model units. The log-likelihood, the ELBO and the parts of the ELBO are in nats
    per row:

    - `log_likelihood`: exact for PCA; the importance-weighted bound for a VAE.
    - `bits_per_dimension`: the log-likelihood as a code length in bits per value.
    - `log_likelihood_se` (VAE): the standard error of `log_likelihood` over rows.
    - `reconstruction` (VAE): minus the distortion.
    - `kl` (VAE): the rate.
    - `elbo` (VAE): `reconstruction` minus `kl`.
    - `active_latents` (VAE): the number of latents that carry information.

    A model with a window is a model of summaries. Its errors are those of the newest rows of the windows. It has no
    log-likelihood, because that of the summaries is not one of rows; the parts of the ELBO are those of the summaries.

    Args:
        pipeline: the model.
        held_out: rows [M, D], raw units, NaN where a value is missing.
        centre: mean of the fit rows [D], raw units.
        baseline_pca: PCA with the same number of latents, in the model units of `pipeline`, or None.
        seed: seed of the posterior samples.
        row_scaling: converts rows from raw units to the units in which they are summarised; None without a window.
        inputs: the held-out rows with their conditions, [M, D + C], if the model is conditional.
    """
    inputs = held_out if inputs is None else inputs
    with torch.inference_mode():
        x_hat = torch.cat([pipeline(rows) for rows in inputs.split(BATCH)])
        metrics = {
            "reconstruction_error": _row_error(held_out, x_hat, row_scaling),
            "baseline_error": _row_error(held_out, centre, row_scaling),
        }
        if baseline_pca is not None:
            of_pca = pca_metrics(baseline_pca, pipeline.scaling, held_out, row_scaling)
            metrics["pca_error"] = of_pca["reconstruction_error"]
        u = pipeline.core_inputs(inputs)
        if row_scaling is None:
            return metrics | core_metrics(pipeline.core, pipeline.scaling, u, seed)
        return metrics | (vae_metrics(pipeline.core, u, seed) if isinstance(pipeline.core, VAE) else {})


def pca_metrics(pca: PCA, scaling: Scaling, held_out: Tensor, row_scaling: Scaling | None = None) -> dict[str, float]:
    """Return the metrics of `pca` on rows held_out [M, D] in raw units. `scaling` maps them to the units of `pca`.

    For `row_scaling`, see `held_out_metrics`.
    """
    u = scaling(held_out)
    x_hat = torch.cat([scaling.inverse(pca.decode(pca.encode(rows)[0])) for rows in u.split(BATCH)])
    metrics = {"reconstruction_error": _row_error(held_out, x_hat, row_scaling)}
    return metrics if row_scaling else metrics | core_metrics(pca, scaling, u, seed=0)


def _row_error(x: Tensor, x_hat: Tensor, row_scaling: Scaling | None) -> float:
    """Return the `squared_error` of rows. If x [M, V] are summaries, it is that of the newest rows, in raw units."""
    if row_scaling is None:
        return squared_error(x, x_hat)
    width = len(row_scaling.shift)
    return squared_error(row_scaling.inverse(x[:, :width]), row_scaling.inverse(x_hat[..., :width]))


def squared_error(x: Tensor, x_hat: Tensor) -> float:
    """Return the mean of (x - x_hat)^2 over the values that are present in x, in float64.

    Args:
        x: [M, D], NaN where a value is missing.
        x_hat: [M, D], or [D] if it is the same for all rows.
    """
    total, count = 0.0, 0
    for rows, expected in zip(x.split(BATCH), x_hat.expand_as(x).split(BATCH), strict=True):
        present = ~rows.isnan()
        total += float((rows - expected)[present].double().square().sum())
        count += int(present.sum())
    return total / count


def core_metrics(core: Core, scaling: Scaling, u: Tensor, seed: int) -> dict[str, float]:
    """Return the metrics that only PCA and VAEs have, for rows u [M, D] in the model units of `scaling`."""
    metrics: dict[str, float] = {}
    if isinstance(core, PCA):
        by_row = torch.cat([core.log_likelihood(rows) for rows in u.split(BATCH)])
        metrics["log_likelihood"] = float(by_row.double().mean())
    elif isinstance(core, VAE):
        metrics |= vae_metrics(core, u, seed)
        bound = importance_weighted(core.log_weight, u[:BOUND_ROWS], count_latents(core, u))
        metrics |= {"log_likelihood": bound.mean, "log_likelihood_se": bound.standard_error}
    if metrics:
        metrics["bits_per_dimension"] = bits_per_dimension(
            metrics["log_likelihood"], density_scale(core, scaling), len(scaling.shift)
        )
    return metrics


def vae_metrics(vae: VAE, u: Tensor, seed: int) -> dict[str, float]:
    """Return `elbo`, `reconstruction` and `kl` in nats per row, and `active_latents`, for rows u [N, D]."""
    random = torch.Generator().manual_seed(seed)
    totals = dict.fromkeys(("elbo", "reconstruction", "kl"), 0.0)
    for rows in u.split(BATCH):
        for _ in range(SAMPLES):
            noise = torch.randn(len(rows), count_latents(vae, rows), generator=random).to(u)
            terms = elbo_terms(*for_losses(vae, rows), noise)
            for name in totals:
                totals[name] += float(terms[name]) * len(rows) / (SAMPLES * len(u))
    return totals | {"active_latents": float(count_active_latents(vae, u))}


def importance_weighted(
    log_weight: LogWeight, rows: Tensor, latents: int, samples: int = BOUND_SAMPLES, seed: int = 0
) -> Bound:
    """Return the importance-weighted lower bound on log p(x): Burda, Grosse & Salakhutdinov 2016, eq. 8.

    The weights are summed one sample at a time, so memory does not grow with `samples`. If the posterior is exact, the
    bound equals log p(x).

    Args:
        log_weight: a function that returns the log weight of one sample per row.
        rows: [N, D], in the units that `log_weight` takes.
        latents: number of latents K.
        samples: importance samples per row.
    """
    random, bounds, elbo = random_stream(seed, VALIDATION), [], 0.0
    with torch.inference_mode():
        for part in rows.split(BOUND_BATCH):
            log_sum = torch.full((len(part),), -math.inf, dtype=torch.float64)  # [B]
            for _ in range(samples):
                noise = torch.randn(len(part), latents, generator=random).to(part)
                weight = log_weight(part, noise).double().cpu()  # [B]
                log_sum = torch.logaddexp(log_sum, weight)
                elbo += float(weight.sum()) / (samples * len(rows))
            bounds.append(log_sum - math.log(samples))
    bound = torch.cat(bounds)
    error = float(bound.std()) / math.sqrt(len(bound)) if len(bound) > 1 else 0.0
    return Bound(float(bound.mean()), error, elbo, bound)


def bits_per_dimension(log_likelihood: float, log_scale: float, features: int) -> float:
    """Return the code length in bits per value, for values rounded to one raw unit.

    Theis et al. 2016, "A note on the evaluation of generative models", section 3.1.

    Args:
        log_likelihood: nats per row, for the density in model units.
        log_scale: the result of `density_scale`.
        features: number of features D.
    """
    return (log_scale - log_likelihood) / (features * math.log(2.0))


def density_scale(core: Core, scaling: Scaling) -> float:
    """Return log p(x) in model units minus log p(x) in raw units: the sum of ln(scale), in nats.

    The result is 0 for a Bernoulli likelihood, which is a probability and not a density.
    """
    if isinstance(core, VAE) and isinstance(core.likelihood, BernoulliLikelihood):
        return 0.0
    return float(scaling.scale.double().log().sum())


def count_latents(core: Core, u: Tensor) -> int:
    """Return the number of latents K that `core` gives for rows u [N, D]."""
    return core.encode(u[:1])[0].shape[1]
