"""The likelihoods p(x | z): log-densities of a row given the decoder's output, in nats, summed over features."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

# Range of the log-variance. The lower end, a variance of about 1e-6, bounds the density of a constant column.
LOG_VARIANCE_RANGE = (-14.0, 14.0)
# For v above this limit, softplus(v) equals v in float64. With torch's default limit of 20, the error is 2e-9.
EXACT_BEYOND = 40.0


class Likelihood(nn.Module):
    """The density of a row given the decoder's output."""

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Return log p(x | z) [B] for x [B, D] and the decoder's output [B, D]."""
        raise NotImplementedError

    def mean(self, output: Tensor) -> Tensor:
        """Return E[x | z] [B, D] for the decoder's output [B, D]."""
        raise NotImplementedError


class GaussianLikelihood(Likelihood):
    """N(x; output, variance). The variance is learned or fixed, and it is either shared or separate for each feature.

    A fixed variance sets the weight of the reconstruction relative to the KL term. In a linear VAE, a latent is active
    if the eigenvalue of the data covariance along its direction exceeds beta times the variance (Lucas et al. 2019,
    "Don't blame the ELBO!"). If the variance is too large, all latents collapse.

    Args:
        variance: initial or fixed variance, [1] (shared) or [D] (per feature).
        learn: whether the variance is learned.
        lowest: lower bound of the log-variance.
    """

    def __init__(self, variance: Tensor, learn: bool = True, lowest: float = LOG_VARIANCE_RANGE[0]) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(variance.log(), requires_grad=learn)
        self.low, self.high = lowest, LOG_VARIANCE_RANGE[1]

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Return log N(x; output, variance) [B] for x and output [B, D]."""
        log_variance = self.log_variance.clamp(self.low, self.high)  # [1] or [D]
        squared = (x - output).square() * torch.exp(-log_variance)  # [B, D]
        return -0.5 * (squared + log_variance + math.log(2.0 * math.pi)).sum(dim=1)  # [B]

    def mean(self, output: Tensor) -> Tensor:
        """Return E[x | z] [B, D], which is the output itself."""
        return output


class OptimalGaussianLikelihood(GaussianLikelihood):
    """N(x; output, variance). In training, the variance is its maximum-likelihood value for the batch.

    This value is the mean squared error of the batch (Rybkin, Daniilidis & Levine 2021, "Simple and effective VAE
    training with calibrated decoders", eq. 6). In evaluation mode, the variance keeps the value of the last training
    batch. At the end of training, `set_variance` sets the variance from all rows.

    Args:
        variance: the variance before the first batch, [1].
    """

    def __init__(self, variance: Tensor) -> None:
        super().__init__(variance, learn=False)

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Return log N(x; output, variance) [B] for x and output [B, D]."""
        squared = (x - output).square()  # [B, D]
        best = squared.mean().log() if self.training else self.log_variance.squeeze(0)
        best = best.clamp(self.low, self.high)
        if self.training:
            self.log_variance.copy_(best.detach().reshape(1))
        return -0.5 * (squared * torch.exp(-best) + best + math.log(2.0 * math.pi)).sum(dim=1)  # [B]

    def set_variance(self, mean_squared_error: Tensor) -> None:
        """Set the variance to `mean_squared_error`, a scalar.

        The mean squared error of all rows is the variance that maximises their likelihood.
        """
        self.log_variance.copy_(mean_squared_error.log().clamp(self.low, self.high).reshape(1))


class BernoulliLikelihood(Likelihood):
    """Bernoulli(x; sigmoid(output)) for x in [0, 1]; a grey value is the probability of white.

    The Bernoulli probability is undefined outside [0, 1]. A value outside this range lowers the log-probability by
    half of its squared distance from the range, as a Gaussian with variance 1 would. The row therefore gets a high
    anomaly score.
    """

    def __init__(self) -> None:
        super().__init__()
        self.exact_beyond = EXACT_BEYOND

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """Return log p(x | z) [B] for x [B, D] and the decoder's output [B, D], which consists of logits."""
        inside = x.clamp(0.0, 1.0)  # [B, D]
        softplus = functional.softplus(-output, 1.0, self.exact_beyond)  # [B, D]
        cross_entropy = (1.0 - inside) * output + softplus  # [B, D], exact for any logit
        return -(cross_entropy + 0.5 * (x - inside).square()).sum(dim=1)  # [B]

    def mean(self, output: Tensor) -> Tensor:
        """Return E[x | z] [B, D], the grey values, for the decoder's output [B, D], which consists of logits."""
        return torch.sigmoid(output)
