"""Measure the negative log-likelihood (NLL) of MNIST test digits under VAEs trained by Elbo, in nats per digit.

    python benchmarks/training/mnist_likelihood.py
    python benchmarks/training/mnist_likelihood.py --recipe conv
    python benchmarks/training/mnist_likelihood.py --runs FOLDER    # saves checkpoints there, and resumes from them
    python benchmarks/training/mnist_likelihood.py --smoke          # a few digits, two epochs

Training digits are binarised anew in each epoch. Test digits are binarised once (Salakhutdinov & Murray 2008). The NLL
of a test digit is minus the logarithm of the mean of 1,000 importance weights (Burda, Grosse & Salakhutdinov 2016,
section 5). The benchmark prints a Markdown table with the mean NLL over the test digits. CPU minutes are the processor
time of training on one core.

If MNIST is not available, the benchmark uses scikit-learn's digits.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.data import load_images
from models.vae import VAE
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Split, Table
from training.fitting.checkpoint import CheckpointStore
from training.fitting.latents import count_active_latents
from training.fitting.losses import binarise, log_weights
from training.fitting.pipeline import fit_pipeline
from training.fitting.prepared_data import prepare_data
from training.progress import PlainReporter

HELD_OUT_ROWS = 500  # number of held-out rows (they select the epoch), and of calibration rows (they are not used)
SEED = 0  # seed of the split, the binarised test digits, and the importance samples
DRAWS_PER_BATCH = 500  # number of pairs of a digit and an importance sample that are evaluated at once
FIT_ROWS = 60_000 - 2 * HELD_OUT_ROWS

COMMON = {"model": "vae", "name": "mnist", "latents": 50, "likelihood": "bernoulli", "binarise": True}
RECIPES = {
    "reference": TrainConfig.model_validate(
        COMMON
        | {"hidden": (200, 200), "activation": "tanh", "batch_size": 100, "learning_rate": 2e-3}
        | {"epochs": 300, "warm_up": 100 * -(-FIT_ROWS // 100)}
    ),
    "conv": TrainConfig.model_validate(
        COMMON
        | {"network": "conv", "hidden": (32, 64), "dense": (256,), "batch_size": 128, "learning_rate": 3e-3}
        | {"epochs": 100, "samples": 4, "warm_up": 86 * -(-FIT_ROWS // 128)}
    ),
}


@dataclass(frozen=True)
class Result:
    """The measured results of one recipe.

    Args:
        recipe: name of the recipe.
        minutes: CPU minutes of training.
        negative_elbo: negative ELBO in nats per digit.
        nll: negative log-likelihood in nats per digit.
        error: standard error of `nll`, which is a mean over the test digits.
        active: number of active latents.
    """

    recipe: str
    minutes: float
    negative_elbo: float
    nll: float
    error: float
    active: int

    def __str__(self) -> str:
        nll = f"{self.nll:.2f} ± {self.error:.2f}"
        return f"| {self.recipe} | {self.minutes:.1f} | {self.negative_elbo:.2f} | {nll} | {self.active} |"


def load_digits(smoke: bool) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the training images and the test images, each [N, H, W] with values from 0 to 255."""
    train, test = (load_images(part)[1].astype(np.float32) for part in ("train", "test"))
    return (train[:400], test[:10]) if smoke else (train, test)


