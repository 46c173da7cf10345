"""Measures of samples: how well they resemble held-out rows, and whether they copy training rows.

Images are compared in raw units. The columns of other rows are first divided by their standard deviations over the real
rows. A real row is a row of a table, in contrast to a sample of a model.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from models.artifact import Artifact
from models.pipeline import Pipeline
from training.data.conditions import draw_conditions
from training.data.cross_split import CrossSplit, cross_split
from training.data.row_store import Floats
from training.data.table import Split, Table
from training.data.time_split import split_table
from training.errors import DataError
from training.fitting.prepared_data import PreparedData
from training.random_streams import SAMPLES, random_stream

DRAWS = 1_000  # number of samples; they are compared with at most as many real rows
MIN_ROWS = 20  # fewest real rows to compare with
TRAINING_ROWS = 20_000  # the nearest training row is sought among at most this many
FEW_DRAWS = 300  # DRAWS for the metrics of a training run, which should take no noticeable time
FEW_TRAINING_ROWS = 5_000  # TRAINING_ROWS for these metrics
BATCH = 128  # samples that are drawn at once; limits the memory
NEIGHBOURS = 5  # k of density and coverage, as in the experiments of Naeem et al. 2020
PERMUTATIONS = 200
TEST_ROWS = 500  # the two-sample test uses at most this many rows, and at most as many samples
CONFIDENT = 0.9  # a classifier is sure of a class with a probability above this
CLASSIFIER_ROWS = 10_000  # the classifier is fitted to at most this many labelled rows, and tested on as many
VOTES = 10  # the probability of a class is its share among this many nearest rows
Rows = npt.NDArray[np.float64]
Labels = npt.NDArray[Any]


class Likeness(NamedTuple):
    """Density and coverage (Naeem et al. 2020, "Reliable fidelity and diversity metrics for generative models").

    A ball around each real row reaches to the k-th nearest other real row.

    Args:
        density: mean number of balls in which a sample lies, divided by k. Low if samples lie far from real rows; about
            1 if samples and rows have one distribution; above 1 if samples vary less than rows.
        coverage: share of the balls that contain at least one sample. Low if kinds of rows are missing among the
            samples.
    """

    density: float
    coverage: float


@dataclass(frozen=True)
class SampleQuality:
    """Measures of samples against real rows that did not train the model."""

    draws: int
    rows: int
    density: float
    coverage: float
    expected_coverage: float  # mean coverage if as many samples came from the distribution of the rows
    two_sample_p_value: float  # small if the samples do not have the distribution of the rows
    confident: float | None  # share of the samples of which a classifier is sure; None without labels
    confident_rows: float | None  # share of the labelled rows that it was not fitted to and of which it is sure
    classifier_accuracy: float | None  # on the same rows
    distance_to_training: float | None  # median from a sample to the nearest training row; None without training rows
    distance_of_rows: float | None  # median from a real row, or from its reconstruction if samples have no noise
    copy_p_value: float | None  # small if samples are nearer to training rows than real rows are
    # Of a conditional model: the share of the samples that a classifier assigns to the condition that was asked for,
    # and the share of the rows that it was not fitted to and assigns to their own condition.
    condition_accuracy: float | None = None
    condition_accuracy_of_rows: float | None = None


def measure_samples(artifact: Artifact, table: Table) -> SampleQuality:
    """Measure samples of `artifact` against rows of `table`.

    If the model was trained on the table, samples are compared with its held-out and calibration rows (with
    cross-conformal calibration, only its held-out rows), and their distances to its fit rows are measured, too.

    Raises:
        DataError: there are fewer than MIN_ROWS rows to compare with.
    """
    manifest, random = artifact.manifest, np.random.RandomState(0)
    split = _split_of_training(artifact, table)
    unseen = np.arange(len(table.x)) if split is None else split.held_out
    if split is not None and not isinstance(split, CrossSplit):
        unseen = np.concatenate((unseen, split.calibration))
    if len(unseen) < MIN_ROWS:
        raise DataError(
            f"--samples needs at least {MIN_ROWS} rows that did not train the model, got {len(unseen)}: give more rows"
        )
    medians = np.array([feature.median for feature in manifest.features])

    def read(indices: npt.NDArray[np.int64]) -> Rows:
        rows = table.x.take(np.sort(indices)).astype(np.float64)
        return np.where(np.isnan(rows), medians, rows)

    chosen = np.sort(random.permutation(unseen)[:DRAWS])
    rows = read(chosen)
    scale = column_scale(rows, is_image=manifest.is_image)
    with_noise = not manifest.is_image and hasattr(artifact.module, "observe")
    condition = (
        None if manifest.conditions is None else draw_conditions(manifest.conditions, DRAWS, random_stream(1, SAMPLES))
    )
    size = manifest.latents, manifest.width
    drawn = draw_rows(artifact.module, DRAWS, size, condition, with_noise=with_noise, device=artifact.device) / scale
    real = rows / scale
    found = likeness(real, drawn)
    labelled = None
    if table.labels is not None:
        every = np.sort(random.permutation(len(table.x))[: 2 * CLASSIFIER_ROWS])
        labelled = classify(read(every) / scale, table.labels[every], drawn, random)
    confident, confident_rows, accuracy = labelled or (None, None, None)
    conditional = None
    if condition is not None and table.coded is not None:
        every = np.sort(random.permutation(len(table.x))[: 2 * CLASSIFIER_ROWS])
        known = table.coded.one_hot(every)
        complete = known.sum(axis=1) == len(table.coded.codes[0])  # rows with a level in every column
        labelled_rows = read(every[complete]) / scale
        conditional = condition_accuracy(labelled_rows, known[complete], drawn, condition.numpy(), random)
    distances: tuple[float, float, float] | tuple[None, None, None] = (None, None, None)
    if split is not None:
        # Samples without noise are smoother than rows, and lie nearer to all rows. Compare them with reconstructions,
        # which are as smooth.
        of_rows = None if table.coded is None else table.coded.one_hot(chosen)
        compared = real if with_noise else _reconstruct(artifact, rows, of_rows) / scale
        distances = _compare_distances(drawn, compared, read(random.permutation(split.fit)[:TRAINING_ROWS]) / scale)
    return SampleQuality(
        draws=len(drawn),
        rows=len(real),
        density=found.density,
        coverage=found.coverage,
        expected_coverage=expected_coverage(len(real), len(drawn)),
        two_sample_p_value=two_sample_p_value(real, drawn, random),
        confident=confident,
        confident_rows=confident_rows,
        classifier_accuracy=accuracy,
        distance_to_training=distances[0],
        distance_of_rows=distances[1],
        copy_p_value=distances[2],
        condition_accuracy=None if conditional is None else conditional[0],
        condition_accuracy_of_rows=None if conditional is None else conditional[1],
    )


def sample_metrics(pipeline: Pipeline, data: PreparedData) -> dict[str, float]:
    """Return the metrics of samples of a fitted model against its held-out rows; see docs/reference/measures.md.

    Only FEW_DRAWS samples are drawn, to save time: `measure_samples` is more exact. Return no metrics if there are
    fewer than MIN_ROWS held-out rows, or if samples are not rows of the table (models with a window or scaled by
    group).
    """
    if data.windows is not None or data.by_group is not None or len(data.held_out) < MIN_ROWS:
        return {}
    is_image = data.table.pixel_range is not None
    with_noise = not is_image and hasattr(pipeline, "observe")
    medians = data.medians.nan_to_num().double().numpy()
    inputs = data.held_out_inputs[:FEW_DRAWS]
    held_out, training = (
        np.where(np.isnan(rows), medians, rows)
        for rows in (
            data.held_out[:FEW_DRAWS].double().numpy(),
            data.sample[:FEW_TRAINING_ROWS].double().numpy(),
        )
    )
    condition = None
    if data.conditions is not None:
        condition = draw_conditions(data.conditions.known, FEW_DRAWS, random_stream(1, SAMPLES))
    latents = pipeline.prior.means.shape[1]
    drawn = draw_rows(pipeline, FEW_DRAWS, (latents, len(medians)), condition, with_noise=with_noise)
    scale = column_scale(held_out, is_image=is_image)
    found = likeness(held_out / scale, drawn / scale)
    compared = held_out
    if not with_noise:  # see `measure_samples`
        with torch.inference_mode():
            compared = pipeline(inputs).double().numpy()
    _, _, p_value = _compare_distances(drawn / scale, compared / scale, training / scale)
    return {
        "sample_density": found.density,
        "sample_coverage": found.coverage,
        "expected_coverage": expected_coverage(len(held_out), FEW_DRAWS),
        "copy_p_value": p_value,
    }


def _split_of_training(artifact: Artifact, table: Table) -> Split | None:
    """Return the split with which the model was trained on `table`.

    Return None if the model was trained on another table or, with --robust, on only some of the fit rows. Return None
    also for a model with a window, because windows overlap.
    """
    manifest = artifact.manifest
    if table.fingerprint != manifest.data.fingerprint or manifest.window is not None:
        return None
    seed = int(manifest.training.get("seed", 0))
    if manifest.training.get("calibration") == "cross":
        split: Split = cross_split(len(table.x), seed, table.x.width, table.copies)
    else:
        in_blocks = manifest.training.get("split") == "blocks"
        split = split_table(table, seed, split="blocks" if in_blocks else "newest")
    sizes = len(split.fit), len(split.held_out)
    return split if sizes == (manifest.data.fit, manifest.data.held_out) else None


def _reconstruct(artifact: Artifact, rows: Rows, condition: Floats | None = None) -> Rows:
    """Return the reconstructions of rows [N, D]. A conditional model needs their conditions [N, C], one-hot."""
    inputs = rows if condition is None else np.concatenate((rows, condition), axis=1)
    with torch.inference_mode():
        x = torch.from_numpy(inputs.astype(np.float32)).to(artifact.device)
        x_hat: Rows = artifact.module(x).cpu().numpy().astype(np.float64)
    return x_hat


def _compare_distances(drawn: Rows, real: Rows, training: Rows) -> tuple[float, float, float]:
    """Return the median distance of samples to the nearest training row, that of real rows, and the copy p-value."""
    of_samples, of_rows = nearest_distances(drawn, training), nearest_distances(real, training)
    return float(np.median(of_samples)), float(np.median(of_rows)), copy_p_value(of_samples, of_rows)


def likeness(real: Rows, drawn: Rows, neighbours: int = NEIGHBOURS) -> Likeness:
    """Return density and coverage of samples drawn [M, D] against real rows [N, D]; N is above `neighbours`."""
    from sklearn.metrics import euclidean_distances

    among = euclidean_distances(real)  # [N, N]
    np.fill_diagonal(among, 0.0)
    radius = np.partition(among, neighbours, axis=1)[:, neighbours]  # [N]; the 0-th nearest is the row itself
    inside = euclidean_distances(real, drawn) <= radius[:, None]  # [N, M]
    return Likeness(float(inside.sum(axis=0).mean() / neighbours), float(inside.any(axis=1).mean()))


def expected_coverage(rows: int, draws: int, neighbours: int = NEIGHBOURS) -> float:
    """Return the mean coverage of `rows` real rows by `draws` samples of the same distribution.

    For any one row, the other rows and the samples are exchangeable. The ball of the row contains no sample if its k
    nearest neighbours are all rows (Naeem et al. 2020, lemma 2).
    """
    places = np.arange(neighbours)
    return float(1.0 - np.prod((rows - 1 - places) / (rows + draws - 1 - places)))


def squared_mmd(kernel: Rows, is_sample: npt.NDArray[np.bool_]) -> Rows:
    """Return the squared maximum mean discrepancy of two sets of rows, for P divisions of the same N rows, [P].

    The estimates are unbiased (Gretton et al. 2012, eq. 3).

    Args:
        kernel: values of the kernel, [N, N].
        is_sample: for each division, which of the rows belong to the first set, [N, P].
    """
    first, off_diagonal = is_sample.astype(float), kernel - np.diag(np.diag(kernel))
    second = 1.0 - first
    m, n = first.sum(axis=0), second.sum(axis=0)  # [P], [P]
    of_first, of_second = off_diagonal @ first, off_diagonal @ second  # [N, P], [N, P]
    within = (first * of_first).sum(axis=0) / (m * (m - 1)) + (second * of_second).sum(axis=0) / (n * (n - 1))
    estimate: Rows = within - 2.0 * (first * of_second).sum(axis=0) / (m * n)
    return estimate


def two_sample_p_value(real: Rows, drawn: Rows, random: np.random.RandomState) -> float:
    """Return the p-value of the hypothesis that real [N, D] and drawn [M, D] have one distribution.

    A permutation test with the maximum mean discrepancy of a Gaussian kernel, whose width is the median distance
    (Gretton et al. 2012, "A kernel two-sample test"). Permutations make the p-value valid for any number of rows. At
    most TEST_ROWS of each set are used, chosen at random, because the rows of a table may be sorted.
    """
    from sklearn.metrics import euclidean_distances

    real, drawn = (rows[random.permutation(len(rows))[:TEST_ROWS]] for rows in (real, drawn))
    both = np.concatenate((real, drawn))
    squares = euclidean_distances(both, squared=True)
    squared_width = float(np.median(squares[np.triu_indices(len(both), 1)]))
    kernel = np.exp(-squares / max(squared_width, 1e-300))
    is_sample = np.arange(len(both)) >= len(real)
    divisions = [is_sample, *(random.permutation(is_sample) for _ in range(PERMUTATIONS))]
    observed, *others = squared_mmd(kernel, np.stack(divisions, axis=1))
    return float((1 + np.sum(others >= observed)) / (1 + PERMUTATIONS))


def nearest_distances(rows: Rows, training: Rows) -> Rows:
    """Return the distances [N] of rows [N, D] to their nearest neighbours in training [T, D]."""
    from sklearn.metrics import pairwise_distances_argmin_min

    distances: Rows = pairwise_distances_argmin_min(rows, training)[1]
    return distances


def copy_p_value(of_samples: Rows, of_rows: Rows) -> float:
    """Return the p-value of the hypothesis that samples are no nearer to training rows than real rows are.

    A one-sided rank test of the distances to the nearest training row (Meehan, Chaudhuri & Dasgupta 2020, "A
    non-parametric test to detect data-copying in generative models").
    """
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(of_samples, of_rows, alternative="less").pvalue)


def classify(
    rows: Rows, labels: Labels, drawn: Rows, random: np.random.RandomState
) -> tuple[float, float, float] | None:
    """Return the shares of samples drawn [M, D] and of rows that a classifier is sure of, and its accuracy on rows.

    The classifier is fitted to one half of the labelled rows [N, D]. The two numbers for rows come from the other half.
    The classifier is sure of a row or sample if its VOTES nearest rows all have the same label. Many poor samples lie
    between two classes, where the labels differ. Return None if a class has fewer than 2 x VOTES rows, or if there is
    only one class.
    """
    from sklearn.neighbors import KNeighborsClassifier

    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2 or counts.min() < 2 * VOTES:
        return None
    order = random.permutation(len(rows))[: 2 * CLASSIFIER_ROWS]
    fit, other = order[::2], order[1::2]
    classifier = KNeighborsClassifier(VOTES).fit(rows[fit], labels[fit])
    of_rows, of_samples = classifier.predict_proba(rows[other]), classifier.predict_proba(drawn)
    accuracy = float((classifier.classes_[of_rows.argmax(axis=1)] == labels[other]).mean())
    return float((of_samples.max(axis=1) > CONFIDENT).mean()), float((of_rows.max(axis=1) > CONFIDENT).mean()), accuracy


def condition_accuracy(
    rows: Rows, conditions: Floats, drawn: Rows, asked: Floats, random: np.random.RandomState
) -> tuple[float, float] | None:
    """Return the accuracy of a classifier of conditions on samples, and its accuracy on rows.

    On a sample, the classifier is right if it finds the condition that was asked for. It is fitted as in `classify`: to
    one half of the rows. Its accuracy on rows is measured on the other half. Return None if a condition has fewer than
    2 x VOTES rows, or if there is only one condition.

    Args:
        rows: rows, [N, D].
        conditions: the conditions of the rows, one-hot, [N, C].
        drawn: samples, [M, D].
        asked: the condition for which each sample was drawn, one-hot, [M, C].
    """
    from sklearn.neighbors import KNeighborsClassifier

    both, numbers = np.unique(np.concatenate((conditions, asked)), axis=0, return_inverse=True)
    labels, wanted = numbers[: len(rows)], numbers[len(rows) :]
    counts = np.bincount(labels, minlength=len(both))
    if len(both) < 2 or counts.min() < 2 * VOTES:
        return None
    order = random.permutation(len(rows))[: 2 * CLASSIFIER_ROWS]
    fit, other = order[::2], order[1::2]
    classifier = KNeighborsClassifier(VOTES).fit(rows[fit], labels[fit])
    of_samples, of_rows = classifier.predict(drawn) == wanted, classifier.predict(rows[other]) == labels[other]
    return float(of_samples.mean()), float(of_rows.mean())


def draw_rows(
    module: Any,
    draws: int,
    size: tuple[int, int],
    condition: torch.Tensor | None = None,
    *,
    with_noise: bool,
    device: torch.device | str = "cpu",
) -> Floats:
    """Return samples [draws, D] of `module` in raw units, with observation noise if `with_noise`.

    Args:
        module: a model with the methods `draw`, `decode` and, with noise, `observe`.
        size: the number of latents, K, and of features, D.
        condition: the condition to draw each sample for, one-hot, [draws, C]; None for a model without conditions.
        device: the device of the module.
    """
    random, parts = random_stream(0, SAMPLES), []
    latents, width = size
    with torch.inference_mode():
        for start in range(0, draws, BATCH):
            count = min(BATCH, draws - start)
            noise, choice = torch.randn(count, latents, generator=random), torch.rand(count, generator=random)
            if condition is not None:
                noise = torch.cat((noise, condition[start : start + count]), dim=1)
            rows = module.decode(module.draw(noise.to(device), choice.to(device)))
            row_noise = torch.randn(count, width, generator=random).to(device)
            parts.append(module.observe(rows, row_noise) if with_noise else rows)
    drawn: Floats = torch.cat(parts).cpu().numpy()
    return drawn


def column_scale(real: Rows, *, is_image: bool) -> Rows:
    """Return the divisor of each column, [D]: 1 for images, else the standard deviation of real rows [N, D]."""
    deviation: Rows = real.std(axis=0)
    return np.ones_like(deviation) if is_image else np.where(deviation > 0.0, deviation, 1.0)
