"""Fit whitenings whose means and covariances are stable even with few rows or with anomalies among the rows."""

import math

import numpy as np
import torch
from torch import Tensor

from models.whitening import Whitening

# For vectors wider than this, only variances are estimated: a covariance matrix would be larger than the network.
MAX_FULL_WIDTH = 2048
PSEUDO_ROWS = 3.0  # number of pseudo rows that contribute to each variance; see `fit_whitening`
MIN_RELATIVE_VARIANCE = 1e-12  # a coordinate with less variance than this share of the usual variance is constant
MIN_EFFECTIVE_ROWS = 10.0  # a small variance is trusted only if at least this many rows vary in its direction
MIN_ROWS = 30  # with fewer rows, the standard error of a variance exceeds a quarter of it, so no small one is trusted
# Two centred rows are opposite, so their products are equal, and Ledoit & Wolf 2004 see no error to shrink away. The
# covariance of so few rows would be singular: only variances are estimated.
TOO_FEW_ROWS = 2
# The likelihood uses this share of the rows. It ignores the least likely ones, such as those in which a column that is
# usually constant deviates.
ORDINARY_SHARE = 0.9
# An estimate that overstates the variance of a direction at most tenfold is kept: with it, a break of 30 true standard
# deviations still appears as at least 30 * sqrt(0.1) = 9.5 standard deviations.
HIDDEN_SHARE = 0.1
# Candidates for the weight of the identity. The smallest one is far above the rounding errors of float32 rows: their
# relative variance is about 1e-14.
SHRINKAGES = torch.logspace(-8, 0, 33, dtype=torch.float64)
SHRINKAGE_ROWS = 5_000  # the weight of the identity is chosen by the likelihood of at most this many rows
DOUBLE_WIDTH = 512  # up to this width, a whitening computes in float64
KEPT_PERCENT = 75  # percentage of the rows that a robust estimate uses
CONCENTRATION_STEPS = 5  # number of steps of a robust estimate; further steps would change few of the kept rows


def fit_whitening(
    vectors: Tensor, usual_variance: Tensor, robust: bool = False, noise: Tensor | float = 0.0
) -> Whitening:
    """Return the whitening of vectors [N, V].

    The covariance is shrunk as in Ledoit & Wolf 2004, because for few rows it is singular. A coordinate that is
    constant over these N rows may change in later rows. Each variance is therefore estimated as if there were
    PSEUDO_ROWS more rows, each of them one usual standard deviation away from the mean.

    Shrinkage and pseudo rows make this estimate cautious: it hides the small variances of columns that nearly repeat
    each other. A second estimate is shrunk only as much as the likelihood of the rows suggests (see
    `choose_shrinkage`). It replaces the cautious estimate in directions in which the cautious variance is too large by
    more than a factor of 1 / HIDDEN_SHARE.

    Args:
        usual_variance: the variance that is expected without data: a scalar, or one value per coordinate, [V].
        robust: use only the most concentrated rows.
        noise: variance to add to each coordinate, relative to the coordinate's own variance: a scalar, or [V].
    """
    vectors, usual_variance = vectors.double(), usual_variance.double()
    kept = vectors[most_concentrated_rows(vectors, usual_variance)] if robust else vectors
    whitening = _fit(kept, usual_variance, noise)
    return whitening if whitening.factor.dim() == 2 and len(whitening.mean) <= DOUBLE_WIDTH else whitening.float()


