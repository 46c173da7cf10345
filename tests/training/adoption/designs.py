"""Five autoencoders in the styles of public implementations, trained briefly on the digits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.data import values
from training.data.table import read_table

FIT_ROWS, CALIBRATION_ROWS = 900, 450


class Submodules(nn.Module):
    """The autoencoder of tutorials: an encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(True), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(True), nn.Linear(32, 64), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))  # type: ignore[no-any-return]


def one_sequential() -> nn.Module:
    """Return the autoencoder as one stack of layers, of which nobody has named the middle."""
    return nn.Sequential(
        nn.Linear(64, 40), nn.BatchNorm1d(40), nn.GELU(), nn.Linear(40, 10), nn.Tanh(), nn.Dropout(0.1),
        nn.Linear(10, 40), nn.ELU(), nn.Linear(40, 64),
    )  # fmt: skip


class Tuples(nn.Module):
    """The VAE of torch's examples: forward draws, and returns the reconstruction, the mean and the log-variance."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 48)
        self.fc21 = nn.Linear(48, 6)
        self.fc22 = nn.Linear(48, 6)
        self.fc3 = nn.Linear(6, 48)
        self.fc4 = nn.Linear(48, 64)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h1 = F.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def decode(self, z: Tensor) -> Tensor:
        h3 = F.relu(self.fc3(z))
        return torch.sigmoid(self.fc4(h3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x.view(-1, 64))
        z = self.reparameterize(mu, logvar)
        return self.decode(z), mu, logvar


class Dicts(nn.Module):
    """A convolutional VAE whose functions return dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_layers = nn.Sequential(
            nn.Conv2d(1, 8, 4, 2, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.Conv2d(8, 16, 4, 2, padding=1),
            nn.BatchNorm2d(16), nn.LeakyReLU(), nn.Flatten(),
        )  # fmt: skip
        self.embedding = nn.Linear(64, 6)
        self.log_var = nn.Linear(64, 6)
        self.fc = nn.Linear(6, 64)
        self.decoder_layers = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 4, 2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, 2, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        h = self.encoder_layers(x)
        return {"embedding": self.embedding(h), "log_covariance": self.log_var(h)}

    def decode(self, z: Tensor) -> dict[str, Tensor]:
        return {"reconstruction": self.decoder_layers(self.fc(z).reshape(z.shape[0], 16, 2, 2))}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        output = self.encode(x)
        mu, log_var = output["embedding"], output["log_covariance"]
        z = torch.distributions.Normal(mu, torch.exp(0.5 * log_var)).rsample()
        recon_x = self.decode(z)["reconstruction"]
        return {"recon_x": recon_x, "z": z, "mu": mu, "log_var": log_var}


class LossInside(nn.Module):
    """An LSTM autoencoder over windows whose forward computes the loss too."""

    def __init__(self) -> None:
        super().__init__()
        self.seq_len = 8
        self.rnn1 = nn.LSTM(input_size=8, hidden_size=24, num_layers=1, batch_first=True)
        self.rnn2 = nn.LSTM(input_size=24, hidden_size=24, num_layers=1, batch_first=True)
        self.output_layer = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        _, (hidden, _) = self.rnn1(x)
        latent = hidden[-1].unsqueeze(1).repeat(1, self.seq_len, 1)
        decoded, _ = self.rnn2(latent)
        x_hat = self.output_layer(decoded)
        return {"loss": F.mse_loss(x_hat, x), "x_hat": x_hat}


@dataclass(frozen=True)
class Design:
    """A public design: how to build it, the shape of its rows, its loss, and the reconstruction for given rows.

    `reconstruct` is written for the design, independently of the code that adopts it, without the noise of a draw.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss: Callable[[Any, Tensor], Tensor]
    reconstruct: Callable[[Any, Tensor], Tensor]


def _negative_elbo(recon: Tensor, x: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
    kl = -0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp())
    return (F.binary_cross_entropy(recon.reshape(len(x), -1), x.reshape(len(x), -1), reduction="sum") + kl) / len(x)


def _negative_elbo_of(output: dict[str, Tensor], x: Tensor) -> Tensor:
    return _negative_elbo(output["recon_x"], x, output["mu"], output["log_var"])


DESIGNS = {
    "submodules": Design(Submodules, (64,), lambda m, x: F.mse_loss(m(x), x), lambda m, x: m(x)),
    "sequential": Design(one_sequential, (64,), lambda m, x: F.mse_loss(m(x), x), lambda m, x: m(x)),
    "tuples": Design(
        Tuples,
        (64,),
        lambda m, x: _negative_elbo(m(x)[0], x, *m(x)[1:]),
        lambda m, x: m.decode(m.encode(x)[0]),
    ),
    "dicts": Design(
        Dicts,
        (1, 8, 8),
        lambda m, x: _negative_elbo_of(m(x), x),
        lambda m, x: m.decode(m.encode(x)["embedding"])["reconstruction"],
    ),
    "loss": Design(LossInside, (8, 8), lambda m, x: m(x)["loss"], lambda m, x: m(x)["x_hat"]),
}
WITHOUT_LATENTS = ("sequential", "loss")


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Return fit rows, calibration rows and fresh rows of the digits, each [N, 64] in [0, 1], in random order."""
    x = torch.from_numpy(values(read_table("digits")))
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    fit, calibration, fresh = x.split([FIT_ROWS, CALIBRATION_ROWS, len(x) - FIT_ROWS - CALIBRATION_ROWS])
    return fit, calibration, fresh


def trained(design: Design, rows: Tensor, epochs: int = 20) -> nn.Module:
    """Return the module, trained on `rows` [N, 64], and still in training mode, as a training script leaves it."""
    torch.manual_seed(0)
    module, x = design.build(), rows.reshape(-1, *design.shape)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in x[torch.randperm(len(x))].split(64):
            optimizer.zero_grad()
            loss = design.loss(module, batch)
            loss.backward()
            optimizer.step()
    return module
