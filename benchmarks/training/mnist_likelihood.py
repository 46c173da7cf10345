"""The likelihood of MNIST under VAEs that Elbo trains: nats a test digit, by importance sampling, as in the literature.

Training digits are binarised anew each time they are seen, test digits once (Salakhutdinov & Murray 2008). The NLL is
the mean over test digits of -log of the mean of 1,000 importance weights (Burda, Grosse & Salakhutdinov 2016, section
5). Prints a Markdown table; CPU minutes are those of training, on one core. Where there is no MNIST it runs on
scikit-learn's digits. `--smoke` does everything on a few digits.
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

HELD_OUT = 500  # training digits by which the best epoch is chosen; as many again calibrate p-values, unused here
SEED = 0  # of the test set's binarisation and of the importance samples
DECODED = 500  # draws a batch of the evaluation
FITTED = 60_000 - 2 * HELD_OUT  # rows

COMMON = {"model": "vae", "name": "mnist", "latents": 50, "likelihood": "bernoulli", "binarise": True}
RECIPES = {
    "reference": TrainConfig.model_validate(
        COMMON
        | {"hidden": (200, 200), "activation": "tanh", "batch_size": 100, "learning_rate": 2e-3}
        | {"epochs": 300, "warm_up": 100 * -(-FITTED // 100)}
    ),
    "conv": TrainConfig.model_validate(
        COMMON
        | {"network": "conv", "hidden": (32, 64), "dense": (256,), "batch_size": 128, "learning_rate": 3e-3}
        | {"epochs": 100, "samples": 4, "warm_up": 86 * -(-FITTED // 128)}
    ),
}


@dataclass(frozen=True)
class Result:
    """What one recipe reached, in nats a digit; `error` is the NLL's standard error over digits."""

    recipe: str
    minutes: float
    negative_elbo: float
    nll: float
    error: float
    active: int

    def __str__(self) -> str:
        nll = f"{self.nll:.2f} ± {self.error:.2f}"
        return f"| {self.recipe} | {self.minutes:.1f} | {self.negative_elbo:.2f} | {nll} | {self.active} |"


def digits(smoke: bool) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Training and test pictures [N, H, W] from 0 to 255."""
    train, test = (load_images(part)[1].astype(np.float32) for part in ("train", "test"))
    return (train[:2_000], test[:50]) if smoke else (train, test)


def table_of(pictures: npt.NDArray[np.float32]) -> tuple[Table, Split]:
    """The pictures as training reads them; nearly all of them fit."""
    shape = pictures.shape[1:]
    names = [f"pixel[{row},{column}]" for row, column in np.ndindex(*shape)]
    x = pictures.reshape(len(pictures), -1)
    missing = np.zeros(len(names), np.int64)
    table = Table(RowStore(x), shape, names, [None] * len(names), None, (0.0, 255.0), "MNIST", missing=missing)
    order = np.random.RandomState(SEED).permutation(len(x))
    return table, Split(order[2 * HELD_OUT :], order[:HELD_OUT], order[HELD_OUT : 2 * HELD_OUT])


def trained(config: TrainConfig, pictures: npt.NDArray[np.float32], checkpoints: CheckpointStore | None) -> VAE:
    """A VAE of the pictures."""
    table, rows = table_of(pictures)
    vae = fit_pipeline(config, prepare_data(table, rows), PlainReporter(), checkpoints=checkpoints).core
    assert isinstance(vae, VAE)
    return vae


def resumed(
    config: TrainConfig, pictures: npt.NDArray[np.float32], checkpoints: CheckpointStore | None
) -> tuple[VAE, float]:
    """The trained VAE and its CPU minutes; kept in the run's folder, and taken from there if they are in it."""
    kept = checkpoints.folder / "trained.pt" if checkpoints else None
    if kept and kept.exists():
        vae, minutes = torch.load(kept, weights_only=False)
        return vae, minutes
    began = time.process_time()
    vae = trained(config, pictures, checkpoints)
    minutes = (time.process_time() - began) / 60.0
    print(f"trained in {minutes:.1f} CPU minutes", file=sys.stderr, flush=True)
    if kept:
        torch.save((vae, minutes), kept)
    return vae, minutes


@torch.inference_mode()
def likelihoods(vae: VAE, x: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """The importance-weighted bound and the ELBO of each binary row x [N, D], by `draws` draws: two of [N], in nats."""
    random, step = torch.Generator().manual_seed(SEED), min(draws, 100)
    vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # convolutions run faster so
    bounds, elbos = [], []
    for index, rows in enumerate(x.split(max(1, DECODED // step))):
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
    """Train, then judge on all test digits."""
    train, test = digits(smoke)
    vae, minutes = resumed(config, train, checkpoints)
    grey = torch.from_numpy(test.reshape(len(test), -1)) / 255.0
    x = binarise(grey, torch.Generator().manual_seed(SEED))
    bounds, elbos = likelihoods(vae, x, draws)
    nll, error = -float(bounds.double().mean()), float(bounds.std()) / math.sqrt(len(bounds))
    return Result(recipe, minutes, -float(elbos.double().mean()), nll, error, count_active_latents(vae, x))


def main() -> None:
    """The table, a row for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=[*RECIPES, "all"], default="all")
    parser.add_argument("--draws", type=int, default=1_000, help="importance samples a digit")
    parser.add_argument("--runs", type=Path, help="keep checkpoints and weights here, and continue from them")
    parser.add_argument("--smoke", action="store_true", help="a few digits, one epoch, few draws")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| recipe | CPU minutes | −ELBO | NLL, ± standard error | active latents |\n|---|---|---|---|---|", flush=True
    )
    for name, config in RECIPES.items():
        if arguments.recipe not in (name, "all"):
            continue
        checkpoints = None
        if arguments.runs:
            path = arguments.runs / name
            store = CheckpointStore(path, config.model_dump_json())
            checkpoints = replace(store, resume=store.exists())
        if arguments.smoke:
            shortened = config.model_copy(update={"epochs": 2, "warm_up": 10})
            print(measure(name, shortened, 20, checkpoints, smoke=True), flush=True)
        else:
            print(measure(name, config, arguments.draws, checkpoints, smoke=False), flush=True)


if __name__ == "__main__":
    main()
