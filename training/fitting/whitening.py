"""Fit whitenings: estimates of a mean and a covariance that are stable with few rows and with anomalies among them."""

import torch
from torch import Tensor

from models.autoencoder import Whitening

MAX_FULL_WIDTH = 2048  # with more coordinates only the variances are estimated: a full matrix would outgrow the network
PSEUDO_ROWS = 3.0  # extra rows that each variance counts, one usual standard deviation from the mean
KEPT_PERCENT = 75  # share of the rows that a robust estimate uses
CONCENTRATION_STEPS = 5  # later steps change few of the rows


def fit_whitening(
    vectors: Tensor, usual_variance: Tensor, robust: bool = False, noise: Tensor | float = 0.0
) -> Whitening:
    """Return the whitening of vectors [N, V].

    Each variance is estimated as if PSEUDO_ROWS more rows had been seen, one usual standard deviation from the mean: a
    coordinate that was constant over N rows may still change. The correlations are shrunk as in Ledoit & Wolf 2004,
    because the plain matrix is singular for few rows.

    Args:
        usual_variance: the variance to expect of a coordinate without data, a scalar or [V].
        robust: use only the most concentrated rows.
        noise: variance to add to each coordinate, in units of its own variance, a scalar or [V].
    """
    vectors, usual_variance = vectors.double(), usual_variance.double()
    kept = vectors[most_concentrated_rows(vectors, usual_variance)] if robust else vectors
    return _fit(kept, usual_variance, noise).float()


def most_concentrated_rows(vectors: Tensor, usual_variance: Tensor) -> Tensor:
    """Return the indices, ascending, of the KEPT_PERCENT of vectors [N, V] with the smallest covariance determinant.

    Concentration steps: each keeps the rows that are nearest by the mean and covariance of the rows kept before.
    Rousseeuw & Van Driessen, "A fast algorithm for the minimum covariance determinant estimator", 1999, theorem 1. The
    first step uses the medians of the columns, which stay close to normal rows while less than half are anomalies.
    """
    vectors, usual_variance = vectors.double(), usual_variance.double()
    count = -(-len(vectors) * KEPT_PERCENT // 100)
    centre = vectors.median(dim=0).values  # [V]
    deviation = 1.4826 * (vectors - centre).abs().median(dim=0).values  # [V]; the factor is that of a Gaussian
    variance = _with_pseudo_rows(deviation.square(), len(vectors), usual_variance)
    kept = Whitening(centre, variance.rsqrt()).distance(vectors).argsort()[:count]
    for _ in range(CONCENTRATION_STEPS):
        kept = _fit(vectors[kept], usual_variance).distance(vectors).argsort()[:count]
    return kept.sort().values


def _with_pseudo_rows(variance: Tensor, rows: int, usual_variance: Tensor) -> Tensor:
    """Return the variance [V] of `rows` rows and PSEUDO_ROWS more, each one usual deviation from the mean."""
    return (rows * variance + PSEUDO_ROWS * usual_variance) / (rows + PSEUDO_ROWS)


def _fit(vectors: Tensor, usual_variance: Tensor, noise: Tensor | float = 0.0) -> Whitening:
    from sklearn.covariance import ledoit_wolf

    rows, width = vectors.shape
    mean = vectors.mean(dim=0)  # [V]
    deviation = _with_pseudo_rows(vectors.var(dim=0, correction=0), rows, usual_variance).sqrt()  # [V]
    if width > MAX_FULL_WIDTH or rows == 1:
        return Whitening(mean, 1.0 / (deviation * torch.as_tensor(1.0 + noise).sqrt()))
    correlation = torch.from_numpy(ledoit_wolf(((vectors - mean) / deviation).numpy(), assume_centered=True)[0])
    correlation.diagonal().clamp_(min=1.0).add_(noise)  # the pseudo rows made some variances smaller than 1
    inverse = torch.linalg.solve_triangular(
        torch.linalg.cholesky(correlation), torch.diag(1.0 / deviation), upper=False
    )
    return Whitening(mean, inverse)
