"""The baseline: what score is usual for a group, such as a host, at an hour of the week.

The adjusted score of a row is u = (log(score + shift) - location) / scale. Location and scale are linear functions of
the encodings of the time (`models.season`), with coefficients of the group. A group without coefficients of its own has
those of the pool, which is all groups together. Models that were trained without times have no baseline.

With `--scale-by-group`, the model sees the rows of a group in the units of the pool (`models.feature_baseline`).

A start set is a set of adjusted scores with which the calibration of a group begins. The adjusted scores of a group are
compared with those of the same group: Mondrian conformal prediction (Vovk, Gammerman & Shafer, "Algorithmic learning in
a random world", 2005, section 4.5). If the rows of a group are exchangeable with its calibration rows, which the
baseline was not fitted to, then P(p <= alpha) <= alpha within that group. The start set of the pool promises this only
on average over groups that are drawn like the groups in training.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from models.feature_baseline import FEATURE_BUFFERS, FeatureBaseline
from models.season import Floats, Period, columns, encode, encode_one, to_local

START_ROWS = 100  # adjusted scores in a start set, and the calibration rows that a group needs for a set of its own
MIN_SCALE_SHARE = 0.25  # the scale of a group is at least this share of its mean over the periods
BUFFERS = (
    "coefficients", "start_sets", "has_start_set", "moments", "offsets", "shift", "smallest",
)  # fmt: skip

Origin = Literal["group", "pool"]


class BaselineBuffers(nn.Module):
    """The arrays of a `Baseline` in an artifact.

    Args:
        arrays: the arrays by name: those of BUFFERS and, if rows are scaled by group, those of FEATURE_BUFFERS.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[np.generic]]) -> None:
        super().__init__()
        for name in (*BUFFERS, *(name for name in FEATURE_BUFFERS if name in arrays)):
            self.register_buffer(name, torch.from_numpy(np.array(arrays[name])))


