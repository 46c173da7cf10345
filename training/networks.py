"""The autoencoder and the VAE that a configuration asks for: built, given their objective, and trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.autoencoder import Autoencoder, Whitening
from models.likelihood import BernoulliLikelihood, GaussianLikelihood, Likelihood, OptimalGaussianLikelihood
from models.networks import mlp
from models.vae import VAE
from training.collapse import forecast, latents_kept, verdict
from training.config import TrainConfig
from training.descent import Descent, Run
from training.evaluate import active_latents
from training.objectives import (
    Terms,
    corrupt,
    elbo_terms,
    importance_weighted_terms,
    squared_error_terms,
    weight_penalty,
)
from training.pca import fit_pca
from training.progress import Reporter
from training.streams import NOISE, stream

SPECTRUM_ROWS = 2_000  # enough to see how much variance a few latents leave
NOISE_SPAN = 20.0  # the highest level of a denoising autoencoder's noise over the lowest
BATCH = 4096  # rows at a time: bounds memory


def fit_autoencoder(
    x: Tensor, held_out: Tensor, latents: int, config: TrainConfig, report: Reporter, run: Run | None
) -> Autoencoder:
    """An autoencoder of x [N, D]; its whitening is still the identity, to be fitted on rows not seen here."""
    features = x.shape[1]
    with _seeded(config.seed):
        model = Autoencoder(
            mlp([features, *config.hidden, latents]),
            mlp([latents, *reversed(config.hidden), features]),
            Whitening(torch.zeros(latents + features), torch.ones(latents + features)),
        )
    level = (config.noise / NOISE_SPAN, config.noise)

    def objective(rows: Tensor, random: torch.Generator, _: float) -> Terms:
        denoising = config.noise > 0 or config.masking > 0
        corrupted = corrupt(rows, level, config.masking, random) if denoising else None
        return _penalised(squared_error_terms(model, rows, corrupted), model, config)

    Descent(model, objective, x, held_out, config).run(report, run)
    return model


def fit_vae(x: Tensor, held_out: Tensor, latents: int, config: TrainConfig, report: Reporter, run: Run | None) -> VAE:
    """A VAE of x [N, D]."""
    features = x.shape[1]
    likelihood = likelihood_of(config, x, latents)
    with _seeded(config.seed):
        encoder, decoder = [features, *config.hidden, 2 * latents], [latents, *reversed(config.hidden), features]
        model = VAE(mlp(encoder), mlp(decoder), likelihood)

    def objective(rows: Tensor, random: torch.Generator, warmth: float) -> Terms:
        if config.samples > 1:
            noise = torch.randn(config.samples, len(rows), latents, generator=random).to(rows)  # [S, B, K]
            return _penalised(importance_weighted_terms(model, rows, noise), model, config)
        noise = torch.randn(len(rows), latents, generator=random).to(rows)  # [B, K]
        return _penalised(elbo_terms(model, rows, noise, warmth * config.beta, config.free_bits), model, config)

    fixed = config.variance if isinstance(config.variance, float) else None
    kept = latents_kept(x[:SPECTRUM_ROWS], latents, config.beta, fixed)
    gaussian = config.likelihood == "gaussian"  # the theory is the Gaussian's
    if gaussian:
        report.note(forecast(kept, latents, config.beta))
    Descent(model, objective, x, held_out, config).run(report, run)
    if isinstance(likelihood, OptimalGaussianLikelihood):
        likelihood.settle(_squared_error(model, x, config.seed))
    warning = verdict(active_latents(model, held_out), kept if gaussian else latents, latents)
    if warning:
        report.note(warning)
    return model


def likelihood_of(config: TrainConfig, x: Tensor, latents: int) -> Likelihood:
    """p(x | z) for rows x [N, D]."""
    if config.likelihood == "bernoulli":
        return BernoulliLikelihood()
    if isinstance(config.variance, float):
        return GaussianLikelihood(torch.tensor([config.variance]), learn=False)
    start = left_over(x, latents)  # [1]
    if config.variance == "optimal":
        return OptimalGaussianLikelihood(start)
    return GaussianLikelihood(start.repeat(x.shape[1]) if config.variance == "feature" else start)


def left_over(x: Tensor, latents: int) -> Tensor:
    """The variance [1] that as many linear latents would leave of x [N, D]: where a VAE's own starts.

    It is the optimum of the linear VAE (Lucas et al. 2019, "Don't blame the ELBO!"). Started much higher, latents die
    before their variance is worth encoding.
    """
    sample = x[:SPECTRUM_ROWS]
    linear = min(latents, x.shape[1] - 1, len(sample) - 1)
    return fit_pca(sample, max(linear, 1)).noise_variance.float().reshape(1).cpu()


def _squared_error(vae: VAE, x: Tensor, seed: int) -> Tensor:
    """E_q of the mean squared error a feature over all rows x [N, D], one draw a row: a scalar."""
    random, total = stream(seed, NOISE), torch.zeros((), device=x.device)
    with torch.no_grad():
        for rows in x.split(BATCH):
            mean, std = vae.encode(rows)
            noise = torch.randn(mean.shape, generator=random).to(rows)
            total += (rows - vae.decode(mean + std * noise)).square().sum()
    return total / x.numel()


def _penalised(terms: Terms, model: nn.Module, config: TrainConfig) -> Terms:
    if config.l2 > 0:
        terms["loss"] = terms["loss"] + config.l2 * weight_penalty(model)
    return terms


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global stream, which initial weights are drawn from, seeded here and restored after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
