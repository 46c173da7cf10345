"""Apply a policy to rows before they are scored: deviations that do not matter are taken out of the row."""

import math

import torch
from torch import Tensor, nn

STEPS = 8  # conjugate-gradient steps of one solution; more hardly change the result
CEILING_SURPRISE = 30.0  # a value outside of its valid range counts as improbable by this many nats of the fitted tail
MAX_SQUARE = 1e30  # largest contribution of a value outside of its valid range, so that it stays finite


class PolicyModule(nn.Module):
    """The least anomalous row that a policy does not tell from a given row.

    A rule takes features out of the row: it makes them *neutral*. A neutral feature counts as if it was not measured.
    Its value is replaced by the value that all other features of the row predict, so that the score of the row is low
    unless the other features are anomalous. A feature is neutral if

    - it deviates from this prediction in a direction that does not matter, or by less than its least deviation;
    - or its value is outside of its valid range (such a row gets a high score in another way).

    For one-sided features, this is the projection of the row on the cone of the directions that do not matter. The
    squared distance of the projection from the mean is the statistic of the one-sided test of Kudo, "A multivariate
    analogue of the one-sided test", Biometrika 1963. The projection minimises y' P y over the neutral features of y,
    where P is the precision of normal rows. Which features are neutral follows from the solution, so the two are found
    in turn: the primal-dual active set method of Hintermueller, Ito & Kunisch, SIAM J. Optim. 2002. A fixed number of
    steps makes the time independent of the row. The result is a fixed function of the row even where the steps have
    not converged, so that calibration makes the rate of false alarms right in any case.

    In shapes: B rows, D features. All computations are in float64, so that their rounding does not show in the score.

    Args:
        mean: mean of each feature in model units, [D].
        residual: standard deviation of each feature about its prediction by the others, in model units, [D].
        precision: inverse correlation matrix of normal rows, scaled to a diagonal of ones, [D, D].
        below: deviations below the prediction are neutral up to this limit, in units of `residual`, [D]: 0 if every
            deviation matters, infinity if none does.
        above: the same limit for deviations above the prediction, [D].
        low: lower end of the valid range of each feature in raw units, [D]; minus infinity if there is none.
        high: upper end, [D]; infinity if there is none.
        companion: whether a feature never raises an alarm alone, [D].
    """

    mean: Tensor
    residual: Tensor
    precision: Tensor
    below: Tensor
    above: Tensor
    low: Tensor
    high: Tensor
    companion: Tensor
    usual: Tensor
    ceiling: Tensor

    def __init__(
        self,
        mean: Tensor,
        residual: Tensor,
        precision: Tensor,
        below: Tensor,
        above: Tensor,
        low: Tensor,
        high: Tensor,
        companion: Tensor,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean.double())
        self.register_buffer("residual", residual.double())
        self.register_buffer("precision", precision.double())
        self.register_buffer("below", below.double())
        self.register_buffer("above", above.double())
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("companion", companion.float())
        # `usual`: a row whose score without the companions is at most this has no other anomaly; set by the fit.
        self.register_buffer("usual", torch.tensor(-math.inf))
        # `ceiling`: a row with a value outside of its valid range scores at least this; set by the calibration.
        self.register_buffer("ceiling", torch.tensor(0.0))
        has_limit, has_range = (below > 0) | (above > 0), low.isfinite() | high.isfinite()  # [D], [D]
        self.has_limits, self.has_ranges = bool(has_limit.any()), bool(has_range.any())
        self.has_companions = bool(companion.any())
        # TorchScript compiles no constants of modules. N neutral features need at most N steps.
        self.steps, self.max_square = min(STEPS, int((has_limit | has_range | companion).sum())), MAX_SQUARE

    def forward(self, u: Tensor, forced: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows u [B, D] in model units with the predictions in place of neutral values, and which are neutral.

        Both results are [B, D]. A feature is neutral where the second result is 1, and not where it is 0: ONNX Runtime
        chooses between numbers, but not between truth values. Features are neutral, whatever their values are, where
        `forced` [B, D] is 1.
        """
        t = (u.to(self.mean.dtype) - self.mean) / self.residual  # [B, D]
        t = t.clamp(min=-self.max_square, max=self.max_square)  # a value outside of its range may be infinite here
        neutral = self._neutral(t, forced) if self.has_limits else forced > 0.0  # [B, D]
        # Neutral values start at the mean, so that the result does not depend on how far they are from it.
        y = self._solve(torch.where(neutral, 0.0, t), neutral)  # [B, D]
        if self.has_limits:
            neutral = self._neutral(t - y + y @ self.precision, forced)
            y = self._solve(torch.where(neutral, y, t), neutral)
            neutral = self._neutral(t - y + y @ self.precision, forced)
            y = self._solve(torch.where(neutral, y, t), neutral)
        judged = torch.where(neutral, (self.mean + self.residual * y).to(u.dtype), u)  # [B, D]
        return judged, torch.where(neutral, 1.0, torch.zeros_like(u))

    def outside(self, x: Tensor) -> Tensor:
        """Return 1 for values of x [B, D], in raw units, outside of their valid ranges, else 0, [B, D]. NaN is not."""
        return torch.where(torch.maximum(x - self.high, self.low - x) > 0.0, 1.0, torch.zeros_like(x))

    def companions(self, outside: Tensor) -> Tensor:
        """Return 1 for the features that never raise an alarm alone, and where `outside` [B, D] is 1, else 0."""
        return torch.maximum(outside, self.companion)

    def squares(self, u: Tensor, judged: Tensor) -> Tensor:
        """Return the squared distances [B, D] of values u [B, D] from their predictions `judged` [B, D]."""
        return ((u - judged) / self.residual.to(u.dtype)).square().clamp(max=self.max_square)

    def _neutral(self, gap: Tensor, forced: Tensor) -> Tensor:
        """Return which features are neutral, [B, D], for their deviations `gap` [B, D] from the predictions."""
        limit = torch.where(gap > 0.0, self.above, self.below)  # [B, D]
        return torch.where(forced > 0.0, -1.0, torch.maximum(gap, -gap) - limit) < 0.0

    def _solve(self, y: Tensor, neutral: Tensor) -> Tensor:
        """Return y [B, D] with new values of the neutral features, which minimise y' P y: conjugate gradients."""
        r = torch.where(neutral, -(y @ self.precision), 0.0)  # [B, D]
        p = r
        square = r.square().sum(dim=1, keepdim=True)  # [B, 1]
        for _ in range(self.steps):
            q = torch.where(neutral, p @ self.precision, 0.0)  # [B, D]
            step = square / (p * q).sum(dim=1, keepdim=True).clamp(min=1e-300)  # [B, 1]
            y = y + step * p
            r = r - step * q
            before = square
            square = r.square().sum(dim=1, keepdim=True)
            p = r + square / before.clamp(min=1e-300) * p
        return y
