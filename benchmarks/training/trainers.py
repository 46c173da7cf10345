"""Train the same VAE with Elbo, a bare PyTorch loop, pythae or Lightning, for `training_speed.py`.

`python benchmarks/training/trainers.py NAME ROWS` loads the images in the npy file ROWS, and prints one line of JSON
when the trainer NAME is ready. For each line on standard input, it then trains a new model, and prints one line of JSON
with the CPU seconds and the held-out loss in nats per row. All other output goes to standard error.

All trainers use a network with 784 features, 400 hidden units and 20 latents, ReLU, a Bernoulli likelihood, batches of
128, and fused Adam. All trainers compute the held-out loss after each epoch.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from time import process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

HIDDEN = 400
LATENTS = 20
BATCH_SIZE = 128
EPOCHS = 2
LEARNING_RATE = 1e-3
HELD_OUT_ROWS = 1_280
HELD_OUT_BATCH_SIZE = 2_048

Train = Callable[[], float]  # a function that trains a new model and returns its held-out loss


class Net(nn.Module):
    """The VAE of all trainers except Elbo: an encoder and a decoder."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, features))

    def loss(self, x: Tensor) -> Tensor:
        """Return the negative ELBO of rows x [B, D] in nats per row."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)  # [B, K], [B, K]
        logits = self.decoder(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))  # [B, D]
        error = functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        kl = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())
        return (error + kl) / len(x)


def bare_loop(x: Tensor, held_out: Tensor) -> Train:
    """Return a function that trains with a hand-written loop. The loop shuffles the rows in memory once per epoch."""

    def train() -> float:
        model = Net(x.shape[1])
        optimiser = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)
        total = 0.0
        for _ in range(EPOCHS):
            model.train()
            for chosen in torch.randperm(len(x)).split(BATCH_SIZE):
                loss = model.loss(x[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += loss.item()
            model.eval()
            with torch.no_grad():
                batches = held_out.split(HELD_OUT_BATCH_SIZE)
                held_out_loss = sum(model.loss(rows).item() * len(rows) for rows in batches)
        return held_out_loss / len(held_out)

    return train


def elbo(x: Tensor, held_out: Tensor) -> Train:
    """Return a function that trains with `training.fitting.trainer`, without checkpoints."""
    from models.likelihood import BernoulliLikelihood
    from models.vae import VAE
    from training.config import TrainConfig
    from training.data.batches import Batches
    from training.data.row_store import RowStore
    from training.fitting.architecture import build_decoder, build_encoder
    from training.fitting.objectives import ElboObjective
    from training.fitting.trainer import Trainer
    from training.progress import SilentReporter

    class LossReporter(SilentReporter):
        def epoch(self, epoch: int, step: int, terms: Any) -> None:  # noqa: ARG002 - the signature of Progress
            self.loss = float(terms["held_out_loss"])

    config = TrainConfig.model_validate(
        {
            "model": "vae",
            "name": "elbo",
            "likelihood": "bernoulli",
            "latents": LATENTS,
            "hidden": (HIDDEN,),
            "activation": "relu",
            "epochs": EPOCHS,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
        }
    )
    batches = Batches(RowStore(x.numpy()), np.arange(len(x)), lambda rows: rows, 0, "cpu")

    def train() -> float:
        shape = (x.shape[1],)
        encoder, decoder = build_encoder(config, shape, 2 * LATENTS), build_decoder(config, shape, LATENTS)
        model, reporter = VAE(encoder, decoder, BernoulliLikelihood()), LossReporter()
        trainer = Trainer(
            model=model,
            objective=ElboObjective(model, LATENTS, config),
            batches=batches,
            held_out=held_out,
            config=config,
            reporter=reporter,
        )
        trainer.train()
        return reporter.loss

    return train


def pythae(x: Tensor, held_out: Tensor) -> Train:
    """Return a function that trains with pythae's trainer."""
    from pythae.data.datasets import BaseDataset
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.trainers import BaseTrainer, BaseTrainerConfig
    from pythae.trainers.training_callbacks import TrainingCallback

    class Encoder(BaseEncoder):  # type: ignore[misc] # pythae has no types
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.layers = net.encoder

        def forward(self, rows: Tensor) -> Any:
            mean, log_variance = self.layers(rows).chunk(2, dim=1)
            return ModelOutput(embedding=mean, log_covariance=log_variance)

    class Decoder(BaseDecoder):  # type: ignore[misc] # pythae has no types
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.layers = net.decoder

        def forward(self, z: Tensor) -> Any:
            return ModelOutput(reconstruction=torch.sigmoid(self.layers(z)))

    class LossCallback(TrainingCallback):  # type: ignore[misc] # pythae has no types
        def on_log(self, _: Any, logs: dict[str, float], **__: Any) -> None:
            self.loss = logs["eval_epoch_loss"]

    folder = tempfile.mkdtemp()
    datasets = [BaseDataset(rows, torch.zeros(len(rows))) for rows in (x, held_out)]

    def train() -> float:
        net, callback = Net(x.shape[1]), LossCallback()
        config = VAEConfig(input_dim=(x.shape[1],), latent_dim=LATENTS, reconstruction_loss="bce")
        settings = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=EPOCHS,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=HELD_OUT_BATCH_SIZE,
            learning_rate=LEARNING_RATE,
            optimizer_params={"fused": True},
        )
        BaseTrainer(VAE(config, encoder=Encoder(net), decoder=Decoder(net)), *datasets, settings, [callback]).train()
        return callback.loss

    return train


def lightning(x: Tensor, held_out: Tensor) -> Train:
    """Return a function that trains like Lightning's introduction, but prints nothing and writes no files."""
    from lightning import LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    class Module(LightningModule):  # type: ignore[misc] # Lightning has no types
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(x.shape[1])

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            return self.net.loss(batch[0])

        def validation_step(self, batch: list[Tensor], _: int) -> None:
            self.log("held_out_loss", self.net.loss(batch[0]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), LEARNING_RATE, fused=True)

    def train() -> float:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        train_loader = DataLoader(TensorDataset(x), BATCH_SIZE, shuffle=True)
        held_out_loader = DataLoader(TensorDataset(held_out), HELD_OUT_BATCH_SIZE)
        trainer.fit(Module(), train_loader, held_out_loader)
        return float(trainer.callback_metrics["held_out_loss"])

    return train


TRAINERS: dict[str, Callable[[Tensor, Tensor], Train]] = {
    "elbo": elbo,
    "bare": bare_loop,
    "pythae": pythae,
    "lightning": lightning,
}


def main() -> None:
    """Train one model for each line on standard input."""
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print goes to standard error
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, path = sys.argv[1:]
    x = torch.from_numpy(np.load(path).astype(np.float32) / np.float32(255.0))  # [N, D]
    train = TRAINERS[name](x[:-HELD_OUT_ROWS].clone(), x[-HELD_OUT_ROWS:].clone())
    print(json.dumps({"ready": name}), file=results)
    for _ in sys.stdin:
        started = process_time()
        loss = train()
        print(json.dumps({"seconds": process_time() - started, "loss": loss}), file=results)


if __name__ == "__main__":
    main()
