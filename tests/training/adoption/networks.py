"""Networks in the styles in which people write them."""

from typing import Any

import torch
from torch import Tensor, nn


class ConvolutionalVae(nn.Module):
    """A VAE of images [1, 8, 8] that draws its code, with batch norm, pooling and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ELU(), nn.Flatten(),
        )  # fmt: skip
        self.mean, self.log_variance = nn.Linear(24, 3), nn.Linear(24, 3)
        self.expand = nn.Linear(3, 24)
        self.deconv = nn.Sequential(
            nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), nn.ReLU(),
            nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.features(x)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return self.deconv(self.expand(z).view(-1, 6, 2, 2)), mean, log_variance


class LstmAutoencoder(nn.Module):
    """An autoencoder of windows [N, 3]: the last state of an LSTM is repeated as the input of the decoder."""

    def __init__(self, steps: int = 5, kind: Any = nn.LSTM, bidirectional: bool = False) -> None:
        super().__init__()
        self.steps = steps
        self.encoder = kind(3, 4, batch_first=True, bidirectional=bidirectional)
        self.decoder = kind(8 if bidirectional else 4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x)[0][:, -1]
        hidden = self.decoder(code.unsqueeze(1).repeat(1, self.steps, 1))[0]
        result: Tensor = self.head(hidden)
        return result


class AttentionAutoencoder(nn.Module):
    """Self-attention over windows [5, 4], written out, with layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        heads = [layer(x).reshape(x.shape[0], x.shape[1], 2, 2).permute(0, 2, 1, 3) for layer in
                 (self.query, self.key, self.value)]  # fmt: skip
        weights = torch.softmax(heads[0] @ heads[1].transpose(2, 3) / 2**0.5, dim=-1)
        mixed = (weights @ heads[2]).permute(0, 2, 1, 3).reshape(x.shape)
        result: Tensor = self.out(nn.functional.gelu(self.norm(x + mixed)))
        return result


class Upsampling(nn.Module):
    """A convolutional autoencoder of images [2, 8, 8] with pooling, nearest and bilinear upsampling, and padding."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU6(), nn.AvgPool2d(2), nn.GroupNorm(2, 4))
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.Conv2d(4, 2, 3), nn.PReLU(), nn.AvgPool2d(2),
            nn.Upsample(scale_factor=2, mode="bilinear"), nn.Hardswish(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.up(self.down(x))
        return result


def perceptron(width: int = 6, code: int = 2) -> nn.Sequential:
    """Return an autoencoder of rows with many activations."""
    return nn.Sequential(
        nn.Linear(width, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, code), nn.Tanh(),
        nn.Linear(code, 8), nn.Softplus(), nn.Linear(8, 8), nn.SELU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, width),
    )  # fmt: skip


def settle(module: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Run some batches through `module`, so that its batch norms have statistics. Return it in evaluation mode."""
    torch.manual_seed(0)
    module.train()
    for _ in range(5):
        module(torch.randn(16, *shape) * 2 + 0.5)
    return module.eval().requires_grad_(False)
