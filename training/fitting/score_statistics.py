"""Fit the statistics that a score needs besides the networks: covariances, neighbours, weights and calibration."""

import torch
from torch import Tensor

from models.autoencoder import Autoencoder
from models.calibration import Calibration
from models.conditional import ConditionalAutoencoder, LevelCorrection
from models.core import Core
from models.ensemble import Ensemble, Neighbours
from models.pca import PCA
from models.whitening import Whitening
from training.fitting.whitening import KEPT_PERCENT, MAX_FULL_WIDTH, SHRINKAGE_ROWS, fit_whitening

# The encoder adapts the latents to an anomaly, so latents should count less in the score than residuals. The added
# variance achieves this.
LATENT_NOISE = 1.0  # variance added to each latent, relative to the variance of the latent
ORDINARY_PERCENT = 90  # this percentage of the rows is ordinary: the rows with the smallest residuals
OUTLIER_FACTOR = 100.0  # an outlier has a squared residual above this factor times the largest of the ordinary rows
NEIGHBOUR_RANK = 5  # distances to a reference row are relative to that row's distance to its 5th neighbour
NEIGHBOUR_NOISE = 0.1  # variance added to each feature, relative to the feature's own, to ignore small differences
MAX_NEIGHBOURS = 2_048  # maximum number of reference rows; more rows would cost time and hardly change the score
MAX_NEIGHBOUR_VALUES = 2 << 20  # maximum number of float32 values in all reference rows together
MIN_VARIANCE = 1e-12  # in model units; a coordinate with less variance counts as constant
MIN_SCALE = 1e-5  # minimum scale per feature: the float32 rounding error of a squared distance
MIN_MEAN_DISTANCE = 1e-6
BATCH = 4096  # rows per forward pass; limits the memory


def fit_score_statistics(
    core: Core, held_out: Tensor, sample: Tensor, robust: bool = False, images: bool = False
) -> None:
    """Set the statistics that training leaves unset and the score of `core` needs. A VAE needs none.

    Args:
        held_out: inputs of `core` in model units, not used to train the networks: rows [N, D], with their conditions if
            `core` is conditional; or `sample` itself.
        sample: rows [S, D] in model units, used to train the networks, and the reference rows of an ensemble; without
            conditions.
        robust: whether there may be anomalies among the rows.
        images: whether the rows are images. The score of PCA treats the noise of images as isotropic.
    """
    if isinstance(core, PCA):
        if images or sample.shape[1] > MAX_FULL_WIDTH or len(sample) == 1:
            core.shrinkage = fit_shrinkage(sample, core.mean)
        else:
            core.whitening = _with_latents_first(fit_whitening(sample, _mean_variance(sample)), core.components)
    elif isinstance(core, Autoencoder):
        usual_variance = _mean_variance(sample)
        _fit_autoencoder(core, _without_outliers(core, held_out), usual_variance, robust)
    elif isinstance(core, Ensemble):
        usual_variance = _mean_variance(sample)
        kept = _without_outliers(core.network, held_out)
        distances = _distances_to_others(core.neighbours, kept) if held_out is sample else None
        _fit_ensemble(core, kept, usual_variance, robust, distances)


def fit_calibration(core: Core, u: Tensor, correction: LevelCorrection | None = None) -> Calibration:
    """Return the calibration from the scores of calibration rows u [N, D], in model units.

    If `core` is conditional, u is [N, D + C], and `correction` corrects the scores of rows without a level.
    """
    with torch.no_grad():
        scores = torch.cat([core.score(rows)[0] for rows in u.split(BATCH)])
        if correction is not None:
            scores = scores + correction(scores, u[:, -len(correction.columns) :])
        return Calibration(scores)