class Baseline:
    """The baseline of all groups, in NumPy. In shapes: G groups, E encodings, B rows, Q = START_ROWS.

    Args:
        groups: names of the groups that have coefficients of their own, [G].
        periods: the periods of the seasons.
        arrays: coefficients: [G + 1, 2, E] float32, of location and scale; the last are those of the pool.
            start_sets: [G + 2, Q] float32, ascending. Set G is for rows adjusted by the pool's coefficients. Set G + 1
            is for groups with coefficients of their own, but too few calibration rows.
            has_start_set: [G + 1] bool, whether a group has a start set of its own; true for the pool.
            moments, offsets: of the time zone, see `models.season.offsets_of_zone`.
            shift, smallest: scalars; the logarithm is that of max(score + shift, smallest).
            feature_location, feature_scale: see `models.feature_baseline`; absent if rows are not scaled by group.

    Attributes:
        features: converts rows of groups into the units of the pool; None if the model sees rows as they are.

    Raises:
        ValueError: the arrays do not fit together.
    """

    def __init__(
        self, groups: Sequence[str], periods: Sequence[Period], arrays: Mapping[str, npt.NDArray[np.generic]]
    ) -> None:
        self.arrays = {name: np.asarray(arrays[name]) for name in (*BUFFERS, *FEATURE_BUFFERS) if name in arrays}
        self.groups = tuple(groups)
        self.periods = tuple(periods)
        self._check()
        self._coefficients = self.arrays["coefficients"].astype(np.float64)
        self._start_sets = self.arrays["start_sets"].astype(np.float32)
        self._has_start_set = self.arrays["has_start_set"].tolist()
        self._moments, self._offsets = self.arrays["moments"], self.arrays["offsets"]
        self._moment_list, self._offset_list = self._moments.tolist(), self._offsets.tolist()  # faster for one row
        self._shift, self._smallest = float(self.arrays["shift"]), float(self.arrays["smallest"])
        self._index = {name: index for index, name in enumerate(self.groups)}
        self.pool = len(self.groups)  # index of the pool
        self.features = self._read_features()

    def _check(self) -> None:
        count, width = len(self.groups), columns(self.periods)
        changes = self.arrays["moments"].size if "moments" in self.arrays else 0
        expected: dict[str, tuple[tuple[int, ...], str]] = {
            "coefficients": ((count + 1, 2, width), "f"),
            "start_sets": ((count + 2, START_ROWS), "f"),
            "has_start_set": ((count + 1,), "b"),
            "moments": ((changes,), "f"),
            "offsets": ((changes + 1,), "f"),
            "shift": ((), "f"),
            "smallest": ((), "f"),
        }
        for name, (shape, kind) in expected.items():
            array = self.arrays.get(name)
            if array is None or array.shape != shape or array.dtype.kind != kind:
                found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
                raise ValueError(f"expected {name} of the shape {list(shape)}, got {found}")
            if not np.isfinite(array).all():
                raise ValueError(f"expected finite numbers in {name}")
        if (np.diff(self.arrays["moments"]) <= 0).any() or (np.diff(self.arrays["start_sets"], axis=1) < 0).any():
            raise ValueError("expected moments and start_sets in ascending order")
        if self.arrays["smallest"] <= 0 or (self.arrays["coefficients"][:, 1, 0] <= 0).any():
            raise ValueError("expected a positive smallest score and positive scales")

    def _read_features(self) -> FeatureBaseline | None:
        found = [self.arrays[name] for name in FEATURE_BUFFERS if name in self.arrays]
        if not found:
            return None
        if len(found) != len(FEATURE_BUFFERS) or len(found[1]) != self.pool + 1:
            raise ValueError(f"expected {' and '.join(FEATURE_BUFFERS)} of {self.pool + 1} groups")
        return FeatureBaseline(found[0], found[1], self.periods, self._moments, self._offsets)

    def find(self, group: str | None) -> int:
        """Return the index of a group; that of the pool if the group is unknown or has no coefficients of its own."""
        return self.pool if group is None else self._index.get(group, self.pool)

    def adjust(
        self, score: npt.NDArray[np.float32], group: npt.NDArray[np.intp], time: Floats
    ) -> npt.NDArray[np.float32]:
        """Return the adjusted scores [B]. Within a group and a moment, they are in the order of the scores.

        Args:
            score: scores, [B].
            group: results of `find`, [B].
            time: Unix times in seconds, [B]; NaN if the time is unknown. The location and the scale are then the means
                over the seasons.
        """
        if len(score) == 1:
            return self._adjust_one(float(score[0]), int(group[0]), float(time[0]))
        location, scale = self.location_and_scale(group, time)
        adjusted: npt.NDArray[np.float32] = ((self.logarithm(score) - location) / scale).astype(np.float32)
        return adjusted

    def _adjust_one(self, score: float, group: int, time: float) -> npt.NDArray[np.float32]:
        """Return what `adjust` returns for one row, [1]: the same number, in a third of the time."""
        logarithm = np.log(max(score + self._shift, self._smallest))
        own = self._coefficients[group]  # [2, E]
        location, scale = own[0, 0], own[1, 0]
        if self.periods:
            local = time + self._offset_list[bisect_right(self._moment_list, time)]
            location, seasonal = (own * encode_one(local, self.periods)).sum(axis=1)
            scale = max(seasonal, MIN_SCALE_SHARE * scale)
        return np.array([(logarithm - location) / scale], np.float32)

    def logarithm(self, score: npt.NDArray[np.float32]) -> Floats:
        """Return log(score + shift), [B], for scores [B]."""
        result: Floats = np.log(np.maximum(score.astype(np.float64) + self._shift, self._smallest))
        return result

    def location_and_scale(self, group: npt.NDArray[np.intp], time: Floats) -> tuple[Floats, Floats]:
        """Return the location [B] and the scale [B] of log(score + shift), for the arguments of `adjust`."""
        own = self._coefficients[group]  # [B, 2, E]
        if not self.periods:
            return own[:, 0, 0], own[:, 1, 0]
        encodings = encode(to_local(time, self._moments, self._offsets), self.periods)  # [B, E]
        both = (own * encodings[:, None, :]).sum(axis=2)  # [B, 2]
        return both[:, 0], np.maximum(both[:, 1], MIN_SCALE_SHARE * own[:, 1, 0])

    def start_set(self, group: int) -> tuple[npt.NDArray[np.float32], Origin]:
        """Return the start set of a group, [Q], ascending, and whether its scores are of the group or of the pool.

        Args:
            group: a result of `find`.
        """
        if group == self.pool:
            return self._start_sets[self.pool], "pool"
        return (self._start_sets[group], "group") if self._has_start_set[group] else (self._start_sets[-1], "pool")


def choose_start_set(adjusted: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the start set for n adjusted scores of calibration rows, [Q], ascending.

    Element i, counted from 1, is the smallest score of rank at least i (n + 1) / (Q + 1). A further row that is
    exchangeable with the calibration rows exceeds this score with a probability of at most 1 - i / (Q + 1), so the
    conformal p-values from the start set are valid, as are those from all n scores. If n is smaller than START_ROWS,
    they are valid only at alphas of at least 1 / (n + 1).
    """
    n = len(adjusted)
    ranks = np.ceil(np.arange(1, START_ROWS + 1) * (n + 1) / (START_ROWS + 1) - 1e-9).astype(int)
    chosen: npt.NDArray[np.float32] = np.sort(adjusted)[np.minimum(ranks, n) - 1]
    return np.nan_to_num(chosen)  # a score that overflows counts as the largest number
