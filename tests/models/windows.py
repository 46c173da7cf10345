"""Small untrained models of every kind with a window, and windows for them."""

import torch

from models.calibration import Calibration
from models.core import Core
from models.explanation import Expectations
from models.heavy_tailed import HeavyTailedAutoencoder, HeavyTailedEnsemble, HeavyTailedPCA, HeavyTailedVAE
from models.likelihood import GaussianLikelihood
from models.networks import mlp
from models.observation import Observation
from models.pipeline import Pipeline
from models.prior import gaussian_prior
from models.scaling import ImputingScaling, Scaling
from models.whitening import Whitening
from models.windowed import Summaries, Windowed
from models.windows import summary_width
from tests.models.builders import B, D, K

N = 9
SCALES = (3, N)
V = summary_width(D, SCALES)
CORES = ("pca", "ae", "vae", "ensemble")


def windowed(kind: str, seed: int = 0) -> Windowed:
    """Return a model of `kind`, one of CORES, with random parameters. With -imputing, it imputes missing values."""
    torch.manual_seed(seed)
    scaling = Scaling(torch.randn(D), torch.rand(D) + 0.5)
    if kind.endswith("-imputing"):
        scaling = ImputingScaling(scaling, torch.randn(D))
    weights = (0.3 * torch.randn(V, V)).fill_diagonal_(0.0)
    pipeline = Pipeline(
        Scaling(torch.randn(V), torch.rand(V) + 0.5),
        _core(kind.removesuffix("-imputing")),
        gaussian_prior(torch.ones(K)),
        Calibration(20 * torch.rand(50)),
        Expectations(torch.randn(V), torch.rand(V) + 0.5, weights, torch.rand(V) + 0.2),
    )
    noise = Observation(0.1 * torch.randn(D, D), torch.full((D,), -9.0), torch.full((D,), 9.0), torch.arange(D) == 1)
    return Windowed(scaling, Summaries(SCALES), pipeline, noise).eval().requires_grad_(False)


def windows(gaps: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return windows [B, N, D] of which the last one is short, noise [B, K], and uniform choices [B].

    Args:
        gaps: whether some values are missing in rows that are there.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, N, D, generator=generator)
    x[-1, :-4] = torch.nan
    if gaps:
        x[0, 2, 1] = x[1, -1, 0] = torch.nan
    return x, torch.randn(B, K, generator=generator), torch.rand(B, generator=generator)


def _core(kind: str) -> Core:
    match kind:
        case "pca":
            components = torch.linalg.qr(torch.randn(V, V))[0][:K]
            axes = Whitening(torch.randn(V), torch.randn(V, V))
            return HeavyTailedPCA(torch.randn(V), components, torch.tensor([3.0, 2.0]), torch.tensor(0.5), axes)
        case "ae":
            whitening = Whitening(torch.randn(K + V), torch.randn(K + V, K + V))
            return HeavyTailedAutoencoder(mlp([V, 8, K]), mlp([K, 8, V]), whitening, K)
        case "vae":
            likelihood = GaussianLikelihood(torch.rand(V) + 0.1)
            return HeavyTailedVAE(mlp([V, 8, 2 * K]), mlp([K, 8, V]), likelihood, torch.rand(K + V) + 0.1)
        case "ensemble":
            network, pca = _core("ae"), _core("pca")
            assert isinstance(network, HeavyTailedAutoencoder)
            assert isinstance(pca, HeavyTailedPCA)
            return HeavyTailedEnsemble(network, pca, torch.randn(2), torch.rand(2) + 0.5)
        case _:
            raise ValueError(f"expected one of {', '.join(CORES)}, got {kind}")
