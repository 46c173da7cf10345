"""Find the latents of a fitted model that carry information."""

import torch
from torch import Tensor

from models.core import Core
from models.manifest import Latent
from models.vae import VAE, gaussian_kl

# A latent of a VAE is active if the variance of its posterior mean exceeds this: Burda et al. 2016, section 5.1.
ACTIVE_VARIANCE = 0.01
# A latent of any other model is active if its variance exceeds this share of the largest variance of a latent.
ACTIVE_SHARE = 1e-6
BATCH = 4096  # rows per forward pass; limits the memory


def describe_latents(core: Core, u: Tensor) -> list[Latent]:
    """Return each latent's variance over rows u [N, D] in model units, its KL, and whether it is active.

    The KL is None unless the model is a VAE.
    """
    with torch.inference_mode():
        encoded = [core.encode(rows) for rows in u.split(BATCH)]
        mean = torch.cat([mean for mean, _ in encoded]).double()  # [N, K]
        std = torch.cat([std for _, std in encoded]).double()  # [N, K]
    variance = mean.var(dim=0, correction=0)  # [K]
    if not isinstance(core, VAE):
        threshold = ACTIVE_SHARE * float(variance.max())
        return [Latent(kl=None, variance=value, active=value > threshold) for value in variance.tolist()]
    kl = gaussian_kl(mean, 2.0 * std.log()).mean(dim=0)  # [K]
    pairs = zip(kl.tolist(), variance.tolist(), strict=True)
    return [Latent(kl=nats, variance=value, active=value > ACTIVE_VARIANCE) for nats, value in pairs]


def count_active_latents(vae: VAE, u: Tensor) -> int:
    """Return the number of latents whose posterior mean has a variance above 0.01 over rows u [N, D]."""
    return sum(latent.active for latent in describe_latents(vae, u))
