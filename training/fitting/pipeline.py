"""From a table to a fitted pipeline: the statistics that every kind needs, the core, and what surrounds it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models import artifact
from models.autoencoder import Autoencoder
from models.core import Core
from models.ensemble import Ensemble
from models.pca import PCA
from models.pipeline import Pipeline
from models.scaling import Scaling, standardise
from training.config import TrainConfig
from training.data.batches import Batches
from training.data.moments import Moments, compute_moments
from training.data.row_store import Floats, RowStore, column_medians
from training.data.table import MAX_HELD_OUT_BYTES, MAX_HELD_OUT_ROWS, Split, Table
from training.errors import FitError
from training.fitting.autoencoders import FitTask, fit_autoencoder, fit_vae
from training.fitting.defaults import default_image_latents, default_table_latents, with_defaults
from training.fitting.distributed import ProcessGroup
from training.fitting.pca import fit_pca, pca_from_moments, spectrum_from_moments
from training.fitting.statistics import (
    fit_calibration,
    fit_explanation,
    fit_neighbours,
    fit_prior,
    fit_scaling,
    fit_score_statistics,
    most_concentrated_rows,
    scaling_method,
)
from training.fitting.trainer import Run
from training.progress import Reporter

SPECTRUM = 256  # eigenvalues that are kept
WIDEST_COVARIANCE = 4096  # features, up to which the covariance is made: beyond, its eigenvectors take hours


@dataclass(frozen=True)
class PreparedData:
    """What every kind of model needs of a table, read once.

    Args:
        fill: what stands in for a missing value, [D]: the medians of the fit rows; None where no value is missing.
        moments: of the fit rows, raw units; without covariance above WIDEST_COVARIANCE features.
        held_out: rows [M, D], raw units, NaN where a value is missing.
        calibration: rows [C, D], likewise.
        sample: of the fit rows, [S, D], likewise: all of them, or as many as memory bears.
    """

    table: Table
    rows: Split
    medians: Tensor
    fill: Tensor | None
    moments: Moments
    held_out: Tensor
    calibration: Tensor
    sample: Tensor

    def filled(self, rows: Tensor) -> Tensor:
        """Rows [B, D] without a missing value."""
        return rows if self.fill is None else torch.where(rows.isnan(), self.fill, rows)

    def pca(self, scaling: Scaling, latents: int) -> PCA | None:
        """PCA of the fit rows in the model units of `scaling`; None where it cannot be."""
        if self.moments.covariance is None or latents > min(self.table.x.width, self.moments.rows - 1):
            return None
        return pca_from_moments(self.moments.scaled(scaling.shift, scaling.scale), latents)

    def spectrum(self, scaling: Scaling) -> Tensor:
        """The largest eigenvalues of the fit rows' covariance in the model units of `scaling`, descending, float64."""
        if self.moments.covariance is None:
            return torch.zeros(0, dtype=torch.float64)
        return spectrum_from_moments(self.moments.scaled(scaling.shift, scaling.scale))[:SPECTRUM]


