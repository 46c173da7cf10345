"""The regularised covariance of a whitening, computed with numpy in the most direct way."""

import numpy as np
import numpy.typing as npt
from sklearn.covariance import ledoit_wolf_shrinkage

from training.fitting.whitening import MIN_EFFECTIVE_ROWS, MIN_ROWS, PSEUDO_ROWS, SHRINKAGES

Doubles = npt.NDArray[np.float64]


def regularised_covariance(
    vectors: Doubles, usual: Doubles | float, noise: Doubles | float = 0.0
) -> tuple[Doubles, float]:
    """Return the regularised covariance [V, V] of vectors [N, V], and the weight of the identity in it.

    No two rows may be equal. `usual` is the usual variance, and `noise` the added variance relative to the variance of
    a coordinate; each is a scalar, or has the shape [V].
    """
    rows, centred = len(vectors), vectors - vectors.mean(axis=0)
    squares = centred**2
    variance, effective = squares.mean(axis=0), squares.sum(axis=0) ** 2 / (squares**2).sum(axis=0)
    prior = (rows * variance + PSEUDO_ROWS * usual) / (rows + PSEUDO_ROWS)
    logarithm = (effective * np.log(variance) + PSEUDO_ROWS * np.log(prior)) / (effective + PSEUDO_ROWS)
    certain = (effective >= MIN_EFFECTIVE_ROWS) & (rows >= MIN_ROWS)
    deviation = np.exp(logarithm / 2) if rows >= MIN_ROWS else np.sqrt(prior)
    standardised = centred / np.where(certain, np.sqrt(variance), deviation)
    correlation = standardised.T @ standardised / rows
    missing = np.diag(np.maximum(1.0 - correlation.diagonal(), 0.0))
    identity = np.eye(len(correlation))
    likelihoods = []
    for weight in SHRINKAGES.numpy():
        outer = standardised[:, :, None] * standardised[:, None, :]  # [N, V, V]
        whole = outer.sum(axis=0) + rows * missing
        others = (1 - weight) * (whole - outer) / (rows - 1) + weight * identity  # [N, V, V], each without one row
        distances = np.einsum("nv,nvw,nw->n", standardised, np.linalg.inv(others), standardised)
        likelihoods.append(-(np.linalg.slogdet(others)[1] + distances).mean())
    weight = float(SHRINKAGES[int(np.argmax(likelihoods))])
    if rows < MIN_ROWS:
        weight = float(ledoit_wolf_shrinkage(standardised, assume_centered=True))
    shrunk = (1 - weight) * (correlation + missing) + (weight + np.asarray(noise)) * identity
    return shrunk * np.outer(deviation, deviation), weight
