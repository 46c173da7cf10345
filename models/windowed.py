"""A model that judges a row together with the rows before it: the window is summarised, and the summaries are a row."""

import torch
from torch import Tensor, nn

from models.observation import Observation
from models.pipeline import Pipeline
from models.scaling import Scaling


class Summaries(nn.Module):
    """The summaries of a window: its newest row, and the mean and deviation of the last s rows for each scale s.

    These are the statistics of control charts for the mean and the dispersion (Roberts 1959; MacGregor & Harris 1993).
    `models.windows.summarise` computes the same for a whole table.

    Args:
        scales: the scales, ascending; the last one is N, the number of rows of a window.
    """

    averages: Tensor

    def __init__(self, scales: tuple[int, ...]) -> None:
        super().__init__()
        ages = torch.arange(scales[-1] - 1, -1, -1)  # [N], age of each row of the window
        # 1 where the row belongs to the scale, [S, N].
        self.register_buffer("averages", torch.stack([(ages < scale).float() for scale in scales]))

    def forward(self, u: Tensor, present: Tensor) -> Tensor:
        """Return the summaries [B, D (1 + 2 S)] of windows u [B, N, D] in model units, oldest row first.

        Sums are over differences from the newest row. The squared mean is then at most N times the variance, so the
        subtraction that gives the variance loses little precision.

        Args:
            u: the windows. Rows that are not there may have any values, also NaN.
            present: 1 for each row that is there, otherwise 0, [B, N]. The newest row must be there.
        """
        weight = self.averages * present.unsqueeze(1)  # [B, S, N]
        weight = weight / weight.sum(dim=2, keepdim=True).clamp(min=1.0)
        newest = u[:, -1:]  # [B, 1, D]
        v = torch.where(present.unsqueeze(2) > 0.0, u - newest, 0.0)  # [B, N, D]
        mean = weight @ v  # [B, S, D]
        deviation = (weight @ v.square() - mean.square()).clamp(min=0.0).sqrt()  # [B, S, D]
        return torch.cat((newest, mean + newest, deviation), dim=1).flatten(1)


