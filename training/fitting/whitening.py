"""Fit whitenings whose means and covariances are stable even with few rows or with anomalies among the rows."""

import numpy as np
import torch
from torch import Tensor

from models.whitening import Whitening

# For vectors wider than this, only variances are estimated: a covariance matrix would be larger than the network.
MAX_FULL_WIDTH = 2048
PSEUDO_ROWS = 3.0  # number of pseudo rows that contribute to each variance; see `_regularised_variance`
MIN_RELATIVE_VARIANCE = 1e-12  # a coordinate with less variance than this share of the usual variance is constant
MIN_EFFECTIVE_ROWS = 3.0  # with fewer effective rows, the correlations of a coordinate are uncertain
MIN_ROWS = (
    30  # with fewer rows, all coordinates are uncertain: the standard error of a variance exceeds a quarter of it
)
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

    Each variance is regularised by `_regularised_variance`, because a coordinate that is constant over these N rows may
    change in later rows. The correlation matrix is shrunk towards the identity by `choose_shrinkage`, because for few
    rows it is singular.

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
    eigenvalue. The Frobenius loss of Ledoit & Wolf 2004 does not: it depends on the large eigenvalues only, and so its
    weight hides the small ones, which columns that nearly repeat each other have.

    With fewer than MIN_ROWS rows, that likelihood is a matter of chance, and the weight is that of Ledoit & Wolf.

    Args:
        vectors: centred rows, divided by the standard deviations, [N, V], N > 1.
        correlation: the sample correlation of all rows, [V, V].
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    some = torch.from_numpy(np.unique(vectors[:SHRINKAGE_ROWS].numpy(), axis=0))  # a copy of a row would predict it
    rows = len(some)
    if rows < MIN_ROWS:
        return float(ledoit_wolf_shrinkage(vectors.numpy(), assume_centered=True))
    eigenvalues, eigenvectors = torch.linalg.eigh(correlation)
    weights = (1.0 - SHRINKAGES) / (rows - 1)  # [S], the weight of one row in the matrix
    # [V, S], the eigenvalues for each candidate
    shrunk = rows * weights * eigenvalues.clamp(min=0.0).unsqueeze(1) + SHRINKAGES
    distances = (some @ eigenvectors).square() @ (1.0 / shrunk)  # [N, S]
    # Sherman-Morrison: leaving out a row divides its distance by `left` and multiplies the determinant by `left`.
    left = (1.0 - weights * distances).clamp(min=1e-12)  # [N, S]
    loss = shrunk.log().sum(dim=0) + (left.log() + distances / left).mean(dim=0)  # [S]
    return float(SHRINKAGES[loss.argmin()])


def _effective_rows(centred: Tensor, usual_variance: Tensor) -> Tensor:
    """Return the effective number of rows [V] from which the variance of each coordinate of rows [N, V] is estimated.

    This is (sum of squares)^2 / (sum of fourth powers) (Kish, "Survey sampling", 1965): 0 for a constant coordinate, 1
    if a single row deviates, N / 3 for a Gaussian.
    """
    squares = centred.square()
    effective = squares.sum(dim=0).square() / squares.square().sum(dim=0)  # [V], NaN for a constant coordinate
    return torch.where(squares.mean(dim=0) > MIN_RELATIVE_VARIANCE * usual_variance, effective, 0.0)


def _regularised_variance(variance: Tensor, rows: int, effective: Tensor, usual_variance: Tensor) -> Tensor:
    """Return the sample variance [V] of `rows` rows, regularised by pseudo rows.

    With at least MIN_ROWS rows, the result is the weighted geometric mean of the sample variance, with the weight
    `effective` [V], and of the variance with pseudo rows, with the weight PSEUDO_ROWS. The mean is geometric because
    the error of a variance is relative: in an arithmetic mean, a small variance drowns in the usual variance even if
    all rows confirm it. With fewer rows, the result is the variance with pseudo rows.
    """
    prior = _with_pseudo_rows(variance, rows, usual_variance)
    share = effective / (effective + PSEUDO_ROWS)
    return prior if rows < MIN_ROWS else prior * (variance / prior).clamp(min=MIN_RELATIVE_VARIANCE).pow(share)


def _with_pseudo_rows(variance: Tensor, rows: int, usual_variance: Tensor) -> Tensor:
    """Return the variance [V] over `rows` rows and PSEUDO_ROWS pseudo rows."""
    return (rows * variance + PSEUDO_ROWS * usual_variance) / (rows + PSEUDO_ROWS)


def _fit(vectors: Tensor, usual_variance: Tensor, noise: Tensor | float = 0.0) -> Whitening:
    rows, width = vectors.shape
    mean = vectors.mean(dim=0)  # [V]
    variance, effective = vectors.var(dim=0, correction=0), _effective_rows(vectors - mean, usual_variance)
    deviation = _regularised_variance(variance, rows, effective, usual_variance).sqrt()  # [V]
    if width > MAX_FULL_WIDTH or rows == 1:
        return Whitening(mean, 1.0 / (deviation * torch.as_tensor(1.0 + noise).sqrt()))
    is_certain = (effective >= MIN_EFFECTIVE_ROWS) & (rows >= MIN_ROWS)
    standardised = (vectors - mean) / torch.where(is_certain, variance.sqrt(), deviation)
    correlation = standardised.T @ standardised / rows
    # The diagonal is below 1 only for uncertain coordinates. The rest is noise that no other coordinate predicts.
    correlation.diagonal().clamp_(min=1.0)
    shrinkage = choose_shrinkage(standardised, correlation)
    correlation = (1.0 - shrinkage) * correlation
    correlation.diagonal().add_(shrinkage + noise)
    inverse = torch.linalg.solve_triangular(
        torch.linalg.cholesky(correlation), torch.diag(1.0 / deviation), upper=False
    )
    return Whitening(mean, inverse)
