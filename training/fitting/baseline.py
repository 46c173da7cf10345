"""Fit the baseline: what score is usual for each group at each hour of the week, and the start sets of the groups.

Location and scale of the logarithm of the score are fitted to fit rows and held-out rows, never to calibration rows.
They are therefore fixed functions with regard to the calibration rows, from which the start sets come. Scores of fit
rows are a little too low, because the model was fitted to them. This shifts the location by about a constant, which
shifts the start set by as much, so the p-values stay the same.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from models import artifact
from models.baseline import START_ROWS, Baseline, choose_start_set
from models.manifest import MAX_GROUP_NAME, MAX_GROUPS
from models.pipeline import Pipeline
from models.season import SECONDS, Floats, encode, offsets_of_zone, to_local
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.time_split import TimeSplit
from training.data.timeline import Nanoseconds, Timeline, describe_duration, list_groups
from training.errors import FitError
from training.fitting.feature_baseline import inputs_of_pool
from training.fitting.group_rows import MIN_GROUP_ROWS, Indices, groups_with_coefficients, some_per_group
from training.fitting.prepared_data import PreparedData

MIN_PERIODS = 2  # a season is fitted if the rows before the calibration rows cover this many of its periods
BLOCK_VALUES = 1 << 22  # float32 values that are read and scored at once
# Each group is fitted as if it had this many rows more, which behave as the pool does. The scale is harder to estimate.
LOCATION_ROWS, SCALE_ROWS = (5.0, 30.0), (30.0, 300.0)  # for the constant, and for each other column
CLIP = 4.0  # residuals beyond this many scales are clipped, so that incidents hardly change the coefficients
SMALLEST_SHARE = 1e-6  # scores are raised to this share of their median, because the logarithm of 0 is infinite
TYPICAL_SHIFT = 2.0  # scores that can be negative are raised by this many times the distance from minimum to median

Score = Callable[[Indices], npt.NDArray[np.floating[Any]]]  # returns the scores [n] of the rows [n] of a table


def refuse_short_history(config: TrainConfig, data: PreparedData) -> None:
    """Raise FitError if the rows before the calibration rows are too few to fit the seasons, or a zone is unknown."""
    timeline, split = data.table.timeline, data.split
    if timeline is None or not config.season:
        return
    try:
        offsets_of_zone(config.time_zone)
    except ValueError as error:
        raise FitError(f"--time-zone: {error}") from error
    before = timeline.time[np.concatenate((split.fit, split.held_out))]
    span = int(before.max() - before.min()) + timeline.usual_step
    for period in config.season:
        needed = MIN_PERIODS * SECONDS[period] * 10**9
        if span < needed:
            raise FitError(
                f"--season {period} needs at least {describe_duration(needed)} of rows before the calibration rows, "
                f"got {describe_duration(span)}: add rows (a fifth of them calibrates), or leave out {period}"
            )


def fit_baseline(config: TrainConfig, pipeline: Pipeline, data: PreparedData) -> Baseline | None:
    """Return the baseline of a model; None if the rows have no times.

    Args:
        pipeline: the model of the rows, or of the summaries if `data` has windows.
    """
    timeline, split = data.rows.table.timeline, data.rows.split
    if timeline is None or not isinstance(split, TimeSplit):
        return None
    moments, offsets = offsets_of_zone(config.time_zone)
    random = np.random.RandomState(config.seed)
    place = _places(data)

    def score(rows: Indices) -> Floats:
        return _scores(pipeline, data.table.x, place[rows])

    def score_as_pool(rows: Indices) -> Floats:
        return _scores_as_pool(pipeline, data, rows)

    before = np.concatenate((split.fit, split.held_out_period))
    rows = some_per_group(timeline, before[place[before] >= 0], random)
    scores = score(rows)
    by_group = data.rows.by_group
    as_pool = scores if by_group is None else score_as_pool(rows)
    shift, smallest = _shift(np.concatenate((scores, as_pool)))
    values = np.log(np.maximum(scores + shift, smallest))
    encodings = encode(to_local(_seconds(timeline.time[rows]), moments, offsets), config.season)
    own = groups_with_coefficients(timeline, rows)
    features: dict[str, npt.NDArray[np.generic]] = {}
    if by_group is not None:
        own = np.intersect1d(own, by_group.own)
        of_own = by_group.features.select(np.searchsorted(by_group.own, own))
        features = {"feature_location": of_own.location, "feature_scale": of_own.scale}
    coefficients = _fit_coefficients(values, encodings, timeline.group[rows], own)
    if by_group is not None:
        values = np.log(np.maximum(as_pool + shift, smallest))
        coefficients[-1] = _fit_coefficients(values, encodings, timeline.group[rows], own[:0])[-1]
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "coefficients": coefficients.astype(np.float32),
        "start_sets": np.zeros((len(own) + 2, START_ROWS), np.float32),
        "has_start_set": np.append(np.zeros(len(own), bool), [True]),
        "moments": moments,
        "offsets": offsets,
        "shift": np.array(shift),
        "smallest": np.array(smallest),
        **features,
    }
    baseline = Baseline([timeline.groups[group] for group in own], config.season, arrays)
    calibration = split.calibration_period[place[split.calibration_period] >= 0]
    return fit_start_sets(baseline, timeline, calibration, score, score_as_pool if features else score)


def fit_start_sets(
    baseline: Baseline, timeline: Timeline, calibration: Indices, score: Score, score_as_pool: Score
) -> Baseline:
    """Return `baseline` with start sets from calibration rows.

    Args:
        timeline: the times and groups of the rows of a table.
        calibration: which of these rows calibrate, by their numbers.
        score: scores rows of the table.
        score_as_pool: scores them as rows of an unknown group; only a model that is scaled by group scores them
            otherwise.
    """
    rows = some_per_group(timeline, calibration, np.random.RandomState(0))  # [n]
    scores = score(rows).astype(np.float32)
    index = np.array([baseline.find(name) for name in timeline.groups])[timeline.group[rows]]  # [n]
    time = _seconds(timeline.time[rows])
    sets = np.empty((baseline.pool + 2, START_ROWS), np.float32)
    as_pool = scores if score_as_pool == score else score_as_pool(rows).astype(np.float32)
    sets[baseline.pool] = choose_start_set(baseline.adjust(as_pool, np.full(len(rows), baseline.pool), time))
    has_own = index < baseline.pool
    adjusted = baseline.adjust(scores, index, time)
    sets[-1] = choose_start_set(adjusted[has_own]) if has_own.any() else sets[baseline.pool]
    has_start_set = np.zeros(baseline.pool + 1, bool)
    has_start_set[-1] = True
    order = np.argsort(index, kind="stable")
    bounds = np.searchsorted(index[order], np.arange(baseline.pool + 1))
    for group in range(baseline.pool):
        of_group = adjusted[order[bounds[group] : bounds[group + 1]]]
        has_start_set[group] = len(of_group) >= START_ROWS
        sets[group] = choose_start_set(of_group) if has_start_set[group] else sets[-1]
    arrays = {**baseline.arrays, "start_sets": sets, "has_start_set": has_start_set}
    return Baseline(baseline.groups, baseline.periods, arrays)


def describe_groups(baseline: Baseline, timeline: Timeline) -> Iterator[str]:
    """Yield which groups are judged by the pool, for the user."""
    if timeline.group_column is None:
        return
    index = np.array([baseline.find(name) for name in timeline.groups])
    unknown = np.flatnonzero(index == baseline.pool)
    if len(unknown):
        yield (
            f"{len(unknown):,} of {len(index):,} groups have no baseline of their own, so their scores are compared "
            f"with those of all groups together ({list_groups(timeline, unknown)}): a baseline needs "
            f"{MIN_GROUP_ROWS} rows before the calibration rows, and a name of at most {MAX_GROUP_NAME} characters "
            f"that print; at most {MAX_GROUPS:,} groups have one"
        )
    known = np.flatnonzero(index < baseline.pool)
    few = known[[baseline.start_set(group)[1] == "pool" for group in index[known]]]
    if len(few):
        yield (
            f"{len(few):,} of {len(index):,} groups have fewer than {START_ROWS} calibration rows, so the calibration "
            f"of all groups together is theirs ({list_groups(timeline, few)})"
        )


def _places(data: PreparedData) -> Indices:
    """Return where the row of `data.table` for each of the N rows of the source is, [N]; -1 if it has none.

    A row whose window is too short has no summaries.
    """
    if data.windows is None:
        return np.arange(len(data.table.x))
    usable = data.windows.in_table.judged
    return np.where(usable, np.cumsum(usable) - 1, -1)


def _scores(pipeline: Pipeline, x: RowStore, rows: Indices) -> Floats:
    """Return the scores of the rows with the indices `rows`, which ascend, [n]."""
    found = np.empty(len(rows))
    block = max(1, BLOCK_VALUES // x.width)
    with torch.inference_mode():
        for start in range(0, len(rows), block):
            some = np.ascontiguousarray(x.take(rows[start : start + block]), np.float32)
            found[start : start + block] = artifact.score(pipeline, torch.from_numpy(some))[0].double().numpy()
    return found


def _scores_as_pool(pipeline: Pipeline, data: PreparedData, rows: Indices) -> Floats:
    """Return the scores [n] that rows of the source get if their group is unknown. Their windows must be usable."""
    found = np.empty(len(rows))
    block = max(1, BLOCK_VALUES // data.table.x.width)
    with torch.inference_mode():
        for start in range(0, len(rows), block):
            inputs = inputs_of_pool(data, rows[start : start + block])
            found[start : start + block] = artifact.score(pipeline, inputs)[0].double().numpy()
    return found


def _shift(scores: Floats) -> tuple[float, float]:
    """Return `shift` and `smallest` of the baseline (see `models.baseline`) for finite scores [n].

    The scores of a VAE can be negative. They are raised until the logarithm is not much curved.
    """
    scores = scores[np.isfinite(scores)]
    median, low = float(np.median(scores)), float(scores.min())
    shift = 0.0 if low >= 0.0 else TYPICAL_SHIFT * (median - low) - median
    return shift, max(1e-30, SMALLEST_SHARE * (median + shift))


def _fit_coefficients(values: Floats, encodings: Floats, group: npt.NDArray[np.int32], own: Indices) -> Floats:
    """Return the coefficients [G + 1, 2, E] of location and scale: of each group in `own`, and of the pool.

    Args:
        values: logarithms of scores, [n].
        encodings: of the times of the rows, [n, E].
        group: the group of each row, [n], ascending.
        own: the groups with coefficients of their own, [G], ascending.
    """
    finite = np.isfinite(values)
    values, encodings, group = values[finite], encodings[finite], group[finite]
    width = encodings.shape[1]
    zero = np.zeros(width)
    found = np.empty((len(own) + 1, 2, width))
    found[-1, 0] = _clipped_ridge(encodings, values, zero, _weights(LOCATION_ROWS, width, is_pool=True))
    found[-1, 1] = _fit_scale(encodings, values - encodings @ found[-1, 0], zero, is_pool=True)
    bounds = [slice(*np.searchsorted(group, (index, index + 1))) for index in own]
    residuals = []
    for index, rows in enumerate(bounds):
        found[index, 0] = _clipped_ridge(encodings[rows], values[rows], found[-1, 0], _weights(LOCATION_ROWS, width))
        residuals.append(values[rows] - encodings[rows] @ found[index, 0])
    if residuals:
        # The scale of the pool is also that of the differences between groups, so groups resemble their own pool.
        together = np.concatenate([encodings[rows] for rows in bounds])
        within = _fit_scale(together, np.concatenate(residuals), zero, is_pool=True)
    for index, (rows, residual) in enumerate(zip(bounds, residuals, strict=True)):
        found[index, 1] = _fit_scale(encodings[rows], residual, within)
    return found


def _weights(rows: tuple[float, float], width: int, *, is_pool: bool = False) -> Floats:
    """Return the weights [E] of a ridge regression. The constant of the pool is not shrunk."""
    weights = np.full(width, rows[1])
    weights[0] = 1e-9 if is_pool else rows[0]
    return weights


def _clipped_ridge(encodings: Floats, values: Floats, centre: Floats, weights: Floats) -> Floats:
    """Return coefficients [E] for `values` [n], fitted again after large residuals were clipped."""
    if not len(values):
        return centre
    first = _ridge(encodings, values, centre, weights)
    expected = encodings @ first
    residual = values - expected
    most = CLIP * np.median(np.abs(residual - np.median(residual))) * 1.5
    return _ridge(encodings, expected + np.clip(residual, -most, most), centre, weights)


def _fit_scale(encodings: Floats, residual: Floats, centre: Floats, *, is_pool: bool = False) -> Floats:
    """Return coefficients [E] of the mean absolute residual; the first is positive."""
    if not len(residual):
        return np.where(np.arange(len(centre)) == 0, np.maximum(centre, 1e-6), centre)
    size = np.abs(residual)
    size = np.minimum(size, max(CLIP * float(np.median(size)), 1e-6))
    weights = _weights(SCALE_ROWS, encodings.shape[1], is_pool=is_pool)
    found = _ridge(encodings, size, centre, weights)
    found[0] = max(found[0], 1e-6)
    return found


def _ridge(encodings: Floats, values: Floats, centre: Floats, weights: Floats) -> Floats:
    """Return the coefficients c [E] with the smallest |values - encodings c|^2 + sum of weights (c - centre)^2."""
    # einsum and not @, which would start threads for each of thousands of small products.
    gram = np.einsum("ni,nj->ij", encodings, encodings) + np.diag(weights)
    residual = values - np.einsum("ni,i->n", encodings, centre)
    found: Floats = centre + np.linalg.solve(gram, np.einsum("ni,n->i", encodings, residual))
    return found


def _seconds(time: Nanoseconds) -> Floats:
    """Return Unix times in seconds for times in nanoseconds."""
    return time / 1e9
