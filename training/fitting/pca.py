"""PCA in closed form, in float64: from the eigenvalues and eigenvectors of the covariance."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.pca import PCA
from training.data.moments import Moments, compute_moments
from training.errors import FitError

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

MIN_NOISE = 1e-6  # minimum of the noise variance, by which the score divides, relative to the mean variance per feature
BLOCK_VALUES = 4 << 20  # number of values of a tensor that are converted to float64 at a time

NO_COVARIANCE = "expected moments with a covariance"

Doubles = npt.NDArray[np.float64]


def pca_from_moments(moments: Moments, latents: int) -> PCA:
    """Return the exact PCA of rows with these moments.

    Tipping & Bishop 1999, eq. 7 and 8, with the covariance divided by N - 1.

    Raises:
        FitError: there are too few features or rows for the latents, or no column varies.
    """
    assert moments.covariance is not None, NO_COVARIANCE
    _check_size(moments.rows, len(moments.mean), latents)
    values, vectors = _largest_eigenpairs(moments.covariance.numpy(), latents)
    return _pca(moments, values, vectors)


def fit_pca(x: Tensor, latents: int) -> PCA:
    """Return the PCA of rows x [N, D], on the CPU. If D > N, the PCA is computed from a singular value decomposition.

    Raises:
        FitError: see `pca_from_moments`.
    """
    rows, features = x.shape
    _check_size(rows, features, latents)
    if features <= rows:
        return pca_from_moments(_moments(x, with_covariance=True), latents)
    moments = _moments(x, with_covariance=False)
    _, singular_values, vectors = torch.linalg.svd(x.double().cpu() - moments.mean, full_matrices=False)
    return _pca(moments, singular_values[:latents].square() / (rows - 1), vectors[:latents])


def spectrum_from_moments(moments: Moments) -> Tensor:
    """Return all eigenvalues [D] of the covariance, descending, float64."""
    assert moments.covariance is not None, NO_COVARIANCE
    return _eigenvalues(moments.covariance.numpy())


def spectrum(x: Tensor) -> Tensor:
    """Return the min(N, D) largest eigenvalues of the covariance of rows x [N, D], descending, float64."""
    rows, features = x.shape
    if features <= rows:
        return spectrum_from_moments(_moments(x, with_covariance=True))
    centred = (x.double() - x.double().mean(dim=0)).cpu().numpy()  # [N, D]
    return _eigenvalues(centred @ centred.T / (rows - 1))


def _check_size(rows: int, features: int, latents: int) -> None:
    possible = min(features, rows - 1)
    if latents > possible:
        raise FitError(
            f"PCA with {latents} latents needs at least {latents} features and {latents + 1} rows to fit, got "
            f"{features} features and {rows} rows: lower --latents to {max(1, possible)}, or add data"
        )


def _pca(moments: Moments, values: Tensor, vectors: Tensor) -> PCA:
    """Return the PCA. `values` [K] are the K largest eigenvalues, and `vectors` [K, D] are their eigenvectors."""
    features, total = len(moments.mean), moments.variance.sum()
    if float(total) <= 0.0:
        raise FitError(
            f"all {features} columns are constant over {moments.rows} rows: expected at least one column that varies"
        )
    noise = (total - values.sum()) / max(features - len(values), 1)  # the mean of the remaining eigenvalues
    noise = noise.clamp(min=MIN_NOISE * total / features)
    largest = vectors.abs().argmax(dim=1, keepdim=True)  # fix the sign: make the largest entry positive
    components = vectors * vectors.gather(1, largest).sign()
    return PCA(moments.mean, components, values.clamp(min=noise), noise)


def _moments(x: Tensor, *, with_covariance: bool) -> Moments:
    blocks = (rows.numpy(force=True) for rows in x.split(max(1, BLOCK_VALUES // x.shape[1])))
    return compute_moments(blocks, with_covariance)


def _largest_eigenpairs(symmetric: Doubles, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest eigenvalues, descending, and their eigenvectors as rows."""
    from scipy.linalg import eigh

    size = len(symmetric)
    with _one_blas_thread():
        values, vectors = eigh(symmetric, subset_by_index=(size - count, size - 1), check_finite=False)
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors.T[::-1].copy())


def eigenpairs(symmetric: Doubles) -> tuple[Tensor, Tensor]:
    """Return all eigenvalues of a symmetric matrix, descending, and their eigenvectors as rows. Both are float64."""
    return _largest_eigenpairs(symmetric, len(symmetric))


def _eigenvalues(symmetric: Doubles) -> Tensor:
    from scipy.linalg import eigvalsh

    with _one_blas_thread():
        values = eigvalsh(symmetric, check_finite=False)
    return torch.from_numpy(values[::-1].copy()).clamp(min=0.0)


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Limit LAPACK to one thread: rounding depends on the number of threads, but results must not."""
    with _blas_libraries().limit(limits=1, user_api="blas"):
        yield


@cache
def _blas_libraries() -> "ThreadpoolController":
    """Return the controller of the loaded libraries. Finding them takes 4 ms, as long as the PCA of a small table."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
