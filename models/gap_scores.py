"""The scale of anomaly scores of rows with missing values."""

import torch
from torch import Tensor, nn

TAIL_SHARE = 0.1  # share of the scores, the largest ones, to which the slope above the largest score is fitted


class GapScores(nn.Module):
    """Maps the scores of rows with missing values to the scale of the scores of complete rows.

    The more values of a row are missing, the less extreme is its score. Each level is a share of missing values. At a
    level, the map sends each quantile of the scores of rows with this share of missing values to the same quantile of
    the scores of complete rows. Between two levels, the map is interpolated. At level 0, it is the identity.

    After the map, the calibration of complete rows holds approximately for rows with missing values, too. Assumption:
    whether a value is missing depends on no value of the row (missing completely at random, Rubin 1976).

    Args:
        shares: the share of the values that is missing at each level, ascending, the first is 0, [L].
        scores: the sorted scores of n >= 2 rows at each level, [L, n]. At level 0, the rows are complete.
    """

    left: Tensor
    middle: Tensor
    right: Tensor
    knots: Tensor
    heights: Tensor
    slopes: Tensor

    def __init__(self, shares: Tensor, scores: Tensor) -> None:
        super().__init__()
        complete = scores[:1]  # [1, n]
        tail = max(1, round(TAIL_SHARE * scores.shape[1]))
        excess = (scores[:, -tail:] - scores[:, -tail - 1 : -tail]).mean(dim=1)  # [L]
        steepness = (excess[0] / excess).nan_to_num(1.0, posinf=1.0).clamp(0.1, 10.0)  # [L]
        slopes = complete.diff(dim=1) / scores.diff(dim=1).clamp(min=1e-30)  # [L, n - 1]
        self.register_buffer("left", torch.cat((shares[:1] - 1.0, shares[:-1])))
        self.register_buffer("middle", shares)
        self.register_buffer("right", torch.cat((shares[1:], torch.full_like(shares[:1], 1e9))))
        # Element u of a level, for u from 1 to n, describes the piece of the map that begins at the u-th smallest
        # score. Element 0 describes the scores below the smallest one.
        self.register_buffer("knots", torch.cat((scores[:, :1], scores), dim=1))  # [L, n + 1]
        self.register_buffer("heights", torch.cat((complete[0, :1], complete[0])))  # [n + 1]
        below, above = torch.ones_like(slopes[:, :1]), steepness.unsqueeze(1)  # [L, 1], [L, 1]
        self.register_buffer("slopes", torch.cat((below, slopes, above), dim=1))  # [L, n + 1]

    def forward(self, score: Tensor, share: Tensor) -> Tensor:
        """Return scores [B] on the scale of complete rows. `share` is the share of missing values of each row, [B]."""
        mapped = torch.zeros_like(score)
        for level in range(self.middle.shape[0]):
            knots = self.knots[level]  # [n + 1]
            place = torch.searchsorted(knots[1:], score, right=True)  # [B]
            height = self.heights[place] + self.slopes[level][place] * (score - knots[place])  # [B]
            rise = (share - self.left[level]) / (self.middle[level] - self.left[level])
            fall = (self.right[level] - share) / (self.right[level] - self.middle[level])
            weight = rise.clamp(0.0, 1.0) + fall.clamp(0.0, 1.0) - 1.0  # [B]: 1 at the level, 0 at its neighbours
            mapped = mapped + weight * height
        return mapped


def no_gap_scores() -> GapScores:
    """Return the identity map."""
    return GapScores(torch.zeros(1), torch.zeros(1, 2))
