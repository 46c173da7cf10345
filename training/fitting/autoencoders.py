"""Build and train the networks of an autoencoder or a VAE."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.autoencoder import Autoencoder
from models.conditional import ConditionalAutoencoder, ConditionalVAE
from models.levels import LevelSoftmax, MixedLikelihood
from models.likelihood import BernoulliLikelihood, GaussianLikelihood, Likelihood, OptimalGaussianLikelihood
from models.scaling import Scaling
from models.vae import VAE
from models.whitening import no_whitening
from training.config import TrainConfig
from training.data.batches import Batches
from training.errors import FitError
from training.fitting.acceleration import accelerated
from training.fitting.architecture import build_decoder, build_encoder
from training.fitting.checkpoint import CheckpointStore
from training.fitting.collapse import collapse_warning, forecast_message, predict_active_latents
from training.fitting.distributed import ProcessGroup
from training.fitting.latents import count_active_latents
from training.fitting.losses import for_losses
from training.fitting.objectives import ElboObjective, Objective, SquaredErrorObjective
from training.fitting.pca import fit_pca
from training.fitting.trainer import Trainer
from training.progress import Reporter
from training.random_streams import NOISE, random_stream

SPECTRUM_ROWS = 2_000  # this many rows suffice to estimate the variance that the latents leave unexplained
ALONE_VARIANCE = (
    0.5  # start of the variance of the numbers if a table with columns of text has at most one, model units
)
MIN_FEATURE_VARIANCE = 1e-4  # in model units; if lower, rounding errors of one feature would dominate the likelihood
BATCH = 4096  # rows per forward pass; limits the memory


@dataclass(frozen=True, kw_only=True)
class FitTask:
    """The data and the options for fitting one network.

    Args:
        config: the options, with all defaults filled in.
        shape: shape of one row; the product is D.
        unit_range: whether the rows are images whose values are in [0, 1] in model units.
        latents: number of latents K.
        batches: the fit rows in model units, on the device that trains.
        sample: some or all of the fit rows [S, D], in model units, on the CPU.
        held_out: rows [M, D] for validation, in model units, on the device that trains.
        reporter: receives the progress and the notes.
        checkpoints: the store for the state of the run; None to save no checkpoints.
        processes: the processes that train the network together.
        levels: number of levels of each column of conditions. With conditions, the rows are [B, D + C]: the last C
            columns are the condition, one-hot.
    """

    config: TrainConfig
    shape: tuple[int, ...]
    unit_range: bool
    latents: int
    batches: Batches
    sample: Tensor
    held_out: Tensor
    reporter: Reporter
    checkpoints: CheckpointStore | None = None
    processes: ProcessGroup = field(default_factory=ProcessGroup)
    levels: tuple[int, ...] = ()
    category_sizes: tuple[int, ...] = ()
    scaling: Scaling | None = None

    @property
    def width(self) -> int:
        """D: the number of features."""
        return math.prod(self.shape)

    @property
    def features(self) -> Tensor:
        """The features of `sample`, [S, D]."""
        return self.sample[:, : self.width]


def fit_autoencoder(task: FitTask) -> Autoencoder:
    """Return a trained autoencoder. Its score statistics are placeholders until `fit_score_statistics` sets them."""
    with _seeded(task.config.seed):
        encoder = build_encoder(task.config, task.shape, task.latents, sum(task.levels))
        decoder = build_decoder(task.config, task.shape, task.latents, task.unit_range, sum(task.levels))
    if task.category_sizes:
        assert task.scaling is not None
        decoder.append(LevelSoftmax(task.category_sizes, task.scaling.shift, task.scaling.scale))
    parts = encoder, decoder, no_whitening(task.latents + task.width), task.latents
    model = ConditionalAutoencoder(*parts, task.width) if task.levels else Autoencoder(*parts)
    _train(model, SquaredErrorObjective(model, task.config, task.levels), task)
    return model


def fit_vae(task: FitTask) -> VAE:
    """Return a trained VAE. Report how many latents should stay active, and warn if far fewer are active.

    Raises:
        FitError: the options exclude each other, or do not work with several processes.
    """
    config = task.config
    if task.processes.count > 1 and (config.variance == "optimal" or config.free_bits > 0):
        raise FitError(
            "--variance optimal and --free-bits need the whole batch in one process: "
            "train without torchrun, or without these options"
        )
    likelihood = build_likelihood(config, task.features, task.latents, task.category_sizes)
    with _seeded(config.seed):
        encoder = build_encoder(config, task.shape, 2 * task.latents, sum(task.levels))
        decoder = build_decoder(config, task.shape, task.latents, task.unit_range, sum(task.levels))
        parts = encoder, decoder, likelihood
        model = ConditionalVAE(*parts, task.width) if task.levels else VAE(*parts)

    fixed_variance = config.variance if isinstance(config.variance, float) else None
    predicted = predict_active_latents(task.features[:SPECTRUM_ROWS], task.latents, config.beta, fixed_variance)
    if config.likelihood == "gaussian":
        task.reporter.note(forecast_message(predicted, task.latents, config.beta))
    else:
        predicted = task.latents  # the prediction holds only for a Gaussian likelihood

    _train(model, ElboObjective(model, task.latents, config, task.levels), task)
    if isinstance(likelihood, OptimalGaussianLikelihood):
        likelihood.set_variance(_mean_squared_error(model, task.sample.to(task.held_out.device), config.seed))
    warning = collapse_warning(count_active_latents(model, task.held_out), predicted, task.latents)
    if warning:
        task.reporter.note(warning)
    return model


def _train(model: Autoencoder | VAE, objective: Objective, task: FitTask) -> None:
    with accelerated(model, task.config):
        trainer = Trainer(
            model=model,
            objective=objective,
            batches=task.batches,
            held_out=task.held_out,
            config=task.config,
            reporter=task.reporter,
            checkpoints=task.checkpoints,
            processes=task.processes,
        )
        trainer.train()


def build_likelihood(config: TrainConfig, x: Tensor, latents: int, category_sizes: tuple[int, ...] = ()) -> Likelihood:
    """Return p(x | z) as configured. A learned variance starts at `residual_variance` of rows x [N, D].

    Args:
        category_sizes: the number of levels of each category, whose features are the last ones.
    """
    if category_sizes:
        return _mixed_likelihood(config, x[:, : x.shape[1] - sum(category_sizes)], latents, category_sizes)
    if config.likelihood == "bernoulli":
        return BernoulliLikelihood()
    if config.binarise:
        raise FitError("--binarise makes every value 0 or 1, which a gaussian does not fit: add --likelihood bernoulli")
    if isinstance(config.variance, float):
        return GaussianLikelihood(torch.tensor([config.variance]), learn=False)
    start = residual_variance(x, latents)  # [1]
    if config.variance == "optimal":
        return OptimalGaussianLikelihood(start)
    if config.variance == "feature":
        return GaussianLikelihood(start.repeat(x.shape[1]), lowest=math.log(MIN_FEATURE_VARIANCE))
    return GaussianLikelihood(start)


def _mixed_likelihood(
    config: TrainConfig, numbers: Tensor, latents: int, category_sizes: tuple[int, ...]
) -> MixedLikelihood:
    """Return p(x | z) for a table with categories and these `numbers` [N, D - L]."""
    if config.likelihood != "gaussian" or config.binarise or config.variance == "optimal":
        raise FitError(
            "a table with columns of text needs --likelihood gaussian and another --variance than optimal: its levels "
            "have a categorical likelihood of their own"
        )
    if isinstance(config.variance, float):
        return MixedLikelihood(category_sizes, torch.tensor([config.variance]), learn=False)
    width = numbers.shape[1]
    start = residual_variance(numbers, latents) if width > 1 else torch.tensor([ALONE_VARIANCE])  # [1]
    if config.variance == "feature" and width:
        return MixedLikelihood(category_sizes, start.repeat(width), lowest=math.log(MIN_FEATURE_VARIANCE))
    return MixedLikelihood(category_sizes, start)


def residual_variance(x: Tensor, latents: int) -> Tensor:
    """Return the mean variance [1] of the directions that `latents` principal components of x [N, D] leave out.

    This is the optimal variance of a linear VAE (Lucas et al. 2019, "Don't blame the ELBO!"). A learned variance starts
    at this value. If the variance started much higher, latents would collapse before training had lowered the
    variance.
    """
    sample = x[:SPECTRUM_ROWS]
    components = min(latents, x.shape[1] - 1, len(sample) - 1)
    return fit_pca(sample, max(components, 1)).noise_variance.float().reshape(1).cpu()


def _mean_squared_error(vae: VAE, x: Tensor, seed: int) -> Tensor:
    """Return the mean of (x - x_hat)^2 over all values of x [N, D]. x_hat comes from one posterior sample per row."""
    random, total, count = random_stream(seed, NOISE), torch.zeros((), device=x.device), 0
    with torch.no_grad():
        for inputs in x.split(BATCH):
            given, rows = for_losses(vae, inputs)
            mean, std = vae.encode(inputs)
            noise = torch.randn(mean.shape, generator=random).to(rows)
            x_hat = vae.likelihood.mean(given.decoder(mean + std * noise))
            total += (rows - x_hat).square().sum()
            count += rows.numel()
    return total / count


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator, which initialises weights, and restore its state at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
