"""`elbo evaluate`: measure a published model on a table (errors, likelihood, alarm rates, ranking)."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import torch
from torch import Tensor

from models.artifact import Artifact
from models.artifact import score as score_with_gaps
from training.data.row_store import Floats
from training.data.table import Table
from training.data.windows import TableWindows, refuse_short_windows, windows_for_model
from training.evaluation.alarm_rates import AlarmRate, alarm_rate
from training.evaluation.metrics import (
    BOUND_BATCH,
    BOUND_ROWS,
    BOUND_SAMPLES,
    bits_per_dimension,
    importance_weighted,
)
from training.evaluation.samples import SampleQuality, measure_samples
from training.evaluation.score import batches, flagged_at, refuse_overflow
from training.fitting.latents import ACTIVE_VARIANCE
from training.progress import SlowProgress
from training.reports.describe import DEFAULT_ALPHA, against_pca

ALPHAS = (0.1, 0.05, 0.01)
SWAPPED_AUROC = 0.4  # chance gives 0.5; a lower AUROC than this suggests that the labels are swapped


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. Errors are mean squared errors per present value, in raw units squared."""

    model: str  # name@version
    source: str
    rows: int
    reconstruction_error: float
    mean_error: float | None  # error if every value is predicted by the training mean; None for earlier artifacts
    median_error: float  # error if every value is predicted by the training median of its column
    mean_score: float
    alarm_rates: dict[str, float]  # by alpha: share of the normal rows (without labels: all rows) that is flagged
    detection_rates: dict[str, float] | None  # by alpha: share of the anomalous rows that is flagged
    auroc: float | None
    average_precision: float | None
    elbo: float | None  # nats per row, model units; this field and the next four are None without a density
    log_likelihood: float | None  # importance-weighted bound from `draws` samples per row; exact for PCA
    log_likelihood_se: float | None  # standard error of `log_likelihood` over rows
    bits_per_dimension: float | None  # for values rounded to one raw unit
    draws: int | None
    active_latents: int | None  # VAE only: latents that carry information about these rows
    latents: int
    held_out: dict[str, float]  # the manifest's metrics on the held-out rows
    comparison: dict[str, dict[str, float]]  # by kind: metrics of other models on the held-out rows
    seen: bool  # whether the table is the one that the model was trained on
    calibrated: bool  # whether `elbo calibrate` used this table, so that alarm rates match alpha by construction
    comments: list[str]  # what is wrong with these figures, and what to do
    samples: SampleQuality | None = None  # measures of samples; None without --samples


class _RunningSums:
    """Sums over the rows of a table, accumulated in float64 in one pass."""

    def __init__(self, constants: npt.NDArray[np.float64], latents: int) -> None:
        self.scores: list[Floats] = []
        self._constants = constants  # [C, D]: C rows, each of which is a constant prediction
        self._values = self._squares = 0.0
        self._constant_squares = np.zeros(len(constants))  # [C]
        self._latents, self._latent_squares = np.zeros(latents), np.zeros(latents)  # [K], [K]

    def add(self, rows: Floats, score: Floats, latents: Floats, x_hat: Floats) -> None:
        """Add rows [B, D] with their scores [B], latents [B, K] and reconstructions [B, D]."""
        present = ~np.isnan(rows)
        self.scores.append(score)
        self._values += float(present.sum())
        self._squares += float(np.square((rows - x_hat)[present], dtype=np.float64).sum())
        self._constant_squares += [np.square((rows - row)[present]).sum() for row in self._constants]
        self._latents += latents.sum(axis=0, dtype=np.float64)
        self._latent_squares += np.square(latents, dtype=np.float64).sum(axis=0)

    def errors(self) -> list[float]:
        """Return mean squared errors per value: that of the model, then that of each constant prediction."""
        return [float(total / max(self._values, 1)) for total in (self._squares, *self._constant_squares)]

    def active(self, rows: int) -> int:
        """Return the number of latents whose posterior mean varies. `rows` is the number of rows added so far."""
        variance = self._latent_squares / rows - np.square(self._latents / rows)
        return int((variance > ACTIVE_VARIANCE).sum())


