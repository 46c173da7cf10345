"""Prepare a table for fitting: read the rows and compute the statistics that all kinds of models need."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.feature_baseline import FeatureBaseline
from models.manifest import Window
from models.pca import PCA
from models.policy_rules import AppliedPolicy
from models.scaling import Scaling, standardise
from training.data.conditions import CodedConditions, RowsWithConditions
from training.data.moments import Moments, compute_moments
from training.data.row_store import Floats, RowStore, column_medians
from training.data.table import MAX_HELD_OUT_BYTES, MAX_HELD_OUT_ROWS, Split, Table
from training.data.time_split import TimeSplit, describe_split
from training.data.windows import TableWindows
from training.fitting.pca import pca_from_moments, spectrum_from_moments
from training.fitting.whitening import most_concentrated_rows

SPECTRUM_SIZE = 256  # `PreparedData.spectrum` returns at most this many eigenvalues
MAX_COVARIANCE_FEATURES = 4096  # with more features, computing the covariance's eigenvectors would take hours


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The windows whose summaries are the rows of a `PreparedData`.

    Args:
        rows: the rows themselves, with the same split as the summaries.
        in_table: the windows of the rows, in raw units.
        scaling: converts the rows from raw units to model units, in which they are summarised.
        notes: what the user should know about the windows.
    """

    rows: "PreparedData"
    in_table: TableWindows
    scaling: Scaling
    notes: list[str]

    @property
    def window(self) -> Window:
        """How many rows a window has, and how they are summarised."""
        return self.in_table.window


@dataclass(frozen=True, kw_only=True)
class ScaledByGroup:
    """How the rows of a `PreparedData` were converted into the units of the pool.

    Args:
        source: the rows in raw units, with the same split.
        features: the baseline that has converted them.
        own: the groups in `features`, as indices of the groups of the timeline, ascending.
    """

    source: "PreparedData"
    features: FeatureBaseline
    own: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A table, with the rows and statistics that all kinds of models need.

    Args:
        split: the indices of the fit rows, the held-out rows and the calibration rows.
        medians: median of each column over the fit rows, [D]; NaN for a column without values in the fit rows. For a
            level of a category, it is the share of the rows that have the level.
        fill: the medians, [D], which replace missing values; None if the table is complete.
        moments: moments of the fit rows in raw units. Above MAX_COVARIANCE_FEATURES features, they lack a covariance.
        held_out: held-out rows [M, D] in raw units, NaN where a value is missing.
        calibration: calibration rows [C, D], in the same form as `held_out`.
        sample: all fit rows, or as many as may be kept in memory, [S, D], in the same form as `held_out`.
        windows: the windows whose summaries are the rows of `table`; None if the model judges each row alone.
        policy: the policy, which has chosen the calibration rows; None if there is none.
        by_group: the rows in raw units, if those here are in the units of the pool. The rows in `calibration` are then
            as the model gets them if their group is unknown: the calibration of the artifact is for rows without one.
        conditions: the conditions of the rows of `table`; None if the model knows no condition.
    """

    table: Table
    split: Split
    medians: Tensor
    fill: Tensor | None
    moments: Moments
    held_out: Tensor
    calibration: Tensor
    sample: Tensor
    windows: Windows | None = None
    policy: AppliedPolicy | None = None
    by_group: ScaledByGroup | None = None
    conditions: CodedConditions | None = None

    @property
    def store(self) -> RowStore:
        """The inputs of the model for all rows of `table`, in raw units: [N, D], or [N, D + C] with conditions."""
        return self.table.x if self.conditions is None else RowsWithConditions(self.table.x, self.conditions)

    def with_conditions(self, rows: Tensor, indices: npt.NDArray[np.int64]) -> Tensor:
        """Return the inputs of the model for `rows` [B, D], which have these `indices` in `table`.

        They are the rows themselves or, with conditions, [B, D + C].
        """
        if self.conditions is None:
            return rows
        return torch.cat((rows, torch.from_numpy(self.conditions.one_hot(indices[: len(rows)]))), dim=1)

    @property
    def held_out_inputs(self) -> Tensor:
        """The inputs of the model for the held-out rows, [M, D] or [M, D + C], in the form of `held_out`."""
        return self.with_conditions(self.held_out, self.split.held_out)

    @property
    def calibration_inputs(self) -> Tensor:
        """The inputs of the model for the calibration rows, in the form of `held_out_inputs`."""
        return self.with_conditions(self.calibration, self.split.calibration)

    @property
    def sample_inputs(self) -> Tensor:
        """The inputs of the model for the rows in `sample`, in the form of `held_out_inputs`."""
        return self.with_conditions(self.sample, self.split.fit)

    @property
    def rows(self) -> "PreparedData":
        """The rows of the source: those that the windows consist of, if there are windows."""
        return self if self.windows is None else self.windows.rows

    @property
    def source_rows(self) -> "PreparedData":
        """The rows of the source in raw units."""
        return self.rows if self.rows.by_group is None else self.rows.by_group.source

    @property
    def split_notes(self) -> list[str]:
        """What the user should know about a split by time: the periods, and groups that are not in all parts."""
        if self.windows is not None:
            return [*self.windows.notes, *self.windows.rows.split_notes]
        if self.table.timeline is None or not isinstance(self.split, TimeSplit):
            return []
        return describe_split(self.table.timeline, self.split)

    @property
    def notes(self) -> list[str]:
        """What the user should know about the rows."""
        table = self.rows.table
        of_conditions = [] if self.conditions is None else self.conditions.notes
        return [*table.notes, *table.warnings, *self.split_notes, *of_conditions]

    @property
    def category_sizes(self) -> tuple[int, ...]:
        """The number of levels of each category. Their features are the last ones."""
        return tuple(len(category.levels) for category in self.table.categories)

    @property
    def images(self) -> bool:
        """Whether the rows are images."""
        return self.table.pixel_range is not None

    def fill_missing(self, rows: Tensor) -> Tensor:
        """Return rows [B, D] with the medians in place of missing values."""
        return rows if self.fill is None else torch.where(rows.isnan(), self.fill, rows)

    def scaled_moments(self, scaling: Scaling) -> Moments:
        """Return the moments of the fit rows in the model units of `scaling`."""
        return self.moments.scaled(scaling.shift, scaling.scale)

    def pca(self, scaling: Scaling, latents: int) -> PCA | None:
        """Return the PCA of the fit rows in model units.

        The result is None if there is no covariance, or if there are too few features or rows for the latents.
        """
        if self.moments.covariance is None or latents > min(self.table.x.width, self.moments.rows - 1):
            return None
        return pca_from_moments(self.scaled_moments(scaling), latents)

    def spectrum(self, scaling: Scaling) -> Tensor:
        """Return the largest eigenvalues of the fit rows' covariance in model units, descending, float64."""
        if self.moments.covariance is None:
            return torch.zeros(0, dtype=torch.float64)
        return spectrum_from_moments(self.scaled_moments(scaling))[:SPECTRUM_SIZE]