def prepare_data(table: Table, rows: Split, robust: bool = False) -> PreparedData:
    """Read the table: one pass for the moments, and the rows that must be at hand.

    Args:
        robust: fit to those alone that are most alike, of at most MOST_ROWS.
    """
    x = table.x
    middle = torch.from_numpy(column_medians(x, rows.fit))
    fill = middle if table.missing.any() else None
    largest = min(MAX_HELD_OUT_ROWS, max(1, MAX_HELD_OUT_BYTES // (4 * x.width)))
    if robust:
        rows = replace(rows, fit=_alike(x, rows.fit[:largest], middle))
    blocks = _fit_blocks(x, rows.fit, None if fill is None else fill.numpy())
    return PreparedData(
        table=table,
        rows=rows,
        medians=middle,
        fill=fill,
        moments=compute_moments(blocks, full=x.width <= WIDEST_COVARIANCE),
        held_out=_taken(x, rows.held_out),
        calibration=_taken(x, rows.calibration),
        sample=_taken(x, rows.fit[:largest]),
    )


def _fit_blocks(x: RowStore, fit: npt.NDArray[np.int64], fill: Floats | None) -> Iterator[Floats]:
    """The fit rows in blocks, in the order of the table, nothing missing."""
    chosen = np.sort(fit)
    for start, block in x.blocks():
        first, end = np.searchsorted(chosen, (start, start + len(block)))
        rows = block[chosen[first:end] - start]
        yield rows if fill is None else np.where(np.isnan(rows), fill, rows)


def _alike(x: RowStore, fit: npt.NDArray[np.int64], fill: Tensor) -> npt.NDArray[np.int64]:
    """Those of the rows at `fit` that are most alike, in that order."""
    rows = _taken(x, fit)
    rows = torch.where(rows.isnan(), fill, rows)
    kept: npt.NDArray[np.int64] = most_concentrated_rows(standardise(rows)(rows), torch.tensor(1.0)).numpy()
    return fit[kept]


def _taken(x: RowStore, indices: npt.NDArray[np.int64]) -> Tensor:
    """The rows at `indices`, in that order; read in the order in which they lie."""
    order = np.argsort(indices)
    rows = np.empty((len(indices), x.width), np.float32)
    rows[order] = x.take(indices[order])
    return torch.from_numpy(rows)


def fit_pipeline(
    config: TrainConfig,
    data: PreparedData,
    report: Reporter,
    run: Run | None = None,
    processes: ProcessGroup = ProcessGroup(),  # noqa: B008  # frozen
) -> Pipeline:
    """The whole pipeline, on the CPU: networks from the fit rows, score from the held-out, p-values from the others.

    `config.model` is a kind, not auto. Raises FitError.
    """
    shape, pictures = tuple(data.table.shape), data.table.pixel_range is not None
    config = with_defaults(config, pictures, len(data.rows.fit))
    scaling = fit_scaling(data.moments, config, data.table.pixel_range, data.fill)
    latents = config.latents or _latents(config.model, data, scaling)
    if len(data.rows.fit) <= latents:
        have = len(data.rows.fit)
        raise FitError(f"{latents} latents need more rows to fit than {have}: add rows, or lower --latents")
    held_out, sample = scaling(data.held_out), scaling(data.sample)
    core: Core
    if config.model == "pca":
        report.start(f"{config.name} (pca)", 1)
        core = _pca(data, scaling, latents)
    else:
        device = artifact.choose_device(config.device)
        batches = Batches(data.table.x, data.rows.fit, scaling, config.seed, device)
        unit = pictures and scaling_method(config, pictures) == "range"
        task = FitTask(config, shape, unit, latents, batches, sample, held_out.to(device), report, run, processes)
        core = fit_vae(task) if config.model == "vae" else fit_autoencoder(task)
    core = core.cpu().float().eval()
    if config.model == "ensemble":
        assert isinstance(core, Autoencoder)
        core = Ensemble(core, fit_neighbours(sample), torch.ones(len(Ensemble.parts)))
    fit_score_statistics(core, held_out, sample, config.robust)
    prior = fit_prior(core, sample, latents, config.seed)
    calibration = fit_calibration(core, scaling(data.calibration))
    explanation = fit_explanation(data.moments, scaling, data.table.pixel_range is not None)
    return Pipeline(scaling, core, prior, calibration, explanation).eval()


def _latents(kind: str, data: PreparedData, scaling: Scaling) -> int:
    width = data.table.x.width
    if data.table.pixel_range is not None or data.moments.covariance is None:
        return default_image_latents(width)
    total = data.moments.scaled(scaling.shift, scaling.scale).variance.sum()
    return default_table_latents(kind, (data.spectrum(scaling) / total).tolist(), len(data.rows.fit), width)


def _pca(data: PreparedData, scaling: Scaling, latents: int) -> PCA:
    """PCA from the covariance, or from the rows where they are wider than many. Raises FitError."""
    width, rows = data.table.x.width, len(data.rows.fit)
    if data.moments.covariance is not None:
        return pca_from_moments(data.moments.scaled(scaling.shift, scaling.scale), latents)
    if rows > WIDEST_COVARIANCE or rows > len(data.sample):
        raise FitError(
            f"PCA of {rows:,} rows of {width:,} features would take hours: expected at most {WIDEST_COVARIANCE} "
            "features or rows; make pictures smaller with --size, or train an autoencoder"
        )
    return fit_pca(scaling(data.sample).double(), latents)
