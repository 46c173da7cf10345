"""Which latents of a fitted model carry information."""

import torch
from torch import Tensor

from models.core import Core
from models.manifest import Latent
from models.vae import VAE, gaussian_kl

ACTIVE_VARIANCE = 0.01  # variance of the posterior mean above which a VAE's latent is active: Burda et al. 2016, 5.1
MOVING = 1e-6  # share of the largest variance above which another model's latent counts as active
BATCH = 4096  # rows encoded at a time: bounds memory


def describe_latents(core: Core, u: Tensor) -> list[Latent]:
    """What each latent carries about rows u [N, D] in model units.

    A VAE's is active where the variance of its posterior mean exceeds 0.01; a code without a prior, where it moves.
    """
    with torch.inference_mode():
        parts = [core.encode(rows) for rows in u.split(BATCH)]
        mean = torch.cat([mean for mean, _ in parts]).double()  # [N, K]
        std = torch.cat([std for _, std in parts]).double()  # [N, K]
    variance = mean.var(dim=0, correction=0)  # [K]
    if not isinstance(core, VAE):
        threshold = MOVING * float(variance.max())
        return [Latent(kl=None, variance=value, active=value > threshold) for value in variance.tolist()]
    kl = gaussian_kl(mean, 2.0 * std.log()).mean(dim=0)  # [K]
    pairs = zip(kl.tolist(), variance.tolist(), strict=True)
    return [Latent(kl=nats, variance=value, active=value > ACTIVE_VARIANCE) for nats, value in pairs]


def count_active_latents(vae: VAE, u: Tensor) -> int:
    """How many latents carry information about rows u [N, D]: the variance of their posterior mean exceeds 0.01."""
    return sum(latent.active for latent in describe_latents(vae, u))
