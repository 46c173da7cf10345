"""Fit which values of the features are usual for each group, and convert rows into the units of the pool.

See `models.feature_baseline`. Everything is fitted to fit rows. Groups share what they have in common (empirical
Bayes): the shape of the season in units of the scale, the scale, and, where groups hardly differ, the location.
"""

from contextlib import closing
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.baseline import Baseline
from models.feature_baseline import FeatureBaseline
from models.season import Floats, encode, offsets_of_zone, to_local
from models.windowed import Summaries
from training.config import TrainConfig
from training.data.ingest import full_disk_as_data_error
from training.data.row_store import RowWriter
from training.data.table import MEMORY_BYTES, Split, Table
from training.data.timeline import Timeline
from training.errors import FitError
from training.fitting.group_rows import MIN_GROUP_ROWS, groups_with_coefficients, some_per_group
from training.fitting.prepared_data import PreparedData, ScaledByGroup, prepare_data

PRIOR_ROWS = 30.0  # fit the season and the scale of a group as if it had this many more rows, all usual for the pool
CLIP = 4.0  # residuals beyond this many scales are clipped, so that incidents hardly change the coefficients
ROUNDS = 3  # number of fits; each clips the values around the fit before it, the first one around the median
TO_DEVIATION = 1.2533  # the standard deviation of normal values is this many times their mean absolute deviation
LEAST_SCALE = 1e-3  # a scale is at least this share of the groups' usual one: a metric that stood still may move later
ROUNDING = 1e-6  # a scale is also at least this share of the level, because values are float32
PART_WINDOWS = 1024  # windows that are summarised at once
MAX_VALUES = 1 << 24  # coefficients; they take 64 MiB

Indices = npt.NDArray[np.int64]


def fit_feature_baseline(config: TrainConfig, table: Table, rows: Indices, own: Indices) -> FeatureBaseline:
    """Return the baseline of the features.

    Args:
        config: the seasons and the time zone.
        table: a table with times.
        rows: the fit rows to use, ascending.
        own: the groups that get a baseline of their own, ascending.

    Raises:
        FitError: the baseline would be too large.
    """
    timeline = table.timeline
    assert timeline is not None
    moments, offsets = offsets_of_zone(config.time_zone)
    encodings = encode(to_local(timeline.time[rows] / 1e9, moments, offsets), config.season)
    width = encodings.shape[1]
    if (len(own) + 1) * table.x.width * width > MAX_VALUES:
        raise FitError(
            f"--scale-by-group would keep {(len(own) + 1) * table.x.width * width:,} numbers "
            f"({len(own):,} groups x {table.x.width:,} features x {width} encodings of the time), expected at most "
            f"{MAX_VALUES:,}: leave out --season, drop features, or leave out --scale-by-group"
        )
    x = table.x.take(rows).astype(np.float64)  # [n, D]
    centre, spread = np.nanmean(x, axis=0), np.nanstd(x, axis=0)
    centre = np.nan_to_num(centre)
    spread = np.where(spread > ROUNDING * np.abs(centre), spread, 1.0)
    bounds = [slice(*np.searchsorted(timeline.group[rows], (group, group + 1))) for group in own]
    filled = [_filled(x[part], centre) for part in bounds]
    zero = np.zeros((width, x.shape[1]))
    location = np.array([_ridge(encodings[part], values, zero) for part, values in zip(bounds, filled, strict=True)])
    scale = np.array(
        [_scale(values - encodings[part] @ found) for part, values, found in zip(bounds, filled, location, strict=True)]
    )  # [G, D]
    rows_of = np.array([part.stop - part.start for part in bounds], np.float64)[:, None]
    scale = _shrunk_scale(scale, rows_of, spread, np.abs(location[:, 0]))
    shape = np.median(location[:, 1:] / scale[:, None], axis=0)  # [E - 1, D], the season in units of the scale
    for index, (part, values) in enumerate(zip(bounds, filled, strict=True)):
        prior = np.concatenate((zero[:1], shape * scale[index]))
        location[index] = _ridge(encodings[part], values, prior)
    location[:, 0] = _shrunk_level(location[:, 0], scale, rows_of)
    pool = zero.copy()
    pool[0] = centre
    both = np.concatenate((location, pool[None])).transpose(0, 2, 1)  # [G + 1, D, E]
    return FeatureBaseline(
        both.astype(np.float32), np.vstack((scale, spread)).astype(np.float32), config.season, moments, offsets
    )


