"""Train pythae's VAE with the networks of Elbo, and draw samples with pythae's samplers, for `samples.py`.

    python benchmarks/training/pythae_samples.py IMAGES FOLDER DRAWS OPTIONS [--quick] [SAMPLER …]

The script loads the images x [N, H, W] in the npz file IMAGES. OPTIONS are the options of Elbo's model, in JSON. The
script writes DRAWS samples of each sampler to a file in FOLDER, with values from 0 to 255, and prints a line of JSON
for each sampler. All other output goes to standard error. SAMPLER is a name in SAMPLERS; by default, all of them are
used. With --quick, the script trains for two epochs and uses two samplers.

pythae's loss is the KL term plus half the squared error, or plus the cross entropy if OPTIONS have a Bernoulli
likelihood. Its trainer keeps the model with the lowest held-out loss.
"""

import json
import os
import sys
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.samplers import (
    GaussianMixtureSampler,
    GaussianMixtureSamplerConfig,
    IAFSampler,
    IAFSamplerConfig,
    MAFSampler,
    MAFSamplerConfig,
    NormalSampler,
    TwoStageVAESampler,
    TwoStageVAESamplerConfig,
)
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from torch import Tensor, nn

from training.config import TrainConfig
from training.fitting.architecture import build_decoder, build_encoder

HELD_OUT_SHARE = 0.1
STEPS = 3_000  # unless the options set the epochs: DEFAULT_STEPS of `training/fitting/trainer.py`
LEARNING_RATE = 1e-3  # ten times pythae's default
SAMPLER_EPOCHS = 100  # pythae's default for samplers that are networks; fewer if the options set fewer for the VAE
SAMPLERS = {
    "prior N(0, I)": (NormalSampler, None),
    "mixture of 10 Gaussians": (GaussianMixtureSampler, GaussianMixtureSamplerConfig(n_components=10)),
    "mixture of 50 Gaussians": (GaussianMixtureSampler, GaussianMixtureSamplerConfig(n_components=50)),
    "masked autoregressive flow": (MAFSampler, MAFSamplerConfig()),
    "inverse autoregressive flow": (IAFSampler, IAFSamplerConfig()),
    "second VAE": (TwoStageVAESampler, TwoStageVAESamplerConfig()),
}


class Encoder(BaseEncoder):  # type: ignore[misc] # pythae has no types
    """An encoder for pythae, from layers that return the mean and the log-variance of the latents, [B, 2 K]."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Any:
        """Return the mean and the log-variance, each [B, K], of images x [B, 1, H, W] or rows x [B, D]."""
        mean, log_variance = self.layers(x.flatten(1)).chunk(2, dim=1)
        return ModelOutput(embedding=mean, log_covariance=log_variance)


class Decoder(BaseDecoder):  # type: ignore[misc] # pythae has no types
    """A decoder for pythae, which returns images with values from 0 to 1.

    Args:
        layers: map latents [B, K] to images [B, D].
        shape: the shape of an image.
        logits: whether `layers` return logits of the values.
    """

    def __init__(self, layers: nn.Sequential, shape: tuple[int, ...], *, logits: bool) -> None:
        super().__init__()
        self.layers, self.shape, self.logits = layers, shape, logits

    def forward(self, z: Tensor) -> Any:
        """Return the images that latents z [B, K] decode to, [B, *shape]."""
        x = self.layers(z)
        return ModelOutput(reconstruction=(torch.sigmoid(x) if self.logits else x).reshape(-1, *self.shape))


def main() -> None:
    """Train the model, draw the samples, and print a line of JSON per sampler: its name, the file and CPU minutes."""
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # from here on, pythae prints to standard error
    torch.set_num_threads(1)
    torch.manual_seed(0)
    source, folder, draws, options = sys.argv[1:5]
    quick = "--quick" in sys.argv
    names = [each for each in sys.argv[5:] if each != "--quick"] or list(SAMPLERS)[: 2 if quick else None]
    images = torch.from_numpy(np.load(source)["x"].astype(np.float32) / np.float32(255.0))[:, None]  # [N, 1, H, W]
    images = images[torch.randperm(len(images))]
    config = TrainConfig.model_validate({"name": "pythae"} | json.loads(options))
    height, width = shape = tuple(images.shape[2:])
    latents = config.latents or 16
    bernoulli = config.likelihood == "bernoulli"
    held_out_rows = int(HELD_OUT_SHARE * len(images))
    fit, held_out = images[held_out_rows:], images[:held_out_rows]
    epochs = config.epochs or -(-STEPS * config.batch_size // len(fit))
    model = VAE(
        VAEConfig(input_dim=(1, height, width), latent_dim=latents, reconstruction_loss="bce" if bernoulli else "mse"),
        encoder=Encoder(build_encoder(config, shape, 2 * latents)),
        decoder=Decoder(build_decoder(config, shape, latents, unit_range=True), (1, height, width), logits=bernoulli),
    )
    settings = BaseTrainerConfig(
        output_dir=folder,
        num_epochs=2 if quick else epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=1_000,
        learning_rate=LEARNING_RATE,
    )
    started = process_time()
    BaseTrainer(model, *(BaseDataset(x, torch.zeros(len(x))) for x in (fit, held_out)), settings).train()
    trained = process_time() - started
    for index, title in enumerate(names):
        sampler, sampler_config = SAMPLERS[title]
        started = process_time()
        fitted = sampler(model, sampler_config) if sampler_config else sampler(model)
        if isinstance(fitted, GaussianMixtureSampler):
            fitted.fit(fit)
        elif sampler_config:
            fitted.fit(
                fit,
                held_out,
                BaseTrainerConfig(output_dir=folder, num_epochs=min(SAMPLER_EPOCHS, config.epochs or SAMPLER_EPOCHS)),
            )
        minutes = (trained + process_time() - started) / 60.0
        rows = fitted.sample(num_samples=int(draws), batch_size=500).detach().numpy() * 255.0
        np.save(path := Path(folder, f"samples-{index}.npy"), rows)
        print(json.dumps({"sampler": title, "path": str(path), "minutes": minutes}), file=results)


if __name__ == "__main__":
    main()
