"""What a score means: split-conformal p-values, and how severe a row is beyond what they can say."""

import torch
from torch import Tensor, nn

ROUNDING = 1e-5  # relative: what batch size and processor may change in a score
TAIL_SHARE = 0.1  # of the calibration scores which the tail beyond the largest is fitted on


class Calibration(nn.Module):
    """The sorted scores of n rows that trained nothing.

    A p-value is (1 + how many calibration scores are at least as large) / (n + 1). For a row exchangeable with the
    calibration rows P(p <= alpha) <= alpha, whatever the model (Vovk, Gammerman & Shafer, "Algorithmic learning in a
    random world", 2005, prop. 2.4; Bates et al., "Testing for outliers with conformal p-values", 2023, eq. 2).

    Each calibration score counts as larger by what rounding may change in it, so that a row exactly as strange as a
    calibration row has the same p-value alone and in a batch; this can only raise a p-value.

    Their floor is 1 / (n + 1). Severity goes on beyond it, on an exponential tail fitted to the largest scores; it is
    an extrapolation, not a p-value.

    Args:
        scores: [n], n >= 1, of calibration rows, in any order.
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
        exceeding = torch.arange(n, 0, -1, dtype=torch.float64)  # how many scores are >= this one
        beyond = max(1, round(TAIL_SHARE * n))
        mean_excess = (ordered[-beyond:] - ordered[-min(beyond + 1, n)]).mean()
        surprisal = -(exceeding / (n + 1)).log().to(ordered.dtype)  # [n]
        tail = mean_excess.clamp(min=1e-6 * max(1.0, float(ordered[-1].abs())))
        slopes = surprisal.diff() / ordered.diff().clamp(min=1e-30)  # [n - 1]
        self.register_buffer("scores", ordered)
        self.register_buffer("surprisal", surprisal)
        self.register_buffer("tail", tail)
        # the line on which a score lies that u calibration scores do not exceed, at place u: [n + 1] each
        self.register_buffer("knot", torch.cat((ordered[:1], ordered)))
        self.register_buffer("height", torch.cat((surprisal[:1], surprisal)))
        self.register_buffer("slope", torch.cat((slopes.new_zeros(1), slopes, 1.0 / tail.reshape(1))))

    def p_value(self, score: Tensor) -> Tensor:
        """Scores [B] to p-values [B] in [1 / (n + 1), 1]."""
        n = self.scores.shape[0]
        at_least = n - torch.searchsorted(self.scores, score)  # [B]
        return (at_least + 1).to(score.dtype) / (n + 1)

    def threshold(self, alpha: float) -> Tensor:
        """The score above which p <= alpha, a scalar; for alpha below the floor, where the fitted tail puts it."""
        n = self.scores.shape[0]
        allowed = int(alpha * (n + 1) + 1e-6) - 1  # calibration scores that may reach a row's while p <= alpha
        if allowed >= 0:
            return self.scores[n - 1 - min(allowed, n - 1)]
        surprise = -torch.log(torch.tensor(alpha, dtype=torch.float64)).to(self.scores)
        return self.scores[-1] + self.tail * (surprise - self.surprisal[-1])

    def severity(self, score: Tensor, alpha: float) -> Tensor:
        """Surprisal of scores [B] over that of the threshold at alpha, [B]: > 1 exactly where score > threshold."""
        threshold = self.threshold(alpha)
        surprisal = self._surprisal_at(torch.cat((score, threshold.reshape(1))))  # [B + 1]: a pass costs, not a row
        ratio = surprisal[:-1] / surprisal[-1]  # [B]
        above = ratio.clamp(min=1.0 + 1.2e-7)  # the next float32 after 1: rounding must not blur the verdict
        return torch.where(score > threshold, above, ratio.clamp(max=1.0))

    def _surprisal_at(self, score: Tensor) -> Tensor:
        """-log P(a normal row scores higher), [B] to [B]: continuous, increasing, exact at the calibration scores."""
        place = torch.searchsorted(self.scores, score, right=True)  # [B], how many scores are <= this one
        above = score - self.knot[place]  # [B], < 0 below the smallest only
        below = self.surprisal[0] * (above / self.tail).clamp(max=0.0).exp()  # [B]
        return torch.where(place == 0, below, self.height[place] + self.slope[place] * above)
