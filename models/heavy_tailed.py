"""The models of windows, whose score is a sum of log(1 + q) instead of a sum of squares q.

Each coordinate of the score, in units of its spread over normal rows, has the square q. A sum of squares is, up to
constants, the negative log-likelihood of independent Gaussian coordinates. A sum of log(1 + q) is that of independent
Cauchy coordinates (Student's t with one degree of freedom). Measurements have heavy tails. With the Gaussian score, an
ordinary spike of one feature outranks an incident that moves many features. The Cauchy score rises with the number of
unusual coordinates rather than with the size of the largest one. A window has many coordinates that agree about an
incident, but not about a spike, so the difference matters most there. Models without a window keep their scores.
"""

import torch
from torch import Tensor, nn

from models.autoencoder import Autoencoder
from models.core import Core
from models.likelihood import Likelihood
from models.pca import PCA
from models.vae import VAE, gaussian_kl
from models.whitening import Whitening


class HeavyTailedPCA(PCA):
    """PCA with a Cauchy score over all D principal axes.

    Args:
        mean, components, eigenvalues, noise_variance: see `PCA`.
        axes: projects rows on the D principal axes, in units of their standard deviations; the first K are the latents.
            The axes that are left out of the latents share the standard deviation of the noise.
    """

    def __init__(
        self, mean: Tensor, components: Tensor, eigenvalues: Tensor, noise_variance: Tensor, axes: Whitening
    ) -> None:
        super().__init__(mean, components, eigenvalues, noise_variance)
        self.axes = axes

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three arrays for x [B, D]: the score [B], its two parts [B, 2], and the projection of x [B, D]."""
        surprise = self.axes(x).square().log1p()  # [B, D]
        latents = self.eigenvalues.shape[0]
        t2, q = surprise[:, :latents].sum(dim=1), surprise[:, latents:].sum(dim=1)  # [B], [B]
        return t2 + q, torch.stack((t2, q), dim=1), self.decode(self.encode(x)[0])


class HeavyTailedAutoencoder(Autoencoder):
    """An autoencoder with a Cauchy score over the coordinates of the whitened vector (latents, residual)."""

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three arrays for x [B, D]: the score [B], its parts T2 and Q [B, 2], and the reconstruction [B, D]."""
        code: Tensor = self.encoder(x)  # [B, K]
        x_hat: Tensor = self.decoder(code)  # [B, D]
        surprise = self.whitening(torch.cat((code, x - x_hat), dim=1)).square().log1p()  # [B, K + D]
        t2, q = surprise[:, : self.latents].sum(dim=1), surprise[:, self.latents :].sum(dim=1)  # [B], [B]
        return t2 + q, torch.stack((t2, q), dim=1), x_hat


class HeavyTailedVAE(VAE):
    """A VAE with a Cauchy score over the KL of each latent and the squared residual of each feature.

    Args:
        encoder, decoder, likelihood: see `VAE`.
        usual: the mean of the KL of each latent, and of the squared residual of each feature, over rows on which the
            networks were not trained, positive, [K + D].
    """

    parts = ("kl", "residual")
    usual: Tensor

    def __init__(self, encoder: nn.Module, decoder: nn.Module, likelihood: Likelihood, usual: Tensor) -> None:
        super().__init__(encoder, decoder, likelihood)
        self.register_buffer("usual", usual)

    def terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the KL of each latent and the squared residuals [B, K + D] of x [B, D], and the reconstruction."""
        mean, log_variance = self.posterior(x)  # [B, K], [B, K]
        x_hat = self.decode(mean)  # [B, D]
        return torch.cat((gaussian_kl(mean, log_variance), (x - x_hat).square()), dim=1), x_hat

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three arrays for x [B, D]: the score [B], its two parts [B, 2], and the reconstruction [B, D]."""
        terms, x_hat = self.terms(x)  # [B, K + D], [B, D]
        surprise = (terms / self.usual).clamp(min=0.0).log1p()  # rounding can make a KL negative
        latents = self.usual.shape[0] - x.shape[1]
        kl, residual = surprise[:, :latents].sum(dim=1), surprise[:, latents:].sum(dim=1)  # [B], [B]
        return kl + residual, torch.stack((kl, residual), dim=1), x_hat


class HeavyTailedEnsemble(Core):
    """An autoencoder and PCA. Encoding, decoding and reconstruction use only the autoencoder.

    The score is the sum of the two scores, each minus its mean over normal rows and divided by its standard deviation.

    Args:
        network: the autoencoder.
        pca: the PCA.
        centre: the mean of each score over rows on which the autoencoder was not trained, [2].
        spread: the standard deviation of each score over these rows, positive, [2].
    """

    parts = ("network", "pca")
    centre: Tensor
    spread: Tensor

    def __init__(self, network: HeavyTailedAutoencoder, pca: HeavyTailedPCA, centre: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.network = network
        self.pca = pca
        self.register_buffer("centre", centre)
        self.register_buffer("spread", spread)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the autoencoder's latents [B, K] of x [B, D], and their standard deviations [B, K], which are zero."""
        return self.network.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        """Return the autoencoder's x_hat [B, D] for latents z [B, K]."""
        return self.network.decode(z)

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three arrays for x [B, D]: the score [B], its parts [B, 2], and the reconstruction [B, D]."""
        by_network, _, x_hat = self.network.score(x)
        scores = torch.stack((by_network, self.pca.score(x)[0]), dim=1)  # [B, 2]
        parts = (scores - self.centre) / self.spread  # [B, 2]
        return parts.sum(dim=1), parts, x_hat

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:  # noqa: ARG002 - the signature of Core
        """Return NaN [B]: the ensemble has no density."""
        return torch.full_like(x[:, 0], torch.nan)
