"""The same VAE trained by Elbo, a bare PyTorch loop, pythae and Lightning: one of them, in a process of its own.

`python benchmarks/training/contestants.py NAME` prints a line of JSON when it is ready.
For every line on standard input it trains a new model and prints a line of JSON: the CPU seconds, and the held-out loss
in nats per row. All make the same steps: 784-400-20, ReLU, Bernoulli, batches of 128, fused Adam; and look at the
held-out rows after every epoch. Standard output is for those lines alone; what libraries say goes to standard error.
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

HIDDEN, LATENTS, BATCH, EPOCHS, RATE = 400, 20, 128, 2, 1e-3
HELD_OUT = 1_280  # rows
VALIDATION_BATCH = 2_048  # rows

Segment = Callable[[], float]  # trains a new model and gives its held-out loss


class Net(nn.Module):
    """The encoder and the decoder, for those who bring none."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, features))

    def loss(self, x: Tensor) -> Tensor:
        """The negative ELBO of rows [B, D], nats a row."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)  # [B, K], [B, K]
        logits = self.decoder(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))  # [B, D]
        error = functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        kl = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())
        return (error + kl) / len(x)


def bare(x: Tensor, held_out: Tensor) -> Segment:
    """What one writes by hand: tensors in memory, a permutation an epoch."""

    def segment() -> float:
        model = Net(x.shape[1])
        optimiser = torch.optim.Adam(model.parameters(), RATE, fused=True)
        total = 0.0
        for _ in range(EPOCHS):
            model.train()
            for chosen in torch.randperm(len(x)).split(BATCH):
                loss = model.loss(x[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                total += loss.item()
            model.eval()
            with torch.no_grad():
                found = sum(model.loss(rows).item() * len(rows) for rows in held_out.split(VALIDATION_BATCH))
        return found / len(held_out)

    return segment


def elbo(x: Tensor, held_out: Tensor) -> Segment:
    """Ours: `training.fitting.trainer` with everything that it does, but for checkpoints."""
    from models.likelihood import BernoulliLikelihood
    from models.vae import VAE
    from training.config import TrainConfig
    from training.data.batches import Batches
    from training.data.row_store import RowStore
    from training.fitting.architecture import build_decoder, build_encoder
    from training.fitting.objectives import ElboObjective
    from training.fitting.trainer import Trainer
    from training.progress import SilentReporter

    class Last(SilentReporter):
        def epoch(self, epoch: int, step: int, terms: Any) -> None:  # noqa: ARG002 - Progress has these three
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
            "batch_size": BATCH,
            "learning_rate": RATE,
        }
    )
    batches = Batches(RowStore(x.numpy()), np.arange(len(x)), lambda rows: rows, 0, "cpu")

    def segment() -> float:
        shape = (x.shape[1],)
        encoder, decoder = build_encoder(config, shape, 2 * LATENTS), build_decoder(config, shape, LATENTS)
        model, report = VAE(encoder, decoder, BernoulliLikelihood()), Last()
        trainer = Trainer(
            model=model,
            objective=ElboObjective(model, LATENTS, config),
            batches=batches,
            held_out=held_out,
            config=config,
            reporter=report,
        )
        trainer.train()
        return report.loss

    return segment


def pythae(x: Tensor, held_out: Tensor) -> Segment:
    """pythae's own trainer, with networks of the same size and a fused Adam."""
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

    class Last(TrainingCallback):  # type: ignore[misc] # pythae has no types
        def on_log(self, _: Any, logs: dict[str, float], **__: Any) -> None:
            self.loss = logs["eval_epoch_loss"]

    folder = tempfile.mkdtemp()
    datasets = [BaseDataset(rows, torch.zeros(len(rows))) for rows in (x, held_out)]

    def segment() -> float:
        net, last = Net(x.shape[1]), Last()
        config = VAEConfig(input_dim=(x.shape[1],), latent_dim=LATENTS, reconstruction_loss="bce")
        settings = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=VALIDATION_BATCH,
            learning_rate=RATE,
            optimizer_params={"fused": True},
        )
        BaseTrainer(VAE(config, encoder=Encoder(net), decoder=Decoder(net)), *datasets, settings, [last]).train()
        return last.loss

    return segment


def lightning(x: Tensor, held_out: Tensor) -> Segment:
    """Lightning's trainer as its introduction has it, silenced, without files."""
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
            return torch.optim.Adam(self.parameters(), RATE, fused=True)

    def segment() -> float:
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        rows, judges = TensorDataset(x), TensorDataset(held_out)
        loaders = DataLoader(rows, BATCH, shuffle=True), DataLoader(judges, VALIDATION_BATCH)
        trainer.fit(Module(), *loaders)
        return float(trainer.callback_metrics["held_out_loss"])

    return segment


CONTESTANTS: dict[str, Callable[[Tensor, Tensor], Segment]] = {
    "elbo": elbo,
    "bare": bare,
    "pythae": pythae,
    "lightning": lightning,
}


def main() -> None:
    """Serve segments until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, path = sys.argv[1:]
    x = torch.from_numpy(np.load(path).astype(np.float32) / np.float32(255.0))  # [N, D]
    segment = CONTESTANTS[name](x[:-HELD_OUT].clone(), x[-HELD_OUT:].clone())
    print(json.dumps({"ready": name}), file=answers)
    for _ in sys.stdin:
        started = process_time()
        loss = segment()
        print(json.dumps({"seconds": process_time() - started, "loss": loss}), file=answers)


if __name__ == "__main__":
    main()
