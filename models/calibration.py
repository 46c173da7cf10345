"""Calibration of anomaly scores: split-conformal p-values, and a severity that grows without bound."""

import torch
from torch import Tensor, nn

# Largest relative difference between the scores that one row gets in different batches or on different processors.
ROUNDING = 1e-5
TAIL_SHARE = 0.1  # share of the calibration scores, the largest ones, to which the exponential tail is fitted


class Calibration(nn.Module):
    """Calibration by the scores of n rows on which the model was not trained.

    The p-value of a score s is (1 + number of calibration scores >= s) / (n + 1). If a row is exchangeable with the
    calibration rows, P(p <= alpha) <= alpha for any model (Vovk, Gammerman & Shafer, "Algorithmic learning in a random
    world", 2005, prop. 2.4; Bates et al., "Testing for outliers with conformal p-values", 2023, eq. 2).

    The score of a row may differ between batches, because of rounding. Each calibration score is therefore raised by
    the largest rounding error. A row whose score equals a calibration score, up to rounding, is then below the raised
    score in every batch, and always gets the same p-value. Raising the calibration scores can only raise p-values.

    The smallest possible p-value, the floor, is 1 / (n + 1). For scores above the largest calibration score, severity
    is computed from an exponential tail, which is fitted to the largest calibration scores. Such a severity does not
    correspond to a p-value.

    Args:
        scores: scores of the calibration set in any order, [n], n >= 1.
    """

    scores: Tensor
    surprisal: Tensor
    tail: Tensor
    knot: Tensor
    height: Tensor
    slope: Tensor

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        ordered = scores.sort().values
        ordered = ordered + ROUNDING * (ordered.abs() + ordered.abs().median())
        n = ordered.shape[0]
        at_least = torch.arange(n, 0, -1, dtype=torch.float64)  # number of scores >= ordered[i], [n]
        tail_rows = max(1, round(TAIL_SHARE * n))
        mean_excess = (ordered[-tail_rows:] - ordered[-min(tail_rows + 1, n)]).mean()
        surprisal = -(at_least / (n + 1)).log().to(ordered.dtype)  # [n]
        tail = mean_excess.clamp(min=1e-6 * max(1.0, float(ordered[-1].abs())))
        slopes = surprisal.diff() / ordered.diff().clamp(min=1e-30)  # [n - 1]
        self.register_buffer("scores", ordered)
        self.register_buffer("surprisal", surprisal)
        self.register_buffer("tail", tail)
        # From the smallest calibration score upwards, the surprisal is a piecewise linear function of the score. The
        # arrays `knot`, `height` and `slope`, all [n + 1], describe its pieces. Element u, for u from 1 to n, describes
        # the piece that begins at the u-th smallest calibration score. Element 0 is a placeholder.
        self.register_buffer("knot", torch.cat((ordered[:1], ordered)))
        self.register_buffer("height", torch.cat((surprisal[:1], surprisal)))
        self.register_buffer("slope", torch.cat((slopes.new_zeros(1), slopes, 1.0 / tail.reshape(1))))

    def p_value(self, score: Tensor) -> Tensor:
        """Return the p-values [B] of scores [B]. They are at least 1 / (n + 1) and at most 1."""
        n = self.scores.shape[0]
        at_least = n - torch.searchsorted(self.scores, score)  # [B]
        return (at_least + 1).to(score.dtype) / (n + 1)

    def threshold(self, alpha: float) -> Tensor:
        """Return the score above which p <= alpha, a scalar. If alpha < 1 / (n + 1), it is from the fitted tail."""
        n = self.scores.shape[0]
        allowed = int(alpha * (n + 1) + 1e-6) - 1  # p <= alpha if at most this many calibration scores are >= the score
        if allowed >= 0:
            return self.scores[n - 1 - min(allowed, n - 1)]
        surprise = -torch.log(torch.tensor(alpha, dtype=torch.float64)).to(self.scores)
        return self.scores[-1] + self.tail * (surprise - self.surprisal[-1])

    def severity(self, score: Tensor, alpha: float) -> Tensor:
        """Return the severity [B] of scores [B], which is above 1 if and only if the score is above the threshold.

        The severity is the surprisal of the score divided by the surprisal of the threshold.
        """
        threshold = self.threshold(alpha)
        surprisal = self._surprisal_at(torch.cat((score, threshold.reshape(1))))  # [B + 1]; one call is faster than two
        ratio = surprisal[:-1] / surprisal[-1]  # [B]
        above = ratio.clamp(min=1.0 + 1.2e-7)  # the next float32 after 1, so that rounding cannot change the verdict
        return torch.where(score > threshold, above, ratio.clamp(max=1.0))

    def _surprisal_at(self, score: Tensor) -> Tensor:
        """Return the surprisal [B] of scores [B]: minus the log of the probability that a normal row scores as high.

        The result increases continuously with the score, and is exact at the calibration scores.
        """
        place = torch.searchsorted(self.scores, score, right=True)  # [B], number of calibration scores <= score
        above = score - self.knot[place]  # [B], negative only below the smallest calibration score
        below = self.surprisal[0] * (above / self.tail).clamp(max=0.0).exp()  # [B]
        return torch.where(place == 0, below, self.height[place] + self.slope[place] * above)
