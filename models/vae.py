"""The variational autoencoder of Kingma & Welling, "Auto-encoding variational Bayes", ICLR 2014."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.core import Core
from models.likelihood import Likelihood

LOG_VARIANCE_RANGE = (-14.0, 8.0)  # of the posterior; wide enough for any live latent, and exp() stays finite


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL( N(mean, exp(log_variance)) || N(0, 1) ) for each latent, in nats: [B, K] to [B, K].

    Kingma & Welling 2014, appendix B.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)


class VAE(Core):
    """Posterior N(mean, std^2), prior N(0, I), likelihood Gaussian or Bernoulli.

    Its score is the negative ELBO with the expectation taken at the posterior mean: NLL + KL, in nats. No noise enters,
    so the same row always has the same score.

    Args:
        encoder: [B, D] to [B, 2 K], means then log-variances.
        decoder: [B, K] to [B, D], the likelihood's parameter.
        likelihood: p(x | z), a module of `models.likelihood`.
    """

    parts = ("kl", "nll")

    def __init__(self, encoder: nn.Module, decoder: nn.Module, likelihood: Likelihood) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood: Likelihood = likelihood
        self.low, self.high = LOG_VARIANCE_RANGE

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """q(z | x): mean and log-variance, [B, D] to two of [B, K]."""
        code = self.encoder(x)  # [B, 2 K]
        mean, log_variance = code.split(int(code.shape[1]) // 2, dim=1)  # one node of the twin's graph; chunk is ten
        return mean, functional.hardtanh(log_variance, self.low, self.high)  # clamp, with one step of gradient for five

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation, [B, D] to two of [B, K]."""
        mean, log_variance = self.posterior(x)
        return mean, torch.exp(0.5 * log_variance)

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z], [B, K] to [B, D]."""
        return self.likelihood.mean(self.decoder(z))

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """NLL + KL [B] of x [B, D], the parts KL and NLL [B, 2], and the reconstruction [B, D]."""
        mean, log_variance = self.posterior(x)  # [B, K], [B, K]
        output = self.decoder(mean)  # [B, D]
        kl = gaussian_kl(mean, log_variance).sum(dim=1)  # [B]
        nll = -self.likelihood.log_prob(x, output)  # [B]
        return kl + nll, torch.stack((kl, nll), dim=1), self.likelihood.mean(output)

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:
        """log p(x, z) - log q(z|x) [B] of x [B, D] at z = mean + std * noise, noise [B, K]."""
        mean, log_variance = self.posterior(x)  # [B, K], [B, K]
        z = mean + torch.exp(0.5 * log_variance) * noise  # [B, K]
        log_likelihood: Tensor = self.likelihood.log_prob(x, self.decoder(z))  # [B]
        return log_likelihood + 0.5 * (noise.square() + log_variance - z.square()).sum(dim=1)
