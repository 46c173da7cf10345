"""How good a model is on rows that it has not seen."""

import torch
from torch import Tensor

from models.core import Core
from models.pca import PCA
from models.pipeline import Pipeline
from models.vae import VAE
from training.data import Split
from training.objectives import elbo_terms

ACTIVE_VARIANCE = 0.01  # of the posterior mean, above which a latent is active: Burda et al. 2016, section 5.1
DRAWS = 16  # from the posterior, for the expectation in the ELBO
BATCH = 4096  # rows at a time: bounds memory


def held_out_metrics(pipeline: Pipeline, x: Tensor, rows: Split, seed: int) -> dict[str, float]:
    """Metrics of the held-out rows of the table x [N, D], raw units.

    `reconstruction_error` and `baseline_error` (of predicting the mean of the fitted rows) are mean squared errors a
    feature, in raw units squared. A VAE adds the terms of its ELBO and its active latents; PCA its log-likelihood (both
    nats a row, of the density in model units).
    """
    held_out = x[rows.held_out]
    with torch.inference_mode():
        x_hat = torch.cat([pipeline(part) for part in held_out.split(BATCH)])
        metrics = {
            "reconstruction_error": float((held_out - x_hat).double().square().mean()),
            "baseline_error": float((held_out - x[rows.fit].mean(dim=0)).double().square().mean()),
        }
        return metrics | core_metrics(pipeline.core, pipeline.scaling(held_out), seed)


def core_metrics(core: Core, u: Tensor, seed: int) -> dict[str, float]:
    """What only this kind of model can say of rows u [N, D] in model units."""
    if isinstance(core, PCA):
        return {"log_likelihood": float(core.log_likelihood(u).double().mean())}
    if isinstance(core, VAE):
        return vae_metrics(core, u, seed)
    return {}


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
    return totals | {"active_latents": float(active_latents(vae, u))}


def active_latents(vae: VAE, u: Tensor) -> int:
    """How many latents carry information about rows u [N, D]: the variance of their posterior mean exceeds 0.01."""
    with torch.no_grad():
        means = torch.cat([vae.posterior(rows)[0] for rows in u.split(BATCH)])  # [N, K]
    return int((means.var(dim=0, correction=0) > ACTIVE_VARIANCE).sum())


def latents(core: Core, u: Tensor) -> int:
    """K."""
    return core.encode(u[:1])[0].shape[1]
