"""Models that know the condition of a row, such as its class (Sohn, Lee & Yan 2015, "Learning structured output
representation using deep conditional generative models").

In shapes: B rows, D features, L latents, C levels of all columns of conditions together. A condition is one-hot: for
each column, 1 at the level of the row. A column without a level has only zeros, and training shows the networks such
rows too. The methods of an artifact take rows [B, D + C] and latents [B, L + C], in which the condition comes last.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.autoencoder import Autoencoder
from models.calibration import Calibration
from models.core import Core
from models.explanation import Explanation
from models.likelihood import Likelihood
from models.observation import Observation
from models.pipeline import Pipeline
from models.prior import Prior
from models.scaling import Scaling
from models.vae import VAE, gaussian_kl
from models.whitening import Whitening

CONDITION_PART = "condition"  # name of the part of the score that `LevelCorrection` adds


class ConditionalAutoencoder(Autoencoder):
    """An autoencoder whose encoder and decoder see the condition of a row. Its score is that of `Autoencoder`.

    `encode` and `score` take rows [B, D + C] in model units, and `decode` takes latents [B, L + C]. `encode` returns
    latents [B, L], and `decode` and `score` return rows [B, D].

    Args:
        encoder: maps [B, D + C] to [B, L].
        decoder: maps [B, L + C] to [B, D].
        whitening: whitens the joint vector of latents and residual, [L + D]. See `Autoencoder`.
        latents: number of latents L.
        width: number of features D.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, whitening: Whitening, latents: int, width: int) -> None:
        super().__init__(encoder, decoder, whitening, latents)
        self.width = width

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three arrays for x [B, D + C]: score [B], the parts T2 and Q [B, 2], and reconstruction [B, D]."""
        rows, condition = x[:, : self.width], x[:, self.width :]  # [B, D], [B, C]
        code: Tensor = self.encoder(x)  # [B, L]
        x_hat: Tensor = self.decoder(torch.cat((code, condition), dim=1))  # [B, D]
        squares = self.whitening(torch.cat((code, rows - x_hat), dim=1)).square()  # [B, L + D]
        t2, q = squares[:, : self.latents].sum(dim=1), squares[:, self.latents :].sum(dim=1)  # [B], [B]
        return t2 + q, torch.stack((t2, q), dim=1), x_hat


class ConditionalVAE(VAE):
    """A VAE whose encoder and decoder see the condition of a row: q(z | x, c) and p(x | z, c).

    Its score is that of `VAE`.

    `encode`, `score` and `log_weight` take rows [B, D + C] in model units, and `decode` takes latents [B, L + C].
    `encode` returns latents [B, L], and `decode` and `score` return rows [B, D].

    Args:
        encoder: maps [B, D + C] to [B, 2 L]: means, then log-variances.
        decoder: maps [B, L + C] to the likelihood's parameter, [B, D].
        likelihood: p(x | z, c), a module of `models.likelihood`.
        width: number of features D.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, likelihood: Likelihood, width: int) -> None:
        super().__init__(encoder, decoder, likelihood)
        self.width = width

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three arrays for x [B, D + C]: score [B], the parts KL and NLL [B, 2], and reconstruction [B, D]."""
        rows, condition = x[:, : self.width], x[:, self.width :]  # [B, D], [B, C]
        mean, log_variance = self.posterior(x)  # [B, L], [B, L]
        output = self.decoder(torch.cat((mean, condition), dim=1))  # [B, D]
        kl = gaussian_kl(mean, log_variance).sum(dim=1)  # [B]
        nll = -self.likelihood.log_prob(rows, output)  # [B]
        return kl + nll, torch.stack((kl, nll), dim=1), self.likelihood.mean(output)

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return log p(x, z | c) - log q(z | x, c), [B], for x [B, D + C] and noise [B, L]. See `VAE.log_weight`."""
        rows, condition = x[:, : self.width], x[:, self.width :]  # [B, D], [B, C]
        mean, log_variance = self.posterior(x)  # [B, L], [B, L]
        z = mean + torch.exp(0.5 * log_variance) * noise  # [B, L]
        output = self.decoder(torch.cat((z, condition), dim=1))  # [B, D]
        log_likelihood: Tensor = self.likelihood.log_prob(rows, output)  # [B]
        return log_likelihood + 0.5 * (noise.square() + log_variance - z.square()).sum(dim=1)


class ConditionalPrior(Prior):
    """One mixture of Gaussians over the latents per known condition, and one for all other conditions.

    The Gaussians of all R mixtures stand one after the other, and the weights of each mixture have the sum 1. A number
    between r and r + 1 therefore selects a Gaussian of the mixture number r. See `Prior`.

    Args:
        weights: weights of the Gaussians, [M], with the sum R.
        means: means of the Gaussians, [M, L].
        factors: lower Cholesky factors of the covariances of the Gaussians, [M, L, L].
        conditions: the condition of each mixture, one-hot, [R, C]. The first one has only zeros: its mixture is for the
            conditions without a mixture of their own.
    """

    conditions: Tensor
    columns: Tensor
    numbers: Tensor

    def __init__(self, weights: Tensor, means: Tensor, factors: Tensor, conditions: Tensor) -> None:
        super().__init__(weights, means, factors)
        self.register_buffer("conditions", conditions)
        self.register_buffer("columns", conditions.sum(dim=1))  # [R], number of columns with a level
        self.register_buffer("numbers", torch.arange(len(conditions)).float())  # [R]

    def number(self, condition: Tensor) -> Tensor:
        """Return the number of the mixture for each condition [B, C], as [B] float32. It is added to `choice`."""
        shared = condition @ self.conditions.T  # [B, R], number of columns with the same level
        distance = condition.square().sum(dim=1).unsqueeze(1) + self.columns - 2.0 * shared  # [B, R]
        is_same = torch.where(distance.square() < 0.25, 1.0, torch.zeros_like(distance))  # [B, R]
        return (is_same * self.numbers).sum(dim=1)  # 0 if there is no mixture for the condition


