"""Correct the scores of rows without a level, so that one calibration is valid for all rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.conditional import LevelCorrection
from models.core import Core

MAX_KNOTS = 48  # largest number of quantiles; half of them are in the upper tail, which decides about alarms
MIN_ROWS = 20  # with fewer rows that have all levels, scores are not corrected
BATCH = 4096  # rows per forward pass; limits the memory


def fit_level_correction(core: Core, u: Tensor, levels: Sequence[int]) -> LevelCorrection:
    """Return the correction of the scores of `core` for rows without a level.

    The quantiles are those of the scores of the same rows with and without their levels. The correction at a quantile
    without levels is the difference from the quantile of the same rank with all levels. Between quantiles, the
    correction is linear. Below the first and above the last one, it is constant.

    Args:
        core: a conditional model, which scores rows [B, D + C].
        u: calibration rows in model units, with their conditions, [N, D + C].
        levels: number of levels of each of the J columns of conditions; the sum is C.
    """
    width = u.shape[1] - sum(levels)
    rows = u[u[:, width:].sum(dim=1) == len(levels)]  # rows with all levels
    sets = [[bool(number >> j & 1) for j in range(len(levels))] for number in range(2 ** len(levels) - 1)]
    if len(rows) < MIN_ROWS:
        none = torch.zeros(len(sets), 1)
        return LevelCorrection(levels, none, none, none[:, 0])
    complete = _sorted_scores(core, rows)
    fitted = [_fit(complete, _sorted_scores(core, _keep(rows, each, levels))) for each in sets]
    count = max(len(knots) for knots, _, _ in fitted)
    return LevelCorrection(
        levels,
        torch.stack([torch.cat((knots, knots[-1:].expand(count - len(knots)))) for knots, _, _ in fitted]),
        torch.stack([torch.cat((changes, torch.zeros(count - len(changes)))) for _, changes, _ in fitted]),
        torch.stack([start for _, _, start in fitted]),
    )


def _keep(rows: Tensor, kept: Sequence[bool], levels: Sequence[int]) -> Tensor:
    """Return rows [N, D + C] without the levels of the columns j for which `kept[j]` is false."""
    mask = torch.tensor(kept).repeat_interleave(torch.tensor(levels)).to(rows)  # [C]
    width = rows.shape[1] - len(mask)
    return torch.cat((rows[:, :width], rows[:, width:] * mask), dim=1)


def _sorted_scores(core: Core, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([core.score(part)[0] for part in rows.split(BATCH)]).double().sort().values


def _fit(complete: Tensor, lacking: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the knots [Q], the changes of the slope at the knots [Q], and the correction at the first knot, a scalar.

    Args:
        complete: scores of rows with all levels, ascending, [N].
        lacking: scores of the same rows without some of their levels, ascending, [N].
    """
    count = len(lacking)
    tail = torch.logspace(0.0, -torch.tensor(float(count)).log10().item(), MAX_KNOTS // 2, dtype=torch.float64)
    shares = torch.cat((torch.linspace(0.0, 1.0, MAX_KNOTS - len(tail), dtype=torch.float64), 1.0 - tail))
    ranks = (shares * (count - 1)).round().long().unique()  # [Q]
    ranks = ranks[torch.cat((torch.tensor([True]), lacking[ranks].diff() > 0))]
    knots = lacking[ranks]
    corrections = complete[ranks] - knots  # [Q]
    slopes = torch.cat((corrections.diff() / knots.diff(), torch.zeros(1, dtype=torch.float64)))  # after each knot
    changes = slopes.diff(prepend=torch.zeros(1, dtype=torch.float64))
    return knots.float(), changes.float(), corrections[0].float()
