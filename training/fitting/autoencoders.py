"""The autoencoder and the VAE that a configuration asks for: built, given their objective, and trained."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from models.autoencoder import Autoencoder, no_whitening
from models.likelihood import BernoulliLikelihood, GaussianLikelihood, Likelihood, OptimalGaussianLikelihood
from models.vae import VAE
from training.config import TrainConfig
from training.data.batches import Batches
from training.errors import FitError
from training.fitting.architecture import build_decoder, build_encoder
from training.fitting.collapse import collapse_warning, forecast_message, predict_active_latents
from training.fitting.distributed import ProcessGroup
from training.fitting.latents import count_active_latents
from training.fitting.objectives import (
    LossTerms,
    binarise,
    corrupt,
    elbo_terms,
    importance_weighted_terms,
    squared_error_terms,
    weight_penalty,
)
from training.fitting.pca import fit_pca
from training.fitting.trainer import Run, Trainer
from training.progress import Reporter
from training.random_streams import NOISE, random_stream

SPECTRUM_ROWS = 2_000  # enough to see how much variance a few latents leave
SMALLEST_VARIANCE = 1e-4  # of a feature by itself, in model units: below, the rounding of one would outweigh all others
NOISE_SPAN = 20.0  # the highest level of a denoising autoencoder's noise over the lowest
BATCH = 4096  # rows at a time: bounds memory


@dataclass(frozen=True)
class FitTask:
    """What a fit works with and on.

    Args:
        shape: of one row; its product is D.
        unit: whether rows are pictures of which model units are [0, 1].
        batches: the rows to fit, in model units, on the device.
        sample: some of them [S, D], as many as memory bears.
        held_out: rows [M, D] in model units, on the device, by which the best epoch is chosen.
        run: where the run keeps its state, if it does.
        processes: those that share it.
    """

    config: TrainConfig
    shape: tuple[int, ...]
    unit: bool
    latents: int
    batches: Batches
    sample: Tensor
    held_out: Tensor
    report: Reporter
    run: Run | None = None
    processes: ProcessGroup = field(default_factory=ProcessGroup)

    def descend(self, model: "Autoencoder | VAE", objective: "SquaredErrorObjective | ElboObjective") -> None:
        """Train `model`."""
        with _accelerated(model, self.config):
            descent = Trainer(model, objective, self.batches, self.held_out, self.config, self.processes)
            descent.run(self.report, self.run)


class SquaredErrorObjective:
    """The objective of an autoencoder, denoising if the configuration says so."""

    def __init__(self, model: Autoencoder, config: TrainConfig) -> None:
        self._model, self._config = model, config
        self._noise = config.noise or 0.0

    def draw(self, rows: Tensor, random: torch.Generator, _warmth: float) -> tuple[Tensor, ...]:
        """The rows [B, D], and what the encoder shall see of them if that is something else."""
        if self._noise > 0 or self._config.masking > 0:
            return rows, corrupt(rows, (self._noise / NOISE_SPAN, self._noise), self._config.masking, random)
        return (rows,)

    def terms(self, drawn: tuple[Tensor, ...], _warmth: float) -> LossTerms:
        """The squared error."""
        return _penalised(squared_error_terms(self._model, *drawn), self._model, self._config)


class ElboObjective:
    """The objective of a VAE: the negative ELBO, or the importance-weighted bound for more than one draw a row."""

    def __init__(self, vae: VAE, latents: int, config: TrainConfig) -> None:
        self._vae, self._latents, self._config = vae, latents, config

    def draw(self, rows: Tensor, random: torch.Generator, warmth: float) -> tuple[Tensor, ...]:
        """The rows [B, D], binary if asked for, and normal noise [B, S, K]: S is 1 until the warm-up is behind."""
        if self._config.binarise:
            rows = binarise(rows, random)
        draws = self._config.samples if warmth >= 1.0 else 1
        return rows, torch.randn(len(rows), draws, self._latents, generator=random).to(rows)

    def terms(self, drawn: tuple[Tensor, ...], warmth: float) -> LossTerms:
        """The bound."""
        rows, noise = drawn
        if self._config.samples > 1:
            terms = importance_weighted_terms(self._vae, rows, noise.transpose(0, 1))
        else:
            terms = elbo_terms(self._vae, rows, noise[:, 0], warmth * self._config.beta, self._config.free_bits)
        return _penalised(terms, self._vae, self._config)


def fit_autoencoder(task: FitTask) -> Autoencoder:
    """An autoencoder; the statistics of its score are still to be fitted, on rows not seen here."""
    config, width = task.config, task.sample.shape[1]
    with _seeded(config.seed):
        encoder = build_encoder(config, task.shape, task.latents)
        decoder = build_decoder(config, task.shape, task.latents, task.unit)
    model = Autoencoder(encoder, decoder, no_whitening(task.latents + width), task.latents)
    task.descend(model, SquaredErrorObjective(model, config))
    return model


def fit_vae(task: FitTask) -> VAE:
    """A VAE. Raises FitError where several processes would not give what one does."""
    config = task.config
    if task.processes.count > 1 and (config.variance == "optimal" or config.free_bits > 0):
        raise FitError(
            "--variance optimal and --free-bits look at a whole batch: train in one process, or without them"
        )
    likelihood = build_likelihood(config, task.sample, task.latents)
    with _seeded(config.seed):
        encoder = build_encoder(config, task.shape, 2 * task.latents)
        model = VAE(encoder, build_decoder(config, task.shape, task.latents, task.unit), likelihood)
    fixed = config.variance if isinstance(config.variance, float) else None
    kept = predict_active_latents(task.sample[:SPECTRUM_ROWS], task.latents, config.beta, fixed)
    gaussian = config.likelihood == "gaussian"  # the theory is the Gaussian's
    if gaussian:
        task.report.note(forecast_message(kept, task.latents, config.beta))
    task.descend(model, ElboObjective(model, task.latents, config))
    if isinstance(likelihood, OptimalGaussianLikelihood):
        likelihood.settle(_squared_error(model, task.sample.to(task.held_out.device), config.seed))
    warning = collapse_warning(
        count_active_latents(model, task.held_out), kept if gaussian else task.latents, task.latents
    )
    if warning:
        task.report.note(warning)
    return model


def build_likelihood(config: TrainConfig, x: Tensor, latents: int) -> Likelihood:
    """p(x | z) for rows x [N, D]."""
    if config.likelihood == "bernoulli":
        return BernoulliLikelihood()
    if config.binarise:
        raise FitError("--binarise makes every value 0 or 1: add --likelihood bernoulli")
    if isinstance(config.variance, float):
        return GaussianLikelihood(torch.tensor([config.variance]), learn=False)
    start = residual_variance(x, latents)  # [1]
    if config.variance == "optimal":
        return OptimalGaussianLikelihood(start)
    if config.variance == "feature":
        return GaussianLikelihood(start.repeat(x.shape[1]), lowest=math.log(SMALLEST_VARIANCE))
    return GaussianLikelihood(start)


def residual_variance(x: Tensor, latents: int) -> Tensor:
    """The variance [1] that as many linear latents would leave of x [N, D]: where a VAE's own starts.

    It is the optimum of the linear VAE (Lucas et al. 2019, "Don't blame the ELBO!"). Started much higher, latents die
    before their variance is worth encoding.
    """
    sample = x[:SPECTRUM_ROWS]
    linear = min(latents, x.shape[1] - 1, len(sample) - 1)
    return fit_pca(sample, max(linear, 1)).noise_variance.float().reshape(1).cpu()


def _squared_error(vae: VAE, x: Tensor, seed: int) -> Tensor:
    """E_q of the mean squared error a feature over all rows x [N, D], one draw a row: a scalar."""
    random, total = random_stream(seed, NOISE), torch.zeros((), device=x.device)
    with torch.no_grad():
        for rows in x.split(BATCH):
            mean, std = vae.encode(rows)
            noise = torch.randn(mean.shape, generator=random).to(rows)
            total += (rows - vae.decode(mean + std * noise)).square().sum()
    return total / x.numel()


def _penalised(terms: LossTerms, model: nn.Module, config: TrainConfig) -> LossTerms:
    if config.l2 > 0:
        terms["loss"] = terms["loss"] + config.l2 * weight_penalty(model)
    return terms


class _Bf16(nn.Module):
    """A network whose products are made in bfloat16; what goes in and comes out is float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs] to [B, outputs]."""
        with torch.autocast(x.device.type, torch.bfloat16):
            y: Tensor = self.network(x)
        return y.float()


@contextmanager
def _accelerated(model: "Autoencoder | VAE", config: TrainConfig) -> Iterator[None]:
    """The encoder and the decoder as the configuration wants them to train, and after that as they were."""
    encoder, decoder = model.encoder, model.decoder
    if config.precision == "bf16":
        model.encoder, model.decoder = _Bf16(model.encoder), _Bf16(model.decoder)
    if config.compile:
        model.encoder, model.decoder = (cast(nn.Module, torch.compile(n)) for n in (model.encoder, model.decoder))
    try:
        yield
    finally:
        model.encoder, model.decoder = encoder, decoder


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global stream, which initial weights are drawn from, seeded here and restored after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
