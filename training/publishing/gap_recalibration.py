"""Fit the scale of the scores of rows with missing values again, to the new calibration rows of `elbo calibrate`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models.manifest import calibration_rows_needed
from training.data.table import Table
from training.fitting.completion import LEAST_GAP_ROWS, fit_gap_scores

SCALE_SHARE = 1 / 3  # of the rows that fit the scale, and calibrate nothing, if rows have missing values

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GapSplit:
    """Which rows of a table calibrate, and which rows fit the scale of the scores of rows with missing values.

    Args:
        calibration: indices of the rows that calibrate, ascending.
        complete: indices of the rows without missing values that fit the scale, in random order. If there are none, the
            scale stays as it is.
        notes: what the user should know.
    """

    calibration: Indices
    complete: Indices
    notes: list[str]


def split_for_gaps(module: Any, table: Table, rows: Indices, alpha: float) -> GapSplit:
    """Divide `rows`, indices of rows of `table`, between the calibration and the scale of scores.

    If no row has a missing value, all rows do both: their scores do not depend on the scale. Otherwise, a random third
    of the rows fits the scale and calibrates nothing, so that the calibration rows remain exchangeable with new rows.
    If too few rows are left for `alpha`, or fewer than LEAST_GAP_ROWS rows without missing values fit the scale, all
    rows calibrate, and the scale stays as it is.

    Args:
        module: the module of an artifact.
    """
    if not hasattr(module, "score_gaps"):
        return GapSplit(rows, rows[:0], [])
    random = np.random.RandomState(1).permutation(rows)
    has_gaps = np.zeros(len(table.x), bool)
    for start in range(0, len(rows), table.x.block_rows):
        part = rows[start : start + table.x.block_rows]
        has_gaps[part] = np.isnan(table.x.take(part)).any(axis=1)
    if not has_gaps.any():
        return GapSplit(rows, random if len(rows) >= LEAST_GAP_ROWS else rows[:0], [])
    for_scale = random[: int(SCALE_SHARE * len(rows))]
    complete = for_scale[~has_gaps[for_scale]]
    if len(rows) - len(for_scale) < calibration_rows_needed(alpha) or len(complete) < LEAST_GAP_ROWS:
        note = "there are too few rows to fit the scale of scores of rows with missing values again: it stays as it is"
        return GapSplit(rows, rows[:0], [note])
    note = (
        f"{len(for_scale):,} rows fit the scale of scores of rows with missing values, and calibrate nothing, so that "
        "the calibration rows are exchangeable with new rows"
    )
    return GapSplit(np.sort(random[len(for_scale) :]), complete, [note])


def refit_gap_scores(module: Any, table: Table, split: GapSplit) -> bool:
    """Fit the scale of the scores of rows with missing values again, and replace it in `module`.

    Return False, and change nothing, if no row of `split` fits the scale.

    Args:
        module: the module of an artifact, not frozen.
        table: the rows to which the indices in `split` refer.
    """
    if not len(split.complete):
        return False
    fresh = fit_gap_scores(module, torch.from_numpy(table.x.take(split.complete)), seed=0)
    for name, buffer in fresh.named_buffers():
        setattr(module.gap_scores, name, buffer)
    return True
