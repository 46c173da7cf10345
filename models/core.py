"""What every kind of model offers to the pipeline around it, in model units."""

from torch import Tensor, nn


class Core(nn.Module):
    """Encode, decode, judge. B rows, D features, K latents, P parts."""

    parts: tuple[str, ...] = ()  # names of the score's parts

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of x [B, D]: two of [B, K]."""
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        """E[x | z], [B, K] to [B, D]."""
        raise NotImplementedError

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How strange x [B, D] is: score [B], its parts [B, P], which sum to it, and the reconstruction [B, D]."""
        raise NotImplementedError

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:
        """log p(x, z) - log q(z|x) in nats of x [B, D] at z = mean + std * noise, noise [B, K]: to [B].

        Under standard normal noise its mean is the ELBO, and the logarithm of the mean of its exponentials over S draws
        the importance-weighted bound (Burda, Grosse & Salakhutdinov 2016, "Importance weighted autoencoders", eq. 8).
        NaN where a model has no density.
        """
        raise NotImplementedError