def _filled(values: Floats, centre: Floats) -> Floats:
    """Return values [n, D] with the group's medians in place of missing ones; `centre` if a group has no value."""
    missing = np.isnan(values)
    if not missing.any():
        return values
    empty = missing.all(axis=0)
    medians = centre.copy()
    medians[~empty] = np.nanmedian(values[:, ~empty], axis=0)
    return np.where(missing, medians, values)


def _ridge(encodings: Floats, values: Floats, prior: Floats) -> Floats:
    """Return the coefficients [E, D] of values [n, D], fitted several times to values with clipped residuals.

    Args:
        encodings: [n, E].
        values: [n, D].
        prior: the coefficients [E, D] towards which the fit is shrunk, except the first one, which is the constant.
    """
    weights = np.full(encodings.shape[1], PRIOR_ROWS)
    weights[0] = 1e-9
    gram = encodings.T @ encodings + np.diag(weights)
    level = np.median(values, axis=0)  # subtracted, because large levels would cost precision

    def solve(target: Floats) -> Floats:
        found: Floats = prior + np.linalg.solve(gram, encodings.T @ (target - level - encodings @ prior))
        return found

    expected = np.broadcast_to(level, values.shape)
    for _ in range(ROUNDS):
        residual = values - expected
        most = CLIP * TO_DEVIATION * np.median(np.abs(residual), axis=0)
        most[most == 0] = np.inf  # most rows are equal, so the median gives no limit for the others
        found = solve(expected + np.clip(residual, -most, most))
        expected = level + encodings @ found
    found[0] += level
    return found


def _scale(residual: Floats) -> Floats:
    """Return the scale [D] of residuals [n, D]."""
    size = np.abs(residual)
    most = CLIP * TO_DEVIATION * np.median(size, axis=0)
    clipped = np.where(most > 0, np.minimum(size, most), size)
    scale: Floats = TO_DEVIATION * clipped.mean(axis=0)
    return scale


def _shrunk_scale(scale: Floats, rows: Floats, spread: Floats, level: Floats) -> Floats:
    """Return positive scales [G, D], shrunk towards their geometric mean over the groups.

    Args:
        scale: [G, D].
        rows: how many rows each group has, [G, 1].
        spread: the deviation of all groups together, [D]. It is used if a feature stands still in every group.
        level: absolute values of the locations, [G, D].
    """
    moving = scale > ROUNDING * level
    logarithm = np.log(np.where(moving, scale, 1.0))
    count = moving.sum(axis=0)
    usual = np.where(count > 0, np.exp(logarithm.sum(axis=0) / np.maximum(count, 1)), spread)  # [D]
    least = np.maximum(LEAST_SCALE * usual, ROUNDING * level)  # [G, D]
    found: Floats = np.exp((rows * np.log(np.maximum(scale, least)) + PRIOR_ROWS * np.log(usual)) / (rows + PRIOR_ROWS))
    return np.where(count > 0, found, usual)


def _shrunk_level(level: Floats, scale: Floats, rows: Floats) -> Floats:
    """Return locations [G, D], shrunk towards their mean as far as the groups differ only by chance (empirical Bayes).

    Args:
        level: [G, D].
        scale: [G, D].
        rows: how many rows each group has, [G, 1].
    """
    error = scale**2 / rows  # variance of each location
    between = np.maximum(level.var(axis=0) - error.mean(axis=0), 0.0)  # [D]
    kept = between / np.maximum(between + error, 1e-300)
    found: Floats = level.mean(axis=0) * (1.0 - kept) + level * kept
    return found


