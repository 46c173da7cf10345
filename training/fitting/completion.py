"""Fit the parts of a model that complete rows and score rows with missing values: see `models.completion`."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.adopted import Adopted, AdoptedReconstruction
from models.artifact import MAX_COMPLETED_VALUES
from models.calibration import Calibration
from models.completion import (
    CANDIDATES,
    CHAINS,
    Chains,
    ChainsFromRows,
    CompletingAdopted,
    CompletingNetwork,
    CompletingPCA,
    CompletingPipeline,
    CompletingReconstruction,
)
from models.core import Core
from models.explanation import Explanation
from models.gap_scores import GapScores, no_gap_scores
from models.levels import columns_of_features, sizes_of
from models.observation import Observation
from models.pca import PCA
from models.pipeline import Pipeline
from models.policy import PolicyModule
from models.prior import Prior
from models.scaling import Scaling
from training.fitting.prepared_data import PreparedData
from training.random_streams import VALIDATION, random_stream

MIN_DEVIATION = 0.01  # smallest noise of a feature around the decoder's output, in model units; less is mostly rounding
NORMAL_END = 1.6448536269514722  # a normal variable exceeds it with probability 0.05
LEAST_END = 0.05  # smallest distance of an end of an interval from the mean, in standard deviations
INTERVAL = 0.9  # share of the missing values that are within their intervals
MISSING_SHARES = (0.1, 0.2, 0.3, 0.5)  # shares of the values that are taken out of calibration rows
LEAST_STEP = 0.01  # smallest distance of two shares of missing values with widths of their own
CALIBRATED_ROWS = 800  # at most this many rows calibrate the intervals at each share; each takes about a millisecond
LEAST_CALIBRATED_ROWS = 100  # at least this many rows, if there are so many
CALIBRATED_VALUES = 1_500  # with more than the fewest rows, at most so many values are taken out of them at each share
BATCH = 4096  # complete rows per forward pass
Array = npt.NDArray[np.float64]
LEAST_VALUES = 60  # a feature with fewer values has no interval of its own; of 60 values, 2 lie beyond each end
GAP_LEVELS = 4  # numbers of missing values, up to half of the features, for which the scale of the scores is fitted
GAP_ROWS = 500  # at most this many rows fit the scale of the scores at each level
LEAST_GAP_ROWS = 20  # with fewer complete rows, the scores of rows with missing values stay as they are


def with_completion_of_rows(pipeline: Pipeline, data: PreparedData, seed: int) -> Pipeline:
    """Return what `with_completion` returns for the rows of `data`.

    Return `pipeline` itself if it has a window: its inputs are summaries of rows, which do not determine a missing
    value.
    """
    if data.windows:
        return pipeline
    return with_completion(pipeline, data.held_out, data.calibration, seed, fit_rows=data.moments.rows)


def with_completion(
    pipeline: Pipeline, held_out: Tensor, calibration: Tensor, seed: int, *, fit_rows: int | None = None
) -> CompletingPipeline:
    """Return a pipeline that consists of the parts of `pipeline` and can also complete rows.

    Args:
        held_out: rows that did not train the networks, in raw units, [N, D].
        calibration: further rows that did not train the networks, in raw units, [M, D].
        seed: the seed of the noise.
        fit_rows: the number of rows to which a PCA was fitted: the fewer rows, the wider its intervals. None if it is
            unknown.
    """
    parts: tuple[
        Scaling, Core, Prior, Calibration, Explanation | None, Observation | None, PolicyModule | None
    ] = (
        pipeline.scaling, pipeline.core, pipeline.prior, pipeline.calibration, pipeline.explanation,
        pipeline.observation, pipeline.policy,
    )  # fmt: skip
    completing: CompletingPipeline
    if isinstance(pipeline.core, PCA):
        completing = CompletingPCA(*parts, fit_rows=fit_rows).eval()
    else:
        chains = _new_chains(pipeline, held_out, seed)
        network: CompletingNetwork
        if isinstance(pipeline.core, AdoptedReconstruction):
            with torch.no_grad():
                candidates = pipeline.core.encode(pipeline.scaling(held_out[:CANDIDATES]))[0]
            network = CompletingReconstruction(*parts, chains=ChainsFromRows(chains, candidates)).eval()
        elif isinstance(pipeline.core, Adopted):
            network = CompletingAdopted(*parts, chains=chains).eval()
        else:
            network = CompletingNetwork(*parts, chains=chains).eval()
        completing = network
        _calibrate(network, calibration, seed)
    # If calibration rows have missing values, `gap_scores` changes their scores. To keep these scores exchangeable with
    # those of new rows, `gap_scores` is then fitted to held-out rows.
    has_gaps = bool(calibration.isnan().any())
    completing.gap_scores = fit_gap_scores(completing, held_out if has_gaps else calibration, seed)
    return completing


def fit_gap_scores(pipeline: CompletingPipeline, rows: Tensor, seed: int) -> GapScores:
    """Return the scale of the scores of rows with missing values, fitted to the complete rows among `rows` [N, D].

    Values are taken out of the rows at random.
    """
    random, width = random_stream(seed, VALIDATION), rows.shape[1]
    complete = rows[~rows.isnan().any(dim=1)][:GAP_ROWS]  # [n, D]
    columns = columns_of_features(width, sizes_of(pipeline))  # [D]
    gap_columns = int(columns[-1]) + 1
    if len(complete) < LEAST_GAP_ROWS or gap_columns < 2:
        return no_gap_scores()
    counts = sorted({max(1, round(gap_columns * level / (2 * GAP_LEVELS))) for level in range(1, GAP_LEVELS + 1)})
    scores, missing = [], [0.0]
    with torch.no_grad():
        scores.append(torch.cat([pipeline.score(part)[0] for part in complete.split(BATCH)]))
        for count in counts:
            ranks = torch.rand(len(complete), gap_columns, generator=random).argsort(dim=1).argsort(dim=1)
            gaps = torch.where((ranks < count)[:, columns], torch.nan, complete)  # [n, D]
            missing.append(float(gaps.isnan().sum()) / len(complete))
            parts = gaps.split(max(1, MAX_COMPLETED_VALUES // width))
            scores.append(torch.cat([pipeline.expected_score(part)[0] for part in parts]))
    shares = torch.tensor(missing) / width  # [L]
    return GapScores(shares, torch.stack(scores).sort(dim=1).values)


def _new_chains(pipeline: Pipeline, held_out: Tensor, seed: int) -> Chains:
    """Return the chains of `pipeline`, with intervals that are not calibrated yet."""
    random, latents, width = random_stream(seed, VALIDATION), pipeline.prior.means.shape[1], held_out.shape[1]
    with torch.no_grad():
        u = pipeline.scaling(held_out)  # [N, D]
        mean, std = pipeline.core.encode(u)  # [N, K], [N, K]
        output = pipeline.core.decode(mean + std * torch.randn(mean.shape, generator=random))  # [N, D]
        present = ~held_out.isnan()
        squares = torch.where(present, (u - output).square(), 0.0).double().sum(dim=0)  # [D]
        deviation = (squares / present.sum(dim=0).clamp(min=1)).sqrt().clamp(min=MIN_DEVIATION).float()
    ones = torch.ones(width)
    noise, row_noise = _balanced_noise(latents, random), _balanced_noise(width, random)
    if sizes := sizes_of(pipeline):
        row_noise[:, width - sum(sizes) :] = 0.0  # the chains go on with the probabilities of the levels
    return Chains(
        deviation,
        torch.randn(CANDIDATES, latents, generator=random),
        torch.rand(CANDIDATES, generator=random),
        noise,
        row_noise,
        spread=ones,
        low=-1.645 * ones,
        high=1.645 * ones,
    )


def _balanced_noise(width: int, random: torch.Generator) -> Tensor:
    """Return standard normal noise [CHAINS, width] whose columns have the mean 0 and the standard deviation 1."""
    noise = torch.randn(CHAINS, width, generator=random)
    return (noise - noise.mean(dim=0)) / noise.std(dim=0, correction=0)


def _calibrate(pipeline: CompletingNetwork, calibration: Tensor, seed: int) -> None:
    """Take values out of rows `calibration` [M, D], estimate them, and set the spread and the intervals by the errors.

    The interval of a value is [low, high] of its feature times the width of the share of missing values of its row. The
    widths are conformal quantiles: at each share, 90 % of the values are within their intervals.
    """
    columns_of = columns_of_features(calibration.shape[1], sizes_of(pipeline)).numpy()  # [D]
    found = [_errors(pipeline, calibration, share, seed + index) for index, share in enumerate(MISSING_SHARES)]
    errors = [error for error, _ in found]  # each [M, D], NaN for a value that was not taken out
    if not all(np.isfinite(error).any() for error in errors):
        return
    first = [_quantile(np.abs(error[np.isfinite(error)]), INTERVAL) / NORMAL_END for error in errors]
    joined = np.concatenate([error / width for error, width in zip(errors, first, strict=True)])  # [N, D]
    together = joined[np.isfinite(joined)]
    columns = [column[np.isfinite(column)] for column in joined.T]
    columns = [column if len(column) >= LEAST_VALUES else together for column in columns]
    chains = pipeline.chains
    chains.spread = torch.tensor([np.sqrt(np.mean(column**2)) for column in columns]).float().clamp(min=1e-3)
    tail = (1.0 - INTERVAL) / 2.0
    low = np.array([_quantile(-column, 1.0 - tail) for column in columns]).clip(min=LEAST_END)  # [D], below the mean
    high = np.array([_quantile(column, 1.0 - tail) for column in columns]).clip(min=LEAST_END)  # [D]
    chains.low, chains.high = -torch.from_numpy(low).float(), torch.from_numpy(high).float()
    is_number = np.bincount(columns_of)[columns_of] == 1  # [D]
    if not is_number.any():
        is_number = np.ones(len(low), bool)
    # How far each value is from the mean, relative to the end of its interval. The interval of width w contains it if
    # this is at most w.
    distances = [np.maximum(error / high, -error / low)[:, is_number] for error in errors]
    finite = [each[np.isfinite(each)] for each in distances]
    if all(len(each) for each in finite):
        chains.set_widths(*widths_by_share([share for _, share in found], finite))


def widths_by_share(shares: Sequence[float], distances: Sequence[Array]) -> tuple[Tensor, Tensor]:
    """Return shares of missing values, ascending, and the width of the intervals at each of them.

    Rows of few columns cannot miss every share of their values: with two columns, each row misses one half. Shares that
    are closer than LEAST_STEP are therefore calibrated as one.

    Args:
        shares: shares of missing values.
        distances: for each share, how far its values are from the means, relative to the ends of their intervals.
    """
    groups: list[tuple[float, list[Array]]] = []
    for share, of_share in sorted(zip(shares, distances, strict=True), key=lambda pair: pair[0]):
        if groups and share - groups[-1][0] < LEAST_STEP:
            groups[-1][1].append(of_share)
        else:
            groups.append((share, [of_share]))
    widths = [max(_quantile(np.concatenate(of_group), INTERVAL), 1e-3) for _, of_group in groups]
    if len(groups) == 1:
        return torch.tensor([0.0, 1.0]), torch.tensor(2 * widths)
    return torch.tensor([share for share, _ in groups]), torch.tensor(widths)


def _errors(pipeline: CompletingNetwork, calibration: Tensor, share: float, seed: int) -> tuple[Array, float]:
    """Return the errors of the estimates if this share of the values is taken out of rows `calibration` [M, D].

    Returns:
        errors: in the standard deviations of the chains, [N, D]; NaN for a value that was not taken out.
        share: the share of the values of these rows that is missing.
    """
    random, width = random_stream(seed, VALIDATION), calibration.shape[1]
    needed = round(CALIBRATED_VALUES / (share * width))
    rows = calibration[: min(CALIBRATED_ROWS, max(LEAST_CALIBRATED_ROWS, needed))]  # [N, D]
    column_of = columns_of_features(width, sizes_of(pipeline))  # [D]
    columns = int(column_of[-1]) + 1
    taken = torch.rand(len(rows), columns, generator=random) < share  # [N, columns]
    # A row without known values could not be estimated from anything, and one without missing values has no errors.
    taken[taken.all(dim=1), 0] = False
    empty = ~taken.any(dim=1)
    if columns > 1:
        taken[empty, torch.randint(columns, (int(empty.sum()),), generator=random)] = True
    taken = taken[:, column_of]  # [N, D]
    gaps = torch.where(taken, torch.nan, rows)
    with torch.no_grad():
        estimates = [pipeline.estimate(part) for part in gaps.split(max(1, MAX_COMPLETED_VALUES // width))]
        mean, deviation = (torch.cat(parts) for parts in zip(*estimates, strict=True))  # [N, D], [N, D]
        errors = ((pipeline.scaling(rows) - mean) / deviation).double()  # [N, D]
    errors = torch.where(taken & ~rows.isnan(), errors, torch.nan)
    return errors.numpy(), float(gaps.isnan().float().mean())


def _quantile(values: Array, level: float) -> float:
    """Return the smallest of `values` that a new value exceeds with a probability of at most 1 - level (Vovk 2005).

    If there are too few values for this level, return the largest one.
    """
    rank = min(len(values), int(np.ceil(level * (len(values) + 1))))
    return float(np.sort(values)[rank - 1])
