# %% [markdown]
# # Adopt a convolutional VAE of digits
#
# The network draws its code in `forward`, and returns a tuple. Elbo takes the mean that the encoder returns as the code
# of a row, and draws nothing. `encode=` and `decode=` name the two functions: here a method and a part of the network.

# %%
import os

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import elbo

# %% [markdown]
# ## The data
#
# Set `MNIST` to an .npz file with `x_train`, as Keras has it, to use MNIST. Without it, the 1,797 digits of
# scikit-learn serve, enlarged from 8 x 8 to 28 x 28 pixels.

# %%
if path := os.environ.get("MNIST"):
    with np.load(path) as arrays:
        images = arrays["x_train"][:12_000] / 255.0
else:
    images = np.kron(load_digits().images / 16.0, np.ones((3, 3)))
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
images = images.astype(np.float32)[:, np.newaxis]  # [N, 1, 28, 28]
split = len(images) * 2 // 3
train, normal = images[:split], images[split:]
print(train.shape, normal.shape)

# %% [markdown]
# ## The trained network

# %%


class ConvolutionalVAE(nn.Module):
    """A VAE with convolutions and batch norm."""

    def __init__(self, latents: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.mean, self.log_variance = nn.Linear(16 * 49, latents), nn.Linear(16 * 49, latents)
        self.decoder = nn.Sequential(
            nn.Linear(latents, 16 * 49), nn.ReLU(), nn.Unflatten(1, (16, 7, 7)),
            nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and the logarithm of the variance of the code."""
        features = self.features(x)
        return self.mean(features), self.log_variance(features)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the reconstruction from a draw of the code, and the parameters of the draw."""
        mean, log_variance = self.encode(x)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return self.decoder(z), mean, log_variance


torch.manual_seed(0)
network = ConvolutionalVAE()
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
for _ in range(15):
    for batch in torch.tensor(train)[torch.randperm(len(train))].split(64):
        x_hat, mean, log_variance = network(batch)
        error = nn.functional.binary_cross_entropy(x_hat, batch, reduction="sum")
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
        loss = (error + divergence) / len(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(f"loss {loss:.1f} nats")

# %% [markdown]
# ## Adopt it
#
# The prior of a VAE is the standard normal distribution. With `prior="standard"`, samples come from it.

# %%
model = elbo.adopt(
    network,
    normal,
    name="digits-conv",
    fit_rows=train,
    prior="standard",
    encode="encode",
    decode="decoder",
    spread="log_variance",
)
print(model)

# %% [markdown]
# ## Use it

# %%
samples = model.sample(16, seed=1)
print("samples:", samples.shape)

p_values = model.p_value(normal[:200])
inverted = model.p_value(1.0 - normal[:200])
print(f"p-values of digits: {np.median(p_values):.2f}; of inverted digits: {np.median(inverted):.4f}")
assert np.median(inverted) < 0.01 < np.median(p_values)