def scale_table(table: Table, features: FeatureBaseline, group: npt.NDArray[np.intp]) -> Table:
    """Return `table` in the units of the pool.

    Args:
        table: a table with times, in raw units.
        features: the baseline of the features.
        group: for each group of the table's timeline, its index in `features` or the index of the pool, [G].

    Raises:
        DataError: the disk is full.
    """
    timeline = table.timeline
    assert timeline is not None
    index, time = group[timeline.group], timeline.time / 1e9
    with (
        full_disk_as_data_error(table.source, 4 * len(table.x) * table.x.width),
        closing(RowWriter(table.x.width, np.float32, MEMORY_BYTES)) as writer,
    ):
        for start, block in table.x.blocks():
            rows = slice(start, start + len(block))
            writer.add(features.to_pool(block, index[rows], time[rows]))
        return replace(table, x=writer.rows())


def scale_for_baseline(table: Table, baseline: Baseline) -> Table:
    """Return `table` in the units of the pool if the model of `baseline` scales by group, and else unchanged."""
    if baseline.features is None or table.timeline is None:
        return table
    group = np.array([baseline.find(name) for name in table.timeline.groups], np.intp)
    return scale_table(table, baseline.features, group)


def scale_by_group(config: TrainConfig, table: Table, split: Split) -> tuple[Table, tuple[FeatureBaseline, Indices]]:
    """Return `table` in the units of the pool, and the pair (baseline of its features, groups in this baseline).

    Raises:
        FitError: no group has enough fit rows, or the baseline would be too large.
        DataError: the disk is full.
    """
    timeline = table.timeline
    assert timeline is not None
    rows = some_per_group(timeline, split.fit, np.random.RandomState(config.seed))
    own = groups_with_coefficients(timeline, rows)
    if not len(own):
        raise FitError(
            f"--scale-by-group needs groups with at least {MIN_GROUP_ROWS} fit rows, and no group has so many: add "
            "rows, or leave the option out"
        )
    features = fit_feature_baseline(config, table, rows, own)
    return scale_table(table, features, groups_of(timeline, own)), (features, own)


def with_source(data: PreparedData, table: Table, features: FeatureBaseline, own: Indices) -> PreparedData:
    """Add the rows in raw units to `data`, and treat its calibration rows as rows of an unknown group.

    Args:
        data: rows in the units of the pool.
        table: the same rows in raw units.
        features: the baseline that has converted them.
        own: the groups in `features`.
    """
    by_group = ScaledByGroup(source=prepare_data(table, data.rows.split), features=features, own=own)
    rows = replace(data.rows, by_group=by_group)
    data = rows if data.windows is None else replace(data, windows=replace(data.windows, rows=rows))
    return replace(data, calibration=inputs_of_pool(data, data.rows.split.calibration))


def inputs_of_pool(data: PreparedData, rows: Indices) -> Tensor:
    """Return what the model gets for rows whose group is unknown: rows, or summaries of windows, [n, V].

    Args:
        data: rows that are scaled by group.
        rows: numbers of rows of the source, [n]. In a model with a window, their windows must have enough rows.
    """
    source = data.source_rows.table.x
    if data.windows is None:
        return torch.from_numpy(source.take(rows))
    in_table, summarise = replace(data.windows.in_table, x=source), Summaries(tuple(data.windows.window.scales))
    parts = []
    for start in range(0, len(rows), PART_WINDOWS):
        windows = torch.from_numpy(in_table.take(rows[start : start + PART_WINDOWS]))  # [B, N, D]
        parts.append(summarise(data.windows.scaling(windows), 1.0 - windows.isnan().float().amin(dim=2)))
    return torch.cat(parts)


def groups_of(timeline: Timeline, own: Indices) -> npt.NDArray[np.intp]:
    """Return the index of each group in a baseline of the groups `own`, [G]. Other groups have that of the pool."""
    index = np.full(len(timeline.groups), len(own), np.intp)
    index[own] = np.arange(len(own))
    return index
