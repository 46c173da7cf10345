"""Convert rows to the units of the pool, by what is usual for a group at an hour of the week.

Hosts differ: 20 GB of memory may be usual on one host and 200 GB on another, so a model of all hosts would see these
differences, and not a leak of 6 GB. A row of a group is therefore converted before the model sees it:

    x' = (x - location of the group and the time) * scale of the pool / scale of the group + location of the pool

The pool is all groups together. Rows of the pool are not converted. Rows of a group without a baseline of its own are
treated as rows of the pool.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from models.season import Floats, Period, columns, encode, to_local

FEATURE_BUFFERS = ("feature_location", "feature_scale")
PART_VALUES = 1 << 21  # location coefficients that are copied at once, to limit memory

Array = npt.NDArray[np.float32]
Index = npt.NDArray[np.intp]


class FeatureBaseline:
    """The baseline of the features of all groups. In shapes: G groups, D features, E encodings, B rows.

    Args:
        location: coefficients of the location, [G + 1, D, E] float32, in raw units. The last entry is for the
            pool, of which only the constant is used.
        scale: positive, [G + 1, D] float32, in raw units. The last entry is for the pool.
        periods: the periods of the seasons.
        moments, offsets: of the time zone, see `models.season.offsets_of_zone`.

    Raises:
        ValueError: the arrays do not fit together.
    """

    def __init__(
        self,
        location: npt.NDArray[np.generic],
        scale: npt.NDArray[np.generic],
        periods: Sequence[Period],
        moments: Floats,
        offsets: Floats,
    ) -> None:
        shape = (*scale.shape, columns(periods))
        if scale.ndim != 2 or location.shape != shape or location.dtype.kind != "f" or scale.dtype.kind != "f":
            raise ValueError(
                f"expected feature_location of the shape {list(shape)} for feature_scale of the shape "
                f"{list(scale.shape)}, got {location.dtype} {list(location.shape)}"
            )
        self.location, self.scale = location.astype(np.float32), scale.astype(np.float32)
        if not (np.isfinite(self.location).all() and np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError("expected finite numbers in feature_location, and positive ones in feature_scale")
        self.periods, self._moments, self._offsets = tuple(periods), moments, offsets
        self.pool = len(scale) - 1
        self._centre = self.location[-1, :, 0].astype(np.float64)  # [D]
        self._factors = self.scale[-1].astype(np.float64) / self.scale.astype(np.float64)  # [G + 1, D]

    @property
    def width(self) -> int:
        """The number of features, D."""
        return int(self.scale.shape[1])

    def select(self, groups: npt.NDArray[np.int64]) -> "FeatureBaseline":
        """Return the baseline of the groups with these indices, in this order, and of the pool."""
        kept = np.append(groups, self.pool)
        return FeatureBaseline(self.location[kept], self.scale[kept], self.periods, self._moments, self._offsets)

    def to_pool(self, x: Array, group: Index, time: Floats) -> Array:
        """Return the rows x [B, D] converted to the units of the pool. NaN stays NaN.

        Args:
            x: rows in raw units, [B, D].
            group: the index of each row's group, or that of the pool, [B].
            time: Unix times in seconds, [B]; NaN if unknown: the row is then compared with the mean over the week.
        """
        return self._convert(x, group, time, is_inverse=False)

    def from_pool(self, x: Array, group: Index, time: Floats) -> Array:
        """Return the rows x [B, D] converted back to the raw units of their groups; the inverse of `to_pool`."""
        return self._convert(x, group, time, is_inverse=True)

    def _convert(self, x: Array, group: Index, time: Floats, *, is_inverse: bool) -> Array:
        converted = np.array(x, np.float32)
        (rows,) = np.nonzero(group != self.pool)
        step = max(1, PART_VALUES // self.location[0].size)
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            values, factors = x[part].astype(np.float64), self._factors[group[part]]
            location = self._location(group[part], time[part])
            if is_inverse:
                values = (values - self._centre) / factors + location
            else:
                values = (values - location) * factors + self._centre
            with np.errstate(over="ignore"):  # a value that overflows counts as infinite, as in the model
                converted[part] = values
        return converted

    def _location(self, group: Index, time: Floats) -> Floats:
        """Return the usual values of the features, [B, D]."""
        coefficients = self.location[group].astype(np.float64)  # [B, D, E]
        if not self.periods:
            return coefficients[:, :, 0]
        encodings = encode(to_local(time, self._moments, self._offsets), self.periods)  # [B, E]
        usual: Floats = (coefficients * encodings[:, None, :]).sum(axis=2)
        return usual
