"""The variational autoencoder of Kingma & Welling, "Auto-encoding variational Bayes", ICLR 2014."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.core import Core
from models.likelihood import Likelihood

LOG_VARIANCE_RANGE = (-14.0, 8.0)  # bounds of the posterior's log-variance, so that its exp() is finite


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL( N(mean, exp(log_variance)) || N(0, 1) ) per latent in nats, [B, K].

    Kingma & Welling 2014, appendix B.
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)


class VAE(Core):
    """A VAE with posterior N(mean, std^2), prior N(0, I), and a Gaussian or Bernoulli likelihood.

    The score is NLL + KL in nats. Unlike the negative ELBO, it uses the NLL at the posterior mean instead of the
    expected NLL. It therefore needs no noise and is deterministic.

    Args:
        encoder: maps [B, D] to [B, 2 K]: means, then log-variances.
        decoder: maps [B, K] to the likelihood's parameter, [B, D].
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
        """Return the mean [B, K] and log-variance [B, K] of q(z | x) for x [B, D]."""
        code = self.encoder(x)  # [B, 2 K]
        mean, log_variance = code.split(int(code.shape[1]) // 2, dim=1)  # one ONNX node; `chunk` would give ten
        # hardtanh equals clamp, but its backward pass takes one operation instead of five.
        return mean, functional.hardtanh(log_variance, self.low, self.high)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior mean [B, K] and standard deviation [B, K] of x [B, D]."""
        mean, log_variance = self.posterior(x)
        return mean, torch.exp(0.5 * log_variance)

    def decode(self, z: Tensor) -> Tensor:
        """Return E[x | z] [B, D] for z [B, K]."""
        return self.likelihood.mean(self.decoder(z))

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three arrays for x [B, D]: the score [B], its parts KL, NLL [B, 2], and the reconstruction [B, D]."""
        mean, log_variance = self.posterior(x)  # [B, K], [B, K]
        output = self.decoder(mean)  # [B, D]
        kl = gaussian_kl(mean, log_variance).sum(dim=1)  # [B]
        nll = -self.likelihood.log_prob(x, output)  # [B]
        return kl + nll, torch.stack((kl, nll), dim=1), self.likelihood.mean(output)

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return log p(x, z) - log q(z|x), [B], for x [B, D] and noise [B, K]. Here z = mean + std * noise."""
        mean, log_variance = self.posterior(x)  # [B, K], [B, K]
        z = mean + torch.exp(0.5 * log_variance) * noise  # [B, K]
        log_likelihood: Tensor = self.likelihood.log_prob(x, self.decoder(z))  # [B]
        return log_likelihood + 0.5 * (noise.square() + log_variance - z.square()).sum(dim=1)