def most_concentrated_rows(vectors: Tensor, usual_variance: Tensor) -> Tensor:
    """Return the indices, ascending, of the KEPT_PERCENT percent of vectors [N, V] that lie closest together.

    Of all sets of that size, this set approximately minimises the determinant of its covariance. Each concentration
    step computes the mean and the covariance of the rows that the previous step kept, and keeps the rows with the
    smallest Mahalanobis distances: Rousseeuw & Van Driessen, "A fast algorithm for the minimum covariance determinant
    estimator", 1999, theorem 1. The first step uses medians instead of the mean and the covariance, because medians
    stay close to the normal rows if less than half of the rows are anomalies.
    """
    vectors, usual_variance = vectors.double(), usual_variance.double()
    count = -(-len(vectors) * KEPT_PERCENT // 100)
    centre = vectors.median(dim=0).values  # [V]
    deviation = 1.4826 * (vectors - centre).abs().median(dim=0).values  # [V]; for a Gaussian, the standard deviation
    variance = _with_pseudo_rows(deviation.square(), len(vectors), usual_variance)
    kept = Whitening(centre, variance.rsqrt()).distance(vectors).argsort()[:count]
    for _ in range(CONCENTRATION_STEPS):
        kept = _fit(vectors[kept], usual_variance).distance(vectors).argsort()[:count]
    return kept.sort().values


def choose_shrinkage(vectors: Tensor, correlation: Tensor) -> float:
    """Return the weight of the identity in the shrunk correlation matrix: the weight with the highest likelihood.

    The likelihood is the Gaussian density of each row under the matrix that is estimated from all other rows (Theiler,
    "The incredible shrinking covariance estimator", 2012, section 2.3; Hoffbeck & Landgrebe, "Covariance matrix
    estimation and classification with limited training data", 1996). It depends on the relative error of each
    eigenvalue. The Frobenius loss of Ledoit & Wolf 2004, however, depends on the large eigenvalues only. The weight
    that minimises it therefore hides small eigenvalues, which occur if columns nearly repeat each other.

    Args:
        vectors: centred rows, divided by the standard deviations, [N, V], N > 1.
        correlation: the sample correlation of all rows, [V, V].
    """
    # Each row is predicted from the others, so a row must not have a copy among them.
    some = torch.from_numpy(np.unique(vectors[:SHRINKAGE_ROWS].numpy(), axis=0))
    rows = len(some)
    if rows < MIN_ROWS:
        return 1.0
    eigenvalues, eigenvectors = torch.linalg.eigh(correlation)
    weights = (1.0 - SHRINKAGES) / (rows - 1)  # [S], the weight of one row in the matrix
    # [V, S], the eigenvalues for each candidate
    shrunk = rows * weights * eigenvalues.clamp(min=0.0).unsqueeze(1) + SHRINKAGES
    distances = (some @ eigenvectors).square() @ (1.0 / shrunk)  # [N, S]
    # Sherman-Morrison: leaving out a row divides its distance by `left` and multiplies the determinant by `left`.
    left = (1.0 - weights * distances).clamp(min=1e-12)  # [N, S]
    losses = (left.log() + distances / left).sort(dim=0).values[: math.ceil(ORDINARY_SHARE * rows)]
    loss = shrunk.log().sum(dim=0) + losses.mean(dim=0)  # [S]
    return float(SHRINKAGES[loss.argmin()])


def _effective_rows(vectors: Tensor) -> Tensor:
    """Return the effective number of rows [V] from which the variance of each coordinate of rows [N, V] is estimated.

    This is (sum of squares)^2 / (sum of fourth powers) (Kish, "Survey sampling", 1965): 1 if a single row deviates from
    0, N / 3 for a Gaussian.
    """
    squares = vectors.square()
    return squares.sum(dim=0).square() / squares.square().sum(dim=0)


def _with_pseudo_rows(variance: Tensor, rows: int, usual_variance: Tensor) -> Tensor:
    """Return the variance [V] over `rows` rows and PSEUDO_ROWS pseudo rows."""
    return (rows * variance + PSEUDO_ROWS * usual_variance) / (rows + PSEUDO_ROWS)


def _fit(vectors: Tensor, usual_variance: Tensor, noise: Tensor | float = 0.0) -> Whitening:
    rows, width = vectors.shape
    mean, variance = vectors.mean(dim=0), vectors.var(dim=0, correction=0)  # [V], [V]
    cautious = _with_pseudo_rows(variance, rows, usual_variance)  # [V]
    if width > MAX_FULL_WIDTH or rows <= TOO_FEW_ROWS:
        return Whitening(mean, 1.0 / (cautious * torch.as_tensor(1.0 + noise)).sqrt())
    covariance = _cautious_covariance(vectors - mean, cautious)
    if rows >= MIN_ROWS:
        covariance = _reveal_small_variances(covariance, vectors - mean, usual_variance)
    covariance.diagonal().add_(noise * cautious)
    factor = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), torch.eye(width, dtype=covariance.dtype), upper=False
    )
    return Whitening(mean, factor)


