"""Fit what a policy needs to judge a row: how the features predict each other, and which scores are usual."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from models import artifact
from models.calibration import Calibration
from models.explanation import correlation_of
from models.levels import LevelPolicy
from models.pipeline import Pipeline
from models.policy import CEILING_SURPRISE, PolicyModule
from models.policy_rules import AppliedPolicy, FeatureRule, Policy
from models.scaling import Scaling
from models.windowed import ValidRange
from models.windows import SUMMARIES_PER_SCALE
from training.data.policy_file import keep_calibration_rows, value_bounds
from training.data.table import Split, Table
from training.data.time_split import TimeSplit
from training.errors import FitError
from training.fitting.explanation import MAX_EXPLAINED_FEATURES

NOISE = 1e-3  # variance added to each feature, relative to its own: columns that repeat each other can be inverted
USUAL_SHARE = 0.9  # a row is usual without some features if it scores at most as this share of the held-out rows do
SCALING_REFUSAL = (
    "the policy has rules for features in raw units, which models that are scaled by group cannot have: train without "
    "--scale-by-group, or leave [features] out of the policy"
)
BATCH = 4096  # rows per forward pass; limits the memory


def apply_to_split(policy: Policy | None, table: Table, split: Split) -> tuple[Split, AppliedPolicy | None, list[str]]:
    """Return `split` without the calibration rows for which the policy decides, and notes for the user.

    The second result is the policy for the manifest, still without the alpha of its budget; None if it has no rules.

    Raises:
        DataError: no calibration row is left.
    """
    if policy is None or policy == Policy():
        return split, None, []
    kept = keep_calibration_rows(policy, table, split.calibration)
    applied = AppliedPolicy(rules=policy, outside=kept.outside, silenced=kept.silenced)
    if isinstance(split, TimeSplit):
        period = keep_calibration_rows(policy, table, split.calibration_period).rows
        split = replace(split, calibration_period=period)
    return replace(split, calibration=kept.rows), applied, kept.notes(table)


def fit_policy(
    rules: Policy,
    names: Sequence[str],
    scaling: Scaling,
    explanation: nn.Module,
    row_scaling: nn.Module | None = None,
    category_sizes: Sequence[int] = (),
) -> PolicyModule | None:
    """Return the module that applies `rules`; None if no rule changes a score.

    For a model with a window, it judges the summaries of a window: the newest row, and means and standard deviations of
    each feature. The direction and the least deviation of the feature hold for each of them. If all rows of a window
    change by less than the least deviation, so does each summary. If only one direction matters, then no standard
    deviation does, because values above and below the mean raise it alike.

    Args:
        names: names of the D features.
        scaling: converts raw units to model units; for a model with a window, those of the summaries.
        explanation: the explanation of the model, `models.explanation.Expectations` or a compiled copy. Its weights
            contain the correlations of the features.
        row_scaling: for a model with a window, converts rows to the units in which they are summarised.
        category_sizes: the number of levels of each category. A level that the model does not know counts as a value
            outside of its valid range.

    Raises:
        FitError: the model has no such explanation.
    """
    if not rules.changes_scores and not category_sizes:
        return None
    buffers = {name: buffer.cpu().double() for name, buffer in explanation.named_buffers()}
    if not {"weights", "mean", "deviation"} <= buffers.keys():
        needs = "a policy for features" if rules.changes_scores else "a table with columns of text"
        raise FitError(
            f"{needs} needs a model of a table with at most {MAX_EXPLAINED_FEATURES} features: models of "
            "images and of wider tables do not know how the features predict each other"
        )
    deviation = buffers["deviation"]
    try:
        correlation = correlation_of(buffers["weights"], deviation)
    except ValueError as error:
        raise FitError(
            "the artifact comes from a release of Elbo that explains scores differently: train the model again"
        ) from error
    precision = torch.linalg.inv(correlation + NOISE * torch.eye(len(deviation)).double())
    precision = (precision + precision.T) / 2.0
    residual = precision.diagonal().rsqrt()  # [D], in standard deviations
    unit = scaling.scale.cpu().double() * deviation * residual  # [V], raw units without a window
    width, copies = len(names), len(deviation) // len(names)
    each = [rules.features.get(name, FeatureRule()) for name in names] * copies  # [V]
    low, high = map(torch.from_numpy, value_bounds(rules, names))
    is_spread = torch.zeros(len(deviation), dtype=torch.bool)
    if row_scaling is not None:
        of_rows = {name: buffer.cpu() for name, buffer in row_scaling.named_buffers()}
        shift, scale = of_rows["shift"], of_rows["scale"]
        unit = unit * scale.double().repeat(copies)
        is_spread[width * (1 + copies // SUMMARIES_PER_SCALE) :] = True
        # Only the newest row has a range. Rounding keeps the order of numbers, so no valid value falls outside.
        without = torch.full((len(deviation) - width,), np.inf)
        low, high = torch.cat(((low - shift) / scale, -without)), torch.cat(((high - shift) / scale, without))
    least = torch.tensor([rule.least for rule in each]).double() / unit
    only_high, only_low = (
        torch.tensor([rule.direction == direction for rule in each]) for direction in ("high", "low")
    )
    arguments = (
        buffers["mean"],
        deviation * residual,
        precision * torch.outer(residual, residual),
        torch.where(only_high | (is_spread & only_low), np.inf, least),
        torch.where(only_low | (is_spread & only_high), np.inf, least),
        low,
        high,
        torch.tensor([not rule.alone for rule in each]),
    )
    return LevelPolicy(category_sizes, *arguments) if category_sizes else PolicyModule(*arguments)


def valid_range(rules: Policy, names: Sequence[str]) -> ValidRange | None:
    """Return the module that takes invalid values out of windows; None if no feature has a valid range."""
    return ValidRange(*map(torch.from_numpy, value_bounds(rules, names))) if rules.has_ranges else None


def fit_usual_score(pipeline: Pipeline, rows: Tensor) -> None:
    """Set the score up to which a row is usual without the features that never raise an alarm alone.

    Args:
        pipeline: the model with its policy.
        rows: rows [N, D] in raw units that calibrate nothing, so that the scores of calibration rows are exchangeable
            with those of new rows.
    """
    policy = pipeline.policy
    if policy is None or not policy.has_companions:
        return
    scores = []
    with torch.no_grad():
        for x in rows.split(BATCH):
            judged, _ = policy(pipeline.scaling(x), policy.companions(policy.outside(x)))
            scores.append(pipeline.core.score(judged)[0])
    policy.usual.copy_(torch.cat(scores).double().quantile(USUAL_SHARE))


def score_rows(pipeline: Pipeline, rows: Tensor) -> Tensor:
    """Return the scores [N] of rows [N, D] in raw units."""
    with torch.no_grad():
        return torch.cat([artifact.score(pipeline, x)[0] for x in rows.split(BATCH)])


def set_calibration(pipeline: Pipeline, scores: Tensor) -> None:
    """Calibrate a model by the scores [N] of calibration rows, and set its score of values outside of valid ranges."""
    pipeline.calibration = Calibration(scores)
    if pipeline.policy is not None:
        pipeline.policy.ceiling.copy_(ceiling(pipeline.calibration))


def ceiling(calibration: Calibration) -> Tensor:
    """Return the score of a row with a value outside of its valid range, a scalar above every calibration score."""
    return torch.as_tensor(calibration.scores[-1] + CEILING_SURPRISE * calibration.tail)