def evaluate(artifact: Artifact, table: Table, draws: int = BOUND_SAMPLES, *, samples: bool = False) -> Evaluation:
    """Evaluate `artifact` on `table`. Labels are used only if both normal and anomalous rows occur.

    If the model has a window, rows whose windows have too few rows are left out.

    Args:
        draws: importance samples per row for the log-likelihood, which is estimated on up to BOUND_ROWS random rows.
        samples: whether to measure samples too.
    """
    windows = windows_for_model(table.x, table.timeline, artifact.manifest, table.source)
    sums = _sum_over_rows(artifact, table, windows)
    scores, (error, median_error, *mean_errors) = np.concatenate(sums.scores), sums.errors()
    normal, anomalous = np.ones(len(scores), bool), None
    if table.normal is not None and table.anomalous is not None and table.normal.any() and table.anomalous.any():
        judged = slice(None) if windows is None else windows.judged
        normal, anomalous = table.normal[judged], table.anomalous[judged]
    flagged = {str(alpha): flagged_at(artifact, scores, alpha) for alpha in ALPHAS}
    auroc, precision = (None, None) if anomalous is None else _ranking(normal, anomalous, scores)
    manifest = artifact.manifest
    seen = table.fingerprint == manifest.data.fingerprint
    counts = {alpha: int(rows[normal].sum()) for alpha, rows in flagged.items()}
    rates = [
        alarm_rate(count, int(normal.sum()), manifest.calibration.rows, float(alpha)) for alpha, count in counts.items()
    ]
    return Evaluation(
        model=f"{manifest.name}@{artifact.path.parent.name}",
        source=table.source,
        rows=len(scores),
        reconstruction_error=error,
        mean_error=mean_errors[0] if mean_errors else None,
        median_error=median_error,
        mean_score=float(scores.mean(dtype=np.float64)),
        alarm_rates={alpha: float(rows[normal].mean()) for alpha, rows in flagged.items()},
        detection_rates=None
        if anomalous is None
        else {a: float(rows[anomalous].mean()) for a, rows in flagged.items()},
        auroc=auroc,
        average_precision=precision,
        **_density(artifact, table, draws),
        active_latents=sums.active(len(scores)) if manifest.kind == "vae" else None,
        latents=manifest.latents,
        held_out=manifest.metrics,
        comparison=manifest.comparison,
        seen=seen,
        calibrated=manifest.recalibration is not None and table.fingerprint == manifest.recalibration.fingerprint,
        comments=[
            *_label_comments(table, auroc),
            *_comments(rates, manifest.name, table.source, has_labels=anomalous is not None, seen=seen),
        ],
        samples=measure_samples(artifact, table) if samples else None,
    )


def _sum_over_rows(artifact: Artifact, table: Table, windows: TableWindows | None) -> _RunningSums:
    """Return the sums over the rows that the model judges.

    Raises:
        DataError: there are no such rows, or a score overflows.
    """
    manifest = artifact.manifest
    constants = [[feature.median for feature in manifest.features]]
    means = [feature.mean for feature in manifest.features if feature.mean is not None]
    if len(means) == manifest.width:
        constants.append(means)
    sums = _RunningSums(np.array(constants), manifest.latents)
    progress = SlowProgress(f"evaluating {table.source}", len(table.x))
    with torch.inference_mode():
        for numbers, rows, inputs in batches(table, windows):
            x = torch.from_numpy(inputs).to(artifact.device)
            score = score_with_gaps(artifact.module, x)[0].cpu().numpy()
            refuse_overflow(score, numbers, table.source)
            latents = artifact.module.encode(x)[0]
            sums.add(
                rows, score, latents[:, : manifest.latents].cpu().numpy(), artifact.module.decode(latents).cpu().numpy()
            )
            progress.advance(len(rows))
    if windows is not None and not sums.scores:
        refuse_short_windows(windows, table.source)
    return sums


