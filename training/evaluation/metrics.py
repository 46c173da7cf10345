"""How good a model is on rows that it has not seen."""

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
from training.fitting.losses import elbo_terms
from training.random_streams import VALIDATION, random_stream

DRAWS = 16  # from the posterior, for the expectation in the ELBO
BOUND_DRAWS, BOUND_ROWS = 100, 1_000  # of the importance-weighted bound
BATCH = 4096  # rows at a time: bounds memory
BOUND_BATCH = 256  # rows of the bound at a time

# Rows [B, D] and standard normal noise [B, K] to log p(x, z) - log q(z|x) [B], in nats.
LogWeight = Callable[[Tensor, Tensor], Tensor]


class Bound(NamedTuple):
    """The importance-weighted bound on log p(x) in nats, mean over rows, and its standard error over them."""

    mean: float
    standard_error: float
    elbo: float  # from the same draws, one at a time
    by_row: Tensor  # [N], of which `mean` is the mean


def held_out_metrics(
    pipeline: Pipeline, held_out: Tensor, centre: Tensor, rival: PCA | None, seed: int
) -> dict[str, float]:
    """Metrics of the rows held_out [M, D], raw units, NaN where a value is missing.

    `reconstruction_error`, `baseline_error` (of predicting `centre`) and `pca_error` (of the rival) are mean squared
    errors a value that is there, in raw units squared. A VAE adds its `elbo` = `reconstruction` - `kl` (the first is
    minus the distortion, the second the rate), its active latents, and `log_likelihood`, the importance-weighted bound,
    with its standard error over rows; PCA its exact log-likelihood; all in nats a row, of the density in model units.
    `bits_per_dimension` is the log-likelihood as a code length: see that function.

    Args:
        centre: mean of the fitted rows [D], raw units.
        rival: PCA with as many latents, in the model units of `pipeline`.
    """
    with torch.inference_mode():
        x_hat = torch.cat([pipeline(rows) for rows in held_out.split(BATCH)])
        metrics = {
            "reconstruction_error": squared_error(held_out, x_hat),
            "baseline_error": squared_error(held_out, centre),
        }
        if rival is not None:
            metrics["pca_error"] = rival_metrics(rival, pipeline.scaling, held_out)["reconstruction_error"]
        return metrics | core_metrics(pipeline.core, pipeline.scaling, pipeline.scaling(held_out), seed)


def rival_metrics(rival: PCA, scaling: Scaling, held_out: Tensor) -> dict[str, float]:
    """What PCA in the model units of `scaling` reaches on rows held_out [M, D], raw units."""
    u = scaling(held_out)
    x_hat = torch.cat([scaling.inverse(rival.decode(rival.encode(rows)[0])) for rows in u.split(BATCH)])
    return {"reconstruction_error": squared_error(held_out, x_hat)} | core_metrics(rival, scaling, u, seed=0)


def squared_error(x: Tensor, x_hat: Tensor) -> float:
    """The mean of (x - x_hat)^2 over the values of x [M, D] that are there, in float64; x_hat [M, D] or [D]."""
    total, count = 0.0, 0
    for rows, expected in zip(x.split(BATCH), x_hat.expand_as(x).split(BATCH), strict=True):
        there = ~rows.isnan()
        total += float((rows - expected)[there].double().square().sum())
        count += int(there.sum())
    return total / count


def core_metrics(core: Core, scaling: Scaling, u: Tensor, seed: int) -> dict[str, float]:
    """What only this kind of model can say of rows u [M, D] in the model units of `scaling`."""
    metrics: dict[str, float] = {}
    if isinstance(core, PCA):
        by_row = torch.cat([core.log_likelihood(rows) for rows in u.split(BATCH)])
        metrics["log_likelihood"] = float(by_row.double().mean())
    elif isinstance(core, VAE):
        metrics |= vae_metrics(core, u, seed)
        bound = importance_weighted(core.log_weight, u[:BOUND_ROWS], latents(core, u))
        metrics |= {"log_likelihood": bound.mean, "log_likelihood_se": bound.standard_error}
    if metrics:
        metrics["bits_per_dimension"] = bits_per_dimension(
            metrics["log_likelihood"], density_scale(core, scaling), u.shape[1]
        )
    return metrics


def vae_metrics(vae: VAE, u: Tensor, seed: int) -> dict[str, float]:
    """`elbo`, `reconstruction`, `kl` in nats a row, and `active_latents`, for rows u [N, D]."""
    random = torch.Generator().manual_seed(seed)
    totals = dict.fromkeys(("elbo", "reconstruction", "kl"), 0.0)
    for rows in u.split(BATCH):
        for _ in range(DRAWS):
            noise = torch.randn(len(rows), latents(vae, rows), generator=random).to(u)
            terms = elbo_terms(vae, rows, noise)
            for name in totals:
                totals[name] += float(terms[name]) * len(rows) / (DRAWS * len(u))
    return totals | {"active_latents": float(count_active_latents(vae, u))}


def importance_weighted(
    log_weight: LogWeight, rows: Tensor, latents: int, draws: int = BOUND_DRAWS, seed: int = 0
) -> Bound:
    """log p(x) from below by `draws` weighted draws a row: Burda, Grosse & Salakhutdinov 2016, eq. 8.

    The weights are summed as they come, so memory is that of one draw. Draws of the exact posterior give log p(x).

    Args:
        rows: [N, D], in the units that `log_weight` takes.
        latents: K.
    """
    random, bounds, elbo = random_stream(seed, VALIDATION), [], 0.0
    with torch.inference_mode():
        for part in rows.split(BOUND_BATCH):
            log_sum = torch.full((len(part),), -math.inf, dtype=torch.float64)  # [B]
            for _ in range(draws):
                noise = torch.randn(len(part), latents, generator=random).to(part)
                weight = log_weight(part, noise).double().cpu()  # [B]
                log_sum = torch.logaddexp(log_sum, weight)
                elbo += float(weight.sum()) / (draws * len(rows))
            bounds.append(log_sum - math.log(draws))
    bound = torch.cat(bounds)
    error = float(bound.std()) / math.sqrt(len(bound)) if len(bound) > 1 else 0.0
    return Bound(float(bound.mean()), error, elbo, bound)


def bits_per_dimension(log_likelihood: float, log_scale: float, features: int) -> float:
    """The code length of a value in bits, for values told apart to one raw unit: Theis et al. 2016, section 3.1.

    "A note on the evaluation of generative models". log_likelihood and log_scale in nats a row.
    """
    return (log_scale - log_likelihood) / (features * math.log(2.0))


def density_scale(core: Core, scaling: Scaling) -> float:
    """What to subtract from a log density in model units for that in raw units: the sum of ln(scale), in nats.

    0 for Bernoulli, whose likelihood is a probability and no density.
    """
    if isinstance(core, VAE) and isinstance(core.likelihood, BernoulliLikelihood):
        return 0.0
    return float(scaling.scale.double().log().sum())


def latents(core: Core, u: Tensor) -> int:
    """K."""
    return core.encode(u[:1])[0].shape[1]
