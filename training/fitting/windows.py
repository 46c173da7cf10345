"""Prepare the windows of a table for fitting, and join the fitted model of their summaries with the summaries."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from models.manifest import Window
from models.observation import Observation
from models.pipeline import Pipeline
from models.policy_rules import Policy
from models.scaling import Scaling
from models.windowed import Summaries, Windowed, WindowSummaries
from models.windows import default_scales, summary_names, summary_width
from training.config import TrainConfig
from training.data.conditions import learn_conditions
from training.data.cross_split import cross_split
from training.data.ingest import full_disk_as_data_error
from training.data.row_store import Floats
from training.data.table import MEMORY_BYTES, Split, Table
from training.data.time_split import FIT_SHARE, GAP_ROWS, HELD_OUT_STARTS, split_table
from training.data.timeline import list_groups
from training.data.windows import Repair, summarise_table, windows_of_timeline
from training.errors import FitError
from training.fitting.explanation import MAX_EXPLAINED_FEATURES
from training.fitting.feature_baseline import scale_by_group, with_source
from training.fitting.observation import fit_row_observation
from training.fitting.policy import SCALING_REFUSAL, apply_to_split, valid_range
from training.fitting.prepared_data import PreparedData, Windows, prepare_data
from training.fitting.scaling import fit_scaling
from training.fitting.whitening import MAX_FULL_WIDTH

AUTO_ROWS = (30, 10)  # the windows that --window auto considers; see benchmarks/anomaly/results/server_metrics.md
MIN_FIT_ROWS = 10  # of a group, for each row of the window, in each block; with fewer, the group is too short
MIN_GROUPS = 0.9  # share of the groups that must be long enough
MIN_ROWS_PER_SUMMARY = 20  # fit rows per summary
MAX_FEATURES = MAX_FULL_WIDTH // summary_width(1, (1,))  # with a single scale


def choose_window(config: TrainConfig, table: Table) -> tuple[Window | None, list[str]]:
    """Return the window that `config` asks for, and notes for the user. None: the model judges each row alone.

    `auto` does not compare windows on held-out rows. Measured on nine servers, no criterion without labels chose
    better than the fixed 30 rows.

    Raises:
        FitError: the rows cannot have windows.
    """
    if config.window is None or table.timeline is None:
        return None, []
    if len(table.shape) > 1:
        raise FitError(f"--window needs rows of features, got rows of the shape {list(table.shape)}")
    if config.window != "auto":
        return _window(config.window, table.x.width)
    width = table.x.width
    groups = float(FIT_SHARE) * np.diff(table.timeline.starts)  # fit rows of each group
    least = MIN_FIT_ROWS * len(HELD_OUT_STARTS[config.split])  # fit rows of a group, for each row of the window
    for rows in AUTO_ROWS if width <= MAX_FEATURES else ():
        window, notes = _window(rows, width)
        summaries = summary_width(width, window.scales)
        has_groups = (groups >= least * rows).mean() >= MIN_GROUPS
        if has_groups and groups.sum() >= MIN_ROWS_PER_SUMMARY * summaries:
            reason = (
                f"nine of ten groups have at least {least * rows:,} fit rows, and there are at least "
                f"{MIN_ROWS_PER_SUMMARY} fit rows for each of the {summaries:,} summaries of a window"
            )
            return window, [f"--window auto chose {rows} rows: {reason}", *notes]
    refusal = (
        f"--window auto chose no window: a window of {AUTO_ROWS[-1]} rows needs at least {least * AUTO_ROWS[-1]} fit "
        f"rows in nine of ten groups, at least {MIN_ROWS_PER_SUMMARY} fit rows for each of its "
        f"{summary_width(width, default_scales(AUTO_ROWS[-1])):,} summaries, and at most {MAX_FEATURES} features; "
        "add rows, or give --window a number"
    )
    return None, [refusal]


def _window(rows: int, width: int) -> tuple[Window, list[str]]:
    """Return the window of `rows` rows of `width` features, with as many scales as its explanation allows."""
    scales = default_scales(rows)
    kept = scales
    while len(kept) > 1 and summary_width(width, kept) > MAX_EXPLAINED_FEATURES:
        kept = kept[1:]
    if width > MAX_FEATURES:
        raise FitError(
            f"--window summarises each of the {width:,} features, and a model takes at most {MAX_FULL_WIDTH:,} "
            f"summaries: expected at most {MAX_FEATURES:,} features; drop some with --drop"
        )
    notes = []
    if kept != scales:
        listed = " and ".join(map(str, kept))
        notes.append(f"with {width:,} features, a window is summarised over {listed} rows only, to limit the width")
    return Window(rows=rows, scales=list(kept)), notes


def prepare(config: TrainConfig, table: Table, policy: Policy | None = None) -> tuple[PreparedData, list[str]]:
    """Split and prepare `table` for the options `config`. Return also notes on the choice of the window and the policy.

    Raises:
        DataError: there are too few rows, or the policy leaves no calibration row.
        FitError: the rows cannot have the window that `config` asks for, or the policy does not allow a window.
    """
    window, notes = choose_window(config, table)
    if policy is not None and policy.changes_scores and config.scale_by_group:
        raise FitError(SCALING_REFUSAL)
    gap_rows = GAP_ROWS if window is None else window.rows
    if config.calibration == "cross":
        split: Split = cross_split(len(table.x), config.seed, table.x.width, table.copies)
    else:
        split = split_table(table, config.seed, gap_rows, config.split)
    split, applied, left_out = apply_to_split(policy, table, split)
    scaled, converted = table, None
    if config.scale_by_group:
        scaled, converted = scale_by_group(config, table, split)
    if window is None:
        data, notes = prepare_data(scaled, split, config.robust, applied), [*notes, *left_out]
    else:
        data, notes = replace(prepare_windows(config, scaled, window, split, notes, policy), policy=applied), left_out
    if table.conditions:
        data = replace(data, conditions=learn_conditions(table.conditions, data.split.fit, table.source))
    return (data if converted is None else with_source(data, table, *converted)), notes


def prepare_windows(
    config: TrainConfig,
    table: Table,
    window: Window,
    split: Split,
    notes: Sequence[str] = (),
    policy: Policy | None = None,
) -> PreparedData:
    """Return the summaries of the windows of `table`, prepared for fitting.

    Rows whose window has less than a third of its rows are left out.

    Args:
        split: the split of the rows of `table`. Between two of its parts, a gap of as many rows as a window keeps the
            windows of the parts apart.
        notes: notes that `PreparedData.notes` repeats.
        policy: its valid ranges say which values are left out of means and deviations.

    Raises:
        DataError: the disk is full.
        FitError: too few windows have enough rows.
    """
    assert table.timeline is not None
    in_table = windows_of_timeline(table.x, table.timeline, window, table.timeline.usual_step / 1e9 or None)
    usable = in_table.judged  # [N]
    split = replace(
        split,
        fit=split.fit[usable[split.fit]],
        held_out=split.held_out[usable[split.held_out]],
        calibration=split.calibration[usable[split.calibration]],
    )
    if not len(split.fit) or not len(split.held_out) or not len(split.calibration):
        raise FitError(
            f"too few windows of {window.rows} rows: {len(split.fit):,} to fit, {len(split.held_out):,} held out and "
            f"{len(split.calibration):,} to calibrate; a window begins anew after a gap of more than {window.rows}/3 "
            "usual steps; add rows, or lower --window"
        )
    rows = prepare_data(table, split, config.robust)
    scaling = fit_scaling(rows.moments, config, None, rows.fill)

    def to_model_units(x: Floats) -> Floats:
        u: Floats = scaling(torch.from_numpy(x)).numpy()
        return u

    repair = None if policy is None else _repair(policy, table.names, scaling, window)
    with full_disk_as_data_error(table.source, 4 * len(table.x) * summary_width(table.x.width, window.scales)):
        x = summarise_table(in_table, to_model_units, window.scales, MEMORY_BYTES, repair)
    names = summary_names(table.names, window.scales)
    summaries = Table(
        x=x,
        shape=(x.width,),
        names=names,
        units=[None] * len(names),
        labels=None if table.labels is None else table.labels[usable],
        pixel_range=None,
        source=table.source,
        missing=np.zeros(len(names), np.int64),
        label_names=table.label_names,
    )
    place = np.cumsum(usable) - 1  # [N], index of each usable row among the usable rows
    split = Split(
        fit=place[rows.split.fit], held_out=place[rows.split.held_out], calibration=place[rows.split.calibration]
    )
    notes = [*notes, *_notes(table, window, usable)]
    windows = Windows(rows=rows, in_table=in_table, scaling=scaling, notes=notes)
    return replace(prepare_data(summaries, split), windows=windows)


def _repair(policy: Policy, names: Sequence[str], scaling: Scaling, window: Window) -> Repair | None:
    """Return how to summarise windows with values outside of their valid ranges; None if the policy has no ranges."""
    ranges = valid_range(policy, names)
    if ranges is None:
        return None
    low, high = ranges.low.numpy(), ranges.high.numpy()

    def is_outside(x: Floats) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        return np.asarray((np.maximum(x - high, low - x) > 0).any(axis=1))

    def summarise(windows: Floats) -> Floats:
        z: Floats = of_windows.summarise(torch.from_numpy(windows)).numpy()
        return z

    of_windows = WindowSummaries(scaling, Summaries(tuple(window.scales)), ranges)
    return Repair(is_outside, summarise)


def _notes(table: Table, window: Window, usable: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> list[str]:
    assert table.timeline is not None
    scales = ", ".join(map(str, window.scales))
    what = (
        f"each row is judged with up to {window.rows - 1} rows before it: by its values, and by their means and "
        f"deviations over {scales} rows. {int((~usable).sum()):,} rows with fewer than {window.least_rows} rows in "
        "their window are left out"
    )
    notes = [what]
    absent = np.setdiff1d(np.arange(len(table.timeline.groups)), np.unique(table.timeline.group[usable]))
    if len(absent):
        notes.append(
            f"WARNING: {len(absent):,} of {len(table.timeline.groups):,} groups have no window of "
            f"{window.least_rows} rows without a gap: {list_groups(table.timeline, absent)}"
        )
    return notes


def with_window(pipeline: Pipeline, data: PreparedData) -> Pipeline | Windowed:
    """Return the whole model that judges rows in raw units: `pipeline`, after the summaries if `data` has windows."""
    if data.windows is None:
        return pipeline
    windows = data.windows
    observation = _fit_row_observation(pipeline, data, windows)
    ranges = None if data.policy is None else valid_range(data.policy.rules, windows.rows.table.names)
    return Windowed(windows.scaling, Summaries(tuple(windows.window.scales)), pipeline, observation, ranges).eval()


def _fit_row_observation(pipeline: Pipeline, data: PreparedData, windows: Windows) -> Observation:
    """Return the noise of the newest row around the decoder's output, in raw units."""
    width = windows.rows.table.x.width
    both = Scaling(  # from raw units to the units of the core
        windows.scaling.shift + windows.scaling.scale * pipeline.scaling.shift[:width],
        windows.scaling.scale * pipeline.scaling.scale[:width],
    )
    return fit_row_observation(pipeline.core, pipeline.prior, pipeline.scaling, data, both)