def _density(artifact: Artifact, table: Table, draws: int) -> dict[str, Any]:
    """Return the fields of Evaluation that need a density.

    The fields are None if the model has no density of rows, or if its artifact was written before `log_weight` existed.
    A model with a window has a density of the summaries only.
    """
    manifest = artifact.manifest
    log_weight = getattr(artifact.module, "log_weight", None)
    if log_weight is None or manifest.window is not None or manifest.kind not in ("pca", "vae"):
        return dict.fromkeys(("elbo", "log_likelihood", "log_likelihood_se", "bits_per_dimension", "draws"))
    draws = 1 if manifest.kind == "pca" else draws  # PCA's posterior is exact, so one sample is enough
    chosen = np.random.RandomState(0).permutation(len(table.x))[:BOUND_ROWS]
    rows = torch.from_numpy(table.inputs.take(np.sort(chosen))).to(artifact.device)
    progress = SlowProgress(f"{draws} importance samples per row", draws * -(-len(rows) // BOUND_BATCH))

    def log_weight_with_progress(x: Tensor, noise: Tensor) -> Tensor:
        progress.advance(1)
        weight: Tensor = log_weight(x, noise)  # [B]
        return weight

    bound = importance_weighted(log_weight_with_progress, rows, manifest.latents, draws)
    return {
        "elbo": bound.elbo,
        "log_likelihood": bound.mean,
        "log_likelihood_se": bound.standard_error,
        "bits_per_dimension": bits_per_dimension(bound.mean, manifest.log_scale, manifest.width),
        "draws": draws,
    }


def _comments(rates: Sequence[AlarmRate], model: str, source: str, *, has_labels: bool, seen: bool) -> Iterator[str]:
    """Yield what to do about the alarm rate at one alpha that chance does not explain: at DEFAULT_ALPHA if possible."""
    too_high = [rate for rate in rates if rate.is_too_high]
    if not too_high:
        return
    rate = min(too_high, key=lambda rate: abs(rate.alpha - DEFAULT_ALPHA))
    subject = "normal rows" if has_labels else "rows"
    text = (
        f"{100 * rate.share:.3g} % of the {subject} of {source} are flagged at alpha {rate.alpha:g}; chance explains "
        f"at most {100 * rate.limit:.3g} %. These rows differ from the calibration rows, so the false-alarm rate of "
        f"{100 * rate.alpha:g} % does not hold for them."
    )
    if not has_labels:
        text += " If some rows are anomalies, mark them with 1 in a column y, and evaluate again."
    if seen:
        yield f"{text} The model was trained on these rows: train it again, and look at the rows that are flagged."
        return
    yield (
        f"{text} If the rows are normal: recalibrate on other recent normal rows (elbo calibrate {model} DATA). If the "
        "rate stays high on rows that you keep apart, the relations between the features have changed: train the model "
        "again on recent rows."
    )


def _ranking(normal: npt.NDArray[np.bool_], anomalous: npt.NDArray[np.bool_], scores: Floats) -> tuple[float, float]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    labelled = normal | anomalous
    truth, scores = anomalous[labelled], scores[labelled]
    return float(roc_auc_score(truth, scores)), float(average_precision_score(truth, scores))


def _label_comments(table: Table, auroc: float | None) -> Iterator[str]:
    if auroc is None or auroc >= SWAPPED_AUROC or table.anomalous is None or table.labels is None:
        return
    label = table.labels[int(table.anomalous.argmax())]
    name = table.label_names[label] if table.label_names else str(label)
    yield (
        f"an AUROC of {auroc:.2f} means that anomalous rows score lower than normal rows, which suggests that the "
        f"labels are swapped: if {name!r} means normal, add --normal {shlex.quote(name)}"
    )


def evaluation_text(evaluation: Evaluation) -> str:
    """Return `evaluation` as a few lines of text."""
    title = f"{evaluation.model} on {evaluation.source}: {evaluation.rows:,} rows"
    lines = [*_quality(evaluation), *_density_lines(evaluation), *_alarms(evaluation)]
    lines += [] if evaluation.samples is None else _sample_lines(evaluation.samples)
    title += ", the rows it was trained on" if evaluation.seen else ""
    title += ", the rows it was calibrated on" if evaluation.calibrated else ""
    comments = [f"warning: {comment}" for comment in evaluation.comments]
    return "\n".join([title, *(f"{label:<21}  {text}" for label, text in lines), *comments])


def _quality(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    yield "reconstruction error", f"{evaluation.reconstruction_error:.6g}  (mean square per value, raw units)"
    if evaluation.mean_error is None:
        yield "predicting the median", f"{evaluation.median_error:.6g}"
    else:
        yield "predicting the mean", f"{evaluation.mean_error:.6g}"
    if verdict := against_pca(evaluation.held_out):
        yield "beats PCA", f"{verdict} (on the held-out rows)"


def _density_lines(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    if evaluation.log_likelihood is None or evaluation.draws is None:
        return
    how = "exact" if evaluation.draws == 1 else f"importance-weighted, {evaluation.draws} samples"
    if evaluation.active_latents is not None:
        yield "ELBO", f"{evaluation.elbo:.6g} nats per row"
    spread = f"{evaluation.log_likelihood:.6g} ± {evaluation.log_likelihood_se:.2g}"
    yield "log-likelihood", f"{spread} nats per row ({how})"
    yield "bits per dimension", f"{evaluation.bits_per_dimension:.4g}"
    if evaluation.active_latents is not None:
        yield "active latents", f"{evaluation.active_latents} of {evaluation.latents}"


def _sample_lines(quality: SampleQuality) -> Iterator[tuple[str, str]]:
    yield "samples", f"{quality.draws:,}, compared with {quality.rows:,} rows"
    yield "density", f"{quality.density:.3f}  (about 1 for rows of the same kind)"
    yield "coverage", f"{quality.coverage:.3f}  (about {quality.expected_coverage:.3f} for rows of the same kind)"
    yield "same distribution", f"p = {quality.two_sample_p_value:.3g}  (two-sample test)"
    if quality.confident is not None:
        rows = f"for rows {quality.confident_rows:.3f}; accuracy {quality.classifier_accuracy:.3f}"
        yield "classifier is sure", f"{quality.confident:.3f}  ({rows})"
    if quality.condition_accuracy is not None:
        yield "as asked for", f"{quality.condition_accuracy:.3f}  (of rows {quality.condition_accuracy_of_rows:.3f})"
    if quality.copy_p_value is not None:
        distances = f"{quality.distance_to_training:.4g} from the nearest training row; rows: "
        yield "copies", f"p = {quality.copy_p_value:.3g}  ({distances}{quality.distance_of_rows:.4g})"


def _alarms(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    yield "mean score", f"{evaluation.mean_score:.6g}"
    alarms = "  ".join(f"{rate:.4f} at {alpha}" for alpha, rate in evaluation.alarm_rates.items())
    yield ("flagged" if evaluation.detection_rates is None else "false alarms"), alarms
    if evaluation.detection_rates is not None:
        found = "  ".join(f"{rate:.4f} at {alpha}" for alpha, rate in evaluation.detection_rates.items())
        yield "anomalies found", found
        yield "AUROC", f"{evaluation.auroc:.4f}"
        yield "average precision", f"{evaluation.average_precision:.4f}"


def evaluation_json(evaluation: Evaluation) -> str:
    """Return `evaluation` as JSON."""
    return orjson.dumps(asdict(evaluation), option=orjson.OPT_INDENT_2).decode()
