"""Small untrained models of every kind, for tests that run for every kind."""

from collections.abc import Sequence

import torch

from models.autoencoder import Autoencoder
from models.calibration import Calibration
from models.completion import Chains, CompletingNetwork, CompletingPCA, CompletingPipeline
from models.core import Core
from models.ensemble import Ensemble, Neighbours
from models.explanation import Expectations
from models.likelihood import BernoulliLikelihood, GaussianLikelihood
from models.manifest import FORMAT_VERSION, CalibrationSize, Data, Feature, Golden, Manifest
from models.networks import mlp
from models.pca import PCA
from models.prior import Prior, gaussian_prior
from models.scaling import ImputingScaling, Scaling
from models.vae import VAE
from models.whitening import Whitening

B, D, K = 6, 5, 2
CORES = ("pca", "ae", "ae-diagonal", "ensemble", "vae-gaussian", "vae-per-feature", "vae-bernoulli")


def core(kind: str) -> Core:
    """Return an untrained core of `kind`, one of CORES."""
    match kind:
        case "pca":
            components = torch.linalg.qr(torch.randn(D, D))[0][:K]
            return PCA(torch.randn(D), components, torch.tensor([3.0, 2.0]), torch.tensor(0.5))
        case "ae":
            return _autoencoder()
        case "ae-diagonal":
            return _autoencoder(diagonal=True)
        case "ensemble":
            near = Neighbours(_whitening(D), torch.randn(7, D), torch.rand(7) + 0.1)
            return Ensemble(_autoencoder(), near, torch.rand(2) + 0.1)
        case "vae-gaussian":
            return _vae(GaussianLikelihood(torch.tensor([0.3])))
        case "vae-per-feature":
            return _vae(GaussianLikelihood(torch.rand(D) + 0.1))
        case "vae-bernoulli":
            return _vae(BernoulliLikelihood())
        case _:
            raise ValueError(f"expected one of {', '.join(CORES)}, got {kind}")


def pipeline(kind: str, seed: int = 0) -> CompletingPipeline:
    """Return a pipeline around `core(kind)`, with random parameters from `seed`.

    If `kind` ends in -imputing, the pipeline imputes missing values.
    """
    torch.manual_seed(seed)
    weights, factors = torch.tensor([0.3, 0.7]), torch.randn(2, K, K).tril()
    prior = (
        Prior(weights, torch.randn(2, K), factors)
        if kind.startswith(("ae", "ensemble"))
        else gaussian_prior(torch.ones(K))
    )
    scaling = Scaling(torch.randn(D), torch.rand(D) + 0.5)
    if kind.endswith("-imputing"):
        scaling = ImputingScaling(scaling, torch.randn(D))
    inner, calibration = core(kind.removesuffix("-imputing")), Calibration(20 * torch.rand(50))
    explanation = None if kind.startswith("ae") else _expectations()
    parts = scaling, inner, prior, calibration, explanation
    model: CompletingPipeline = (
        CompletingPCA(*parts) if isinstance(inner, PCA) else CompletingNetwork(*parts, chains=_chains())
    )
    return model.eval().requires_grad_(False)


def batch(rows: int = B, gaps: Sequence[tuple[int, int]] = ()) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return three tensors: rows [B, D] with NaN at `gaps`, standard normal noise [B, K], and uniform choices [B]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, D, generator=generator)
    for place in gaps:
        x[place] = torch.nan
    return x, torch.randn(rows, K, generator=generator), torch.rand(rows, generator=generator)


def manifest(name: str, weights_sha256: str, golden: Golden, format_version: int = FORMAT_VERSION) -> Manifest:
    """Return a manifest that matches every model of `pipeline`."""
    features = [Feature(name=f"x{i}", unit=None, median=0.0, minimum=-3.0, maximum=3.0) for i in range(D)]
    return Manifest(
        format_version=format_version,
        name=name,
        kind="pca",
        created="2026-01-01T00:00:00+00:00",
        shape=[D],
        features=features,
        latents=K,
        parts=["t2", "q"],
        pixel_range=None,
        training={},
        data=Data(source="none", rows=0, fingerprint="", fit=0, held_out=0, calibration=0),
        metrics={},
        calibration=CalibrationSize(rows=50, floor=1 / 51),
        golden=golden,
        versions={},
        weights_sha256=weights_sha256,
    )


def _expectations() -> Expectations:
    weights = 0.3 * torch.randn(D, D)
    return Expectations(torch.randn(D), torch.rand(D) + 0.5, weights.fill_diagonal_(0.0), torch.rand(D) + 0.2)


def _chains(chains: int = 4, candidates: int = 8) -> Chains:
    candidate_noise = torch.randn(candidates, K), torch.rand(candidates)
    deviation, spread, high = torch.rand(D) + 0.2, torch.rand(D) + 0.5, torch.rand(D) + 1.0
    return Chains(deviation, *candidate_noise, torch.randn(chains, K), torch.randn(chains, D), spread, -high, high)


def _vae(likelihood: GaussianLikelihood | BernoulliLikelihood) -> Core:
    return VAE(mlp([D, 8, 2 * K]), mlp([K, 8, D]), likelihood)


def _autoencoder(diagonal: bool = False) -> Autoencoder:
    return Autoencoder(mlp([D, 8, K]), mlp([K, 8, D]), _whitening(K + D, diagonal), K)


def _whitening(width: int, diagonal: bool = False) -> Whitening:
    factor = torch.rand(width) if diagonal else torch.randn(width, width).tril()
    return Whitening(torch.randn(width), factor)
