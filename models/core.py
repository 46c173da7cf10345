"""The interface that all kinds of models implement. Rows are in model units (see `models.scaling`)."""

from torch import Tensor, nn


class Core(nn.Module):
    """A model that encodes, decodes and scores rows. In shapes: B rows, D features, K latents, P parts of the score."""

    parts: tuple[str, ...] = ()  # names of the parts of the score

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior mean [B, K] and standard deviation [B, K] of x [B, D]."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """Return E[x | z] [B, D] for z [B, K]."""
        raise NotImplementedError

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three arrays for x [B, D]: the anomaly score [B], its parts [B, P], and the reconstruction [B, D].

        The sum of the parts is the score. A row with a higher score is more anomalous.
        """
        raise NotImplementedError

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return log p(x, z) - log q(z|x) in nats, [B], for x [B, D] and standard normal noise [B, K].

        Here z = mean + std * noise, with the mean and the standard deviation from `encode`. The mean of the result over
        the noise is the ELBO. The log-mean-exp of the result over S samples of the noise is the importance-weighted
        bound (Burda, Grosse & Salakhutdinov 2016, "Importance weighted autoencoders", eq. 8). The result is NaN for
        models without a density.
        """
        raise NotImplementedError
