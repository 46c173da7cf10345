"""Fitting networks by gradient descent: the algorithm of the seed text. Model units in, a core model out."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.autoencoder import Autoencoder, Whitening
from models.likelihood import BernoulliLikelihood, GaussianLikelihood
from models.networks import mlp
from models.vae import VAE
from training.config import TrainConfig
from training.errors import FitError
from training.objectives import Terms, elbo_terms, squared_error_terms
from training.pca import fit_pca
from training.progress import Reporter

STEPS = 3_000  # that the default number of epochs aims at: the demonstration models stop improving there
SPECTRUM_ROWS = 2_000  # enough to see how much variance a few latents leave
FEWEST_EPOCHS, MOST_EPOCHS = 10, 400
LARGEST_GRADIENT = 100.0  # norm; far above a healthy step's, so only an exploding one is cut

Objective = Callable[[Tensor, torch.Generator], Terms]  # rows [B, D] and a stream of noise to the loss and its terms


def fit_autoencoder(x: Tensor, latents: int, config: TrainConfig, report: Reporter) -> Autoencoder:
    """An autoencoder of x [N, D]; its whitening is still the identity, to be fitted on rows not seen here."""
    features = x.shape[1]
    with _seeded(config.seed):
        model = Autoencoder(
            mlp([features, *config.hidden, latents]),
            mlp([latents, *reversed(config.hidden), features]),
            Whitening(torch.zeros(latents + features), torch.ones(latents + features)),
        )
    descend(model, lambda batch, _: squared_error_terms(model, batch), x, config, report)
    return model


def fit_vae(x: Tensor, latents: int, config: TrainConfig, report: Reporter) -> VAE:
    """A VAE of x [N, D]."""
    features = x.shape[1]
    with _seeded(config.seed):
        model = VAE(
            mlp([features, *config.hidden, 2 * latents]),
            mlp([latents, *reversed(config.hidden), features]),
            BernoulliLikelihood() if config.likelihood == "bernoulli" else GaussianLikelihood(_left_over(x, latents)),
        )

    def objective(batch: Tensor, random: torch.Generator) -> Terms:
        noise = torch.randn(len(batch), latents, generator=random).to(batch)  # [B, K]
        return elbo_terms(model, batch, noise, config.beta)

    descend(model, objective, x, config, report)
    return model


def _left_over(x: Tensor, latents: int) -> Tensor:
    """The variance [1] that as many linear latents would leave of x [N, D]: where a VAE's own starts.

    It is the optimum of the linear VAE (Lucas et al. 2019, "Don't blame the ELBO!"). Started much higher, latents die
    before their variance is worth encoding.
    """
    sample = x[:SPECTRUM_ROWS]
    linear = min(latents, x.shape[1] - 1, len(sample) - 1)
    return fit_pca(sample, max(linear, 1)).noise_variance.float().reshape(1).cpu()


def descend(model: nn.Module, objective: Objective, x: Tensor, config: TrainConfig, report: Reporter) -> None:
    """Minimise `objective` over x [N, D] by changing `model`: shuffle, minibatch, step, epoch after epoch.

    Adam (Kingma & Ba 2015) on a one-cycle schedule (Smith & Topin 2018). Raises FitError when the loss becomes infinite
    or NaN.
    """
    rows = x.shape[0]
    batch_size = min(config.batch_size, rows)
    steps_an_epoch = -(-rows // batch_size)
    epochs = config.epochs or min(max(-(-STEPS // steps_an_epoch), FEWEST_EPOCHS), MOST_EPOCHS)
    model.to(x.device).train()
    optimiser = torch.optim.Adam(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=epochs * steps_an_epoch)
    random = torch.Generator().manual_seed(config.seed)  # on the CPU, so that a seed means the same everywhere
    report.start(f"{config.name} ({config.model})", epochs * steps_an_epoch)
    for epoch in range(1, epochs + 1):
        sums: dict[str, Tensor] = {}
        for chosen in torch.randperm(rows, generator=random).split(batch_size):
            terms = objective(x[chosen.to(x.device)], random)
            _step(model, terms.pop("loss"), optimiser, schedule)
            for name, value in terms.items():  # weighted by rows: the last batch may be short
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach() * len(chosen)
        means = {name: float(value) / rows for name, value in sums.items()}
        if not all(map(math.isfinite, means.values())):
            raise FitError(f"the loss stopped being finite in epoch {epoch} ({means}): lower --learning-rate")
        report.epoch(epoch, epoch * steps_an_epoch, means)
    model.eval()


def _step(
    model: nn.Module,
    loss: Tensor,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)
    optimiser.step()
    schedule.step()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global stream, which initial weights are drawn from, seeded here and restored after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
