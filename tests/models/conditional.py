"""Small untrained conditional models."""

import torch

from models.calibration import Calibration
from models.conditional import (
    ConditionalAutoencoder,
    ConditionalPipeline,
    ConditionalPrior,
    ConditionalVAE,
    LevelCorrection,
)
from models.likelihood import GaussianLikelihood
from models.networks import mlp
from models.scaling import Scaling
from models.whitening import Whitening

B, D, L = 6, 5, 2
LEVELS = (3, 2)  # levels of the columns
C = sum(LEVELS)
KINDS = ("ae", "vae")


def conditional(kind: str, seed: int = 0) -> ConditionalPipeline:
    """Return a conditional pipeline of `kind`, one of KINDS, with random parameters from `seed`.

    The condition with the first level of each column has a mixture of its own, far away from the other one.
    """
    torch.manual_seed(seed)
    decoder = mlp([L + C, 7, D])
    core: ConditionalAutoencoder | ConditionalVAE
    if kind == "ae":
        whitening = Whitening(torch.randn(L + D), torch.eye(L + D) + 0.1 * torch.randn(L + D, L + D).tril())
        core = ConditionalAutoencoder(mlp([D + C, 7, L]), decoder, whitening, L, D)
    else:
        core = ConditionalVAE(mlp([D + C, 7, 2 * L]), decoder, GaussianLikelihood(torch.tensor([0.3])), D)
    prior = ConditionalPrior(
        torch.tensor([0.5, 0.5, 1.0]),
        torch.tensor([[0.0, 0.0], [1.0, 1.0], [100.0, -100.0]]),
        0.1 * torch.eye(L).expand(3, L, L),
        torch.stack((torch.zeros(C), condition(0, 0))),
    )
    sets = 2 ** len(LEVELS) - 1
    knots = torch.rand(sets, 4).cumsum(dim=1)
    slopes = torch.cat((0.1 * torch.randn(sets, 3), torch.zeros(sets, 1)), dim=1)
    correction = LevelCorrection(LEVELS, knots, slopes, torch.randn(sets))
    scaling = Scaling(torch.randn(D), torch.rand(D) + 0.5)
    model = ConditionalPipeline(scaling, core, prior, Calibration(20 * torch.rand(50)), correction)
    return model.eval().requires_grad_(False)


def condition(first: int | None, second: int | None) -> torch.Tensor:
    """Return a condition, one-hot [C], with these levels; None for a column without a level."""
    result = torch.zeros(C)
    if first is not None:
        result[first] = 1.0
    if second is not None:
        result[LEVELS[0] + second] = 1.0
    return result


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows with conditions [B, D + C], noise with conditions [B, L + C], and uniform choices [B]."""
    generator = torch.Generator().manual_seed(1)
    conditions = torch.stack([condition(i % 3 if i else None, i % 2 if i != 1 else None) for i in range(B)])
    x = torch.cat((torch.randn(B, D, generator=generator), conditions), dim=1)
    noise = torch.cat((torch.randn(B, L, generator=generator), conditions), dim=1)
    return x, noise, torch.rand(B, generator=generator)