class ValidRange(nn.Module):
    """Replaces the values of a window that are outside of their valid ranges, as if they had not been measured.

    Args:
        low: lower end of the valid range of each feature in raw units, [D]; minus infinity if there is none.
        high: upper end, [D]; infinity if there is none.
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, x: Tensor, u: Tensor, present: Tensor) -> Tensor:
        """Return u [B, N, D], where the mean of the window's valid values replaces each value outside of its range.

        If a window has no valid value of a feature, 0 replaces the values of that feature.

        Args:
            x: windows in raw units, [B, N, D]. A missing value is not outside of its range.
            u: the same windows in model units, with missing values replaced.
            present: 1 for each row that is there, otherwise 0, [B, N].
        """
        outside = torch.where(torch.maximum(x - self.high, self.low - x) > 0.0, 1.0, torch.zeros_like(x))  # [B, N, D]
        valid = present.unsqueeze(2) - outside  # [B, N, D], 1 for valid values; at most 0 for others
        total = torch.where(valid > 0.0, u, 0.0).sum(dim=1, keepdim=True)  # [B, 1, D]
        mean = total / valid.clamp(min=0.0).sum(dim=1, keepdim=True).clamp(min=1.0)  # [B, 1, D]
        return torch.where(outside > 0.0, mean, u)


class WindowSummaries(nn.Module):
    """Summarises windows in raw units.

    Args:
        scaling: converts rows from raw units to model units.
        summaries: summarises windows in model units.
        valid_range: excludes values outside of their valid ranges from the means and deviations; by default, every
            value is valid. The newest row keeps such values, because the policy of the model judges them.
    """

    def __init__(self, scaling: Scaling, summaries: Summaries, valid_range: ValidRange | None = None) -> None:
        super().__init__()
        self.scaling = scaling
        self.summaries = summaries
        self.valid_range: ValidRange | None = valid_range
        self.width = len(scaling.shift)

    def summarise(self, x: Tensor) -> Tensor:
        """Return the summaries [B, V] of windows x [B, N, D], in model units."""
        present = 1.0 - x.isnan().to(x.dtype).amin(dim=2)  # [B, N]
        u = self.scaling(x)  # [B, N, D]
        if self.valid_range is None:
            summaries: Tensor = self.summaries(u, present)  # [B, V]
            return summaries
        others = self.summaries(self.valid_range(x, u, present), present)[:, self.width :]  # [B, V - D]
        return torch.cat((u[:, -1], others), dim=1)


class Windowed(WindowSummaries):
    """The module of an artifact whose model has a window. Its methods are those of `models.pipeline.Pipeline`.

    In shapes: B windows of N rows, D features, V summaries, K latents, P parts of the score. A window is [N, D] in raw
    units, oldest row first. A row of NaN only is not there: the first rows of a group have shorter windows, with NaN in
    front. If the scaling imputes missing values, a row that is there may contain NaN.

    Latents, densities and scores are those of the summaries. Reconstructions and expected values are rows [B, D], for
    the newest row of each window.

    Args:
        scaling: converts rows from raw units to model units.
        summaries: summarises windows in model units.
        pipeline: the model of the summaries [B, V], whose first D columns are the newest row.
        observation: the noise of a row around the decoder's output, in raw units.
        valid_range: see `WindowSummaries`.
    """

    def __init__(
        self,
        scaling: Scaling,
        summaries: Summaries,
        pipeline: Pipeline,
        observation: Observation,
        valid_range: ValidRange | None = None,
    ) -> None:
        super().__init__(scaling, summaries, valid_range)
        self.pipeline = pipeline
        self.observation = observation

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction [B, D] of the newest row of windows x [B, N, D], from the posterior mean."""
        return self.decode(self.encode(x)[0])

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior mean [B, K] and standard deviation [B, K] of windows x [B, N, D]."""
        return self.pipeline.encode(self.summarise(x))

    def decode(self, z: Tensor) -> Tensor:
        """Return the newest row [B, D] of the windows that have the latents z [B, K]."""
        return self.scaling.inverse(self.pipeline.decode(z)[:, : self.width])

    def draw(self, noise: Tensor, choice: Tensor) -> Tensor:
        """Draw latents [B, K] from the prior. See `Pipeline.draw`."""
        return self.pipeline.draw(noise, choice)

    def observe(self, x_hat: Tensor, noise: Tensor) -> Tensor:
        """Draw rows [B, D] given decoded rows x_hat [B, D], with standard normal noise [B, D]."""
        rows: Tensor = self.observation(x_hat, noise)  # [B, D]
        return rows

    def score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Score windows x [B, N, D]: a higher score is more anomalous.

        Returns:
            score: [B].
            parts: the parts of the score, [B, P]. Their sum is the score.
            contribution: the largest contribution of the summaries of each feature, [B, D].
            expected: expected value of each feature of the newest row in raw units, [B, D].
        """
        return self.score_summaries(self.summarise(x))

    def score_summaries(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Score summaries z [B, V]. See `score`. For tables, `models.windows.summarise` is faster than `summarise`."""
        score, parts, contribution, expected = self.pipeline.score(z)  # [B], [B, P], [B, V], [B, V]
        by_feature = contribution.reshape(contribution.shape[0], -1, self.width)  # [B, V / D, D]
        return score, parts, by_feature.amax(dim=1), self.scaling.inverse(expected[:, : self.width])

    def log_weight(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return log p(s, z) - log q(z|s) in nats, [B], where s are the summaries of windows x [B, N, D].

        Args:
            noise: standard normal noise, [B, K].
        """
        return self.pipeline.log_weight(self.summarise(x), noise)

    def p_value(self, score: Tensor) -> Tensor:
        """Return the conformal p-values [B] of scores [B]."""
        return self.pipeline.p_value(score)

    def severity(self, score: Tensor, alpha: float) -> Tensor:
        """Return the severity [B] of scores [B], which is above 1 if and only if the row is anomalous at alpha."""
        return self.pipeline.severity(score, alpha)

    def threshold(self, alpha: float) -> Tensor:
        """Return the score above which a row is anomalous at alpha, a scalar."""
        return self.pipeline.threshold(alpha)
