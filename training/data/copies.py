"""Find rows that are copies of each other: equal rows, and rows that differ by far less than distinct rows do.

Copies must stay together when a table is split. If a fit row has a copy among the calibration rows, the model knows
the calibration row, its score is too low, and fresh rows raise false alarms.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.data.row_store import Floats, RowStore

MAX_COMPARED_ROWS = 5_000  # near-copies are searched only among at most this many distinct rows: the work is quadratic
MAX_COMPARED_COLUMNS = 32  # wider rows are projected on this many random directions, which nearly keep distances
COMPARED_AT_ONCE = 512  # rows per block of the matrix of distances
# Two rows are near-copies if the root of their mean squared difference per column is at most one of these tolerances,
# in units of the columns' spread.
TOLERANCES = (0.2, 0.14, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 5e-3, 2e-3, 1e-3, 1e-4, 1e-5, 1e-6)
GAP = 2.0  # distances between near-copies are at most the tolerance, and other distances at least GAP times as large
MAX_EXCEPTIONS = 0.3  # share of the near-copies, and of their groups, that may violate this
MIN_NEAR_SHARE = 0.01  # with a smaller share of near-copies, their distances may be a coincidence
MIN_NEAR_GROUPS = 100  # fewer groups are the states of a machine rather than copies of rows

Hashes = npt.NDArray[np.uint64]
Groups = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Copies:
    """The groups of copies in a table of N rows.

    Args:
        groups: the group of each row, [N], numbered from 0 to `distinct` - 1 in the order of the groups' first rows.
        distinct: the number of groups: how many rows remain if each group keeps one row.
        equal: how many rows remain if only exactly equal rows are merged.
    """

    groups: Groups
    distinct: int
    equal: int

    @property
    def first_rows(self) -> npt.NDArray[np.int64]:
        """The index of the first row of each group, [distinct]."""
        return _first_rows(self.groups, self.distinct)


def find_copies(x: RowStore) -> Copies:
    """Return the groups of copies among the rows of `x`."""
    equal, count = _number_groups(np.concatenate([row_hashes(rows) for _, rows in x.blocks()]))
    first = _first_rows(equal, count)
    groups, distinct = equal, count
    if count <= MAX_COMPARED_ROWS and x.width > 0:
        near = _near_groups(x.take(first))
        if near is not None:
            groups, distinct = _number_groups(near[equal])
    return Copies(groups, distinct, count)


def row_hashes(rows: Floats, mantissa_bits: int = 23) -> Hashes:
    """Return a 64-bit hash of each row [n, D]. Rows that are equal after rounding have equal hashes.

    Args:
        mantissa_bits: precision to which values are rounded; 23 is all bits of a float32.
    """
    values = np.ascontiguousarray(rows, np.float32) + np.float32(0)  # turns -0 into 0
    values[np.isnan(values)] = np.nan  # NaN has many bit patterns
    bits = values.view(np.uint32).astype(np.uint64)  # [n, D]
    if (dropped := 23 - mantissa_bits) > 0:
        bits = (bits + np.uint64(1 << (dropped - 1))) >> np.uint64(dropped)
    bits = _mix(bits + np.uint64(1))
    weights = np.random.RandomState(0).randint(1, 2**63 - 1, rows.shape[1], np.int64).astype(np.uint64) | np.uint64(1)
    return _mix((bits * weights).sum(axis=1, dtype=np.uint64))


def _mix(values: Hashes) -> Hashes:
    """Return `values` with their bits mixed (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _number_groups(keys: npt.NDArray[np.integer]) -> tuple[Groups, int]:
    """Return the group of each key, [n], numbered in the order of first appearance, and the number of groups."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)], len(first)


def _first_rows(groups: Groups, count: int) -> Groups:
    """Return the index of the first row of each of `count` groups."""
    first = np.full(count, len(groups), np.int64)
    np.minimum.at(first, groups, np.arange(len(groups)))
    return first


def _near_groups(rows: Floats) -> Groups | None:
    """Return the group of near-copies to which each of the distinct rows [n, D] belongs; None if there are no copies.

    Near-copies are recognised by a gap: rows have neighbours within a tolerance, but almost none between the tolerance
    and GAP times the tolerance. Distances between independent rows have no such gap.
    """
    points = _scaled(rows)
    nearest = _nearest_distances(points)
    for tolerance in TOLERANCES:
        inside = int((nearest <= tolerance).sum())
        if inside < max(2, MIN_NEAR_SHARE * len(rows)):
            return None  # smaller tolerances find still fewer
        if (nearest <= GAP * tolerance).sum() - inside <= MAX_EXCEPTIONS * inside:
            groups = _linked_groups(points, tolerance)
            if groups is not None:
                return groups
    return None


def _scaled(rows: Floats) -> npt.NDArray[np.float64]:
    """Return rows [n, D] as points whose Euclidean distances are root mean squared differences per varying column."""
    x = rows.astype(np.float64)
    with np.errstate(all="ignore"):
        missing = np.isnan(x)
        x[missing] = 0.0
        low, high = np.percentile(x, (16, 84), axis=0)
        spread = (high - low) / 2  # the standard deviation of a Gaussian, but not swayed by outliers
        deviation = x.std(axis=0)
        spread = np.where(spread > 1e-3 * deviation, spread, deviation)
        varying = (spread > 0) & np.isfinite(spread)
        x = (x[:, varying] - np.median(x[:, varying], axis=0)) / spread[varying]
    x = np.column_stack((np.clip(x, -1e6, 1e6), 10.0 * missing[:, missing.any(axis=0)]))
    width = x.shape[1]
    if width > MAX_COMPARED_COLUMNS:
        directions = np.random.RandomState(0).standard_normal((width, MAX_COMPARED_COLUMNS))
        return np.asarray(x @ directions / np.sqrt(width * MAX_COMPARED_COLUMNS))
    return np.asarray(x / np.sqrt(max(width, 1)))


def _blocks_of_squared_distances(
    points: npt.NDArray[np.float64],
) -> Iterator[tuple[int, npt.NDArray[np.float64]]]:
    """Yield the squared distances from each block of points to all points [n, d], with the index of the block."""
    squares = np.square(points).sum(axis=1)  # [n]
    for start in range(0, len(points), COMPARED_AT_ONCE):
        some = slice(start, start + COMPARED_AT_ONCE)
        distances = points[some] @ points.T
        distances *= -2.0
        distances += squares
        distances += squares[some, None]
        yield start, distances


def _nearest_distances(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the distance of each of the points [n, d] to its nearest other point, [n]."""
    nearest = np.empty(len(points))
    for start, squared in _blocks_of_squared_distances(points):
        own = np.arange(len(squared))
        squared[own, start + own] = np.inf
        nearest[start : start + len(squared)] = np.sqrt(np.maximum(squared.min(axis=1), 0.0))
    return nearest


def _linked_groups(points: npt.NDArray[np.float64], tolerance: float) -> Groups | None:
    """Return the groups of points [n, d] that are linked by distances of at most `tolerance`.

    The result is None if there is no gap between the groups, as on a densely sampled line or in a slow time series, or
    if there are fewer than MIN_NEAR_GROUPS groups.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first = np.empty(len(points), np.int64)  # the first point within the tolerance, possibly the point itself
    for start, squared in _blocks_of_squared_distances(points):
        first[start : start + len(squared)] = (squared <= tolerance**2).argmax(axis=1)
    links = coo_array((np.ones(len(points)), (np.arange(len(points)), first)), shape=(len(points), len(points)))
    count, groups = connected_components(links, directed=False)
    if count < MIN_NEAR_GROUPS:
        return None
    near_other = np.zeros(count, bool)  # whether a group is too near to another group
    for start, squared in _blocks_of_squared_distances(points):
        own = groups[start : start + len(squared)]
        near_other[own[((squared <= (GAP * tolerance) ** 2) & (own[:, None] != groups)).any(axis=1)]] = True
    has_copies = np.bincount(groups) > 1
    return None if near_other[has_copies].mean() > MAX_EXCEPTIONS else groups.astype(np.int64)