def _cautious_covariance(centred: Tensor, variance: Tensor) -> Tensor:
    """Return the covariance [V, V] of centred rows [N, V], shrunk as in Ledoit & Wolf 2004.

    Args:
        variance: the variance of each coordinate with pseudo rows, [V].
    """
    from sklearn.covariance import ledoit_wolf

    deviation = variance.sqrt()
    correlation = torch.from_numpy(ledoit_wolf((centred / deviation).numpy(), assume_centered=True)[0])
    correlation.diagonal().clamp_(min=1.0)  # with pseudo rows, some variances are below 1
    return correlation * torch.outer(deviation, deviation)


def _likely_covariance(centred: Tensor, cautious: Tensor, usual_variance: Tensor) -> Tensor:
    """Return the covariance [V, V] of centred rows [N, V], shrunk by `choose_shrinkage`.

    Args:
        cautious: the covariance from which constant coordinates take their variance, [V, V].
    """
    variance = centred.square().mean(dim=0)  # [V]
    constant = variance <= MIN_RELATIVE_VARIANCE * usual_variance
    deviation = torch.where(constant, cautious.diagonal(), variance).sqrt()  # [V]
    standardised = centred / deviation
    correlation = standardised.T @ standardised / len(centred)
    correlation.diagonal().clamp_(min=1.0)  # the diagonal of a constant coordinate is 0
    shrinkage = choose_shrinkage(standardised, correlation)
    correlation = (1.0 - shrinkage) * correlation
    correlation.diagonal().add_(shrinkage)
    return correlation * torch.outer(deviation, deviation)


def _reveal_small_variances(cautious: Tensor, centred: Tensor, usual_variance: Tensor) -> Tensor:
    """Return the covariance `cautious` [V, V] with the small variances of centred rows [N, V] that it hides.

    In coordinates in which `cautious` is the identity, each eigenvalue of the likely covariance is the ratio of the
    likely variance to the cautious variance in one direction. Even if all true ratios are 1, the ratios of N rows can
    be as small as (1 - sqrt(V / N))^2 by chance (Marchenko & Pastur 1967). The likely variance therefore replaces the
    cautious one only if the ratio is below HIDDEN_SHARE times this limit, and if enough rows vary in the direction. It
    is divided by this limit, because few rows understate the small variances most: without the division, fresh rows
    would lie far outside in many directions at once, and this noise would hide anomalies.
    """
    rows, width = centred.shape
    by_chance = max(0.0, 1.0 - math.sqrt(width / rows)) ** 2
    root = torch.linalg.cholesky(cautious)
    half = torch.linalg.solve_triangular(root, _likely_covariance(centred, cautious, usual_variance), upper=False)
    ratios, directions = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.T, upper=False))
    projected = torch.linalg.solve_triangular(root, centred.T, upper=False).T @ directions  # [N, V]
    is_hidden = (ratios < HIDDEN_SHARE * by_chance) & (_effective_rows(projected) >= MIN_EFFECTIVE_ROWS)
    basis = root @ directions
    # The ratio in a revealed direction may be too small by chance, by up to the factor `by_chance`: divide by it.
    revealed: Tensor = (basis * torch.where(is_hidden, ratios / by_chance, 1.0)) @ basis.T
    return revealed
