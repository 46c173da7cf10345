"""Choose the groups that get a baseline of their own, and the rows that baselines are fitted to."""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from models.manifest import MAX_GROUPS, is_group_name
from training.data.timeline import Timeline

MIN_GROUP_ROWS = 50  # a group with fewer rows before the calibration rows uses the coefficients of the pool
MAX_ROWS = 200_000  # coefficients are fitted to about this many rows (more with many groups), start sets to as many
MAX_GROUP_ROWS, FEWEST_GROUP_ROWS = 5_000, 250  # bounds of the number of rows per group; see `some_per_group`

Indices = npt.NDArray[np.int64]


def some_per_group(timeline: Timeline, rows: Indices, random: np.random.RandomState) -> Indices:
    """Return a random part of `rows`, ascending: of each group at most MAX_ROWS / number of groups, within the bounds.

    Every n-th row would not do, because all of these rows could have the same hour.
    """
    rows = np.sort(rows)
    most = int(np.clip(MAX_ROWS // len(timeline.groups), FEWEST_GROUP_ROWS, MAX_GROUP_ROWS))
    bounds = np.searchsorted(rows, timeline.starts)
    chosen = [rows[start + np.sort(random.permutation(end - start)[:most])] for start, end in pairwise(bounds)]
    return np.concatenate(chosen)


def groups_with_coefficients(timeline: Timeline, rows: Indices) -> Indices:
    """Return the at most MAX_GROUPS groups with the most rows, ascending. They get coefficients of their own."""
    if timeline.group_column is None:
        return np.zeros(0, np.int64)
    counts = np.bincount(timeline.group[rows], minlength=len(timeline.groups))
    is_valid = np.array([is_group_name(name) for name in timeline.groups])
    able = np.flatnonzero((counts >= MIN_GROUP_ROWS) & is_valid)
    return np.sort(able[np.argsort(-counts[able], kind="stable")[:MAX_GROUPS]])
