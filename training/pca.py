"""PCA in closed form: one covariance, one eigendecomposition, in float64."""

import torch
from torch import Tensor

from models.pca import PCA
from training.errors import FitError

NOISE_FLOOR = 1e-6  # of the mean variance: the noise where nothing is left over, for Q divides by it


def fit_pca(x: Tensor, latents: int) -> PCA:
    """PCA of x [N, D], exact, in float64. Tipping & Bishop 1999, eq. 7 and 8, with the N - 1 covariance.

    Raises FitError for fewer features or rows than latents, or when no column varies.
    """
    rows, features = x.shape
    if latents > min(features, rows - 1):
        raise FitError(
            f"{latents} latents need at least as many features and one row more, got {features} features and {rows} "
            f"rows to fit: ask for --latents {max(1, min(features, rows - 1))} or fewer"
        )
    x = x.double()
    mean = x.mean(dim=0)  # [D]
    eigenvalues, components = spectrum(x - mean)  # [R], [R, D]
    if float(eigenvalues[0]) <= 0.0:
        raise FitError(f"all {features} columns are constant over {rows} rows: there is nothing to learn")
    kept, discarded = eigenvalues[:latents], eigenvalues[latents:]
    floor = NOISE_FLOOR * eigenvalues.sum() / features
    noise = (discarded.sum() / max(features - latents, 1)).clamp(min=floor)
    return PCA(mean, components[:latents], kept.clamp(min=noise), noise)


def spectrum(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and unit eigenvectors (rows) of the covariance of centred [N, D], float64."""
    rows, features = centred.shape
    if features <= rows:
        values, vectors = torch.linalg.eigh(centred.T @ centred / (rows - 1))
        values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1).T
    else:
        _, singular, vectors = torch.linalg.svd(centred, full_matrices=False)
        values = singular.square() / (rows - 1)
    largest = vectors.abs().argmax(dim=1, keepdim=True)  # signs are free: the largest entry becomes positive
    return values, vectors * vectors.gather(1, largest).sign()
