"""Fit the parts of a model that complete rows and score rows with missing values: see `models.completion`."""

import numpy as np
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
INTERVAL = 0.9  # share of the missing values that are within their intervals
MISSING_SHARES = (0.1, 0.2, 0.3, 0.5)  # shares of the values that are taken out of calibration rows, in turn
CALIBRATED_ROWS = 400  # at most this many rows calibrate the intervals; each takes about a millisecond
BATCH = 4096  # complete rows per forward pass
LEAST_VALUES = 60  # a feature with fewer values has no interval of its own; of 60 values, 2 lie beyond each end
GAP_LEVELS = 4  # numbers of missing values, up to half of the features, for which the scale of the scores is fitted
GAP_ROWS = 500  # at most this many rows fit the scale of the scores at each level
LEAST_GAP_ROWS = 20  # with fewer complete rows, the scores of rows with missing values stay as they are


def with_completion_of_rows(pipeline: Pipeline, data: PreparedData, seed: int) -> Pipeline:
    """Return what `with_completion` returns for the rows of `data`.

    Return `pipeline` itself if it has a window: its inputs are summaries of rows, which do not determine a missing
    value.
    """
    return pipeline if data.windows else with_completion(pipeline, data.held_out, data.calibration, seed)


def with_completion(pipeline: Pipeline, held_out: Tensor, calibration: Tensor, seed: int) -> CompletingPipeline:
    """Return a pipeline that consists of the parts of `pipeline` and can also complete rows.

    Args:
        held_out: rows that did not train the networks, in raw units, [N, D].
        calibration: further rows that did not train the networks, in raw units, [M, D].
        seed: the seed of the noise.
    """
    parts: tuple[
        Scaling, Core, Prior, Calibration, Explanation | None, Observation | None, PolicyModule | None
    ] = (
        pipeline.scaling, pipeline.core, pipeline.prior, pipeline.calibration, pipeline.explanation,
        pipeline.observation, pipeline.policy,
    )  # fmt: skip
    completing: CompletingPipeline
    if isinstance(pipeline.core, PCA):
        completing = CompletingPCA(*parts).eval()
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
        _calibrate(network, calibration[:CALIBRATED_ROWS], seed)
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


def _calibrate(pipeline: CompletingNetwork, rows: Tensor, seed: int) -> None:
    """Take values out of `rows` [M, D], estimate them, and set the spread and the intervals by the errors."""
    random, width = random_stream(seed, VALIDATION), rows.shape[1]
    shares = torch.tensor(MISSING_SHARES)[torch.arange(len(rows)) % len(MISSING_SHARES)]  # [M]
    column_of = columns_of_features(width, sizes_of(pipeline))  # [D]
    taken = torch.rand(len(rows), int(column_of[-1]) + 1, generator=random) < shares.unsqueeze(1)  # [M, columns]
    taken[taken.all(dim=1), 0] = False  # a row without known values could not be estimated from anything
    taken = taken[:, column_of]  # [M, D]
    gaps = torch.where(taken, torch.nan, rows)
    with torch.no_grad():
        estimates = [pipeline.estimate(part) for part in gaps.split(max(1, MAX_COMPLETED_VALUES // width))]
        mean, deviation = (torch.cat(parts) for parts in zip(*estimates, strict=True))  # [M, D], [M, D]
        error = ((pipeline.scaling(rows) - mean) / deviation).double().numpy()  # [M, D]
    counted = (taken & ~rows.isnan()).numpy()  # [M, D]
    together = error[counted]
    if not len(together):
        return
    columns = [error[counted[:, column], column] for column in range(width)]
    columns = [column if len(column) >= LEAST_VALUES else together for column in columns]
    chains = pipeline.chains
    chains.spread = torch.tensor([np.sqrt(np.mean(column**2)) for column in columns]).float().clamp(min=1e-3)
    tail = (1.0 - INTERVAL) / 2.0
    chains.low = torch.tensor([-_quantile(-column, 1.0 - tail) for column in columns]).float()
    chains.high = torch.tensor([_quantile(column, 1.0 - tail) for column in columns]).float()


def _quantile(values: "np.ndarray[tuple[int], np.dtype[np.float64]]", level: float) -> float:
    """Return the smallest of `values` that a new value exceeds with a probability of at most 1 - level (Vovk 2005).

    If there are too few values for this level, return the largest one.
    """
    rank = min(len(values), int(np.ceil(level * (len(values) + 1))))
    return float(np.sort(values)[rank - 1])
