"""What training minimises: each loss with its terms apart, a mean over rows of sums over features.

Every function takes rows in model units [B, D] and gives the terms as scalars; "loss" is the one to descend.
"""

from torch import Tensor

from models.autoencoder import Autoencoder
from models.vae import VAE, gaussian_kl

Terms = dict[str, Tensor]


def elbo_terms(vae: VAE, x: Tensor, noise: Tensor, beta: float = 1.0) -> Terms:
    """The negative ELBO in nats, KL weighted by beta, with one draw from the posterior a row.

    `reconstruction` is E_q[log p(x|z)], `elbo` = reconstruction - KL whatever beta is. Kingma & Welling 2014, eq. 7 and
    10 (beta: Higgins et al. 2017, eq. 4).

    Args:
        noise: standard normal [B, K], for the reparameterisation z = mean + std * noise.
    """
    mean, log_variance = vae.posterior(x)  # [B, K], [B, K]
    z = mean + (0.5 * log_variance).exp() * noise  # [B, K]
    reconstruction = vae.likelihood.log_prob(x, vae.decoder(z)).mean()
    kl = gaussian_kl(mean, log_variance).sum(dim=1).mean()
    return {"loss": beta * kl - reconstruction, "reconstruction": reconstruction, "kl": kl, "elbo": reconstruction - kl}


def squared_error_terms(autoencoder: Autoencoder, x: Tensor) -> Terms:
    """The squared error of the reconstruction, summed over features: the seed text's L(x, x_hat)."""
    x_hat = autoencoder.decoder(autoencoder.encoder(x))  # [B, D]
    error = (x - x_hat).square().sum(dim=1).mean()
    return {"loss": error, "squared_error": error}
