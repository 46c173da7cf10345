"""PCA in closed form: one covariance, its largest eigenvalues and their eigenvectors, in float64."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.pca import PCA
from training.data.moments import Moments, compute_moments
from training.errors import FitError

NOISE_FLOOR = 1e-6  # of the mean variance: the noise where nothing is left over, for Q divides by it
BLOCK_VALUES = 4 << 20  # of a tensor, that are turned into float64 at a time

NO_COVARIANCE = "expected moments with their covariance, made with full=True"

Doubles = npt.NDArray[np.float64]


def pca_from_moments(moments: Moments, latents: int) -> PCA:
    """PCA of rows that have these moments, exact. Tipping & Bishop 1999, eq. 7 and 8, with the N - 1 covariance.

    Raises FitError for fewer features or rows than latents, or when no column varies.
    """
    assert moments.covariance is not None, NO_COVARIANCE
    _check(moments.rows, len(moments.mean), latents)
    values, vectors = _largest(moments.covariance.numpy(), latents)
    return _pca(moments, values, vectors)


def fit_pca(x: Tensor, latents: int) -> PCA:
    """PCA of x [N, D], as `pca_of` its moments; where D > N, from the singular values of x. On the CPU.

    Raises FitError as `pca_of` does.
    """
    rows, features = x.shape
    _check(rows, features, latents)
    if features <= rows:
        return pca_from_moments(_moments(x), latents)
    measured = _moments(x, full=False)
    _, singular, vectors = torch.linalg.svd(x.double().cpu() - measured.mean, full_matrices=False)
    return _pca(measured, singular[:latents].square() / (rows - 1), vectors[:latents])


def spectrum_from_moments(moments: Moments) -> Tensor:
    """All eigenvalues [D] of the covariance, descending, float64."""
    assert moments.covariance is not None, NO_COVARIANCE
    return _eigenvalues(moments.covariance.numpy())


def spectrum(x: Tensor) -> Tensor:
    """The eigenvalues [R] of the covariance of rows x [N, D], descending, float64; R is the smaller of N and D."""
    rows, features = x.shape
    if features <= rows:
        return spectrum_from_moments(_moments(x))
    centred = (x.double() - x.double().mean(dim=0)).cpu().numpy()  # [N, D]
    return _eigenvalues(centred @ centred.T / (rows - 1))


def _check(rows: int, features: int, latents: int) -> None:
    if latents > min(features, rows - 1):
        raise FitError(
            f"{latents} latents need at least as many features and one row more, got {features} features and {rows} "
            f"rows to fit: ask for --latents {max(1, min(features, rows - 1))} or fewer"
        )


def _pca(moments: Moments, values: Tensor, vectors: Tensor) -> PCA:
    """The model with the largest eigenvalues [K] and their eigenvectors [K, D], of any sign."""
    features, total = len(moments.mean), moments.variance.sum()
    if float(total) <= 0.0:
        raise FitError(f"all {features} columns are constant over {moments.rows} rows: there is nothing to learn")
    left = (total - values.sum()) / max(features - len(values), 1)  # the mean of the eigenvalues left out
    noise = left.clamp(min=NOISE_FLOOR * total / features)
    largest = vectors.abs().argmax(dim=1, keepdim=True)  # signs are free: the largest entry becomes positive
    components = vectors * vectors.gather(1, largest).sign()
    return PCA(moments.mean, components, values.clamp(min=noise), noise)


def _moments(x: Tensor, full: bool = True) -> Moments:
    return compute_moments((rows.numpy(force=True) for rows in x.split(max(1, BLOCK_VALUES // x.shape[1]))), full)


def _largest(symmetric: Doubles, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues, descending, and their eigenvectors, as rows."""
    from scipy.linalg import eigh

    size = len(symmetric)
    with _one_thread():
        values, vectors = eigh(symmetric, subset_by_index=(size - count, size - 1), check_finite=False)
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors.T[::-1].copy())


def _eigenvalues(symmetric: Doubles) -> Tensor:
    from scipy.linalg import eigvalsh

    with _one_thread():
        values = eigvalsh(symmetric, check_finite=False)
    return torch.from_numpy(values[::-1].copy()).clamp(min=0.0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """LAPACK rounds as its threads divide the work; with one, a machine's number of cores changes no bit."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield
