"""Fit the prior: the distribution from which the latents of new rows are sampled."""

import torch
from torch import Tensor

from models.autoencoder import Autoencoder
from models.core import Core
from models.ensemble import Ensemble
from models.heavy_tailed import HeavyTailedEnsemble
from models.pca import PCA
from models.prior import Prior, gaussian_prior
from models.vae import VAE

MAX_COMPONENTS = 10
ROWS_PER_COMPONENT = 50  # the mixture has at most one component per this many rows
MIXTURE_ROWS = 10_000  # the mixture is fitted to the latents of at most this many rows
BATCH = 4096  # rows per forward pass; limits the memory


def fit_prior(core: Core, u: Tensor, latents: int, seed: int) -> Prior:
    """Return the prior. Its samples decode to rows that resemble the fit rows u [N, D].

    PCA has the prior of probabilistic PCA, a VAE has N(0, I), and an autoencoder has a mixture fitted to its latents.
    """
    if isinstance(core, PCA):
        return gaussian_prior((core.eigenvalues - core.noise_variance).clamp(min=0.0).sqrt())
    if isinstance(core, VAE):
        return gaussian_prior(torch.ones(latents))
    if isinstance(core, Autoencoder | Ensemble | HeavyTailedEnsemble):
        return _fit_mixture(core, u, seed)
    raise NotImplementedError(f"no prior is defined for {type(core).__name__}")


def _fit_mixture(core: Core, u: Tensor, seed: int) -> Prior:
    from sklearn.mixture import GaussianMixture

    with torch.no_grad():
        latents = torch.cat([core.encode(rows)[0] for rows in u[:MIXTURE_ROWS].split(BATCH)]).double().numpy()
    components = min(MAX_COMPONENTS, max(1, len(latents) // ROWS_PER_COMPONENT))
    spread = float(latents.var(axis=0).mean())
    mixture = GaussianMixture(components, random_state=seed, reg_covar=1e-4 * spread + 1e-12, max_iter=300)
    mixture.fit(latents)
    parameters = mixture.weights_, mixture.means_, mixture.covariances_
    weights, means, covariances = (torch.from_numpy(value).float() for value in parameters)
    return Prior(weights, means, torch.linalg.cholesky(covariances))