def create_table(images: npt.NDArray[np.float32]) -> tuple[Table, Split]:
    """Return the images as a table, and a split with HELD_OUT_ROWS held-out rows and as many calibration rows.

    With few images, a quarter of them are held out, and a quarter are calibration rows.
    """
    shape = images.shape[1:]
    names = [f"pixel[{row},{column}]" for row, column in np.ndindex(*shape)]
    x = images.reshape(len(images), -1)
    missing = np.zeros(len(names), np.int64)
    table = Table(RowStore(x), shape, names, [None] * len(names), None, (0.0, 255.0), "MNIST", missing=missing)
    order = np.random.RandomState(SEED).permutation(len(x))
    rows = min(HELD_OUT_ROWS, len(x) // 4)
    held_out, calibration, fit = np.split(order, [rows, 2 * rows])
    return table, Split(fit, held_out, calibration)


def train_vae(config: TrainConfig, images: npt.NDArray[np.float32], checkpoints: CheckpointStore | None) -> VAE:
    """Return a VAE trained on the images."""
    table, split = create_table(images)
    vae = fit_pipeline(config, prepare_data(table, split), PlainReporter(), checkpoints=checkpoints).core
    assert isinstance(vae, VAE)
    return vae


def train_or_load(
    config: TrainConfig, images: npt.NDArray[np.float32], checkpoints: CheckpointStore | None
) -> tuple[VAE, float]:
    """Return the trained VAE and the CPU minutes of its training.

    If the folder of `checkpoints` contains a trained VAE, load it. Otherwise train a VAE, and save it in that
    folder. If `checkpoints` is None, save nothing.
    """
    saved = checkpoints.folder / "trained.pt" if checkpoints else None
    if saved and saved.exists():
        vae, minutes = torch.load(saved, weights_only=False)
        return vae, minutes
    started = time.process_time()
    vae = train_vae(config, images, checkpoints)
    minutes = (time.process_time() - started) / 60.0
    print(f"trained in {minutes:.1f} CPU minutes", file=sys.stderr, flush=True)
    if saved:
        torch.save((vae, minutes), saved)
    return vae, minutes


@torch.inference_mode()
def estimate_likelihoods(vae: VAE, x: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Return two tensors for binary rows x [N, D], in nats: the importance-weighted bound [N] and the ELBO [N]."""
    random, step = torch.Generator().manual_seed(SEED), min(draws, 100)
    vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # faster convolutions
    bounds, elbos = [], []
    for index, rows in enumerate(x.split(max(1, DRAWS_PER_BATCH // step))):
        total, mean = torch.full((len(rows),), -math.inf), torch.zeros(len(rows))  # [B], [B]
        for _ in range(draws // step):
            noise = torch.randn(step, len(rows), vae.posterior(rows)[0].shape[1], generator=random)  # [S, B, K]
            weights = log_weights(vae, rows, noise)  # [S, B]
            total = torch.logaddexp(total, weights.logsumexp(dim=0))
            mean += weights.mean(dim=0) * step / draws
        bounds.append(total - math.log(draws))
        elbos.append(mean)
        if index % 50 == 0:
            print(f"evaluated {index * len(rows)} of {len(x)}", file=sys.stderr, flush=True)
    return torch.cat(bounds), torch.cat(elbos)


def measure(recipe: str, config: TrainConfig, draws: int, checkpoints: CheckpointStore | None, smoke: bool) -> Result:
    """Train a VAE and evaluate it on all test digits."""
    train, test = load_digits(smoke)
    vae, minutes = train_or_load(config, train, checkpoints)
    grey = torch.from_numpy(test.reshape(len(test), -1)) / 255.0
    x = binarise(grey, torch.Generator().manual_seed(SEED))
    bounds, elbos = estimate_likelihoods(vae, x, draws)
    nll, error = -float(bounds.double().mean()), float(bounds.std()) / math.sqrt(len(bounds))
    return Result(
        recipe=recipe,
        minutes=minutes,
        negative_elbo=-float(elbos.double().mean()),
        nll=nll,
        error=error,
        active=count_active_latents(vae, x),
    )


def main() -> None:
    """Measure the recipes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=[*RECIPES, "all"], default="all", help="recipe to measure (default all)")
    parser.add_argument("--draws", type=int, default=1_000, help="importance samples per digit (default 1,000)")
    parser.add_argument("--runs", type=Path, help="folder for checkpoints and weights, to resume from")
    parser.add_argument("--smoke", action="store_true", help="a few digits, two epochs, 20 importance samples")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| recipe | CPU minutes | −ELBO | NLL ± standard error | active latents |\n|---|---|---|---|---|", flush=True)
    for name, config in RECIPES.items():
        if arguments.recipe not in (name, "all"):
            continue
        checkpoints = None
        if arguments.runs:
            path = arguments.runs / name
            store = CheckpointStore(path, config.model_dump_json())
            checkpoints = replace(store, resume=store.exists())
        if arguments.smoke:
            short_config = config.model_copy(update={"epochs": 2, "warm_up": 10})
            print(measure(name, short_config, 20, checkpoints, smoke=True), flush=True)
        else:
            print(measure(name, config, arguments.draws, checkpoints, smoke=False), flush=True)


if __name__ == "__main__":
    main()
