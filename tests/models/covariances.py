"""The regularised covariance of a whitening, computed with numpy, SciPy and scikit-learn in the most direct way."""

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh
from sklearn.covariance import LedoitWolf

from training.fitting.whitening import (
    HIDDEN_SHARE,
    MIN_EFFECTIVE_ROWS,
    MIN_ROWS,
    ORDINARY_SHARE,
    PSEUDO_ROWS,
    SHRINKAGES,
)

Doubles = npt.NDArray[np.float64]


def regularised_covariance(
    vectors: Doubles, usual: Doubles | float, noise: Doubles | float = 0.0
) -> tuple[Doubles, int]:
    """Return the regularised covariance [V, V] of vectors [N, V], and the number of small variances that it reveals.

    No two rows may be equal, and no coordinate constant. `usual` is the usual variance, and `noise` the added variance
    relative to the variance of a coordinate; each is a scalar, or has the shape [V].
    """
    rows, centred = len(vectors), vectors - vectors.mean(axis=0)
    deviation = np.sqrt((rows * centred.var(axis=0) + PSEUDO_ROWS * usual) / (rows + PSEUDO_ROWS))
    correlation = LedoitWolf(assume_centered=True).fit(centred / deviation).covariance_
    np.fill_diagonal(correlation, np.maximum(correlation.diagonal(), 1.0))
    covariance = correlation * np.outer(deviation, deviation)
    revealed = 0
    if rows >= MIN_ROWS:
        # For each column v of `directions`, v.T @ covariance @ v is 1 and v.T @ likely @ v is the ratio of v.
        # Here `likely` is likely_covariance(centred).
        ratios, directions = eigh(likely_covariance(centred), covariance)
        squares = (centred @ directions) ** 2
        effective = squares.sum(axis=0) ** 2 / (squares**2).sum(axis=0)
        by_chance = max(0.0, 1.0 - np.sqrt(centred.shape[1] / rows)) ** 2
        hidden = (ratios < HIDDEN_SHARE * by_chance) & (effective >= MIN_EFFECTIVE_ROWS)
        basis = covariance @ directions
        covariance, revealed = (basis * np.where(hidden, ratios / by_chance, 1.0)) @ basis.T, int(hidden.sum())
    return covariance + np.diag(noise * deviation**2), revealed


def likely_covariance(centred: Doubles) -> Doubles:
    """Return the covariance that is shrunk by the weight with the highest leave-one-out likelihood."""
    rows, deviation = len(centred), centred.std(axis=0)
    standardised = centred / deviation
    outer = standardised[:, :, None] * standardised[:, None, :]  # [N, V, V]
    whole, identity = outer.sum(axis=0), np.eye(len(deviation))
    likelihoods = []
    for weight in SHRINKAGES.numpy():
        others = (1 - weight) * (whole - outer) / (rows - 1) + weight * identity  # [N, V, V], each without one row
        distances = np.einsum("nv,nvw,nw->n", standardised, np.linalg.inv(others), standardised)
        by_row = -(np.linalg.slogdet(others)[1] + distances)
        likelihoods.append(np.sort(by_row)[::-1][: int(np.ceil(ORDINARY_SHARE * rows))].mean())
    weight = float(SHRINKAGES[int(np.argmax(likelihoods))])
    return np.asarray(((1 - weight) * whole / rows + weight * identity) * np.outer(deviation, deviation))
