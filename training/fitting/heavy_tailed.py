"""Fit the scores of models with a window. See `models.heavy_tailed`."""

import torch
from torch import Tensor

from models.autoencoder import Autoencoder
from models.core import Core
from models.heavy_tailed import HeavyTailedAutoencoder, HeavyTailedEnsemble, HeavyTailedPCA, HeavyTailedVAE
from models.vae import VAE
from models.whitening import Whitening
from training.data.moments import Moments
from training.fitting.pca import eigenpairs, pca_from_moments
from training.fitting.score_statistics import BATCH, fit_score_statistics
from training.fitting.whitening import DOUBLE_WIDTH, KEPT_PERCENT

EXPLAINED_VARIANCE = 0.95  # share of the variance that the latents of PCA explain; the other axes count as noise
MIN_USUAL = 1e-3  # nats, or squared model units; smaller terms are mostly rounding errors


def count_axes(variances: Tensor, rows: int) -> int:
    """Return how many principal axes explain EXPLAINED_VARIANCE.

    Args:
        variances: the variance of each axis, descending, [D].
        rows: the number of fit rows.
    """
    shares = variances.cumsum(dim=0) / variances.sum()
    needed = int((shares < EXPLAINED_VARIANCE).sum()) + 1
    return max(1, min(needed, len(variances) - 1, (rows - 1) // 2))


def fit_heavy_tailed_pca(moments: Moments, latents: int | None) -> HeavyTailedPCA:
    """Return the PCA of rows with these moments, in model units, with a Cauchy score.

    Args:
        latents: number of latents; None for as many as explain EXPLAINED_VARIANCE.

    Raises:
        FitError: see `pca_from_moments`.
    """
    assert moments.covariance is not None
    values, vectors = eigenpairs(moments.covariance.numpy())  # [D], [D, D]
    pca = pca_from_moments(moments, latents or count_axes(values.clamp(min=0.0), moments.rows))
    others = len(values) - len(pca.eigenvalues)
    deviation = torch.cat((pca.eigenvalues, pca.noise_variance.expand(others))).sqrt()  # [D]
    axes = Whitening(moments.mean, vectors / deviation.unsqueeze(1))
    if len(values) > DOUBLE_WIDTH:
        axes = axes.float()
    pca = pca.float()
    return HeavyTailedPCA(pca.mean, pca.components, pca.eigenvalues, pca.noise_variance, axes)


def with_heavy_tails(core: Core, held_out: Tensor, sample: Tensor, robust: bool) -> Core:
    """Return the model with the networks of `core` and a Cauchy score.

    Args:
        core: a trained autoencoder or VAE, without score statistics.
        held_out: rows [N, D] in model units, not used to train the networks.
        sample: rows [S, D] in model units, used to train the networks.
        robust: whether there may be anomalies among the rows.
    """
    if isinstance(core, VAE):
        return _with_heavy_tails(core, held_out, robust)
    assert isinstance(core, Autoencoder)
    fit_score_statistics(core, held_out, sample, robust)
    return HeavyTailedAutoencoder(core.encoder, core.decoder, core.whitening, core.latents)


def fit_heavy_tailed_ensemble(
    network: HeavyTailedAutoencoder, moments: Moments, held_out: Tensor, robust: bool
) -> HeavyTailedEnsemble:
    """Return the ensemble of `network` and PCA.

    Args:
        moments: moments of the fit rows in model units.
        held_out: rows [N, D] in model units, not used to train the network.
        robust: whether there may be anomalies among the rows.
    """
    pca = fit_heavy_tailed_pca(moments, None)
    with torch.no_grad():
        scores = torch.stack(
            [torch.cat([core.score(rows)[0] for rows in held_out.split(BATCH)]) for core in (network, pca)], dim=1
        ).double()  # [N, 2]
    kept = _smallest(scores, robust)
    spread = kept.std(dim=0, correction=0).clamp(min=1e-6 * kept.mean(dim=0).abs().clamp(min=1.0))
    return HeavyTailedEnsemble(network, pca, kept.mean(dim=0).float(), spread.float())


def _with_heavy_tails(vae: VAE, held_out: Tensor, robust: bool) -> HeavyTailedVAE:
    with torch.no_grad():
        latents = vae.encode(held_out[:1])[0].shape[1]
        ones = torch.ones(latents + held_out.shape[1])
        model = HeavyTailedVAE(vae.encoder, vae.decoder, vae.likelihood, ones)
        terms = torch.cat([model.terms(rows)[0] for rows in held_out.split(BATCH)]).double()  # [N, K + D]
        model.usual = _smallest(terms, robust).mean(dim=0).clamp(min=MIN_USUAL).float()
    return model.eval()


def _smallest(values: Tensor, robust: bool) -> Tensor:
    """Return values [N, V]. If `robust`, return only the smallest KEPT_PERCENT percent of each column."""
    kept = -(-len(values) * KEPT_PERCENT // 100) if robust else len(values)
    return values.sort(dim=0).values[:kept]
