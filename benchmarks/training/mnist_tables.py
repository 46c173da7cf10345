"""What a few epochs on MNIST reach: a VAE, an autoencoder and a denoising one, against PCA of as many latents.

The 60,000 rows of the training file train: of them the last 2,000 choose the epoch (1,000) and calibrate (1,000), as
every run of Elbo does with rows that do not fit; the 10,000 of the test file are looked at once, in the end. Where
there is no MNIST it runs on scikit-learn's digits, of which the targets do not hold. Prints a Markdown table.
`--smoke` trains two epochs of few rows; `--only NAME` one of the three.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from time import process_time
from typing import Any

import numpy as np
import scipy.linalg  # noqa: F401  # loads its BLAS, so that the limit of threads holds for it
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.data import describe_machine, load_images
from models.pipeline import Pipeline
from models.vae import VAE
from training.config import TrainConfig
from training.data.row_store import RowStore
from training.data.table import Split, Table
from training.fitting.losses import elbo_terms
from training.fitting.pipeline import fit_pipeline
from training.fitting.prepared_data import PreparedData, prepare_data
from training.progress import PlainReporter

RESERVED = 1_000  # rows that choose the epoch; as many calibrate
NOISE = 0.5  # standard deviation of the corruption, of pixels from 0 to 1
BATCH = 1_000

Measure = Callable[[Pipeline, Tensor], float]  # of test rows [M, D], 0 to 255


@dataclass(frozen=True)
class Aim:
    """One line of the table: the options of `elbo train`, what is measured, and how good it shall be."""

    what: str
    options: dict[str, Any]
    measure: Measure
    unit: str
    target: float
    pca: bool = field(default=True)  # whether PCA can be measured alike


def loss(pipeline: Pipeline, x: Tensor) -> float:
    """The negative ELBO of rows [M, D] in nats a row, one draw from the posterior each."""
    random, total = torch.Generator().manual_seed(0), 0.0
    vae = pipeline.core
    assert isinstance(vae, VAE)
    for rows in x.split(BATCH):
        u = pipeline.scaling(rows)  # [B, D]
        noise = torch.randn(len(u), vae.encode(u)[0].shape[1], generator=random)  # [B, K]
        total -= float(elbo_terms(vae, u, noise)["elbo"]) * len(u)
    return total / len(x)


def error(pipeline: Pipeline, x: Tensor) -> float:
    """The mean squared error of the reconstruction of rows [M, D], of pixels from 0 to 1."""
    return sum(float((pipeline(rows) - rows).double().square().sum()) for rows in x.split(BATCH)) / x.numel() / 255**2


def error_of_corrupted(pipeline: Pipeline, x: Tensor) -> float:
    """The same with noise of deviation NOISE on what the model sees, none on what it is compared with."""
    random, total = torch.Generator().manual_seed(0), 0.0
    for rows in x.split(BATCH):
        seen = rows + 255 * NOISE * torch.randn(rows.shape, generator=random)  # [B, D]
        total += float((pipeline(seen) - rows).double().square().sum())
    return total / x.numel() / 255**2


AIMS = {
    "vae": Aim(
        "VAE, grey values as Bernoulli probabilities",
        {"model": "vae", "latents": 20, "hidden": (400,), "likelihood": "bernoulli", "learning_rate": 3e-3},
        loss,
        "nats a row",
        106.0,
        pca=False,
    ),
    "ae": Aim(
        "autoencoder",
        {"model": "ae", "latents": 32, "hidden": (512,), "learning_rate": 3e-3},
        error,
        "squared error a pixel",
        0.0052,
    ),
    "dae": Aim(
        f"denoising autoencoder, test rows with noise {NOISE}",
        {"model": "ae", "latents": 32, "hidden": (512,), "noise": 2 * NOISE, "learning_rate": 3e-3}
        | {"batch_size": 64, "epochs": 20},
        error_of_corrupted,
        "squared error a pixel",
        0.013,
    ),
}


def table_of(x: np.ndarray[Any, Any], name: str) -> Table:
    """The training file's pictures [N, H, W]."""
    shape = x.shape[1:]
    names = [f"pixel[{','.join(map(str, index))}]" for index in np.ndindex(shape)]
    missing = np.zeros(len(names), np.int64)
    rows = RowStore(x.reshape(len(x), -1).astype(np.float32))
    return Table(rows, shape, names, [None] * len(names), None, (0.0, 255.0), name, missing=missing)


def written(options: dict[str, Any]) -> str:
    """As they would be typed."""
    texts = {key: ",".join(map(str, value)) if isinstance(value, tuple) else value for key, value in options.items()}
    return " ".join(f"--{key.replace('_', '-')} {text}" for key, text in texts.items())


def line(aim: Aim, data: PreparedData, test: Tensor, smoke: bool) -> str:
    """Train, and one line of the table."""
    started = process_time()
    options = {"epochs": 10} | aim.options | ({"epochs": 2} if smoke else {})
    pipeline = fit_pipeline(TrainConfig.model_validate({"name": "bench", **options}), data, PlainReporter())
    seconds, other = process_time() - started, ""
    with torch.no_grad():
        reached = aim.measure(pipeline, test)
        if aim.pca:
            pca = TrainConfig(model="pca", name="bench", latents=aim.options["latents"])
            other = f"{aim.measure(fit_pipeline(pca, data, PlainReporter()), test):.5f}"
    digits = 5 if reached < 1 else 2
    return (
        f"| {aim.what} | `{written(options)}` | {aim.unit} | {reached:.{digits}f} | {aim.target:g} | {other} | "
        f"{seconds:.0f} |"
    )


def main() -> None:
    """Train the three, one after the other, on one core."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two epochs of few rows, to see that it works")
    parser.add_argument("--only", choices=AIMS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    name, train = load_images("train")
    test = torch.from_numpy(load_images("test")[1].reshape(-1, train[0].size).astype(np.float32))
    reserved = RESERVED
    if options.smoke:
        train, test, reserved = train[:1_400], test[:200], 100
    order = np.arange(len(train))
    fitted, held_out, calibration = np.split(order, [len(train) - 2 * reserved, len(train) - reserved])
    data = prepare_data(table_of(train, name), Split(fitted, held_out, calibration))
    print(describe_machine("torch"), end="\n\n")
    print(f"{name}: {len(fitted):,} rows fit, {reserved:,} choose the epoch, {len(test):,} of the test file judge.\n")
    print("| what | options of elbo train | measured on the test file | reached | target | PCA | CPU s |")
    print("|---|---|---|---|---|---|---|")
    with threadpool_limits(1):
        for key in [options.only] if options.only else AIMS:
            print(line(AIMS[key], data, test, options.smoke), flush=True)


if __name__ == "__main__":
    main()