def fit_shrinkage(x: Tensor, mean: Tensor) -> Tensor:
    """Return the shrinkage of the covariance of rows x [N, D]: the weight of the identity, a scalar in [0, 1].

    Ledoit & Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004, lemma 3.3. The weight
    is proportional to 1 / N, so it is computed for at most SHRINKAGE_ROWS rows and then scaled to N rows.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    some = (x[:SHRINKAGE_ROWS] - mean.to(x)).double().cpu().numpy()
    return torch.tensor(float(ledoit_wolf_shrinkage(some, assume_centered=True)) * len(some) / len(x)).to(mean)


def _with_latents_first(whitening: Whitening, components: Tensor) -> Whitening:
    """Return `whitening` with a rotated output, whose first K coordinates whiten the latents.

    Args:
        whitening: the whitening of rows, [D], with a full factor.
        components: maps centred rows to latents, [K, D].
    """
    factor = whitening.factor.double()
    # The latents are components @ inverse(factor) @ (the whitened row), so they depend on K directions of that row.
    directions = torch.linalg.solve_triangular(factor, components.double(), upper=False, left=False).T  # [D, K]
    rotation = torch.linalg.qr(directions, mode="complete").Q  # [D, D]
    return Whitening(whitening.mean, (rotation.T @ factor).to(whitening.factor))


def fit_neighbours(x: Tensor) -> Neighbours:
    """Return the nearest-neighbour detector. Its reference rows are the first rows of x [N, D], in model units.

    The scale of a reference row is its squared distance to its 5th neighbour, plus the mean of these squared distances
    over all reference rows. Thanks to the mean, duplicate rows have a scale above 0.
    """
    whitening = fit_whitening(x[:SHRINKAGE_ROWS], _mean_variance(x), noise=NEIGHBOUR_NOISE)
    rows = whitening(x[: max(1, min(MAX_NEIGHBOURS, MAX_NEIGHBOUR_VALUES // x.shape[1]))])
    rank = min(NEIGHBOUR_RANK, len(rows) - 1) + 1  # the nearest row is the row itself
    distances = torch.cat([torch.cdist(part, rows).kthvalue(rank).values for part in rows.split(BATCH)])  # [R]
    squared = distances.square()
    return Neighbours(whitening, rows, (squared + squared.mean()).clamp(min=MIN_SCALE * x.shape[1]))


def _fit_autoencoder(core: Autoencoder, u: Tensor, usual_variance: Tensor, robust: bool) -> None:
    latents, residuals = _latents_and_residuals(core, u)
    latent_variance = latents.var(dim=0, correction=0).mean().clamp(min=MIN_VARIANCE)
    expected = torch.cat((latent_variance.expand(latents.shape[1]), usual_variance.expand(residuals.shape[1])))
    noise = torch.zeros_like(expected)  # [K + D]
    noise[: latents.shape[1]] = LATENT_NOISE
    core.whitening = fit_whitening(torch.cat((latents, residuals), dim=1), expected, robust, noise)


def _fit_ensemble(
    core: Ensemble, u: Tensor, usual_variance: Tensor, robust: bool, by_neighbours: Tensor | None
) -> None:
    _fit_autoencoder(core.network, u, usual_variance, robust)
    with torch.no_grad():
        by_network = torch.cat([core.network.score(rows)[0] for rows in u.split(BATCH)])  # [N]
        if by_neighbours is None:
            by_neighbours = torch.cat([core.neighbours(rows) for rows in u.split(BATCH)])  # [N]
        means = [_mean_distance(distances, robust) for distances in (by_network, by_neighbours)]
        core.weights = 1.0 / torch.stack([mean.clamp(min=MIN_MEAN_DISTANCE) for mean in means])


def _distances_to_others(neighbours: Neighbours, u: Tensor) -> Tensor:
    """Return what `neighbours` returns for rows u [N, D], [N], except that no row is its own neighbour."""
    distances = []
    for rows in u.split(BATCH):
        white = neighbours.whitening(rows)  # [B, D]
        joined = torch.cat((white, white.square().sum(dim=1, keepdim=True)), dim=1)  # [B, D + 1]
        to_references = torch.addmm(neighbours.offsets, joined, neighbours.slopes)  # [B, R]
        nearest = to_references.topk(min(2, to_references.shape[1]), largest=False).values  # [B, 2]
        is_itself = nearest[:, 0] <= MIN_SCALE * u.shape[1]  # the distance is 0 up to rounding
        distances.append(torch.where(is_itself, nearest[:, -1], nearest[:, 0]))
    return torch.cat(distances).clamp(min=0.0)


def _latents_and_residuals(core: Autoencoder, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents [N, K] and residuals [N, D] of rows u [N, D]. If `core` is conditional, u is [N, D + C]."""
    with torch.no_grad():
        latents = torch.cat([core.encode(rows)[0] for rows in u.split(BATCH)])
        codes = latents
        if isinstance(core, ConditionalAutoencoder):
            u, condition = u[:, : core.width], u[:, core.width :]
            codes = torch.cat((latents, condition), dim=1)
        return latents, u - torch.cat([core.decode(some) for some in codes.split(BATCH)])


def _without_outliers(core: Autoencoder, u: Tensor) -> Tensor:
    """Return at least 90 % of the rows of u [N, D]: all except those that the network reconstructs extremely badly.

    If a column was constant in the fit rows but changes in `u`, the network extrapolates arbitrarily. The square of a
    single residual could then dominate the variances, on which all scores depend.
    """
    squared = _latents_and_residuals(core, u)[1].double().square().sum(dim=1)  # [N]
    largest_ordinary = squared.kthvalue(-(-len(u) * ORDINARY_PERCENT // 100)).values
    return u[squared <= OUTLIER_FACTOR * largest_ordinary]


def _mean_variance(x: Tensor) -> Tensor:
    """Return the mean variance, a scalar, of those columns of x [S, D] that vary."""
    variance = x.double().var(dim=0, correction=0)
    return variance[variance > MIN_VARIANCE].mean().nan_to_num(1.0)


def _mean_distance(distances: Tensor, robust: bool) -> Tensor:
    """Return the mean of distances [N] as a scalar. If `robust`, use only the smallest KEPT_PERCENT percent of them."""
    kept = -(-len(distances) * KEPT_PERCENT // 100) if robust else len(distances)
    return distances.sort().values[:kept].mean()
