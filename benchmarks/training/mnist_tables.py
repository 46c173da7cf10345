"""Measure a VAE, an autoencoder and a denoising autoencoder on MNIST after a few epochs, and compare them with PCA.

    python benchmarks/training/mnist_tables.py
    python benchmarks/training/mnist_tables.py --only ae    # vae, ae or dae
    python benchmarks/training/mnist_tables.py --smoke      # two epochs with few rows

Each autoencoder is compared with a PCA that has the same number of latents. The VAE is not compared with PCA.

Of the 60,000 training rows, the first 58,000 are fit rows, the next 1,000 are held-out rows, and the last 1,000 are
calibration rows. The epoch with the lowest held-out loss is selected. The 10,000 test rows are used once, at the end.

The benchmark prints a Markdown table. If MNIST is not available, it uses scikit-learn's digits, to which the targets do
not apply.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from time import process_time
from typing import Any

import numpy as np
import scipy.linalg  # noqa: F401  # loads scipy's BLAS, so that the thread limit applies to it
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

RESERVED_ROWS = 1_000  # number of held-out rows; there are as many calibration rows
NOISE = 0.5  # standard deviation of the noise on pixels from 0 to 1
BATCH_SIZE = 1_000

Measure = Callable[[Pipeline, Tensor], float]  # measures a pipeline on test rows [M, D] with values from 0 to 255


@dataclass(frozen=True)
class Experiment:
    """A row of the table.

    Args:
        title: description of the model.
        options: options of `elbo train`.
        measure: function that computes the result from the test rows.
        unit: unit of the result.
        target: largest result that meets the target.
        compare_pca: whether to measure PCA too.
    """

    title: str
    options: dict[str, Any]
    measure: Measure
    unit: str
    target: float
    compare_pca: bool = True


def negative_elbo(pipeline: Pipeline, x: Tensor) -> float:
    """Return the negative ELBO of rows x [M, D] in nats per row, with one sample from the posterior per row."""
    random, total = torch.Generator().manual_seed(0), 0.0
    vae = pipeline.core
    assert isinstance(vae, VAE)
    for rows in x.split(BATCH_SIZE):
        u = pipeline.scaling(rows)  # [B, D]
        noise = torch.randn(len(u), vae.encode(u)[0].shape[1], generator=random)  # [B, K]
        total -= float(elbo_terms(vae, u, noise)["elbo"]) * len(u)
    return total / len(x)


def squared_error(pipeline: Pipeline, x: Tensor) -> float:
    """Reconstruct rows x [M, D], and return the mean squared error per pixel, for pixel values scaled to 0 to 1."""
    total = sum(float((pipeline(rows) - rows).double().square().sum()) for rows in x.split(BATCH_SIZE))
    return total / x.numel() / 255**2


def denoising_error(pipeline: Pipeline, x: Tensor) -> float:
    """Add noise to rows x [M, D], and reconstruct them. Return the mean squared error per pixel.

    The error is the difference between the reconstructions and the rows without noise, for pixel values from 0 to 1.
    """
    random, total = torch.Generator().manual_seed(0), 0.0
    for rows in x.split(BATCH_SIZE):
        noisy = rows + 255 * NOISE * torch.randn(rows.shape, generator=random)  # [B, D]
        total += float((pipeline(noisy) - rows).double().square().sum())
    return total / x.numel() / 255**2


EXPERIMENTS = {
    "vae": Experiment(
        "VAE, grey values as Bernoulli probabilities",
        {"model": "vae", "latents": 20, "hidden": (400,), "likelihood": "bernoulli", "learning_rate": 3e-3},
        negative_elbo,
        "nats per row",
        106.0,
        compare_pca=False,
    ),
    "ae": Experiment(
        "autoencoder",
        {"model": "ae", "latents": 32, "hidden": (512,), "learning_rate": 3e-3},
        squared_error,
        "squared error per pixel",
        0.0052,
    ),
    "dae": Experiment(
        f"denoising autoencoder, test rows with noise {NOISE}",
        {"model": "ae", "latents": 32, "hidden": (512,), "noise": 2 * NOISE, "learning_rate": 3e-3}
        | {"batch_size": 64, "epochs": 20},
        denoising_error,
        "squared error per pixel",
        0.013,
    ),
}


def create_table(x: np.ndarray[Any, Any], name: str) -> Table:
    """Return images x [N, H, W] as a table."""
    shape = x.shape[1:]
    names = [f"pixel[{','.join(map(str, index))}]" for index in np.ndindex(shape)]
    missing = np.zeros(len(names), np.int64)
    rows = RowStore(x.reshape(len(x), -1).astype(np.float32))
    return Table(rows, shape, names, [None] * len(names), None, (0.0, 255.0), name, missing=missing)


def command_line(options: dict[str, Any]) -> str:
    """Return `options` as they are written on the command line."""
    texts = {key: ",".join(map(str, value)) if isinstance(value, tuple) else value for key, value in options.items()}
    return " ".join(f"--{key.replace('_', '-')} {text}" for key, text in texts.items())


def run_experiment(experiment: Experiment, data: PreparedData, test: Tensor, smoke: bool) -> str:
    """Train and measure one model. Return its row of the table."""
    started = process_time()
    options = {"epochs": 10} | experiment.options | ({"epochs": 2} if smoke else {})
    pipeline = fit_pipeline(TrainConfig.model_validate({"name": "bench", **options}), data, PlainReporter())
    seconds, pca_result = process_time() - started, ""
    with torch.no_grad():
        result = experiment.measure(pipeline, test)
        if experiment.compare_pca:
            config = TrainConfig(model="pca", name="bench", latents=experiment.options["latents"])
            pca_result = f"{experiment.measure(fit_pipeline(config, data, PlainReporter()), test):.5f}"
    digits = 5 if result < 1 else 2
    return (
        f"| {experiment.title} | `{command_line(options)}` | {experiment.unit} | {result:.{digits}f} | "
        f"{experiment.target:g} | {pca_result} | {seconds:.0f} |"
    )


def main() -> None:
    """Run the experiments on one core, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two epochs with few rows")
    parser.add_argument("--only", choices=EXPERIMENTS, help="run one experiment")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name, train = load_images("train")
    test = torch.from_numpy(load_images("test")[1].reshape(-1, train[0].size).astype(np.float32))
    reserved = RESERVED_ROWS
    if options.smoke:
        train, test, reserved = train[:1_400], test[:200], 100
    order = np.arange(len(train))
    fit, held_out, calibration = np.split(order, [len(train) - 2 * reserved, len(train) - reserved])
    data = prepare_data(create_table(train, name), Split(fit, held_out, calibration))
    print(describe_machine("torch"), end="\n\n")
    print(f"{name}: {len(fit):,} fit rows, {reserved:,} held-out rows, {len(test):,} test rows.\n")
    print("| model | options of elbo train | measured on the test rows | result | target | PCA | CPU s |")
    print("|---|---|---|---|---|---|---|")
    with threadpool_limits(1):
        for key in [options.only] if options.only else EXPERIMENTS:
            print(run_experiment(EXPERIMENTS[key], data, test, options.smoke), flush=True)


if __name__ == "__main__":
    main()
