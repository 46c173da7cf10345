"""Cross-conformal calibration: score every row by a model that was fitted without this row."""

import torch

from models.pipeline import Pipeline
from training.config import AUTO_CROSS_ROWS, TrainConfig
from training.data.cross_split import CrossSplit
from training.data.table import Table
from training.fitting.checkpoint import CheckpointStore
from training.fitting.distributed import ProcessGroup
from training.fitting.pipeline import fit_pipeline
from training.fitting.policy import score_rows, set_calibration
from training.fitting.prepared_data import PreparedData, prepare_data
from training.progress import Reporter, SilentReporter, is_warning

FOLDS = {"pca": 20}  # PCA is fitted within milliseconds, and more folds bring the false-alarm rate nearer to alpha
DEFAULT_FOLDS = 5


def with_calibration(config: TrainConfig, table: Table) -> TrainConfig:
    """Return `config` with "cross" or "split" in place of the calibration "auto"."""
    if config.calibration != "auto":
        return config
    is_cross = (
        table.timeline is None
        and table.pixel_range is None
        and not config.condition
        and table.copies.distinct <= AUTO_CROSS_ROWS
    )
    return config.model_copy(update={"calibration": "cross" if is_cross else "split"})


def count_folds(kind: str, rows: int) -> int:
    """Return the number of folds for a model of `kind` and a table of `rows` distinct rows."""
    return min(FOLDS.get(kind, DEFAULT_FOLDS), rows)


def fit_and_calibrate(
    config: TrainConfig,
    data: PreparedData,
    reporter: Reporter,
    *,
    checkpoints: CheckpointStore | None = None,
    processes: ProcessGroup = ProcessGroup(),  # noqa: B008  # frozen
) -> Pipeline:
    """Return the fitted and calibrated pipeline: see `fit_pipeline`.

    If the split of `data` is a CrossSplit, the calibration consists of the scores of all calibration rows. The score of
    a row comes from a model that was fitted in the same way, but without the fold of the row: neither the networks nor
    the score statistics of this model have seen the row (cross-conformal prediction, Vovk 2015). The models of the
    folds are then discarded: Hennhöfer & Preisach 2024 call this variant CV.

    Raises:
        FitError: a fit failed.
    """
    pipeline = fit_pipeline(config, data, reporter, checkpoints=checkpoints, processes=processes)
    if not isinstance(data.split, CrossSplit):
        return pipeline
    folds = data.split.folds(count_folds(config.model, len(data.split.order)))
    scores = []
    for index, fold in enumerate(folds, start=1):
        if not len(fold.calibration):  # the policy leaves out all rows of the fold
            continue
        reporter.stage(f"calibrating: fitting the model of fold {index} of {len(folds)}")
        of_fold = prepare_data(data.table, fold, config.robust, data.policy)
        store = checkpoints and checkpoints.of_fold(index)
        model = fit_pipeline(
            config,
            of_fold,
            _FoldReporter(reporter, index),
            checkpoints=store,
            processes=processes,
            for_scores=True,
        )
        scores.append(score_rows(model, of_fold.calibration))
    set_calibration(pipeline, torch.cat(scores))
    return pipeline


class _FoldReporter(SilentReporter):
    """Passes on only the warnings about the model of a fold, with the number of the fold."""

    def __init__(self, inner: Reporter, fold: int) -> None:
        self._inner, self._fold = inner, fold

    def note(self, message: str) -> None:
        """Pass on `message` if it is a warning."""
        if is_warning(message):
            self._inner.note(f"fold {self._fold}: {message}")
