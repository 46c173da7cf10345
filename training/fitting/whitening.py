"""Fit whitenings whose means and covariances are stable even with few rows or with anomalies among the rows."""

import torch
from torch import Tensor

from models.autoencoder import Whitening

# For vectors wider than this, only variances are estimated: a covariance matrix would be larger than the network.
MAX_FULL_WIDTH = 2048
PSEUDO_ROWS = 3.0  # number of pseudo rows that contribute to each variance; see `fit_whitening`
KEPT_PERCENT = 75  # percentage of the rows that a robust estimate uses
CONCENTRATION_STEPS = 5  # number of steps of a robust estimate; further steps would change few of the kept rows


def fit_whitening(
    vectors: Tensor, usual_variance: Tensor, robust: bool = False, noise: Tensor | float = 0.0
) -> Whitening:
    """Return the whitening of vectors [N, V].

    A coordinate that is constant over these N rows may change in later rows. Each variance is therefore estimated as
    if there were PSEUDO_ROWS more rows, each of them one usual standard deviation away from the mean. The correlation
    matrix is shrunk as in Ledoit & Wolf 2004. Without shrinkage, the matrix would be singular for few rows.

    Args:
        usual_variance: the variance that is expected without data: a scalar, or one value per coordinate, [V].
        robust: use only the most concentrated rows.
        noise: variance to add to each coordinate, relative to the coordinate's own variance: a scalar, or [V].
    """
    vectors, usual_variance = vectors.double(), usual_variance.double()
    kept = vectors[most_concentrated_rows(vectors, usual_variance)] if robust else vectors
    return _fit(kept, usual_variance, noise).float()


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


def _with_pseudo_rows(variance: Tensor, rows: int, usual_variance: Tensor) -> Tensor:
    """Return the variance [V] over `rows` rows and PSEUDO_ROWS pseudo rows. See `fit_whitening`."""
    return (rows * variance + PSEUDO_ROWS * usual_variance) / (rows + PSEUDO_ROWS)


def _fit(vectors: Tensor, usual_variance: Tensor, noise: Tensor | float = 0.0) -> Whitening:
    from sklearn.covariance import ledoit_wolf

    rows, width = vectors.shape
    mean = vectors.mean(dim=0)  # [V]
    deviation = _with_pseudo_rows(vectors.var(dim=0, correction=0), rows, usual_variance).sqrt()  # [V]
    if width > MAX_FULL_WIDTH or rows == 1:
        return Whitening(mean, 1.0 / (deviation * torch.as_tensor(1.0 + noise).sqrt()))
    correlation = torch.from_numpy(ledoit_wolf(((vectors - mean) / deviation).numpy(), assume_centered=True)[0])
    correlation.diagonal().clamp_(min=1.0).add_(noise)  # with pseudo rows, some variances are below 1
    inverse = torch.linalg.solve_triangular(
        torch.linalg.cholesky(correlation), torch.diag(1.0 / deviation), upper=False
    )
    return Whitening(mean, inverse)
