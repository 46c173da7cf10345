"""The losses that training minimises, each as a dictionary of its terms.

Every loss takes rows [B, D] in model units. Its terms are scalars: sums over features, averaged over rows. Training
minimises the term "loss". Noise is an argument, so equal arguments always give equal losses.
"""

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from models.autoencoder import Autoencoder
from models.conditional import ConditionalAutoencoder, ConditionalVAE
from models.levels import LevelSoftmax
from models.likelihood import BernoulliLikelihood, Likelihood
from models.vae import VAE, gaussian_kl

LossTerms = dict[str, Tensor]  # scalars by name: "loss" and the terms that it consists of


class LossVAE(Protocol):
    """The part of a VAE that the losses use."""

    @property
    def likelihood(self) -> Likelihood:
        """Return p(x | z)."""

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean [B, K] and log-variance [B, K] of q(z | x) for x [B, D]."""

    def decoder(self, z: Tensor) -> Tensor:
        """Return the parameter of the likelihood [B, D] for latents z [B, K]."""


class VAEGivenConditions:
    """A conditional VAE with the conditions of one batch of rows. Its methods take rows and latents without conditions.

    In shapes, L is the number of latents, and C the number of levels of all columns of conditions together.

    Args:
        vae: the VAE.
        condition: one-hot, [B, C].
    """

    def __init__(self, vae: ConditionalVAE, condition: Tensor) -> None:
        self._vae, self._condition, self.likelihood = vae, condition, vae.likelihood

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean [B, L] and log-variance [B, L] of q(z | x, c) for x [B, D]."""
        return self._vae.posterior(torch.cat((x, self._condition), dim=1))

    def decoder(self, z: Tensor) -> Tensor:
        """Return the parameter of the likelihood [S * B, D] for z [S * B, L]: S times one latent sample of each row."""
        condition = self._condition.repeat(len(z) // len(self._condition), 1)  # [S * B, C]
        output: Tensor = self._vae.decoder(torch.cat((z, condition), dim=1))
        return output


def for_losses(vae: VAE, x: Tensor) -> tuple[LossVAE, Tensor]:
    """Return a VAE and rows [B, D] as the losses take them.

    Args:
        x: rows [B, D]; for a conditional VAE, rows with their conditions, [B, D + C].
    """
    if isinstance(vae, ConditionalVAE):
        return VAEGivenConditions(vae, x[:, vae.width :]), x[:, : vae.width]
    return vae, x


def elbo_terms(vae: LossVAE, x: Tensor, noise: Tensor, beta: float = 1.0, free_bits: float = 0.0) -> LossTerms:
    """Return the negative ELBO in nats, with the KL weighted by beta and one posterior sample per row.

    The term `reconstruction` is E_q[log p(x|z)]. The term `elbo` is `reconstruction` minus `kl`, for any beta. See
    Kingma & Welling 2014, eq. 7 and 10, and for beta Higgins et al. 2017, eq. 4.

    Args:
        noise: standard normal [B, K], for the reparameterisation z = mean + std * noise.
        free_bits: nats of KL per latent that are not penalised (Kingma et al. 2016, "Improved variational inference
            with inverse autoregressive flow", eq. 15).
    """
    mean, log_variance = vae.posterior(x)  # [B, K], [B, K]
    z = mean + (0.5 * log_variance).exp() * noise  # [B, K]
    reconstruction = log_likelihood(vae.likelihood, x, vae.decoder(z)).mean()
    kl_per_latent = gaussian_kl(mean, log_variance).mean(dim=0)  # [K]
    kl = kl_per_latent.sum()
    charged = kl_per_latent.clamp(min=free_bits).sum() if free_bits else kl
    loss = beta * charged - reconstruction
    return {"loss": loss, "reconstruction": reconstruction, "kl": kl, "elbo": reconstruction - kl}


def log_weights(vae: LossVAE, x: Tensor, noise: Tensor) -> Tensor:
    """Return log p(x, z) - log q(z|x) in nats, [S, B], for S samples per row, drawn with noise [S, B, K]."""
    mean, log_variance = vae.posterior(x)  # [B, K], [B, K]
    z = mean + (0.5 * log_variance).exp() * noise  # [S, B, K]
    return _log_weights(vae, x, z, mean, log_variance)


def importance_weighted_terms(vae: LossVAE, x: Tensor, noise: Tensor) -> LossTerms:
    """Return minus the importance-weighted bound in nats. With S > 1 samples, the bound is tighter than the ELBO.

    The bound is that of Burda, Grosse & Salakhutdinov 2016, "Importance weighted autoencoders", eq. 8. The encoder gets
    the doubly reparameterised gradient of Tucker et al. 2019, "Doubly reparameterized gradient estimators for Monte
    Carlo objectives", eq. 8. This gradient has the same expectation as the usual gradient of the bound. The
    variance of the gradient falls as S grows, and is zero if the posterior is exact. With S = 1, the gradient is that
    of Roeder, Wu & Duvenaud 2017, "Sticking the landing".

    Args:
        noise: standard normal [S, B, K].
    """
    mean, log_variance = vae.posterior(x)  # [B, K], [B, K]
    z = mean + (0.5 * log_variance).exp() * noise  # [S, B, K]
    weights = _log_weights(vae, x, z, mean.detach(), log_variance.detach())  # [S, B]
    shares = weights.detach().softmax(dim=0).unsqueeze(2)  # [S, B, 1]
    # Differentiating the bound multiplies the gradient of each sample by the sample's share of the weights. Eq. 8
    # needs the square of that share, so the hook multiplies by the share once more.
    if z.requires_grad:
        z.register_hook(lambda gradient: gradient * shares)
    bound = (weights.logsumexp(dim=0) - math.log(len(noise))).mean()
    return {"loss": -bound, "bound": bound, "elbo": weights.mean()}


def _log_weights(vae: LossVAE, x: Tensor, z: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return log p(x, z) - log q(z), [S, B], for samples z [S, B, K] from q.

    q is the Gaussian with `mean` [B, K] and `log_variance` [B, K].
    """
    output = vae.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])  # [S, B, D]
    squares = (z - mean).square() * (-log_variance).exp() + log_variance  # [S, B, K]: -2 log q, up to a constant
    return log_likelihood(vae.likelihood, x, output) + 0.5 * (squares - z.square()).sum(dim=2)  # [S, B]


def log_likelihood(likelihood: Likelihood, x: Tensor, output: Tensor) -> Tensor:
    """Return log p(x | z) in nats, [..., B], for rows x [B, D] and the decoder's `output` [..., B, D]."""
    if isinstance(likelihood, BernoulliLikelihood):
        # The result equals `likelihood.log_prob`, but the backward pass is a single operation.
        low, high = x.aminmax()
        inside = x if low >= 0.0 and high <= 1.0 else x.clamp(0.0, 1.0)  # [B, D]
        entropy = binary_cross_entropy_with_logits(output, inside.expand(output.shape), reduction="none")
        density = -entropy.sum(dim=-1)  # [..., B]
        return density if inside is x else density - 0.5 * (x - inside).square().sum(dim=1)
    rows = x.expand(output.shape)  # [..., B, D]
    return likelihood.log_prob(rows.flatten(0, -2), output.flatten(0, -2)).reshape(output.shape[:-1])


def squared_error_terms(autoencoder: Autoencoder, x: Tensor, corrupted: Tensor | None = None) -> LossTerms:
    """Return the squared reconstruction error, summed over features and averaged over rows.

    Given `corrupted` [B, D], this is the loss of a denoising autoencoder, which reconstructs x from `corrupted`:
    Vincent et al. 2010, "Stacked denoising autoencoders", section 3. For a conditional autoencoder, both arguments have
    the condition in their last columns: [B, D + C]. For a table with categories, see `LevelSoftmax.loss`.
    """
    inputs = x if corrupted is None else corrupted
    code = autoencoder.encoder(inputs)  # [B, K]
    if isinstance(autoencoder, ConditionalAutoencoder):
        code = torch.cat((code, inputs[:, autoencoder.width :]), dim=1)  # [B, L + C]
        x = x[:, : autoencoder.width]  # [B, D]
    x_hat = autoencoder.decoder(code)  # [B, D]
    last = autoencoder.decoder[-1] if isinstance(autoencoder.decoder, nn.Sequential) else None
    error = (last.loss(x, x_hat) if isinstance(last, LevelSoftmax) else (x - x_hat).square().sum(dim=1)).mean()
    return {"loss": error, "squared_error": error}


def weight_penalty(model: nn.Module) -> Tensor:
    """Return the sum of the squares of all parameters of two or more dimensions, so without biases."""
    squares = [parameter.square().sum() for parameter in model.parameters() if parameter.dim() > 1]
    return torch.stack(squares).sum()


def corrupt(x: Tensor, noise_range: tuple[float, float], masking: float, random: torch.Generator) -> Tensor:
    """Return x [B, D] with Gaussian noise added and some values set to 0.

    Args:
        noise_range: smallest and largest standard deviation, in model units. The standard deviation of each row is
            drawn log-uniformly between the two, or uniformly if the smallest is 0. (0, 0) adds no noise.
        masking: probability that a value is set to 0.
        random: a CPU generator.
    """
    low, high = noise_range
    if high > 0:
        share = torch.rand(len(x), 1, generator=random)  # [B, 1]
        deviation = torch.exp(math.log(low) + share * (math.log(high) - math.log(low))) if low > 0 else high * share
        x = x + (deviation * torch.randn(x.shape, generator=random)).to(x)
    if masking > 0:
        x = x * (torch.rand(x.shape, generator=random) >= masking).to(x)
    return x


def binarise(x: Tensor, random: torch.Generator) -> Tensor:
    """Return a binary sample of x [B, D]: each value v becomes 1 with probability v, else 0.

    Args:
        random: a CPU generator.
    """
    return (torch.rand(x.shape, generator=random).to(x) < x).to(x)