class LevelCorrection(nn.Module):
    """Corrects the scores of rows whose level is unknown, so that they compare with those of rows with all levels.

    The networks know less about a row whose level they do not know, and give it another score. For each set of columns
    that lack a level, the correction maps the quantiles of the scores without these levels to those with them. One
    calibration then gives valid p-values for all rows.

    Args:
        sizes: number of levels of each of the J columns.
        knots: the quantiles of the scores, ascending, [P, Q], for each set of columns that have a level. The set of all
            columns is left out, so there are P = 2^J - 1 sets. Set number p contains column j if bit j of p is 1.
        slopes: by how much the slope of the correction grows at each knot, [P, Q].
        start: the correction of scores up to the first knot, [P].
    """

    columns: Tensor
    numbers: Tensor
    knots: Tensor
    slopes: Tensor
    start: Tensor

    def __init__(self, sizes: Sequence[int], knots: Tensor, slopes: Tensor, start: Tensor) -> None:
        super().__init__()
        # [C], 2^j for the levels of column j. Their sum over the levels of a row is the number of its set of columns.
        self.register_buffer("columns", torch.cat([torch.full((size,), 2.0**j) for j, size in enumerate(sizes)]))
        self.register_buffer("numbers", torch.arange(len(start)).float())  # [P]
        self.register_buffer("knots", knots)
        self.register_buffer("slopes", slopes)
        self.register_buffer("start", start)

    def forward(self, score: Tensor, condition: Tensor) -> Tensor:
        """Return the correction of scores [B] of rows with conditions [B, C], one-hot; 0 if a row has all levels."""
        number = (condition * self.columns).sum(dim=1).unsqueeze(1)  # [B, 1]
        is_set = torch.where((number - self.numbers).square() < 0.25, 1.0, torch.zeros_like(number))  # [B, P]
        above = torch.relu(score.reshape(-1, 1, 1) - self.knots)  # [B, P, Q]
        spans = self.knots[:, -1:] - self.knots  # [P, Q]
        above = spans - torch.relu(spans - above)  # at most the value at the last knot, so that it is finite
        correction = self.start + (above * self.slopes).sum(dim=2)  # [B, P]
        return (is_set * correction).sum(dim=1)


class ConditionalPipeline(Pipeline):
    """The complete conditional model. Its methods are those of `Pipeline`, for rows and latents with a condition.

    `encode` returns latents [B, L + C], so that `decode` gives back the row. Their last C columns are the condition of
    the row, with a standard deviation of 0. `draw` takes noise [B, L + C] and returns latents [B, L + C]: the last C
    columns of the noise are the condition to draw for, and are returned unchanged. All other results are about the D
    features.

    Args:
        scaling: converts the features from raw units to model units.
        core: a ConditionalAutoencoder or a ConditionalVAE.
        prior: the prior of the core's latents.
        calibration: calibration of the score.
        correction: what is added to the scores of rows without a level; it is the last part of the score.
        explanation: contributions of the features to the score.
        observation: the noise of a row around the decoder's output; by default, there is no noise.
    """

    def __init__(
        self,
        scaling: Scaling,
        core: Core,
        prior: ConditionalPrior,
        calibration: Calibration,
        correction: LevelCorrection,
        explanation: Explanation | None = None,
        observation: Observation | None = None,
    ) -> None:
        super().__init__(scaling, core, prior, calibration, explanation, observation)
        self.prior: ConditionalPrior = prior
        self.correction = correction
        self.width = len(scaling.shift)
        self.latents = prior.means.shape[1]

    def core_inputs(self, x: Tensor) -> Tensor:
        """Return rows x [B, D + C] with the features in model units."""
        return torch.cat((self.scaling(x[:, : self.width]), x[:, self.width :]), dim=1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior mean [B, L + C] and standard deviation [B, L + C] of x [B, D + C]."""
        condition = x[:, self.width :]  # [B, C]
        mean, std = self.core.encode(self.core_inputs(x))  # [B, L], [B, L]
        return torch.cat((mean, condition), dim=1), torch.cat((std, torch.zeros_like(condition)), dim=1)

    def draw(self, noise: Tensor, choice: Tensor) -> Tensor:
        """Draw latents [B, L + C] from the prior. The last C columns of `noise` [B, L + C] are the condition."""
        condition = noise[:, self.latents :]  # [B, C]
        latents: Tensor = self.prior(noise[:, : self.latents], self.prior.number(condition) + choice)  # [B, L]
        return torch.cat((latents, condition), dim=1)

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Score rows x [B, D + C]. Contributions and expected values are those of the D features. See `Pipeline`."""
        u = self.core_inputs(x)  # [B, D + C]
        score, parts, u_hat = self.core.score(u)
        correction = self.correction(score, u[:, self.width :])  # [B]
        score, parts = score + correction, torch.cat((parts, correction.unsqueeze(1)), dim=1)
        contribution, expected = self.explanation(u[:, : self.width], u_hat)  # [B, D], [B, D]
        return score, parts, contribution, self.scaling.inverse(expected)

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return log p(x, z | c) - log q(z | x, c) in nats, [B], for x [B, D + C] and noise [B, L or more]."""
        return self.core.log_weight(self.core_inputs(x), noise[:, : self.latents])
