"""Which rows of which groups a baseline is fitted to."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from models.manifest import MAX_GROUPS, is_group_name
from training.data.timeline import Timeline

MIN_GROUP_ROWS = 50  # a group with fewer rows before the calibration rows has the coefficients of the pool
MAX_ROWS = 200_000  # rows to which coefficients are fitted, and as many again for the start sets
MAX_GROUP_ROWS, FEWEST_GROUP_ROWS = 5_000, 250  # bounds of the number of rows per group; see `some_per_group`

Indices = npt.NDArray[np.int64]


def some_per_group(timeline: Timeline, rows: Indices, random: np.random.RandomState) -> Indices:
    """Return some of `rows`, at random and ascending: about MAX_ROWS, of each group about as many.

    Rows at equal distances would not do, because they could all have the same hour.
    """
    rows = np.sort(rows)
    most = int(np.clip(MAX_ROWS // len(timeline.groups), FEWEST_GROUP_ROWS, MAX_GROUP_ROWS))
    bounds = np.searchsorted(rows, timeline.starts)
    chosen = [rows[start + np.sort(random.permutation(end - start)[:most])] for start, end in pairwise(bounds)]
    return np.concatenate(chosen)


def groups_with_coefficients(timeline: Timeline, rows: Indices) -> Indices:
    """Return the groups that get coefficients of their own, ascending: at most MAX_GROUPS, those with most rows."""
    if timeline.group_column is None:
        return np.zeros(0, np.int64)
    counts = np.bincount(timeline.group[rows], minlength=len(timeline.groups))
    is_valid = np.array([is_group_name(name) for name in timeline.groups])
    able = np.flatnonzero((counts >= MIN_GROUP_ROWS) & is_valid)
    return np.sort(able[np.argsort(-counts[able], kind="stable")[:MAX_GROUPS]])
