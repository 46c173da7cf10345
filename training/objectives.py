"""What training minimises: each loss with its terms apart, a mean over rows of sums over features.

Every function takes rows in model units [B, D] and gives the terms as scalars; "loss" is the one to descend. Noise is
an argument, so that the same noise gives the same loss, wherever it was drawn.
"""

import math

import torch
from torch import Tensor, nn

from models.autoencoder import Autoencoder
from models.vae import VAE, gaussian_kl

Terms = dict[str, Tensor]
LOG_TWO_PI = math.log(2.0 * math.pi)


def elbo_terms(vae: VAE, x: Tensor, noise: Tensor, beta: float = 1.0, free_bits: float = 0.0) -> Terms:
    """The negative ELBO in nats, KL weighted by beta, with one draw from the posterior a row.

    `reconstruction` is E_q[log p(x|z)], `elbo` = reconstruction - KL whatever beta is. Kingma & Welling 2014, eq. 7 and
    10 (beta: Higgins et al. 2017, eq. 4).

    Args:
        noise: standard normal [B, K], for the reparameterisation z = mean + std * noise.
        free_bits: nats of KL, a latent, that cost nothing: Kingma et al. 2016, "Improved variational inference with
            inverse autoregressive flow", eq. 15.
    """
    mean, log_variance = vae.posterior(x)  # [B, K], [B, K]
    z = mean + (0.5 * log_variance).exp() * noise  # [B, K]
    reconstruction = vae.likelihood.log_prob(x, vae.decoder(z)).mean()
    by_latent = gaussian_kl(mean, log_variance).mean(dim=0)  # [K]
    kl = by_latent.sum()
    charged = by_latent.clamp(min=free_bits).sum() if free_bits else kl
    loss = beta * charged - reconstruction
    return {"loss": loss, "reconstruction": reconstruction, "kl": kl, "elbo": reconstruction - kl}


def log_weights(vae: VAE, x: Tensor, noise: Tensor) -> Tensor:
    """log p(x, z) - log q(z|x) for S draws a row: noise [S, B, K] to [S, B], in nats."""
    mean, log_variance = vae.posterior(x)  # [B, K], [B, K]
    z = mean + (0.5 * log_variance).exp() * noise  # [S, B, K]
    rows = x.expand(len(noise), *x.shape).flatten(0, 1)  # [S B, D]
    log_likelihood = vae.likelihood.log_prob(rows, vae.decoder(z.flatten(0, 1))).reshape(noise.shape[:2])  # [S, B]
    log_prior_ratio = 0.5 * (noise.square() + log_variance - z.square()).sum(dim=2)  # [S, B]
    return log_likelihood + log_prior_ratio


def importance_weighted_terms(vae: VAE, x: Tensor, noise: Tensor) -> Terms:
    """The negative importance-weighted bound in nats, which S draws make tighter than the ELBO.

    Burda, Grosse & Salakhutdinov 2016, "Importance weighted autoencoders", eq. 8.

    Args:
        noise: standard normal [S, B, K].
    """
    weights = log_weights(vae, x, noise)  # [S, B]
    bound = (weights.logsumexp(dim=0) - math.log(len(noise))).mean()
    return {"loss": -bound, "bound": bound, "elbo": weights.mean()}


def squared_error_terms(autoencoder: Autoencoder, x: Tensor, corrupted: Tensor | None = None) -> Terms:
    """The squared error of the reconstruction, summed over features: the seed text's L(x, x_hat).

    Given `corrupted` [B, D], the denoising autoencoder's: x is reconstructed from that. Vincent et al. 2010, "Stacked
    denoising autoencoders", section 3.
    """
    x_hat = autoencoder.decoder(autoencoder.encoder(x if corrupted is None else corrupted))  # [B, D]
    error = (x - x_hat).square().sum(dim=1).mean()
    return {"loss": error, "squared_error": error}


def corrupt(x: Tensor, level: tuple[float, float], masking: float, random: torch.Generator) -> Tensor:
    """x [B, D] with Gaussian noise, its standard deviation drawn log-uniformly in `level` a row, and features set to 0.

    Args:
        level: lowest and highest standard deviation, in model units; (0, 0) adds none.
        masking: probability that a feature is hidden.
        random: on the CPU, so that a seed means the same everywhere.
    """
    low, high = level
    if high > 0:
        share = torch.rand(len(x), 1, generator=random)  # [B, 1]
        deviation = torch.exp(math.log(low) + share * (math.log(high) - math.log(low))) if low > 0 else high * share
        x = x + (deviation * torch.randn(x.shape, generator=random)).to(x)
    if masking > 0:
        x = x * (torch.rand(x.shape, generator=random) >= masking).to(x)
    return x


def weight_penalty(model: nn.Module) -> Tensor:
    """The sum of the squares of all weights, biases left out."""
    squares = [parameter.square().sum() for parameter in model.parameters() if parameter.dim() > 1]
    return torch.stack(squares).sum()
