"""p(x | z): what a decoder's output says about a row. One log-probability a row, in nats, summed over features."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

LOG_VARIANCE_RANGE = (-14.0, 14.0)  # exp(-14) is a millionth: a constant column must not make the density explode
EXACT_BEYOND = 40.0  # log(1 + exp(v)) is v in float64 from here on; torch by itself takes it for v from 20 on, 2e-9 off


class Likelihood(nn.Module):
    """The density of a row given the decoder's output."""

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """log p(x | z) for x and the decoder's output, both [B, D], to [B]."""
        raise NotImplementedError

    def mean(self, output: Tensor) -> Tensor:
        """E[x | z] for the decoder's output, [B, D] to [B, D]."""
        raise NotImplementedError


class GaussianLikelihood(Likelihood):
    """N(x; output, variance), the variance learnt with the network or fixed, for all features or for each.

    A fixed variance sets the weight of reconstruction against KL: a latent lives where its eigenvalue exceeds beta
    times the variance (Lucas et al. 2019, "Don't blame the ELBO!"). Set too high, every latent dies.

    Args:
        variance: [1], or [D] for a variance a feature: where learning starts, or what stays.
        learn: whether it is learnt.
        lowest: the logarithm of the smallest variance that counts.
    """

    def __init__(self, variance: Tensor, learn: bool = True, lowest: float = LOG_VARIANCE_RANGE[0]) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(variance.log(), requires_grad=learn)
        self.low, self.high = lowest, LOG_VARIANCE_RANGE[1]

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """x, output: [B, D] to [B]."""
        log_variance = self.log_variance.clamp(self.low, self.high)  # [1] or [D]
        squared = (x - output).square() * torch.exp(-log_variance)  # [B, D]
        return -0.5 * (squared + log_variance + math.log(2.0 * math.pi)).sum(dim=1)  # [B]

    def mean(self, output: Tensor) -> Tensor:
        """E[x | z]: [B, D] to [B, D]."""
        return output


class OptimalGaussianLikelihood(GaussianLikelihood):
    """N(x; output, variance) with the variance that fits best: while training, the batch's mean squared error.

    Rybkin, Daniilidis & Levine 2021, "Simple and effective VAE training with calibrated decoders", eq. 6. Between
    batches it keeps the last one's; whoever trains it calls `settle` at the end, with the error of all rows.

    Args:
        variance: [1], in use before the first batch.
    """

    def __init__(self, variance: Tensor) -> None:
        super().__init__(variance, learn=False)

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """x, output: [B, D] to [B]."""
        squared = (x - output).square()  # [B, D]
        best = squared.mean().log() if self.training else self.log_variance.squeeze(0)
        best = best.clamp(self.low, self.high)
        if self.training:
            self.log_variance.copy_(best.detach().reshape(1))
        return -0.5 * (squared * torch.exp(-best) + best + math.log(2.0 * math.pi)).sum(dim=1)  # [B]

    def settle(self, mean_squared_error: Tensor) -> None:
        """Keep the variance that maximises the likelihood of all rows: their mean squared error, a scalar."""
        self.log_variance.copy_(mean_squared_error.log().clamp(self.low, self.high).reshape(1))


class BernoulliLikelihood(Likelihood):
    """Bernoulli(x; sigmoid(output)) for x in [0, 1]; grey values count as probabilities of white.

    Outside [0, 1] there is no such density: a value there is charged its excess as under a unit Gaussian, so that an
    impossible row scores as strange.
    """

    def __init__(self) -> None:
        super().__init__()
        self.exact_beyond = EXACT_BEYOND

    def log_prob(self, x: Tensor, output: Tensor) -> Tensor:
        """x, output (logits): [B, D] to [B]."""
        inside = x.clamp(0.0, 1.0)  # [B, D]
        softplus = functional.softplus(-output, 1.0, self.exact_beyond)  # [B, D]
        cross_entropy = (1.0 - inside) * output + softplus  # [B, D], exact for any logit
        return -(cross_entropy + 0.5 * (x - inside).square()).sum(dim=1)  # [B]

    def mean(self, output: Tensor) -> Tensor:
        """E[x | z]: logits [B, D] to grey values [B, D]."""
        return torch.sigmoid(output)