def prepare_data(table: Table, split: Split, robust: bool = False, policy: AppliedPolicy | None = None) -> PreparedData:
    """Read `table`: compute the moments in one pass, and keep held-out, calibration and sample rows in memory.

    Args:
        robust: use only the fit rows that `most_concentrated_rows` selects from at most MAX_HELD_OUT_ROWS fit rows.
        policy: the policy, which has chosen the calibration rows of `split`; None if there is none.
    """
    x = table.x
    medians = torch.from_numpy(_medians(x, split.fit))
    if table.categories:
        medians[table.categories[0].first :] = _level_shares(x, split.fit, table.categories[0].first)
    fill = medians if table.missing.any() else None
    max_sample = min(MAX_HELD_OUT_ROWS, max(1, MAX_HELD_OUT_BYTES // (4 * x.width)))
    if robust:
        split = replace(split, fit=_most_concentrated(x, split.fit[:max_sample], medians))
    blocks = _fit_blocks(x, split.fit, None if fill is None else fill.numpy())
    return PreparedData(
        table=table,
        split=split,
        medians=medians,
        fill=fill,
        moments=compute_moments(blocks, with_covariance=x.width <= MAX_COVARIANCE_FEATURES),
        held_out=_read_rows(x, split.held_out),
        calibration=_read_rows(x, split.calibration),
        sample=_read_rows(x, split.fit[:max_sample]),
        policy=policy,
    )


def _medians(x: RowStore, fit: npt.NDArray[np.int64]) -> Floats:
    """Return the median of each column over the rows at `fit`, [D].

    A nearly empty column may have no value in these rows. Its median is then that of its values in all rows.
    """
    medians = column_medians(x, fit)
    empty = np.flatnonzero(np.isnan(medians))
    if len(empty):
        present: list[list[Floats]] = [[] for _ in empty]
        for _, rows in x.blocks():
            for values, column in zip(present, empty, strict=True):
                values.append(rows[~np.isnan(rows[:, column]), column])
        medians[empty] = [np.median(np.concatenate(values)) for values in present]
    return medians


def _level_shares(x: RowStore, fit: npt.NDArray[np.int64], first: int) -> Tensor:
    """Return the share of the fit rows with a level that have each level, [L]: the features from `first` on."""
    sums, count = np.zeros(x.width - first), np.zeros(x.width - first)
    for rows in _fit_blocks(x, fit, None):
        sums += np.nansum(rows[:, first:], axis=0, dtype=np.float64)
        count += (~np.isnan(rows[:, first:])).sum(axis=0)
    return torch.from_numpy(sums / np.maximum(count, 1)).float()


def _fit_blocks(x: RowStore, fit: npt.NDArray[np.int64], fill: Floats | None) -> Iterator[Floats]:
    """Yield the rows at `fit` in blocks, in the order of the table, with missing values filled."""
    indices = np.sort(fit)
    for start, block in x.blocks():
        first, end = np.searchsorted(indices, (start, start + len(block)))
        rows = block[indices[first:end] - start]
        yield rows if fill is None else np.where(np.isnan(rows), fill, rows)


def _most_concentrated(x: RowStore, fit: npt.NDArray[np.int64], medians: Tensor) -> npt.NDArray[np.int64]:
    """Return the indices of the fit rows that lie closest together, in the order of `fit`."""
    rows = _read_rows(x, fit)
    rows = torch.where(rows.isnan(), medians, rows)
    kept: npt.NDArray[np.int64] = most_concentrated_rows(standardise(rows)(rows), torch.tensor(1.0)).numpy()
    return fit[kept]


def _read_rows(x: RowStore, indices: npt.NDArray[np.int64]) -> Tensor:
    """Return the rows at `indices`, in that order. A file is read from start to end, which is faster."""
    order = np.argsort(indices)
    rows = np.empty((len(indices), x.width), np.float32)
    rows[order] = x.take(indices[order])
    return torch.from_numpy(rows)
